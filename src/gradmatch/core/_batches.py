"""Data in a fixed order: tensors, datasets and loaders as one sequence of checked batches."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset, RandomSampler, SubsetRandomSampler, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from gradmatch.core.checks import InputError, finite, require, whole

__all__ = ["Batch", "OrderedData", "examples_of"]


@dataclass(frozen=True)
class Batch:
    """Some consecutive examples.

    ``inputs`` and ``target`` are tensors, or tuples or dicts of tensors, whose first dimension is the example;
    ``start`` is the position of the first example in the whole data, ``groups`` the group ids (long [m]) or None.
    """

    inputs: Any
    target: Any
    start: int
    groups: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of examples."""
        return int(tree_leaves(self.inputs)[0].shape[0])

    def take(self, index: slice | Tensor) -> Batch:
        """The chosen examples (``start`` is kept and means nothing for a scattered choice)."""

        def pick(tree: Any) -> Any:
            return tree_map(lambda t: t[index], tree)

        return Batch(
            pick(self.inputs),
            pick(self.target),
            self.start + ((index.start or 0) if isinstance(index, slice) else 0),
            None if self.groups is None else self.groups[index],
        )

    def split(self, chunk: int | None) -> Iterator[Batch]:
        """Pieces of at most ``chunk`` examples (None: the batch itself)."""
        if chunk is None or chunk >= self.size:
            yield self
            return
        for start in range(0, self.size, chunk):
            yield self.take(slice(start, start + chunk))

    def detached(self) -> Batch:
        """The same values, cut from any graph."""
        inputs, target = tree_map(lambda t: t.detach(), (self.inputs, self.target))
        return Batch(inputs, target, self.start, self.groups)


def _pair(item: Any) -> tuple[Any, Any]:
    """(inputs, target) of what a loader yields; a dict's target is its "labels" or else the dict itself."""
    if isinstance(item, Mapping):
        inputs = {k: v for k, v in item.items() if k != "labels"}
        return inputs, item.get("labels", inputs)
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return _tensors(item[0]), _tensors(item[1])
    raise InputError(
        f"data yields {type(item).__name__}; each batch must be a pair (inputs, target) or a dict of tensors."
    )


def _tensors(tree: Any) -> Any:
    """Tensors of arrays and tuples of lists, as the model is called with ``*tuple`` or ``**dict``."""
    if isinstance(tree, list) and tree and all(isinstance(t, Tensor) for t in tree):
        return tuple(tree)
    return tree_map(lambda t: t if isinstance(t, Tensor) else torch.as_tensor(t), tree)


def _checked(inputs: Any, target: Any) -> int:
    """Number of examples of one batch, after checking that all its tensors agree and are finite."""
    leaves = tree_leaves((inputs, target))
    require(bool(leaves) and all(isinstance(t, Tensor) for t in leaves), "data must consist of tensors.")
    sizes = {int(t.shape[0]) if t.ndim else 0 for t in leaves}
    require(
        len(sizes) == 1 and 0 not in sizes,
        f"data has tensors of first dimension {sorted(sizes)}; all need the same number of examples, at least one.",
    )
    for leaf in leaves:
        finite("data", leaf)
    return sizes.pop()


def _checksums(tree: Any, before: tuple[int, ...] | None) -> tuple[int, ...]:
    """For each tensor, a checksum of its bytes in all batches so far."""
    leaves = tree_leaves(tree)
    flat = [leaf.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy() for leaf in leaves]
    return tuple(zlib.crc32(f, code) for f, code in zip(flat, before or [0] * len(flat), strict=False))


_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def _shuffles(loader: DataLoader[Any]) -> bool:
    samplers = [loader.sampler, getattr(loader.batch_sampler, "sampler", None)]
    return any(
        isinstance(s, _SHUFFLING) or (isinstance(s, DistributedSampler) and s.shuffle) for s in samplers
    )


