"""The arms of the U-REPA experiment: a small flow in pixels, trained beside a frozen encoder in six ways."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.core.networks import seeded
from gradmatch.core.path import LinearPath
from gradmatch.core.quality import frechet_distance
from gradmatch.core.sampler import Network, Solver
from gradmatch.core.tap import capture, evaluating
from gradmatch.core.training import train
from gradmatch.datasets import fashion_mnist
from gradmatch.evidence._common import halved, hold_out
from gradmatch.evidence._judges import judge
from gradmatch.generate import FeatureAlignment
from gradmatch.zoo import unet

SIDE, WIDTH, TOKEN_WIDTH = 16, 16, 64
MIDDLE, FIRST = "network.mid_block", "network.down_blocks.0"
ARMS: dict[str, dict[str, Any] | None] = {
    "no alignment": None,
    "tokens, first block": {"tap": FIRST, "manifold_weight": 0.0},
    "tokens, middle": {"tap": MIDDLE, "manifold_weight": 0.0},
    "U-REPA": {"tap": MIDDLE},
    "relations alone, middle": {"tap": MIDDLE, "token_weight": 0.0},
    "U-REPA, upsampled before": {"tap": MIDDLE, "upsample": "before"},
}


@lru_cache(maxsize=1)
def images() -> dict[str, Any]:
    """Fashion-MNIST at 14 x 14 padded to 16 x 16, in [-1, 1]: training, held-out and test images with labels."""
    data = fashion_mnist()
    rest, held = hold_out(data.train, 200, 0)
    parts = {"train": rest, "held out": held, "test": data.test}
    return {k: (F.pad(halved(e).x, (1, 1, 1, 1)) * 2 - 1, e.y) for k, e in parts.items()}


class Encoder(nn.Module):
    """Three convolutions, whose 8 x 8 places are the tokens; a stand-in for a large vision model."""

    dim = TOKEN_WIDTH

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1),
            nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, TOKEN_WIDTH, 3, padding=1),
        )  # fmt: skip
        self.head = nn.Linear(TOKEN_WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(x)
        return found

    def logits(self, x: Tensor) -> Tensor:
        """Of the classes."""
        found: Tensor = self.head(F.relu(self.body(x)).mean((2, 3)))
        return found


def encoder(steps: int, seed: int) -> tuple[Encoder, float]:
    """Trained on labels and frozen, with its accuracy on held-out images."""
    (x, y), (held, truth) = images()["train"], images()["held out"]
    with seeded(seed):
        net = Encoder()

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(x), (128,), generator=generator)
        return F.cross_entropy(net.logits(x[index]), y[index])

    train(net, loss, steps, lr=3e-3, schedule="cosine", seed=seed)
    net.eval().requires_grad_(False)
    return net, float((net.logits(held).argmax(1) == truth).double().mean())


def cached(teacher: Encoder) -> Tensor:
    """Its features of all training images (n, 64, width), in half precision."""
    x = images()["train"][0]
    with torch.no_grad():
        return torch.cat([teacher(part).flatten(2).mT.half() for part in torch.split(x, 500)])


def fit(
    teacher: Encoder, cached: Tensor, arm: str, lr: float, steps: int, seed: int, after: Any = None
) -> nn.Module:
    """The flow trained by one arm; cached features, batches of 64."""
    x, path, options = images()["train"][0], LinearPath(), ARMS[arm]
    with seeded(seed):
        net = unet(1, SIDE, WIDTH, levels=3)
    align = None
    if options is not None:
        align = FeatureAlignment(
            net, teacher=teacher, hidden=256, seed=seed, dim_in=_wide(net, options), **options
        )
    both = nn.ModuleList([net] if align is None else [net, align])

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(x), (64,), generator=generator)
        x0 = x[index]
        noise, t = torch.randn(x0.shape, generator=generator), torch.rand(len(x0), generator=generator)
        z, v = path.pair("velocity", x0, noise, t)
        value: Tensor = (net(z, t) - v).square().mean()
        return value if align is None else value + align.loss(cached[index])["total"]

    train(both, loss, steps, lr=lr, clip=1.0, seed=seed, after=after and (lambda k: after(k, net)))
    if align is not None:
        align.remove()
    return net.eval()


def _wide(net: nn.Module, options: dict[str, Any]) -> int:
    return WIDTH if options["tap"] == FIRST else 2 * WIDTH


@torch.no_grad()
def generated(net: nn.Module, n: int, seed: int, steps: int = 10) -> Tensor:
    """Samples by Heun's steps, cut back to 14 x 14."""
    z = torch.randn(n, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(5000 + seed))
    solver = Solver(torch.linspace(1, 0, steps + 1, dtype=torch.float64), "heun")
    parts = [solver.run(Network(net, "velocity"), LinearPath(), p).x for p in torch.split(z, 250)]
    return torch.cat(parts)[..., 1:-1, 1:-1].clamp(-1, 1)


def frechet(x: Tensor, split: str) -> float:
    """Of samples (n, 1, 14, 14) and real images, both enlarged to 28 x 28, in the features of the judge."""
    real = images()[split][0][..., 1:-1, 1:-1]
    return frechet_distance(_judged(x), _judged(real[: min(len(real), 5000)]))


def _judged(x: Tensor) -> Tensor:
    return judge().features(F.interpolate((x + 1) / 2, scale_factor=2, mode="bilinear"))


@torch.no_grad()
def middle(net: nn.Module, split: str, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the middle holds at t = 0.5 for the first images of a split (n, c, 4, 4), the images and their labels."""
    x, y = (v[:n] for v in images()[split])
    generator = torch.Generator().manual_seed(seed)
    z = 0.5 * x + 0.5 * torch.randn(x.shape, generator=generator)
    with evaluating(net), capture(net, MIDDLE) as seen:
        parts = []
        for part in torch.split(z, 500):
            net(part, torch.full((len(part),), 0.5))
            parts.append(seen[MIDDLE])
    return torch.cat(parts), x, y


def probe(net: nn.Module, seed: int, n: int = 4000) -> float:
    """Test accuracy of ridge regression on the pooled middle at t = 0.5."""
    found = {}
    for split in ("train", "test"):
        h, _, y = middle(net, split, n, seed)
        found[split] = (h.mean((2, 3)).double(), y)
    (a, y), (b, truth) = found["train"], found["test"]
    mean, std = a.mean(0), a.std(0) + 1e-6
    a, b = ((v - mean) / std for v in (a, b))
    one_hot = F.one_hot(y, 10).double() - 0.1
    w = torch.linalg.solve(a.T @ a + 1e-2 * len(a) * torch.eye(a.shape[1], dtype=a.dtype), a.T @ one_hot)
    return float(((b @ w).argmax(1) == truth).double().mean())


def relations(net: nn.Module, teacher: Encoder, seed: int) -> float:
    """Mismatch of the raw middle at t = 0.5 with the encoder's relations, on test images."""
    h, x, _ = middle(net, "test", 1000, seed)
    align = FeatureAlignment(net, MIDDLE, teacher, dim_in=h.shape[1], hidden=4)
    align._seen[:] = [h]
    found = float(align.mismatch(x).mean())
    align.remove()
    return found
