"""Graph cut by sum vectors: a pick subtracts one row of similarities from all gains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core._greedy import EPS, Picks, as_picks, lowest, read
from gradmatch.core.kernel import Kernel, KernelName, Kind, LinearKernel


def graph_cut(
    source: Any,
    budget: int,
    *,
    lam: float = 1.0,
    kind: Kind = "similarity",
    kernel: KernelName = "cosine",
    weights: Any = None,
    candidates: Any = None,
    gram_limit: int = 2**28,
) -> Picks:
    """Pick items that are similar to all and not to each other.

    The gain of x given picks A is lam * sum_p w_p s(p, x) - 2 * sum_{a in A} s(a, x), p over all items.
    With features and a named kernel one pick costs O(n m) by sum vectors, and O(n) if the matrix fits.

    Args:
        source: similarity matrix [n, n] or features [n, m].
        budget: number of picks, at most the number of candidates.
        lam: weight of similarity to all, above 0; 1 is the usual choice.
        kind, kernel, weights, candidates, gram_limit: as in :func:`facility_location`.

    Returns:
        Picks in order, with gains (which may be negative).

    Raises:
        InputError: as :func:`facility_location`, or ``lam`` not above 0.

    >>> graph_cut(torch.eye(3) + 1, 3).indices.tolist()
    [0, 1, 2]
    """
    checks.positive("lam", lam)
    similarities, names, w = read(source, budget, kind, kernel, weights, candidates, gram_limit)
    items = torch.arange(similarities.items, device=w.device) if candidates is None else names
    return _graph_cuts(similarities, items, [budget], lam, w)[0]


def graph_cut_bins(
    source: Any,
    sizes: Sequence[int],
    *,
    lam: float = 1.0,
    kind: Kind = "similarity",
    kernel: KernelName = "cosine",
    gram_limit: int = 2**28,
) -> list[Picks]:
    """One graph cut after another, each on the items that the earlier ones left over.

    Args:
        source: similarity matrix [n, n] or features [n, m].
        sizes: number of picks of each bin, together at most n.
        lam, kind, kernel, gram_limit: as in :func:`graph_cut`.

    Returns:
        One ``Picks`` for each size, disjoint. The same as calling :func:`graph_cut` on what remains each time.

    >>> [len(bin) for bin in graph_cut_bins(torch.eye(5), [2, 3])]
    [2, 3]
    """
    checks.positive("lam", lam)
    checks.require(len(sizes) > 0, "sizes is empty; it must name at least one bin.")
    sizes = [checks.whole("sizes", s) for s in sizes]
    similarities, names, w = read(source, sum(sizes), kind, kernel, None, None, gram_limit)
    return _graph_cuts(similarities, names, sizes, lam, w)


def _graph_cuts(
    kernel: Kernel, names: Tensor, sizes: Sequence[int], lam: float, weights: Tensor
) -> list[Picks]:
    total = kernel.sums(weights)
    gone = torch.zeros(kernel.columns, dtype=torch.bool, device=kernel.device)
    remaining = weights.clone()
    bins: list[Picks] = []
    for size in sizes:
        cut = _GraphCut(kernel, names, total, gone, remaining, lam)
        picked = [cut.pick() for _ in range(size)]
        bins.append(as_picks([p for p, _ in picked], [g for _, g in picked], names))
        remaining[bins[-1].indices] = 0
        if len(bins) < len(sizes):
            total = total - _sum_over(kernel, bins[-1].indices)
    return bins


def _sum_over(kernel: Kernel, items: Tensor) -> Tensor:
    """sum over ``items`` of their similarities with every candidate, float64 [columns]."""
    weights = torch.zeros(kernel.items, dtype=torch.float64, device=kernel.device)
    weights[items] = 1
    if isinstance(kernel, LinearKernel):
        return kernel.sums(weights)
    total = torch.zeros(kernel.columns, dtype=torch.float64, device=kernel.device)
    for item in items.tolist():
        total += kernel.row(item)
    return total


class _GraphCut:
    """The gains of one graph cut, kept up to date pick by pick."""

    def __init__(
        self, kernel: Kernel, names: Tensor, total: Tensor, gone: Tensor, weights: Tensor, lam: float
    ) -> None:
        self.kernel, self.names, self.gone = kernel, names, gone
        self.gains = (lam * total).masked_fill_(gone, -torch.inf)
        magnitude = float(total.abs().max())
        self.tolerance = 64 * EPS * max(magnitude * max(lam, 1.0), 1.0 if magnitude == 0 else 0.0)
        self.error = self.step = 0.0
        if isinstance(kernel, LinearKernel) and not kernel.exact_blocks:
            self.pull = lam * kernel.weighted_features(weights)
            self.count = lam * float(weights.sum())
            widest = float(kernel.features.norm(dim=1).max()) ** 2
            self.step = 8 * float(torch.finfo(kernel.dtype).eps) * (kernel.offset + kernel.scale * widest)

    def pick(self) -> tuple[int, float]:
        chosen, gain = self._best()
        item = int(self.names[chosen])
        self.gone[chosen] = True
        self.gains.sub_(self.kernel.row(item), alpha=2)
        self.gains[chosen] = -torch.inf
        if self.step:
            self.error += self.step
            assert isinstance(self.kernel, LinearKernel)
            self.pull -= 2 * self.kernel.doubled(slice(item, item + 1))[0]
            self.count -= 2
        return chosen, gain

    def _best(self) -> tuple[int, float]:
        near = torch.nonzero(self.gains >= self.gains.max() - 2 * self.error - self.tolerance).flatten()
        if not self.step:
            return int(near[0]), float(self.gains[near[0]])
        assert isinstance(self.kernel, LinearKernel)
        true = self.kernel.project(self.pull, self.count, near)
        place = lowest(true, self.tolerance)
        return int(near[place]), float(true[place])