def examples_of(source: Any) -> Dataset[Any] | None:
    """A map-style data set of single examples, if the source is one; columns of a Hugging Face table as tensors."""
    if isinstance(source, Dataset) and hasattr(source, "__len__"):
        return source
    if hasattr(source, "column_names") and hasattr(source, "with_format") and hasattr(source, "__len__"):
        table: Any = source.with_format("torch") if source.format["type"] is None else source
        return cast("Dataset[Any]", table)
    return None


class OrderedData:
    """A source of examples, walked in the same order each time.

    In-memory data is sliced. Anything else is walked once at construction to count and check it, and every later
    walk is compared with that one batch by batch, so that a source that changes is refused where it changes.
    """

    def __init__(self, source: Any, batch_size: int = 256, check_order: bool = True) -> None:
        self.batch_size = whole("batch_size", batch_size)
        self._whole: tuple[Any, Any] | None = None
        self._codes: list[tuple[int, ...]] | None = None  # after every batch
        source = self._normal(source)
        if isinstance(source, DataLoader) and check_order and _shuffles(source):
            raise InputError(
                'data is a shuffling DataLoader; it needs shuffle=False, or allow="order" to accept changing order.'
            )
        self._source = source
        self._check_order = check_order
        sizes = [_checked(*self._whole)] if self._whole else self._survey()
        self.n = sum(sizes)
        self.sizes = self._sliced_sizes() if self._whole else sizes

    def _normal(self, source: Any) -> Any:
        """Settle what ``source`` is: in memory (a tuple or dict), a Dataset, or an iterable of batches."""
        if hasattr(source, "x") and hasattr(source, "y"):
            source = (source.x, source.y)
        if isinstance(source, list) and len(source) == 2 and all(isinstance(t, Tensor) for t in source):
            source = tuple(source)
        if isinstance(source, (tuple, Mapping)):
            self._whole = _pair(source)
        elif (examples := examples_of(source)) is not None:
            return DataLoader(examples, batch_size=self.batch_size, shuffle=False)
        else:
            require(
                hasattr(source, "__iter__") and not hasattr(source, "__next__"),
                f"data is {type(source).__name__}; it must be (inputs, target) tensors, a dict of tensors, a Dataset "
                "or something that can be walked again and again, such as a DataLoader or a list of batches.",
            )
        return source

    def _survey(self) -> list[int]:
        sizes: list[int] = []
        codes: list[tuple[int, ...]] = []
        for item in self._source:
            pair = _pair(item)
            sizes.append(_checked(*pair))
            codes.append(_checksums(pair, codes[-1] if codes else None))
        require(bool(sizes), "data is empty; at least one example is needed.")
        self._codes = codes if self._check_order else None
        return sizes

    def _sliced_sizes(self) -> list[int]:
        return [min(self.batch_size, self.n - s) for s in range(0, self.n, self.batch_size)]

    def fingerprint(self) -> str:
        """A checksum of all examples in their order, however they are batched; refused where the order may change."""
        if self._whole is not None:
            codes = _checksums(self._whole, None)
        else:
            require(
                bool(self._codes), 'data may change between passes (allow="order"); it has no fingerprint.'
            )
            codes = (self._codes or [()])[-1]
        return hashlib.sha256(repr((self.n, codes)).encode()).hexdigest()[:16]

    def __iter__(self) -> Iterator[Batch]:
        start = 0
        if self._whole is not None:
            everything = Batch(*self._whole, start=0)
            yield from everything.split(self.batch_size)
            return
        count, codes = 0, None
        for count, item in enumerate(self._source, 1):
            inputs, target = _pair(item)
            if self._codes is None:
                _checked(inputs, target)
            else:
                codes = _checksums((inputs, target), codes)
            if self._codes is not None and (count > len(self._codes) or codes != self._codes[count - 1]):
                raise InputError(
                    f"data changed between passes (batch {count - 1}); it must come in a fixed order without random "
                    'transforms, or be accepted with allow="order".'
                )
            batch = Batch(inputs, target, start)
            start += batch.size
            yield batch
        if self._codes is not None and count < len(self._codes):
            raise InputError(
                f"data had {len(self._codes)} batches and now has {count}; it must stay the same."
            )
