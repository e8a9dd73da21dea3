r"""Paths on the probability simplex between near-uniform noise (t = 0) and one-hot tokens (t = 1).

Points are x (n, L, K) with rows that sum to 1; networks predict the posterior p(k | x, t) of the token at each
position, ``Prediction("posterior", p)``. Times rise towards data, as in the papers, so a solver's times do too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core._affine import Path, Prediction, Time

__all__ = ["GumbelPath", "LinearSimplexPath", "dirichlet_noise", "gumbel_noise", "on_simplex"]


def gumbel_noise(*shape: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Standard Gumbel numbers in float32, from uniforms held in [1e-12, 1 - 1e-7] so that they are finite."""
    u = torch.rand(*shape, generator=generator, device=generator.device).clamp(1e-12, 1 - 1e-7)
    return -torch.log(-torch.log(u)).to(device)


def dirichlet_noise(*shape: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Uniform points of the simplex, Dirichlet(1, ..., 1) over the last axis, in float32."""
    u = torch.rand(*shape, generator=generator, device=generator.device).clamp(1e-12, 1 - 1e-7)
    exponential = -torch.log(u)
    return (exponential / exponential.sum(-1, keepdim=True)).to(device)


def on_simplex(name: str, x: Tensor, slack: float = 1e-3) -> Tensor:
    """``x`` if its last axis is a distribution, to within ``slack``.

    Raises:
        InputError: sums off by more, or entries under 0.
    """
    off = float((x.sum(-1) - 1).abs().max()) if x.numel() else 0.0
    checks.require(
        off <= slack and bool((x >= 0).all()),
        f"{name} lies off the simplex (sums off by {off:.2g}, least entry {float(x.min()):.2g}); its last axis must "
        "hold probabilities.",
    )
    return x


class _SimplexPath(Path):
    """What the two paths share: the kind of prediction, and times as they come."""

    def velocity(self, x: Tensor, prediction: Prediction, t: Time) -> Tensor:
        """dx/dt; sums to zero over K."""
        return self._velocity(x, _posterior(prediction), _wide(t, x))

    def step(self, x: Tensor, prediction: Prediction, t: Time, t_next: Time) -> Tensor:
        """Exact with the posterior held fixed."""
        return self._step(x, _posterior(prediction), _wide(t, x), _wide(t_next, x))

    def _velocity(self, x: Tensor, p: Tensor, t: Tensor) -> Tensor:
        raise NotImplementedError

    def _step(self, x: Tensor, p: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        raise NotImplementedError


def _posterior(prediction: Prediction) -> Tensor:
    checks.require(
        prediction.kind == "posterior",
        f'the model predicts "{prediction.kind}"; on a simplex it must predict the "posterior" of the tokens.',
    )
    return prediction.tensor


def _wide(t: Time, x: Tensor) -> Tensor:
    """t as (n, 1, 1) or a number, in the type of x."""
    found = torch.as_tensor(t, device=x.device).to(x.dtype)
    return found.reshape(-1, *[1] * (x.ndim - 1)) if found.ndim else found


def _log(x: Tensor) -> Tensor:
    return x.clamp_min(torch.finfo(x.dtype).tiny).log()


class GumbelPath(_SimplexPath):
    r"""x_t = softmax((a(t) e_k + g / beta) / tau(t)), tau(t) = tau_max exp(-decay t), g standard Gumbel noise.

    With ``signal=None``, a = 1: the path of Gumbel-Softmax flow matching (Tang et al., arXiv 2503.17361). Its field is
    u = (decay / tau) x (p - <p, x>), whose exact step is x <- softmax(log x + (1/tau' - 1/tau) p). tau log x is, up to
    a constant, e_k + g / beta at *every* t: the path is one draw rescaled, the posterior along it is the same at all t,
    and sampling starts from g alone, which is no state of the path. The push over [0, 1] is 1/tau(1) - 1/tau(0) nats,
    1.91 by default, so the end point is not one-hot either and a decoder has to be chosen.

    With a number A for ``signal``, a(t) = A t: the signal grows from nothing, z = tau log x obeys dz/dt = A p, and the
    flow is the exact marginal one; its step is z <- z + (a' - a) p.

    Args:
        tau_max, decay, beta: 10, 3 and 2, as published.
        signal: None or A; A = 4 is one-hot to 0.99 at t = 1.
    """

    def __init__(
        self, tau_max: float = 10.0, decay: float = 3.0, beta: float = 2.0, signal: float | None = None
    ) -> None:
        self.tau_max, self.decay = checks.positive("tau_max", tau_max), checks.positive("decay", decay)
        self.beta = checks.positive("beta", beta)
        self.signal = None if signal is None else checks.positive("signal", signal)

    def tau(self, t: Time) -> Tensor:
        """The temperature."""
        return self.tau_max * torch.exp(-self.decay * torch.as_tensor(t))

    def amount(self, t: Tensor) -> Tensor:
        """a(t)."""
        return torch.ones_like(t) if self.signal is None else self.signal * t

    def sample(self, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """Points between one-hot ``x0`` (n, L, K) (the raw one-hot, not its logarithm) and Gumbel ``noise``."""
        at = _wide(t, noise)
        return ((self.amount(at) * x0 + noise / self.beta) / self.tau(at)).softmax(-1)

    def prior(self, noise: Tensor) -> Tensor:
        """Where sampling starts: softmax(g / (beta tau_max))."""
        return (noise / (self.beta * self.tau_max)).softmax(-1)

    def _velocity(self, x: Tensor, p: Tensor, t: Tensor) -> Tensor:
        if self.signal is None:
            return self.decay / self.tau(t) * x * (p - (p * x).sum(-1, keepdim=True))
        w = self.signal / self.tau(t) * p + self.decay * _log(x)
        return x * (w - (w * x).sum(-1, keepdim=True))

    def _step(self, x: Tensor, p: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        if self.signal is None:
            return (_log(x) + (1 / self.tau(t_next) - 1 / self.tau(t)) * p).softmax(-1)
        z = self.tau(t) * _log(x) + (self.amount(t_next) - self.amount(t)) * p
        return (z / self.tau(t_next)).softmax(-1)

    def inverse_step(self, x_next: Tensor, prediction: Prediction, t: Time, t_next: Time) -> Tensor:
        """The same step from t_next to t."""
        return self.step(x_next, prediction, t_next, t)

    def posterior(self, x: Tensor, t: Time, prior: Tensor) -> Tensor:
        """p(k | x, t) where each position is on its own, with ``prior`` pi [..., K].

        log p = log pi_k - K log(S + (e^(beta a) - 1) x_k^(-beta tau)) + const, S = sum_j x_j^(-beta tau).
        """
        at = _wide(t, x)
        y = -self.beta * self.tau(at) * _log(x)
        total = torch.logsumexp(y, -1, keepdim=True)
        extra = y + torch.log(torch.expm1(self.beta * self.amount(at)).clamp_min(1e-30))
        return (prior.log() - x.shape[-1] * torch.logaddexp(total, extra)).softmax(-1)

    def score(self, weights: Tensor, t: Time) -> Tensor:
        """d log p(y) / dy of y = log x, from the softmax weights: -beta tau + beta tau K weights."""
        scale = self.beta * self.tau(_wide(t, weights))
        return scale * (weights.shape[-1] * weights - 1)

    def weights(self, logits: Tensor, x: Tensor, t: Time) -> Tensor:
        """softmax(logits - beta tau log x): with logits beta a e_k, those of the exact score of x_t given k."""
        return (logits - self.beta * self.tau(_wide(t, x)) * _log(x)).softmax(-1)


class LinearSimplexPath(_SimplexPath):
    """x_t = (1 - t) noise + t e_k with noise on the simplex: the linear flow, to compare with."""

    def sample(self, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """Points between one-hot ``x0`` and ``noise``, both (n, L, K)."""
        at = _wide(t, noise)
        return (1 - at) * noise + at * x0

    def prior(self, noise: Tensor) -> Tensor:
        """The noise itself."""
        return noise

    def _velocity(self, x: Tensor, p: Tensor, t: Tensor) -> Tensor:
        return (p - x) / (1 - t).clamp_min(1e-6)

    def _step(self, x: Tensor, p: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        return p + (x - p) * ((1 - t_next) / (1 - t).clamp_min(1e-6))

    def inverse_step(self, x_next: Tensor, prediction: Prediction, t: Time, t_next: Time) -> Tensor:
        """x at t; from t_next = 1, where all is forgotten, it is refused."""
        checks.require(
            bool((torch.as_tensor(t_next) < 1).all()),
            "t_next is 1; a linear step to data cannot be taken back.",
        )
        p = _posterior(prediction)
        now, then = _wide(t, x_next), _wide(t_next, x_next)
        return p + (x_next - p) * ((1 - now) / (1 - then))


def end_push(path: GumbelPath) -> float:
    """Nats by which the published path favours the predicted token over the whole of [0, 1].

    >>> round(end_push(GumbelPath()), 2)
    1.91
    """
    return (math.exp(path.decay) - 1) / path.tau_max
