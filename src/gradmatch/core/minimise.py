"""Many convex functions minimised at once by L-BFGS, each with its own line search and its own end.

The work is one batched call of the functions a step, for those that are not done. As the functions are convex, the
slope along a direction rises with the step, so a step is found by bracketing the slope's zero; that goes on working
where differences of values have long drowned in rounding (Hager and Zhang, SIAM J. Optim. 16, 2005, make the same
point), and every pair of step and change of gradient has a positive product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gradmatch.core import checks

Functions = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(points [m, d], which functions [m]) -> (values [m], gradients [m, d])."""

FLATTER, LOWER = 0.9, 1e-4
"""A step brings the slope to this share of its size, and the value down by this share of what the slope promises."""
TRIALS = 25
GROWTH, INSET = 4.0, 0.1
"""Factor of a step that is too short, and how near to an end of the bracket the next may come."""


class Minimum(NamedTuple):
    """Where it ended: points (b, d), values (b,), norms of the gradients (b,), steps (b,), whether within ``tol`` (b,).

    ``calls`` counts batched calls of the functions.
    """

    x: Float[Tensor, "b d"]
    value: Float[Tensor, " b"]
    slope: Float[Tensor, " b"]
    steps: Int[Tensor, " b"]
    converged: Bool[Tensor, " b"]
    calls: int


def minimise_each(
    functions: Functions,
    start: Float[Tensor, "b d"],
    *,
    tol: float = 1e-8,
    max_iter: int = 1000,
    memory: int = 10,
    first: float | None = None,
    rough: Functions | None = None,
    rough_tol: float = 1e-3,
) -> Minimum:
    """The minimisers of b convex functions of d numbers.

    Args:
        functions: values and gradients of the functions ``which``, each at its own point.
        start: a point for each.
        tol: a function is done when the norm of its gradient is at most this.
        max_iter: most steps of each.
        memory: pairs of step and change of gradient that are kept.
        first: the first step is this times the gradient; default the gradient, cut to length 1.
        rough: a cheaper form of the functions, such as one that answers in single precision, which is called until all
            gradients are below ``rough_tol`` or no step is found; what was learned of their curvature is kept.

    Raises:
        InputError: options out of range, a start that is not finite or where a function is not.

    >>> scale = torch.tensor([[1.0, 10.0], [2.0, 300.0]], dtype=torch.float64)
    >>> found = minimise_each(lambda x, k: ((scale[k] * (x - 1) ** 2).sum(1) / 2, scale[k] * (x - 1)), 0 * scale)
    >>> bool((found.x - 1).abs().max() < 1e-8)
    True
    """
    checks.positive("tol", tol)
    checks.whole("max_iter", max_iter)
    if first is not None:
        checks.positive("first", first)
    begun = checks.finite("start", start).detach().clone()
    run = _Run(functions if rough is None else rough, begun, checks.whole("memory", memory), first)
    if rough is not None:
        while int(run.steps.max()) < max_iter and float(run.g.norm(dim=1).max()) > rough_tol:
            if not bool(run.step().all()):
                break
        run.change_to(functions)
    for _ in range(max_iter - int(run.steps.max())):
        run.narrow(run.g.norm(dim=1) > tol)
        if not len(run.which):
            break
        run.narrow(run.step())  # what finds no step is let go
    run.leave()
    slope = run.end_g
    return Minimum(run.end_x, run.end_value, slope, run.steps, slope <= tol, run.calls)


