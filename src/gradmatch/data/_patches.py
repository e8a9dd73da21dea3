"""Dropping the image patches that a classifier finds least telling, and filling them in again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.core import checks
from gradmatch.core.networks import fitted
from gradmatch.core.tap import capture, evaluating, last_of

Inpainter = Callable[[Tensor, Tensor], Tensor]
"""(images with zeros in the holes (n, c, h, w), visible pixels (n, 1, h, w) bool) -> whole images."""

FILLS = ("mean", "bilinear")


def class_activation_map(
    classifier: nn.Module, images: Tensor, target: Tensor | None = None, layer: str | None = None
) -> Float[Tensor, "n h w"]:
    """Where a classifier looks for a class: activations of a layer weighted by their mean gradients, not rectified.

    Args:
        classifier: gives logits (n, classes); put into eval mode for the pass, ``.grad`` untouched.
        images: (n, c, h, w).
        target: class of each image; default the predicted one.
        layer: name of the module to read, giving (n, k, h', w'); default the last convolution.
    """
    name = layer if layer is not None else last_of(classifier, nn.Conv2d)
    with evaluating(classifier), capture(classifier, name) as seen, torch.enable_grad():
        # a leaf that needs a gradient keeps the graph alive also for a frozen classifier
        logits = classifier(fitted(classifier, images.detach()).requires_grad_())
        checks.require(
            logits.ndim == 2, f"classifier gives {tuple(logits.shape)}; it must give logits (n, classes)."
        )
        chosen = logits.argmax(1) if target is None else target.to(logits.device)
        activation = seen[name]
        checks.require(
            activation.ndim == 4,
            f"layer {name!r} gives {tuple(activation.shape)}; it must give maps of shape (n, k, h, w).",
        )
        (slope,) = torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), activation)
    return (slope.mean((2, 3), keepdim=True) * activation).sum(1).detach()


class PatchQuantizer:
    """Keep the patches of each image on which a classifier's decision rests.

    Args:
        classifier: a trained classifier; not needed with ``by="random"``.
        drop: share of patches dropped, in [0, 1); 0.2 as published.
        patch: side of a patch in pixels; 16 as published (a grid of 14 x 14 at 224 pixels).
        by: "gradcam", or "random" as the baseline.
        layer: module whose activations are mapped; default the last convolution.
        fill: how :meth:`restore` fills holes: "mean" (of the visible pixels, by channel), "bilinear" (a smooth
            surface through the means of visible patches), or an inpainter such as a masked autoencoder.
        batch_size: images at once.
        seed: of ``by="random"``.

    A share r of the items with ``drop`` of their patches gone stores r * (1 - drop); see :meth:`item_ratio`.

    >>> quantizer = PatchQuantizer(None, drop=0.25, patch=2, by="random")
    >>> visible, mask = quantizer(torch.rand(3, 1, 4, 4))
    >>> visible.shape, mask.sum(1).tolist()
    (torch.Size([3, 3, 4]), [3, 3, 3])
    """

    def __init__(
        self,
        classifier: nn.Module | None,
        drop: float = 0.2,
        patch: int = 16,
        *,
        by: str = "gradcam",
        layer: str | None = None,
        fill: str | Inpainter = "bilinear",
        batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        self.classifier, self.layer, self.fill = classifier, layer, fill
        self.drop = checks.fraction("drop", drop, zero=True, one=False)
        self.patch = checks.whole("patch", patch)
        self.by = checks.one_of("by", by, ("gradcam", "random"))
        self.batch_size, self.seed = checks.whole("batch_size", batch_size), checks.whole("seed", seed, 0)
        checks.require(
            by == "random" or isinstance(classifier, nn.Module),
            f"classifier is a {type(classifier).__name__}; by='gradcam' needs a trained nn.Module.",
        )
        if not callable(fill):
            checks.one_of("fill", fill, FILLS)

    def item_ratio(self, storage: float) -> float:
        """The share of items that stores ``storage`` of the data: 0.125 for 10 % at the default drop of 0.2."""
        ratio = checks.fraction("storage", storage) / (1 - self.drop)
        checks.require(
            ratio <= 1, f"storage is {storage:g}; drop {self.drop:g} stores {1 - self.drop:g} at most."
        )
        return ratio

    def __call__(
        self, images: Float[Tensor, "n c h w"], target: Tensor | None = None
    ) -> tuple[Float[Tensor, "n k p"], Bool[Tensor, "n l"]]:
        """Visible patches (n, kept, c * patch * patch) in row-major order, and which of the L patches are visible.

        Every image keeps round((1 - drop) * L) patches; equal scores are kept from the top left.

        Raises:
            InputError: images of another shape, not divisible into patches, or not finite.
        """
        rows, columns = self._grid(images)
        kept = round((1 - self.drop) * rows * columns)
        checks.require(
            kept >= 1, f"drop is {self.drop:g}, which leaves none of {rows * columns} patches; lower it."
        )
        scores = self._scores(images, target, rows, columns)
        order = torch.argsort(scores, dim=1, descending=True, stable=True)[:, :kept]
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
        return self._patches(images)[mask].reshape(len(images), kept, -1), mask

    def _grid(self, images: Tensor) -> tuple[int, int]:
        checks.require(
            images.ndim == 4 and len(images) > 0,
            f"images is of shape {tuple(images.shape)}; it must be (n, channels, height, width).",
        )
        checks.finite("images", images)
        h, w = images.shape[2:]
        checks.require(
            h % self.patch == 0 and w % self.patch == 0,
            f"images are {h} x {w} pixels; both sides must be divisible by patch {self.patch}.",
        )
        return h // self.patch, w // self.patch

    def _scores(self, images: Tensor, target: Tensor | None, rows: int, columns: int) -> Tensor:
        if self.by == "random":
            generator = torch.Generator().manual_seed(self.seed)
            return torch.rand(len(images), rows * columns, generator=generator).to(images.device)
        assert self.classifier is not None
        maps = []
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            aim = None if target is None else target[part]
            found = class_activation_map(self.classifier, images[part], aim, self.layer)[:, None]
            finer = found.shape[2] >= rows and found.shape[3] >= columns
            maps.append(
                F.adaptive_avg_pool2d(found, (rows, columns))
                if finer
                else F.interpolate(found, (rows, columns), mode="bilinear", align_corners=False)
            )
        return torch.cat(maps).flatten(1)

    def _patches(self, images: Tensor) -> Tensor:
        return F.unfold(images, self.patch, stride=self.patch).transpose(1, 2)

    def restore(
        self, visible: Tensor, mask: Tensor, size: tuple[int, int], fill: str | Inpainter | None = None
    ) -> Float[Tensor, "n c h w"]:
        """Whole images (n, c, *size): visible patches exactly as they were, holes filled.

        Args:
            visible, mask: as :meth:`__call__` returned them.
            size: height and width of the images.
            fill: in place of the quantizer's own.
        """
        way = self.fill if fill is None else fill
        n, count = mask.shape
        rows, columns = size[0] // self.patch, size[1] // self.patch
        checks.require(
            rows * columns == count and bool((mask.sum(1) == visible.shape[1]).all()),
            f"mask is {tuple(mask.shape)} with {visible.shape[1]} visible patches, size {size}; they must agree.",
        )
        patches = visible.new_zeros(n, count, visible.shape[2])
        patches[mask] = visible.flatten(0, 1)
        holed = F.fold(patches.transpose(1, 2), size, self.patch, stride=self.patch)
        seen = mask.reshape(n, 1, rows, columns)
        pixels = seen.repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)
        if callable(way):
            filled = way(holed, pixels)
            checks.require(
                isinstance(filled, Tensor) and filled.shape == holed.shape,
                f"fill gave {getattr(filled, 'shape', type(filled).__name__)}; it must give {tuple(holed.shape)}.",
            )
            checks.finite("fill", filled)
        elif checks.one_of("fill", way, FILLS) == "mean":
            filled = (holed.sum((2, 3)) / pixels.sum((2, 3)))[:, :, None, None].expand_as(holed)
        else:
            filled = F.interpolate(
                _smooth(holed, seen, self.patch), size, mode="bilinear", align_corners=False
            )
        return torch.where(pixels, holed, filled)


def _smooth(holed: Tensor, seen: Tensor, patch: int) -> Tensor:
    """Patch means on the grid, holes set to the mean of their known neighbours, from the rim of a hole inwards."""
    grid, known = F.avg_pool2d(holed, patch), seen.to(holed.dtype)
    grid = grid * known
    while not bool(known.all()):
        near = F.avg_pool2d(known, 3, 1, 1)
        around = F.avg_pool2d(grid, 3, 1, 1) / near.clamp_min(1e-12)
        new = (known == 0) & (near > 0)
        grid = torch.where(new, around, grid)
        known = torch.where(new, torch.ones_like(known), known)
    return grid
