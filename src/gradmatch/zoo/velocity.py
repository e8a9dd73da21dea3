"""Small networks of (x, t, label) for flows and diffusion: an MLP, and diffusers' own U-Net and transformer.

Each is called as ``network(x, t)`` or ``network(x, t, label)`` with x (n, ...), t (n,) and labels (n,), and gives a
tensor of the shape of x (of ``channels``). Without a label, a network of classes takes its null label, ``classes``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.core import checks


class MLPVelocity(nn.Module):
    """Residual-free SiLU layers over [x, Fourier features of t, label embedding]; see :func:`mlp_velocity`."""

    def __init__(self, dim: int, hidden: Sequence[int], classes: int | None, frequencies: int) -> None:
        super().__init__()
        self.classes = classes
        self.frequencies: Tensor
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(frequencies) / 2)
        extra = 2 * frequencies + (hidden[0] if classes else 0)
        self.label = nn.Embedding(classes + 1, hidden[0]) if classes else None
        widths, layers = [dim + extra, *hidden], list[nn.Module]()
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Linear(widths[-1], dim))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        angles = t.to(x).reshape(-1, 1).expand(len(x), 1) * self.frequencies.to(x)
        parts = [x.flatten(1), angles.sin(), angles.cos()]
        if self.label is not None:
            parts.append(self.label(_labels(label, len(x), self.classes, x.device)))
        out: Tensor = self.body(torch.cat(parts, 1))
        return out.reshape(x.shape)


class _Padded(nn.Module):
    """A diffusers network on images of any size: padded to a whole number of its cells, cropped after."""

    def __init__(self, network: nn.Module, classes: int | None, cell: int, scale: float) -> None:
        super().__init__()
        self.network, self.classes, self.cell, self.scale = network, classes, cell, scale

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        high, wide = x.shape[-2:]
        padded = F.pad(x, (0, -wide % self.cell, 0, -high % self.cell))
        t = t.to(x).expand(len(x)) * self.scale
        labels: dict[str, Tensor] = {}
        if self.classes is not None:
            labels = {"class_labels": _labels(label, len(x), self.classes, x.device)}
        out: Tensor = self.network(padded, t, **labels).sample
        return out[..., :high, :wide]


def _labels(label: Tensor | None, n: int, classes: int | None, device: torch.device) -> Tensor:
    if label is None:
        return torch.full((n,), classes or 0, device=device)
    return label.to(device).expand(n)


def mlp_velocity(
    dim: int, hidden: Sequence[int] = (256, 256, 256), classes: int | None = None, frequencies: int = 6
) -> MLPVelocity:
    """An MLP on flattened x.

    Args:
        dim: entries of one x.
        hidden: widths, SiLU between.
        classes: number of labels, or None for none.
        frequencies: pairs of sine and cosine of t, at pi/2, pi, 2 pi, ...; t is taken to lie in [0, 1].

    >>> mlp_velocity(2, (8, 8))(torch.zeros(3, 2), torch.zeros(3)).shape
    torch.Size([3, 2])
    """
    checks.whole("dim", dim)
    widths = [checks.whole("hidden", h) for h in hidden]
    checks.require(bool(widths), "hidden is empty; at least one layer is needed.")
    return MLPVelocity(
        dim, widths, None if classes is None else checks.whole("classes", classes), frequencies
    )


def unet(
    channels: int = 1,
    size: int = 28,
    width: int = 32,
    levels: int = 2,
    blocks: int = 1,
    classes: int | None = None,
    in_channels: int | None = None,
    attention: bool = False,
    scale: float = 100.0,
) -> nn.Module:
    """A small ``diffusers.UNet2DModel``.

    Args:
        channels: of the output.
        size: of the square images; padded inside to a multiple of 2^(levels - 1).
        width: channels of the first level, a multiple of 8; deeper levels have twice as many.
        levels: resolutions.
        blocks: residual blocks a level.
        classes: number of labels, or None for none.
        in_channels: where more channels come in than go out (a condition beside x); default ``channels``.
        attention: in the lowest level.
        scale: t in [0, 1] is multiplied by this before it is embedded. At 1000, as in diffusion models, the field is
            rough in t: dopri5 takes 360 calls at 1e-5 where it takes 100 at the default of 100.

    >>> unet(4, 7, 16, levels=1)(torch.zeros(2, 4, 7, 7), torch.zeros(2)).shape
    torch.Size([2, 4, 7, 7])
    """
    import diffusers

    checks.require(width % 8 == 0, f"width is {width}; it must be a multiple of 8.")
    cell = 2 ** (checks.whole("levels", levels) - 1)
    low = "Attn" if attention else ""
    make: Any = diffusers.UNet2DModel
    network = make(
        sample_size=size + -size % cell,
        in_channels=channels if in_channels is None else in_channels,
        out_channels=channels,
        layers_per_block=blocks,
        block_out_channels=tuple(width * min(2, 1 + k) for k in range(levels)),
        down_block_types=("DownBlock2D",) * (levels - 1) + (f"{low}DownBlock2D",),
        up_block_types=(f"{low}UpBlock2D",) + ("UpBlock2D",) * (levels - 1),
        norm_num_groups=8,
        attention_head_dim=8,
        add_attention=attention,
        num_class_embeds=None if classes is None else classes + 1,
    )
    return _Padded(network, classes, cell, scale)


def dit(
    channels: int = 1,
    size: int = 28,
    width: int = 64,
    depth: int = 4,
    heads: int = 4,
    patch: int = 2,
    classes: int | None = None,
    in_channels: int | None = None,
    scale: float = 100.0,
) -> nn.Module:
    """A small ``diffusers.DiTTransformer2DModel``; arguments as :func:`unet`, ``depth`` blocks of ``heads`` heads.

    diffusers drops labels at random inside the network; here the trainer does, with its own generator.

    >>> dit(1, 8, 16, depth=1, heads=2)(torch.zeros(2, 1, 8, 8), torch.zeros(2)).shape
    torch.Size([2, 1, 8, 8])
    """
    import diffusers

    checks.require(width % heads == 0, f"width is {width}; it must be a multiple of heads, {heads}.")
    make: Any = diffusers.DiTTransformer2DModel
    network = make(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=channels if in_channels is None else in_channels,
        out_channels=channels,
        num_layers=depth,
        sample_size=size + -size % patch,
        patch_size=patch,
        num_embeds_ada_norm=classes or 1,
        norm_num_groups=1,
    )
    for block in network.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return _Padded(network, classes if classes else 1, patch, scale)
