"""Residual super-resolution by four, its one-step students with spectrum and feature losses, and guidance in sampling.

No infrared set is at hand offline; two sets of grey images stand in: Fashion-MNIST (28 x 28 from 7 x 7), and 32 x 32
crops of scikit-image's photographs, trained and tested on different columns. Small images are blurred, averaged and
noisy. The same network is trained as a diffusion of 15 steps and, for the same updates, as a regression. Students in
four variants get the same pairs and updates; the weight of each loss is chosen on held-out training images. Features
are those of two small classifiers; a third network, the judge, measures accuracy and distances of features.
"""

from __future__ import annotations

from typing import Any

from gradmatch.evidence._common import Result, Row, Settings, gain, kept, parallel, tally, verdict_of
from gradmatch.evidence.generate import _difiisr_arms as arms
from gradmatch.evidence.generate import _difiisr_picture

SLUG = "difiisr"
TITLE = "DifIISR: super-resolution guided by spectrum and perception"
CLAIM = (
    "Losses of spectrum and of features, added when a residual diffusion of 15 steps is distilled to one, bring "
    "super-resolved images nearer to true spectra and make them serve a network better, at little cost in PSNR."
)
RULE = (
    "A difference counts if it exceeds two standard errors, paired by seed; each pair of conditions is for garments "
    "and for photographs. (1, 2) The student with the visual loss has a log-spectrum error above the small image's "
    "Nyquist frequency at least 10% below the plain student's, at a mean PSNR at most 0.3 dB lower. (3) With the "
    "perceptual loss the judge's accuracy on garments is at least one point above the plain student's; (4) on "
    "photographs its feature distance to the truth is below. (5, 6) With both losses the high-band error and the "
    "feature distance are below the plain student's. (7, 8) Regression has the highest PSNR and the largest high-band"
    " error of itself, the 15 steps and the plain student. (9, 10) The plain student's mean PSNR is at most 0.3 dB "
    "below that of the 15 steps. (11, 12) The 15 steps have a higher PSNR than bicubic enlargement. (13, 14) Guidance"
    " by the small image lowers the mean difference from it at a shift of 0.01 and raises it at 0.1. 'holds' if all "
    "fourteen are met, 'holds in part' if some are. The published weights of 0.001, ancestral steps and other guides "
    "are shown and not judged."
)

SIZES = {"steps": 1000, "extractor": 400, "pairs": 1000, "student": 150}
GRID = [0.001, 0.01, 0.1, 0.3]
SETS = (arms.GARMENTS, arms.PHOTOS)
NAMES = {
    "psnr": "PSNR in dB",
    "ssim": "SSIM",
    "spectrum": "log-spectrum error",
    "high": "log-spectrum error, high band",
    "features": "distance in the judge's features",
    "accuracy": "judge's accuracy",
    "consistency": "mean difference from the small image",
}


def _teacher(settings: Settings, data: str, kind: str, seed: int, sizes: dict[str, int]) -> None:
    if kind == "extractors":
        arms.extractors(settings.runs / SLUG, sizes["extractor"])
    else:
        arms.trained(settings.runs / SLUG, data, kind, seed, sizes["steps"])


def _chosen(settings: Settings, data: str, sizes: dict[str, int]) -> dict[str, float]:
    def make() -> dict[str, float]:
        return arms.weights_of(settings.runs / SLUG, data, sizes, GRID)

    return dict(kept(settings, SLUG, f"weights-{data}", {"sizes": sizes, "grid": GRID, "version": 1}, make))


def _one(
    settings: Settings, data: str, seed: int, sizes: dict[str, int], chosen: dict[str, float]
) -> dict[str, Any]:
    """All figures of one set and seed."""

    def make() -> dict[str, Any]:
        return arms.measured(settings.runs / SLUG, data, seed, sizes, chosen)

    config = {"sizes": sizes, "chosen": chosen, "version": 1}
    return dict(kept(settings, SLUG, f"figures-{data}-{seed}", config, make))


def run(settings: Settings) -> Result:
    """Train, distil, sample, judge by ``RULE``."""
    seeds = settings.seed_list(3)
    sizes = SIZES | ({"steps": 20_000, "pairs": 10_000, "student": 3000} if settings.full else {})
    every = [(settings, d, k, s, sizes) for d in SETS for s in seeds for k in ("teacher", "regression")]
    parallel(_teacher, [(settings, SETS[0], "extractors", 0, sizes), *every], settings, label="networks")
    chosen = dict(zip(SETS, parallel(_chosen, [(settings, d, sizes) for d in SETS], settings, label="weights"),
                      strict=True))  # fmt: skip
    tasks = [(settings, d, s, sizes, chosen[d]) for d in SETS for s in seeds]
    done = dict(zip([t[1:3] for t in tasks], parallel(_one, tasks, settings, label="images"), strict=True))
    rows = _rows(done, seeds, chosen)
    return judged(rows, _difiisr_picture.picture(rows, settings.runs / SLUG / "images"))