class _Run:
    """Functions still in the work; what is known of all of them lies in ``end_*``."""

    def __init__(self, functions: Functions, x: Tensor, memory: int, first: float | None) -> None:
        self.functions, self.memory, self.first, self.x = functions, memory, first, x
        self.which = torch.arange(len(x), device=x.device)
        self.calls = 0
        self.value, self.g = self._called(x, self.which)
        checks.finite("a function at its start", self.value)
        checks.finite("a gradient at its start", self.g)
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        self.end_x, self.end_value, self.end_g = x.clone(), self.value.clone(), self.g.norm(dim=1)
        self.steps = torch.zeros_like(self.which)

    def _called(self, x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        value, gradient = self.functions(x, which)
        self.rounding = 10 * torch.finfo(value.dtype).eps  # of the precision in which the functions are known
        return value.detach().to(x), gradient.detach().to(x)

    def change_to(self, functions: Functions) -> None:
        """Go on with other functions, nearly the same."""
        self.functions = functions
        self.value, self.g = self._called(self.x, self.which)

    def leave(self) -> None:
        """Note where the functions in the work are."""
        self.end_x[self.which], self.end_value[self.which] = self.x, self.value
        self.end_g[self.which] = self.g.norm(dim=1)

    def narrow(self, live: Tensor) -> None:
        """Let the others go."""
        if bool(live.all()):
            return
        self.leave()
        self.which, self.x, self.value, self.g = (t[live] for t in (self.which, self.x, self.value, self.g))
        self.pairs = [(s[live], y[live], w[live]) for s, y, w in self.pairs]

    def step(self) -> Bool[Tensor, " m"]:
        """One step of all; whether each found one."""
        d = self._direction()
        slope = (self.g * d).sum(1)
        uphill = ~(slope < 0)
        if bool(uphill.any()):
            d[uphill] = -self.g[uphill]
            slope = (self.g * d).sum(1)
        length = torch.ones_like(slope)
        if not self.pairs:
            length = length / self.g.norm(dim=1).clamp_min(1) if self.first is None else self.first * length
        x, value, g, moved = self._searched(d, slope, length)
        s, y = x - self.x, g - self.g
        bend = (s * y).sum(1)
        weight = torch.where(bend > 0, 1 / bend, 0.0)  # 0: this pair says nothing
        self.pairs = [*self.pairs, (s, y, weight)][-self.memory :]
        self.x, self.value, self.g = x, value, g
        self.steps[self.which[moved]] += 1
        return moved

    def _direction(self) -> Tensor:
        """- H g by the two loops over the kept pairs."""
        q, factors = self.g.clone(), []
        for s, y, weight in reversed(self.pairs):
            a = weight * (s * q).sum(1)
            q -= a[:, None] * y
            factors.append(a)
        if self.pairs:
            s, y, weight = self.pairs[-1]
            size = weight * y.square().sum(1)
            q /= torch.where(size > 0, size, 1.0)[:, None]
        for (s, y, weight), a in zip(self.pairs, reversed(factors), strict=True):
            q += (a - weight * (y * q).sum(1))[:, None] * s
        return -q

    def _searched(self, d: Tensor, slope: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Points, values and gradients after a step along d for each, and whether there was one."""
        x, value, g = self.x.clone(), self.value.clone(), self.g.clone()
        low, high = torch.zeros_like(a), torch.full_like(a, torch.inf)
        low_slope, high_slope = slope.clone(), torch.full_like(a, torch.nan)
        slack = self.rounding * self.value.abs()
        todo = torch.arange(len(a), device=a.device)
        for _ in range(TRIALS):
            at = self.x[todo] + a[todo, None] * d[todo]
            found, gradient = self._called(at, self.which[todo])
            along = (gradient * d[todo]).sum(1)
            most = FLATTER * slope[todo].abs()
            above = ~(found <= self.value[todo] + LOWER * a[todo] * slope[todo] + slack[todo])  # NaN as well
            long, short = above | (along > most), ~above & (along < -most)
            good = ~long & ~short
            done = todo[good]
            x[done], value[done], g[done] = at[good], found[good], gradient[good]
            high[todo[long]], high_slope[todo[long]] = a[todo[long]], along[long]
            low[todo[short]], low_slope[todo[short]] = a[todo[short]], along[short]
            todo = todo[~good]
            if not len(todo):
                break
            a = a.clone()
            a[todo] = _between(low[todo], high[todo], low_slope[todo], high_slope[todo])
        moved = torch.ones_like(self.which, dtype=torch.bool)
        moved[todo] = False
        return x, value, g, moved


def _between(low: Tensor, high: Tensor, low_slope: Tensor, high_slope: Tensor) -> Tensor:
    """The next step to try: where a line through both slopes is 0, kept off the ends; longer while no end is known."""
    share = low_slope / (low_slope - high_slope)
    share = torch.where(high_slope > 0, share, 0.5).clamp(INSET, 1 - INSET)
    longer = torch.where(low > 0, GROWTH * low, 1.0)
    return torch.where(
        high.isinf(), longer, low + share.nan_to_num(0.5) * (high - low).nan_to_num(posinf=0.0)
    )
