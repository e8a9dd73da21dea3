"""U-REPA at small scale: a flow whose middle is drawn towards an encoder; its relations, what it knows, its samples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from gradmatch.core.tap import evaluating
from gradmatch.evidence._common import Gain, Result, Row, Settings, gain, parallel, tally, verdict_of
from gradmatch.evidence.generate import _repa_arms as arms
from gradmatch.evidence.generate._repa_picture import picture

SLUG = "u-repa"
TITLE = "A flow's middle drawn towards an encoder's relations"
CLAIM = "A U-Net flow trains faster when its middle is aligned with a vision encoder, by tokens and by their relations."
RULE = (
    "A flow of 16 x 16 Fashion-MNIST in a U-Net of three levels, every arm with the same steps, draws and rate; the "
    "learning rate is the best of the unaligned arm's on another seed, by held-out images. The encoder is a small "
    "classifier of labels, a stand-in for a large vision model. 1. The mismatch of the raw middle's relations with the "
    "encoder's, on test images, is less with U-REPA than with tokens alone in the middle; 2. with tokens in the middle "
    "it is less than with tokens at the first block; 3. a linear probe of the middle is more accurate with U-REPA than "
    "without alignment; 4. the Frechet distance of samples, in the features of another network, is not worse with "
    "U-REPA than without; 5. it is better than without; 6. it is better than with tokens at the first block; 7. it is "
    "better than with tokens alone in the middle. Each by two standard errors of the paired difference (4: not worse "
    "by two). Holds if all are met; holds in part if 1 and 4 are; else does not hold."
)
LINKS = {"paper": "https://arxiv.org/abs/2503.18414"}
RATES = (1e-3, 2e-3)
TUNING_SEED = 100
SMALL = {"images": 12_000, "encoder": 300, "steps": 250, "samples": 500}
FULL = {"images": 58_000, "encoder": 900, "steps": 5000, "samples": 2000}
LOOKS = (0.25, 0.5, 0.75)
"""Shares of the training after which samples are judged as well; shown, not judged by the rule."""
METRICS = {
    "frechet": "Frechet distance",
    "probe": "probe of the middle",
    "mismatch": "mismatch of the middle's relations",
}


def run(settings: Settings) -> Result:
    """Run it."""
    sizes = FULL if settings.full else SMALL
    seeds = settings.seed_list(3)
    tuned = parallel(_tuned, [(lr, sizes) for lr in RATES], settings, label="learning rate")
    rate = min(zip(tuned, RATES, strict=True))[1]
    tasks = [(arm, seed, rate, sizes) for seed in seeds for arm in arms.ARMS]
    found = parallel(_one, tasks, settings, label="flows")
    by = {(arm, seed): one for (arm, seed, _, _), one in zip(tasks, found, strict=True)}
    rows = [
        Row(
            f"{words}, {arm}", tuple(by[arm, s][metric] for s in seeds), f"{sizes['steps']} steps at {rate:g}"
        )
        for metric, words in METRICS.items()
        for arm in arms.ARMS
    ]
    marks = looks(sizes["steps"])
    rows += [
        Row(f"Frechet distance at {mark} steps, {arm}", tuple(by[arm, s]["on the way"][mark] for s in seeds))
        for mark in marks
        for arm in arms.ARMS
    ]
    rows.append(
        Row("encoder's accuracy on held-out images", tuple(by["U-REPA", s]["encoder"] for s in seeds))
    )
    return judged(rows, picture(rows, {arm: by[arm, seeds[0]]["samples"] for arm in arms.ARMS}))


@lru_cache(maxsize=1)
def _encoder(images: int, steps: int) -> tuple[Any, Any, float]:
    """The encoder of all arms, its features of the training images that are used, and its accuracy."""
    x, y = arms.images()["train"]
    arms.images()["train"] = (x[:images], y[:images])
    teacher, accuracy = arms.encoder(steps, 0)
    return teacher, arms.cached(teacher), accuracy


def _tuned(lr: float, sizes: dict[str, int]) -> float:
    teacher, features, _ = _encoder(sizes["images"], sizes["encoder"])
    net = arms.fit(teacher, features, "no alignment", lr, sizes["steps"], TUNING_SEED)
    return arms.frechet(arms.generated(net, sizes["samples"], TUNING_SEED), "held out")


def looks(steps: int) -> list[int]:
    """The steps after which samples are judged on the way, fewest first.

    >>> looks(1500)
    [375, 750, 1125]
    """
    return sorted({max(1, round(share * steps)) for share in LOOKS} - {steps})


def _one(arm: str, seed: int, lr: float, sizes: dict[str, int]) -> dict[str, Any]:
    teacher, features, accuracy = _encoder(sizes["images"], sizes["encoder"])
    marks, found = looks(sizes["steps"]), {}

    def look(step: int, net: Any) -> None:
        if step in marks:
            with evaluating(net):
                found[step] = arms.frechet(arms.generated(net, sizes["samples"], seed), "test")

    net = arms.fit(teacher, features, arm, lr, sizes["steps"], seed, look)
    samples = arms.generated(net, sizes["samples"], seed)
    return {
        "on the way": found,
        "frechet": arms.frechet(samples, "test"),
        "probe": arms.probe(net, seed),
        "mismatch": arms.relations(net, teacher, seed),
        "encoder": accuracy,
        "samples": samples[:10],
    }


def judged(rows: Sequence[Row], png: bytes | None = None) -> Result:
    """The verdict by the rule."""
    of = {r.method: r for r in rows}

    def gap(metric: str, a: str, b: str) -> Gain:
        return gain(of[f"{METRICS[metric]}, {a}"], of[f"{METRICS[metric]}, {b}"])

    ours, none, first, middle = "U-REPA", "no alignment", "tokens, first block", "tokens, middle"
    met = {
        1: gap("mismatch", ours, middle).below(),
        2: gap("mismatch", middle, first).below(),
        3: gap("probe", ours, none).above(),
        4: not gap("frechet", ours, none).above(),
        5: gap("frechet", ours, none).below(),
        6: gap("frechet", ours, first).below(),
        7: gap("frechet", ours, middle).below(),
    }
    means = "; ".join(
        f"{words} "
        + ", ".join(f"{of[f'{words}, {arm}'].mean:.3g} {arm}" for arm in (none, first, middle, ours))
        for words in METRICS.values()
    )
    reason = (
        f"{tally(met)} {means}. Frechet distance, U-REPA - no alignment {gap('frechet', ours, none)}."
    )  # fmt: skip
    return Result(
        SLUG, TITLE, CLAIM, RULE, verdict_of(list(met.values()), needed=[met[1], met[4]]), reason,
        "see the name of each row", tuple(rows), higher_is_better=False, links=LINKS,
        pictures=() if png is None else ((f"{SLUG}.png", png),),
    )  # fmt: skip
