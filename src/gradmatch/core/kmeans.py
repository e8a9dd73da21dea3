"""k-means on a line, to the optimum: the best k codes for any number of values.

Clusters of sorted values are intervals, so the optimum is a dynamic programme over k - 1 boundaries, whose steps
are row minima of a Monge matrix (Aggarwal, Klawe, Moran, Shor, Wilber 1987; Wu 1991 for quantisers). Over millions
of values it need not see every place: places are first taken in cells. A cluster from anywhere in one cell to
anywhere in another costs at least what lies between the two cells, which bounds from below every solution through a
cell; cells whose bound is above the cost of a solution at hand are dropped, the others are cut, until cells are
single places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gradmatch.core import checks

CELLS, PARTS = 512, 8
"""Cells of each boundary at first, and the parts into which one that stays is cut."""
MOST = 2**20
"""Cells of all boundaries at which the search ends with a bound in place of a proof."""
LLOYD = 100


@dataclass(frozen=True)
class Codes:
    """The outcome of :func:`kmeans_1d`.

    Attributes:
        codes: ascending [k], float64; with fewer than k distinct values the last is repeated.
        cost: weighted sum of squared distances to the nearest code.
        gap: by what share of ``cost`` the optimum may at most be lower; 0 where this is the optimum.
    """

    codes: Float[Tensor, " k"]
    cost: float
    gap: float


def kmeans_1d(values: Tensor, k: int, weights: Tensor | None = None) -> Codes:
    """The k codes with the least (weighted) sum of squared distances to their nearest values.

    Exact unless k is so large that boundaries cannot be told apart early (64 codes of many millions of values); then
    ``gap`` says how far from the optimum the result can be.

    Args:
        values: any shape, finite.
        k: number of codes.
        weights: above 0, of the same shape; default all 1.

    Raises:
        InputError: no values, NaN or infinity, or weights that do not fit.

    >>> kmeans_1d(torch.tensor([0.0, 0.2, 1.0, 1.2]), 2).codes
    tensor([0.1000, 1.1000], dtype=torch.float64)
    """
    checks.whole("k", k)
    line = _Line.of(values, weights)
    n = len(line)
    if k >= n:
        codes = np.append(line.at, np.repeat(line.at[-1:], k - n))
        return Codes(torch.from_numpy(codes), 0.0, 0.0)
    cuts, gap = _search(line, k) if k > 1 else (np.empty(0, np.int64), 0.0)
    codes, cost = line.clusters(cuts)
    return Codes(torch.from_numpy(codes + line.mean), cost, gap)


class _Line:
    """Distinct values in order, centred, and sums of 1, x and x^2 over those before each place 0..n."""

    def __init__(self, at: np.ndarray, sums: np.ndarray, mean: float) -> None:
        self.at, self.sums, self.mean = at, sums, mean

    def __len__(self) -> int:
        return len(self.at)

    @classmethod
    def of(cls, values: Tensor, weights: Tensor | None) -> _Line:
        flat = checks.finite("values", values.detach()).reshape(-1).cpu()
        checks.require(len(flat) > 0, "values is empty; at least one is needed.")
        x = (flat if flat.dtype == torch.float64 else flat.float()).numpy()
        if weights is None:
            x, mass = np.sort(x), None
        else:
            checks.same_length("values", flat, "weights", weights.reshape(-1))
            mass = weights.detach().reshape(-1).cpu().double().numpy()
            checks.require(bool((mass > 0).all()), "weights holds values that are not above 0.")
            order = np.argsort(x, kind="stable")
            x, mass = x[order], mass[order]
        mean = float(x.mean(dtype=np.float64))
        edges = np.flatnonzero(np.concatenate(([True], x[1:] != x[:-1], [True])))
        centred = x.astype(np.float64) - mean
        one = np.ones(1) if mass is None else mass
        sums = [edges.astype(np.float64)] if mass is None else [_before(mass, edges)]
        sums += [_before(one * centred, edges), _before(one * centred * centred, edges)]
        return cls(x[edges[:-1]].astype(np.float64), np.stack(sums), mean)

    def clusters(self, cuts: np.ndarray) -> tuple[np.ndarray, float]:
        """Mean of each interval between neighbouring cuts (centred), and the cost of all."""
        ends = self.sums[:, np.concatenate(([0], cuts, [len(self)]))]
        mass, first, _ = np.diff(ends)
        return first / mass, float(_cost(ends[:, :-1], ends[:, 1:]).sum())

    def polished(self, cuts: np.ndarray) -> tuple[np.ndarray, float]:
        """Cuts moved to the middles between their means until nothing moves (Lloyd), and the cost."""
        for _ in range(LLOYD):
            means = self.clusters(cuts)[0] + self.mean
            moved = np.searchsorted(self.at, (means[1:] + means[:-1]) / 2)
            moved = np.maximum.accumulate(np.clip(moved, 1, len(self) - 1))
            if np.array_equal(moved, cuts) or bool((np.diff(moved) == 0).any()):
                break
            cuts = moved
        return cuts, self.clusters(cuts)[1]


def _before(x: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.concatenate(([0.0], np.cumsum(x)))[edges]


def _cost(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Squared distances to their mean of the values between two places, given the sums [3, ...]; 0 if there is none."""
    mass, first, second = right - left
    return np.where(mass > 0, np.maximum(second - first * first / np.where(mass > 0, mass, 1), 0), 0)


