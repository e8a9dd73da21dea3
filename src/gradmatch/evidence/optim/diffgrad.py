"""diffGrad against Adam at the same and at half the learning rate, and against the paper's other baselines.

1. The paper's three functions of one variable from x = -1, 300 steps, b1 0.95: which minimum each method ends in, with
   diffGrad at twice its rate and Adam at half of its own and with b1 0.9 among the columns.
2. Two sets of images (digits; Fashion-MNIST averaged to 14 x 14), a small convolutional network, batches of 32 and 128,
   cosine schedule. Every optimizer has a grid of five rates; Adam is run at half of each of its rates too. A part of
   the training rows is held out; the rates reported as best are those of the best mean accuracy on it.
3. The friction itself: its median and 95 % quantile at steps 2, 11 and 100.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.core.examples import Examples
from gradmatch.datasets import digits, fashion_mnist
from gradmatch.evidence._common import (
    Result,
    Row,
    Settings,
    gain,
    halved,
    hold_out,
    kept,
    parallel,
    per_class,
    verdict_of,
)
from gradmatch.evidence.optim._training import best_by_hold_out, conv2, seeded, tested, train
from gradmatch.optim import DiffGrad

SLUG = "diffgrad"
TITLE = "diffGrad: friction from the change of the gradient"
CLAIM = (
    "Scaling Adam's step by a friction in [0.5, 1) that grows with the change of the gradient finds global minima that "
    "Adam overshoots, and trains convolutional networks better than Adam and other optimizers."
)
RULE = (
    "On the functions F1 and F2: (1) diffGrad at lr 0.1 ends in the global minimum where Adam at 0.1 does not; (2) "
    "Adam at 0.05, the same step where the gradient rests, does not end there either. On images, over the four cells "
    "of digits and Fashion-MNIST x batch 32 and 128, where a difference counts if it exceeds two standard errors "
    "paired by seed: (3) at equal rate diffGrad is above Adam, averaged over all cells and rates, as published; (4) it "
    "is above Adam at half the rate, likewise; (5) each at its best rate, diffGrad is above Adam in every cell; (6) "
    "each at its best rate and averaged over the cells, diffGrad is above every one of SGD with momentum, RMSProp, "
    "AMSGrad and Adam. 'holds' if all six are met, 'holds in part' if some are, 'does not hold' if none is."
)

RATES = (1e-3, 3e-3, 1e-2, 2e-2, 4e-2)
SGD_RATES = (5e-3, 1.5e-2, 5e-2, 1e-1, 2e-1)
BATCHES = (32, 128)
DATA = ("digits", "Fashion-MNIST")
EPOCHS = {"digits": 10, "Fashion-MNIST": 4}
OURS, ADAM, HALF = "diffGrad", "Adam", "Adam at lr/2"
Params = Any
MAKE: dict[str, Callable[[Params, float], torch.optim.Optimizer]] = {
    "SGD with momentum": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
    "RMSProp": lambda p, lr: torch.optim.RMSprop(p, lr),
    "AMSGrad": lambda p, lr: torch.optim.Adam(p, lr, amsgrad=True),
    ADAM: lambda p, lr: torch.optim.Adam(p, lr),
    HALF: lambda p, lr: torch.optim.Adam(p, lr / 2),
    OURS: lambda p, lr: DiffGrad(p, lr),
}
"""Each by the rate of its grid; "Adam at lr/2" divides it itself, so that equal grid places are equal comparisons."""
FRICTION_STEPS = (2, 11, 100)


# --- functions of one variable --------------------------------------------------------------------------------


def _f1(x: Tensor) -> Tensor:
    return torch.where(x <= 0, (x + 0.3) ** 2, (x - 0.2) ** 2 + 0.05)


def _f2(x: Tensor) -> Tensor:
    return torch.where(x <= -0.9, -40 * x - 35.15, x**3 + x * torch.sin(8 * x) + 0.85)


def _f3(x: Tensor) -> Tensor:
    size = x.abs()  # the pieces of both sides mirror each other
    return torch.where(size > 0.5, x**2, torch.where(size > 0.4, 0.75 - size, 7 * size / 8))


FUNCTIONS = {"F1": _f1, "F2": _f2, "F3": _f3}
COLUMNS = {
    "Adam 0.1": ("adam", 0.1, 0.95),
    "diffGrad 0.1": ("diffgrad", 0.1, 0.95),
    "Adam 0.05": ("adam", 0.05, 0.95),
    "diffGrad 0.2": ("diffgrad", 0.2, 0.95),
    "Adam 0.1, b1 0.9": ("adam", 0.1, 0.9),
}


def descend(
    function: str, kind: str, lr: float, beta1: float = 0.95, eps_mode: str = "uncorrected", steps: int = 300
) -> Tensor:
    """The path (x, f) [steps + 1, 2] from x = -1 by exact gradients in float64."""
    f = FUNCTIONS[function]
    x = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))
    friction = "abs" if kind == "diffgrad" else torch.ones_like
    optimizer = DiffGrad([x], lr, (beta1, 0.999), eps_mode=eps_mode, friction=friction)
    path = []
    for _ in range(steps + 1):
        value = f(x)
        path.append([float(x.detach()), float(value.detach())])
        (x.grad,) = torch.autograd.grad(value, x)
        optimizer.step()
    return torch.tensor(path, dtype=torch.float64)


# --- images ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _data(name: str, full: bool) -> tuple[Examples, Examples, Examples]:
    """Training, held-out and test rows of one set; the same for every seed."""
    if name == "digits":
        split = digits(test=0.444)
        own, held = hold_out(split.train, 20, 0)
        return own, held, split.test
    train_rows, test = fashion_mnist().train, fashion_mnist().test
    if full:
        own, held = hold_out(train_rows, 500, 0)
        return own, held, test
    rest, held = hold_out(train_rows, 100, 0)
    return halved(per_class(rest, 600, 0)), halved(held), halved(test)


def _one(
    settings: Settings, data: str, batch: int, method: str, rate: float, seed: int
) -> tuple[float, float]:
    """Accuracies on held-out and on test rows after training at one rate."""

    def make() -> list[float]:
        own, held, test = _data(data, settings.full)
        network = seeded(lambda: conv2(own.x.shape[-1]), seed)
        epochs = 10 * EPOCHS[data] if settings.full else EPOCHS[data]
        train(network, MAKE[method](network.parameters(), rate), own, epochs, batch, seed)
        return [tested(network, held), tested(network, test)]

    name = f"{data}-{batch}-{method}-{rate:g}-{seed}".replace(" ", "-").replace("/", "-")
    held, test = kept(settings, SLUG, name, {"version": 1, "budget": settings.budget}, make)
    return held, test


def _friction(settings: Settings, seed: int) -> dict[str, list[float]]:
    """Quantiles of the friction at some steps of training on digits, rate 3e-3, batch 32."""
    own = _data("digits", False)[0]
    found: dict[str, list[float]] = {}

    def watch(step: int, optimizer: torch.optim.Optimizer) -> None:
        if step not in FRICTION_STEPS:
            return
        pairs = [(optimizer.state[p]["previous_grad"], p.grad) for p in network.parameters()]
        xi = torch.cat([torch.sigmoid((p - g).abs()).flatten() for p, g in pairs])
        found[str(step)] = [
            float(torch.quantile(xi, 0.5)),
            float(torch.quantile(xi, 0.95)),
            *torch.histc(xi, 60, 0.5, 0.6).tolist(),
        ]

    network = seeded(lambda: conv2(own.x.shape[-1]), seed)
    train(network, DiffGrad(network.parameters(), 3e-3), own, 5, 32, seed, watch)
    return found


# --- the experiment -------------------------------------------------------------------------------------------


def _grid(method: str) -> Sequence[float]:
    return SGD_RATES if method.startswith("SGD") else RATES


def run(settings: Settings) -> Result:
    """Descend the functions, train every cell, judge by ``RULE``."""
    seeds = settings.seed_list(3)
    ends = {
        (f, column): descend(f, kind, lr, beta1)[-1].tolist()
        for f in FUNCTIONS
        for column, (kind, lr, beta1) in COLUMNS.items()
    }
    cells = [(data, batch) for data in DATA for batch in BATCHES]
    tasks = [
        (settings, data, batch, method, rate, seed)
        for data, batch in cells
        for method in MAKE
        for rate in _grid(method)
        for seed in seeds
    ]
    scores = dict(zip([t[1:] for t in tasks], parallel(_one, tasks, settings, label="training"), strict=True))
    found = {
        (data, batch, method): {
            rate: [scores[data, batch, method, rate, s] for s in seeds] for rate in _grid(method)
        }
        for data, batch in cells
        for method in MAKE
    }
    friction = parallel(_friction, [(settings, s) for s in seeds], settings, label="friction")
    from gradmatch.evidence.optim._diffgrad_picture import picture

    result = _judged(found, ends, friction, cells)
    return replace(result, pictures=((f"{SLUG}.png", picture(result, friction, cells)),))


Found = dict[tuple[str, int, str], dict[float, list[tuple[float, float]]]]


def _judged(
    found: Found,
    ends: dict[tuple[str, str], list[float]],
    friction: list[dict[str, list[float]]],
    cells: Sequence[tuple[str, int]],
) -> Result:
    best: dict[tuple[str, int, str], Row] = {}
    equal: dict[tuple[str, int, str, float], Row] = {}
    for (data, batch, method), by_rate in found.items():
        chosen = best_by_hold_out(by_rate)
        edge = " (an end of the grid)" if chosen in (min(by_rate), max(by_rate)) else ""
        name, values = f"{method}, {data}, batch {batch}", tuple(t for _, t in by_rate[chosen])
        best[data, batch, method] = Row(f"{name}, best rate", values, f"rate {chosen:g}{edge}")
        if method in (OURS, ADAM, HALF):
            for rate, pairs in by_rate.items():
                row = Row(f"{name}, rate {rate:g}", tuple(t for _, t in pairs), "as its grid")
                equal[data, batch, method, rate] = row

    def mean(rows: Sequence[Row]) -> list[float]:
        return [sum(v) / len(v) for v in zip(*(r.values for r in rows), strict=True)]

    def over(method: str) -> list[float]:
        return mean([r for (_, _, m, _), r in equal.items() if m == method])

    def at_best(method: str) -> list[float]:
        return mean([best[(*cell, method)] for cell in cells])

    reached = {key: abs(f) < 1e-3 for key, (_, f) in ends.items()}
    as_published, as_half = gain(over(OURS), over(ADAM)), gain(over(OURS), over(HALF))
    won = [gain(best[(*cell, OURS)], best[(*cell, ADAM)]).above() for cell in cells]
    others = {m: gain(at_best(OURS), at_best(m)) for m in MAKE if m not in (OURS, HALF)}
    both = ("F1", "F2")
    met = [
        all(reached[f, "diffGrad 0.1"] and not reached[f, "Adam 0.1"] for f in both),
        not any(reached[f, "Adam 0.05"] for f in both),
        as_published.above(),
        as_half.above(),
        all(won),
        all(g.above() for g in others.values()),
    ]
    quantiles = "; ".join(
        f"step {k}: {sum(s[str(k)][0] for s in friction) / len(friction):.3f} and "
        f"{sum(s[str(k)][1] for s in friction) / len(friction):.3f}"
        for k in FRICTION_STEPS
    )
    where = "; ".join(
        f"{f} " + ", ".join(f"{column} {ends[f, column][0]:+.3f}" for column in COLUMNS) for f in FUNCTIONS
    )
    reason = (
        f"Ends x: {where}. At equal rate diffGrad - Adam {as_published}, diffGrad - Adam at half the rate {as_half}; "
        f"at its best rate above Adam in {sum(won)} of {len(won)} cells, and "
        + ", ".join(f"{g} against {m}" for m, g in others.items())
        + f". Median and 95 % quantile of the friction: {quantiles}. Conditions met: {sum(met)} of {len(met)}."
    )
    return Result(
        SLUG,
        TITLE,
        CLAIM,
        RULE,
        verdict_of(met),
        reason,
        "test accuracy",
        (*best.values(), *equal.values()),
        links={
            "paper": "https://arxiv.org/abs/1909.11015",
            "code": "https://github.com/shivram1987/diffGrad",
        },
    )
