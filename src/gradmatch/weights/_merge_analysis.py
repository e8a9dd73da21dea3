"""Why two permuted networks average well: distances, singular directions, a second-order estimate, the barrier."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradmatch.core import checks
from gradmatch.core._batches import OrderedData
from gradmatch.core.assign import (
    Permutation,
    PermutationSpec,
    Singular,
    Weights,
    overlap,
    singular,
)
from gradmatch.core.curvature import Curvature
from gradmatch.core.gradients import gradient
from gradmatch.core.problem import Problem
from gradmatch.core.segment import Segment, segment
from gradmatch.core.store import write_json
from gradmatch.core.tap import capture, evaluating
from gradmatch.weights._statistics import reset_statistics, tracking

__all__ = ["MergeAnalysis", "agreement", "analyze_merge", "energy_share", "taylor_barrier"]


@dataclass(frozen=True)
class MergeAnalysis:
    """Two networks before and after a permutation of the second.

    Attributes:
        gamma: singular values from this share of the largest on are counted.
        distance, distance_matched: |a - b| and |a - pi(b)| over all parameters.
        agreement, agreement_matched: R of the whole networks, in [-1, 1], 1 for equal leading directions.
        layers: R before and after for each matrix.
        merged: R between A and the plain average, and between A and the average after the permutation.
        taylor, taylor_matched: the loss in the middle above the ends' mean, as two second-order expansions have it.
        naive, matched: the loss on both segments; None without a problem.
    """

    gamma: float
    distance: float
    distance_matched: float
    agreement: float
    agreement_matched: float
    layers: dict[str, tuple[float, float]]
    merged: tuple[float, float]
    taylor: float | None = None
    taylor_matched: float | None = None
    naive: Segment | None = field(default=None, repr=False)
    matched: Segment | None = field(default=None, repr=False)

    @property
    def reduction(self) -> float:
        """By how many percent the distance fell."""
        return 100 * (1 - self.distance_matched / self.distance) if self.distance else 0.0

    def facts(self) -> dict[str, Any]:
        """Everything as JSON values; a barrier with its split and the signed gap in the middle."""
        found: dict[str, Any] = {
            "gamma": self.gamma,
            "distance": self.distance,
            "distance_matched": self.distance_matched,
            "distance_reduction_percent": self.reduction,
            "agreement": self.agreement,
            "agreement_matched": self.agreement_matched,
            "agreement_with_merged": {"naive": self.merged[0], "matched": self.merged[1]},
            "layers": {k: {"before": x, "after": y} for k, (x, y) in self.layers.items()},
        }
        for name, path, estimate in (
            ("naive", self.naive, self.taylor),
            ("matched", self.matched, self.taylor_matched),
        ):
            if path is not None:
                found[name] = {
                    "split": path.split,
                    "barrier": path.barrier,
                    "midpoint_gap": path.midpoint_gap,
                    "second_order_estimate": estimate,
                    "t": path.t.tolist(),
                    "losses": path.losses.tolist(),
                    "accuracies": None if path.accuracies is None else path.accuracies.tolist(),
                }
        return found

    def save(self, path: str | Path) -> Path:
        """Write :meth:`facts` as JSON."""
        return write_json(path, self.facts())


def analyze_merge(
    a: Weights,
    b: Weights,
    permutation: Permutation,
    gamma: float = 0.3,
    *,
    problem: Problem | None = None,
    statistics: Any = None,
    points: int = 25,
    split: str = "train",
    taylor: bool = True,
) -> MergeAnalysis:
    """Compare A with B and with the permuted B.

    Args:
        a, b: networks or state dicts.
        permutation: of B, from a matching.
        gamma: leading singular directions, by their share of the largest value; 0.3 as published (from memory).
        problem: network, loss and data for the barriers and the estimate; the network gives the architecture only.
        statistics: training inputs on which batch-norm's statistics are re-estimated along the segments.
        points: of each segment.
        split: which data the problem holds; on test data an overfitted pair may show no barrier at all.
        taylor: make the second-order estimate (one Hessian product for each end and segment).

    Raises:
        InputError: weights that do not fit. A network with batch-norm and no ``statistics`` is warned about.
    """
    spec = permutation.spec
    checks.fraction("gamma", gamma, zero=True)
    first, second = spec.check(a, "a"), spec.check(b, "b")
    aligned = permutation.apply(second)
    keys = [k for k, t in first.items() if k not in spec.buffers and t.is_floating_point()]
    matrices = [k for k in keys if first[k].ndim > 1]
    own = {k: singular(first[k], gamma) for k in matrices}
    before, after = ({k: singular(w[k], gamma) for k in matrices} for w in (second, aligned))
    middles = ({k: singular((first[k] + w[k]) / 2, gamma) for k in matrices} for w in (second, aligned))
    found: dict[str, Any] = {
        "gamma": gamma,
        "distance": _distance(first, second, keys),
        "distance_matched": _distance(first, aligned, keys),
        "agreement": agreement(own, before),
        "agreement_matched": agreement(own, after),
        "layers": {k: (_pairwise(own[k], before[k]), _pairwise(own[k], after[k])) for k in matrices},
        "merged": tuple(agreement(own, m) for m in middles),
    }
    if problem is None:
        return MergeAnalysis(**found)
    for name, estimate, other in (("naive", "taylor", second), ("matched", "taylor_matched", aligned)):
        found[name] = barrier(problem, first, other, statistics, points, split)
        if taylor:
            found[estimate] = taylor_barrier(problem, first, other)
    return MergeAnalysis(**found)


def barrier(
    problem: Problem,
    a: Weights,
    b: Weights,
    statistics: Any = None,
    points: int = 25,
    split: str = "train",
) -> Segment:
    """:func:`gradmatch.core.segment.segment` with batch-norm's statistics re-estimated on the way, if it has any."""
    checks.require(
        isinstance(problem, Problem),
        f"problem is a {type(problem).__name__}; it must be a Problem (network, loss and data), before a and b.",
    )
    norms = problem.module is not None and bool(tracking(problem.module))
    if not norms:
        return segment(problem, a, b, points, split)
    module = problem.module
    assert module is not None
    if statistics is None:
        warnings.warn(
            "the network has batch-norm, and its statistics are averaged like weights: the barrier stays. Give "
            "training inputs (statistics=) to re-estimate them.",
            stacklevel=3,
        )
        return segment(problem, a, b, points, split)
    return segment(
        problem, a, b, points, split, prepare=lambda state: reset_statistics(module, state, statistics)
    )


