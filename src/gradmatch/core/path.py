"""Probability paths between data and noise: sample them, convert what networks predict, step and step back.

Time points towards noise: t = 0 is data on every path here, as in diffusers. A model that runs the other way, from
noise at 0 to data at 1, is turned by ``v_here(x, t) = -v(x, 1 - t)``. What the paths share, and how a network's
prediction is converted, stands in :mod:`gradmatch.core._affine`.

>>> path = LinearPath()
>>> x0, noise = torch.zeros(4, 2), torch.ones(4, 2)
>>> x = path.sample(x0, noise, 0.5)
>>> float(path.step(x, Prediction("velocity", noise - x0), 0.5, 0.25).mean())
0.25
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Self

import numpy as np
import torch
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core._affine import KINDS, AffinePath, Levels, Path, Prediction, Time, as_double

__all__ = [
    "EDM",
    "KINDS",
    "AffinePath",
    "Levels",
    "LinearPath",
    "OrnsteinUhlenbeck",
    "Path",
    "Prediction",
    "ResidualPath",
    "Time",
    "VariancePreserving",
]


class LinearPath(AffinePath):
    """The straight line of flow matching: alpha = 1 - t, sigma = eps + (1 - eps) t, for t in [0, 1].

    Args:
        eps: noise left at t = 0; 0 by default.
    """

    ends = (1.0, 0.0)

    def __init__(self, eps: float = 0.0) -> None:
        super().__init__()
        self.eps = checks.fraction("eps", eps, zero=True, one=False)

    def levels(self, t: Tensor) -> Levels:
        one = torch.ones_like(t)
        return Levels(1 - t, self.eps + (1 - self.eps) * t, -one, (1 - self.eps) * one)

    def pair(self, kind: str, x0: Tensor, noise: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        if kind != "velocity":
            return super().pair(kind, x0, noise, t)
        at, left = as_double(t), 1 - self.eps  # the slope is the same at all times
        alpha, sigma = self._wide(1 - at, x0), self._wide(self.eps + left * at, x0)
        return alpha * x0 + sigma * noise, left * noise - x0


class EDM(AffinePath):
    """Noise added to data that is not scaled: alpha = 1, and t is sigma itself."""

    def levels(self, t: Tensor) -> Levels:
        one = torch.ones_like(t)
        return Levels(one, t, torch.zeros_like(t), one)


class OrnsteinUhlenbeck(AffinePath):
    """dX = -g(t)/2 X dt + sqrt(g(t)) dB: alpha = exp(-G / 2), sigma^2 = 1 - alpha^2, G = int_0^t g, for t >= 0.

    Args:
        g: a number above 0, or a smooth positive function of float64 times (n,), whose integral is taken by 32 points
            of Gauss and Legendre.
    """

    ends = (None, 0.0)

    def __init__(self, g: float | Callable[[Tensor], Tensor] = 1.0) -> None:
        super().__init__()
        self.g = g if callable(g) else checks.positive("g", g)

    def rate(self, t: Tensor) -> Tensor:
        """g(t)."""
        return self.g(t) if callable(self.g) else torch.full_like(t, self.g)

    def levels(self, t: Tensor) -> Levels:
        rate = self.rate(t)
        past = self._integral(t) if callable(self.g) else rate * t
        alpha, sigma = torch.exp(-past / 2), torch.sqrt(-torch.expm1(-past))
        return Levels(alpha, sigma, -rate / 2 * alpha, rate * alpha.square() / (2 * sigma.clamp_min(1e-8)))

    def _integral(self, t: Tensor) -> Tensor:
        nodes, weights = (torch.from_numpy(a).to(t) for a in np.polynomial.legendre.leggauss(32))
        places = t[..., None] * (1 + nodes) / 2
        return t / 2 * (self.rate(places.flatten()).reshape(places.shape) * weights).sum(-1)


class VariancePreserving(AffinePath):
    """alpha^2 + sigma^2 = 1, from a table of alpha^2 at t = 0..T-1 as trained; t = -1 is the clean end.

    Between entries the angle atan2(sigma, alpha) is linear in t, so that the velocity is v times its slope.

    Args:
        alphas_cumprod: alpha^2 (T,), falling, in [0, 1].
        final: alpha^2 at the clean end; 1 is data, ``alphas_cumprod[0]`` what diffusers' ``set_alpha_to_one=False``
            means.
    """

    ends = (None, -1.0)

    def __init__(self, alphas_cumprod: Tensor, final: float = 1.0) -> None:
        super().__init__()
        table = torch.as_tensor(alphas_cumprod).detach().cpu().double()
        checks.finite("alphas_cumprod", table)
        table = torch.cat([torch.tensor([checks.number("final", final)], dtype=torch.float64), table])
        falling = table.ndim == 1 and len(table) > 2 and bool((table.diff()[1:] < 0).all())
        checks.require(
            falling and float(table[0]) <= 1 and float(table[1]) <= float(table[0]) and float(table[-1]) >= 0,
            f"alphas_cumprod of shape {tuple(table[1:].shape)} must fall from final = {final:g} <= 1 to 0 or more.",
        )
        self.angles = torch.atan2((1 - table).sqrt(), table.sqrt())

    @classmethod
    def from_betas(cls, start: float, end: float, steps: int = 1000, *, scaled: bool = False) -> Self:
        """From betas that are linear between two values (or whose roots are: ``scaled``)."""
        power = 0.5 if scaled else 1.0
        betas = torch.linspace(start**power, end**power, steps, dtype=torch.float64) ** (1 / power)
        return cls(torch.cumprod(1 - betas, 0))

    def levels(self, t: Tensor) -> Levels:
        angle, slope = _interpolated(self.angles, t)
        return Levels(angle.cos(), angle.sin(), -slope * angle.sin(), slope * angle.cos())


class ResidualPath(AffinePath):
    """Three end points: x_t = (1 - eta) x0 + eta y + kappa sqrt(eta) noise, from a table of sqrt(eta) at t = 0..T-1.

    t = -1 is the clean end, eta = 0. Between entries sqrt(eta) is linear in t. Name the third end point by
    :meth:`towards` before use.

    Args:
        roots: sqrt(eta) (T,), rising, in (0, 1].
        kappa: noise at eta = 1.
        y: the third end point (n, ...).
    """

    def __init__(self, roots: Tensor, kappa: float, y: Tensor | None = None) -> None:
        super().__init__()
        table = torch.as_tensor(roots).detach().cpu().double()
        rising = table.ndim == 1 and len(table) > 1 and bool((table.diff() > 0).all())
        checks.require(
            rising and float(table[0]) > 0 and float(table[-1]) <= 1,
            f"roots of shape {tuple(table.shape)} must rise within (0, 1], two entries or more.",
        )
        self.roots = torch.cat([table.new_zeros(1), table])
        self.kappa, self.y = checks.positive("kappa", kappa), y

    def towards(self, y: Tensor) -> Self:
        """The same path with ``y`` (n, ...) as its third end point."""
        bound = copy.copy(self)
        bound.y = checks.finite("y", y)
        return bound

    def prior(self, noise: Tensor, t: Time) -> Tensor:
        """Where sampling starts: y + kappa sqrt(eta) noise, with x0 unknown taken to be y."""
        return self.sample(self._y(), noise, t)

    def levels(self, t: Tensor) -> Levels:
        root, slope = _interpolated(self.roots, t)
        return Levels(1 - root.square(), self.kappa * root, -2 * root * slope, self.kappa * slope)

    def offset(self, t: Time) -> Tensor | None:
        y = self._y()
        return self._wide(1 - self.levels(as_double(t)).alpha, y) * y

    def d_offset(self, t: Time) -> Tensor | None:
        y = self._y()
        return self._wide(-self.levels(as_double(t)).d_alpha, y) * y

    def _y(self) -> Tensor:
        if self.y is None:
            checks.refuse("the path's third end point is not set; use path.towards(y).")
        return self.y


def _interpolated(table: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Value and slope at t of the line through ``table`` at t = -1, 0, 1, ...; the slope to the right of a knot."""
    table = table.to(t.device)
    place = (t + 1).clamp(0, len(table) - 1)
    left = place.floor().long().clamp(max=len(table) - 2)
    slope = table[left + 1] - table[left]
    return table[left] + (place - left) * slope, slope
