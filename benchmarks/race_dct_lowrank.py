"""Low-rank AdamW's step against galore-torch, and against the public DCTAdamW (point ISTA_OPTIMIZERS at a clone).

Rank 128 on eight layers of 512 x 512 and on layers of 1024 x 4096, directions found anew at every step and every 200.
GaLore's update is checked against ours with singular vectors, DCTAdamW's against ours with its basis and scores.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from _optimizers import galore_adamw
from _timer import figure, main, missing, race
from gradmatch.optim import LowRankAdamW, optimizer_state_bytes

LR, RANK, CLONE = 1e-3, 128, "ISTA_OPTIMIZERS"
Params = list[nn.Parameter]
Make = Callable[[Params], torch.optim.Optimizer]


def params_of(count: int, shape: tuple[int, int]) -> Params:
    g = torch.Generator().manual_seed(0)
    found = [nn.Parameter(torch.randn(shape, generator=g)) for _ in range(count)]
    for p in found:
        p.grad = torch.randn(shape, generator=g)
    return found


def ours(**options: Any) -> Make:
    return lambda params: LowRankAdamW(params, LR, RANK, **options)


def galore(gap: int) -> Make:
    kind = galore_adamw()

    def make(params: Params) -> Any:
        group = {"params": params, "rank": RANK, "update_proj_gap": gap, "scale": 1.0, "proj_type": "std"}
        return kind([group], lr=LR, eps=1e-8, no_deprecation_warning=True)

    return make


def dct_adamw(gap: int) -> Make:
    """The public class, without the package's own start, which needs CUDA."""
    root = Path(os.environ.get(CLONE, "")) / "ista_daslab_optimizers"
    if not os.environ.get(CLONE) or not root.is_dir():
        raise ImportError(f"{CLONE} names no check-out of IST-DASLab/ISTA-DASLab-Optimizers")
    for name in ("", ".utils", ".fft_low_rank"):
        package = types.ModuleType(f"ista_daslab_optimizers{name}")
        package.__path__ = [str(root.joinpath(*name.split(".")))]
        sys.modules.setdefault(package.__name__, package)
    kind = importlib.import_module("ista_daslab_optimizers.fft_low_rank.dct_adamw").DCTAdamW
    torch.cuda.empty_cache = lambda: None
    return lambda params: kind(params, LR, 0.0, RANK, "dct", update_proj_gap=gap)


def stepping(make: Make, params: Params, steps: int) -> Callable[[], list[Tensor]]:
    """Steps on the same gradients, which are put back first: DCTAdamW writes into them."""
    optimizer, kept = make(params), [p.grad.clone() for p in params if p.grad is not None]

    def work() -> list[Tensor]:
        for _ in range(steps):
            for p, g in zip(params, kept, strict=True):
                p.grad.copy_(g)  # type: ignore[union-attr]
            optimizer.step()
        return [p.detach() for p in params]

    return work


def same(a: Make, b: Make, shape: tuple[int, int]) -> Callable[[object, object], None]:
    """A check that both move the weights alike in two steps."""

    def check(_: object, __: object) -> None:
        ends = [stepping(make, params_of(1, shape), 2)()[0] for make in (a, b)]
        apart = float((ends[0] - ends[1]).abs().gt(1e-5).float().mean())
        assert apart < 1e-3, f"{apart:.2%} of the weights differ by more than 1e-5"

    return check


def against(
    peer: str, theirs: Callable[[int], Make], equal: dict[str, Any], square_only: bool = False
) -> None:
    cells = [
        ((512, 512), 8, 1, 3),
        ((512, 512), 8, 200, 7),
        ((1024, 4096), 1, 1, 1),
        ((1024, 4096), 4, 200, 5),
    ]
    for shape, count, gap, rounds in cells[: 2 if square_only else 4]:
        try:
            make = theirs(gap)
            their_step = stepping(make, params_of(count, shape), 3)
            their_step()
        except (ImportError, AttributeError, RuntimeError) as error:
            missing(peer, f"{type(error).__name__}: {error}")
            return
        race(
            f"LowRankAdamW, {count} layers of {shape[0]} x {shape[1]}, rank {RANK}, gap {gap}, 3 steps",
            stepping(ours(update_gap=gap, **({} if not square_only else equal)), params_of(count, shape), 3),
            their_step,
            peer=peer,
            rounds=rounds,
            check=same(ours(update_gap=gap, **equal), make, (512, 512)),
            target=2.0 if gap == 1 else 1.0,
        )


def run() -> None:
    against("galore-torch GaLoreAdamW", galore, {"projector": "svd", "rotate": False})
    own = {"basis": "dct3", "select_norm": 1, "rotate": False}
    against("DCTAdamW", dct_adamw, own, square_only=True)
    for name, options in (("columns", {}), ("svd", {"projector": "svd"})):
        params = params_of(1, (1024, 512))
        optimizer = LowRankAdamW(params, LR, RANK, **options)
        optimizer.step()
        figure(f"state of 1024 x 512 at rank {RANK}, {name}", bytes=optimizer_state_bytes(optimizer))


if __name__ == "__main__":
    main(run)
