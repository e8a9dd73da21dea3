"""Guidance over 8 pairs of layers, n = 256, 16,384 features: ours against CKA with dense centring, pair by pair.

The peer is the public form (vsubramaniam851/untrainable-networks): Gram matrices of the raw features, centred
by products with H on both sides, and both norms anew for every pair. Both give the loss and its gradient in
the target's features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from _timer import main, missing, race
from gradmatch.adapt import Guidance

N, WIDTH, LAYERS = 256, 16_384, 8


class Taps(nn.Module):
    """Layers whose outputs are given."""

    def __init__(self, features: list[Tensor]) -> None:
        super().__init__()
        self.features = features
        self.layers = nn.ModuleList([nn.Identity() for _ in features])
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        for layer, f in zip(self.layers, self.features, strict=True):
            layer(f)
        return x


def dense(x: Tensor, y: Tensor) -> Tensor:
    n = len(x)
    h = torch.eye(n) - torch.ones(n, n) / n

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        return torch.trace((h @ (a @ a.T) @ h) @ (h @ (b @ b.T) @ h))

    return hsic(x, y) / (hsic(x, x).sqrt() * hsic(y, y).sqrt())


def close(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
    assert abs(float(a[0] - b[0])) < 1e-3, f"losses {float(a[0])} and {float(b[0])}"
    off = float((a[1] - b[1]).abs().max() / b[1].abs().max())
    assert off < 1e-2, f"gradients differ by {off:.1e} of the largest"


def run() -> None:
    missing("vsubramaniam851/untrainable-networks", "not installable; its form of CKA is written out here")
    g = torch.Generator().manual_seed(0)
    mine = [torch.randn(N, WIDTH, generator=g).requires_grad_() for _ in range(LAYERS)]
    other = [torch.randn(N, WIDTH, generator=g) + 0.5 * m.detach() for m in mine]
    target, guide = Taps(mine), Taps(other).eval()
    pairs = [(f"layers.{k}", f"layers.{k}") for k in range(LAYERS)]
    guidance, x = Guidance(target, guide, layer_map=pairs), torch.zeros(N, 1)

    def ours() -> tuple[Tensor, Tensor]:
        with guidance.capture():
            target(x)
            loss = guidance.loss(x)
        return loss.detach(), torch.autograd.grad(loss, mine)[0]

    def theirs() -> tuple[Tensor, Tensor]:
        loss = torch.stack([1 - dense(a, b) for a, b in zip(mine, other, strict=True)]).sum()
        return loss.detach(), torch.autograd.grad(loss, mine)[0]

    race(
        f"{LAYERS} pairs, n={N}, {WIDTH} features",
        ours,
        theirs,
        peer="dense centring",
        rounds=3,
        check=close,
        target=3.0,
    )


if __name__ == "__main__":
    main(run)