def _search(line: _Line, k: int) -> tuple[np.ndarray, float]:
    """The best cuts, and the share of their cost by which they may miss the optimum."""
    edges = np.unique(np.linspace(1, len(line), CELLS + 1).astype(np.int64))
    cells = [(edges[:-1], edges[1:] - 1)] * (k - 1)
    best, least = np.empty(0, np.int64), np.inf
    while True:
        forward, back = _forward(line, cells)
        whole = forward[-1] + _cost(line.sums[:, cells[-1][1]], line.sums[:, -1:])
        cuts, cost = line.polished(_followed(cells, back, int(whole.argmin()), len(line)))
        if cost < least:
            best, least = cuts, cost
        if all(np.array_equal(lo, hi) for lo, hi in cells):
            return best, 0.0
        if sum(len(lo) for lo, _ in cells) > MOST:
            return best, max(0.0, 1 - float(whole.min()) / least)
        most = least * (1 + 1e-9) + 1e-13 * line.sums[2, -1]
        backward = _backward(line, cells)
        kept = [f + b <= most for f, b in zip(forward, backward, strict=True)]
        cells = [_cut(lo[keep], hi[keep]) for (lo, hi), keep in zip(cells, kept, strict=True)]


Cells = list[tuple[np.ndarray, np.ndarray]]
"""For each boundary the first and the last place of every cell, in order."""


def _forward(line: _Line, cells: Cells) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Least cost of all before each cell, by boundary, and the cell of the boundary before that it comes from."""
    found = [_cost(line.sums[:, :1], line.sums[:, cells[0][0]])]
    back: list[np.ndarray] = []
    for (_, hi), (lo, _) in pairwise(cells):
        least, arg = _row_minima(len(lo), len(hi), _costs(line, lo, hi, found[-1], False))
        found.append(least)
        back.append(arg)
    return found, back


def _backward(line: _Line, cells: Cells) -> list[np.ndarray]:
    """Least cost of all after each cell, by boundary."""
    found = [_cost(line.sums[:, cells[-1][1]], line.sums[:, -1:])]
    for (_, hi), (lo, _) in reversed(list(pairwise(cells))):
        found.append(_row_minima(len(hi), len(lo), _costs(line, hi, lo, found[-1], True))[0])
    return found[::-1]


Entry = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Entries of a matrix at rows and columns."""


def _costs(line: _Line, rows: np.ndarray, columns: np.ndarray, base: np.ndarray, onwards: bool) -> Entry:
    """Entry (r, c): ``base[c]`` and the cost of what lies between place r and place c, after it if ``onwards``."""
    of_rows, of_columns = line.sums[:, rows], line.sums[:, columns]

    def entry(r: np.ndarray, c: np.ndarray) -> np.ndarray:
        ends = of_rows[:, r], of_columns[:, c]
        found: np.ndarray = base[c] + (_cost(*ends) if onwards else _cost(*ends[::-1]))
        return found

    return entry


def _row_minima(rows: int, columns: int, entry: Entry) -> tuple[np.ndarray, np.ndarray]:
    """Minimum and its column for each row of a matrix whose minima only move right from row to row.

    A row's minimum lies between those of any rows before and after it, so the rows of one level of halving are searched
    at once, in about rows + columns entries.
    """
    size = 1 << rows.bit_length()
    least, where = np.empty(rows), np.full(size + 1, columns - 1)
    where[0] = 0
    step = size // 2
    while step:
        r = np.arange(
            step, rows + 1, 2 * step
        )  # row r - 1 of the matrix; its neighbours at this distance are known
        low = where[r - step]
        count = where[r + step] - low + 1
        begin = np.cumsum(count) - count
        of = np.repeat(np.arange(len(r)), count)
        column = np.arange(len(of)) - (begin - low)[of]
        value = entry(r[of] - 1, column)
        smallest = np.minimum.reduceat(value, begin)
        hit = np.flatnonzero(value == smallest[of])
        first = np.unique(of[hit], return_index=True)[1]
        least[r - 1], where[r] = smallest, column[hit[first]]
        step //= 2
    return least, where[1 : rows + 1]


def _followed(cells: Cells, back: list[np.ndarray], last: int, n: int) -> np.ndarray:
    """A cut in each cell of the best path, which ends in cell ``last``; distinct and in order."""
    chosen = [last]
    for arg in reversed(back):
        chosen.append(int(arg[chosen[-1]]))
    cuts = np.array([lo[c] for (lo, _), c in zip(cells, reversed(chosen), strict=True)])
    steps = np.arange(len(cuts))
    return np.minimum(np.maximum.accumulate(cuts - steps), n - len(cuts)) + steps


def _cut(lo: np.ndarray, hi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every cell in up to ``PARTS`` parts."""
    length = hi - lo + 1
    parts = np.minimum(length, PARTS)
    of = np.repeat(np.arange(len(lo)), parts)
    k = np.arange(len(of)) - (np.cumsum(parts) - parts)[of]
    first = lo[of] + k * length[of] // parts[of]
    last = lo[of] + (k + 1) * length[of] // parts[of] - 1
    return first, last
