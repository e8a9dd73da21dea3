"""Projected per-example gradients: 10,000 examples of a small ConvNet to 2,048 numbers each, on one thread.

The peer is what one writes by hand: ``torch.func.vmap(grad)`` in chunks, every chunk's [m, P] matrix in memory, then a
projection: a dense matrix of random signs kept in memory, the basic projector of ``traker`` (the same, drawn anew each
time), or ours applied to the whole matrix, so that rows can be compared entry by entry. All end with the rows in a
file. Peak memory is what the process took above what it held before; the dense matrix was there before.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from _timer import main, missing, race
from gradmatch.core.cpu import keep_freed_memory, threads
from gradmatch.core.problem import Problem
from gradmatch.core.store import GradientStore
from gradmatch.zoo import convnet

N, FEW, WIDTH, CHUNK = 10_000, 1000, 2048, 256


def small() -> nn.Module:
    """Two convolutions with strides and a linear layer: 20,746 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, 2, 2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1568, 10),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "two strided convolutions": small,
    "ConvNet-3 of width 32": partial(convnet, width=32),
}


def ours(problem: Problem) -> Tensor:
    folder = tempfile.mkdtemp()
    try:
        return GradientStore.build(problem, folder, project=WIDTH)[:]
    finally:
        shutil.rmtree(folder)


def by_hand(model: nn.Module, x: Tensor, y: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
    params = {k: p.detach() for k, p in model.named_parameters()}

    def loss(p: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, p, (image[None],)), label[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))
    rows = []
    for images, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        grads = each(params, images, labels)
        rows.append(project(torch.cat([grads[k].flatten(1) for k in params], 1)))
    with tempfile.NamedTemporaryFile() as file:
        found = torch.cat(rows)
        save_file({"features": found}, file.name)
    return found


def same(a: Tensor, b: Tensor) -> None:
    """Row by row; the few examples for which rounding moves an activation across its kink are let go."""
    error = (a - b).norm(dim=1) / b.norm(dim=1)
    off = float((error > 1e-4).double().mean())
    assert off < 2e-3, f"{off:.1%} of the rows differ"


def same_products(norms: Tensor, a: Tensor, b: Tensor) -> None:
    """Two different projections of the same gradients: products agree to the noise of both."""
    error = ((a[:500] @ a[500:1000].T) - (b[:500] @ b[500:1000].T)) / (norms[:500, None] * norms[500:1000])
    spread = float(error.square().mean().sqrt())
    assert spread < 2 * WIDTH**-0.5 * 2**0.5, f"inner products differ by {spread:.1e} of the norms"


def trak_projector(size: int) -> Callable[[Tensor], Tensor] | None:
    try:
        from trak.projectors import BasicProjector
    except ImportError as error:
        missing("traker BasicProjector", str(error))
        return None
    projector = BasicProjector(size, WIDTH, 0, "rademacher", "cpu")
    return lambda rows: projector.project(rows, model_id=0) * WIDTH**-0.5


def run() -> None:
    keep_freed_memory()
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(N, 1, 28, 28, generator=g), torch.arange(N) % 10
    signs_of = torch.Generator().manual_seed(1)
    for name, make in NETWORKS.items():
        torch.manual_seed(0)
        model = make().eval()
        problem = Problem(model, "cross_entropy", (x, y), batch_size=CHUNK)
        few = Problem(model, "cross_entropy", (x[:FEW], y[:FEW]), batch_size=CHUNK)
        store = GradientStore.build(few, tempfile.mkdtemp(), project=WIDTH)
        sparse, norms = store.projection(), store.norms
        assert sparse is not None
        signs = (torch.randint(2, (problem.space.size, WIDTH), generator=signs_of) * 2 - 1) * WIDTH**-0.5
        title = f"{name}, P = {problem.space.size}, to {WIDTH}"
        with threads(1):
            race(
                f"{N} examples, {title}",
                partial(ours, problem),
                partial(by_hand, model, x, y, lambda rows, signs=signs: rows @ signs),
                peer="vmap, [m, P], dense signs",
                check=partial(same_products, norms),
                rounds=2,
                warmup=0,
                target=2.0,
                unit="s",
                peak_memory=True,
            )
            race(
                f"{N} examples, {title}",
                partial(ours, problem),
                partial(by_hand, model, x, y, sparse),
                peer="vmap, [m, P], our projection",
                check=same,
                rounds=3,
                warmup=0,
                unit="s",
            )
            trak = trak_projector(problem.space.size)
            if trak is not None:
                race(
                    f"{FEW} examples, {title}",
                    partial(ours, few),
                    partial(by_hand, model, x[:FEW], y[:FEW], trak),
                    peer="vmap, [m, P], traker BasicProjector",
                    check=partial(same_products, norms),
                    rounds=1,
                    warmup=0,
                    target=2.0,
                    unit="s",
                )


if __name__ == "__main__":
    main(run)
