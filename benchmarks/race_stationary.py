"""Compatibility of ten checkpoints: every model embeds once, against a loop that embeds anew for every pair of them.

The loop is how the released evaluation goes (gallery by model j, queries by model i, for each j <= i). That code asks
for torchvision and its own data sets and cannot be installed here, so the loop is written anew. The same matrix must
come out. Then the higher-order compatibility loss of a batch, with its gradient, against a loop over its images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from _timer import main, missing, race
from gradmatch.embed import CompatibleModel, StationaryHead, compatibility_matrix, hoc_loss

MODELS, IMAGES, IDENTITIES = 10, 1000, 10


def checkpoints() -> list[CompatibleModel]:
    torch.manual_seed(0)
    return [
        CompatibleModel(
            nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
                nn.MaxPool2d(2), nn.Flatten(),
            ),
            StationaryHead(32 * 9, 64),
        ).eval()
        for _ in range(MODELS)
    ]  # fmt: skip


@torch.no_grad()
def anew(
    models: list[CompatibleModel], query: tuple[Tensor, Tensor], gallery: tuple[Tensor, Tensor]
) -> Tensor:
    def features(model: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([F.normalize(model(part)) for part in x.split(500)])

    found = torch.full((MODELS, MODELS), torch.nan, dtype=torch.float64)
    for i, new in enumerate(models):
        for j, old in enumerate(models[: i + 1]):
            kept, asked = features(old, gallery[0]), features(new, query[0])
            templates = F.normalize(torch.stack([kept[gallery[1] == c].mean(0) for c in range(IDENTITIES)]))
            found[i, j] = ((asked @ templates.T).argmax(1) == query[1]).double().mean()
    return found


def same(a: Tensor, b: Tensor) -> None:
    assert torch.allclose(a, b, atol=1e-6, equal_nan=True), (
        f"matrices differ by {(a - b).abs().nan_to_num().max()}"
    )


def one_by_one(new: Tensor, old: Tensor, y: Tensor) -> Tensor:
    z, o = F.normalize(new), F.normalize(old)
    total = new.new_zeros(())
    for i in range(len(y)):
        s = 10 * (z @ o[i])
        total = total - s[i] + torch.logsumexp(s[y != y[i]], 0)
    return total / len(y)


def gradient(loss: Callable[[Tensor, Tensor, Tensor], Tensor], new: Tensor, old: Tensor, y: Tensor) -> Tensor:
    x = new.clone().requires_grad_()
    return torch.autograd.grad(loss(x, old, y), x)[0]


def close(a: Tensor, b: Tensor) -> None:
    assert torch.allclose(a, b, atol=1e-6), f"gradients differ by {(a - b).abs().max()}"


def run() -> None:
    models, g = checkpoints(), torch.Generator().manual_seed(0)
    x, y = torch.rand(2 * IMAGES, 1, 14, 14, generator=g), torch.arange(2 * IMAGES) % IDENTITIES
    query, gallery = (x[:IMAGES], y[:IMAGES]), (x[IMAGES:], y[IMAGES:])
    race(
        f"compatibility of {MODELS} checkpoints, {IMAGES} + {IMAGES} images",
        lambda: compatibility_matrix(models, query, gallery),
        lambda: anew(models, query, gallery),
        peer="embedding anew for every pair",
        rounds=3,
        check=same,
        target=2.0,
        unit="s",
    )
    new, old = (torch.randn(128, 1023, generator=g) for _ in range(2))
    labels = torch.arange(128) % 10
    race(
        "loss of a batch of 128, with its gradient",
        lambda: gradient(hoc_loss, new, old, labels),
        lambda: gradient(one_by_one, new, old, labels),
        peer="image by image",
        check=close,
        target=2.0,
    )
    missing("miccunifi/iamcl2r", "its evaluation asks for torchvision and its own data sets")


if __name__ == "__main__":
    main(run)
