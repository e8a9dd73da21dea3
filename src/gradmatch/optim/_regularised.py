"""Newton's method with a regulariser lambda that a rule tunes: trial steps until one is accepted.

Every method here repeats x+ = x - (H(x) + lambda B)^{-1} g(x) with one number that makes lambda, its scale: a rejected
trial tightens the scale and tries again with the same H, an accepted one relaxes it for the next iteration.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from gradmatch.core.checks import finite, nonnegative, require, whole
from gradmatch.core.shifted import Matrix, Metric, Shifted, Solver, shifted
from gradmatch.core.store import load_tensors, save_tensors

Objective = Callable[[Tensor], Any]
"""x [P] -> the value, or (value, gradient [P])."""


class Point(NamedTuple):
    """A place with its value and gradient."""

    x: Float[Tensor, " P"]
    value: float
    gradient: Float[Tensor, " P"]


class Rule(Protocol):
    """How a scale makes lambda, which trials are accepted, and what becomes of the scale."""

    def damping(self, scale: float, norm: float, g: Tensor, system: Shifted, metric: Metric) -> float:
        """Lambda at a gradient ``g`` of dual norm ``norm``."""

    def accepts(self, damping: float, before: Point, after: Point, metric: Metric) -> bool:
        """Whether the step is good enough."""

    def relaxed(self, scale: float) -> float:
        """The scale after an accepted trial."""

    def tightened(self, scale: float) -> float:
        """The scale after a rejected one."""


class Step(NamedTuple):
    """What the trials of one iteration came to; ``point`` is None if none was accepted."""

    point: Point | None
    damping: float
    scale: float
    trials: int


def search(
    evaluate: Callable[[Tensor], Point],
    at: Point,
    system: Shifted,
    metric: Metric,
    rule: Rule,
    scale: float,
    max_trials: int,
    length: float = 1.0,
) -> Step:
    """Try ``length`` times the step until one is accepted; a system that is not positive definite is a rejection."""
    norm = math.sqrt(metric.dual2(at.gradient))
    damping = math.inf
    for trial in range(1, max_trials + 1):
        damping = rule.damping(scale, norm, at.gradient, system, metric)
        step = system.solve(damping, at.gradient)
        if step is not None:
            found = evaluate(at.x - length * step)
            usable = math.isfinite(found.value) and bool(found.gradient.isfinite().all())
            if usable and rule.accepts(damping, at, found, metric):
                return Step(found, damping, rule.relaxed(scale), trial)
        scale = rule.tightened(scale)
    return Step(None, damping, scale, max_trials)


Status = Literal["converged", "limit", "stalled"]


@dataclass(frozen=True)
class Result:
    """Where a minimisation ended, and its way there.

    Attributes:
        x: the last point [P].
        value, grad_norm: f and the dual norm of its gradient there.
        status: "converged" (a tolerance was met), "limit" (of iterations) or "stalled" (no trial was accepted: near
            the smallest difference of f that its floating type can show).
        iterations, trials: steps taken, and systems factored or solved for them in all.
        values, grad_norms: before every step and at the end [iterations + 1].
        scales, dampings, trials_each: gamma (or what the method tunes), lambda and trials of every step [iterations].
    """

    x: Tensor
    value: float
    grad_norm: float
    status: Status
    iterations: int
    trials: int
    values: Tensor
    grad_norms: Tensor
    scales: Tensor
    dampings: Tensor
    trials_each: Tensor

    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file."""
        own = {k: v for k, v in asdict(self).items() if isinstance(v, Tensor)}
        return save_tensors(path, own, {k: v for k, v in asdict(self).items() if k not in own})

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read what :meth:`save` wrote."""
        tensors, rest = load_tensors(path)
        own: dict[str, Any] = {**tensors, **rest}
        return cls(**own)


def evaluator(f: Objective) -> Callable[[Tensor], Point]:
    """x -> Point, by autograd where ``f`` gives the value alone."""

    def evaluate(x: Tensor) -> Point:
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            found = f(at)
            value, gradient = found if isinstance(found, tuple) else (found, None)
            if gradient is None:
                require(
                    isinstance(value, Tensor) and value.numel() == 1,
                    f"f returned {type(value).__name__}; it must return a value, or (value, gradient).",
                )
                (gradient,) = torch.autograd.grad(value, at, materialize_grads=True, allow_unused=True)
        return Point(x, float(value.detach() if isinstance(value, Tensor) else value), gradient.detach())

    return evaluate


def minimize(
    f: Objective,
    x0: Float[Tensor, " P"],
    rule: Rule,
    scale: float,
    *,
    hess: Callable[[Tensor], Matrix] | None,
    metric: Tensor | None = None,
    solver: Solver = "auto",
    tol_grad: float = 0.0,
    f_star: float | None = None,
    tol: float = 1e-8,
    max_iter: int = 1000,
    max_trials: int = 40,
) -> Result:
    """Run a rule from x0 until a tolerance is met, the limit is reached or no trial is accepted."""
    nonnegative("tol_grad", tol_grad)
    whole("max_iter", max_iter)
    whole("max_trials", max_trials)
    require(
        x0.ndim == 1 and x0.is_floating_point(),
        f"x0 is {x0.dtype} of shape {tuple(x0.shape)}; it must be (P,).",
    )
    b, evaluate = Metric(metric).fits(len(x0)), evaluator(f)
    at = evaluate(finite("x0", x0.detach()))
    require(math.isfinite(at.value), f"f is {at.value} at x0; it must be finite there.")
    finite("the gradient at x0", at.gradient)
    values, norms = [at.value], [math.sqrt(b.dual2(at.gradient))]
    steps: list[tuple[float, float, int]] = []
    status: Status = "limit"
    for _ in range(max_iter + 1):
        if norms[-1] == 0 or norms[-1] < tol_grad or (f_star is not None and at.value - f_star < tol):
            status = "converged"
            break
        if len(steps) == max_iter:
            break
        system = shifted(None if hess is None else hess(at.x), b, len(x0), solver=solver)
        step = search(evaluate, at, system, b, rule, scale, max_trials)
        if step.point is None:
            status = "stalled"
            break
        steps.append((scale, step.damping, step.trials))
        at, scale = step.point, step.scale
        values.append(at.value)
        norms.append(math.sqrt(b.dual2(at.gradient)))
    columns = list(zip(*steps, strict=True)) or [(), (), ()]
    kept = [torch.tensor(c, dtype=torch.float64) for c in (values, norms, *columns[:2])]
    each = torch.tensor(columns[2], dtype=torch.long)
    total = int(each.sum()) + (max_trials if status == "stalled" else 0)
    return Result(
        at.x, at.value, norms[-1], status, len(steps), total, kept[0], kept[1], kept[2], kept[3], each
    )
