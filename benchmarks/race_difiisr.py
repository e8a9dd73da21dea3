"""Fifteen residual steps, their guidance, and the one-step student, against the ResShift loop written out.

The public samplers (ResShift, DifIISR) need a GPU build of their networks and are not installable; the loop here does
their arithmetic: per-step coefficients from tables, x_{t-1} = k x_0 + m x_t + j y. Hooks must cost under 2 %.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from _timer import figure, main, missing, race
from gradmatch.core.guidance import GradientGuide
from gradmatch.generate.difiisr import ConsistencyLoss, ResShift, SpectrumLoss, residual_roots
from gradmatch.zoo import unet

N, SIDE = 8, 16


@torch.no_grad()
def by_hand(net: torch.nn.Module, lr: Tensor, noise: Tensor) -> Tensor:
    """The deterministic sampler, one line a step."""
    y = torch.nn.functional.interpolate(lr, scale_factor=4, mode="bicubic", align_corners=False)
    roots = residual_roots()
    etas = [float(r) ** 2 for r in roots]
    x = y + 2 * math.sqrt(etas[-1]) * noise
    for t in reversed(range(15)):
        eta, before = etas[t], etas[t - 1] if t else 0.0
        given = torch.cat([x / (6 * math.sqrt(eta) + 1), y], 1)
        x0 = net(given, torch.full((len(x),), float(t)))
        m, j = math.sqrt(before / eta), before - math.sqrt(before * eta)
        x = (1 - before + math.sqrt(before * eta) - m) * x0 + m * x + j * y
    return x


def close(a: Tensor, b: Tensor) -> None:
    assert float((a - b).abs().max()) < 1e-4 * max(1.0, float(b.abs().max())), "the images differ"


def run() -> None:
    torch.manual_seed(0)
    net = unet(1, 4 * SIDE, 16, levels=3, in_channels=2, scale=60.0).eval().requires_grad_(False)
    model = ResShift(net)
    g = torch.Generator().manual_seed(0)
    lr, noise = torch.rand(N, 1, SIDE, SIDE, generator=g), torch.randn(N, 1, 4 * SIDE, 4 * SIDE, generator=g)
    size = f"{N} images to {4 * SIDE} x {4 * SIDE}"

    def ours(guide: GradientGuide | None = None) -> Tensor:
        return model.sample(lr, guide=guide, noise=noise).images

    race(f"15 steps, {size}", ours, lambda: by_hand(net, lr, noise), peer="loop by hand", rounds=5, check=close,
         target=0.98)  # fmt: skip
    losses = [ConsistencyLoss(4), SpectrumLoss(band=(0, 0.25))]
    for through in ("x0", "network"):
        guide = GradientGuide(losses, scale=0.01, through=through, reference="lr")
        race(
            f"15 steps guided through {through}, {size}",
            lambda h=guide: ours(h),
            ours,
            peer="unguided",
            rounds=3,
        )
    race(
        f"one step, {size}", lambda: model.sample(lr, 1, noise=noise).images, ours, peer="15 steps", rounds=5
    )
    missing("ResShift and DifIISR samplers", "their loops live in GPU code that pip does not install")
    figure("threads", threads=torch.get_num_threads())


if __name__ == "__main__":
    main(run)
