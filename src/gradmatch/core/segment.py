"""The loss on the straight line between two networks: whether a barrier lies between them.

B(a, b) = max over t of L((1 - t) a + t b) - ((1 - t) L(a) + t L(b)), at evenly spread t with both ends, so that B is
never below 0; a middle that is better than its ends shows in the signed gap at t = 1/2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradmatch.core._batches import Batch
from gradmatch.core.checks import finite, listing, require, whole
from gradmatch.core.problem import Problem

__all__ = ["Segment", "segment"]

State = Mapping[str, Tensor] | nn.Module


@dataclass(frozen=True)
class Segment:
    """Mean loss and accuracy on the segment from ``a`` (t = 0) to ``b`` (t = 1).

    Attributes:
        t: evenly spread from 0 to 1 [n].
        losses: mean loss at each t [n], float64.
        accuracies: share of right answers at each t [n]; None where targets are no class ids.
        step: b - a in the problem's parameters [P].
        split: which data this was measured on.
    """

    t: Float[Tensor, " n"]
    losses: Float[Tensor, " n"]
    accuracies: Float[Tensor, " n"] | None
    step: Float[Tensor, " P"]
    split: str

    @property
    def excess(self) -> Float[Tensor, " n"]:
        """Loss above the straight line between the losses of the ends [n]."""
        return self.losses - torch.lerp(self.losses[0], self.losses[-1], self.t)

    @property
    def barrier(self) -> float:
        """The largest excess, 0 or above."""
        return max(0.0, float(self.excess.max()))

    @property
    def midpoint_gap(self) -> float:
        """Excess at t = 1/2, below 0 where the middle is better than the mean of the ends."""
        return float(self.excess[len(self.t) // 2])

    @property
    def distance(self) -> float:
        """Length of b - a."""
        return float(self.step.norm())

    def inside(self, basis: Float[Tensor, "P k"]) -> float:
        """Share of the squared length of b - a in the span of ``basis``, such as leading Hessian eigenvectors."""
        q = torch.linalg.qr(basis.to(self.step))[0]
        return float((q.T @ self.step).square().sum() / self.step.square().sum().clamp_min(1e-300))


def segment(
    problem: Problem,
    a: State,
    b: State,
    points: int = 25,
    split: str = "train",
    prepare: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None = None,
) -> Segment:
    """Evaluate a problem's loss on the segment between two networks of its architecture.

    Everything floating in the states moves, running statistics among it; whole numbers stay those of ``a``.
    Interpolated running statistics are not those of the interpolated network: re-estimate them where that matters.

    Args:
        problem: model, loss and data; the model gives the architecture, its own values are not used.
        a, b: modules, or dicts of all parameters (and of buffers, if there are any) by name.
        points: of the grid, an odd number so that the middle is among them.
        split: the name of the data, for the record.
        prepare: called with each state strictly between the ends; gives the state that is evaluated in its place
            (with running statistics measured anew, say).

    Raises:
        InputError: states of other names or shapes than the model, values that are not finite.

    >>> from torch import nn
    >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> problem = Problem(a, "cross_entropy", (torch.randn(6, 2), torch.arange(6) % 2))
    >>> segment(problem, a, b).barrier  # the loss is convex in the parameters
    0.0
    """
    n = whole("points", points, least=3)
    require(n % 2 == 1, f"points is {n}; it must be odd, so that the middle is among them.")
    start, end = _state("a", a, problem), _state("b", b, problem)
    t = torch.linspace(0, 1, n, dtype=torch.float64)
    batches = list(problem.batches())

    def at(s: float) -> Mapping[str, Tensor]:
        state = {k: _between(start[k], end[k], s) for k in start}
        return state if prepare is None or s in (0.0, 1.0) else prepare(state)

    scores = [_evaluate(problem, at(s), batches) for s in t.tolist()]
    losses = finite("losses on the segment", torch.tensor([s[0] for s in scores], dtype=torch.float64))
    right = [s[1] for s in scores]
    accuracies = None if right[0] is None else torch.tensor(right, dtype=torch.float64)
    space = problem.space
    return Segment(t, losses, accuracies, space.flatten(end) - space.flatten(start), split)


def _state(name: str, state: State, problem: Problem) -> dict[str, Tensor]:
    values = dict(state.state_dict(keep_vars=True)) if isinstance(state, nn.Module) else dict(state)
    own = problem.live_params()
    if problem.module is not None:
        own |= dict(problem.module.named_buffers())
    values = {k: v.detach() for k, v in values.items() if k in own}
    missing = [k for k in own if k not in values]
    require(not missing, f"{name} lacks {listing(missing)}; it must have every tensor of the model.")
    for key, value in values.items():
        require(
            value.shape == own[key].shape,
            f"{name}[{key!r}] has shape {tuple(value.shape)}; it must be {tuple(own[key].shape)}.",
        )
        finite(f"{name}[{key!r}]", value)
    return values


def _between(a: Tensor, b: Tensor, t: float) -> Tensor:
    return torch.lerp(a, b, t) if a.is_floating_point() else a


@torch.no_grad()
def _evaluate(
    problem: Problem, state: Mapping[str, Tensor], batches: list[Batch]
) -> tuple[float, float | None]:
    """Mean loss, and the share of right answers where there is such a thing."""
    loss, right = 0.0, 0.0
    counted = True
    for batch in batches:
        outputs = problem.outputs(state, batch.inputs)
        loss += float(problem.losses(outputs, batch.target, batch.size).sum(dtype=torch.float64))
        counted = counted and _has_classes(outputs, batch.target)
        right += float((outputs.argmax(1) == batch.target).sum()) if counted else 0.0
    return loss / problem.n, right / problem.n if counted else None


def _has_classes(outputs: object, target: object) -> bool:
    return (
        isinstance(outputs, Tensor)
        and isinstance(target, Tensor)
        and not target.is_floating_point()
        and outputs.ndim == 2
        and target.shape == outputs.shape[:1]
    )
