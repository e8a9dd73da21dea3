"""f-distill: whether the weight h(r) alone decides which modes a student covers, exactly and with networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gradmatch.core.divergence import DIVERGENCES
from gradmatch.evidence._common import Gain, Result, Row, Settings, gain, parallel, tally, verdict_of
from gradmatch.evidence.generate import _f_arms as arms
from gradmatch.evidence.generate._f_picture import picture

SLUG = "f-distill"
TITLE = "One-step students in f-divergences: which modes they cover"
CLAIM = "One-step students distilled in a mode-covering f-divergence keep modes that reverse KL drops, at no loss."
SEEKING, COVERING = ("rkl", "sf", "neyman"), ("js", "sh", "kl", "jf")
COMPARED = ("rkl", "js", "kl")
RULE = (
    "One dimension (target 0.35 N(-2, 0.6^2) + 0.65 N(2, 0.6^2), a student that cannot fit both, exact scores and "
    "ratio), with the ratio as it is and clipped to [0.1, 20]: 1. reverse KL, softened reverse KL and Neyman put less "
    "than 5 % of the student's mass at the smaller mode, in every seed; 2. JS, squared Hellinger, KL and Jeffreys put "
    "20 to 60 % there, in every seed. Networks (25 Gaussians of deviation 0.1 on a grid of spacing 1, a flow of three "
    "layers of 128 as teacher, one call, ratio by a discriminator; learning rate of each divergence tuned on another "
    "seed), with equal and with falling weights of the modes: 3. every student's KL of the mode histogram is below the "
    "teacher's at one and at two calls; 4. JS is not behind reverse KL: neither its histogram's KL nor its Frechet "
    "distance is above; 5. JS's histogram is better than reverse KL's; 6. KL's histogram is better than reverse KL's; "
    "7. KL leaves a smaller effective share of the batch than JS. Above, below and better mean by two standard errors "
    "of the paired difference. Holds if all are met, holds in part if 1, 2 and 3 are, else does not hold."
)
LINKS = {
    "paper": "https://arxiv.org/abs/2502.15681",
    "code read for facts": "https://github.com/NVlabs/FastGen",
}
RATES = (2e-4, 5e-4, 1e-3)
TUNING_SEED = 100
SMALL = {"exact": 4000, "teacher": 2000, "updates": 400}
FULL = {"exact": 4000, "teacher": 6000, "updates": 4000}
METRICS = {
    "histogram": "KL of the mode histogram",
    "covered": "modes covered",
    "near": "share near a mode",
    "frechet": "Frechet distance",
}


def run(settings: Settings) -> Result:
    """Run it."""
    sizes = FULL if settings.full else SMALL
    seeds = settings.seed_list(3)
    tasks: list[tuple[Any, ...]] = [("exact", len(seeds), sizes)]
    tasks += [("tune", TUNING_SEED, sizes)]
    exact, scores = parallel(_part, tasks, settings, label="exact gradients and learning rates")
    rates = {n: min(RATES, key=lambda lr, n=n: scores[n, lr]) for n in COMPARED}  # type: ignore[misc]
    cells = [("cell", s, sizes, kind, rates) for s in seeds for kind in arms.WEIGHTS]
    found = parallel(_part, cells, settings, label="teachers and students")
    by = {(task[1], task[3]): cell for task, cell in zip(cells, found, strict=True)}
    rows = exact_rows(exact) + network_rows(by, seeds, rates)
    return judged(rows, picture(exact, by[seeds[0], "falling modes"]["samples"]))


def _part(what: str, seed: int, sizes: dict[str, int], kind: str = "", rates: Any = None) -> Any:
    if what == "exact":
        return arms.exact(seed, sizes["exact"])
    if what == "tune":
        decay = arms.WEIGHTS["falling modes"]
        net = arms.teacher(decay, seed, sizes["teacher"])
        return {
            (n, lr): _score(arms.distilled(net, decay, n, lr, sizes["updates"], seed)[0], decay, seed)
            for n in COMPARED
            for lr in RATES
        }
    decay = arms.WEIGHTS[kind]
    net = arms.teacher(decay, seed, sizes["teacher"])
    cell: dict[str, Any] = {"samples": {}}
    for calls in (1, 2, 50):
        x = arms.sampled(net, calls, seed)
        cell[f"teacher, {calls} calls"] = arms.figures(x, decay, seed)
        cell["samples"][f"teacher, {calls} call" + "s" * (calls > 1)] = x[:3000]
    for name in COMPARED:
        x, extra = arms.distilled(net, decay, name, rates[name], sizes["updates"], seed)
        cell[f"{name} student"] = arms.figures(x, decay, seed) | extra
        cell["samples"][f"{name} student, 1 call"] = x[:3000]
    cell["samples"]["the data"] = arms.grid(decay).sample(3000, torch.Generator().manual_seed(seed))
    return cell


def _score(x: torch.Tensor, decay: float, seed: int) -> float:
    return arms.figures(x, decay, seed)["histogram"]


def exact_rows(found: dict[str, torch.Tensor]) -> list[Row]:
    """Share of mass at the smaller mode."""
    return [
        Row(f"exact: mass at the smaller mode, {name}", tuple(arms.share_below(found[name]).tolist()))
        for name in found
    ]


def network_rows(by: dict[tuple[int, str], Any], seeds: Sequence[int], rates: dict[str, float]) -> list[Row]:
    """Every figure of every sampler."""
    rows = []
    for kind in arms.WEIGHTS:
        methods = [m for m in by[seeds[0], kind] if m != "samples"]
        for method in methods:
            cost = f"learning rate {rates[method.split()[0]]:g}" if "student" in method else ""
            for metric, words in METRICS.items():
                values = tuple(by[s, kind][method][metric] for s in seeds)
                rows.append(Row(f"{kind}: {words}, {method}", values, cost))
            if "student" in method:
                values = tuple(by[s, kind][method]["effective"] for s in seeds)
                rows.append(Row(f"{kind}: effective share of the batch, {method}", values, cost))
    return rows


def judged(rows: Sequence[Row], png: bytes | None = None) -> Result:
    """The verdict by the rule."""
    of = {r.method: r for r in rows}

    def mass(names: Sequence[str], low: float, high: float) -> bool:
        picked = [of[f"exact: mass at the smaller mode, {n}{c}"] for n in names for c in ("", ", clipped")]
        return all(low <= v <= high for r in picked for v in r.values)

    def difference(metric: str, a: str, b: str, kind: str) -> Gain:
        return gain(of[f"{kind}: {metric}, {a}"], of[f"{kind}: {metric}, {b}"])

    kinds, histogram = tuple(arms.WEIGHTS), METRICS["histogram"]
    js, kl, rkl = (f"{n} student" for n in ("js", "kl", "rkl"))
    met = {
        1: mass(SEEKING, 0.0, 0.05),
        2: mass(COVERING, 0.2, 0.6),
        3: all(
            difference(histogram, f"{n} student", f"teacher, {c} calls", k).below()
            for n in COMPARED
            for c in (1, 2)
            for k in kinds
        ),
        4: not any(difference(m, js, rkl, k).above() for m in (histogram, METRICS["frechet"]) for k in kinds),
        5: all(difference(histogram, js, rkl, k).below() for k in kinds),
        6: all(difference(histogram, kl, rkl, k).below() for k in kinds),
        7: all(difference("effective share of the batch", kl, js, k).below() for k in kinds),
    }
    verdict = verdict_of(list(met.values()), needed=[met[1], met[2], met[3]])
    words = ", ".join(f"{n} {of[f'exact: mass at the smaller mode, {n}'].mean:.2f}" for n in DIVERGENCES)
    gaps = "; ".join(
        f"{k}: js - rkl {difference(histogram, js, rkl, k)}, kl - rkl {difference(histogram, kl, rkl, k)}"
        for k in kinds
    )
    reason = (
        f"{tally(met)} Exact mass at the smaller mode (0.35): {words}. KL of the mode histogram of networks: {gaps}."
    )  # fmt: skip
    return Result(
        SLUG, TITLE, CLAIM, RULE, verdict, reason, "see the name of each row", tuple(rows),
        higher_is_better=False, links=LINKS,
        pictures=() if png is None else ((f"{SLUG}.png", png),),
    )  # fmt: skip
