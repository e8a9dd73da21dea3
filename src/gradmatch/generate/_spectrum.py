"""What super-resolved images are compared by: amplitudes of the Fourier transform, features, and the image before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.core import checks

_TINY = 1e-12


def amplitudes(x: Tensor) -> Tensor:
    """|F(x)| of images (n, c, h, w), orthonormal, with a finite gradient (0) where it is 0."""
    f = torch.fft.fft2(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x, norm="ortho")
    size: Tensor = (f.real.square() + f.imag.square() + _TINY).sqrt()
    return size


def radii(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Distance of each frequency from 0 (h, w), 1 at the Nyquist frequency of either axis."""
    v, u = (torch.fft.fftfreq(k, device=device) * 2 for k in (height, width))
    return torch.hypot(v[:, None], u[None])


class SpectrumLoss:
    """mean | |F(a)| - |F(b)| | over frequencies: thermal spectrum regulation.

    It does not see shifts, the sign or point reflection of an image, so it never stands alone.

    Args:
        log: compare log(1 + |F|).
        phase: weight of mean (1 - cos of the difference of phases), weighted by b's amplitudes.
        power: frequencies weigh radius^power; 0 by default.
        band: (low, high) in radii, 1 at Nyquist: only frequencies within count. (0, 1 / scale) is what an image of
            lower resolution knows.

    >>> a = torch.randn(2, 1, 8, 8)
    >>> float(SpectrumLoss()(a, -a.roll(3, -1))) < 1e-6
    True
    """

    def __init__(
        self,
        log: bool = False,
        phase: float = 0.0,
        power: float = 0.0,
        band: tuple[float, float] | None = None,
    ) -> None:
        self.log, self.phase = log, checks.nonnegative("phase", phase)
        self.power, self.band = checks.nonnegative("power", power), band
        checks.require(
            band is None or 0 <= band[0] < band[1],
            f"band is {band}; it must be (low, high), 0 <= low < high.",
        )

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        checks.require(
            a.shape == b.shape,
            f"a is of shape {tuple(a.shape)} and b of {tuple(b.shape)}; they must be equal.",
        )
        first, second = amplitudes(a), amplitudes(b)
        weights = self.weights(a.shape[-2], a.shape[-1], first.device)
        gap = (first.log1p() - second.log1p() if self.log else first - second).abs()
        loss = (weights * gap).sum() / (weights.sum() * gap[..., 0, 0].numel())
        if self.phase:
            fa, fb = (torch.fft.fft2(x, norm="ortho") for x in (a, b))
            cosine = (fa.real * fb.real + fa.imag * fb.imag) / first  # times b's amplitude
            loss = loss + self.phase * (weights * (second - cosine)).mean() / (weights * second).mean()
        return loss

    def weights(self, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
        """Of each frequency (h, w)."""
        r = radii(height, width, device)
        w = r**self.power
        if self.band is not None:
            w = w * ((r >= self.band[0]) & (r <= self.band[1]))
        checks.require(
            bool(w.sum() > 0), f"band {self.band} holds no frequency of a {height} x {width} image."
        )
        return w


def radial_profile(x: Tensor, bins: int = 16) -> Tensor:
    """Mean log amplitude of images (n, c, h, w) in rings of equal width up to Nyquist (n, bins)."""
    r = radii(x.shape[-2], x.shape[-1], x.device)
    ring = (r * bins).long().clamp_max(bins)  # beyond Nyquist: the corners, left out
    logs = amplitudes(x).log().mean(1).flatten(1)
    total = logs.new_zeros(len(x), bins + 1).index_add(1, ring.flatten(), logs)
    count = torch.bincount(ring.flatten(), minlength=bins + 1).clamp_min(1)
    return (total / count)[:, :bins]


class ProfileLoss:
    """Squared distance of radial profiles from one of high-resolution training images, above a radius.

    Args:
        images: (n, c, h, w), whose mean profile is aimed at.
        low: rings below this radius do not count (an image of lower resolution knows them).
    """

    def __init__(self, images: Tensor, low: float = 0.25, bins: int = 16) -> None:
        self.goal, self.bins = radial_profile(images, bins).mean(0), checks.whole("bins", bins)
        self.first = int(checks.fraction("low", low, zero=True, one=False) * bins)

    def __call__(self, a: Tensor, reference: Any = None) -> Tensor:
        return (radial_profile(a, self.bins) - self.goal.to(a))[:, self.first :].square().mean()


class ConsistencyLoss:
    """Mean squared difference of two images after averaging cells of ``scale`` x ``scale`` pixels."""

    def __init__(self, scale: int = 4) -> None:
        self.scale = checks.whole("scale", scale)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return (F.avg_pool2d(a, self.scale) - F.avg_pool2d(b, self.scale)).square().mean()


class PerceptualLoss:
    """sum over extractors of mean |phi(a) - phi(b)|.

    Args:
        extractors: frozen modules in eval mode, or functions: images -> features (n, ...).
        channels: what they take; a grey image is repeated to 3.
        mean, std: of their input normalisation, for each channel or for all.

    Raises:
        InputError: an extractor that could be trained or is in train mode.
    """

    def __init__(
        self,
        extractors: Sequence[Callable[[Tensor], Tensor]],
        channels: int | None = None,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
    ) -> None:
        checks.require(len(extractors) > 0, "extractors is empty; at least one is needed.")
        for k, extractor in enumerate(extractors):
            if isinstance(extractor, nn.Module):
                free = any(p.requires_grad for p in extractor.parameters())
                checks.require(
                    not free and not any(m.training for m in extractor.modules()),
                    f"extractor {k} is not frozen; call its eval() and requires_grad_(False).",
                )
        self.extractors, self.channels = list(extractors), channels
        self.mean, self.std = (torch.as_tensor(v).reshape(-1, 1, 1) for v in (mean, std))

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        first, second = self._seen(a), self._seen(b.detach())
        parts = []
        for extractor in self.extractors:
            with torch.no_grad():
                goal = extractor(second)
            parts.append((extractor(first) - goal).abs().mean())
        return torch.stack(parts).sum()

    def _seen(self, x: Tensor) -> Tensor:
        if self.channels is not None and x.shape[1] == 1:
            x = x.expand(-1, self.channels, -1, -1)
        return (x - self.mean.to(x)) / self.std.to(x)
