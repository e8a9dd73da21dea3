"""Bellman step sizes and straightening, on a field known exactly and on a trained one, at equal network calls.

A: the closed-form velocity of 3,000 Fashion-MNIST images (14 x 14, smoothed by 0.1); times measured on 100 noises of
their own, judged on 300 others against 100 Euler steps. B: an MLP trained on 16 principal components, then Bellman
times, straightening at them and at uniform times, and reflow in two forms, all with the same pairs and updates; the
rate of fine-tuning is chosen for each method on held-out training images. C: eight Gaussians on a ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradmatch.evidence._common import Result, Row, Settings, gain, kept, parallel, tally, verdict_of
from gradmatch.evidence.generate import _boss_arms as arms
from gradmatch.evidence.generate import _boss_picture

SLUG = "boss"
TITLE = "BOSS: Bellman optimal step-size straightening"
CLAIM = (
    "Times found by dynamic programming sample better than uniform ones at the same few network calls, and a "
    "network straightened at them better still, and better than reflow with the same pairs and updates."
)
RULE = (
    "A difference counts if it exceeds two standard errors, paired by seed. On the exact field of real images:"
    " (1) the end-point error of Bellman times is below that of uniform times at 2, 3, 4, 6, 8 and 10 calls; "
    "(2) the Frechet distance is below at 2 and 3 calls, by a fifth on average, and (3) also at 4, 6, 8 and "
    "10. On the trained network, Frechet distance in components to test images: (4) Bellman below uniform "
    "times at 2, 4 and 6 calls before straightening; (5) BOSS below reflow with t uniform at 1, 2, 4 and 6; "
    "(6) BOSS below reflow with t in {k/K} at 2, 4 and 6 (at 1 they are the same); (7) BOSS below "
    "straightening at uniform times at 2, 4 and 6; (8) BOSS below unstraightened Bellman times at 1, 2, 4 and "
    "6. (9) On the ring the end-point error of Bellman times is below that of uniform ones at 2, 3, 4, 6 and 8"
    " calls. 'holds' if all nine are met, 'holds in part' if some are."
)

CALLS, RING_CALLS, TUNED_CALLS = (2, 3, 4, 6, 8, 10), (2, 3, 4, 6, 8), (1, 2, 4, 6)
SIZES = {"tests": 2000, "pairs": 5000, "pretrain": 3000, "tune": 750}
EXACT_TESTS = 300
RATES = [5e-4, 1.5e-3, 5e-3]
TUNING_SEED, TUNING_CALLS = 1000, 2
EXACT, NETWORK, RING = "images, exact field", "trained network", "ring"


def _one(
    settings: Settings, part: str, seed: int, sizes: dict[str, int], rates: dict[str, float]
) -> dict[str, Any]:
    """All figures of one part and seed."""

    def make() -> dict[str, Any]:
        if part == EXACT:
            return arms.exact_field(seed, CALLS, min(EXACT_TESTS, sizes["tests"]))
        if part == RING:
            return arms.ring(seed, RING_CALLS, sizes["tests"])
        return arms.trained(settings.runs / SLUG, seed, TUNED_CALLS, sizes, rates)

    name = f"{part}-{seed}".replace(" ", "-").replace(",", "")
    return dict(kept(settings, SLUG, name, {"sizes": sizes, "rates": rates, "version": 3}, make))


def _tuned(settings: Settings, method: str, sizes: dict[str, int]) -> list[float]:
    def make() -> list[float]:
        return arms.held_out(settings.runs / SLUG, method, RATES, TUNING_SEED, TUNING_CALLS, sizes)

    name = f"tune-{arms.TUNED.index(method)}"
    return list(kept(settings, SLUG, name, {"sizes": sizes, "rates": RATES, "version": 3}, make))


def run(settings: Settings) -> Result:
    """Run the three parts, judge by ``RULE``."""
    seeds = settings.seed_list(3)
    sizes = SIZES | ({"tune": 12_000} if settings.full else {})
    arms.pretrained(settings.runs / SLUG, TUNING_SEED, sizes["pretrain"])  # once, not by every task below
    scores = parallel(_tuned, [(settings, m, sizes) for m in arms.TUNED], settings, label="rates")
    rates = {m: RATES[s.index(min(s))] for m, s in zip(arms.TUNED, scores, strict=True)}
    tasks = [
        (settings, part, s, sizes, rates if part == NETWORK else {})
        for part in (NETWORK, EXACT, RING)
        for s in seeds
    ]
    done = dict(zip([t[1:3] for t in tasks], parallel(_one, tasks, settings, label="parts"), strict=True))
    rows = _rows(done, seeds, rates)
    return judged(rows, _boss_picture.picture(rows, done[EXACT, seeds[0]], seeds[0]))


def _rows(done: dict[tuple[str, int], Any], seeds: Sequence[int], rates: dict[str, float]) -> list[Row]:
    """A row for each part, figure, method and number of calls."""
    rows = []
    for part, metrics in (
        (EXACT, ("rmse", "frechet")),
        (NETWORK, ("frechet", "judge", "rmse")),
        (RING, ("rmse", "mmd")),
    ):
        mine = [done[part, s] for s in seeds]
        for metric in metrics:
            for name in mine[0]:
                method, _, calls = name.rpartition(" ")
                times = mine[0][name].get("times")
                cost = "" if times is None else "times from noise " + ", ".join(f"{1 - t:.2f}" for t in times)
                cost = f"rate {rates[method]:g}" if method in rates and part == NETWORK else cost
                values = tuple(m[name][metric] for m in mine)
                rows.append(Row(f"{part}: {NAMES[metric]}, {method}, {calls} calls", values, cost))
    return rows


NAMES = {
    "rmse": "end-point error",
    "frechet": "Frechet distance",
    "judge": "Frechet distance in the judge's features",
    "mmd": "MMD",
}


def judged(rows: list[Row], picture: bytes | None = None) -> Result:
    """The verdict by ``RULE``."""
    found = {r.method: r for r in rows}

    def below(part: str, metric: str, a: str, b: str, calls: Sequence[int]) -> bool:
        pairs = [[found[f"{part}: {NAMES[metric]}, {m}, {k} calls"] for m in (a, b)] for k in calls]
        return all(gain(x, y).below() for x, y in pairs)

    def mean(part: str, metric: str, method: str, calls: int) -> float:
        return found[f"{part}: {NAMES[metric]}, {method}, {calls} calls"].mean

    ratios = [mean(EXACT, "frechet", "Bellman", k) / mean(EXACT, "frechet", "uniform", k) for k in (2, 3)]
    met = [
        below(EXACT, "rmse", "Bellman", "uniform", CALLS),
        below(EXACT, "frechet", "Bellman", "uniform", (2, 3)) and sum(ratios) / 2 < 0.8,
        below(EXACT, "frechet", "Bellman", "uniform", (4, 6, 8, 10)),
        below(NETWORK, "frechet", "Bellman", "uniform", (2, 4, 6)),
        below(NETWORK, "frechet", "BOSS", "reflow, t uniform", TUNED_CALLS),
        below(NETWORK, "frechet", "BOSS", "reflow, t in {k/K}", (2, 4, 6)),
        below(NETWORK, "frechet", "BOSS", "straightened at uniform times", (2, 4, 6)),
        below(NETWORK, "frechet", "BOSS", "Bellman", TUNED_CALLS),
        below(RING, "rmse", "Bellman", "uniform", RING_CALLS),
    ]
    at2 = {m: mean(NETWORK, "frechet", m, 2) for m in (*arms.TUNED, "Bellman")}
    exact, ring = ([mean(p, "rmse", m, 2) for m in ("Bellman", "uniform")] for p in (EXACT, RING))
    words = (
        f"Exact field, Bellman against uniform times: end-point error at 2 calls {exact[0]:.2f} against "
        f"{exact[1]:.2f}, Frechet distance at 2 and 3 calls {ratios[0]:.2f} and {ratios[1]:.2f} of uniform's. Trained "
        f"network at 2 calls: BOSS {at2['BOSS']:.3f}, reflow {at2[arms.TUNED[0]]:.3f} and {at2[arms.TUNED[1]]:.3f}, "
        f"straightened at uniform times {at2[arms.TUNED[3]]:.3f}, before straightening {at2['Bellman']:.2f}. "
        "Ring at 2 calls: end-point error "
        f"{ring[0]:.2f} against {ring[1]:.2f}."
    )
    return Result(
        SLUG,
        TITLE,
        CLAIM,
        RULE,
        verdict_of(met),
        f"{words} {tally(met)}",
        "as each row says, at equal network calls",
        tuple(rows),
        higher_is_better=False,
        pictures=() if picture is None else ((f"{SLUG}.png", picture),),
        links={
            "paper": "https://arxiv.org/abs/2312.16414",
            "code": "https://github.com/nguyenngocbaocmt02/BOSS",
        },
    )
