"""Denoisers, measurements and other methods for the images of the experiment."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.solve import pnp

NOISE = 0.02
Map = Callable[[Tensor], Tensor]


class PlainDenoiser(nn.Module):
    """A small U-shaped denoiser, about as large as the convex network and as costly to train."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        w = width
        self.top = nn.Conv2d(1, w, 3, 1, 1)
        self.down = nn.Sequential(
            nn.Conv2d(w, 2 * w, 3, 2, 1), nn.ReLU(), nn.Conv2d(2 * w, 2 * w, 3, 1, 1), nn.ReLU()
        )
        self.bottom = nn.Sequential(nn.Conv2d(2 * w, 4 * w, 3, 2, 1), nn.ReLU())
        self.up = nn.Conv2d(4 * w, 2 * w, 3, 1, 1)
        self.end = nn.Conv2d(2 * w, w, 3, 1, 1)
        self.out = nn.Conv2d(w, 1, 3, 1, 1)

    def forward(self, y: Tensor) -> Tensor:
        """y less the noise."""
        top = self.top(y).relu()
        middle = self.down(top)
        middle = middle + self.up(F.interpolate(self.bottom(middle), scale_factor=2)).relu()
        end = top + self.end(F.interpolate(middle, scale_factor=2)).relu()
        out: Tensor = self.out(end)
        return y - out


def gaussian_blur(sigma: float = 1.0, size: int = 5) -> Map:
    """Convolution with a Gaussian kernel and zeros beyond the border, its own adjoint."""
    t = torch.arange(size) - (size - 1) / 2
    line = torch.exp(-t.square() / (2 * sigma**2))
    kernel = torch.outer(line, line)
    kernel = (kernel / kernel.sum())[None, None]
    return lambda x: F.conv2d(x, kernel.to(x), padding=size // 2)


def measured(x: Tensor, task: str, seed: int) -> tuple[Tensor, Map]:
    """Measurements of images, and the map, which is its own adjoint: blurred, or a quarter of the pixels."""
    generator = torch.Generator().manual_seed(seed)
    if task == "deblurring":
        A = gaussian_blur()
    else:
        mask = (torch.rand(x.shape, generator=generator) < 0.25).float()
        A = lambda v: v * mask  # noqa: E731
    y = A(x) + NOISE * torch.randn(x.shape, generator=generator)
    return (y if task == "deblurring" else A(y)), A


def plugged(prox: Map, iters: int) -> dict[str, Callable[[Tensor, Map, str], Tensor]]:
    """Reconstructions by a prox, for six ways of weighing it."""

    def by(method: str, **options: Any) -> Callable[[Tensor, Map, str], Tensor]:
        def run(y: Tensor, A: Map, task: str) -> Tensor:
            return pnp(y, A, A, prox, method, iters=iters, **options).x

        return run

    found = {f"PGD, eta {eta:g}": by("pgd", eta=eta) for eta in (0.3, 0.95)}
    return found | {f"ADMM, rho {rho:g}": by("admm", rho=rho) for rho in (0.02, 0.05, 0.1, 0.3)}


def total_variation(iters: int) -> dict[str, Callable[[Tensor, Map, str], Tensor]]:
    """The same loop with scikit-image's total variation for a prox, for six weights."""
    from skimage.restoration import denoise_tv_chambolle

    def by(weight: float) -> Callable[[Tensor, Map, str], Tensor]:
        def prox(v: Tensor) -> Tensor:
            call = cast(Any, denoise_tv_chambolle)
            done = [call(image, weight, max_num_iter=20) for image in v[:, 0].numpy()]
            return _stacked(done)

        return lambda y, A, task: pnp(y, A, A, prox, "pgd", eta=0.95, iters=iters).x

    return {f"weight {w:g}": by(w) for w in (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)}


def classical(task: str) -> dict[str, Callable[[Tensor, Map, str], Tensor]]:
    """Wiener's filter, for six balances; or the biharmonic surface through the pixels there are, with none."""
    from skimage import restoration

    def wiener(y: Tensor, A: Map, task: str, balance: float) -> Tensor:
        point = F.pad(torch.ones(1, 1, 1, 1), (2, 2, 2, 2))
        kernel, call = A(point)[0, 0].numpy(), cast(Any, restoration.wiener)
        return _stacked([call(image, kernel, balance, clip=False) for image in y[:, 0].numpy()])

    def biharmonic(y: Tensor, A: Map, task: str) -> Tensor:
        masks, call = A(torch.ones_like(y))[:, 0].numpy() == 0, cast(Any, restoration.inpaint_biharmonic)
        return _stacked([call(image, mask) for image, mask in zip(y[:, 0].numpy(), masks, strict=True)])

    if task != "deblurring":
        return {"nothing to set": biharmonic}
    return {f"balance {b:g}": partial(wiener, balance=b) for b in (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)}


def _stacked(done: list[Any]) -> Tensor:
    return torch.from_numpy(np.stack(done)).float()[:, None]


def psnr(a: Tensor, b: Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB, of values cut to [0, 1]."""
    errors = (a.clamp(0, 1) - b).flatten(1).square().mean(1).double()
    return float((-10 * errors.log10()).mean())


def disturbed(x: Tensor, seed: int) -> dict[str, list[tuple[float, Tensor]]]:
    """Images made worse in three ways, little by little."""
    from scipy.ndimage import gaussian_filter

    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))

    def blurred(s: float) -> Tensor:
        return torch.from_numpy(gaussian_filter(x.numpy(), (0, 0, s, s)))

    return {
        "noise": [(s, (x + s * noise).clamp(0, 1)) for s in (0.0, 0.05, 0.1, 0.2, 0.3)],
        "blur": [(s, blurred(s)) for s in (0.0, 0.5, 1.0, 1.5, 2.0)],
        "mixing": [(s, (1 - s) * x + s * x.flip(0)) for s in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)],
    }


def asymmetry(f: Map, x: Tensor, seed: int) -> float:
    """|u.Jv - v.Ju| over their size, root mean squares over random pairs, J the Jacobian of f at images."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.randn(x.shape, generator=generator) for _ in range(2))

    def product(w: Tensor) -> Tensor:
        at = x.clone().requires_grad_()
        (found,) = torch.autograd.grad((f(at) * w).sum(), at)  # J^T w
        return found

    one, two = ((product(a) * b).flatten(1).sum(1) for a, b in ((u, v), (v, u)))
    size = math.sqrt(float(product(u).square().sum() / len(x)))
    return math.sqrt(float((one - two).square().mean())) / size
