"""TrAct: steps to a loss on ill-conditioned inputs, and accuracy on images of random contrast and brightness.

Images are Fashion-MNIST with each image's pixels mapped to c x + b, c in [0.2, 1], b in [0, 1 - c]: what TrAct is said
to mend. The honest alternatives are rows too: standardising every image, and ZCA whitening. Every arm (network,
optimizer, epochs, method) chooses its rate from one grid of three on held-out training images.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradmatch.core.examples import Examples
from gradmatch.data._zca import ZCA
from gradmatch.datasets import fashion_mnist
from gradmatch.evidence._common import (
    Result,
    Row,
    Settings,
    beats,
    gain,
    hold_out,
    parallel,
    per_class,
    standardised,
    verdict_of,
)
from gradmatch.evidence.optim._tract_picture import picture
from gradmatch.evidence.optim._training import seeded, tested, train
from gradmatch.optim import apply_tract
from gradmatch.zoo import mlp

SLUG = "tract"
TITLE = "TrAct: making first-layer pre-activations trainable"
CLAIM = (
    "Correcting the first layer's gradient by the inputs' second moment reaches equal accuracy in 1.25 to 4 times "
    "fewer epochs, for many networks and optimizers with lambda = 0.1 throughout."
)
RULE = (
    "Conditions, each by two standard errors over seeds. Conditioning: with every method at its best rate, TrAct (0.1) "
    "needs at most 1/1.25 of the plain layer's steps to a loss of 0.02. Images of random contrast, for every network, "
    "optimizer and number of epochs: TrAct above plain at equal epochs (one condition each); and, where the plain "
    "layer was also trained for twice the epochs, TrAct not below it (one condition each), which is a speed-up of two. "
    "Alternatives (MLP, both optimizers, two epochs): with every image standardised TrAct is still above plain, and "
    "TrAct is not below ZCA whitening. Lambda: with Adam and two epochs no lambda of 0.01, 1, 10 is above 0.1 by more "
    "than a point. 'holds' if all are met, 'holds in part' if some are, 'does not hold' if none is. Rates are chosen "
    "for every arm from one grid of three on held-out training images."
)
LINKS = {
    "paper": "https://arxiv.org/abs/2410.23970",
    "code": "https://github.com/Felix-Petersen/tract",
}
METRIC = "test accuracy (%), or steps to a loss of 0.02 (conditioning)"

PLAIN, TRACT = "plain", "TrAct 0.1"
LAMBDAS = {TRACT: 0.1, "TrAct 0.01": 0.01, "TrAct 0.001": 0.001, "TrAct 1": 1.0, "TrAct 10": 10.0}
CONDITIONED = (PLAIN, TRACT, "TrAct 0.01", "TrAct 0.001")
RATES = {"sgd": (0.03, 0.1, 0.2), "adam": (1e-3, 3e-3, 1e-2)}
STEP_RATES = (0.1, 0.3, 1.0)
GOAL = 0.02
TUNING_SEEDS = (1000, 1001)


class Budget(NamedTuple):
    """Sizes of the experiment."""

    seeds: int
    per_class: int
    test_per_class: int
    epochs: dict[str, tuple[int, ...]]
    steps: int


SMALL = Budget(5, 500, 200, {"mlp": (2, 4, 8), "conv": (2, 4, 8), "vit": (2, 4)}, 1500)
FULL = Budget(10, 5000, 1000, {"mlp": (2, 4, 8, 16), "conv": (2, 4, 8, 16), "vit": (2, 4, 8, 16)}, 3000)


class Arm(NamedTuple):
    """One way to train: what is measured is its accuracy."""

    net: str
    optimizer: str
    epochs: int
    method: str
    inputs: str = "contrast"

    def __str__(self) -> str:
        inputs = "" if self.inputs == "contrast" else f", {self.inputs}"
        return f"{self.net} {self.optimizer} {self.epochs} epochs{inputs}: {self.method}"


def arms(budget: Budget) -> list[Arm]:
    """All arms, those of the alternatives and lambdas last."""
    cells = [
        Arm(net, name, count, method)
        for net, epochs in budget.epochs.items()
        for name in (RATES if net != "vit" else ("adam",))
        for count in epochs
        for method in (PLAIN, TRACT)
    ]
    few = budget.epochs["mlp"][0]
    for name in RATES:
        cells += [Arm("mlp", name, few, m, "standardised images") for m in (PLAIN, TRACT)]
        cells += [Arm("mlp", name, few, PLAIN, "ZCA whitened")]
    return cells + [Arm("mlp", "adam", few, f"TrAct {lam}") for lam in ("0.01", "1", "10")]


# --- images ------------------------------------------------------------------------------------------------


class ViT(nn.Module):
    """Patches of 4 x 4, width 64, two pre-norm blocks of two heads, mean over tokens."""

    def __init__(self, width: int = 64, blocks: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, stride=4)
        self.places = nn.Parameter(0.02 * torch.randn(1, 49, width))
        block = partial(nn.TransformerEncoderLayer, width, 2, 2 * width, 0.0, batch_first=True)
        self.blocks = nn.Sequential(*(block(norm_first=True) for _ in range(blocks)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT + self.places
        logits: Tensor = self.head(self.blocks(tokens).mean(1))
        return logits


def conv() -> nn.Module:
    """Conv 5x5 of stride 2 and 16 channels, two of 3x3, linear."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), mlp(784, (128, 64), 10)),
    "conv": conv,
    "vit": ViT,
}


