"""TrAct against torch-tract (PyPI) and against plain layers: one forward and backward pass, same weight gradient.

The convolution is a CIFAR first layer (128 images of 3 x 32 x 32, 64 channels of 3 x 3); the linear layer a ViT patch
embedding (64 images of 196 patches, 768 -> 384). Against plain layers the figure is the overhead, at most 1.3x for the
convolution. The linear layer has no such target: one triangle of x^T x, b n^2 / 2 products, comes to the 2 b n m of
both passes, with n = 2 m half as many again, before anything else is done.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from _timer import main, missing, race
from gradmatch.optim.tract import tract

LAM = 0.1


def passes(layer: nn.Module, x: Tensor, incoming: Tensor) -> Tensor:
    """The weight gradient of one forward and backward pass."""
    layer.zero_grad()
    layer(x).backward(incoming)
    return layer.weight.grad


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def formula(x: Tensor, incoming: Tensor) -> Tensor:
    """What both must give, in float64, for a linear layer."""
    rows, into = x.flatten(0, -2).double(), incoming.flatten(0, -2).double()
    moment = rows.T @ rows / len(rows) + LAM * torch.eye(rows.shape[1], dtype=rows.dtype)
    return torch.linalg.solve(moment, rows.T @ into).T.float()


def race_layer(
    name: str, plain: nn.Module, x: Tensor, peer: Callable[[], nn.Module], overhead: float | None
) -> None:
    """Against the peer's layer, then against the plain one."""
    incoming = torch.randn(plain(x).shape, generator=torch.Generator().manual_seed(1))
    ours = partial(passes, tract(plain, LAM), x, incoming)
    if isinstance(plain, nn.Linear):
        close(ours(), formula(x, incoming))
    try:
        theirs = peer()
        theirs.load_state_dict(plain.state_dict())
        race(
            name,
            ours,
            partial(passes, theirs, x, incoming),
            peer="torch-tract",
            rounds=9,
            check=close,
            target=1.0,
        )
    except ImportError as error:
        missing("torch-tract", str(error))
    bare = partial(passes, plain, x, incoming)
    target = None if overhead is None else 1 / overhead
    race(f"{name}, overhead", ours, bare, peer="plain layer", rounds=9, target=target)


def their_conv() -> nn.Module:
    from torch_tract import TrActConv2d

    return TrActConv2d(3, 64, 3, padding=1, lambda_=LAM)


def their_linear() -> nn.Module:
    from torch_tract import TrActLinear

    return TrActLinear(768, 384, lambda_=LAM)


def run() -> None:
    g = torch.Generator().manual_seed(0)
    race_layer(
        "conv 3x3x3 -> 64",
        nn.Conv2d(3, 64, 3, padding=1),
        torch.randn(128, 3, 32, 32, generator=g),
        their_conv,
        1.3,
    )
    x = torch.randn(64, 196, 768, generator=g)
    race_layer("linear 768 -> 384", nn.Linear(768, 384), x, their_linear, None)


if __name__ == "__main__":
    main(run)
