"""AdaHessian's training step against pytorch_optimizer's and torch_optimizer's, and against a plain forward-backward.

The network is the experiment's, conv-BN-ReLU twice and a linear layer, on 125 digits. That both compute the same is
checked with the same signs; then each draws its own.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from _timer import figure, main, missing, race
from gradmatch.core import hutchinson
from gradmatch.datasets import digits
from gradmatch.evidence.optim._training import conv2, seeded
from gradmatch.optim import AdaHessian

LR, EPS, STEPS = 0.01, 1e-4, 5
Step = Callable[[], object]


def batch() -> tuple[Tensor, Tensor]:
    found = digits().train
    return found.x[:125], found.y[:125]


def network() -> nn.Module:
    return seeded(lambda: conv2(8), 0)


def ours(net: nn.Module, **options: Any) -> Step:
    x, y = batch()
    optimizer = AdaHessian(net.parameters(), LR, eps=EPS, **options)
    return lambda: optimizer.step(lambda: F.cross_entropy(net(x), y))


def theirs(package: str, name: str, net: nn.Module, **options: Any) -> Step:
    x, y = batch()
    kind = getattr(importlib.import_module(package), name)
    optimizer = kind(net.parameters(), lr=LR, betas=(0.9, 0.999), eps=EPS, hessian_power=1.0, **options)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward(create_graph=True)
        optimizer.step()

    return step


def plain(net: nn.Module) -> Step:
    x, y = batch()

    def step() -> None:
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()

    return step


def repeated(step: Step, count: int = STEPS) -> Step:
    def work() -> None:
        for _ in range(count):
            step()

    return work


def global_signs(tensors: Any, generator: torch.Generator) -> list[Tensor]:
    """Signs as the peers draw them, from the global generator."""
    return [2.0 * torch.randint_like(t, 0, 2) - 1.0 for t in tensors]


def same(package: str, name: str, **options: Any) -> Callable[[object, object], None]:
    """A check that three steps from the same weights with the same signs end alike."""

    def check(_: object, __: object) -> None:
        ends = []
        for make in (lambda net: ours(net, **options), lambda net: theirs(package, name, net)):
            net = network()
            step = make(net)
            torch.manual_seed(0)
            with patch.object(hutchinson, "signs_like", global_signs):
                repeated(step, 3)()
            ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
        worst = float((ends[0] - ends[1]).abs().max())
        assert worst < 1e-4, f"weights differ by {worst:.2g} after three steps of the same signs"

    return check


def flat_memory() -> None:
    """Tensors alive after 5 and after 500 steps."""
    step, counts = ours(network()), []
    for k in range(500):
        step()
        if k in (4, 499):
            gc.collect()
            counts.append(sum(type(o) in (Tensor, nn.Parameter) for o in gc.get_objects()))
    figure(
        "AdaHessian, 500 steps",
        tensors_after_5=counts[0],
        tensors_after_500=counts[1],
        met=counts[0] == counts[1],
    )


def run() -> None:
    name = f"AdaHessian, {STEPS} training steps of a small conv net"
    peers = (
        ("pytorch_optimizer", "AdaHessian", {"block": None}),
        ("torch_optimizer", "Adahessian", {}),
    )
    for package, kind, options in peers:
        try:
            step = theirs(package, kind, network())
        except ImportError as error:
            missing(f"{package} {kind}", str(error))
            continue
        for every in (1, 5):
            race(
                name if every == 1 else f"{name}, curvature every {every}",
                repeated(ours(network(), hessian_every=every, **options)),
                repeated(step),
                peer=f"{package} {kind}",
                rounds=15,
                check=same(package, kind, **options),
                target=1.25,
            )
    for every in (1, 5):
        race(
            f"{name}, curvature every {every}",
            repeated(ours(network(), hessian_every=every)),
            repeated(plain(network())),
            peer="forward and backward alone",
            rounds=15,
            target=1 / 3.2,
        )
    flat_memory()


if __name__ == "__main__":
    main(run)
