"""One-dimensional priors whose proximal operators are known, and what each loss would learn of them at best."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from gradmatch.solve import ConvexNet, LearnedProx, ProximalMatching, Stage

Curve = Callable[[np.ndarray], np.ndarray]
SIGMA = 1.0
"""Noise on the Laplace prior of scale 1: its proximal operator is the soft threshold at 1, and R = |x|."""
MODES, SPREAD, MIXTURE_SIGMA = 1.0, 0.3, 0.5
LINE = np.linspace(-14, 14, 28001)
AT, AT_R = np.linspace(-3, 3, 241), np.linspace(-2, 2, 161)
BETWEEN = np.linspace(-1.3, 1.3, 105)
"""Where R of the mixture is read: beyond, f had no data to reach."""


def soft_threshold(y: np.ndarray) -> np.ndarray:
    """The proximal operator of |x|."""
    found: np.ndarray = np.sign(y) * np.maximum(np.abs(y) - 1, 0)
    return found


def laplace(count: int, generator: torch.Generator) -> Tensor:
    """Draws (count, 1) of scale 1."""
    side = 2 * torch.randint(2, (count, 1), generator=generator) - 1
    return side * torch.empty(count, 1).exponential_(generator=generator)


def mixture(count: int, generator: torch.Generator) -> Tensor:
    """Draws (count, 1) around -1 and 1."""
    side = 2 * torch.randint(2, (count, 1), generator=generator) - 1
    return MODES * side + SPREAD * torch.randn(count, 1, generator=generator)


def mixture_prior(x: np.ndarray) -> np.ndarray:
    """- sigma^2 log p of the mixture, up to a constant."""
    parts = [-((x - m) ** 2) / (2 * SPREAD**2) for m in (-MODES, MODES)]
    found: np.ndarray = -(MIXTURE_SIGMA**2) * np.logaddexp(*parts)
    return found


def mixture_prox(y: np.ndarray) -> np.ndarray:
    """Its proximal operator, on a grid."""
    x = np.linspace(-4, 4, 8001)
    cost = (x - y[:, None]) ** 2 / 2 + mixture_prior(x)
    found: np.ndarray = x[cost.argmin(1)]
    return found


def mixture_hull(x: np.ndarray) -> np.ndarray:
    """The R of that proximal operator: where it jumps over x, the convex hull of R + x^2 / 2, less x^2 / 2."""
    y = np.linspace(-8, 8, 4001)
    grid = np.linspace(-4, 4, 4001)
    conjugate = (y[:, None] * grid - grid**2 / 2 - mixture_prior(grid)).max(1)
    found: np.ndarray = (x[:, None] * y - conjugate).max(1) - x**2 / 2
    return found


def ideal(loss: str, gamma: float | None = None) -> np.ndarray:
    """What a network without limits would learn of the Laplace prior at ``AT``, by quadrature."""
    weight = np.exp(-np.abs(LINE) - (AT[:, None] - LINE) ** 2 / (2 * SIGMA**2))
    weight /= weight.sum(1, keepdims=True)
    if loss == "l2":
        found: np.ndarray = weight @ LINE
        return found
    if loss == "l1":
        median: np.ndarray = LINE[(weight.cumsum(1) < 0.5).sum(1)]
        return median
    best = []
    guesses = np.linspace(-3, 3, 1201)
    kernel = np.exp(-(((guesses[:, None] - LINE[::10]) / (gamma or 1.0)) ** 2))
    for row in weight[:, ::10]:
        best.append(guesses[(kernel @ row).argmax()])
    return np.array(best)


def trained(draw: Callable[..., Tensor], sigma: float, plans: dict[str, list[Stage]], batch: int,
            seed: int) -> dict[str, LearnedProx]:  # fmt: skip
    """Networks after each of the plans, which follow one another; the first begins afresh."""
    model = LearnedProx(ConvexNet.dense(1, seed=seed))
    found = {}
    for number, (name, stages) in enumerate(plans.items()):
        ProximalMatching(model, sigma, schedule=stages).fit(draw, batch, seed=10 * seed + number)
        kept = LearnedProx(ConvexNet.dense(1, seed=seed))
        kept.load_state_dict(model.state_dict())
        found[name] = kept.eval()
    return found


def curves(model: LearnedProx, at: np.ndarray = AT_R) -> tuple[np.ndarray, np.ndarray]:
    """f at ``AT``, and R at ``at`` less its value at 0, in the middle."""
    with torch.no_grad():
        f = model(torch.from_numpy(AT).float()[:, None])[:, 0].double().numpy()
    R = model.prior(torch.from_numpy(at)[:, None]).value.numpy()
    return f, R - R[len(R) // 2]
