"""Parameters of one type and device as views of one vector, and their gradients as views of another.

A rule that works element by element then runs on a few long vectors instead of on every tensor: a thousand tensors of
a hundred numbers cost one call in place of a thousand.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from gradmatch.core.checks import refuse, require

ALIGN = 64
"""Bytes to which every view is aligned, so that kernels read parameters as fast as in storage of their own."""


class FlatStorage:
    """The vectors ``values`` and ``gradients`` [n], and the views of both that the parameters are made of.

    Args:
        params: leaf tensors of one dtype and device, each dense in memory and alone in its storage. Their ``data`` is
            moved into the vector; the tensor objects stay the same.
        first: number of the first one, for messages.

    Raises:
        InputError: a tensor that cannot be a view (see :func:`flat_storages`).

    >>> p = torch.nn.Parameter(torch.ones(2, 3))
    >>> flat = FlatStorage([p])
    >>> flat.values.mul_(2.0) is flat.values, p.sum().item()
    (True, 12.0)
    """

    def __init__(self, params: Sequence[Tensor], first: int = 0) -> None:
        self.params = list(params)
        self.first = first
        self._check()
        step = max(1, ALIGN // params[0].element_size())
        self.starts, end = [], 0
        for p in params:
            self.starts.append(end)
            end += -(-p.numel() // step) * step
        self.starts.append(end)
        self.values = torch.zeros(end, dtype=params[0].dtype, device=params[0].device)
        self.gradients = torch.zeros_like(self.values)
        self._values, self._gradients = self.views(self.values), self.views(self.gradients)
        with torch.no_grad():
            torch._foreach_copy_(self._values, [p.detach() for p in params])
        for p, view in zip(params, self._values, strict=True):
            p.data = view
        self._places = [v.data_ptr() for v in self._values]
        self._gradient_places = [v.data_ptr() for v in self._gradients]

    def _check(self) -> None:
        for i, p in enumerate(self.params, self.first):
            what = f"parameter {i} of shape {tuple(p.shape)}"
            require(
                p.layout is torch.strided and not p.is_meta,
                f"{what} is {p.layout} on {p.device}; flat=True needs dense tensors.",
            )
            require(
                dense(p),
                f"{what} has strides {p.stride()}, with gaps or overlaps; flat=True cannot view it.",
            )
            require(
                p.untyped_storage().nbytes() == p.numel() * p.element_size(),
                f"{what} shares its storage with other tensors, a tie that flat=True would cut; "
                "give it storage of its own (p.data = p.data.clone()) or use flat=False.",
            )

    def views(self, vector: Tensor) -> list[Tensor]:
        """The parameters' parts of a vector [n], each with its parameter's shape and strides."""
        return [
            vector.as_strided(p.shape, p.stride(), start)
            for p, start in zip(self.params, self.starts[:-1], strict=True)
        ]

    def collect(self) -> list[bool]:
        """Bring every gradient into ``gradients``; say which parameters have one.

        Gradients that are no longer views of the vector (dropped by ``module.zero_grad()``, or replaced) are copied
        into it, and the view is put back.

        Raises:
            InputError: a parameter or a gradient was moved to other storage since.
        """
        if [p.data_ptr() for p in self.params] != self._places:
            moved = next(
                i
                for i, p in enumerate(self.params, self.first)
                if p.data_ptr() != self._places[i - self.first]
            )
            refuse(
                f"parameter {moved} was moved to other storage after the optimizer was made; with flat=True, move or "
                "cast the model first and make the optimizer then."
            )
        found = [p.grad for p in self.params]
        if all(g is v for g, v in zip(found, self._gradients, strict=True)):
            self._check_gradients()
            return [True] * len(found)
        new = {i: g for i, g in enumerate(found) if g is not None and g is not self._gradients[i]}
        for i, g in new.items():
            require(
                g.layout is torch.strided,
                f"parameter {i + self.first} has a sparse gradient; flat=True needs dense ones.",
            )
        if new:
            with torch.no_grad():
                torch._foreach_copy_([self._gradients[i] for i in new], list(new.values()))
        for i in new:
            self.params[i].grad = self._gradients[i]
        self._check_gradients()
        return [g is not None for g in found]

    def _check_gradients(self) -> None:
        require(
            [v.data_ptr() for v in self._gradients] == self._gradient_places,
            "a gradient was moved to other storage after the optimizer was made; with flat=True, move or cast the "
            "model first and make the optimizer then.",
        )

    def zero_gradients(self) -> None:
        """Zero the gradients; those that are views stay views."""
        self.gradients.zero_()
        for p, view in zip(self.params, self._gradients, strict=True):
            if p.grad is not None and p.grad is not view:
                p.grad = view

    def span(self, start: int, stop: int) -> slice:
        """Place in the vectors of parameters ``start`` to ``stop - 1``."""
        return slice(self.starts[start], self.starts[stop])


def dense(p: Tensor) -> bool:
    """Whether the tensor's numbers fill one stretch of memory, each in a place of its own."""
    expected = 1
    for stride, size in sorted((st, s) for s, st in zip(p.shape, p.stride(), strict=True) if s != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def flat_storages(params: Sequence[Tensor]) -> list[FlatStorage]:
    """One :class:`FlatStorage` for each run of consecutive parameters of one dtype and device.

    Refused: sparse or meta tensors, tensors with gaps or overlaps, tensors that share storage, tensors without numbers.
    """
    runs: defaultdict[int, list[Tensor]] = defaultdict(list)
    firsts: list[int] = []
    for i, p in enumerate(params):
        before = params[i - 1] if i else None
        if before is None or (p.dtype, p.device) != (before.dtype, before.device):
            firsts.append(i)
        runs[firsts[-1]].append(p)
    return [FlatStorage(runs[first], first) for first in firsts]
