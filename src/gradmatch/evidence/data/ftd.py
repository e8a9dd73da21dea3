"""FTD against MTT on clothes at 14 x 14: are flat experts flat, do errors pile up less, is the set better?

Every arm trains its experts with the same initial weights, batches and number of steps (GSAM takes two gradients a
step), then learns images with the same number of iterations; the pixel rate is chosen for each arm and size from one
grid on held-out training data. Arms share the seed, so that differences are paired.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

from torch import nn

from gradmatch.core.examples import Examples
from gradmatch.data import FTD, evaluate, random_subset, train_experts
from gradmatch.data.ftd import TrajectoryBuffer, accumulated_error, loss_rise, matching_error, top_eigenvalue
from gradmatch.datasets import fashion_mnist
from gradmatch.evidence._common import (
    Result,
    Row,
    Settings,
    bar_picture,
    gain,
    halved,
    hold_out,
    parallel,
    per_class,
    standardised,
    verdict_of,
)
from gradmatch.evidence.data._rates import best_rate
from gradmatch.zoo import convnet, mlp

SLUG = "ftd"
TITLE = "FTD: flat experts for trajectory matching"
CLAIM = (
    "Trajectory matching accumulates less error, and gives a training set of higher accuracy, where its experts were "
    "trained to be flat (FTD) than with plain experts (MTT)."
)
RULE = (
    "For each of three ways to train flat experts (GSAM adaptive with the released rho 0.01, adaptive rho 1, plain rho "
    "0.2; alpha 0.3) against SGD experts of the same seeds, by two standard errors: a lower top Hessian eigenvalue, a "
    "lower loss rise under random perturbation of 5 %, and, at one and at five images per class, a lower accumulated "
    "error after five segments, a lower gap between the losses of student and expert there, and a higher test accuracy "
    "(averaged images). 'holds' if all 24 conditions are met, 'holds in part' if some are, 'does not hold' if none is. "
    "Pixel rates are chosen on held-out training data, from one grid of four that widens where its best is on an edge."
)
LINKS = {"paper": "https://arxiv.org/abs/2211.11004", "code": "https://github.com/AngusDujw/FTD-distillation"}

MTT = "MTT"
ARMS: dict[str, dict[str, Any]] = {
    MTT: {"optimizer": "sgd"},
    "FTD adaptive rho 0.01": {"optimizer": "gsam", "rho": 0.01, "alpha": 0.3, "adaptive": True},
    "FTD adaptive rho 1": {"optimizer": "gsam", "rho": 1.0, "alpha": 0.3, "adaptive": True},
    "FTD plain rho 0.2": {"optimizer": "gsam", "rho": 0.2, "alpha": 0.3, "adaptive": False},
}
FLAT = tuple(name for name in ARMS if name != MTT)
GRID = (10.0, 30.0, 100.0, 300.0)
REAL_GRID = (0.01, 0.03, 0.1, 0.3)
SEGMENTS = 5
TUNING_SEEDS = (1000, 1001, 1002, 1003)
"""Two of them chose rates by noise: at one image per class the arms ended on opposite edges of the grid."""
Figures = dict[str, float]


class Budget(NamedTuple):
    """Sizes of the experiment."""

    seeds: int
    per_class: tuple[int, ...]
    train: int
    held: int
    experts: int
    epochs: int
    start: int
    iterations: int
    decay: float
    network: str
    eval_epochs: int


SMALL = Budget(5, (1, 5), 400, 100, 3, 15, 8, 200, 0.985, "mlp", 300)
FULL = Budget(5, (1, 10), 5000, 500, 20, 50, 20, 5000, 0.9995, "convnet", 1000)


def network(kind: str) -> Callable[[], nn.Module]:
    """The student and expert: MLP 196-32-10 tanh, or ConvNet-2 of width 32."""
    if kind == "mlp":
        return partial(mlp, 196, (32,), 10, "tanh")
    return partial(convnet, size=14, width=32, depth=2)


@lru_cache(maxsize=1)
def _clothes() -> tuple[Examples, Examples]:
    split = fashion_mnist()
    return halved(split.train), halved(split.test)


def data(seed: int, budget: Budget) -> tuple[Examples, Examples, Examples]:
    """Training, held-out and test examples; training and held-out ones are drawn by the seed."""
    train, test = _clothes()
    rest, held = hold_out(per_class(train, budget.train + budget.held, seed), budget.held, seed)
    return rest, held, test


def experts(train: Examples, arm: str, seed: int, budget: Budget) -> TrajectoryBuffer:
    """The experts of one arm."""
    options: dict[str, Any] = ARMS[arm] | {"lr": 0.1, "batch_size": 32, "seed": seed}
    return train_experts(train, network(budget.network), budget.experts, budget.epochs, **options)


def matcher(count: int, lr_img: float, seed: int, budget: Budget) -> FTD:
    """One distillation; "full" is the same gradient as "exact", and faster for networks this small."""
    return FTD(
        per_class=count,
        steps=budget.iterations,
        syn_steps=20,
        expert_epochs=2,
        max_start_epoch=budget.start,
        lr_img=lr_img,
        lr_lr=1e-4,
        lr_syn=0.1,
        ema_decay=budget.decay,
        unroll="full",
        seed=seed,
    )


def tune(arm: str, budget: Budget) -> dict[int, tuple[float, bool]]:
    """By images per class, the pixel rate of the best mean held-out accuracy, and whether it is on its grid's edge."""
    net, seeds = network(budget.network), []
    for seed in TUNING_SEEDS:
        train, held, _ = data(seed, budget)
        seeds.append((seed, train, held, experts(train, arm, seed, budget)))

    def score(count: int, lr: float) -> float:
        total = 0.0
        for seed, train, held, buffer in seeds:
            found = matcher(count, lr, seed, budget).distill(train, net, buffer=buffer)
            total += evaluate(found, net, held, epochs=budget.eval_epochs).mean
        return total / len(seeds)

    return {count: best_rate(partial(score, count), GRID, widenings=1) for count in budget.per_class}


