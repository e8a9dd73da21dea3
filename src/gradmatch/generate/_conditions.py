"""What a latent flow may be conditioned on: labels, a mask and the image around it, or a map of classes.

Each turns the user's condition into a mapping of what the network is given beside z and t: "label" (n,) as its third
argument, "concat" (n, c, h, w) as further channels of its input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.core import checks

Ready = dict[str, Tensor]
Encode = Callable[[Tensor], Tensor]


class Condition(nn.Module):
    """None of them: the unconditional flow."""

    dropout = 0.0

    def ready(self, cond: Any, images: Tensor | None, encode: Encode, size: tuple[int, ...]) -> Ready:
        """What the network is given.

        Args:
            cond: the user's condition.
            images: the training images, None when sampling.
            encode: images -> scaled latents.
            size: (h, w) of the latents.
        """
        checks.require(cond is None, "cond is given, but the flow was made without a condition.")
        return {}

    def dropped(self, ready: Ready, generator: torch.Generator) -> Ready:
        """``ready`` with some of it hidden, so that the network also learns to do without."""
        return ready

    def null(self, ready: Ready) -> Ready | None:
        """What means "no condition", or None where the network never learned it."""
        return None


class Labels(Condition):
    """Class labels, hidden at random so that guidance is possible; the null label is ``num_classes``.

    Args:
        num_classes: labels are 0..num_classes-1.
        dropout: share of labels replaced by the null label in training; 0.1 as published.
    """

    def __init__(self, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.num_classes = checks.whole("num_classes", num_classes)
        self.dropout = checks.fraction("dropout", dropout, zero=True, one=False)

    def ready(self, cond: Any, images: Tensor | None, encode: Encode, size: tuple[int, ...]) -> Ready:
        checks.require(cond is not None, "cond is None; the flow needs a label for each image.")
        label = torch.as_tensor(cond)
        checks.require(
            label.ndim == 1 and not label.is_floating_point(),
            f"cond is {label.dtype} of shape {tuple(label.shape)}; labels must be whole numbers (n,).",
        )
        checks.require(
            bool(((label >= 0) & (label <= self.num_classes)).all()),
            f"cond runs from {int(label.min())} to {int(label.max())}; labels must be 0..{self.num_classes - 1}, "
            f"or {self.num_classes} for none.",
        )
        return {"label": label}

    def dropped(self, ready: Ready, generator: torch.Generator) -> Ready:
        label = ready["label"]
        hide = torch.rand(len(label), generator=generator, device=generator.device) < self.dropout
        return {"label": torch.where(hide.to(label.device), self.num_classes, label)}

    def null(self, ready: Ready) -> Ready | None:
        return {"label": torch.full_like(ready["label"], self.num_classes)} if self.dropout > 0 else None


class Inpainting(Condition):
    """A mask (n, 1, H, W), 1 where pixels are to be filled in, and the image around it.

    The network is given the latents of the image with its hole set to 0, and the mask at the latents' size by nearest
    neighbour: 2 c + 1 channels in, c out. The condition is ``{"mask": ...}`` in training, with ``"image"`` in sampling.
    """

    def ready(self, cond: Any, images: Tensor | None, encode: Encode, size: tuple[int, ...]) -> Ready:
        checks.require(
            isinstance(cond, Mapping) and "mask" in cond and (images is not None or "image" in cond),
            "cond must be {'mask': (n, 1, H, W)} in training and {'image': (n, c, H, W), 'mask': ...} in sampling.",
        )
        mask, image = cond["mask"], cond.get("image", images)
        checks.require(
            mask.shape == (len(image), 1, *image.shape[2:]),
            f"mask is of shape {tuple(mask.shape)}; it must be {(len(image), 1, *image.shape[2:])}, as the images.",
        )
        checks.require(
            bool(((mask == 0) | (mask == 1)).all()),
            "mask has values other than 0 and 1; 1 is where to fill in.",
        )
        seen = torch.where(mask.bool(), 0, image)
        small = F.interpolate(mask.to(image), size, mode="nearest")
        return {"concat": torch.cat([encode(seen), small], 1)}


class Layout(Condition):
    """A one-hot map of classes (n, k, H, W), halved to the latents' size, then a 1x1 convolution that is trained along.

    Args:
        classes: k.
        channels: the network is given this many channels of it; 4 as published.
        halvings: bilinear by 0.5 each; 3 as published (for an autoencoder that divides by 8).
    """

    def __init__(self, classes: int, channels: int = 4, halvings: int = 3) -> None:
        super().__init__()
        self.classes, self.halvings = checks.whole("classes", classes), checks.whole("halvings", halvings, 0)
        self.mix = nn.Conv2d(classes, checks.whole("channels", channels), 1)

    def ready(self, cond: Any, images: Tensor | None, encode: Encode, size: tuple[int, ...]) -> Ready:
        checks.require(
            isinstance(cond, Tensor) and cond.ndim == 4 and cond.shape[1] == self.classes,
            f"cond is of shape {tuple(getattr(cond, 'shape', ()))}; it must be a one-hot map "
            f"(n, {self.classes}, H, W).",
        )
        checks.require(
            bool((cond.sum(1) == 1).all()) and bool(((cond == 0) | (cond == 1)).all()),
            "cond is not one-hot; every pixel of the map must have one class.",
        )
        small = cond.to(self.mix.weight)
        for _ in range(self.halvings):
            small = F.interpolate(small, scale_factor=0.5, mode="bilinear", align_corners=False)
        checks.require(
            tuple(small.shape[2:]) == tuple(size),
            f"cond of {tuple(cond.shape[2:])} becomes {tuple(small.shape[2:])} after {self.halvings} halvings; "
            f"the latents are {tuple(size)}.",
        )
        mixed: Tensor = self.mix(small)
        return {"concat": mixed}
