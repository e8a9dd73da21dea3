"""Ensembles: many networks trained at once against the same networks one after another.

The loop is plain PyTorch: a module, ``torch.optim.SGD`` and ``backward``. Targets: 32 small MLPs as one batched
program at least 2.5x, small ConvNets in worker processes at least 1.3x on two cores. A second pass of the
processes shows them with the workers already running, as they are for every call after the first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _timer import figure, main, missing, race
from gradmatch.core import _workers
from gradmatch.core.cpu import keep_freed_memory
from gradmatch.core.ensemble import Ensemble, member_seeds, train_ensemble
from gradmatch.core.networks import build
from gradmatch.zoo import convnet

LR, MOMENTUM, DECAY = 0.01, 0.9, 5e-4


def mlp(width_in: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width_in, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def by_hand(
    factory: Callable[[], nn.Module], x: Tensor, y: Tensor, n: int, epochs: int, batch: int
) -> list[nn.Module]:
    """What one writes without the library: one network after another."""
    nets = []
    for k in range(n):
        seeds = member_seeds(0, k)
        net = build(factory, seeds.init)
        order = torch.Generator().manual_seed(seeds.order)
        optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs // 2 + 1], 0.1)
        for _ in range(epochs):
            rows = torch.randperm(len(x), generator=order) if len(x) > batch else torch.arange(len(x))
            for index in rows.split(batch):
                optimizer.zero_grad()
                F.cross_entropy(net(x[index]), y[index]).backward()
                optimizer.step()
            schedule.step()
        nets.append(net.eval())
    return nets


def same(x: Tensor) -> Callable[[Ensemble, list[nn.Module]], None]:
    def check(ensemble: Ensemble, nets: list[nn.Module]) -> None:
        with torch.no_grad():
            want = torch.stack([net(x[:100]) for net in nets])
        gap = float((ensemble.predict(x[:100]) - want).abs().max() / want.abs().max())
        assert gap < 1e-2, f"logits differ by {gap:.1e}"

    return check


def contest(
    name: str,
    factory: Callable[[], nn.Module],
    shape: tuple[int, ...],
    n: int,
    epochs: int,
    batch: int,
    program: str,
    target: float | None,
    rounds: int = 3,
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = torch.arange(len(x)) % 10
    options = {"epochs": epochs, "batch_size": batch, "program": program}
    chosen = []

    def ours() -> Ensemble:
        ensemble = train_ensemble(factory, (x, y), n, **options)
        chosen.append((ensemble.program, ensemble.reason))
        return ensemble

    race(
        f"ensemble {name}, {program}",
        ours,
        lambda: by_hand(factory, x, y, n, epochs, batch),
        peer="torch loop",
        check=same(x),
        target=target,
        rounds=rounds,
        unit="s",
    )
    figure(f"ensemble {name}, {program} ran", program=chosen[0][0], reason=chosen[0][1])


def run() -> None:
    keep_freed_memory()
    small = partial(mlp, 64, 32)
    contest("32 MLPs 64-32-10", small, (1500, 64), 32, 3, 32, "auto", 2.5)
    contest("32 MLPs 196-32-10", partial(mlp, 196, 32), (1000, 196), 32, 3, 32, "auto", 2.0)
    contest("8 MLPs 64-32-10", small, (1500, 64), 8, 3, 32, "auto", 1.0)
    contest("8 MLPs 784-256-10", partial(mlp, 784, 256), (1000, 784), 8, 4, 256, "auto", 1.0)
    nets = partial(convnet, width=32, depth=3)
    if _workers.available() < 2:
        missing("worker processes", "one core")
        return
    contest("4 ConvNet-3 w32, 100 images", nets, (100, 1, 28, 28), 4, 60, 256, "processes", 1.3)
    contest("4 ConvNet-3 w32, 100 images", nets, (100, 1, 28, 28), 4, 60, 256, "auto", 1.0)


if __name__ == "__main__":
    main(run)
