"""TESLA: how exact its gradient is, what memory it takes, and what its soft labels do with many and with few classes.

Gradients and memory are compared with autograd through the whole loop. Then images are distilled for 100 classes
(two-digit numbers) and for 10 (digits): every row's pixel rate and evaluation rate are chosen from one grid each on
held-out training data. Rows share the seed, so that differences are paired.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from gradmatch.core.examples import Examples
from gradmatch.core.networks import build
from gradmatch.data import TESLA, SyntheticDataset, evaluate, random_subset, train_experts
from gradmatch.data.tesla import TrajectoryBuffer
from gradmatch.datasets import Split, digits
from gradmatch.datasets.two_digits import two_digits
from gradmatch.evidence._common import (
    Result,
    Row,
    Settings,
    bar_picture,
    gain,
    hold_out,
    parallel,
    verdict_of,
)
from gradmatch.evidence.data._rates import best_rate
from gradmatch.evidence.data._unrolled import gradient_errors, graph_megabytes
from gradmatch.zoo import mlp

SLUG = "tesla"
TITLE = "TESLA: trajectory matching in constant memory, with soft labels"
CLAIM = (
    "The exact gradient of trajectory matching in memory that does not grow with the inner steps, and labels assigned "
    "by the target expert, which let it work with many classes."
)
RULE = (
    "Nine conditions. Gradient: the adjoint ('exact') is within 1e-8 of autograd through the loop at every one of "
    "nine settings (5, 20, 50 steps; rates 0.02, 0.1, 0.5); the published estimator ('tesla') is within 1e-3 of it at "
    "every one, as its claim of exactness needs. Memory: from 5 to 20 steps the graph of 'exact' and of 'tesla' grows "
    "by at most 5 %, and that of autograd at least threefold. Accuracy, by two standard errors: with 100 classes, "
    "labels of the target expert assigned in every iteration beat hard labels, and beat real images with teacher "
    "labels; labels assigned once beat hard labels; with 10 classes, assigned labels beat hard ones, in every "
    "iteration and once (two conditions); and the published estimator's images are not below the exact gradient's at "
    "100 classes by two standard errors and a point. 'holds' if all nine are met, 'holds in part' if some are, "
    "'does not hold' if none is. Pixel and evaluation rates are chosen for every row on held-out training data."
)
LINKS = {"paper": "https://arxiv.org/abs/2211.10586", "code": "https://github.com/justincui03/tesla"}

MANY, FEW = "100 classes", "10 classes"
ARMS: dict[str, dict[str, Any]] = {
    "hard labels": {"soft_labels": False},
    "labels in every iteration": {"soft_labels": "teacher"},
    "labels once": {"soft_labels": "teacher-init"},
    "labels in every iteration, tesla gradient": {"soft_labels": "teacher", "unroll": "tesla"},
}
HARD, SOFT, ONCE, BIASED = ARMS
REAL = ("real images, hard labels", "real images, teacher labels")
GRID = (0.3, 1.0, 3.0, 10.0)
RATES = (0.01, 0.03, 0.1)
TUNING_SEED = 1000
MODES = ("full", "exact", "tesla")


class Budget(NamedTuple):
    """Sizes of the experiment."""

    seeds: int
    train: int
    test: int
    experts: int
    epochs: int
    iterations: dict[str, int]
    eval_epochs: int
    memory_images: int
    memory_width: int


SMALL = Budget(5, 6000, 2000, 5, 15, {MANY: 300, FEW: 200}, 500, 100, 32)
FULL = Budget(10, 20000, 5000, 20, 30, {MANY: 3000, FEW: 2000}, 1000, 100, 128)


# --- accuracy ------------------------------------------------------------------------------------------------


def data(task: str, seed: int, budget: Budget) -> Split:
    """Two-digit numbers (100 classes), or digits (10)."""
    return two_digits(budget.train, budget.test, seed) if task == MANY else digits(seed=seed)


def network(task: str) -> Callable[[], nn.Module]:
    """MLP 128-64-100 with ReLU, or 64-32-10 with tanh."""
    return partial(mlp, 128, (64,), 100, "relu") if task == MANY else partial(mlp, 64, (32,), 10, "tanh")


def experts(task: str, train: Examples, seed: int, budget: Budget) -> TrajectoryBuffer:
    """Plain SGD experts."""
    options: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "batch_size": 32, "seed": seed}
    return train_experts(train, network(task), budget.experts, budget.epochs, **options)


def distilled(
    task: str, arm: str, lr_img: float, train: Examples, buffer: TrajectoryBuffer, seed: int, budget: Budget
) -> SyntheticDataset:
    """One image a class of one arm; "full" is the same gradient as "exact", and faster for networks this small."""
    options = {"unroll": "full"} | ARMS[arm]
    run = TESLA(
        per_class=1,
        steps=budget.iterations[task],
        syn_steps=20,
        expert_epochs=2,
        max_start_epoch=8,
        lr_img=lr_img,
        lr_lr=1e-4,
        lr_syn=0.1,
        batch_syn=50 if task == MANY else None,
        seed=seed,
        **options,
    )
    return run.distill(train, network(task), buffer=buffer)


def real(row: str, task: str, train: Examples, buffer: TrajectoryBuffer, seed: int) -> SyntheticDataset:
    """Random real images with their own labels or those of the first expert at its last checkpoint."""
    found = random_subset(train, 1, seed)
    if row == REAL[0]:
        return found
    net = build(network(task), 0)
    nn.utils.vector_to_parameters(buffer.at(0, buffer.epochs).clone(), net.parameters())
    with torch.no_grad():
        labels = net.eval()(found.standardised()).softmax(1)
    return SyntheticDataset(found.images, labels, found.classes, None, found.mean, found.std)


def score(task: str, found: SyntheticDataset, test: Examples, lr: float, budget: Budget, seed: int) -> float:
    """Test accuracy of three networks trained on the set with its own labels."""
    return evaluate(found, network(task), test, lr=lr, epochs=budget.eval_epochs, seed=seed).mean


def tune(task: str, row: str, budget: Budget) -> tuple[float, float, bool]:
    """Pixel rate (0 for real images) and evaluation rate of the best held-out accuracy; whether on the edge."""
    rest, held = hold_out(data(task, TUNING_SEED, budget).train, 12 if task == MANY else 25, TUNING_SEED)
    buffer = experts(task, rest, TUNING_SEED, budget)
    scores: dict[tuple[float, float], float] = {}

    def score_all(lr_img: float) -> float:
        made = made_by(task, row, lr_img, rest, buffer, TUNING_SEED, budget)
        scores.update({(lr_img, e): score(task, made, held, e, budget, TUNING_SEED) for e in RATES})
        return max(scores[lr_img, e] for e in RATES)

    lr_img, edge = 0.0, False
    if row in ARMS:
        lr_img, edge = best_rate(score_all, GRID, widenings=1)
    else:
        score_all(lr_img)
    return lr_img, max(RATES, key=lambda e: scores[lr_img, e]), edge


def made_by(
    task: str, row: str, lr_img: float, train: Examples, buffer: TrajectoryBuffer, seed: int, budget: Budget
) -> SyntheticDataset:
    """The training set of any row."""
    if row in ARMS:
        return distilled(task, row, lr_img, train, buffer, seed, budget)
    return real(row, task, train, buffer, seed)


def measure(task: str, rates: dict[str, tuple[float, float]], seed: int, budget: Budget) -> dict[str, float]:
    """Test accuracy of every row."""
    split = data(task, seed, budget)
    buffer = experts(task, split.train, seed, budget)
    found = {}
    for row, (lr_img, lr) in rates.items():
        made = made_by(task, row, lr_img, split.train, buffer, seed, budget)
        found[row] = score(task, made, split.test, lr, budget, seed)
    return found


# --- the whole -----------------------------------------------------------------------------------------------


def run(settings: Settings) -> Result:
    """Run all parts; the verdict follows from the rows by ``RULE``."""
    budget = FULL if settings.full else SMALL
    seeds = settings.seed_list(budget.seeds)
    names = (*ARMS, *REAL)
    cells = [(task, row) for task in (MANY, FEW) for row in names]
    best = parallel(tune, [(*cell, budget) for cell in cells], settings, label="tesla: rates")
    rates = {task: {r: best[k][:2] for k, (t, r) in enumerate(cells) if t == task} for task in (MANY, FEW)}
    on_edge = [f"{t} {r}" for (t, r), (_, _, edge) in zip(cells, best, strict=True) if edge]
    tasks = [(task, rates[task], seed, budget) for task in (MANY, FEW) for seed in seeds]
    values = parallel(measure, tasks, settings, label="tesla: accuracy")
    rows = []
    for k, task in enumerate((MANY, FEW)):
        part = values[k * len(seeds) : (k + 1) * len(seeds)]
        for row in names:
            lr_img, lr = rates[task][row]
            spent = f"{budget.iterations[task]} iterations at pixel rate {lr_img:g}, " if row in ARMS else ""
            rows.append(Row(f"{task}: {row}", tuple(p[row] for p in part), f"{spent}evaluation rate {lr:g}"))
    errors = parallel(gradient_errors, [(s,) for s in seeds], settings, label="tesla: gradients")
    for setting in errors[0]:
        for kind in errors[0][setting]:
            rows.append(
                Row(f"gradient error, {setting}: {kind}", tuple(e[setting][kind] for e in errors), "float64")
            )
    graphs = [(mode, n, budget.memory_images, budget.memory_width) for mode in MODES for n in (5, 10, 20)]
    sizes = parallel(graph_megabytes, graphs, settings, label="tesla: memory")
    for (mode, n, images, width), held in zip(graphs, sizes, strict=True):
        rows.append(
            Row(f"graph MB at {n} steps: {mode}", (held,), f"ConvNet-2 of width {width}, {images} images")
        )
    verdict, reason = judge(rows, on_edge)
    picture = bar_picture([r for r in rows if r.method.startswith((MANY, FEW))], "test accuracy", TITLE)
    metric = "test accuracy, and other figures as their rows say"
    pictures = ((f"{SLUG}.png", picture),)
    return Result(
        SLUG, TITLE, CLAIM, RULE, verdict, reason, metric, tuple(rows), links=LINKS, pictures=pictures
    )


def judge(rows: list[Row], on_edge: list[str]) -> tuple[str, str]:
    """The verdict by ``RULE``, and its reason."""
    by = {row.method: row for row in rows}
    worst = {
        m: max(max(r.values) for r in rows if r.method.endswith(f": {m}") and "error" in r.method)
        for m in MODES[1:]
    }
    growth = {m: by[f"graph MB at 20 steps: {m}"].mean / by[f"graph MB at 5 steps: {m}"].mean for m in MODES}
    flat = max(growth["exact"], growth["tesla"])
    biased = gain(by[f"{MANY}: {BIASED}"], by[f"{MANY}: {SOFT}"])
    met = {
        f"worst error of the adjoint {worst['exact']:.1e}": worst["exact"] < 1e-8,
        f"worst error of the published estimator {worst['tesla']:.2g}": worst["tesla"] < 1e-3,
        f"graph at 20 over 5 steps {flat:.3f}, of autograd {growth['full']:.2f}": flat <= 1.05
        and growth["full"] >= 3,
    }
    pairs = (
        (MANY, SOFT, HARD),
        (MANY, SOFT, REAL[1]),
        (MANY, ONCE, HARD),
        (FEW, SOFT, HARD),
        (FEW, ONCE, HARD),
    )
    for task, better, worse in pairs:
        found = gain(by[f"{task}: {better}"], by[f"{task}: {worse}"])
        met[f"{task}, {better} over {worse} {found}"] = found.above()
    met[f"{MANY}, {BIASED} over exact {biased}"] = not (biased.below() and biased.mean < -0.01)
    parts = [f"{text} ({'met' if ok else 'not met'})" for text, ok in met.items()]
    reason = f"{sum(met.values())} of {len(met)} conditions met: " + "; ".join(parts)
    reason += f". Pixel rate on the edge of its widened grid: {', '.join(on_edge) or 'none'}."
    return verdict_of(list(met.values())), reason