def with_contrast(examples: Examples, generator: torch.Generator) -> Examples:
    """Every image as c x + b with its own c and b."""
    c = 0.2 + 0.8 * torch.rand(len(examples.x), 1, 1, 1, generator=generator)
    b = (1 - c) * torch.rand(c.shape, generator=generator)
    return Examples(c * examples.x + b, examples.y, examples.classes)


def per_image(examples: Examples) -> Examples:
    """Every image with mean 0 and deviation 1."""
    mean, std = examples.x.mean((1, 2, 3), keepdim=True), examples.x.std((1, 2, 3), keepdim=True)
    return Examples((examples.x - mean) / std.clamp_min(1e-3), examples.y, examples.classes)


@lru_cache(maxsize=8)
def images(inputs: str, seed: int, size: int, test: int, tuning: bool) -> tuple[Examples, Examples]:
    """``size`` training images a class, and ``test`` to score on: held out of training for tuning, else test images."""
    split, generator = fashion_mnist(), torch.Generator().manual_seed(seed)
    kept, held = hold_out(split.train, test, seed)
    trained = per_class(kept, size, seed)
    scored = held if tuning else per_class(split.test, test, seed)
    first, second = (with_contrast(part, generator) for part in (trained, scored))
    if inputs == "standardised images":
        first, second = per_image(first), per_image(second)
    if inputs == "ZCA whitened":
        zca = ZCA.fit(first.x)
        first, second = (Examples(zca(e.x), e.y, e.classes) for e in (first, second))
    return standardised(first, second)


def measured(arm: Arm, lr: float, seed: int, budget: Budget, tuning: bool) -> float:
    """Accuracy in percent of one training; a run that diverged has that of guessing."""
    first, second = images(arm.inputs, seed, budget.per_class, budget.test_per_class, tuning)
    network = seeded(NETWORKS[arm.net], seed)
    if arm.method != PLAIN:
        apply_tract(network, LAMBDAS[arm.method])
    kind: Any = partial(torch.optim.SGD, momentum=0.9) if arm.optimizer == "sgd" else torch.optim.Adam
    train(network, kind(network.parameters(), lr=lr), first, arm.epochs, 100, seed)
    return 100 * tested(network, second)


def best_rate(arm: Arm, budget: Budget) -> float:
    """The rate of the best mean accuracy on held-out training images."""
    found = {
        lr: sum(measured(arm, lr, seed, budget, True) for seed in TUNING_SEEDS) for lr in RATES[arm.optimizer]
    }
    return max(found, key=lambda lr: found[lr])


# --- conditioning ------------------------------------------------------------------------------------------


