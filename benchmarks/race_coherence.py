"""Coherence of 10,000 examples, per layer, from one pass: an MLP and a small CNN, batches of 256.

Against opacus (per-example gradients) and backpack (``BatchL2Grad`` beside the ordinary gradient), from whose norms and
sums the same numbers are computed; and the memory taken for 2,500 and for 10,000 examples. Then winsorised averaging of
50 gradients, against order statistics by ``torch.topk`` and by sorting.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _timer import figure, main, missing, peak_mib, race
from gradmatch.analysis import coherence
from gradmatch.analysis._robust_gradient import winsorised_mean
from gradmatch.core.cpu import keep_freed_memory
from gradmatch.core.problem import Problem
from gradmatch.zoo import mlp

N, BATCH = 10_000, 256


def small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, 2, 2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1568, 10),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP 784-256-10": partial(mlp, 784, (256,)),
    "CNN of two strided convolutions": small_cnn,
}


def ours(problem: Problem) -> Tensor:
    found = coherence(problem, groups="parameter", chunk=BATCH)
    return torch.cat([found.alphas, torch.tensor([found.alpha])])


def alphas(totals: list[Tensor], squares: list[Tensor]) -> Tensor:
    together, own = torch.stack([t.double().square().sum() for t in totals]), torch.stack(squares)
    return torch.cat([together / (N * own), (together.sum() / (N * own.sum()))[None]])


def opacus(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    from opacus.grad_sample import GradSampleModule

    wrapped = GradSampleModule(copy.deepcopy(model).train(), loss_reduction="sum")
    params = list(wrapped.parameters())

    def measure() -> Tensor:
        totals: list[Tensor] = [torch.zeros_like(p) for p in params]
        squares = [torch.zeros((), dtype=torch.float64) for _ in params]
        for images, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
            wrapped.zero_grad(set_to_none=True)
            F.cross_entropy(wrapped(images), labels, reduction="sum").backward()
            for k, p in enumerate(params):
                totals[k] += p.grad_sample.sum(0)
                squares[k] += p.grad_sample.square().sum()
        return alphas(totals, squares)

    return measure


def backpack(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    import backpack as library
    from backpack.extensions import BatchL2Grad

    own = library.extend(copy.deepcopy(model))
    loss = library.extend(nn.CrossEntropyLoss(reduction="sum"))
    params = list(own.parameters())

    def measure() -> Tensor:
        totals: list[Tensor] = [torch.zeros_like(p) for p in params]
        squares = [torch.zeros((), dtype=torch.float64) for _ in params]
        for images, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
            own.zero_grad()
            with library.backpack(BatchL2Grad()):
                loss(own(images), labels).backward()
            for k, p in enumerate(params):
                totals[k] += p.grad
                squares[k] += p.batch_l2.sum()
        return alphas(totals, squares)

    return measure


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)


def by_topk(rows: Tensor, c: int) -> Tensor:
    low, high = (rows.topk(c + 1, 0, largest=k).values[c] for k in (False, True))
    return rows.clamp(low, high).mean(0)


def by_sorting(rows: Tensor, c: int) -> Tensor:
    order = rows.sort(0).values
    return rows.clamp(order[c], order[len(rows) - 1 - c]).mean(0)


def run() -> None:
    keep_freed_memory()
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(N, 1, 28, 28, generator=g), torch.arange(N) % 10
    for name, make in NETWORKS.items():
        torch.manual_seed(0)
        model = make()
        problem = Problem(model, "cross_entropy", (x, y), batch_size=BATCH)
        for peer, prepare in (("opacus GradSampleModule", opacus), ("backpack BatchL2Grad", backpack)):
            try:
                theirs = prepare(model, x, y)
            except ImportError as error:
                missing(peer, str(error))
                continue
            race(
                f"{N} examples, {name}",
                partial(ours, problem),
                theirs,
                peer=peer,
                rounds=3,
                check=same,
                target=2.0,
            )
        few = Problem(model, "cross_entropy", (x[: N // 4], y[: N // 4]), batch_size=BATCH)
        figure(
            f"memory taken, {name}",
            mib_of_2500=peak_mib(partial(ours, few)),
            mib_of_10000=peak_mib(partial(ours, problem)),
        )
    rows = torch.randn(50, 100_000, generator=g)
    for peer, other in (("torch.topk", by_topk), ("torch.sort", by_sorting)):
        race(
            "winsorised mean of 50 x 100,000, c = 2",
            partial(winsorised_mean, rows, 2),
            partial(other, rows, 2),
            peer=peer,
            rounds=3,
            check=partial(torch.testing.assert_close),
            target=2.0,
        )


if __name__ == "__main__":
    main(run)
