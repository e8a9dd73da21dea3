"""What every path between data and noise shares; the paths themselves are in :mod:`gradmatch.core.path`.

An affine path with up to three end points is

    x_t = alpha(t) x0 + sigma(t) noise + offset(t),

and a network may predict any of five things at (x_t, t), each of which fixes x0 and noise:

    x0        the data point                  noise     the noise (epsilon)
    velocity  dx/dt = alpha' x0 + sigma' noise + offset'
    v         (alpha noise - sigma x0) / sqrt(alpha^2 + sigma^2)
    score     grad log p_t(x) = -noise / sigma

For each kind x0 and noise are linear in (x - offset, prediction), so that conversion, the exact step with the
prediction held fixed (DDIM, and Euler on a straight path) and its inverse are each one line of two coefficients. The
coefficients are computed in float64. Where alpha or sigma is zero, divisions are held at 1e-8: no NaN, no meaning.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gradmatch.core import checks

KINDS = ("x0", "noise", "v", "velocity", "score")
_LEAST = 1e-8
_REMEMBERED = 4096

Time = float | Tensor
"""One time for all examples (a number), or a tensor (n,) with one for each."""


@dataclass(frozen=True)
class Prediction:
    """What a network said at (x, t): ``kind`` is one of :data:`KINDS`, or "posterior" on a simplex."""

    kind: str
    tensor: Tensor


class Path(ABC):
    """What a solver needs of a path; a path on the simplex has this and no ``convert``."""

    @abstractmethod
    def sample(self, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """The point of the path at time ``t`` between ``x0`` and ``noise`` (n, ...)."""

    @abstractmethod
    def velocity(self, x: Tensor, prediction: Prediction, t: Time) -> Tensor:
        """dx/dt at (x, t), given what the network predicted there."""

    @abstractmethod
    def step(self, x: Tensor, prediction: Prediction, t: Time, t_next: Time) -> Tensor:
        """x at ``t_next``, exact where the prediction made at (x, t) stays true all the way."""

    @abstractmethod
    def inverse_step(self, x_next: Tensor, prediction: Prediction, t: Time, t_next: Time) -> Tensor:
        """The x with ``step(x, prediction, t, t_next) == x_next``."""


class Levels(NamedTuple):
    """alpha, sigma and their time derivatives, float64 tensors of the shape of t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


