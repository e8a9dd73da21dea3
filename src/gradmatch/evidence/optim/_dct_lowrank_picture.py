"""Picture of the experiment with low-rank AdamW."""

from __future__ import annotations

from typing import Any

import torch

from gradmatch.core.bases import basis
from gradmatch.core.picture import png, subplots
from gradmatch.evidence._common import Result
from gradmatch.evidence.optim.dct_lowrank import (
    ADAMW,
    DCT,
    FEEDBACK,
    FIXED,
    GRADIENTS,
    IMAGES,
    KINDS,
    PROJECTORS,
    RANDOM,
    SLOW,
    STILL,
    SVD,
    TEXT,
    Found,
    gradients,
    matrix,
)

COLORS = {
    ADAMW: "black",
    SVD: "#4c72b0",
    SLOW: "#8fb1dd",
    DCT: "#c44e52",
    FEEDBACK: "#8c1b20",
    STILL: "#e7a3a5",
    RANDOM: "#8c8c8c",
    FIXED: "#c9c9c9",
}


def picture(result: Result, found: Found) -> bytes:
    """Energy that columns of the basis keep, errors of projection, losses; the first pixels' columns chosen."""
    figure, axes = subplots(2, 3, figsize=(14, 7.4), width_ratios=[1, 1, 1.15])
    slopes = gradients(0)
    _energy(axes[0, 0], matrix(KINDS[1], 0), f"{KINDS[1]} (smooth projected axis)")
    _energy(axes[1, 0], slopes[GRADIENTS[0]].double(), f"gradient, {GRADIENTS[0]} projected")
    _energy(axes[0, 1], slopes[GRADIENTS[2]].double(), f"gradient, {GRADIENTS[2]} projected")
    _errors(axes[1, 1], result)
    for axis, task in ((axes[0, 2], TEXT), (axes[1, 2], IMAGES)):
        _losses(axis, result, task, [m for t, m in found if t == task])
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return png(figure, dpi=120)


def _energy(axis: Any, g: Any, title: str) -> None:
    """Share of the squared norm that r directions keep, for every r."""
    d, total = g.shape[1], g.square().sum()
    place = torch.arange(1, d + 1) / d
    kept = {
        SVD: torch.linalg.svdvals(g).square(),
        DCT: (g @ basis("dct2", d, g.dtype)).square().sum(0).sort(descending=True).values,
        RANDOM: (g @ basis("random", d, g.dtype)).square().sum(0).sort(descending=True).values,
    }
    for name, energy in kept.items():
        shares = energy.cumsum(0) / total
        axis.plot(place[: len(shares)], shares, color=COLORS[name], label=name, linewidth=2)
    axis.plot(place, place, ":", color="0.6", label="bound, r / d")
    axis.set_xscale("log")
    axis.set_xlabel("r / d")
    axis.set_title(f"{title}: energy kept", loc="left", fontsize=10)
    axis.legend(fontsize=8)


def _errors(axis: Any, result: Result) -> None:
    names = (*KINDS, *GRADIENTS)
    for k, p in enumerate(PROJECTORS):
        rows = [result.row(f"{p}, error on {name}") for name in names]
        axis.barh(
            [i + 0.2 * (k - 1.5) for i in range(len(rows))],
            [r.mean for r in rows],
            0.2,
            color=COLORS[p],
            label=p,
        )
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.legend(fontsize=8)
    axis.set_title("relative squared error of projection", loc="left", fontsize=10)


def _losses(axis: Any, result: Result, task: str, methods: list[str]) -> None:
    rows = sorted((result.row(f"{m}, {task}").mean, m) for m in methods)
    for i, (_, method) in enumerate(rows):
        row = result.row(f"{method}, {task}")
        axis.errorbar(row.mean, i, xerr=row.std, fmt="o", color=COLORS[method], capsize=3, markersize=8)
        axis.plot(row.values, [i] * len(row.values), ".", color=COLORS[method], alpha=0.5)
    axis.set_yticks(range(len(rows)), [m for _, m in rows])
    axis.invert_yaxis()
    axis.set_title(f"{task}: test loss (nats), best of three rates", loc="left", fontsize=10)