def taylor_barrier(problem: Problem, a: Weights, b: Weights) -> float:
    """What two second-order expansions, about A and about B, say of the loss half-way above the ends' mean.

    The mean over both ends of 1/2 mu.g + 1/8 mu^T H mu, with mu = b - a seen from A and a - b from B; exact for a
    quadratic loss.
    """
    ends = [problem.space.flatten(problem.space.named(_parameters(problem, w))) for w in (a, b)]
    total = 0.0
    for here, there, weights in ((ends[0], ends[1], a), (ends[1], ends[0], b)):
        mu = (there - here).detach()
        local = _at(problem, weights)
        slope = float(local.space.flatten(gradient(local)).double() @ mu.double())
        bend = float(mu.double() @ Curvature(local, "hessian").matvec(mu).double())
        total += slope / 2 + bend / 8
    return total / 2


def _parameters(problem: Problem, weights: Weights) -> dict[str, Tensor]:
    values = dict(weights.state_dict()) if isinstance(weights, nn.Module) else dict(weights)
    return {k: values[k].detach() for k in problem.space.names}


def _at(problem: Problem, weights: Weights) -> Problem:
    """The same problem with a network that has these weights, and their running statistics."""
    found = copy.copy(problem)
    state = weights.state_dict() if isinstance(weights, nn.Module) else dict(weights)
    if problem.module is None:
        found._params = state
        return found
    found.model = found.module = copy.deepcopy(problem.module)
    found.module.load_state_dict(state)
    return found


def _distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor], keys: list[str]) -> float:
    return math.sqrt(sum(float((a[k].double() - b[k].double()).square().sum()) for k in keys))


def agreement(a: Mapping[str, Singular], b: Mapping[str, Singular]) -> float:
    """R = sum over layers and pairs of (u . u')(v . v') / sum of the smaller numbers of directions.

    1 if and only if the leading subspaces and the directions in them agree; the inner product of partial isometries,
    so within [-1, 1].
    """
    count = sum(min(len(a[k]), len(b[k])) for k in a)
    return sum(overlap(a[k], b[k]) for k in a) / count if count else 0.0


def _pairwise(a: Singular, b: Singular) -> float:
    count = min(len(a), len(b))
    return overlap(a, b) / count if count else 0.0


@torch.no_grad()
def energy_share(
    spec: PermutationSpec, module: nn.Module, weights: Weights, data: Any, gamma: float = 0.3
) -> dict[str, tuple[float, float]]:
    """For each linear layer, the share of its inputs' energy on the leading right singular vectors of its weight.

    E[sum (v_i . x)^2] / E|x|^2, and beside it the share of directions these are: why a few directions decide what
    the network computes.
    """
    state = spec.check(weights, "weights")
    parts = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    leading = {name: singular(state[f"{name}.weight"], gamma).vh for name in parts}
    kept, whole = dict.fromkeys(parts, 0.0), dict.fromkeys(parts, 0.0)
    with evaluating(module):
        for batch in OrderedData(data, 512, check_order=False):
            with capture(module, *parts, side="input") as seen:
                inputs = batch.inputs if isinstance(batch.inputs, tuple) else (batch.inputs,)
                functional_call(module, state, inputs)
            for name in parts:
                x = seen[name].flatten(0, -2).double()
                kept[name] += float((x @ leading[name].T).square().sum())
                whole[name] += float(x.square().sum())
    return {
        n: (kept[n] / max(whole[n], 1e-300), len(leading[n]) / min(state[f"{n}.weight"].shape)) for n in parts
    }