class AffinePath(Path):
    """x_t = alpha(t) x0 + sigma(t) noise (+ offset(t)); a path is a class with :meth:`levels`."""

    ends: tuple[float | None, float | None] = (None, None)
    """The times of noise and of data, where the path has only one."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str, float, float], tuple[float, float]] = {}

    @abstractmethod
    def levels(self, t: Tensor) -> Levels:
        """alpha, sigma, alpha', sigma' at float64 times ``t``."""

    def offset(self, t: Time) -> Tensor | None:
        """The share of the third end point, where there is one."""
        return None

    def d_offset(self, t: Time) -> Tensor | None:
        """Time derivative of :meth:`offset`."""
        return None

    def sample(self, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        alpha, sigma = (self._wide(c, x0) for c in self.levels(as_double(t))[:2])
        return _plus(alpha * x0 + sigma * noise, self.offset(t))

    def target(self, kind: str, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """What a network of this kind should predict at ``sample(x0, noise, t)``."""
        if kind in ("x0", "noise"):
            return x0 if kind == "x0" else noise
        e, f = (self._wide(c, x0) for c in self._row(kind, t))
        return _plus(e * x0 + f * noise, self.d_offset(t) if kind == "velocity" else None)

    def pair(self, kind: str, x0: Tensor, noise: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """(:meth:`sample`, :meth:`target`) at once, for a training step."""
        levels = self.levels(as_double(t))
        alpha, sigma = self._wide(levels.alpha, x0), self._wide(levels.sigma, x0)
        x = _plus(alpha * x0 + sigma * noise, self.offset(t))
        if kind != "velocity":
            return x, self.target(kind, x0, noise, t)
        slope = self._wide(levels.d_alpha, x0) * x0 + self._wide(levels.d_sigma, x0) * noise
        return x, _plus(slope, self.d_offset(t))

    def convert(self, prediction: Prediction, kind: str, x: Tensor, t: Time) -> Prediction:
        """The same knowledge as another kind: ``prediction`` was made at (x, t).

        Args:
            prediction: of one of the five kinds, of the shape of ``x`` (n, ...).
            kind: "x0", "noise", "v", "velocity" or "score".
            x: where it was made.
            t: when, a number or (n,).

        >>> from gradmatch.core.path import LinearPath
        >>> path = LinearPath()
        >>> x0, noise = torch.randn(4, 2), torch.randn(4, 2)
        >>> u = Prediction("velocity", noise - x0)
        >>> torch.allclose(path.convert(u, "x0", path.sample(x0, noise, 0.3), 0.3).tensor, x0, atol=1e-6)
        True
        """
        checks.one_of("kind", kind, KINDS)
        if prediction.kind == kind:
            return prediction
        scale_x, scale_p = self._coefficients(f"to {kind}", prediction.kind, t, t)
        out = self._apply(x, prediction, t, scale_x, scale_p)
        return Prediction(kind, _plus(out, self.d_offset(t) if kind == "velocity" else None))

    def velocity(self, x: Tensor, prediction: Prediction, t: Time) -> Tensor:
        return self.convert(prediction, "velocity", x, t).tensor

    def step(self, x: Tensor, prediction: Prediction, t: Time, t_next: Time) -> Tensor:
        scale_x, scale_p = self._coefficients("step", prediction.kind, t, t_next)
        return _plus(self._apply(x, prediction, t, scale_x, scale_p), self.offset(t_next))

    def inverse_step(self, x_next: Tensor, prediction: Prediction, t: Time, t_next: Time) -> Tensor:
        """The x with ``step(x, prediction, t, t_next) == x_next``, for a prediction of any kind made at (x, t).

        Raises:
            InputError: the step forgets x, as one to the data (sigma = 0) with the x0 predicted does.
        """
        scale_x, scale_p = self._coefficients("step", prediction.kind, t, t_next)
        least = float(torch.as_tensor(scale_x).abs().min())
        checks.require(
            least > 1e-12,
            f"the step from t = {_first(t):g} to {_first(t_next):g} with {prediction.kind!r} held fixed forgets "
            "where it came from; it has no inverse.",
        )
        rest = self._wide(scale_p, x_next) * _minus(
            prediction.tensor, self.d_offset(t) if prediction.kind == "velocity" else None
        )
        inner = (_minus(x_next, self.offset(t_next)) - rest) / self._wide(scale_x, x_next)
        return _plus(inner, self.offset(t))

    def aim(self, kind: str, x: Tensor, x_next: Tensor, t: Time, t_next: Time) -> Prediction:
        """The prediction of ``kind`` at (x, t) with which :meth:`step` lands on ``x_next``."""
        scale_x, scale_p = self._coefficients("step", kind, t, t_next)
        rest = _minus(x_next, self.offset(t_next)) - self._wide(scale_x, x) * _minus(x, self.offset(t))
        return Prediction(
            kind, _plus(rest / self._wide(scale_p, x), self.d_offset(t) if kind == "velocity" else None)
        )

    def _apply(
        self, x: Tensor, prediction: Prediction, t: Time, scale_x: Tensor | float, scale_p: Tensor | float
    ) -> Tensor:
        p = _minus(prediction.tensor, self.d_offset(t) if prediction.kind == "velocity" else None)
        return self._wide(scale_x, x) * _minus(x, self.offset(t)) + self._wide(scale_p, x) * p

    def _coefficients(
        self, what: str, kind: str, t: Time, t_next: Time
    ) -> tuple[Tensor | float, Tensor | float]:
        """(A, B) of A x + B prediction: the step from t to t_next, or a conversion. Numbers are remembered."""
        if isinstance(t, Tensor) or isinstance(t_next, Tensor):
            return self._solve(what, kind, t, t_next)
        key = (what, kind, t, t_next)
        if key not in self._known:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            a, b = self._solve(what, kind, t, t_next)
            self._known[key] = float(a), float(b)
        return self._known[key]

    def _solve(self, what: str, kind: str, t: Time, t_next: Time) -> tuple[Tensor, Tensor]:
        a, b, c, d = self._inner(kind, t)
        e, f = self.levels(as_double(t_next))[:2] if what == "step" else self._row(what[3:], t)
        return e * a + f * c, e * b + f * d

    def _inner(self, kind: str, t: Time) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(a, b, c, d) with x0 = a x + b p and noise = c x + d p, where p is of ``kind``."""
        checks.one_of("prediction kind", kind, KINDS)
        alpha, sigma, d_alpha, d_sigma = self.levels(as_double(t))
        one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
        if kind == "x0":
            return zero, one, 1 / _held(sigma), -alpha / _held(sigma)
        if kind == "noise":
            return 1 / _held(alpha), -sigma / _held(alpha), zero, one
        if kind == "score":
            return 1 / _held(alpha), sigma.square() / _held(alpha), zero, -sigma
        if kind == "v":
            r = torch.hypot(alpha, sigma)
            return alpha / r.square(), -sigma / r, sigma / r.square(), alpha / r
        turn = _held(alpha * d_sigma - sigma * d_alpha)
        return d_sigma / turn, -sigma / turn, -d_alpha / turn, alpha / turn

    def _row(self, kind: str, t: Time) -> tuple[Tensor, Tensor]:
        """(e, f) with p = e x0 + f noise, where p is of ``kind``."""
        checks.one_of("kind", kind, KINDS)
        alpha, sigma, d_alpha, d_sigma = self.levels(as_double(t))
        if kind == "velocity":
            return d_alpha, d_sigma
        if kind == "v":
            r = torch.hypot(alpha, sigma)
            return -sigma / r, alpha / r
        if kind == "score":
            return torch.zeros_like(alpha), -1 / _held(sigma)
        one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
        return (one, zero) if kind == "x0" else (zero, one)

    @staticmethod
    def _wide(c: Tensor | float, like: Tensor) -> Tensor | float:
        """A coefficient in the type of ``like``, one for each example if it has an axis."""
        if not isinstance(c, Tensor):
            return c
        if c.ndim == 0:
            return float(c)
        return c.to(like).reshape(-1, *[1] * (like.ndim - 1))


def as_double(t: Time) -> Tensor:
    """Times in float64, where the device has it."""
    if not isinstance(t, Tensor):
        return torch.tensor(t, dtype=torch.float64)
    return t.to(torch.float32 if t.device.type == "mps" else torch.float64)


def _held(level: Tensor) -> Tensor:
    return level.clamp_min(_LEAST)


def _plus(x: Tensor, y: Tensor | None) -> Tensor:
    return x if y is None else x + y


def _minus(x: Tensor, y: Tensor | None) -> Tensor:
    return x if y is None else x - y


def _first(t: Time) -> float:
    return float(t.flatten()[0]) if isinstance(t, Tensor) else t
