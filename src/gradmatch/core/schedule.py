"""Which times to step at: the cost of every straight jump along a trajectory, and the cheapest path of K jumps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from gradmatch.core import checks
from gradmatch.core.path import AffinePath, Prediction

Distance = Callable[[Tensor, Tensor], Tensor]
"""(jumped (m, ...), reached (m, ...)) -> (m,)."""

_BLOCK = 2**13


def jump_cost(
    states: Tensor,
    slopes: Tensor,
    times: Tensor,
    *,
    scale: Tensor | None = None,
    distance: Distance | None = None,
    exact: bool = False,
) -> Tensor:
    """C[i, j] = mean over samples of |X_i + (t_j - t_i) V_i - X_j|^2 for j > i, and infinity elsewhere.

    X_j - X_i is a sum of the steps D_k = X_{k+1} - X_k, so that two matrices of inner products, D D^T and V D^T (one
    for an Euler trajectory), give all jumps without a tensor of (i, j, sample, pixel) and without cancelling large
    |X|^2. Products are taken in the type of ``states``, a block of columns at a time, and added up in float64.

    Args:
        states: X (K + 1, n, ...).
        slopes: V (K, n, ...), dX/dt at the first K.
        times: (K + 1,), strictly rising or falling.
        scale: factor of X_j in the space where errors count (K + 1,); default 1.
        distance: in place of the squared distance, summed over pixels; then every jump is made (slow).
        exact: the trajectory was made by these very jumps, D_k = (t_{k+1} - t_k) V_k, so that C[i, i + 1] is 0 up to
            rounding; it is set to 0.

    Returns:
        (K + 1, K + 1) float64 on the CPU.

    >>> x = torch.tensor([[[0.0]], [[1.0]], [[3.0]]])
    >>> jump_cost(x, torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([0.0, 1.0, 2.0])).tolist()
    [[inf, 0.0, 1.0], [inf, inf, 0.0], [inf, inf, inf]]
    """
    last = len(slopes)
    checks.require(
        len(states) == len(times) == last + 1 and states.shape[1:] == slopes.shape[1:] and states.ndim >= 2,
        f"states {tuple(states.shape)}, slopes {tuple(slopes.shape)} and times {tuple(times.shape)} do not belong "
        "together; they must be (K + 1, n, ...), (K, n, ...) and (K + 1,).",
    )
    times = times.double().cpu()
    weights = torch.ones(last + 1, dtype=torch.float64) if scale is None else scale.double().cpu()
    cost = (
        _squares(states, slopes, times, exact) * weights.square()
        if distance is None
        else _distances(states, slopes, times, weights, distance)
    )
    cost[~torch.ones(last + 1, last + 1, dtype=torch.bool).triu(1)] = torch.inf
    if exact:
        cost.diagonal(1).zero_()
    return cost


def _squares(states: Tensor, slopes: Tensor, times: Tensor, exact: bool) -> Tensor:
    last, samples = slopes.shape[:2]
    x, v = states.reshape(last + 1, -1), slopes.reshape(last, -1)
    if exact:  # D_k = h_k V_k, so that one matrix gives both
        own, h = _products(v, v), times.diff()
        steps, both, norms = h[:, None] * own * h, own * h, own.diagonal()
    else:
        d = x.diff(dim=0)
        steps, both, norms = _products(d, d), _products(v, d), v.square().sum(1, dtype=torch.float64).cpu()
    block = pad(steps.cumsum(0).cumsum(1), (1, 0, 1, 0))
    along = pad(both.cumsum(1), (1, 0, 0, 1))
    own = block.diagonal()
    moved = own - block - block.T + own[:, None]  # |X_j - X_i|^2
    towards = along - along.diagonal()[:, None]  # <V_i, X_j - X_i>
    gap = times - times[:, None]
    length = pad(norms, (0, 1))[:, None]
    return (gap.square() * length - 2 * gap * towards + moved).clamp_min(0) / samples


def _products(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T in their own type by blocks of columns, added up in float64."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64)
    for c in range(0, a.shape[1], _BLOCK):
        total += (a[:, c : c + _BLOCK] @ b[:, c : c + _BLOCK].T).double().cpu()
    return total


def _distances(states: Tensor, slopes: Tensor, times: Tensor, weights: Tensor, distance: Distance) -> Tensor:
    last = len(slopes)
    cost = torch.zeros(last + 1, last + 1, dtype=torch.float64)

    def column(values: Tensor) -> Tensor:
        return values.to(states).reshape(-1, *[1] * (states.ndim - 1))

    for i in range(last):
        jumped = states[i] + column(times[i + 1 :] - times[i]) * slopes[i]
        factor = column(weights[i + 1 :])
        found = distance((factor * jumped).flatten(0, 1), (factor * states[i + 1 :]).flatten(0, 1))
        checks.require(
            found.shape == ((last - i) * states.shape[1],),
            f"cost gave shape {tuple(found.shape)}; it must give one number for each pair.",
        )
        cost[i, i + 1 :] = found.detach().double().cpu().reshape(last - i, -1).mean(1)
    return cost


def straight_frame(
    path: AffinePath, times: Tensor, states: Tensor, predictions: Sequence[Prediction]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A trajectory in the frame where every exact step of its path is a straight line.

    z = x / (alpha + sigma) moves along w = sigma / (alpha + sigma) with slope noise - x0.

    Args:
        times: (K + 1,).
        states: (K + 1, n, ...), x at the times.
        predictions: at the first K.

    Returns:
        z (K + 1, n, ...), slopes (K, n, ...), w (K + 1,), alpha + sigma (K + 1,): the arguments of :func:`jump_cost`.
    """
    alpha, sigma = path.levels(times.double())[:2]
    size = (alpha + sigma).to(states).reshape(-1, *[1] * (states.ndim - 1))
    slopes = []
    for x, said, t in zip(states[:-1], predictions, times.tolist()[:-1], strict=True):
        noise, data = (path.convert(said, kind, x, t).tensor for kind in ("noise", "x0"))
        slopes.append(noise - data)
    return states / size, torch.stack(slopes), sigma / (alpha + sigma), alpha + sigma


def shortest_path(cost: Tensor, edges: int) -> tuple[list[int], float]:
    """The cheapest path of exactly ``edges`` edges from the first node to the last, and what it costs.

    Args:
        cost: (m, m) of the edges, infinity where there is none; nodes are in order (only j > i is used).
        edges: 1..m-1.

    Of equally cheap paths the one with the earlier nodes is taken.

    >>> shortest_path(torch.tensor([[9.0, 1.0, 9.0], [9.0, 9.0, 1.0], [9.0, 9.0, 9.0]]), 2)
    ([0, 1, 2], 2.0)
    """
    table = np.array(cost.detach().cpu(), dtype=np.float64)
    nodes = len(table)
    checks.require(
        table.ndim == 2 and table.shape[0] == table.shape[1] and nodes >= 2,
        f"cost is of shape {table.shape}; it must be square, of two nodes or more.",
    )
    checks.whole("edges", edges, 1, nodes - 1)
    table[np.tril_indices(nodes)] = np.inf
    checks.require(not np.isnan(table).any(), "cost has NaN; it must be finite or infinite.")
    best, choices = table[:, -1].copy(), list[np.ndarray]()
    for _ in range(edges - 1):
        through = table + best
        choices.append(through.argmin(1))
        best = through[np.arange(nodes), choices[-1]]
    found = [0]
    for choice in reversed(choices):
        found.append(int(choice[found[-1]]))
    checks.require(bool(np.isfinite(best[0])), f"no path of {edges} edges joins the first node to the last.")
    return [*found, nodes - 1], float(best[0])
