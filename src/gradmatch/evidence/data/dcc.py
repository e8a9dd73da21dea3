"""DCC against class-wise matching where the classes share a nuisance: a linear generator, and clothes.

Part A, linear: five classes under one shared direction of varying strength, one learned point per class, linear
softmax networks near zero; the learned points are judged by two classifiers, a regularised and a nearly unregularised
logistic regression. Part B, images: five kinds of clothes of Fashion-MNIST at 14 x 14, ConvNet-2, clean and under two
nuisances. All methods get the same number of image updates, and each its own image rate, from equal grids that are
widened while the best rate lies on an edge, on training data that is held out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from gradmatch.core.examples import Examples
from gradmatch.data import DCC, SyntheticDataset, evaluate, random_subset
from gradmatch.datasets import Split
from gradmatch.datasets.nuisance import (
    add_patches,
    add_pattern,
    clothes,
    photograph_patches,
    shared_direction,
)
from gradmatch.evidence._common import Result, Row, Settings, gain, hold_out, parallel, per_class, verdict_of
from gradmatch.zoo import convnet

SLUG = "dcc"
TITLE = "Dataset condensation with contrastive signals"
CLAIM = (
    "Where the classes share a large task-irrelevant part, matching the gradient of all classes together (DCC) gives a "
    "better training set than matching it class by class (DC), at equally many image updates."
)
RULE = (
    "Seven conditions, each met if DCC is above DC by two standard errors, paired by seed: the linear generator at "
    "shared-to-own ratios 10 and 30, each under logistic regression with C = 1 and with C = 1e4 (four; DCC without "
    "warm-up); and Fashion-MNIST clothes at one image per class, clean, under photograph patches, and under one "
    "pattern of varying strength (three; DCC with its warm-up). 'holds' if all seven are met, 'holds in part' if some "
    "are, 'does not hold' if none is. Image rates are chosen on held-out training data for every method and condition. "
    "Ratio 3, DCC without warm-up on images and ten images per class are shown and do not count."
)
LINKS = {"paper": "https://arxiv.org/abs/2202.02916", "code": "https://github.com/Saehyung-Lee/DCC"}

RATIOS = (3.0, 10.0, 30.0)
COUNTED_RATIOS = (10.0, 30.0)
CLASSIFIERS = {"C=1": 1.0, "C=1e4": 1e4}
CONDITIONS = ("clean", "patches", "pattern")
LINEAR_GRID = tuple(10.0 ** (k / 2) for k in range(9))  # the best rate moves between modes far apart
IMAGE_GRID = (0.3, 3.0, 30.0)
WIDENINGS = 3
TUNING_SEED = 1000
METHODS = {"DC": ("dc", 0.0), "DCC": ("dcc", 0.0), "DCC warm-up": ("dcc", 0.25)}
AUGMENTED = {"DSA": ("dsa", 0.0), "DSAC warm-up": ("dsac", 0.25)}
"""Method and the share of the networks whose first ten updates are matched by class."""


class Budget(NamedTuple):
    """Sizes of the experiment."""

    linear_seeds: int
    linear_tuning: int
    linear_steps: int
    image_seeds: int
    image_tuning: int
    networks: int
    width: int
    batch_real: int
    per_class: tuple[int, ...]
    methods: dict[str, tuple[str, float]]


SMALL = Budget(5, 4, 200, 5, 4, 20, 16, 32, (1,), METHODS)
FULL = Budget(20, 8, 300, 5, 8, 40, 32, 64, (1, 10), METHODS | AUGMENTED)


# --- choosing image rates ------------------------------------------------------------------------------------


class Tuned(NamedTuple):
    """The chosen rate of every cell, and the cells whose best rate is still on the edge of its grid."""

    rates: dict[Any, float]
    on_edge: list[Any]


def tune(
    cells: Sequence[Any],
    runs: Sequence[Any],
    grid: Sequence[float],
    score_all: Callable[[list[tuple[Any, float]]], list[dict[Any, float]]],
) -> Tuned:
    """For every cell the rate of the best score; grids grow by one step past an edge where the best rate lies.

    Args:
        cells: what gets a rate.
        runs: for each cell what has to be run to score it; cells may share runs.
        grid: ascending rates to begin with, the same for all.
        score_all: scores by cell of many (run, rate) at once, which is where the work is done in parallel.
    """
    grids = {run: list(grid) for run in runs}
    scores: dict[tuple[Any, float], float] = {}
    done: set[tuple[Any, float]] = set()
    for widening in range(WIDENINGS + 1):
        todo = [(run, lr) for run in grids for lr in grids[run] if (run, lr) not in done]
        done |= set(todo)
        for (_, lr), found in zip(todo, score_all(todo), strict=True):
            scores |= {(cell, lr): value for cell, value in found.items()}
        best = {c: _best(c, grids[r], scores) for c, r in zip(cells, runs, strict=True)}
        edges = [(c, r) for c, r in zip(cells, runs, strict=True) if best[c] in (grids[r][0], grids[r][-1])]
        if not edges or widening == WIDENINGS:
            return Tuned(best, [c for c, _ in edges])
        for c, r in edges:
            low, high = grids[r][0], grids[r][-1]
            if best[c] in (low, high):
                step = grids[r][1] / low
                grids[r] = [low / step, *grids[r]] if best[c] == low else [*grids[r], high * step]
    raise AssertionError("the loop returns")


def _best(cell: Any, grid: Sequence[float], scores: dict[tuple[Any, float], float]) -> float:
    """The rate of the highest score; the lowest of several."""
    return grid[int(np.argmax([scores[cell, lr] for lr in grid]))]


# --- A: linear generator -------------------------------------------------------------------------------------


def near_zero() -> nn.Module:
    """Linear softmax without bias, W ~ 0.05 N(0, 1 / d)."""
    layer = nn.Linear(50, 5, bias=False)
    nn.init.normal_(layer.weight, std=0.05 / 50**0.5)
    return layer


def linear_run(ratio: float, method: str, lr: float, seed: int, steps: int) -> dict[str, tuple[float, float]]:
    """Held-out and test accuracy under each classifier, of one learned (or random) point per class."""
    split = shared_direction(ratio, per_class=300, seed=seed)
    train, held = hold_out(split.train, 100, seed)
    if method == "random":
        points = random_subset(train, 1, seed)
    else:
        options: dict[str, Any] = {"inner_loop": 1, "outer_warmup": 0, "batch_real": 64, "standardise": False}
        points = DCC(per_class=1, method=method, steps=steps, lr_img=lr, seed=seed, **options).distill(
            train, near_zero
        )
    return {name: logistic(points, inverse, held, split.test) for name, inverse in CLASSIFIERS.items()}


def logistic(
    points: SyntheticDataset, inverse_penalty: float, held: Examples, test: Examples
) -> tuple[float, float]:
    """Held-out and test accuracy of logistic regression trained on the points."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=inverse_penalty, max_iter=10_000)
    model.fit(points.images.double().numpy(), points.labels.numpy())
    first, second = (float(model.score(e.x.double().numpy(), e.y.numpy())) for e in (held, test))
    return first, second


