"""Reflection between a strong and a weak model, on a mixture known exactly and on networks, at counted network calls.

A: one dimension, modes at -4 and 4 that should weigh the same; the strong model gives the left one 0.25, the weak one
0.05, and both predict the noise exactly. B: trousers and bags of Fashion-MNIST at 14 x 14; the strong network has seen
5,000 trousers and 2,500 bags, the weak ones 500 or 250 bags. The judge counts bags, and measures the Frechet distance
to balanced test images. Beside the plain sampler stand the roles exchanged, and plain extrapolation of the noise away
from the weak model, which costs two calls a step. At 100 calls three settings of each are compared on held-out
training images, with noises of their own, and the better ones go on.
"""

from __future__ import annotations

import itertools
from typing import Any

from gradmatch.evidence._common import Result, Row, Settings, gain, kept, parallel, tally, verdict_of
from gradmatch.evidence.generate import _w2sd_arms as arms
from gradmatch.evidence.generate import _w2sd_picture

SLUG = "w2sd"
TITLE = "W2SD: weak-to-strong diffusion with reflection"
CLAIM = (
    "One step forward with a strong model and one back with a weak one before each step brings samples nearer to the "
    "data than the strong model's own, without training, also at equal network calls."
)
RULE = (
    "A difference counts if it exceeds two standard errors, paired by seed; the gap is the distance of a mode's share"
    " from one half. Exact mixture: (1) W2SD has a smaller gap than the strong model alone at lambda 49, 25 and 10; "
    "(2) so it has in 49 calls (T 25, lambda 12) against 50; (3) S2WD, the swap inside only and the ideal as the weak"
    " model have larger gaps than the strong model alone; (4) a weak model equal to the strong one changes the share "
    "by less than 0.02; (5) the weaker the weak model (0.2, 0.1, 0.05, 0.02), the smaller the gap; (6) W2SD's modes "
    "are no narrower than the plain sampler's; (7) at 49 calls its gap is smaller than extrapolation's by 1 at 50, "
    "and (8) at 148 calls smaller than extrapolation's by 1 at 148. Networks, for each weak one (500 and 250 bags): "
    "(9, 10) W2SD with lambda 49 and with lambda 25 has a smaller gap and a smaller Frechet distance than the strong "
    "network at as many calls or more; (11, 12) so has it in 49 calls against 50; (13, 14) S2WD and the swap inside "
    "have larger gaps than the strong network; (15, 16) at 100 calls each, with settings chosen on held-out images, "
    "W2SD's Frechet distance is below extrapolation's. 'holds' if all sixteen are met, 'holds in part' if some are."
)

SIZES = {"exact": 20_000, "steps": 2000, "samples": 500}
BAGS = (500, 250)
EXACT = "mixture"
PLAIN, MANY = "strong, T 50", "strong, T 148"
FULL, HALF, SHORT = "W2SD, T 50, lambda 49", "W2SD, T 50, lambda 25", "W2SD, T 25, lambda 12"
SWAPS = ("S2WD, T 50, lambda 49", "swap inside only, T 50, lambda 49")


def _networks(settings: Settings, seed: int, bags: int, sizes: dict[str, int]) -> None:
    arms.network(settings.runs / SLUG, seed, bags, sizes["steps"])


def _chosen(settings: Settings, bags: int, sizes: dict[str, int]) -> dict[str, str]:
    def make() -> dict[str, str]:
        return arms.tuning(settings.runs / SLUG, 0, bags, sizes)

    return dict(kept(settings, SLUG, f"chosen-{bags}", {"sizes": sizes, "version": 1}, make))


def _one(
    settings: Settings, bags: int, seed: int, sizes: dict[str, int], chosen: dict[str, str]
) -> dict[str, Any]:
    """All figures of one part and seed; no bags: the exact mixture."""

    def make() -> dict[str, Any]:
        if not bags:
            return arms.exact(seed, sizes["exact"])
        return arms.trained(settings.runs / SLUG, seed, bags, sizes, chosen)

    config = {"sizes": sizes, "chosen": chosen, "version": 1}
    return dict(kept(settings, SLUG, f"part-{bags}-{seed}", config, make))


def run(settings: Settings) -> Result:
    """Train the networks, draw by every method, judge by ``RULE``."""
    seeds = settings.seed_list(3)
    sizes = SIZES | ({"steps": 10_000, "samples": 2000} if settings.full else {})
    every = [(settings, s, b, sizes) for s in seeds for b in (arms.STRONG_MINORITY, *BAGS)]
    parallel(_networks, every, settings, label="networks")
    chosen = dict(zip(BAGS, parallel(_chosen, [(settings, b, sizes) for b in BAGS], settings, label="settings"),
                      strict=True))  # fmt: skip
    tasks = [(settings, b, s, sizes, chosen.get(b, {})) for b in (*BAGS, 0) for s in seeds]
    done = dict(zip([t[1:3] for t in tasks], parallel(_one, tasks, settings, label="samples"), strict=True))
    floor = arms.floors(sizes["samples"])
    rows = [
        *_rows(done, seeds),
        Row("real images: share of the minority", (floor["share"],), "balanced test images, by the judge"),
        Row(
            "real images: Frechet distance",
            (floor["frechet"],),
            f"two draws of {sizes['samples']}: the noise floor",
        ),
    ]
    return judged(rows, chosen, _w2sd_picture.picture(rows, settings.runs / SLUG / "images", chosen))


