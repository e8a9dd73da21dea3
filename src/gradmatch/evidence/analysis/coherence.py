"""Coherence of gradients for real, noisy and random labels, and what keeping only agreed directions does to memorising.

Fashion-MNIST, 2,000 training and 2,000 test images a seed. Noise redraws a share of the labels uniformly, so that a
tenth of these stays right. Networks are ReLU MLPs with weights N(0, 2 / fan_in) and zero biases.

Coherence: 784-100-10, SGD at rate 0.05, batches of 60; measured on the whole training set after some epochs, with
inputs centred per pixel (judged) and standardised with one mean and deviation (shown). The same networks with half of
the labels redrawn give the scores that should find the wrong ones.

Robust averages: 14 x 14 pixels, standardised, 64 hidden units, half of the labels redrawn, or none. The pilot's rate of
0.1 for all, and each method's own from one grid by held-out training images with noisy labels.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.analysis import RobustGradient, coherence, example_scores
from gradmatch.core.examples import Examples
from gradmatch.core.problem import Problem
from gradmatch.datasets import fashion_mnist
from gradmatch.datasets.label_noise import with_label_noise
from gradmatch.evidence._common import (
    PREPROCESSINGS,
    Result,
    Row,
    Settings,
    accuracy,
    gain,
    halved,
    hold_out,
    kept,
    parallel,
    per_class,
    verdict_of,
)
from gradmatch.evidence.analysis._coherence_picture import picture
from gradmatch.evidence.analysis._nets import relu_mlp

SLUG = "coherence"
TITLE = "Coherence: On the Generalization Mystery in Deep Learning"
CLAIM = (
    "Early in training, gradients of different examples agree far more for real labels than for random ones; averages "
    "that keep only what examples agree on (winsorised gradients, medians of micro-batches) memorise wrong labels less "
    "and generalise better."
)
RULE = (
    "(1) With inputs centred per pixel, m-coherence is higher for real labels than with half of them "
    "redrawn, and higher there than for random ones, after epochs 1 and 2, in every seed. With half of "
    "the labels redrawn, test accuracy after the last epoch, paired by seed: (2) winsorised gradients (c "
    "= 2 of 50) and (3) M3 (three micro-batches of 5) exceed SGD by at least 5 points on average and by "
    "two standard errors, all at rate 0.1; (4), (5) the same with each method's own rate, chosen from one "
    "grid on held-out training images with noisy labels. With clean labels, at rate 0.1, (6) winsorised "
    "gradients and (7) M3 lose at most 2 points on average. (8) After each of the epochs 1, 2, 5 and 10 "
    "the class-conditional score tells wrong labels with an AUC above 0.8 by two standard errors (centred "
    "inputs). 'holds' if all eight are met, 'holds in part' if some are, 'does not hold' if none is. "
    "Other rows are shown and not judged."
)

PER_CLASS, HELD = 200, 50
LABELS = {"real": 0.0, "50% noise": 0.5, "random": 1.0}
EPOCHS = (0, 1, 2, 5, 10, 20, 40, 60)
JUDGED_EPOCHS, SCORE_EPOCHS = (1, 2), (1, 2, 5, 10)
SCORES = ("class", "crowd", "loss")
RATE, RATES, TUNING_SEEDS = 0.1, (0.03, 0.1, 0.3), (1000,)
METHODS: dict[str, tuple[str, int, int, dict[str, int]]] = {
    "SGD, batch 50": ("mean", 50, 60, {}),
    "winsorised c=2, batch 50": ("winsor", 50, 60, {"c": 2}),
    "winsorised c=4, batch 50": ("winsor", 50, 60, {"c": 4}),
    "SGD, batch 15": ("mean", 15, 30, {}),
    "M3 of 3 x 5": ("median", 15, 30, {"groups": 3}),
    "RM3, batch 15": ("rm3", 15, 30, {}),
    "SGD, batch 9": ("mean", 9, 30, {}),
    "M3 of 3 x 3": ("median", 9, 30, {"groups": 3}),
}
"""Name: method, batch, epochs, options."""
PAIRS = (("winsorised c=2, batch 50", "SGD, batch 50"), ("M3 of 3 x 5", "SGD, batch 15"))


@lru_cache(maxsize=1)
def _all() -> tuple[Examples, Examples]:
    found = fashion_mnist()
    return found.train, found.test


@lru_cache(maxsize=4)
def _data(seed: int, scaling: str, small: bool) -> tuple[Examples, Examples, Examples]:
    """Training, test and held-out images; scaled by the training part."""
    rest, train = hold_out(_all()[0], PER_CLASS, seed)
    test, held = per_class(_all()[1], PER_CLASS, seed), per_class(rest, HELD, seed)
    if small:
        train, test, held = halved(train), halved(test), halved(held)
    scale = PREPROCESSINGS[scaling]
    return (*scale(train, test), scale(train, held)[1])


# --- coherence in training -----------------------------------------------------------------------------------


def _followed(settings: Settings, seed: int, labels: str, scaling: str) -> dict[str, Any]:
    """m-coherence, training accuracy and, with half of the labels redrawn, AUCs after some epochs."""

    def make() -> dict[str, Any]:
        train = _data(seed, scaling, False)[0]
        noisy, wrong = with_label_noise(train, LABELS[labels], seed)
        network = relu_mlp((784, 100, 10), seed)
        optimizer = torch.optim.SGD(network.parameters(), 0.05)
        found: dict[str, Any] = {"m": {}, "accuracy": {}, "auc": {}, "lowest": []}
        order = torch.Generator().manual_seed(seed)
        for epoch in range(EPOCHS[-1] + 1):
            if epoch in EPOCHS:
                _measure(found, epoch, network, noisy, wrong, labels)
            for own in torch.split(torch.randperm(len(noisy), generator=order), 60):
                optimizer.zero_grad()
                torch.autograd.backward(F.cross_entropy(network(noisy.x[own]), noisy.y[own]))
                optimizer.step()
        return found

    config = {"epochs": list(EPOCHS), "per_class": PER_CLASS, "version": 1}
    name = f"followed-{labels}-{scaling}-{seed}".replace(" ", "-")
    return dict(kept(settings, SLUG, name, config, make))


def _measure(
    found: dict[str, Any], epoch: int, network: nn.Module, data: Examples, wrong: Tensor, labels: str
) -> None:
    problem = Problem(network, "cross_entropy", (data.x, data.y), batch_size=500)
    found["m"][str(epoch)] = coherence(problem, chunk=500).m_coherence
    with torch.no_grad():
        found["accuracy"][str(epoch)] = accuracy(network(data.x), data.y)
    if labels == "50% noise" and epoch in SCORE_EPOCHS:
        scores = {
            "class": example_scores(problem),
            "crowd": example_scores(problem, by="crowd"),
            "loss": -problem.example_losses(),
        }
        found["auc"][str(epoch)] = {k: auc(wrong, -v) for k, v in scores.items()}
        if epoch == 5:
            found["lowest"] = scores["class"].argsort()[:10].tolist()


def auc(positive: Tensor, scores: Tensor) -> float:
    """Chance that a positive example scores above another one, ties counted half."""
    from scipy.stats import rankdata

    ranks = torch.from_numpy(rankdata(scores.numpy()))
    n = int(positive.sum())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(scores) - n)))


# --- robust averages -----------------------------------------------------------------------------------------


def _trained(settings: Settings, seed: int, name: str, noise: float, rate: float) -> dict[str, Any]:
    """Test, held-out and training accuracy after every epoch."""

    def make() -> dict[str, Any]:
        train, test, held = _data(seed, "standardised", True)
        noisy, suspect = with_label_noise(train, noise, seed)[0], with_label_noise(held, noise, seed + 1)[0]
        network = relu_mlp((196, 64, 10), seed)
        found: dict[str, list[float]] = {"test": [], "held": [], "train": []}
        for _ in _epochs(network, noisy, name, rate, seed):
            with torch.no_grad():
                for key, part in (("test", test), ("held", suspect), ("train", noisy)):
                    found[key].append(accuracy(network(part.x), part.y))
        return found

    config = {"method": list(METHODS[name]), "per_class": PER_CLASS, "version": 1}
    part = f"trained-{name}-{noise}-{rate}-{seed}".replace(" ", "-").replace(",", "").replace("=", "")
    return dict(kept(settings, SLUG, part, config, make))


def _epochs(network: nn.Module, data: Examples, name: str, rate: float, seed: int) -> Any:
    """Train by one of the methods; yields after every epoch."""
    method, batch, epochs, options = METHODS[name]
    optimizer = torch.optim.SGD(network.parameters(), rate)
    robust = None if method == "mean" else RobustGradient(optimizer, method, **options)  # type: ignore[arg-type]
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        whole = len(data) // batch * batch  # micro-batches of one size
        for own in torch.split(torch.randperm(len(data), generator=order)[:whole], batch):
            x, y = data.x[own], data.y[own]
            if robust is None:
                optimizer.zero_grad()
                torch.autograd.backward(F.cross_entropy(network(x), y))
                optimizer.step()
            elif method == "winsor":
                robust.step(Problem(network, "cross_entropy", (x, y)))
            else:
                size = batch // options.get("groups", 1)
                robust.step(
                    lambda i, x=x, y=y, size=size: F.cross_entropy(  # type: ignore[misc]
                        network(x[i * size : (i + 1) * size]), y[i * size : (i + 1) * size]
                    )
                )
        yield


# --- the run ---------------------------------------------------------------------------------------------------


def run(settings: Settings) -> Result:
    """Follow coherence, train by every method, judge by ``RULE``."""
    seeds = settings.seed_list(3)
    followed_tasks = [(settings, s, n, c) for c in ("centred", "standardised") for n in LABELS for s in seeds]
    paired = tuple(dict.fromkeys(itertools.chain.from_iterable(PAIRS)))
    tuning = [(settings, s, m, 0.5, r) for m in paired for r in RATES for s in TUNING_SEEDS]
    noisy = [(settings, s, m, 0.5, RATE) for m in METHODS for s in seeds]
    clean = [(settings, s, m, 0.0, RATE) for m in paired for s in seeds]
    followed = dict(
        zip(
            [(n, c, s) for _, s, n, c in followed_tasks],
            parallel(_followed, followed_tasks, settings, label="coherence"),
            strict=True,
        )
    )
    tried = _by_task(settings, tuning, "rates")
    own = {
        m: max(RATES, key=lambda r: sum(tried[m, 0.5, r, s]["held"][-1] for s in TUNING_SEEDS))
        for m in paired
    }
    tuned = [(settings, s, m, 0.5, own[m]) for m in paired for s in seeds]
    trained = _by_task(settings, noisy + clean + [t for t in tuned if t not in noisy], "robust averages")
    rows = [*_coherence_rows(followed, seeds), *_training_rows(trained, own, seeds)]
    return _judged(rows, own, picture(followed, trained, seeds, _suspects(followed, seeds[0])))


def _by_task(settings: Settings, tasks: list[tuple[Any, ...]], label: str) -> dict[Any, dict[str, Any]]:
    found = parallel(_trained, tasks, settings, label=label)
    return {(m, noise, rate, s): f for (_, s, m, noise, rate), f in zip(tasks, found, strict=True)}


def _suspects(followed: dict[Any, dict[str, Any]], seed: int) -> list[tuple[Tensor, int, int]]:
    """Images of the lowest class-conditional scores after epoch 5, with their given and true labels."""
    train = _data(seed, "raw", False)[0]
    noisy = with_label_noise(train, 0.5, seed)[0]
    return [
        (train.x[i, 0], int(noisy.y[i]), int(train.y[i]))
        for i in followed["50% noise", "centred", seed]["lowest"]
    ]


def _coherence_rows(followed: dict[Any, dict[str, Any]], seeds: list[int]) -> list[Row]:
    rows = []
    for scaling, epoch, labels in itertools.product(("centred", "standardised"), EPOCHS, LABELS):
        runs = [followed[labels, scaling, s] for s in seeds]
        fit = sum(r["accuracy"][str(epoch)] for r in runs) / len(runs)
        values = tuple(r["m"][str(epoch)] for r in runs)
        rows.append(
            Row(f"m-coherence, {labels}, epoch {epoch}, {scaling}", values, f"training accuracy {fit:.2f}")
        )
    for scaling, epoch, score in itertools.product(("centred", "standardised"), SCORE_EPOCHS, SCORES):
        values = tuple(followed["50% noise", scaling, s]["auc"][str(epoch)][score] for s in seeds)
        rows.append(Row(f"AUC of wrong labels, {score}, epoch {epoch}, {scaling}", values))
    return rows


def _training_rows(trained: dict[Any, dict[str, Any]], own: dict[str, float], seeds: list[int]) -> list[Row]:
    kinds = [(m, 0.5, RATE, f"{m}, 50% noise") for m in METHODS]
    kinds += [(m, 0.5, own[m], f"{m}, 50% noise, own rate") for m in own]
    kinds += [(m, 0.0, RATE, f"{m}, clean") for m in own]
    rows = []
    for method, noise, rate, name in kinds:
        runs = [trained[method, noise, rate, s] for s in seeds]
        fit = sum(r["train"][-1] for r in runs) / len(runs)
        rows.append(
            Row(name, tuple(r["test"][-1] for r in runs), f"rate {rate:g}; training accuracy {fit:.3f}")
        )
        if method in own and name.endswith("noise"):
            stops = [max(range(len(r["held"])), key=lambda e, r=r: r["held"][e]) for r in runs]  # type: ignore[misc]
            values = tuple(r["test"][e] for r, e in zip(runs, stops, strict=True))
            at = sum(stops) / len(stops) + 1
            rows.append(
                Row(f"{name}, stopped on held-out noisy labels", values, f"epoch {at:.1f} on average")
            )
    return rows


def _judged(rows: list[Row], own: dict[str, float], png: bytes) -> Result:
    found = {r.method: r for r in rows}

    def m(labels: str, epoch: int) -> tuple[float, ...]:
        return found[f"m-coherence, {labels}, epoch {epoch}, centred"].values

    ordered = [
        a > b > c for e in JUDGED_EPOCHS for a, b, c in zip(*(m(labels, e) for labels in LABELS), strict=True)
    ]
    gains = {
        f"{robust}{rates}": gain(found[f"{robust}, 50% noise{rates}"], found[f"{plain}, 50% noise{rates}"])
        for rates in ("", ", own rate")
        for robust, plain in PAIRS
    }
    lost = {r: gain(found[f"{p}, clean"], found[f"{r}, clean"]) for r, p in PAIRS}
    aucs = [found[f"AUC of wrong labels, class, epoch {e}, centred"] for e in SCORE_EPOCHS]
    clear = [gain(r.values, [0.8] * len(r.values)).above() for r in aucs]
    met = [
        all(ordered),
        *(g.mean >= 0.05 and g.above() for g in gains.values()),
        *(g.mean <= 0.02 for g in lost.values()),
        all(clear),
    ]
    stopped = {p: found[f"{p}, 50% noise, stopped on held-out noisy labels"].mean for _, p in PAIRS}
    words = f"m-coherence ordered in {sum(ordered)} of {len(ordered)} seeds and epochs; under noise, "
    words += "; ".join(f"{k} - SGD {g}" for k, g in gains.items())
    words += "; lost with clean labels, " + ", ".join(f"{k} {g}" for k, g in lost.items())
    words += f"; AUC of the class-conditional score {min(r.mean for r in aucs):.2f} to {max(r.mean for r in aucs):.2f}"
    words += ". SGD stopped early on held-out noisy labels reaches " + ", ".join(
        f"{v:.3f} ({k.split(', ')[1]})" for k, v in stopped.items()
    )
    flipped = all(a < c for a, c in zip(m("real", EPOCHS[-1]), m("random", EPOCHS[-1]), strict=True))
    words += f"; by epoch {EPOCHS[-1]} the order of m-coherence has {'' if flipped else 'not '}turned round, as fitted "
    words += "examples have no gradient."
    return Result(
        SLUG,
        TITLE,
        CLAIM,
        RULE,
        verdict_of(met),
        f"{words} Conditions met: {sum(met)} of {len(met)}.",
        "m-coherence, AUC or test accuracy, as named",
        tuple(rows),
        pictures=((f"{SLUG}.png", png),),
        links={"paper": "https://arxiv.org/abs/2203.10036", "M3": "https://arxiv.org/abs/2003.07422"},
    )
