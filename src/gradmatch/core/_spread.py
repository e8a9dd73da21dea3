"""Selection by the mean (herding) and by volume (log-determinant)."""

from __future__ import annotations

from typing import Any

import torch

from gradmatch.core import checks
from gradmatch.core._greedy import EPS, Picks, as_picks, lowest, read
from gradmatch.core.kernel import KernelName, Kind, as_float


def herding(features: Any, budget: int) -> Picks:
    """Pick items whose running mean stays nearest the mean of all (Euclidean).

    Args:
        features: rows [n, m].
        budget: number of picks, without replacement.

    Returns:
        Picks in order; the gain is minus the distance of the picks' mean from the mean of all.

    >>> herding(torch.tensor([[0.0], [1.0], [2.1]]), 1).indices.tolist()
    [1]
    """
    rows = as_float("features", features)
    checks.require(
        rows.ndim == 2 and rows.numel() > 0, f"features is {tuple(rows.shape)}; it must be (n, m)."
    )
    checks.whole("budget", budget, 1, len(rows))
    rows = rows.double()
    mean, squares = rows.mean(0), (rows * rows).sum(1)
    tolerance = 64 * EPS * float(squares.max() + 1e-300)
    taken = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    summed = torch.zeros_like(mean)
    picked, won = [], []
    for count in range(1, budget + 1):
        wanted = count * mean - summed
        nearness = (2 * (rows @ wanted) - squares).masked_fill_(taken, -torch.inf)
        chosen = lowest(nearness, tolerance * count)
        taken[chosen] = True
        summed = summed + rows[chosen]
        picked.append(chosen)
        won.append(-float((summed / count - mean).norm()))
    return as_picks(picked, won, torch.arange(len(rows), device=rows.device))


def log_det(
    source: Any,
    budget: int,
    *,
    kind: Kind = "similarity",
    kernel: KernelName = "cosine",
    ridge: float = 1e-6,
    gram_limit: int = 2**28,
) -> Picks:
    """Pick diverse items: greedily maximise log det (S_AA + ridge I), by a growing Cholesky factor.

    Args:
        source: positive semi-definite similarity matrix [n, n] or features [n, m].
        budget: number of picks.
        kind, kernel, gram_limit: as in :func:`facility_location`.
        ridge: added to the diagonal, above 0; keeps the determinant of duplicates positive.

    Returns:
        Picks in order; the gain is log of the conditional variance of the pick.

    >>> log_det(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2).indices.tolist()
    [1, 2]
    """
    checks.positive("ridge", ridge)
    similarities, names, _ = read(source, budget, kind, kernel, None, None, gram_limit)
    n, device = similarities.items, similarities.device
    variance = (
        torch.cat([torch.diagonal(similarities.exact(part, part)) for part in names.split(512)]) + ridge
    )
    scale = float(variance.max())
    factor = torch.zeros(budget, n, dtype=torch.float64, device=device)
    picked, won = [], []
    for step in range(budget):
        chosen = lowest(variance, 64 * EPS * scale)
        value = float(variance[chosen])
        checks.require(
            value > 0, "similarity is not positive semi-definite; log_det needs it so (raise ridge)."
        )
        column = similarities.exact(names, names[chosen : chosen + 1])[:, 0]
        column = column - factor[:step, chosen] @ factor[:step]
        factor[step] = column / value**0.5
        variance = variance - factor[step] ** 2
        picked.append(chosen)
        won.append(torch.tensor(value, dtype=torch.float64).log().item())
        variance[picked] = -torch.inf
    return as_picks(picked, won, names)
