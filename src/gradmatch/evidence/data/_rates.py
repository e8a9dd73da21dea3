"""The pixel rate of one row: the best of a grid that grows while its best lies on an edge."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def best_rate(
    score: Callable[[float], float], grid: Sequence[float], widenings: int = 2
) -> tuple[float, bool]:
    """The rate of the highest score, and whether it still is on the edge of the grid.

    Args:
        score: called once for each rate, on held-out data.
        grid: ascending rates, the same for every row that is compared.
        widenings: how often a rate may be added beyond an edge, at the grid's own spacing.
    """
    rates = list(grid)
    scores = {rate: score(rate) for rate in rates}
    for left in range(widenings, -1, -1):
        best = max(rates, key=scores.__getitem__)
        if best not in (rates[0], rates[-1]) or not left:
            break
        step = rates[1] / rates[0]
        rates = [rates[0] / step, *rates] if best == rates[0] else [*rates, rates[-1] * step]
        added = rates[0] if best == rates[1] else rates[-1]
        scores[added] = score(added)
    return best, best in (rates[0], rates[-1])
