"""Unrolled gradients: the constant-memory adjoint against autograd through the loop and against checkpointing.

ConvNet-2 of width 32 on 100 images of 28x28, matching a target after N inner steps. Targets: at most 1.5x the
time of the full unroll, faster than checkpointing and with less memory, and a peak at 64 steps within 10 % of
that at 8 steps once the stored states are taken off.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from _timer import figure, main, peak_mib, race
from gradmatch.core.cpu import keep_freed_memory
from gradmatch.core.networks import build
from gradmatch.core.unroll import UnrolledGradient, unrolled_gradient
from gradmatch.zoo import convnet

IMAGES, STEPS, LR = 100, 10, 0.01


class Task:
    """Trajectory matching on random images: N full-batch steps from one state towards another nearby."""

    def __init__(self) -> None:
        self.net = build(partial(convnet, width=32, depth=2, norm="group"), 0)
        generator = torch.Generator().manual_seed(0)
        self.theta = {k: p.detach() for k, p in self.net.named_parameters()}
        self.inputs = {
            "images": torch.randn(IMAGES, 1, 28, 28, generator=generator),
            "labels": torch.randn(IMAGES, 10, generator=generator).softmax(1),
        }
        self.target = {k: p + 0.01 * torch.randn(p.shape, generator=generator) for k, p in self.theta.items()}
        self.scale = 1 / sum(float((p - self.target[k]).square().sum()) for k, p in self.theta.items())

    def step_loss(self, theta: dict[str, Tensor], i: int, inputs: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(self.net, theta, (inputs["images"],)), inputs["labels"])

    def outer(self, theta: dict[str, Tensor]) -> Tensor:
        return self.scale * sum((theta[k] - self.target[k]).square().sum() for k in theta)

    def run(self, mode: str, steps: int = STEPS, **options: Any) -> UnrolledGradient:
        return unrolled_gradient(
            self.step_loss, self.theta, self.outer, self.inputs, LR, steps, mode, **options
        )


def same(a: UnrolledGradient, b: UnrolledGradient) -> None:
    """Float32 with ReLU: units that flip part the two by about 1e-4 of the norm."""
    assert torch.equal(a.loss, b.loss), f"losses {float(a.loss)} and {float(b.loss)}"
    for k in a.grads:
        gap = float((a.grads[k] - b.grads[k]).norm() / b.grads[k].norm())
        assert gap < 1e-2, f"gradients in {k} differ by {gap:.1e}"
    assert math.isclose(a.lr_grad, b.lr_grad, rel_tol=1e-2), "gradients in lr differ"


def run() -> None:
    keep_freed_memory()
    task = Task()
    options: dict[str, Any] = {"check": same, "rounds": 3, "peak_memory": True, "unit": "s"}
    race(
        "unroll exact",
        lambda: task.run("exact"),
        lambda: task.run("full"),
        peer="full",
        target=1 / 1.5,
        **options,
    )
    race(
        "unroll exact",
        lambda: task.run("exact"),
        lambda: task.run("checkpoint"),
        peer="torch.utils.checkpoint",
        target=1.0,
        **options,
    )
    race(
        "unroll exact, states kept",
        lambda: task.run("exact"),
        lambda: task.run("exact", state_store="recompute"),
        peer="states recomputed",
        **options,
    )
    state = sum(p.numel() * p.element_size() for p in task.theta.values()) / 2**20
    peaks = {steps: peak_mib(lambda n=steps: task.run("exact", n)) for steps in (8, 64)}
    if None not in peaks.values():
        bare = {n: peak - n * state for n, peak in peaks.items()}
        figure(
            "unroll exact peak MiB without states", steps8=bare[8], steps64=bare[64], ratio=bare[64] / bare[8]
        )


if __name__ == "__main__":
    main(run)
