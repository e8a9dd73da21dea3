"""The theorem's bound on Gaussians: data N(m, S) in the plane, a linear autoencoder, the exact field off by a constant.

Everything is affine, so that the generated distribution is a Gaussian whose moments follow from three trajectories.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradmatch.core.path import LinearPath
from gradmatch.core.sampler import Network, Solver
from gradmatch.evidence._common import Row
from gradmatch.generate.lfm import w2_bound

ERRORS = (0.01, 0.03, 0.1, 0.3, 1.0)
SHIFTS = (0.0, 0.3, 1.0, 3.0)


def w2(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Wasserstein-2 distance of two Gaussians."""
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    squared = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return math.sqrt(max(0.0, float(squared)))


def case(decoder: Tensor, std: Tensor, error: float, shift: float) -> tuple[float, float, float]:
    """(W2, the bound by the triangle, the bound as printed) for one size of the field's error and decoder's shift.

    Args:
        decoder: (2, 2); the encoder is its inverse. The decoder adds ``shift`` along the first axis.
        std: of the independent latent coordinates (2,); latents have mean (1, -1).
    """
    # backwards in time the error adds up along +x, where the decoder's shift points: the case the bound must cover
    mean, off = torch.tensor([1.0, -1.0]).double(), error * torch.tensor([-1.0, 0.0]).double()

    def slope(t: Tensor) -> Tensor:
        t = t.reshape(-1, 1)
        return (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2)

    def field(z: Tensor, t: Tensor) -> Tensor:
        return -mean + slope(t) * (z - (1 - t.reshape(-1, 1)) * mean) + off

    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).double()
    times = torch.linspace(1, 0, 401, dtype=torch.float64)
    base, first, second = Solver(times, "heun").run(Network(field, "velocity"), LinearPath(), corners).x
    map_ = torch.stack([first - base, second - base], 1)
    gap = shift * torch.tensor([1.0, 0.0]).double()
    inner, outer = decoder @ torch.diag(std**2) @ decoder.T, decoder @ map_ @ map_.T @ decoder.T
    made = w2(decoder @ mean, inner, decoder @ base + gap, outer)
    lipschitz = float(slope(times).abs().max())
    spread = float(torch.linalg.matrix_norm(decoder, 2))
    printed = shift**2 + spread**2 * math.exp(1 + 2 * lipschitz) * error**2
    return made, w2_bound(shift, spread, lipschitz, error**2), math.sqrt(printed)


def rows() -> list[Row]:
    """The share of cases in which each form of the bound holds."""
    decoders = (torch.eye(2).double(), torch.tensor([[2.0, 0.5], [0.0, 0.4]]).double())
    spreads = (torch.ones(2).double(), torch.tensor([1.0, 0.5]).double())
    found = [
        case(decoder, std, error, shift)
        for decoder in decoders
        for std in spreads
        for error in ERRORS
        for shift in SHIFTS
    ]
    slack = 1e-6  # of the integration
    triangle = sum(made <= bound + slack for made, bound, _ in found) / len(found)
    printed = sum(made <= bound + slack for made, _, bound in found) / len(found)
    worst = max(made / bound for made, _, bound in found)
    cost = f"{len(found)} cases"
    return [
        Row("share of Gaussian cases within the bound by the triangle", (triangle,), cost),
        Row(
            "share of Gaussian cases within the bound as printed",
            (printed,),
            f"{cost}; at worst {worst:.2f} of it",
        ),
    ]
