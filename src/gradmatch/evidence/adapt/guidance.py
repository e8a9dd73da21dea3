"""A deep fully connected net that hardly trains on Fashion-MNIST, alone and guided by a small residual ConvNet.

E1: 32 blocks of Linear 64, batch-norm, ReLU and dropout 0.1 on 2,000 images at 14 x 14, batches of 128, 20
epochs of Adam. The guide has 7 convolutions (8, 16, 32 channels), untrained (statistics measured) or trained
for 6 epochs on the same images; its features are computed once. Shuffled arms give every batch the guide's
features of its examples in another order: the relation is gone, the spectrum stays. "No guide, spread out"
pulls layers towards the identity. E2: a wide net (3 x 512) on 1,000 images, 40 epochs, alone and with an
untrained guide. Every arm has its rate from the same two on 500 held-out training images, with a seed of its
own."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.adapt import Guidance, calibrate_batch_norm, uniform_map
from gradmatch.core.networks import build, seeded
from gradmatch.core.picture import png, subplots
from gradmatch.datasets import fashion_mnist
from gradmatch.evidence._common import (
    Gain,
    Result,
    Row,
    Settings,
    accuracy,
    gain,
    halved,
    kept,
    parallel,
    verdict_of,
)

SLUG = "guidance"
TITLE = "Guidance: training the untrainable by representational alignment"
CLAIM = (
    "Pulling a deep fully connected net's hidden layers towards those of a convolutional guide, even an "
    "untrained one, makes it train; a few guided steps are enough; and what is transferred is the guide's "
    "relation between images."
)
RULE = (
    "Test accuracy, paired by seed; a difference counts if it exceeds two standard errors. Biased CKA unless "
    "said: (1) the trained and (2) the untrained guide are above no guide; (3) the trained guide is above "
    "distilling its logits; (4) the untrained guide is above the trained one, as in the paper's deep net; (5)"
    " 50 guided steps are above no guide. The relation is transferred: the trained guide is above its own "
    "shuffled features (6) with biased CKA, (7) with debiased CKA. (8) The wide net with an untrained guide "
    "has a smaller gap between training and test accuracy, (9) and is better on test. 'holds' if all nine are"
    " met, 'holds in part' if some are, 'does not hold' if none is."
)

TRAIN, HELD, TEST = 2000, 500, 4000
DEPTH, WIDTH, BATCH, EPOCHS, FEW = 32, 64, 128, 20, 50
RATES = (1e-3, 3e-3)
WIDE, WIDE_TRAIN, WIDE_EPOCHS = 512, 1000, 40
TUNING_SEED = 1000
ARMS: dict[str, dict[str, Any]] = {
    "no guide": {},
    "logit distillation": {"distil": True},
    "trained guide": {"guide": "trained"},
    "untrained guide": {"guide": "untrained"},
    "trained guide, 50 steps": {"guide": "trained", "stop_after": FEW},
    "trained guide, shuffled": {"guide": "trained", "shuffle": True},
    "no guide, spread out": {"guide": "identity"},
    "trained guide, debiased": {"guide": "trained", "distance": "cka_debiased"},
    "untrained guide, debiased": {"guide": "untrained", "distance": "cka_debiased"},
    "trained guide, shuffled, debiased": {"guide": "trained", "shuffle": True, "distance": "cka_debiased"},
}
WIDE_ARMS = {"wide, no guide": {}, "wide, untrained guide": {"guide": "untrained"}}


@lru_cache(maxsize=1)
def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images (n, 1, 14, 14), standardised, and labels."""
    found = fashion_mnist()
    train, test = halved(found.train), halved(found.test)
    mean, std = train.x[:TRAIN].mean(), train.x[:TRAIN].std()
    return (
        (train.x[: TRAIN + HELD] - mean) / std,
        train.y[: TRAIN + HELD],
        (test.x[:TEST] - mean) / std,
        test.y[:TEST],
    )


