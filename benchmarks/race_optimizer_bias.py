"""Shampoo's step on an MLP of three 512 x 512 layers without biases: 20 steps, roots in one or in all of them.

Against ``pytorch_optimizer.Shampoo``, the same formula (roots by singular values, one factor at a time), with which
weights are compared after steps with roots in each; and heavyball's ``KLShampoo``, another variant, for time alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from _timer import main, missing, race
from gradmatch.analysis import Shampoo

WIDTH, LAYERS, STEPS, EPS = 512, 3, 20, 1e-2
Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def weights_and_gradients() -> tuple[list[Tensor], list[list[Tensor]]]:
    g = torch.Generator().manual_seed(0)

    def draw() -> list[Tensor]:
        return [torch.randn(WIDTH, WIDTH, generator=g) / WIDTH**0.5 for _ in range(LAYERS)]

    return draw(), [draw() for _ in range(STEPS)]


WEIGHTS, GRADIENTS = weights_and_gradients()


def trained(make: Make, steps: int = STEPS) -> list[Tensor]:
    params = [torch.nn.Parameter(w.clone()) for w in WEIGHTS]
    optimizer = make(params)
    for grads in GRADIENTS[:steps]:
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach() for p in params]


def ours(every: int, params: Any) -> torch.optim.Optimizer:
    return Shampoo(params, 0.01, eps=EPS, beta=0.0, root_every=every)


def theirs(every: int, params: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import Shampoo as Peer

    return Peer(params, lr=0.01, momentum=0.0, preconditioning_compute_steps=every, matrix_eps=EPS)


def heavy(every: int, params: Any) -> torch.optim.Optimizer:
    import heavyball

    heavyball.utils.compile_mode = None  # no compiler is assumed; ours is not compiled either
    return heavyball.KLShampoo(params, lr=0.01, weight_decay=0.0, precondition_frequency=every)


def same(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y, w in zip(a, b, WEIGHTS, strict=True):
        error = float((x - y).norm() / (x - w).norm())
        assert error < 1e-3, f"steps differ by {error:.1e}"


def run() -> None:
    peers = {"pytorch_optimizer Shampoo": theirs, "heavyball KLShampoo (another variant)": heavy}
    for peer, make in peers.items():
        try:
            trained(partial(make, 1), 1)
        except Exception as error:  # whatever a peer raises when it cannot run here is the reason
            missing(peer, f"{type(error).__name__}: {str(error).splitlines()[0][:100]}")
            continue
        for every, steps in ((STEPS, STEPS), (1, 3)):
            race(
                f"{steps} steps of {LAYERS} x {WIDTH}^2, roots every {every}",
                partial(trained, partial(ours, every), steps),
                partial(trained, partial(make, every), steps),
                peer=peer,
                rounds=3,
                warmup=1,
                check=same if make is theirs and every == 1 else None,
                target=2.0,
            )


if __name__ == "__main__":
    main(run)
