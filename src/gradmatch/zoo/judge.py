"""A small classifier that only judges generated images: it is never a teacher, an encoder or a guide.

Its weights ship with the package; ``python -m gradmatch.evidence._judges train`` made them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.core.store import load_tensors

WEIGHTS = Path(__file__).parent / "weights" / "fashion_mnist_judge.safetensors"


class JudgeNet(nn.Module):
    """Four convolutions, global pooling to 64 features, a linear head: images (n, 1, h, w) in [0, 1]."""

    def __init__(self, classes: int = 10, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in (
            (1, width, 1),
            (width, width, 2),
            (width, 2 * width, 2),
            (2 * width, 2 * width, 1),
        ):
            layers += [nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(8, after), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(2 * width, classes)

    def embed(self, x: Tensor) -> Tensor:
        """Features (n, 64)."""
        pooled: Tensor = self.body(x).mean((2, 3))
        return pooled

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(x))
        return logits


def fashion_judge(device: torch.device | str = "cpu") -> JudgeNet:
    """The trained judge of Fashion-MNIST, frozen and in eval mode.

    >>> fashion_judge()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    tensors, _ = load_tensors(WEIGHTS, str(device))
    net = JudgeNet().to(device)
    net.load_state_dict(tensors)
    return net.eval().requires_grad_(False)


@torch.no_grad()
def seen(net: JudgeNet, images: Tensor, block: int = 500) -> tuple[Tensor, Tensor]:
    """Features (n, 64) and labels (n,) that the judge sees in images (n, 1, h, w) in [0, 1]."""
    checks.finite("images", images)
    features = torch.cat([net.embed(part) for part in torch.split(images, block)])
    return features, net.head(features).argmax(1)
