"""ConvNet-D, the network of the dataset-condensation papers.

Depth x [3x3 convolution, normalisation, activation, 2x2 pooling], then one linear layer. As in the public code
of Zhao, Mopuri, Bilen (arXiv 2006.05929), 28x28 images of one channel are padded to 32x32 by the first layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradmatch.core import checks

NORMS = ("instance", "group", "batch", "layer", "none")
ACTIVATIONS = {
    "relu": nn.ReLU,
    "leakyrelu": nn.LeakyReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
}
POOLINGS = ("avg", "max", "none")


def _norm(kind: str, width: int, size: int) -> nn.Module:
    if kind == "instance":
        return nn.GroupNorm(width, width)
    if kind == "group":
        return nn.GroupNorm(4, width)
    if kind == "batch":
        return nn.BatchNorm2d(width)
    return nn.LayerNorm([width, size, size]) if kind == "layer" else nn.Identity()


class ConvNet(nn.Module):
    """Features and a linear head; ``embed(x)`` gives the head's input.

    Shapes: (n, channels, size, size) -> (n, classes). Parameters as :func:`convnet`.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        classes: int,
        width: int,
        depth: int,
        norm: str,
        activation: str,
        pooling: str,
    ) -> None:
        super().__init__()
        checks.one_of("norm", norm, NORMS)
        checks.one_of("activation", activation, tuple(ACTIVATIONS))
        checks.one_of("pooling", pooling, POOLINGS)
        layers: list[nn.Module] = []
        before = channels
        for block in range(depth):
            padding = 3 if block == 0 and size == 28 else 1
            size = size + 2 * padding - 2
            layers += [
                nn.Conv2d(before, width, 3, padding=padding),
                _norm(norm, width, size),
                ACTIVATIONS[activation](),
            ]
            before = width
            if pooling != "none":
                checks.require(size >= 2, f"depth is {depth}; images of this size allow {block} poolings.")
                layers.append(nn.AvgPool2d(2) if pooling == "avg" else nn.MaxPool2d(2))
                size //= 2
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * size * size, classes)

    def embed(self, x: Tensor) -> Tensor:
        """Penultimate features (n, width * side^2)."""
        return torch.flatten(self.features(x), 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.embed(x))
        return logits


def convnet(
    channels: int = 1,
    size: int = 28,
    classes: int = 10,
    width: int = 128,
    depth: int = 3,
    norm: str = "instance",
    activation: str = "relu",
    pooling: str = "avg",
) -> ConvNet:
    """ConvNet-D with the papers' defaults (width 128, depth 3, instance norm, ReLU, average pooling).

    Args:
        channels, size: of the square input images.
        classes: outputs.
        width: channels of every convolution.
        depth: number of blocks.
        norm: "instance" (one group a channel, affine), "group" (four groups), "batch", "layer" or "none".
        activation: "relu", "leakyrelu", "sigmoid", "tanh" or "softplus".
        pooling: "avg", "max" or "none". With "max", second derivatives vanish almost everywhere.

    >>> convnet(width=8)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    for name, value in (
        ("channels", channels),
        ("size", size),
        ("classes", classes),
        ("width", width),
        ("depth", depth),
    ):
        checks.whole(name, value)
    return ConvNet(channels, size, classes, width, depth, norm, activation, pooling)