def ill_conditioned(seed: int, n: int = 1024) -> tuple[Tensor, Tensor]:
    """Inputs (n, 20) with variances 1 to 1e-3 in random directions, targets (n, 3) that need all of them."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 20, generator=g)
    turn = torch.linalg.qr(torch.randn(20, 20, generator=g)).Q
    y = torch.tanh(z @ torch.randn(20, 3, generator=g) / 20**0.5)
    return z * torch.logspace(0, -1.5, 20) @ turn, y


def losses(method: str, lr: float, seed: int, budget: Budget) -> list[float]:
    """Full loss every ten steps of SGD with momentum 0.9 and batches of 128, until the goal or the last step."""
    x, y = ill_conditioned(seed)
    network = seeded(lambda: nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 3)), seed)
    if method != PLAIN:
        apply_tract(network, LAMBDAS[method])
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9)
    g, found = torch.Generator().manual_seed(seed), []
    for step in range(budget.steps + 1):
        if step % 10 == 0:
            with torch.no_grad():
                found.append(float((network(x) - y).square().mean()))
            if found[-1] <= GOAL:
                break
        rows = torch.randint(len(x), (128,), generator=g)
        optimizer.zero_grad()
        (network(x[rows]) - y[rows]).square().mean().backward()
        optimizer.step()
    return found


def curves(method: str, seed: int, budget: Budget) -> dict[float, list[float]]:
    """Loss curves at every rate."""
    return {lr: losses(method, lr, seed, budget) for lr in STEP_RATES}


def steps_to_goal(curve: list[float], budget: Budget) -> float:
    """Steps to the goal; the limit where it was not reached."""
    return float(10 * (len(curve) - 1)) if curve[-1] <= GOAL else float(budget.steps)


# --- the whole ---------------------------------------------------------------------------------------------


def run(settings: Settings) -> Result:
    """Run all arms; the verdict follows from the rows by ``RULE``."""
    return experiment(settings, FULL if settings.full else SMALL)


def experiment(settings: Settings, budget: Budget) -> Result:
    """The same at any budget."""
    seeds, cells = settings.seed_list(budget.seeds), arms(budget)
    found = parallel(
        curves, [(m, s, budget) for m in CONDITIONED for s in seeds], settings, label="tract: conditioning"
    )
    curve = {m: found[k * len(seeds) : (k + 1) * len(seeds)] for k, m in enumerate(CONDITIONED)}
    rates = parallel(best_rate, [(arm, budget) for arm in cells], settings, label="tract: rates")
    tasks = [(arm, lr, seed, budget, False) for arm, lr in zip(cells, rates, strict=True) for seed in seeds]
    scores = parallel(measured, tasks, settings, label="tract: images")
    rows = [conditioning_row(m, curve[m], budget) for m in CONDITIONED]
    for k, (arm, lr) in enumerate(zip(cells, rates, strict=True)):
        cost = f"rate {lr:g}, {arm.epochs * budget.per_class // 10} steps of 100 images"
        rows.append(Row(str(arm), tuple(scores[k * len(seeds) : (k + 1) * len(seeds)]), cost))
    verdict, reason = judge(rows, budget)
    return Result(
        SLUG, TITLE, CLAIM, RULE, verdict, reason, METRIC, tuple(rows), links=LINKS,
        pictures=((f"{SLUG}.png", picture(rows, curve, arms(budget), GOAL)),),
    )  # fmt: skip


def conditioning_row(method: str, found: list[dict[float, list[float]]], budget: Budget) -> Row:
    """Steps at the rate of the fewest in the mean."""
    mean = {lr: sum(steps_to_goal(f[lr], budget) for f in found) for lr in STEP_RATES}
    lr = min(STEP_RATES, key=lambda lr: mean[lr])
    values = tuple(steps_to_goal(f[lr], budget) for f in found)
    return Row(f"steps, best rate: {method}", values, f"rate {lr:g}, at most {budget.steps} steps")


def judge(rows: list[Row], budget: Budget) -> tuple[str, str]:
    """The verdict of ``RULE``, and what led to it."""
    by = {r.method: r for r in rows}

    def at(*arm: Any) -> Row:
        return by[str(Arm(*arm))]

    plain, ours = by[f"steps, best rate: {PLAIN}"], by[f"steps, best rate: {TRACT}"]
    conditioning = [beats(plain, [1.25 * v for v in ours.values])]
    pairs = [
        (a, a._replace(method=TRACT)) for a in arms(budget) if a.method == PLAIN and a.inputs == "contrast"
    ]
    equal = [beats(by[str(b)], by[str(a)]) for a, b in pairs]
    longer = [
        (by[str(a._replace(epochs=2 * a.epochs))], by[str(b)])
        for a, b in pairs
        if str(a._replace(epochs=2 * a.epochs)) in by
    ]
    twice = [not gain(ours, other).below() for other, ours in longer]
    few = budget.epochs["mlp"][0]
    even = [
        beats(*(at("mlp", name, few, m, "standardised images") for m in (TRACT, PLAIN))) for name in RATES
    ]
    white = [
        not gain(at("mlp", name, few, TRACT), at("mlp", name, few, PLAIN, "ZCA whitened")).below()
        for name in RATES
    ]
    best = at("mlp", "adam", few, TRACT)
    flat = [
        not beats(at("mlp", "adam", few, f"TrAct {lam}"), best, margin=1.0) for lam in ("0.01", "1", "10")
    ]
    shown = "; ".join(f"{a.net} {a.optimizer} {a.epochs} {gain(by[str(b)], by[str(a)])}" for a, b in pairs)
    groups = {
        "fewer steps on ill-conditioned inputs": conditioning,
        "above plain at equal epochs": equal,
        "not below plain at twice the epochs": twice,
        "above plain on standardised images": even,
        "not below ZCA whitening": white,
        "lambda within a point": flat,
    }
    met = [c for group in groups.values() for c in group]
    reason = f"{sum(met)} of {len(met)} conditions met: "
    reason += ", ".join(f"{name} {sum(group)} of {len(group)}" for name, group in groups.items())
    reason += (
        f". Steps to the goal {ours.mean:.0f} against {plain.mean:.0f}. Over plain at equal epochs: {shown}."
    )
    return verdict_of(met), reason