def _rows(
    done: dict[tuple[str, int], Any], seeds: list[int], chosen: dict[str, dict[str, float]]
) -> list[Row]:
    """A row for each set, figure and method."""
    rows = []
    for data in SETS:
        mine, w = [done[data, s] for s in seeds], chosen[data]
        costs = {
            "regression": "1 call", "student, plain": "1 call", "student, visual": f"1 call, weight {w['visual']:g}",
            "student, perceptual": f"1 call, weight {w['perceptual']:g}",
            "student, both": f"1 call, weights {w['visual']:g} and {w['perceptual']:g}",
            "student, both at 0.001": "1 call",
        }  # fmt: skip
        for figure in NAMES:
            for name in mine[0]:
                if figure not in mine[0][name]:
                    continue
                cost = costs.get(name, "15 calls" if name.startswith("15") else "")
                values = tuple(m[name][figure] for m in mine)
                rows.append(Row(f"{data}: {NAMES[figure]}, {name}", values, cost))
    return rows


def judged(rows: list[Row], picture: bytes | None = None) -> Result:
    """The verdict by ``RULE``."""
    found = {r.method: r for r in rows}

    def row(data: str, figure: str, name: str) -> Row:
        return found[f"{data}: {NAMES[figure]}, {name}"]

    def gap(data: str, figure: str, a: str, b: str) -> Any:
        return gain(row(data, figure, a), row(data, figure, b))

    def mean(data: str, figure: str, name: str) -> float:
        return row(data, figure, name).mean

    def sharper(data: str) -> bool:
        plain = [0.9 * v for v in row(data, "high", "student, plain").values]
        cheap = mean(data, "psnr", "student, visual") >= mean(data, "psnr", "student, plain") - 0.3
        return gain(row(data, "high", "student, visual"), plain).below() and cheap

    plain, others = "student, plain", ("15 steps", "student, plain")
    met = [sharper(d) for d in SETS]
    met.append(gap(arms.GARMENTS, "accuracy", "student, perceptual", plain).above(0.01))
    met.append(gap(arms.PHOTOS, "features", "student, perceptual", plain).below())
    met += [all(gap(d, f, "student, both", plain).below() for f in ("high", "features")) for d in SETS]
    met += [all(gap(d, f, "regression", o).above() for f in ("psnr", "high") for o in others) for d in SETS]
    met += [mean(d, "psnr", plain) >= mean(d, "psnr", "15 steps") - 0.3 for d in SETS]
    met += [gap(d, "psnr", "15 steps", "bicubic").above() for d in SETS]
    met += [
        gap(d, "consistency", "15 steps, guided by 0.01", "15 steps").below()
        and gap(d, "consistency", "15 steps, guided by 0.1", "15 steps").above()
        for d in SETS
    ]
    parts = []
    for d in SETS:
        change = 1 - mean(d, "high", "student, visual") / mean(d, "high", plain)
        cost = mean(d, "psnr", plain) - mean(d, "psnr", "student, visual")
        parts.append(
            f"on {d} the visual loss takes {change:.0%} off the student's high-band error for {cost:.2f} dB, and "
            f"feature distances are {mean(d, 'features', plain):.3f} plain, "
            f"{mean(d, 'features', 'student, perceptual'):.3f} "
            f"perceptual, {mean(d, 'features', 'student, both'):.3f} both"
        )
    accuracy = [mean(arms.GARMENTS, "accuracy", n) for n in (plain, "student, perceptual", "the truth")]
    words = "; ".join(parts)
    words = (
        f"{words[0].upper()}{words[1:]}; the judge is right on {accuracy[0]:.3f} plain, {accuracy[1]:.3f} perceptual, "
        f"{accuracy[2]:.3f} true garments."
    )
    return Result(
        SLUG,
        TITLE,
        CLAIM,
        RULE,
        verdict_of(met),
        f"{words} {tally(met)}",
        "as each row says",
        tuple(rows),
        higher_is_better=False,
        pictures=() if picture is None else ((f"{SLUG}.png", picture),),
        links={"paper": "https://arxiv.org/abs/2503.01187", "code": "https://github.com/zirui0625/DifIISR"},
    )
