"""Facility location: picks by confirmed gains; what they change is taken from all gains, several picks at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradmatch.core._greedy import EPS, Picks, as_picks, read
from gradmatch.core.kernel import Kernel, KernelName, Kind, MatrixKernel

_TILE = 2**18


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


@dataclass(frozen=True)
class _Looked:
    """Candidates with their float64 gains, and the similarities [rows, columns] they come from (None: all rows)."""

    columns: Tensor
    gains: Tensor
    rows: Tensor | None
    exact: Tensor

    def improved(self, place: int) -> tuple[Tensor | None, Tensor]:
        """The rows that the candidate at ``place`` could improve, and its similarities to them."""
        return self.rows, self.exact[:, place]


@dataclass(frozen=True)
class _Best:
    """The choice, what it adds, and below what gain it counts as adding nothing, with all that were confirmed."""

    chosen: int
    gain: float
    tolerance: float
    columns: Tensor
    improved: tuple[Tensor | None, Tensor]


class _Cover:
    """Coverage of every item in float64, and what every candidate would add to it.

    ``base`` holds the gains at an earlier coverage, ``at``, in about the working precision, and ``bound`` the same
    with the entries confirmed since then. Gains only fall, so that picks are made from confirmed gains as long as
    they stay above all bounds; the changes of several picks are then brought into ``base`` in one pass.

    ``error`` says how far ``base`` may be from the float64 gains. It follows the model of independent
    roundings, a few units for each entry and for each sum; what confirming finds to be worse raises it.
    """

    def __init__(self, kernel: Kernel, weights: Tensor) -> None:
        self.kernel, self.weights = kernel, weights
        self.covered = torch.zeros(kernel.items, dtype=torch.float64, device=kernel.device)
        self.at, self.pending, self.first = self.covered, False, True
        self.spent = torch.zeros(kernel.columns, dtype=torch.bool, device=kernel.device)
        self.known = torch.zeros_like(self.spent)
        self.unit = 4 * float(torch.finfo(kernel.dtype).eps)
        self.scale = float(kernel.row(0).abs().max()) or 1.0
        self.slip = 0.0 if kernel.exact_blocks else 16 * self.unit * self.scale
        self.base = kernel.sums(weights) if kernel.nonnegative else self._fresh()
        self.bound = self.base.clone()
        self.error = self._rounding(weights, self.scale * float(weights.sum()))

    def pick(self) -> tuple[int, float]:
        """Take the best candidate; returns its column and its gain."""
        found = self._best()
        while found is not None and found.gain <= found.tolerance:  # these can never add anything again
            self.spent[found.columns] = True
            self.base[found.columns] = self.bound[found.columns] = -torch.inf
            found = self._best()
        chosen = int(torch.nonzero(self.spent)[0]) if found is None else found.chosen
        self.base[chosen] = self.bound[chosen] = -torch.inf
        self.spent[chosen] = False
        if found is None:
            return chosen, 0.0
        self._cover_with(chosen, *found.improved)
        return chosen, found.gain

    def _best(self) -> _Best | None:
        """The lowest of the best candidates, once all that could be among them are confirmed; None if all are spent."""
        looked: list[_Looked] = []
        best = tolerance = -torch.inf
        while True:
            top = float(self.bound.max())
            if top == -torch.inf:
                return None
            near = self.bound >= max(top - 2 * self.error, best - self.error - tolerance)
            columns = torch.nonzero(near & ~self.known if looked else near).flatten()
            if not len(columns):
                break
            if looked and self.pending:
                self._catch_up(looked)
                continue
            for part in columns.split(max(1, 2**22 // self.kernel.items)):
                looked.append(self._confirm(part))
                self.known[part] = True
                self.bound[part] = looked[-1].gains
                best = max(best, float(looked[-1].gains.max()))
            tolerance = 64 * EPS * (best + self.scale * self.kernel.items**0.5)
        columns = torch.cat([look.columns for look in looked])
        self.known[columns] = False
        gains = torch.cat([look.gains for look in looked])
        if len(columns) == 1:
            return _Best(int(columns[0]), best, tolerance, columns, looked[0].improved(0))
        chosen = int(columns[gains >= best - tolerance].min())
        look = next(look for look in looked if bool((look.columns == chosen).any()))
        place = int(torch.nonzero(look.columns == chosen)[0])
        return _Best(chosen, float(look.gains[place]), tolerance, columns, look.improved(place))

    def _confirm(self, columns: Tensor) -> _Looked:
        """Float64 gains of a few candidates, from the rows that they could improve."""
        block = self.kernel.whole(columns)
        if self.kernel.exact_blocks:
            rows, exact, covered, weights = None, block.double(), self.covered, self.weights
        else:
            floor = (self.covered - self.slip).to(block.dtype)[:, None]
            rows = torch.nonzero((block >= floor).any(1)).flatten()
            exact = self.kernel.exact(rows, columns)
            covered, weights = self.covered[rows], self.weights[rows]
        gains = weights @ (exact - covered[:, None]).clamp_(min=0)
        if not self.pending:
            self.error = max(self.error, 4 * float((self.base[columns] - gains).abs().max()))
            self.base[columns] = gains
        return _Looked(columns, gains, rows, exact)

    def _cover_with(self, chosen: int, rows: Tensor | None, column: Tensor) -> None:
        if not self.pending:
            self.at = self.covered.clone()
        if rows is None:
            torch.maximum(self.covered, column, out=self.covered)
        else:
            self.covered[rows] = torch.maximum(self.covered[rows], column)
        self.pending = True
        if self.first:  # everything changed, and small gains are not to be had from large differences
            self.base = self._fresh()
            self.base[chosen] = -torch.inf
            self.base[self.spent] = -torch.inf
            self.error = self._rounding(self.weights, float(self.base.max()))
            self.bound, self.pending, self.first = self.base.clone(), False, False

    def _catch_up(self, looked: list[_Looked]) -> None:
        """Bring ``base`` and all bounds to the present coverage, at which ``looked`` were confirmed."""
        rows = torch.nonzero(self.covered > self.at).flatten()
        self._subtract(rows, self.at[rows], self.covered[rows])
        self.pending = False
        for look in looked:
            self.base[look.columns] = look.gains
        self.bound = self.base.clone()

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
        low, w = before.to(dtype)[:, None], self.weights[rows].to(dtype)
        most = after.to(dtype)[:, None] - low
        places = torch.arange(len(rows), device=rows.device)
        for part, columns in self._tiles(places):
            lost = self.kernel.block(rows[part], columns).sub_(low[part]).clamp_(min=0)
            torch.minimum(lost, most[part], out=lost)  # a third of the time of clamping between two tensors
            self.base[columns] -= (w[part] @ lost).double()
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
