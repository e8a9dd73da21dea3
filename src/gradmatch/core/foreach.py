"""Many tensors handled as one: the same operation on each, in blocks that stay in cache.

:class:`TensorList` lets a rule be written once, in the words of a tensor (``m.lerp_(g, 0.1)``), and run on one tensor
or on a list, where each operation is one ``torch._foreach_`` call. :func:`blocks` cuts parallel lists into pieces that
fit the cache: a rule of k operations then streams its operands from memory once instead of k times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

BLOCK_BYTES = 4 * 2**20
"""Bytes of one block over all its operands. On two cores with 1 MiB of L2 each and 32 MiB of shared L3, 1 MiB is
slower (calls), 32 MiB too (memory), and 2 to 16 MiB are alike."""


_TAKES_TENSOR = ("mul", "div", "add")


class TensorList:
    """A list of tensors with the element-wise methods of one: ``x.mul_(2)``, ``x.lerp(y, 0.1)``, ``x.addcdiv_(m, v)``.

    Arguments are numbers, or lists of equally shaped tensors. In-place methods return the list itself.

    >>> x = TensorList([torch.ones(2), torch.ones(3)])
    >>> [t.tolist() for t in x.add(x, alpha=2)]
    [[3.0, 3.0], [3.0, 3.0, 3.0]]
    """

    __slots__ = ("tensors",)

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)

    def __getattr__(self, name: str) -> Callable[..., TensorList]:
        operation = getattr(torch, f"_foreach_{name}", None)
        if operation is None:
            raise AttributeError(f"TensorList has no operation {name!r}")

        in_place = name.endswith("_")
        scalar_by_tensor = name.rstrip("_") in _TAKES_TENSOR

        def call(*others: Any, **numbers: Any) -> TensorList:
            if scalar_by_tensor and isinstance(others[0], float | int):
                others = (self._scalar(others[0]), *others[1:])
            lists = [o.tensors if isinstance(o, TensorList) else o for o in others]
            result = operation(self.tensors, *lists, **numbers)
            return self if in_place else TensorList(result)

        return call

    def _scalar(self, x: float) -> float | Tensor:
        # on a CPU a list operation wraps a plain number anew for every tensor, at four times the cost
        first = self.tensors[0]
        plain = type(first) is Tensor or type(first) is nn.Parameter  # others may not mix with plain tensors
        return torch.tensor(x, dtype=first.dtype) if plain and first.device.type == "cpu" else x


Tensors = Any
"""A Tensor or a TensorList, whose methods a rule calls alike."""


def each(function: Callable[[Tensor], Tensor], x: Tensors) -> Tensors:
    """``function`` of a tensor, or of every tensor of a list."""
    return TensorList(map(function, x)) if isinstance(x, TensorList) else function(x)


def blocks(lists: Sequence[Sequence[Tensor]], limit: int = BLOCK_BYTES) -> Iterator[list[list[Tensor]]]:
    """Cut parallel lists, ``lists[k][i]`` of one shape for all k, into blocks of about ``limit`` bytes over all k.

    Contiguous tensors above the limit are cut into flat views of even length; others stay whole.

    >>> x = [torch.zeros(10), torch.zeros(2, 3)]
    >>> [[t.numel() for t in block[0]] for block in blocks([x], limit=20)]
    [[5], [5], [3], [3]]
    """
    most = max(1, limit // sum(own[0].element_size() for own in lists))
    sizes = [t.numel() for t in lists[0]]
    if sum(sizes) <= most:
        yield [list(own) for own in lists]
        return
    block: list[list[Tensor]] = [[] for _ in lists]
    filled = 0
    for size, *row in zip(sizes, *lists, strict=True):
        whole = size <= most or not all(t.is_contiguous() for t in row)
        for piece in [row] if whole else _cut(row, -(-size // most)):
            own = piece[0].numel()
            if filled and filled + own > most:
                yield block
                block, filled = [[] for _ in lists], 0
            for part, tensor in zip(block, piece, strict=True):
                part.append(tensor)
            filled += own
    yield block


def _cut(row: Sequence[Tensor], count: int) -> Iterable[Sequence[Tensor]]:
    """Flat views of ``count`` even parts of equally shaped, contiguous tensors."""
    length = -(-row[0].numel() // count)
    return zip(*(t.view(-1).split(length) for t in row), strict=True)
