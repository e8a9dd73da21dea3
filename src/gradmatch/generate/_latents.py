"""A frozen autoencoder as a pair of maps with a scale, whatever the user's has for an interface."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.core.tap import evaluating

LOW, HIGH = 0.2, 5.0


@dataclass(frozen=True)
class Moments:
    """Mean and deviation of the latents of images, unscaled, from which samples are drawn: what a cache holds.

    ``std`` is None where the encoder is deterministic.
    """

    mean: Tensor
    std: Tensor | None

    def __len__(self) -> int:
        return len(self.mean)

    def __getitem__(self, index: Any) -> Moments:
        return Moments(self.mean[index], None if self.std is None else self.std[index])

    def draw(self, generator: torch.Generator) -> Tensor:
        """A posterior sample (n, ...) in float32 or better."""
        mean = self.mean if self.mean.dtype == torch.float64 else self.mean.float()
        if self.std is None:
            return mean
        noise = torch.randn(mean.shape, generator=generator, device=generator.device, dtype=mean.dtype)
        return mean + self.std.to(mean) * noise.to(mean.device)


class Codec(nn.Module):
    """Encodes images to scaled latents and back; gives no gradient and leaves the autoencoder's modes as found.

    The scale is a buffer and goes with the weights; the autoencoder is no submodule and is neither trained nor saved.

    Args:
        autoencoder: diffusers' ``AutoencoderKL`` (or anything whose ``encode(x)`` has ``latent_dist``); any object
            whose ``encode`` and ``decode`` take and give tensors; or None, for pixels themselves.
        scale: factor of the latents; "auto" sets 1 / std of the first images seen.
        shift: taken from the latents before scaling.
        mean: encode to the posterior's mean instead of a sample, which narrows the latents.
    """

    scale: Tensor

    def __init__(self, autoencoder: Any, scale: str | float, shift: float = 0.0, mean: bool = False) -> None:
        super().__init__()
        checks.require(
            autoencoder is None or (hasattr(autoencoder, "encode") and hasattr(autoencoder, "decode")),
            f"autoencoder is a {type(autoencoder).__name__}; it must have encode and decode, or be None.",
        )
        self._kept = (autoencoder,)
        self.mean, self.shift, self._checked = mean, checks.number("shift", shift), False
        value = float("nan") if scale == "auto" else checks.positive("scale", scale)
        self.register_buffer("scale", torch.tensor(value, dtype=torch.float64))

    @property
    def autoencoder(self) -> Any:
        """The user's own."""
        return self._kept[0]

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        part = self.autoencoder
        with torch.no_grad(), evaluating(part) if isinstance(part, nn.Module) else nullcontext():
            yield

    def moments(self, images: Tensor) -> Moments:
        """Mean and deviation of the latents of ``images`` (n, c, h, w)."""
        checks.require(
            images.is_floating_point(),
            f"images is of {images.dtype}; it must be floating point, scaled as the autoencoder expects.",
        )
        checks.finite("images", images)
        with self._frozen():
            said = images if self.autoencoder is None else self.autoencoder.encode(images)
            said = getattr(said, "latent_dist", getattr(said, "latents", said))
            if isinstance(said, Tensor):
                return Moments(said, None)
            return Moments(said.mean, None if self.mean else said.std)

    def latents(self, images: Tensor | Moments, generator: torch.Generator) -> Tensor:
        """Scaled latents of images, or of cached moments; the first ones set an "auto" scale."""
        moments = images if isinstance(images, Moments) else self.moments(images)
        z = moments.draw(generator)
        z = z - self.shift if self.shift else z
        if math.isnan(scale := float(self.scale)):
            scale = 1 / max(float(z.std()), 1e-6)
            self.scale.fill_(scale)
        z = z * scale
        if not self._checked and z.numel() > 1:
            self._checked = True
            _warn_unless_balanced(float(z.std()))
        return z

    def images(self, z: Tensor, block: int = 256) -> Tensor:
        """Images (n, c, h, w) of scaled latents."""
        plain = z / self.known() + self.shift
        if self.autoencoder is None:
            return plain
        with self._frozen():
            parts = [self.autoencoder.decode(part) for part in torch.split(plain, block)]
            return torch.cat([getattr(part, "sample", part) for part in parts])

    def known(self) -> float:
        """The scale, refused while "auto" has seen nothing."""
        if math.isnan(float(self.scale)):
            checks.refuse('scale is "auto" and no images were seen yet; train first, or give a number.')
        return float(self.scale)


def _warn_unless_balanced(spread: float) -> None:
    if not LOW <= spread <= HIGH:
        warnings.warn(
            f"latents have a deviation of {spread:.3g} after scaling, which leaves noise and data out of balance; "
            'scale="auto" fits the scale to this autoencoder.',
            stacklevel=4,
        )


@contextmanager
def untouched(module: Any) -> Iterator[None]:
    """Within the block no parameter of ``module`` asks for a gradient, and nothing in it is random."""
    if not isinstance(module, nn.Module):
        yield
        return
    asked = [p for p in module.parameters() if p.requires_grad]
    try:
        for p in asked:
            p.requires_grad_(False)
        with evaluating(module):
            yield
    finally:
        for p in asked:
            p.requires_grad_(True)
