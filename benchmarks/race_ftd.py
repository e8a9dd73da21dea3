"""FTD against its released code: one outer iteration, one GSAM step, and a group of GSAM experts.

The peer is a checkout of AngusDujw/FTD-distillation named by ``GRADMATCH_PEER_FTD``. Its script needs a GPU and an
account for logging, so that its inner iteration is followed line by line here with its own ``ReparamModule``,
``ConvNet`` and ``GSAM``. Both sides compute the same numbers, which is checked.
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

from _timer import main, missing, race
from gradmatch.core.cpu import keep_freed_memory
from gradmatch.core.networks import build
from gradmatch.data import GSAM, train_experts
from gradmatch.data.tesla import trajectory_grad
from gradmatch.zoo import mlp

IMAGES, STEPS, WIDTH, BATCH, LR = 100, 30, 32, 256, 0.01
"""CIFAR-10 at ten images a class, N = 30; the width is a quarter of the paper's, to fit a laptop's memory in full."""


def load(home: Path, name: str, file: str) -> ModuleType:
    """A module of the checkout under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"peer_ftd_{name}", home / file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Iteration:
    """The outer iteration of MTT and FTD on random images: gradients in the pixels and in the rate."""

    def __init__(self, home: Path) -> None:
        networks, reparam = load(home, "networks", "networks.py"), load(home, "reparam", "reparam_module.py")
        make = functools.partial(
            networks.ConvNet, 3, 10, WIDTH, 3, "relu", "instancenorm", "avgpooling", (32, 32)
        )
        self.net = build(make, 0)
        self.theirs_net = reparam.ReparamModule(build(make, 0)).train()
        generator = torch.Generator().manual_seed(0)
        self.theta = nn.utils.parameters_to_vector(self.net.parameters()).detach()
        self.target = self.theta + 0.01 * torch.randn(self.theta.shape, generator=generator)
        self.images = torch.randn(IMAGES, 3, 32, 32, generator=generator)
        self.labels = torch.arange(10).repeat_interleave(IMAGES // 10)

    def ours(self, unroll: str) -> tuple[float, Tensor, float]:
        x = self.images.clone()
        found = trajectory_grad(
            self.net, self.theta, self.target, [(x, self.labels)] * STEPS, LR, unroll, loss=F.cross_entropy
        )
        return float(found.loss), torch.stack(found.grad_x).sum(0), float(found.grad_lr)

    def theirs(self) -> tuple[float, Tensor, float]:
        x, rate = self.images.clone().requires_grad_(), torch.tensor(LR, requires_grad=True)
        params = [self.theta.clone().requires_grad_()]
        for _ in range(STEPS):
            order = torch.arange(len(x))  # the script permutes; the whole set in any order is the same batch
            loss = F.cross_entropy(self.theirs_net(x[order], flat_param=params[-1]), self.labels[order])
            grad = torch.autograd.grad(loss, params[-1], create_graph=True)[0]
            params.append(params[-1] - rate * grad)
        distance = F.mse_loss(params[-1], self.target, reduction="sum") / len(self.theta)
        distance = distance / (F.mse_loss(self.theta, self.target, reduction="sum") / len(self.theta))
        distance.backward()
        assert x.grad is not None
        assert rate.grad is not None
        return float(distance.detach()), x.grad, float(rate.grad)


def same(a: tuple[float, Tensor, float], b: tuple[float, Tensor, float]) -> None:
    """Float32 through ReLU: units that flip part the two a little."""
    assert abs(a[0] - b[0]) <= 1e-4 * abs(b[0]), f"losses {a[0]} and {b[0]}"
    gap = float((a[1] - b[1]).norm() / b[1].norm())
    assert gap < 1e-2, f"pixel gradients differ by {gap:.1e}"
    assert abs(a[2] - b[2]) <= 1e-2 * abs(b[2]), f"rate gradients {a[2]} and {b[2]}"


class Step:
    """Three steps of GSAM (rho 0.01, adaptive, alpha 0.3) on one batch of ConvNet-3."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.networks = load(home, "networks", "networks.py")
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(BATCH, 3, 32, 32, generator=generator)
        self.y = torch.randint(10, (BATCH,), generator=generator)

    def net(self) -> nn.Module:
        make = functools.partial(
            self.networks.ConvNet, 3, 10, WIDTH, 3, "relu", "instancenorm", "avgpooling", (32, 32)
        )
        return build(make, 0)

    def ours(self, steps: int = 3) -> Tensor:
        net = self.net()
        optimizer = GSAM(net.parameters(), torch.optim.SGD(net.parameters(), lr=LR), rho=0.01, alpha=0.3)
        for _ in range(steps):
            optimizer.step(lambda: F.cross_entropy(net(self.x), self.y))
        return nn.utils.parameters_to_vector(net.parameters()).detach()

    def theirs(self, steps: int = 3) -> Tensor:
        return released_gsam(self.home, self.net(), [(self.x, self.y)] * steps, LR)


class Constant:
    """The released scheduler's interface, at one value."""

    def step(self) -> float:
        return 0.01


@functools.cache
def released(home: Path) -> Any:
    """The checkout's GSAM class."""
    sys.path.insert(0, str(home / "buffer"))
    try:
        from gsam import GSAM as Released  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(home / "buffer"))
    return Released


