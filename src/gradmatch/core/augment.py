"""Differentiable Siamese augmentation: one random transformation of images, drawn once and applied to any batch.

A draw picks one operation of a strategy and its numbers; applying it is a differentiable function of the images, so
the same draw can act on a real batch and on the images that are being learned from it. Operations, with u uniform on
[0, 1) and sizes in pixels of an h x w image:

- color: x + (u - 1/2) brightness, then (x - m) u saturation + m with m the mean over channels, then
  (x - m) (u + contrast) + m with m the mean of the image (three independent u);
- crop: moved by whole pixels, at most ``crop`` of the size either way, zero outside;
- cutout: a rectangle of ``cutout`` of the size is set to zero;
- flip: left and right exchanged with probability ``flip``;
- scale: both axes resampled, each by its own factor in [1/scale, scale];
- rotate: by an angle in [-rotate, rotate] degrees; bilinear like scale, zero outside.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmatch.core import checks

__all__ = ["OPERATIONS", "Augmentation", "SiameseAugment"]

OPERATIONS = ("color", "crop", "cutout", "flip", "scale", "rotate")
_SEEDS = 100_000

Source = Callable[[], torch.Generator]
"""Gives the generator that the next numbers are drawn from."""


@dataclass(frozen=True)
class Augmentation:
    """One drawn transformation; call it on as many batches as should be treated alike.

    Attributes:
        operation: its name, or "none".
        values: its numbers (1, k) where all images are treated alike, (n, k) with a row for each image.
        size: height and width of the images it was drawn for.
    """

    operation: str
    values: Tensor
    size: tuple[int, int]

    def __call__(self, x: Tensor) -> Tensor:
        """The transformed images (n, channels, h, w), differentiable in ``x``."""
        checks.require(
            x.ndim == 4 and tuple(x.shape[2:]) == self.size,
            f"x has shape {tuple(x.shape)}; the augmentation was drawn for images of size {self.size}.",
        )
        checks.require(
            len(self.values) in (1, len(x)),
            f"x has {len(x)} images; the augmentation was drawn for {len(self.values)}.",
        )
        return x if self.operation == "none" else _APPLY[self.operation](x, self.values.to(x.device))


class SiameseAugment:
    """A strategy of augmentations.

    Args:
        strategy: operations joined by "_", of which every draw takes one at random; "none" does nothing.
        brightness, saturation, contrast: strength of the three colour operations.
        crop, cutout, flip, scale, rotate: as at the head of this module.
        parity: draw one seed, and every number from a generator of its own, each seeded one higher than the last,
            as the customary public code does with a clock (see :meth:`drawn_from`). Default: one generator for all.

    The defaults are those published for dataset condensation. Digits should not be flipped: leave "flip" out.

    >>> augment = SiameseAugment("crop_scale_rotate")
    >>> alike = augment.draw((28, 28), torch.Generator().manual_seed(0))
    >>> alike(torch.zeros(256, 1, 28, 28)).shape, alike(torch.zeros(10, 1, 28, 28)).shape
    (torch.Size([256, 1, 28, 28]), torch.Size([10, 1, 28, 28]))
    """

    def __init__(
        self,
        strategy: str = "color_crop_cutout_flip_scale_rotate",
        *,
        brightness: float = 1.0,
        saturation: float = 2.0,
        contrast: float = 0.5,
        crop: float = 0.125,
        cutout: float = 0.5,
        flip: float = 0.5,
        scale: float = 1.2,
        rotate: float = 15.0,
        parity: bool = False,
    ) -> None:
        self.operations = operations_of(strategy)
        self.strategy, self.parity = strategy, bool(parity)
        self.brightness = checks.nonnegative("brightness", brightness)
        self.saturation = checks.nonnegative("saturation", saturation)
        self.contrast = checks.nonnegative("contrast", contrast)
        self.crop = checks.fraction("crop", crop, zero=True)
        self.cutout = checks.fraction("cutout", cutout, zero=True)
        self.flip = checks.fraction("flip", flip, zero=True)
        self.scale = checks.number("scale", scale)
        checks.require(self.scale >= 1, f"scale is {scale!r}; it must be at least 1.")
        self.rotate = checks.nonnegative("rotate", rotate)

    def draw(
        self, size: tuple[int, int], generator: torch.Generator, count: int | None = None
    ) -> Augmentation:
        """One operation and its numbers, for images of ``size`` (h, w).

        Args:
            generator: where the randomness comes from; the global one is not touched.
            count: draw numbers of their own for each of so many images; default: one draw for all.
        """
        if self.parity:
            return self.drawn_from(int(torch.randint(_SEEDS, (1,), generator=generator)), size, count)
        return self._draw(size, 1 if count is None else count, lambda: generator)

    def drawn_from(self, seed: int, size: tuple[int, int], count: int | None = None) -> Augmentation:
        """The draw that follows from generators seeded ``seed``, ``seed + 1``, ..., one for each number in turn."""
        seeds = itertools.count(seed)
        return self._draw(
            size, 1 if count is None else count, lambda: torch.Generator().manual_seed(next(seeds))
        )

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """``x`` (n, channels, h, w) under one operation with numbers of its own for each image."""
        checks.require(x.ndim == 4, f"x has shape {tuple(x.shape)}; it must be (n, channels, h, w).")
        return self.draw((x.shape[2], x.shape[3]), generator, len(x))(x)

    def _draw(self, size: tuple[int, int], count: int, source: Source) -> Augmentation:
        if not self.operations:
            return Augmentation("none", torch.zeros(1, 0), size)
        operation = self.operations[int(_whole(1, 0, len(self.operations) - 1, source()))]
        return Augmentation(operation, self._numbers(operation, size, count, source), size)

    def _numbers(self, operation: str, size: tuple[int, int], count: int, source: Source) -> Tensor:
        """(count, k) numbers of one operation, in its own units."""
        if operation == "color":
            u = [torch.rand(count, generator=source()) for _ in range(3)]
            numbers = [(u[0] - 0.5) * self.brightness, u[1] * self.saturation, u[2] + self.contrast]
        elif operation == "crop":
            numbers = [_whole(count, -k, k, source()) for k in (int(s * self.crop + 0.5) for s in size)]
        elif operation == "cutout":
            sides = [int(s * self.cutout + 0.5) for s in size]
            starts = [
                _whole(count, 0, s - k % 2, source()) - k // 2 for s, k in zip(size, sides, strict=True)
            ]
            numbers = [*starts, *(torch.full((count,), float(k)) for k in sides)]
        elif operation == "flip":
            numbers = [(torch.rand(count, generator=source()) < self.flip).float()]
        elif operation == "scale":
            span = self.scale - 1 / self.scale
            numbers = [torch.rand(count, generator=source()) * span + 1 / self.scale for _ in range(2)]
        else:
            turn = 2 * math.radians(self.rotate)
            numbers = [(torch.rand(count, generator=source()) - 0.5) * turn]
        return torch.stack(numbers, dim=1)


def operations_of(strategy: str) -> tuple[str, ...]:
    """The operations that a strategy names; none for "none"."""
    if strategy == "none":
        return ()
    names = tuple(str(strategy).split("_"))
    for name in names:
        checks.require(
            name in OPERATIONS,
            f"augment names {name!r}; it must join {', '.join(OPERATIONS)} by '_', or be 'none'.",
        )
    return names


def _whole(count: int, low: int, high: int, generator: torch.Generator) -> Tensor:
    """(count,) whole numbers of [low, high], as float."""
    return torch.randint(low, high + 1, (count,), generator=generator).float()


def _columns(values: Tensor, x: Tensor) -> list[Tensor]:
    """The numbers, each (1 or n, 1, 1, 1) to go with ``x`` (n, channels, h, w)."""
    return [v.to(x.dtype).reshape(-1, 1, 1, 1) for v in values.unbind(1)]


def _color(x: Tensor, values: Tensor) -> Tensor:
    brightness, saturation, contrast = _columns(values, x)
    x = x + brightness
    mean = x.mean(1, keepdim=True)
    x = (x - mean) * saturation + mean
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * contrast + mean


def _crop(x: Tensor, values: Tensor) -> Tensor:
    height, width = x.shape[2:]
    down, right = values.long().unbind(1)
    # a border of one zero pixel stands for everything outside
    rows = (torch.arange(height, device=x.device) + down[:, None] + 1).clamp(0, height + 1)
    columns = (torch.arange(width, device=x.device) + right[:, None] + 1).clamp(0, width + 1)
    padded = F.pad(x, (1, 1, 1, 1))
    if len(values) == 1:
        return padded.index_select(2, rows[0]).index_select(3, columns[0])
    image = torch.arange(len(x), device=x.device)[:, None, None, None]
    channel = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _cutout(x: Tensor, values: Tensor) -> Tensor:
    top, left, tall, wide = (v[:, None] for v in values.unbind(1))
    row = torch.arange(x.shape[2], device=x.device)
    column = torch.arange(x.shape[3], device=x.device)
    inside = ((row >= top) & (row < top + tall))[:, :, None] & ((column >= left) & (column < left + wide))[
        :, None
    ]
    return x * (~inside[:, None]).to(x.dtype)


def _flip(x: Tensor, values: Tensor) -> Tensor:
    return torch.where(values.reshape(-1, 1, 1, 1) > 0, x.flip(3), x)


def _affine(x: Tensor, matrix: Tensor) -> Tensor:
    """``x`` resampled bilinearly where the (1 or n, 2, 2) matrix takes the pixels, zero outside."""
    theta = F.pad(matrix.to(x.dtype), (0, 1)).expand(len(x), 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def _scale(x: Tensor, values: Tensor) -> Tensor:
    return _affine(x, torch.diag_embed(values))


def _rotate(x: Tensor, values: Tensor) -> Tensor:
    cos, sin = values[:, 0].cos(), values[:, 0].sin()
    return _affine(x, torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1))


_APPLY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "color": _color,
    "crop": _crop,
    "cutout": _cutout,
    "flip": _flip,
    "scale": _scale,
    "rotate": _rotate,
}