def linear_part(settings: Settings, budget: Budget) -> tuple[list[Row], list[str]]:
    """Rows of part A, and the cells tuned to an edge."""
    names = {"random": "random", "DC": "dc", "DCC": "dcc"}
    tuning = [TUNING_SEED + k for k in range(budget.linear_tuning)]
    seeds = settings.seed_list(budget.linear_seeds)

    def score_all(todo: list[tuple[Any, float]]) -> list[dict[Any, float]]:
        tasks = [(*run, lr, seed, budget.linear_steps) for run, lr in todo for seed in tuning]
        found = parallel(linear_run, tasks, settings, label="linear, tuning")
        parts = [found[i : i + len(tuning)] for i in range(0, len(found), len(tuning))]
        return [
            {(*run, c): float(np.mean([f[c][0] for f in part])) for c in CLASSIFIERS}
            for (run, _), part in zip(todo, parts, strict=True)
        ]

    runs = [(ratio, names[m]) for ratio in RATIOS for m in ("DC", "DCC")]
    cells = [(*run, c) for run in runs for c in CLASSIFIERS]
    tuned = tune(cells, [c[:2] for c in cells], LINEAR_GRID, score_all)
    rows = {
        (ratio, c, m): tuned.rates.get((ratio, names[m], c), 1.0)
        for ratio in RATIOS
        for c in CLASSIFIERS
        for m in names
    }
    tasks = sorted(
        {(r, names[m], lr, seed, budget.linear_steps) for (r, _, m), lr in rows.items() for seed in seeds}
    )
    results = dict(zip(tasks, parallel(linear_run, tasks, settings, label="linear"), strict=True))
    made = []
    for (ratio, c, m), lr in rows.items():
        values = [results[ratio, names[m], lr, seed, budget.linear_steps][c][1] for seed in seeds]
        cost = "none" if m == "random" else f"{budget.linear_steps} updates, lr {lr:.3g}"
        made.append(Row(f"linear, ratio {ratio:g}, {c}: {m}", tuple(values), cost))
    return made, [f"linear ratio {r:g} {c} {m}" for r, m, c in tuned.on_edge]


# --- B: clothes ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def small_clothes() -> Split:
    """Five kinds of clothes at 14 x 14, read once a process."""
    return clothes(14)


@lru_cache(maxsize=6)
def clothes_under(condition: str, held_out: bool) -> tuple[Examples, Examples]:
    """2000 training images, and 2500 test images or 1000 more of the training set, under one condition."""
    split = small_clothes()
    train, rest = hold_out(per_class(split.train, 600, 0), 200, 0)
    test = rest if held_out else per_class(split.test, 500, 0)
    scale = float(train.x.std())
    if condition == "patches":
        return add_patches(train, 1.5, scale=scale, seed=1), add_patches(test, 1.5, scale=scale, seed=2)
    if condition == "pattern":
        one = photograph_patches(1, (14, 14), 3)[0]
        return (
            add_pattern(train, one, 3.0, scale=scale, seed=1),
            add_pattern(test, one, 3.0, scale=scale, seed=2),
        )
    return train, test


