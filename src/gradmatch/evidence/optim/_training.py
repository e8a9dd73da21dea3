"""A plain training loop that optimizer experiments share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from gradmatch.core.examples import Examples
from gradmatch.evidence._common import accuracy

Watch = Callable[[int, Optimizer], object]
"""Called before every step with its number (from 1) and the optimizer."""


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network initialised from ``seed``, the global generator left as found."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def train(
    network: nn.Module,
    optimizer: Optimizer,
    data: Examples,
    epochs: int,
    batch_size: int,
    seed: int,
    watch: Watch | None = None,
) -> None:
    """Cross-entropy over whole batches in an order drawn from ``seed``, learning rates on a cosine to 0.

    An optimizer that takes the loss in a closure gets one.
    """
    closed = "loss closure" in getattr(optimizer, "protocols", ())
    order = torch.Generator().manual_seed(seed)
    batches = max(1, len(data.x) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    network.train()
    for step in range(epochs * batches):
        k = step % batches
        if k == 0:
            shuffled = torch.randperm(len(data.x), generator=order)
        own = shuffled[k * batch_size : (k + 1) * batch_size]

        def loss(own: Tensor = own) -> Tensor:
            return F.cross_entropy(network(data.x[own]), data.y[own])

        optimizer.zero_grad()
        if not closed:
            torch.autograd.backward(loss())
        if watch is not None:
            watch(step + 1, optimizer)
        optimizer.step(loss if closed else None)  # type: ignore[arg-type]
        schedule.step()


def tested(network: nn.Module, data: Examples) -> float:
    """Accuracy on ``data``."""
    network.eval()
    with torch.no_grad():
        logits = torch.cat([network(part) for part in torch.split(data.x, 1000)])
    return accuracy(logits, data.y)


def conv2(side: int, channels: int = 1, width: int = 16, classes: int = 10) -> nn.Sequential:
    """Conv 3x3, BN, ReLU, conv 3x3 of stride 2, BN, ReLU, linear."""
    half = -(-side // 2)
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Flatten(), nn.Linear(width * half * half, classes),
    )  # fmt: skip


def best_by_hold_out(found: dict[Any, list[tuple[float, float]]]) -> Any:
    """The setting with the best mean of the first figures (hold-out accuracy of each seed)."""
    return max(found, key=lambda setting: sum(held for held, _ in found[setting]))
