"""Linear CKA of one pair of layers, 256 x 16,384, against the form with dense centring matrices.

That form (also of the public code of arXiv 2410.20035) builds each Gram matrix for each of the three HSIC terms and
multiplies it by H = I - 1/n from both sides. Three layers against three are a second race: every Gram matrix is
used for all its pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from _timer import main, race
from gradmatch.core.distance import cka_matrix, linear_cka

N, P, LAYERS = 256, 16_384, 3


def hsic(x: Tensor, y: Tensor) -> Tensor:
    h = torch.eye(len(x)) - 1 / len(x)
    return ((h @ (x @ x.T) @ h) * (h @ (y @ y.T) @ h)).sum()


def dense(x: Tensor, y: Tensor) -> Tensor:
    return hsic(x, y) / (hsic(x, x).sqrt() * hsic(y, y).sqrt())


def close(a: Tensor, b: Tensor) -> None:
    gap = float((a - b).abs().max())
    assert gap < 1e-4, f"the values differ by {gap:.2g}"


def run() -> None:
    g = torch.Generator().manual_seed(0)
    shared = torch.randn(N, 64, generator=g)
    layers = [
        (shared @ torch.randn(64, P, generator=g) + torch.randn(N, P, generator=g)).relu()
        for _ in range(2 * LAYERS)
    ]
    first, second = layers[:LAYERS], layers[LAYERS:]
    race(
        f"CKA of one pair, {N} x {P}",
        lambda: linear_cka(layers[0], layers[1]),
        lambda: dense(layers[0], layers[1]),
        peer="dense centring",
        rounds=9,
        check=close,
        target=3.0,
    )
    race(
        f"CKA of {LAYERS} x {LAYERS} pairs, {N} x {P}",
        lambda: cka_matrix(first, second),
        lambda: torch.stack([torch.stack([dense(x, y) for y in second]) for x in first]),
        peer="dense centring",
        rounds=3,
        check=close,
        target=3.0,
    )


if __name__ == "__main__":
    main(run)
