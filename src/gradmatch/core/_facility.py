"""Facility location by updates: a pick raises the coverage of few items, and gains lose what those rows lose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradmatch.core._greedy import EPS, Picks, as_picks, lowest, read
from gradmatch.core.kernel import Kernel, KernelName, Kind, MatrixKernel

_TILE = 2**18
_SPENT = -1.0
"""Stands for the gain of a candidate found to add nothing; it can never add anything again."""


def facility_location(
    source: Any,
    budget: int,
    *,
    kind: Kind = "similarity",
    kernel: KernelName = "cosine",
    weights: Any = None,
    candidates: Any = None,
    gram_limit: int = 2**28,
) -> Picks:
    """Pick items so that every item has a similar pick: maximise sum_i w_i max(0, max over picks of s(i, pick)).

    Args:
        source: similarity matrix [n, n] (entry (i, j) says how well pick j covers item i) or features [n, m].
        budget: number of picks, at most the number of candidates.
        kind: ``"similarity"`` or ``"features"``.
        kernel: similarity of features: ``"cosine"`` is (1 + cos) / 2, ``"dot"``, or a function of two blocks.
        weights: importance [n] of covering each item, at least 0; default one each.
        candidates: indices that may be picked; default all.
        gram_limit: bytes up to which features are turned into a matrix; above it blocks are recomputed.

    Returns:
        Picks in order. The gains never increase.

    Raises:
        InputError: bad shapes, NaN, a budget outside 1..candidates, negative weights.

    >>> s = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> facility_location(s, 2).indices.tolist()
    [0, 2]
    """
    similarities, names, w = read(source, budget, kind, kernel, weights, candidates, gram_limit)
    state = _Cover(similarities, w)
    found = [state.pick() for _ in range(budget)]
    return as_picks([p for p, _ in found], [g for _, g in found], names)


class _Cover:
    """Coverage of every item in float64, and gains of all candidates in about the working precision.

    ``error`` says how far the gains may be from the float64 ones. It follows the model of independent
    roundings, a few units for each entry and for each sum; what confirming finds to be worse raises it.
    """

    def __init__(self, kernel: Kernel, weights: Tensor) -> None:
        self.kernel, self.weights = kernel, weights
        self.covered = torch.zeros(kernel.items, dtype=torch.float64, device=kernel.device)
        self.picked: list[int] = []
        self.spent = torch.zeros(kernel.columns, dtype=torch.bool, device=kernel.device)
        self.any_spent = False
        self.last = (torch.empty(0, dtype=torch.long), torch.empty(0, 0))
        self.unit = 4 * float(torch.finfo(kernel.dtype).eps)
        self.scale = float(kernel.row(0).abs().max()) or 1.0
        self.slip = 0.0 if kernel.exact_blocks else 16 * self.unit * self.scale
        self.gains = kernel.sums(weights) if kernel.nonnegative else self._fresh()
        self.error = self._rounding(weights, self.scale * float(weights.sum()))

    def pick(self) -> tuple[int, float]:
        """Take the best candidate; returns its column and its gain."""
        chosen, gain = self._best()
        self.picked.append(chosen)
        self.gains[chosen] = -torch.inf
        if gain > 0:
            self._cover_with(chosen)
        if self.any_spent:
            self.gains[self.spent] = _SPENT
            self.gains[self.picked] = -torch.inf
        return chosen, gain

    def _best(self) -> tuple[int, float]:
        while True:
            top = self.gains.max()
            if top == _SPENT:
                return int(torch.nonzero(self.gains == _SPENT)[0]), 0.0
            near = torch.nonzero((self.gains >= top - 2 * self.error) & (self.gains > _SPENT)).flatten()
            true = self._confirm(near)
            self.error = max(self.error, 4 * float((self.gains[near] - true).abs().max()))
            self.gains[near] = true
            tolerance = 64 * EPS * (float(true.max()) + self.scale * self.kernel.items**0.5)
            place = lowest(true, tolerance)
            if float(true[place]) > tolerance:
                return int(near[place]), float(true[place])
            self.spent[near], self.any_spent = True, True
            self.gains[near] = _SPENT

    def _confirm(self, near: Tensor) -> Tensor:
        """Float64 gains of a few candidates, from the rows that they could improve."""
        parts = []
        for columns in near.split(max(1, 2**22 // self.kernel.items)):
            block = self.kernel.whole(columns)
            self.last = columns, block
            floor = (self.covered - self.slip).to(block.dtype)[:, None]
            rows = torch.nonzero((block >= floor).any(1)).flatten()
            exact = block[rows] if block.dtype == torch.float64 else self.kernel.exact(rows, columns)
            parts.append(self.weights[rows] @ (exact - self.covered[rows, None]).clamp_(min=0))
        return torch.cat(parts)

    def _cover_with(self, chosen: int) -> None:
        column = torch.tensor([chosen], device=self.kernel.device)
        at = torch.nonzero(self.last[0] == chosen).flatten()
        block = self.last[1][:, at] if len(at) else self.kernel.whole(column)
        rows = torch.nonzero(block[:, 0] >= (self.covered - self.slip).to(block.dtype)).flatten()
        before = self.covered[rows]
        after = torch.maximum(before, self.kernel.exact(rows, column)[:, 0])
        self.covered[rows] = after
        if (
            len(self.picked) == 1
        ):  # everything changed, and small gains are not to be had from large differences
            self.gains = self._fresh()
            self.gains[chosen] = -torch.inf
            self.error = self._rounding(self.weights, float(self.gains.max()))
            return
        changed = after > before
        self._subtract(rows[changed], before[changed], after[changed])

    def _fresh(self) -> Tensor:
        """Gains sum_i w_i max(0, s(i, c) - covered_i) of all candidates."""
        kernel, w = self.kernel, self.weights.to(self.kernel.dtype)
        floor = self.covered.to(kernel.dtype)[:, None]
        total = torch.zeros(kernel.columns, dtype=torch.float64, device=kernel.device)
        for rows, columns in self._tiles(torch.arange(kernel.items, device=kernel.device)):
            total[columns] += (w[rows] @ kernel.block(rows, columns).sub_(floor[rows]).clamp_(min=0)).double()
        return total

    def _subtract(self, rows: Tensor, before: Tensor, after: Tensor) -> None:
        """Take from the gains what a rise of coverage takes: sum_i w_i (clamp(s, before_i, after_i) - before_i)."""
        dtype = self.kernel.dtype
        low, high, w = before.to(dtype)[:, None], after.to(dtype)[:, None], self.weights[rows].to(dtype)
        places = torch.arange(len(rows), device=rows.device)
        for part, columns in self._tiles(places):
            floor = low[part]
            block = self.kernel.block(rows[part], columns)
            torch.clamp(block, min=floor, max=high[part], out=block)
            self.gains[columns] -= (w[part] @ block.sub_(floor)).double()
        rise = float(self.weights[rows] @ (after - before))
        self.error = (self.error**2 + self._rounding(self.weights[rows], rise) ** 2) ** 0.5

    def _rounding(self, weights: Tensor, mass: float) -> float:
        return self.unit * (self.scale * float(weights.norm()) + mass)

    def _tiles(self, rows: Tensor) -> list[tuple[Tensor, slice]]:
        """Pieces of rows x candidates that stay in cache: thin and wide where the matrix exists."""
        kernel = self.kernel
        made = isinstance(kernel, MatrixKernel) or getattr(kernel, "gram", None) is not None
        height = max(1, min(len(rows), _TILE // kernel.columns if made else 256))
        width = max(1, (_TILE if made else 4 * _TILE) // height)
        return [
            (part, slice(start, min(start + width, kernel.columns)))
            for part in rows.split(height)
            for start in range(0, kernel.columns, width)
        ]
