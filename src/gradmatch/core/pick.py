"""Greedy selection of a few items that stand for many, or of a few atoms that make up a target.

Every selector of items returns the picks of plain greedy selection (highest gain in float64 first, ties by lowest
index), but none of them computes all gains from nothing for each pick. Bulk work runs in the precision of the
input; candidates within rounding of the best are compared again in float64. Gains that differ by less than
float64 rounding count as ties, so that duplicates do not depend on the order in which a matrix product sums.

>>> facility_location(torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]]), 2).indices.tolist()
[0, 2]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core._facility import facility_location
from gradmatch.core._graph_cut import graph_cut, graph_cut_bins
from gradmatch.core._greedy import Picks
from gradmatch.core._omp import batch_omp
from gradmatch.core._spread import herding, log_det

__all__ = [
    "Picks",
    "batch_omp",
    "by_class",
    "facility_location",
    "graph_cut",
    "graph_cut_bins",
    "herding",
    "largest_remainder",
    "log_det",
]


def by_class(labels: Tensor, budgets: Sequence[int], pick: Callable[[Tensor, int], Picks]) -> Picks:
    """Run a selector inside every class and join the picks, class by class.

    Args:
        labels: class of each item, 0..C-1, long [n].
        budgets: picks for each class, length C.
        pick: called with the indices of a class and its budget; its picks count within that class.

    >>> by_class(torch.tensor([0, 1, 0, 1]), [1, 1], lambda own, k: herding(own[:, None], k)).indices.tolist()
    [0, 1]
    """
    count = checks.labels("labels", labels)
    checks.require(
        len(budgets) == count,
        f"budgets has {len(budgets)} entries; it must have one for each of {count} classes.",
    )
    indices, gains = [], []
    for label, budget in enumerate(budgets):
        own = torch.nonzero(labels == label).flatten()
        found = pick(own, checks.whole(f"budgets[{label}]", budget, 1, len(own)))
        indices.append(own[found.indices.to(own.device)])
        gains.append(found.gains)
    return Picks(torch.cat(indices), torch.cat(gains))


def largest_remainder(total: int, weights: Sequence[float], generator: torch.Generator) -> list[int]:
    """Share ``total`` out in proportion to ``weights``: each gets its quota rounded down or up, summing to total.

    Args:
        total: whole number to share, at least 0.
        weights: at least 0, not all 0.
        generator: decides which of equal remainders are rounded up.

    >>> largest_remainder(7, [2.0, 1.0, 1.0], torch.Generator())[0]
    3
    """
    checks.whole("total", total, 0)
    w = torch.as_tensor(list(weights), dtype=torch.float64)
    checks.require(
        len(w) > 0 and bool((w >= 0).all()) and bool(torch.isfinite(w).all()) and float(w.sum()) > 0,
        f"weights is {list(weights)}; it must be numbers of at least 0, not all 0.",
    )
    quota = total * w / w.sum()
    # A quota that is whole but for rounding must not lose one to a neighbour.
    whole = torch.where((quota - quota.round()).abs() < 1e-9, quota.round(), quota.floor())
    remainder = (quota - whole).clamp_(min=0)
    order = torch.randperm(len(w), generator=generator)
    ranked = order[torch.argsort((remainder[order] * 1e9).round(), descending=True, stable=True)]
    left = total - int(whole.sum())
    whole[ranked[:left]] += 1
    return [int(v) for v in whole]
