"""Gradients through an inner training loop and the memory of their graph, mode against mode."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from gradmatch.core.networks import build
from gradmatch.data import random_subset, train_experts
from gradmatch.data.tesla import TrajectoryGradient, trajectory_grad
from gradmatch.datasets import digits
from gradmatch.evidence._common import standardised
from gradmatch.zoo import convnet, mlp

STEPS, LRS = (5, 20, 50), (0.02, 0.1, 0.5)


def gradient_errors(seed: int) -> dict[str, dict[str, float]]:
    """Relative errors against autograd through the loop, in float64 on ten digits in chunks of four."""
    split = digits()
    train, _ = standardised(split.train, split.test)
    net = build(partial(mlp, 64, (32,), 10, "tanh"), seed).double()
    buffer = train_experts(
        train, partial(mlp, 64, (32,), 10, "tanh"), 1, 2, optimizer="sgd", lr=0.1, seed=seed
    )
    start, target = (buffer.at(0, k).double() for k in (0, 2))
    chosen = random_subset(train, 1, seed)
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for n in STEPS:
        order = [c for _ in range(n) for c in torch.split(torch.randperm(10, generator=generator), 4)][:n]
        batches = [(chosen.images[i].double(), chosen.labels[i]) for i in order]
        for lr in LRS:
            modes = {
                m: trajectory_grad(net, start, target, batches, lr, m) for m in ("full", "exact", "tesla")
            }
            pixels = {m: summed(g, order, chosen.images) for m, g in modes.items()}
            full, rate = pixels["full"], modes["full"].grad_lr
            found[f"{n} steps at rate {lr:g}"] = {
                "exact": max(apart(pixels["exact"], full), apart(modes["exact"].grad_lr, rate)),
                "tesla": apart(pixels["tesla"], full),
                "tesla, rate": apart(modes["tesla"].grad_lr, rate),
                "tesla, cosine": float(
                    torch.cosine_similarity(pixels["tesla"].flatten(), full.flatten(), dim=0)
                ),
            }
    return found


def summed(found: TrajectoryGradient, order: list[Tensor], images: Tensor) -> Tensor:
    """Gradient in every image, added up over the steps it took part in."""
    total = torch.zeros_like(images, dtype=torch.float64)
    for index, grad in zip(order, found.grad_x, strict=True):
        total.index_add_(0, index, grad)
    return total


def apart(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return float((a - b).norm() / b.norm())


def graph_megabytes(mode: str, steps: int, images: int, width: int) -> float:
    """Most megabytes alive at once in saved tensors, for ConvNet-2 on 28 x 28 images."""
    net = build(partial(convnet, width=width, depth=2, norm="group"), 0)
    theta = nn.utils.parameters_to_vector(net.parameters()).detach()
    x = torch.randn(images, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    live = peak = 0

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal live, peak
            self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
            live += self.size
            peak = max(peak, live)

        def __del__(self) -> None:
            nonlocal live
            live -= self.size

    with saved_tensors_hooks(Held, lambda held: held.tensor):
        trajectory_grad(net, theta, theta + 0.01, [(x, torch.arange(images) % 10)] * steps, 0.01, mode)
    return peak / 1e6