def measure(arm: str, rates: dict[int, float], seed: int, budget: Budget) -> Figures:
    """All figures of one arm and seed."""
    train, _, test = data(seed, budget)
    net, buffer = network(budget.network), experts(train, arm, seed, budget)
    found = flatness(buffer, train, test, budget)
    few = per_class(train, min(100, budget.train // 2), seed)
    for count, lr in rates.items():
        run = matcher(count, lr, seed, budget)
        averaged = run.distill(train, net, buffer=buffer)
        assert run.raw is not None
        common: dict[str, Any] = {"syn_steps": 20, "expert_epochs": 2, "seed": seed}
        error = accumulated_error(averaged, net, buffer, few, segments=SEGMENTS, **common)
        found |= {
            f"ipc {count}, accuracy": evaluate(
                averaged, net, test, epochs=budget.eval_epochs, seed=seed
            ).mean,
            f"ipc {count}, accuracy of the last images": evaluate(
                run.raw, net, test, epochs=budget.eval_epochs, seed=seed
            ).mean,
            f"ipc {count}, matching loss": matching_error(
                averaged, net, buffer, max_start_epoch=budget.start, **common
            ),
            f"ipc {count}, accumulated error": error.accumulated[-1],
            f"ipc {count}, accumulated over single error": error.ratio[-1],
            f"ipc {count}, loss gap": error.loss_gap[-1],
        }
    return found


def flatness(buffer: TrajectoryBuffer, train: Examples, test: Examples, budget: Budget) -> Figures:
    """Means over the experts, at their last checkpoint."""
    net, (scaled, held) = network(budget.network), standardised(train, test)
    ends = [buffer.at(k, buffer.epochs) for k in range(len(buffer))]
    rise = partial(loss_rise, net, data=scaled, radius=0.05)
    figures = {
        "top Hessian eigenvalue": [top_eigenvalue(net, theta, scaled) for theta in ends],
        "loss rise, random 5 %": [rise(theta) for theta in ends],
        "loss rise, gradient 5 %": [rise(theta, kind="gradient") for theta in ends],
        "expert accuracy": [expert_accuracy(net, theta, held) for theta in ends],
    }
    return {name: sum(values) / len(values) for name, values in figures.items()}


def expert_accuracy(factory: Callable[[], nn.Module], theta: Any, test: Examples) -> float:
    """Share of right answers of a network with flat parameters ``theta``."""
    net = factory()
    nn.utils.vector_to_parameters(theta.clone(), net.parameters())
    return float((net.eval()(test.x).argmax(1) == test.y).double().mean())


def real(count: int, seeds: list[int], budget: Budget) -> list[float]:
    """Test accuracies of random real images, at the evaluation rate that is best on held-out data."""
    score = partial(evaluate, network=network(budget.network), epochs=budget.eval_epochs)
    held_out: dict[float, float] = dict.fromkeys(REAL_GRID, 0.0)
    for seed in TUNING_SEEDS:
        train, held, _ = data(seed, budget)
        for lr in REAL_GRID:
            held_out[lr] += score(random_subset(train, count, seed), test=held, lr=lr).mean
    best = max(REAL_GRID, key=held_out.__getitem__)
    found = []
    for seed in seeds:
        train, _, test = data(seed, budget)
        found.append(score(random_subset(train, count, seed), test=test, lr=best, seed=seed).mean)
    return found


def run(settings: Settings) -> Result:
    """Run all arms; the verdict follows from the rows by ``RULE``."""
    budget = FULL if settings.full else SMALL
    seeds = settings.seed_list(budget.seeds)
    tuned = parallel(tune, [(arm, budget) for arm in ARMS], settings, label="ftd: pixel rates")
    best = dict(zip(ARMS, tuned, strict=True))
    rates = {arm: {c: lr for c, (lr, _) in best[arm].items()} for arm in ARMS}
    on_edge = [f"{arm} ipc {c}" for arm in ARMS for c, (_, edge) in best[arm].items() if edge]
    tasks = [(arm, rates[arm], seed, budget) for seed in seeds for arm in ARMS]
    found = dict(
        zip(
            [(arm, seed) for arm, _, seed, _ in tasks],
            parallel(measure, tasks, settings, label="ftd"),
            strict=True,
        )
    )
    names = list(found[MTT, seeds[0]])
    rows = [
        Row(f"{name}: {arm}", tuple(found[arm, s][name] for s in seeds), cost(arm, name, rates[arm], budget))
        for name in names
        for arm in ARMS
    ]
    sizes = [(count, seeds, budget) for count in budget.per_class]
    chance = parallel(real, sizes, settings, label="ftd: real images")
    for count, values in zip(budget.per_class, chance, strict=True):
        text = "evaluation rate chosen on held-out data"
        rows.append(Row(f"ipc {count}, accuracy: random real images", tuple(values), text))
    verdict, reason = judge(rows, budget, on_edge)
    picture = bar_picture([r for r in rows if ", accuracy:" in r.method], "test accuracy", TITLE)
    metric = "test accuracy, and other figures as their rows say"
    pictures = ((f"{SLUG}.png", picture),)
    return Result(
        SLUG, TITLE, CLAIM, RULE, verdict, reason, metric, tuple(rows), links=LINKS, pictures=pictures
    )


def cost(arm: str, name: str, rates: dict[int, float], budget: Budget) -> str:
    """Steps behind a row."""
    gradients = 1 if arm == MTT else 2
    text = f"{budget.experts} experts x {budget.epochs} epochs, {gradients} gradient{'s'[: gradients - 1]} a step"
    count = next((c for c in rates if name.startswith(f"ipc {c},")), None)
    return text if count is None else f"{text}; {budget.iterations} iterations at pixel rate {rates[count]:g}"


def judge(rows: list[Row], budget: Budget, on_edge: list[str]) -> tuple[str, str]:
    """The verdict by ``RULE``, and its reason."""
    by = {row.method: row for row in rows}
    lower = ["top Hessian eigenvalue", "loss rise, random 5 %"]
    lower += [f"ipc {c}, {name}" for c in budget.per_class for name in ("accumulated error", "loss gap")]
    higher = [f"ipc {c}, accuracy" for c in budget.per_class]
    gains = {
        (name, arm): gain(by[f"{name}: {arm}"], by[f"{name}: {MTT}"])
        for name in lower + higher
        for arm in FLAT
    }
    met = {key: g.below() if key[0] in lower else g.above() for key, g in gains.items()}
    parts = [
        f"{name} " + ", ".join(f"{arm} {gains[name, arm]}{' *' * met[name, arm]}" for arm in FLAT)
        for name in lower + higher
    ]
    reason = (
        f"{sum(met.values())} of {len(met)} conditions met (* below); differences from MTT: "
        + "; ".join(parts)
    )
    reason += f". Pixel rate on the edge of its widened grid: {', '.join(on_edge) or 'none'}."
    return verdict_of(list(met.values())), reason
