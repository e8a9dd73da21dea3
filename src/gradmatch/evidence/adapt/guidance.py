"""A deep fully connected net that hardly trains on Fashion-MNIST, alone and guided by a small residual ConvNet.

E1: 32 blocks of Linear 100, batch-norm, ReLU and dropout 0.1 on 6,000 images at 14 x 14, batches of 256, 20 epochs of
Adam; three arms also with 16 and 48 blocks. The guide has 7 convolutions (16, 32, 64 channels), untrained (statistics
measured) or trained for 4 epochs on the same images; its features are computed once. Shuffled arms give every batch
the guide's features of its examples in another order: the relation is gone, the spectrum stays. "No guide, spread out"
pulls layers towards the identity. E2: a wide net (3 x 1024) on 1,000 images, 40 epochs, alone and with an untrained
guide. E3: two recurrent layers that copy 5 to 10 of ten symbols, 10 epochs of 8,000 sequences, alone and guided by an
untrained Transformer of two layers. Every arm has its rate from the same three, on 1,000 held-out training images or
sequences, with a seed of its own."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from gradmatch.core.picture import png, subplots
from gradmatch.evidence._common import Gain, Result, Row, Settings, gain, kept, parallel, verdict_of
from gradmatch.evidence.adapt import _copy_task as copying
from gradmatch.evidence.adapt import _untrainable as images

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
    "has a smaller gap between training and test accuracy, (9) and is better on test. At 16 and at 48 blocks both, "
    "(10) the trained and (11) the untrained guide are above no guide. (12) A recurrent net guided by an untrained "
    "Transformer copies better than alone, (13) and better than with the Transformer's features shuffled. 'holds' if "
    "all thirteen are met, 'holds in part' if some are, 'does not hold' if none is."
)

EPOCHS, FEW, DEPTH = 20, 50, 32
WIDE_TRAIN, WIDE_EPOCHS, COPY_EPOCHS = 1000, 40, 10
RATES = (3e-4, 1e-3, 3e-3)
TUNING_SEED = 1000
DEBIASED = {"distance": "cka_debiased"}
DEEP: dict[str, dict[str, Any]] = {
    "no guide": {},
    "logit distillation": {"distil": True},
    "trained guide": {"guide": "trained"},
    "untrained guide": {"guide": "untrained"},
    "trained guide, 50 steps": {"guide": "trained", "stop_after": FEW},
    "trained guide, shuffled": {"guide": "trained", "shuffle": True},
    "no guide, spread out": {"guide": "identity"},
    "trained guide, debiased": {"guide": "trained", **DEBIASED},
    "untrained guide, debiased": {"guide": "untrained", **DEBIASED},
    "trained guide, shuffled, debiased": {"guide": "trained", "shuffle": True, **DEBIASED},
}
OTHER_DEPTHS = (16, 48)
SWEPT = ("no guide", "untrained guide", "trained guide")
WIDE = {"wide, no guide": {}, "wide, untrained guide": {"guide": "untrained"}}
COPY: dict[str, dict[str, Any]] = {
    "copying, no guide": {},
    "copying, untrained guide": {"guide": "untrained"},
    "copying, untrained guide, shuffled": {"guide": "untrained", "shuffle": True},
    "copying, untrained guide, debiased": {"guide": "untrained", **DEBIASED},
}
ARMS = {
    **{name: {**arm, "depth": DEPTH} for name, arm in DEEP.items()},
    **{f"{d} blocks, {name}": {**DEEP[name], "depth": d} for d in OTHER_DEPTHS for name in SWEPT},
    **{name: {**arm, "wide": True} for name, arm in WIDE.items()},
    **{name: {**arm, "copying": True} for name, arm in COPY.items()},
}


def scores(name: str, lr: float, seed: int, fast: bool, tuning: bool = False) -> dict[str, float]:
    """Accuracies of one trained net: held-out while tuning, else test and training."""
    arm = ARMS[name]
    if arm.get("copying"):
        count = 256 if fast else copying.SETS["train"]
        net = copying.trained(arm, lr, seed, 1 if fast else COPY_EPOCHS, count)
        if tuning:
            return {"held": copying.right(net, "held")}
        return {"test": copying.right(net, "test"), "train": copying.right(net, "train", 2000)}
    count, epochs = (WIDE_TRAIN, WIDE_EPOCHS) if arm.get("wide") else (images.TRAIN, EPOCHS)
    count, epochs = (256, 1) if fast else (count, epochs)
    x, y, test_x, test_y = images.data()
    net = images.trained(arm, count, lr, seed, epochs)
    if tuning:
        return {"held": images.right(net, x[images.TRAIN :], y[images.TRAIN :])}
    return {"test": images.right(net, test_x, test_y), "train": images.right(net, x[:count], y[:count])}


def _rate(settings: Settings, name: str, fast: bool) -> dict[str, float]:
    """The rate of an arm, on held-out data."""

    def make() -> dict[str, float]:
        began = time.perf_counter()
        held = {lr: scores(name, lr, TUNING_SEED, fast, tuning=True)["held"] for lr in RATES}
        return {"lr": max(held, key=lambda lr: held[lr]), "seconds": time.perf_counter() - began}

    return dict(kept(settings, SLUG, f"rate-{_file(name)}", {"fast": fast, "version": 2}, make))


def _one(settings: Settings, name: str, seed: int, lr: float, fast: bool) -> dict[str, float]:
    def make() -> dict[str, float]:
        began = time.perf_counter()
        return scores(name, lr, seed, fast) | {"seconds": time.perf_counter() - began}

    return dict(kept(settings, SLUG, f"{_file(name)}-{seed}", {"lr": lr, "fast": fast, "version": 2}, make))


def _file(name: str) -> str:
    return name.replace(" ", "_")


def run(settings: Settings, fast: bool = False) -> Result:
    """Choose rates, train, judge by ``RULE``."""
    chosen = parallel(_rate, [(settings, n, fast) for n in ARMS], settings, label="rates")
    rates = {n: c["lr"] for n, c in zip(ARMS, chosen, strict=True)}
    seeds = settings.seed_list(5 if settings.full else 3)
    tasks = [(settings, n, s, rates[n], fast) for s in seeds for n in ARMS]
    done = parallel(_one, tasks, settings, label="networks")
    found = {n: [d for t, d in zip(tasks, done, strict=True) if t[1] == n] for n in ARMS}
    seconds = sum(d["seconds"] for d in (*chosen, *done)) / max(settings.workers, 1)
    return dataclasses.replace(judged(found, rates), seconds=seconds)


def judged(found: dict[str, list[dict[str, float]]], rates: dict[str, float]) -> Result:
    """The verdict by ``RULE``, and the rows."""

    def test(a: str, b: str) -> Gain:
        return gain([f["test"] for f in found[a]], [f["test"] for f in found[b]])

    gaps = {n: [f["train"] - f["test"] for f in found[n]] for n in WIDE}
    wide = "wide, untrained guide"
    gains = {
        "trained - none": test("trained guide", "no guide"),
        "untrained - none": test("untrained guide", "no guide"),
        "trained - distillation": test("trained guide", "logit distillation"),
        "untrained - trained": test("untrained guide", "trained guide"),
        "50 steps - none": test("trained guide, 50 steps", "no guide"),
        "trained - shuffled": test("trained guide", "trained guide, shuffled"),
        "the same debiased": test("trained guide, debiased", "trained guide, shuffled, debiased"),
        "gap of the wide net": gain(gaps[wide], gaps["wide, no guide"]),
        "wide net on test": test(wide, "wide, no guide"),
    }
    swept = {
        f"{name.split()[0]} - none at {d} blocks": test(f"{d} blocks, {name}", f"{d} blocks, no guide")
        for name in ("trained guide", "untrained guide")
        for d in OTHER_DEPTHS
    }
    copied = {
        "copying, guided - alone": test("copying, untrained guide", "copying, no guide"),
        "copying, guided - shuffled": test("copying, untrained guide", "copying, untrained guide, shuffled"),
    }
    above = [g.above() for g in swept.values()]
    met = [g.below() if "gap" in name else g.above() for name, g in gains.items()]
    met += [all(above[:2]), all(above[2:]), *(g.above() for g in copied.values())]
    spread = test("no guide, spread out", "trained guide, shuffled")
    unmet = ", ".join(str(k + 1) for k, m in enumerate(met) if not m) or "none"
    words = "; ".join(f"{name} {g}" for name, g in (gains | swept | copied).items())
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


COLOURS = {
    "debiased": "#4f7f5b",
    "shuffled": "#d9a441",
    "spread": "#d9a441",
    "no guide": "#9aa5ad",
    "": "#c8442e",
}


def picture(found: dict[str, list[dict[str, float]]]) -> bytes:
    """Accuracies of the deep net by what guides it; then by depth, of the wide net, and of copying."""
    figure, axes = subplots(2, 2, figsize=(13, 8.4), width_ratios=(1.9, 1), height_ratios=(2, 1))
    (deep, depths), (copied, wide) = axes
    _bars(deep, found, list(DEEP), f"A net of {DEPTH} blocks that hardly trains, and what helps it")
    deep.set_xlabel("test accuracy (%); yellow: the relation between images is destroyed")
    for name in SWEPT:
        levels = sorted((*OTHER_DEPTHS, DEPTH))
        key = {d: name if d == DEPTH else f"{d} blocks, {name}" for d in levels}
        values = [[100 * f["test"] for f in found[key[d]]] for d in levels]
        style = {"marker": "o", "linestyle": "--" if name.startswith("untrained") else "-"}
        depths.plot(levels, [sum(v) / len(v) for v in values], color=_colour(name), label=name, **style)
        for d, v in zip(levels, values, strict=True):
            depths.plot([d] * len(v), v, ".", color=_colour(name), alpha=0.5)
    depths.set_xticks(sorted((*OTHER_DEPTHS, DEPTH)))
    depths.set_xlabel("blocks")
    depths.set_ylabel("test accuracy (%)")
    depths.set_title("By depth", loc="left", fontsize=11)
    depths.legend(frameon=False, fontsize=9)
    _bars(copied, found, list(COPY), "A recurrent net copies symbols")
    copied.set_xlabel("copied symbols that are right (%)")
    for k, name in enumerate(WIDE):
        for f in found[name]:
            ends = 100 * f["test"], 100 * f["train"]
            wide.plot(ends, [k, k], "-", color="#5b8db8", alpha=0.5)
            wide.plot(ends[0], k, "o", color="#c8442e")
            wide.plot(ends[1], k, "s", color="#33485a")
    wide.set_yticks(range(2), ["alone", "untrained\nguide"], fontsize=9)
    wide.set_ylim(-0.6, 1.6)
    wide.invert_yaxis()
    wide.set_xlabel("accuracy (%): test (circle), training (square)")
    wide.set_title("A wide net on 1,000 images", loc="left", fontsize=11)
    for axis in (deep, depths, copied, wide):
        axis.spines[["top", "right"]].set_visible(False)
    return png(figure, dpi=120)


def _colour(name: str) -> str:
    return next(c for key, c in COLOURS.items() if key in name)


def _bars(axis: Any, found: dict[str, list[dict[str, float]]], names: Sequence[str], title: str) -> None:
    for k, name in enumerate(names):
        values = [100 * f["test"] for f in found[name]]
        colour = "#9aa5ad" if name == "logit distillation" else _colour(name)
        axis.barh(k, sum(values) / len(values), color=colour, alpha=0.85, height=0.7)
        axis.plot(values, [k] * len(values), ".", color="#1d2b36")
    axis.set_yticks(range(len(names)), [n.removeprefix("copying, ") for n in names], fontsize=9)
    axis.invert_yaxis()
    axis.set_title(title, loc="left", fontsize=11)
