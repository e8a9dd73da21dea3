"""Norms of per-example gradients: 4,096 examples in batches of 256, on an MLP, a small CNN and a ConvNet.

Against a normal forward and backward pass (at most 1.5 times that), opacus (per-example gradients, and its "ghost"
norms, which do not form them for linear layers) and backpack (``BatchL2Grad``, where it knows all layers). All on the
machine's threads as found.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _timer import main, missing, race
from gradmatch.core.cpu import keep_freed_memory
from gradmatch.core.gradients import gradient_norms
from gradmatch.core.problem import Problem
from gradmatch.zoo import convnet, mlp

N, BATCH = 4096, 256
Norms = Callable[[], Tensor]


def small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, 2, 2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1568, 10),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP 784-256-10": partial(mlp, 784, (256,)),
    "CNN of two strided convolutions": small_cnn,
    "ConvNet-3 of width 32": partial(convnet, width=32),
}


def batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


def backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
    for images, labels in batches(x, y):
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()


def opacus(model: nn.Module, x: Tensor, y: Tensor, ghost: bool) -> Norms:
    from opacus.grad_sample import GradSampleModule
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
        GradSampleModuleFastGradientClipping,
    )

    own = copy.deepcopy(model).train()  # it refuses eval mode; nothing here depends on the mode
    if ghost:
        wrapped = GradSampleModuleFastGradientClipping(
            own, loss_reduction="sum", max_grad_norm=1.0, use_ghost_clipping=True
        )
    else:
        wrapped = GradSampleModule(own, loss_reduction="sum")

    def norms() -> Tensor:
        found = []
        for images, labels in batches(x, y):
            wrapped.zero_grad(set_to_none=True)
            F.cross_entropy(wrapped(images), labels, reduction="sum").backward()
            if ghost:
                found.append(wrapped.get_norm_sample().clone())
            else:
                squares = [p.grad_sample.flatten(1).norm(dim=1).square() for p in wrapped.parameters()]
                found.append(torch.stack(squares).sum(0).sqrt())
        return torch.cat(found)

    return norms


def backpack(model: nn.Module, x: Tensor, y: Tensor) -> Norms:
    import backpack as library
    from backpack.extensions import BatchL2Grad

    own = library.extend(copy.deepcopy(model))
    loss = library.extend(nn.CrossEntropyLoss(reduction="sum"))

    def norms() -> Tensor:
        found = []
        for images, labels in batches(x, y):
            own.zero_grad()
            with library.backpack(BatchL2Grad()):
                loss(own(images), labels).backward()
            found.append(sum(p.batch_l2 for p in own.parameters()).sqrt())
        return torch.cat(found)

    return norms


PEERS: dict[str, Callable[[nn.Module, Tensor, Tensor], Norms]] = {
    "opacus GradSampleModule": partial(opacus, ghost=False),
    "opacus ghost norms": partial(opacus, ghost=True),
    "backpack BatchL2Grad": backpack,
}


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def run() -> None:
    keep_freed_memory()
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(N, 1, 28, 28, generator=g), torch.arange(N) % 10
    for name, make in NETWORKS.items():
        torch.manual_seed(0)
        model = make()
        problem = Problem(model, "cross_entropy", (x, y), batch_size=BATCH)
        ours = partial(gradient_norms, problem)
        race(
            name,
            ours,
            partial(backward, copy.deepcopy(model), x, y),
            peer="one forward and backward",
            rounds=7,
            target=1 / 1.5,
        )
        for peer, prepare in PEERS.items():
            try:
                theirs = prepare(model, x, y)
                theirs()
            except Exception as error:  # whatever a peer raises on layers it does not know is the reason
                missing(f"{peer} on {name}", f"{type(error).__name__}: {str(error).splitlines()[0][:100]}")
                continue
            race(name, ours, theirs, peer=peer, rounds=5, check=same, target=2.0)


if __name__ == "__main__":
    main(run)
