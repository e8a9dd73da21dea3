"""The adaptive Runge-Kutta pair of Dormand and Prince (1980), every example of a batch with its own step size.

The state is kept in float64, so that tolerances under 1e-6 do not stall on rounding; examples that have arrived are
no longer evaluated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmatch.core import checks

_C = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_A = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_SAFE, _SHRINK, _GROW, _SMALLEST, _MOST = 0.9, 0.2, 5.0, 1e-10, 20_000

Field = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (m, ...) float64, t (m,) float64, index (m,) of these examples) -> dx/dt."""


@dataclass
class Stretch:
    """The end of one stretch, from which the next goes on: x, dx/dt there, and each example's step size."""

    x: Tensor
    slope: Tensor
    size: Tensor


def dopri5(
    field: Field, x: Tensor, t0: float, t1: float, before: Stretch | None, rtol: float, atol: float
) -> Stretch:
    """Integrate from t0 to t1.

    Raises:
        InputError: the step size of an example falls under 1e-10 of the way, or 20,000 steps are not enough.
    """
    everyone = torch.arange(len(x), device=x.device)
    t = torch.full((len(x),), t0, dtype=torch.float64, device=x.device)
    if before is None:
        y = x.double()
        slope = field(y, t, everyone)
        size = _first_size(y, slope, t1 - t0, rtol, atol)
    else:
        y, slope, size = before.x, before.slope, before.size
    y, slope, size, left = y.clone(), slope.clone(), size.clone(), everyone
    way = 1.0 if t1 > t0 else -1.0
    for _ in range(_MOST):
        h = torch.minimum(size[left], (t1 - t[left]).abs())
        new, new_slope, error = _trial(field, y[left], slope[left], t[left], way * h, left, rtol, atol)
        good = error <= 1
        # a clipped last step tells nothing of the size that was allowed
        grown = h * (_SAFE * error.clamp_min(1e-10) ** -0.2).clamp(_SHRINK, _GROW)
        size[left] = torch.where(good & (h < size[left]), size[left], grown)
        kept = left[good]
        y[kept], slope[kept], t[kept] = new[good], new_slope[good], t[kept] + way * h[good]
        left = left[~(good & ((t1 - t[left]).abs() <= _SMALLEST * abs(t1 - t0)))]
        if not len(left):
            return Stretch(y, slope, size)
        checks.require(
            bool((size[left] > _SMALLEST * abs(t1 - t0)).all()),
            f"dopri5 stalls near t = {float(t[left][0]):.6g}: the field is not finite or too rough for rtol {rtol:g}.",
        )
    return checks.refuse(f"dopri5 has not arrived after {_MOST} steps; allow a larger rtol than {rtol:g}.")


def _trial(
    field: Field, y: Tensor, slope: Tensor, t: Tensor, h: Tensor, index: Tensor, rtol: float, atol: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One step (m, ...): the new point, the slope there, and the error in units of what is allowed (m,)."""
    wide = h.reshape(-1, *[1] * (y.ndim - 1))
    slopes, new = [slope], y
    for c, row in zip(_C[1:], _A[1:], strict=True):
        new = y + wide * sum(a * k for a, k in zip(row, slopes, strict=True))
        slopes.append(field(new, t + c * h, index))
    error = wide * sum(e * k for e, k in zip(_ERROR, slopes, strict=True))
    allowed = atol + rtol * torch.maximum(y.abs(), new.abs())
    size = (error / allowed).flatten(1).square().mean(1).sqrt()
    return new, slopes[-1], size.nan_to_num(nan=torch.inf)


def _first_size(y: Tensor, slope: Tensor, span: float, rtol: float, atol: float) -> Tensor:
    """A hundredth of the way after which the slope would have changed y by its own size, at most the whole way."""
    allowed = atol + rtol * y.abs()
    size, rate = ((v / allowed).flatten(1).square().mean(1).sqrt() for v in (y, slope))
    guess = 0.01 * size / rate.clamp_min(1e-12)
    return guess.clamp(1e-6 * abs(span), abs(span)).nan_to_num(nan=1e-6 * abs(span))