def fcn(depth: int, width: int, dropout: float) -> nn.Sequential:
    """Blocks of Linear, batch-norm, ReLU and dropout, then logits."""
    layers: list[nn.Module] = [nn.Flatten()]
    for k in range(depth):
        layers += [
            nn.Linear(width if k else 196, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Dropout(dropout),
        ]
    return nn.Sequential(*layers, nn.Linear(width, 10))


class Residual(nn.Module):
    """Seven convolutions in three stages with residual sums."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.first = nn.ModuleList(
            [nn.Conv2d(a, b, 3, s, 1) for a, b, s in ((8, 8, 1), (8, 16, 2), (16, 32, 2))]
        )
        self.second = nn.ModuleList([nn.Conv2d(b, b, 3, padding=1) for b in (8, 16, 32)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(b) for b in (8, 16, 32)])
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = F.relu(self.stem(x))
        for first, second, norm in zip(self.first, self.second, self.norms, strict=True):
            h = F.relu(norm(first(x)))
            x = F.relu(h + second(h))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class Identity(nn.Module):
    """A guide to which every example is as far from every other."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """The identity matrix."""
        out: Tensor = self.rows(torch.eye(len(x)))
        return out


def guide_of(kind: str, x: Tensor, y: Tensor, seed: int, epochs: int) -> nn.Module:
    """An untrained or trained ConvNet in eval mode."""
    if kind == "identity":
        return Identity().eval()
    net = build(Residual, seed + 77)
    if kind == "trained":
        fit(net.train(), x, y, 3e-3, seed, epochs)
        return net.eval()
    return calibrate_batch_norm(net, torch.split(x, 500))


def fit(
    net: nn.Module, x: Tensor, y: Tensor, lr: float, seed: int, epochs: int,
    guidance: Guidance | None = None, shuffle: bool = False, soft: Tensor | None = None,
) -> None:  # fmt: skip
    """Adam; with a guide or with soft targets (log probabilities) beside the labels."""
    optimizer, g = torch.optim.Adam(net.parameters(), lr), torch.Generator().manual_seed(seed)
    with seeded(seed):  # of dropout
        for _ in range(epochs):
            for index in torch.split(torch.randperm(len(y), generator=g), BATCH):
                if len(index) < BATCH // 2:
                    continue
                optimizer.zero_grad()
                if guidance is None:
                    out = net(x[index])
                    loss = F.cross_entropy(out, y[index])
                    if soft is not None:
                        loss = loss + F.kl_div(
                            out.log_softmax(1), soft[index], log_target=True, reduction="batchmean"
                        )
                else:
                    at = index[torch.randperm(len(index), generator=g)] if shuffle else index
                    with guidance.capture():
                        loss = F.cross_entropy(net(x[index]), y[index])
                        loss = loss + guidance.loss(x[index], None if guidance._kept is None else at)
                torch.autograd.backward(loss)
                optimizer.step()


@torch.no_grad()
def right(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers in eval mode."""
    return accuracy(net.eval()(x), y)


def trained(
    arm: dict[str, Any], x: Tensor, y: Tensor, lr: float, seed: int, epochs: int, wide: bool
) -> nn.Module:
    """A target, alone or guided."""
    net = build(lambda: fcn(3, WIDE, 0.0) if wide else fcn(DEPTH, WIDTH, 0.1), seed)
    kind, guidance, soft = arm.get("guide", "trained"), None, None
    if arm:
        guide = _guide(kind, len(y), seed, min(epochs, 6))
        if arm.get("distil"):
            with torch.no_grad():
                soft = guide(x).log_softmax(1)
        else:
            names = [n for n, m in net.named_modules() if isinstance(m, nn.Linear)][:-1]
            places = uniform_map(7, len(names))
            pairs = [("rows", names[j]) for j in places] if kind == "identity" else "uniform"
            guidance = Guidance(
                net,
                guide,
                layer_map=pairs,
                pool=4,
                distance=arm.get("distance", "cka"),
                stop_after=arm.get("stop_after"),
            )
            if kind != "identity":
                guidance.remember(x)
    fit(net.train(), x, y, lr, seed, epochs, guidance, bool(arm.get("shuffle")), soft)
    return net


@lru_cache(maxsize=8)
def _guide(kind: str, count: int, seed: int, epochs: int) -> nn.Module:
    x, y, _, _ = data()
    return guide_of(kind, x[:count], y[:count], seed, epochs)


def _rates(settings: Settings, name: str, fast: bool) -> dict[str, float]:
    """The rate of an arm, on held-out images."""

    def make() -> dict[str, float]:
        began = time.perf_counter()
        x, y, _, _ = data()
        arm, wide, epochs, count = _setting(name, fast)
        scores = {}
        for lr in RATES:
            net = trained(arm, x[:count], y[:count], lr, TUNING_SEED, epochs, wide)
            scores[lr] = right(net, x[TRAIN:], y[TRAIN:])
        best = max(scores, key=lambda r: scores[r])
        return {"lr": best, "seconds": time.perf_counter() - began}

    return dict(kept(settings, SLUG, f"rate-{name.replace(' ', '_')}", {"fast": fast, "version": 1}, make))


def _setting(name: str, fast: bool) -> tuple[dict[str, Any], bool, int, int]:
    wide = name in WIDE_ARMS
    arm, epochs, count = (WIDE_ARMS[name], WIDE_EPOCHS, WIDE_TRAIN) if wide else (ARMS[name], EPOCHS, TRAIN)
    return (arm, wide, 1, 200) if fast else (arm, wide, epochs, count)


def _one(settings: Settings, name: str, seed: int, lr: float, fast: bool) -> dict[str, float]:
    def make() -> dict[str, float]:
        began = time.perf_counter()
        x, y, tx, ty = data()
        arm, wide, epochs, count = _setting(name, fast)
        net = trained(arm, x[:count], y[:count], lr, seed, epochs, wide)
        found = {"test": right(net, tx, ty), "train": right(net, x[:count], y[:count])}
        return found | {"seconds": time.perf_counter() - began}

    return dict(
        kept(settings, SLUG, f"{name.replace(' ', '_')}-{seed}", {"lr": lr, "fast": fast, "version": 1}, make)
    )


def run(settings: Settings, fast: bool = False) -> Result:
    """Choose rates, train, judge by ``RULE``."""
    names = [*ARMS, *WIDE_ARMS]
    chosen = parallel(_rates, [(settings, n, fast) for n in names], settings, label="rates")
    rates = {n: c["lr"] for n, c in zip(names, chosen, strict=True)}
    seeds = settings.seed_list(5 if settings.full else 3)
    tasks = [(settings, n, s, rates[n], fast) for s in seeds for n in names]
    done = parallel(_one, tasks, settings, label="networks")
    found = {n: [d for t, d in zip(tasks, done, strict=True) if t[1] == n] for n in names}
    seconds = sum(d["seconds"] for d in (*chosen, *done)) / max(settings.workers, 1)
    return dataclasses.replace(judged(found, rates), seconds=seconds)


def judged(found: dict[str, list[dict[str, float]]], rates: dict[str, float]) -> Result:
    """The verdict by ``RULE``, and the rows."""

    def test(a: str, b: str) -> Gain:
        return gain([f["test"] for f in found[a]], [f["test"] for f in found[b]])

    gaps = {n: [f["train"] - f["test"] for f in found[n]] for n in WIDE_ARMS}
    alone, wide = "wide, no guide", "wide, untrained guide"
    gains = {
        "trained - none": test("trained guide", "no guide"),
        "untrained - none": test("untrained guide", "no guide"),
        "trained - distillation": test("trained guide", "logit distillation"),
        "untrained - trained": test("untrained guide", "trained guide"),
        "50 steps - none": test("trained guide, 50 steps", "no guide"),
        "trained - shuffled": test("trained guide", "trained guide, shuffled"),
        "the same debiased": test("trained guide, debiased", "trained guide, shuffled, debiased"),
        "gap of the wide net": gain(gaps[wide], gaps[alone]),
        "wide net on test": test(wide, alone),
    }
    met = [g.below() if "gap" in name else g.above() for name, g in gains.items()]
    spread = test("no guide, spread out", "trained guide, shuffled")
    unmet = ", ".join(str(k + 1) for k, m in enumerate(met) if not m) or "none"
    words = "; ".join(f"{name} {g}" for name, g in gains.items())
    rows = [
        Row(
            n, tuple(f["test"] for f in found[n]), f"lr {rates[n]:g}; training accuracy {_mean(found[n]):.3f}"
        )
        for n in found
    ]
    return Result(
        SLUG,
        TITLE,
        CLAIM,
        RULE,
        verdict_of(met),
        f"{sum(met)} of {len(met)} conditions met (all but {unmet}). {words}; spread out - shuffled {spread}.",
        "test accuracy",
        tuple(rows),
        pictures=((f"{SLUG}.png", picture(found)),),
        links={
            "paper": "https://arxiv.org/abs/2410.20035",
            "code": "https://github.com/vsubramaniam851/untrainable-networks",
        },
    )


def _mean(found: Sequence[dict[str, float]]) -> float:
    return sum(f["train"] for f in found) / len(found)


def picture(found: dict[str, list[dict[str, float]]]) -> bytes:
    """Accuracies of the deep net by what guides it, and training against test of the wide one."""
    figure, (left, right_) = subplots(1, 2, figsize=(12.5, 4.8), width_ratios=(2.4, 1))
    colours = {"debiased": "#4f7f5b", "shuffled": "#d9a441", "spread": "#d9a441", "guide": "#c8442e"}
    for k, name in enumerate(ARMS):
        values = [100 * f["test"] for f in found[name]]
        key = next((c for c in ("shuffled", "spread", "debiased") if c in name), "guide")
        colour = "#9aa5ad" if name in ("no guide", "logit distillation") else colours[key]
        left.barh(k, sum(values) / len(values), color=colour, alpha=0.85, height=0.7)
        left.plot(values, [k] * len(values), ".", color="#1d2b36")
    left.set_yticks(range(len(ARMS)), list(ARMS), fontsize=9)
    left.invert_yaxis()
    left.set_xlabel("test accuracy (%); yellow: the relation between images is destroyed")
    left.set_title(f"A net of {DEPTH} layers that hardly trains, and what helps it", loc="left", fontsize=11)
    for k, name in enumerate(WIDE_ARMS):
        for f in found[name]:
            ends = 100 * f["test"], 100 * f["train"]
            right_.plot(ends, [k, k], "-", color="#5b8db8", alpha=0.5)
            right_.plot(ends[0], k, "o", color="#c8442e")
            right_.plot(ends[1], k, "s", color="#33485a")
    right_.set_yticks(range(2), ["alone", "untrained\nguide"], fontsize=9)
    right_.set_ylim(-0.6, 1.6)
    right_.invert_yaxis()
    right_.set_xlabel("accuracy (%): test (circle), training (square)")
    right_.set_title("A wide net on 1,000 images", loc="left", fontsize=11)
    for axis in (left, right_):
        axis.spines[["top", "right"]].set_visible(False)
    return png(figure, dpi=120)