def title(bags: int) -> str:
    """What rows of one part begin with."""
    return f"weak of {bags} bags" if bags else EXACT


def _rows(done: dict[tuple[int, int], Any], seeds: list[int]) -> list[Row]:
    """A row for each part, method and figure."""
    rows = []
    for bags in (0, *BAGS):
        mine = [done[bags, s] for s in seeds]
        for name in mine[0]:
            calls = f"{mine[0][name]['calls']} calls"
            for figure in ("share", "gap", "frechet" if bags else "std"):
                values = tuple(
                    abs(m[name]["share"] - 0.5) if figure == "gap" else m[name][figure] for m in mine
                )
                rows.append(Row(f"{title(bags)}: {NAMES[figure]}, {name}", values, calls))
    return rows


NAMES = {
    "share": "share of the minority",
    "gap": "gap to one half",
    "frechet": "Frechet distance",
    "std": "deviation within modes",
}


def judged(rows: list[Row], chosen: dict[int, dict[str, str]], picture: bytes | None = None) -> Result:
    """The verdict by ``RULE``."""
    found = {r.method: r for r in rows}

    def row(bags: int, figure: str, name: str) -> Row:
        return found[f"{title(bags)}: {NAMES[figure]}, {name}"]

    def below(bags: int, a: str, b: str, figures: tuple[str, ...] = ("gap",)) -> bool:
        return all(gain(row(bags, f, a), row(bags, f, b)).below() for f in figures)

    weaker = [f"W2SD, weak of weight {w:g}" for w in arms.SHARPER]
    order = [*weaker[:2], FULL, weaker[2]]
    equal = abs(row(0, "share", "W2SD, weak is strong").mean - row(0, "share", PLAIN).mean)
    met = [
        all(below(0, a, PLAIN) for a in (FULL, HALF, "W2SD, T 50, lambda 10")),
        below(0, SHORT, PLAIN),
        all(below(0, PLAIN, b) for b in (*SWAPS, "W2SD, weak is the ideal")),
        equal < 0.02,
        all(below(0, b, a) for a, b in itertools.pairwise(order)),
        not gain(row(0, "std", FULL), row(0, "std", PLAIN)).below(),
        below(0, SHORT, "extrapolation by 1, T 25"),
        below(0, FULL, "extrapolation by 1, T 74"),
    ]
    both = ("gap", "frechet")
    met += [below(b, FULL, MANY, both) and below(b, HALF, "strong, T 100", both) for b in BAGS]
    met += [below(b, SHORT, PLAIN, both) for b in BAGS]
    met += [all(below(b, PLAIN, swap) for swap in SWAPS) for b in BAGS]
    rivals = {b: [f"{kind}, {chosen[b][kind]}" for kind in ("W2SD", "extrapolation")] for b in BAGS}
    met += [below(b, rivals[b][0], rivals[b][1], ("frechet",)) for b in BAGS]
    shares = [row(0, "share", n).mean for n in (PLAIN, FULL, SHORT, "extrapolation by 1, T 25")]
    words = (
        f"The exact share goes from {shares[0]:.2f} to {shares[1]:.2f} with lambda 49 (ideal 0.5) and to "
        f"{shares[2]:.2f} at equal calls, where extrapolation has {shares[3]:.2f}"
    )
    for b in BAGS:
        drawn = [row(b, "share", n).mean for n in (PLAIN, "weak, T 50", FULL)]
        ends = [row(b, "frechet", n).mean for n in (PLAIN, FULL, SHORT, *rivals[b])]
        words += (
            f"; networks, weak of {b} bags: shares {drawn[0]:.2f} strong, {drawn[1]:.2f} weak, {drawn[2]:.2f} W2SD, "
            f"Frechet distances {ends[0]:.2f} strong, {ends[1]:.2f} W2SD with lambda 49, {ends[2]:.2f} at equal calls, "
            f"and at 100 calls with chosen settings {ends[3]:.2f} W2SD, {ends[4]:.2f} extrapolation"
        )
    return Result(
        SLUG,
        TITLE,
        CLAIM,
        RULE,
        verdict_of(met),
        f"{words}. {tally(met)}",
        "as each row says, with the network calls that each sample took",
        tuple(rows),
        higher_is_better=False,
        pictures=() if picture is None else ((f"{SLUG}.png", picture),),
        links={
            "paper": "https://arxiv.org/abs/2502.00473",
            "code": "https://github.com/xie-lab-ml/Weak-to-Strong-Diffusion-with-Reflection",
        },
    )