def image_run(
    condition: str, name: str, ipc: int, lr: float, seed: int, held_out: bool, budget: Budget
) -> float:
    """Accuracy of networks trained on one condensed (or random) set."""
    train, test = clothes_under(condition, held_out)

    def network() -> nn.Module:
        return convnet(1, 14, 5, budget.width, 2)

    if name == "random":
        synthetic = random_subset(train, ipc, seed)
    else:
        method, warm = budget.methods[name]
        augment = "color_crop_cutout_scale_rotate" if method in ("dsa", "dsac") else None
        synthetic = DCC(
            per_class=ipc,
            method=method,
            outer_loop=budget.networks,
            inner_loop=10,
            net_epochs=5,
            outer_warmup=round(warm * budget.networks),
            batch_real=budget.batch_real,
            lr_img=lr,
            augment=augment,
            seed=seed,
        ).distill(train, network)
    return evaluate(synthetic, network, test, networks=3, seed=seed, workers=1).mean


def image_part(settings: Settings, budget: Budget) -> tuple[list[Row], list[str]]:
    """Rows of part B, and the cells tuned to an edge."""
    tuning = [TUNING_SEED + k for k in range(budget.image_tuning)]
    seeds = settings.seed_list(budget.image_seeds)

    def score_all(todo: list[tuple[Any, float]]) -> list[dict[Any, float]]:
        tasks = [(*cell, lr, seed, True, budget) for cell, lr in todo for seed in tuning]
        found = parallel(image_run, tasks, settings, label="clothes, tuning")
        means = np.reshape(found, (len(todo), len(tuning))).mean(1)
        return [{cell: float(mean)} for (cell, _), mean in zip(todo, means, strict=True)]

    cells = [(cond, name, ipc) for ipc in budget.per_class for cond in CONDITIONS for name in budget.methods]
    tuned = tune(cells, cells, IMAGE_GRID, score_all)
    wanted = [
        (c, name, ipc) for ipc in budget.per_class for c in CONDITIONS for name in ("random", *budget.methods)
    ]
    tasks = [(*cell, tuned.rates.get(cell, 1.0), seed, False, budget) for cell in wanted for seed in seeds]
    values = np.reshape(parallel(image_run, tasks, settings, label="clothes"), (len(wanted), len(seeds)))
    rows = []
    for cell, accuracies in zip(wanted, values, strict=True):
        cost = (
            f"{10 * budget.networks} updates, lr {tuned.rates[cell]:.3g}" if cell in tuned.rates else "none"
        )
        rows.append(Row(image_name(*cell), tuple(map(float, accuracies)), cost))
    return rows, [image_name(*cell) for cell in tuned.on_edge]


def image_name(condition: str, name: str, ipc: int) -> str:
    """The row's name."""
    return f"clothes, {condition}, {ipc} per class: {name}"


# --- the experiment ------------------------------------------------------------------------------------------


def comparisons(rows: dict[str, Row]) -> dict[str, tuple[Row, Row]]:
    """What the rule compares: DCC and DC under each of its seven conditions."""
    found = {}
    for ratio in COUNTED_RATIOS:
        for c in CLASSIFIERS:
            name = f"linear, ratio {ratio:g}, {c}"
            found[name] = rows[f"{name}: DCC"], rows[f"{name}: DC"]
    for condition in CONDITIONS:
        pair = (rows[image_name(condition, m, 1)] for m in ("DCC warm-up", "DC"))
        found[f"clothes, {condition}"] = next(pair), next(pair)
    return found


def judge(rows: Sequence[Row], on_edge: Sequence[str]) -> tuple[str, str]:
    """Verdict by ``RULE``, and the reason in words."""
    gains = {name: gain(*pair) for name, pair in comparisons({r.method: r for r in rows}).items()}
    met = [g.above() for g in gains.values()]
    behind = sum(g.below() for g in gains.values())
    words = "; ".join(f"{name} {g}" for name, g in gains.items())
    reason = (
        f"DCC is above DC in {sum(met)} of {len(met)} conditions and below it in {behind}. DCC - DC: {words}."
    )
    if on_edge:
        reason += f" Best image rate still on the edge of its widened grid: {', '.join(on_edge)}."
    return verdict_of(met), reason


def run(settings: Settings) -> Result:
    """Both parts; the verdict follows from the rows by ``RULE``."""
    budget = FULL if settings.full else SMALL
    linear, linear_edges = linear_part(settings, budget)
    images, image_edges = image_part(settings, budget)
    rows = [*linear, *images]
    verdict, reason = judge(rows, [*linear_edges, *image_edges])
    return Result(SLUG, TITLE, CLAIM, RULE, verdict, reason, "test accuracy", tuple(rows), links=LINKS)
