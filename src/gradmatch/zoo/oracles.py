"""Models that need no training: the exact prediction for data that are a mixture of Gaussians.

A finite data set is the mixture of its points with a common small deviation. With x_t = alpha x0 + sigma noise and
component i = N(m_i, s_i^2), x_t is a mixture of N(alpha m_i, v_i), v_i = sigma^2 + alpha^2 s_i^2; with the posterior
weights r_i(x) = softmax(log w_i + log N(x; alpha m_i, v_i)),

    E[x0 | x] = sum_i r_i (m_i + (alpha s_i^2 / v_i) (x - alpha m_i)),   score = -sum_i r_i (x - alpha m_i) / v_i,

and E[noise | x] = -sigma score. Every kind of prediction is linear in these two, so none divides by zero.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core.path import AffinePath, LinearPath, Prediction, Time

_BLOCK = 2**22
_LEAST = 1e-20


class MixtureOracle:
    """The exact model of a mixture of isotropic Gaussians; call it as ``(x, t)``.

    Args:
        means: (k, ...) centres, or the points of a data set.
        std: one deviation, or one for each centre (k,).
        weights: of the centres (k,); default equal.
        path: default the straight path.
        kind: what it predicts.

    >>> oracle = MixtureOracle(torch.tensor([[-4.0], [4.0]]), 0.5)
    >>> oracle(torch.tensor([[3.0]]), torch.tensor([0.01])).tensor.shape
    torch.Size([1, 1])
    """

    def __init__(
        self,
        means: Tensor,
        std: float | Tensor,
        weights: Tensor | None = None,
        *,
        path: AffinePath | None = None,
        kind: str = "velocity",
    ) -> None:
        self.means = checks.finite("means", means)
        checks.require(
            means.ndim >= 2 and len(means) > 0, f"means is of shape {tuple(means.shape)}; give (k, ...)."
        )
        spread = torch.as_tensor(std).to(means)
        checks.require(bool((spread >= 0).all()), f"std is {std}; it must be at least 0.")
        self.variances = spread.square().expand(len(means))
        weights = torch.ones(len(means)) if weights is None else torch.as_tensor(weights)
        checks.same_length("means", means, "weights", weights)
        checks.require(
            bool((weights >= 0).all()) and float(weights.sum()) > 0, "weights must be 0 or more, one above."
        )
        self.weights = (weights / weights.sum()).to(means)
        self.path, self.kind = path or LinearPath(), kind

    def __call__(self, x: Tensor, t: Time, cond: Any = None) -> Prediction:
        if not isinstance(t, Tensor):
            t = torch.full((len(x),), t, dtype=torch.float64)
        if len(x) * len(self.means) > _BLOCK and len(x) > 1:  # responsibilities of a part at a time
            size = max(1, _BLOCK // len(self.means))
            pairs = zip(torch.split(x, size), torch.split(t.expand(len(x)), size), strict=True)
            parts = [self(a, b).tensor for a, b in pairs]
            return Prediction(self.kind, torch.cat(parts))
        x0, score = self._posterior(x, t)
        if self.kind == "score":
            return Prediction("score", score)
        sigma = self.path.levels(t.double()).sigma.to(x).reshape(-1, *[1] * (x.ndim - 1))
        return Prediction(self.kind, self.path.target(self.kind, x0, -sigma * score, t))

    def log_density(self, x: Tensor, t: Time) -> Tensor:
        """log p_t(x) (n,), differentiable."""
        return self._logits(x, torch.as_tensor(t, dtype=torch.float64).expand(len(x)))[0].logsumexp(1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` data points."""
        index = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, *self.means.shape[1:], generator=generator, dtype=self.means.dtype)
        wide = self.variances[index].sqrt().reshape(-1, *[1] * (noise.ndim - 1))
        return self.means[index] + wide * noise

    def _logits(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log w_i N(x; alpha m_i, v_i) (n, k), and alpha (n, 1), v (n, k)."""
        alpha, sigma = (c.to(x).reshape(-1, 1) for c in self.path.levels(t.double())[:2])
        flat, centres = x.flatten(1), self.means.flatten(1)
        v = (sigma.square() + alpha.square() * self.variances).clamp_min(_LEAST)
        squares = flat.square().sum(1, keepdim=True) - 2 * alpha * (flat @ centres.T)
        squares = squares + alpha.square() * centres.square().sum(1)
        size = flat.shape[1]
        log = self.weights.log() - 0.5 * squares.clamp_min(0) / v - 0.5 * size * (2 * math.pi * v).log()
        return log, alpha, v

    def _posterior(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        log, alpha, v = self._logits(x, t.expand(len(x)))
        r = log.softmax(1)
        flat, centres = x.flatten(1), self.means.flatten(1)
        gain, pull = r * alpha * self.variances / v, r / v
        x0 = r @ centres + gain.sum(1, keepdim=True) * flat - (alpha * gain) @ centres
        score = (alpha * pull) @ centres - pull.sum(1, keepdim=True) * flat
        return x0.reshape(x.shape), score.reshape(x.shape)
