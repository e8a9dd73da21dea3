"""TESLA against its released code and against checkpointed MTT: one outer iteration, time and memory.

The peer is a checkout of justincui03/tesla named by ``GRADMATCH_PEER_TESLA``. Its script needs a GPU and an account
for logging, so that its inner iteration is followed here with its own ``ReparamModule`` and ``ConvNet``. Its pixel
gradient is half of the formula's (``2 * autograd.grad(...)`` repeats a tuple), which the check takes into account.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _timer import figure, main, missing, peak_mib, race
from gradmatch.core.cpu import keep_freed_memory
from gradmatch.core.networks import build
from gradmatch.data.tesla import trajectory_grad
from gradmatch.zoo import convnet

IMAGES, STEPS, WIDTH, LR = 10, 50, 64, 0.01
"""CIFAR-10 at one image a class, N = 50, as in the released command; half of its width."""

Gradients = tuple[float, Tensor]


def load(home: Path, name: str, file: str) -> ModuleType:
    """A module of the checkout under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"peer_tesla_{name}", home / file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Iteration:
    """Gradients in the pixels of one segment on random images."""

    def __init__(self, make: Any) -> None:
        self.net = build(make, 0)
        generator = torch.Generator().manual_seed(0)
        self.theta = nn.utils.parameters_to_vector(self.net.parameters()).detach()
        self.target = self.theta + 0.01 * torch.randn(self.theta.shape, generator=generator)
        self.images = torch.randn(IMAGES, 3, 32, 32, generator=generator)
        self.labels = torch.arange(IMAGES) % 10

    def ours(self, unroll: str) -> Gradients:
        batches = [(self.images, self.labels)] * STEPS
        found = trajectory_grad(self.net, self.theta, self.target, batches, LR, unroll)
        return float(found.loss), torch.stack(found.grad_x).sum(0)


class Released(Iteration):
    """The same with the checkout's own network and flat module, following its two passes."""

    def __init__(self, home: Path) -> None:
        networks = load(home, "networks", "networks.py")
        make = functools.partial(
            networks.ConvNet, 3, 10, WIDTH, 3, "relu", "instancenorm", "avgpooling", (32, 32)
        )
        super().__init__(make)
        self.flat = load(home, "reparam", "reparam_module.py").ReparamModule(build(make, 0)).train()

    def theirs(self) -> Gradients:
        images = self.images.clone().requires_grad_()
        params, total = [self.theta.clone().requires_grad_()], torch.zeros_like(self.theta)
        originals, copies, orders = [], [], []
        for _ in range(STEPS):
            order = torch.arange(
                len(images)
            )  # the script permutes; the whole set in any order is the same batch
            orders.append(order)
            originals.append(images[order])
            copies.append(originals[-1].clone())
            loss = F.cross_entropy(self.flat(originals[-1], flat_param=params[-1]), self.labels[order])
            grad = (
                torch.autograd.grad(loss, params[-1], create_graph=True, retain_graph=True)[0]
                .detach()
                .clone()
            )
            params.append(params[-1] - LR * grad)
            total += grad
        gap = F.mse_loss(self.theta, self.target, reduction="sum")
        pixels = torch.zeros_like(self.images)
        for k in range(STEPS):
            loss = F.cross_entropy(self.flat(copies[k], flat_param=params[k]), self.labels[orders[k]])
            grad = torch.autograd.grad(loss, params[k], create_graph=True, retain_graph=True)[0]
            weight = LR * (self.target - self.theta) + LR**2 * total
            pixels[orders[k]] += torch.autograd.grad(weight @ grad / gap, originals[k])[0]
        end = F.mse_loss(params[-1], self.target, reduction="sum") / gap
        return float(end.detach()), 2 * pixels


def same(a: Gradients, b: Gradients) -> None:
    """Float32 through ReLU: units that flip part the two a little."""
    assert abs(a[0] - b[0]) <= 1e-4 * abs(b[0]), f"losses {a[0]} and {b[0]}"
    gap = float((a[1] - b[1]).norm() / b[1].norm())
    assert gap < 1e-2, f"pixel gradients differ by {gap:.1e}"


def run() -> None:
    keep_freed_memory()
    common: dict[str, Any] = {"rounds": 3, "unit": "s", "check": same}
    given = os.environ.get("GRADMATCH_PEER_TESLA")
    if given is not None and (Path(given) / "reparam_module.py").is_file():
        task = Released(Path(given))
        race(
            "tesla iteration, N=50, published estimator",
            lambda: task.ours("tesla"),
            task.theirs,
            peer="justincui03/tesla",
            target=1.0,
            peak_memory=True,
            **common,
        )
        race(
            "tesla iteration, N=50, exact against the released estimator",
            lambda: task.ours("exact"),
            task.theirs,
            peer="justincui03/tesla",
            rounds=3,
            unit="s",
        )
    else:
        missing("justincui03/tesla", "set GRADMATCH_PEER_TESLA to a checkout of justincui03/tesla")
    mtt = Iteration(functools.partial(convnet, 3, 32, width=WIDTH))
    race(
        "tesla exact adjoint, N=50",
        lambda: mtt.ours("exact"),
        lambda: mtt.ours("checkpoint"),
        peer="MTT under torch.utils.checkpoint",
        target=1.0,
        peak_memory=True,
        **common,
    )
    race(
        "tesla exact adjoint, N=50",
        lambda: mtt.ours("exact"),
        lambda: mtt.ours("full"),
        peer="MTT with the whole graph",
        peak_memory=True,
        **common,
    )
    peaks = [peak_mib(functools.partial(mtt.ours, mode)) for mode in ("full", "exact")]
    if None not in peaks:
        figure("tesla memory, whole graph over exact adjoint", ratio=peaks[0] / peaks[1])  # type: ignore[operator]


if __name__ == "__main__":
    main(run)
