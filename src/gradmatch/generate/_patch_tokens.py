"""Frozen vision encoders as teachers: clean images in, patch tokens out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.core import checks

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class PatchTokens(nn.Module):
    """A Hugging Face vision model as a teacher of patch tokens: normalised and resized input, special tokens dropped.

    Args:
        model: called as ``model(pixel_values=x).last_hidden_state`` (n, special + tokens, d); set to eval and frozen.
        size: side of its square input; default the model's own ``config.image_size``.
        skip: leading tokens that are no patches; default the class token and ``config.num_register_tokens``.
        span: (low, high) of the images' values.
        mean, std: of the model's normalisation after values are brought to [0, 1]; ImageNet's by default.

    >>> from transformers import ViTConfig, ViTModel
    >>> small = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
    ...     image_size=8, patch_size=4)
    >>> PatchTokens(ViTModel(small, add_pooling_layer=False))(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 4, 8])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        size: int | None = None,
        *,
        skip: int | None = None,
        span: tuple[float, float] = (-1.0, 1.0),
        mean: Sequence[float] = IMAGENET[0],
        std: Sequence[float] = IMAGENET[1],
    ) -> None:
        super().__init__()
        config: Any = getattr(model, "config", None)
        self.model = model.eval().requires_grad_(False)
        self.size = checks.whole("size", size if size is not None else getattr(config, "image_size", 0))
        self.skip = checks.whole(
            "skip", skip if skip is not None else 1 + getattr(config, "num_register_tokens", 0), 0
        )
        checks.require(span[0] < span[1], f"span is {span}; it must rise.")
        self.span = span
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1))
        self.train(False)

    @property
    def dim(self) -> int:
        """Width of a token."""
        return int(self.model.config.hidden_size)  # type: ignore[union-attr, arg-type]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Patch tokens (n, tokens, d) of clean images (n, 1 or 3, h, w)."""
        x = (images - self.span[0]) / (self.span[1] - self.span[0])
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        found = self.model(pixel_values=((x - self.mean) / self.std).to(next(self.model.parameters()).dtype))
        tokens: Tensor = found.last_hidden_state[:, self.skip :]
        return tokens
