"""Nets that hardly train on Fashion-MNIST, the ConvNets that guide them, and how either is trained."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.adapt import Guidance, calibrate_batch_norm, uniform_map
from gradmatch.core.networks import build, seeded
from gradmatch.datasets import fashion_mnist
from gradmatch.evidence._common import accuracy, halved

TRAIN, HELD, TEST = 6000, 1000, 5000
WIDTH, WIDE, BATCH, GUIDE_EPOCHS = 100, 1024, 256, 4


@lru_cache(maxsize=1)
def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and held-out images (n, 1, 14, 14) with labels, test images with labels; standardised."""
    found = fashion_mnist()
    train, test = halved(found.train), halved(found.test)
    mean, std = train.x[:TRAIN].mean(), train.x[:TRAIN].std()
    own = slice(0, TRAIN + HELD)
    return (train.x[own] - mean) / std, train.y[own], (test.x[:TEST] - mean) / std, test.y[:TEST]


def fcn(depth: int, width: int, dropout: float) -> nn.Sequential:
    """Blocks of Linear, batch-norm, ReLU and dropout, then logits."""
    layers: list[nn.Module] = [nn.Flatten()]
    for k in range(depth):
        layers += [
            nn.Linear(width if k else 196, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Dropout(dropout),
        ]
    return nn.Sequential(*layers, nn.Linear(width, 10))


class Residual(nn.Module):
    """Seven convolutions in three stages with residual sums."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.first = nn.ModuleList(
            [nn.Conv2d(a, b, 3, s, 1) for a, b, s in ((16, 16, 1), (16, 32, 2), (32, 64, 2))]
        )
        self.second = nn.ModuleList([nn.Conv2d(b, b, 3, padding=1) for b in (16, 32, 64)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(b) for b in (16, 32, 64)])
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = F.relu(self.stem(x))
        for first, second, norm in zip(self.first, self.second, self.norms, strict=True):
            h = F.relu(norm(first(x)))
            x = F.relu(h + second(h))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class Identity(nn.Module):
    """A guide to which every example is as far from every other."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """The identity matrix."""
        out: Tensor = self.rows(torch.eye(len(x)))
        return out


@lru_cache(maxsize=8)
def guide(kind: str, count: int, seed: int, epochs: int) -> nn.Module:
    """In eval mode: a ConvNet trained on the first images, one with its statistics measured, or the identity."""
    if kind == "identity":
        return Identity().eval()
    x, y = (part[:count] for part in data()[:2])
    net = build(Residual, seed + 77)
    if kind == "trained":
        fit(net.train(), x, y, 3e-3, seed, epochs)
        return net.eval()
    return calibrate_batch_norm(net, torch.split(x, 500))


def fit(
    net: nn.Module, x: Tensor, y: Tensor, lr: float, seed: int, epochs: int,
    guidance: Guidance | None = None, shuffle: bool = False, soft: Tensor | None = None,
) -> None:  # fmt: skip
    """Adam; with a guide or with soft targets (log probabilities) beside the labels."""
    optimizer, g = torch.optim.Adam(net.parameters(), lr), torch.Generator().manual_seed(seed)
    with seeded(seed):  # of dropout
        for _ in range(epochs):
            for index in torch.split(torch.randperm(len(y), generator=g), BATCH):
                if len(index) < BATCH // 4:
                    continue
                optimizer.zero_grad()
                if guidance is None:
                    out = net(x[index])
                    loss = F.cross_entropy(out, y[index])
                    if soft is not None:
                        loss = loss + F.kl_div(
                            out.log_softmax(1), soft[index], log_target=True, reduction="batchmean"
                        )
                else:
                    at = index[torch.randperm(len(index), generator=g)] if shuffle else index
                    with guidance.capture():
                        loss = F.cross_entropy(net(x[index]), y[index])
                        loss = loss + guidance.loss(x[index], None if guidance._kept is None else at)
                torch.autograd.backward(loss)
                optimizer.step()


def trained(arm: dict[str, Any], count: int, lr: float, seed: int, epochs: int) -> nn.Module:
    """A target, alone or guided, on the first images."""
    x, y = (part[:count] for part in data()[:2])
    wide, kind = bool(arm.get("wide")), arm.get("guide")
    net = build(lambda: fcn(3, WIDE, 0.0) if wide else fcn(arm["depth"], WIDTH, 0.1), seed)
    guidance, soft = None, None
    if arm.get("distil"):
        teacher = guide("trained", count, seed, min(epochs, GUIDE_EPOCHS))
        with torch.no_grad():
            soft = torch.cat([teacher(part) for part in torch.split(x, 500)]).log_softmax(1)
    elif kind is not None:
        names = [n for n, m in net.named_modules() if isinstance(m, nn.Linear)][:-1]
        pairs = [("rows", names[j]) for j in uniform_map(7, len(names))] if kind == "identity" else "uniform"
        guidance = Guidance(
            net, guide(kind, count, seed, min(epochs, GUIDE_EPOCHS)), layer_map=pairs, pool=4,
            distance=arm.get("distance", "cka"), stop_after=arm.get("stop_after"),
        )  # fmt: skip
        if kind != "identity":
            guidance.remember(x)
    fit(net.train(), x, y, lr, seed, epochs, guidance, bool(arm.get("shuffle")), soft)
    return net


@torch.no_grad()
def right(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers in eval mode."""
    return accuracy(net.eval()(x), y)