def released_gsam(home: Path, net: nn.Module, batches: list[tuple[Tensor, Tensor]], lr: float) -> Tensor:
    """Parameters after the released optimiser's steps on the batches."""
    base = torch.optim.SGD(net.parameters(), lr=lr)
    optimizer = released(home)(net.parameters(), base, net, 0.3, Constant(), adaptive=True)
    for x, y in batches:
        optimizer.set_closure(F.cross_entropy, x, y)
        optimizer.step()
    return nn.utils.parameters_to_vector(net.parameters()).detach()


class Experts:
    """300 GSAM steps of ten experts, MLP 196-32-10 on a batch of 32: one batched program against one by one."""

    def __init__(self, home: Path) -> None:
        self.home = home
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(32, 196, generator=generator), torch.arange(32) % 10
        self.make = functools.partial(mlp, 196, (32,), 10, "tanh")

    def ours(self) -> Tensor:
        options: dict[str, Any] = {
            "optimizer": "gsam",
            "rho": 0.01,
            "alpha": 0.3,
            "lr": 0.1,
            "batch_size": 32,
        }
        found = train_experts((self.x, self.y), self.make, 10, 300, standardise=False, **options)
        self.starts = found.tensor[:, 0]
        return found.tensor[:, -1]

    def theirs(self) -> Tensor:
        ends = []
        for start in self.starts:
            net = self.make()
            nn.utils.vector_to_parameters(start.clone(), net.parameters())
            ends.append(released_gsam(self.home, net, [(self.x, self.y)] * 300, 0.1))
        return torch.stack(ends)


def close(tolerance: float) -> Any:
    """Whether two vectors of parameters agree to a relative norm."""

    def check(a: Tensor, b: Tensor) -> None:
        gap = float((a - b).norm() / b.norm())
        assert gap < tolerance, f"parameters differ by {gap:.1e}"

    return check


def run() -> None:
    keep_freed_memory()
    given = os.environ.get("GRADMATCH_PEER_FTD")
    if given is None or not (Path(given) / "buffer" / "gsam").is_dir():
        missing("FTD-distillation", "set GRADMATCH_PEER_FTD to a checkout of AngusDujw/FTD-distillation")
        return
    home = Path(given)
    iteration = Iteration(home)
    common: dict[str, Any] = {"peer": "FTD-distillation", "rounds": 3, "unit": "s"}
    race(
        "ftd iteration, N=30, full",
        lambda: iteration.ours("full"),
        iteration.theirs,
        check=same,
        target=1.0,
        **common,
    )
    race(
        "ftd iteration, N=30, exact adjoint",
        lambda: iteration.ours("exact"),
        iteration.theirs,
        check=same,
        peak_memory=True,
        **common,
    )
    step = Step(home)
    race("ftd GSAM step, batch 256", step.ours, step.theirs, check=close(1e-4), target=1.0, **common)
    experts = Experts(home)
    race("ftd ten experts at once", experts.ours, experts.theirs, check=close(1e-3), target=2.0, **common)


if __name__ == "__main__":
    main(run)
