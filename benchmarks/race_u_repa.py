"""U-REPA's token term against REPA's loss, the relation term against its dense form, and what a step pays for both.

REPA is read from the clone that GRADMATCH_PEER_REPA names: its loss class is called with a model that returns tokens at
once, so that only the projection loss is timed.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from _timer import figure, main, missing, race
from gradmatch.core.relational import relation_mismatch, token_cosine
from gradmatch.generate import FeatureAlignment
from gradmatch.zoo import unet

PUBLIC = "GRADMATCH_PEER_REPA"
BATCH, TOKENS, WIDTH = 32, 256, 768


def close(a: Any, b: Any) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.allclose(x, y, rtol=1e-3, atol=1e-7), f"differ by {float((x - y).abs().max()):.2g}"


def token_race(y: torch.Tensor, phi: torch.Tensor) -> None:
    home = os.environ.get(PUBLIC)
    if not home:
        missing("REPA projection loss", f"{PUBLIC} names no clone of it")
        return
    spec = importlib.util.spec_from_file_location("repa_loss", Path(home) / "loss.py")
    assert spec is not None
    assert spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    point = torch.zeros(BATCH, 1, 1, 1)

    def ours() -> tuple[torch.Tensor, ...]:
        x = phi.clone().requires_grad_()
        loss = -token_cosine(x, y).mean()
        return loss.detach(), *torch.autograd.grad(loss, x)

    def theirs() -> tuple[torch.Tensor, ...]:
        x = phi.clone().requires_grad_()
        _, loss = code.SILoss()(lambda z, t: (z, [x]), point, zs=[y])
        return loss.detach(), *torch.autograd.grad(loss, x)

    race(f"token term and gradient, {BATCH} x {TOKENS} x {WIDTH}", ours, theirs, peer="REPA", check=close)


def relation_race(y: torch.Tensor, phi: torch.Tensor, name: str) -> None:
    def ours() -> tuple[torch.Tensor, ...]:
        x = phi.clone().requires_grad_()
        loss = relation_mismatch(x, y).mean()
        return loss.detach(), *torch.autograd.grad(loss, x)

    def theirs() -> tuple[torch.Tensor, ...]:
        x = phi.clone().requires_grad_()
        found = []
        for a, b in zip(F.normalize(x, dim=2), F.normalize(y, dim=2), strict=True):
            found.append((a @ a.T - b @ b.T).square().mean())
        loss = torch.stack(found).mean()
        return loss.detach(), *torch.autograd.grad(loss, x)

    race(
        f"relation term and gradient, {name}",
        ours,
        theirs,
        peer="matrices image by image",
        check=close,
        rounds=3,
    )


def step_overhead() -> None:
    """A training step with and without alignment to cached features, at the width of the middle."""
    torch.manual_seed(0)
    x = torch.randn(32, 1, 32, 32)
    cached = torch.randn(32, 64, 64)

    def stepper(align: bool) -> Any:
        torch.manual_seed(0)
        net = unet(1, 32, 32, levels=3)
        teacher = nn.Conv2d(1, 64, 1).eval().requires_grad_(False)
        extra = (
            FeatureAlignment(net, "network.mid_block", teacher, dim_in=64, dim_out=64, hidden=256)
            if align
            else None
        )
        weights = [*net.parameters(), *(extra.parameters() if extra is not None else ())]
        optimizer = torch.optim.AdamW(weights, lr=1e-4)

        def once() -> None:
            t = torch.rand(len(x))
            noise = torch.randn_like(x)
            wide = t.view(-1, 1, 1, 1)
            loss = F.mse_loss(net((1 - wide) * x + wide * noise, t), noise - x)
            if extra is not None:
                loss = loss + extra.loss(cached)["total"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return once

    found = race("training step of a U-Net at 32 x 32, with alignment", stepper(True), stepper(False), peer="without",
                 rounds=9)  # fmt: skip
    figure("share that alignment adds", percent=100 * (1 / found["ratio"] - 1), target="under 5 %")


def run() -> None:
    g = torch.Generator().manual_seed(0)
    y, phi = (torch.randn(BATCH, TOKENS, WIDTH, generator=g) for _ in range(2))
    token_race(y, phi)
    relation_race(y, phi, f"{BATCH} x {TOKENS} x {WIDTH}")
    many = [v[..., :64].reshape(1, -1, 64)[:, :4096].contiguous() for v in (y, phi)]
    relation_race(*many, "4,096 tokens of width 64 of a whole batch")
    step_overhead()


if __name__ == "__main__":
    main(run)
