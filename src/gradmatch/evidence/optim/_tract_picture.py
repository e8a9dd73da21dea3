"""The picture of the TrAct experiment: loss curves on ill-conditioned inputs, and accuracy against epochs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradmatch.core.picture import png, subplots
from gradmatch.evidence._common import Row

COLOURS = {"plain": "#8a8a8a", "TrAct 0.1": "#1f6f8b", "TrAct 0.01": "#d9a441", "TrAct 0.001": "#c8553d"}


def picture(
    rows: Sequence[Row], curves: dict[str, list[dict[float, list[float]]]], arms: Sequence[Any], goal: float
) -> bytes:
    """A PNG; ``curves`` has the losses every ten steps by method, seed and rate."""
    panels = list(dict.fromkeys((a.net, a.optimizer) for a in arms if a.inputs == "contrast"))
    figure, axes = subplots(
        1, 1 + len(panels), figsize=(3.4 + 2.3 * len(panels), 3.6), width_ratios=[1.6, *[1] * len(panels)],
    )  # fmt: skip
    _losses(axes[0], curves, goal)
    by = {r.method: r for r in rows}
    for axis, (net, name) in zip(axes[1:], panels, strict=True):
        for method in ("plain", "TrAct 0.1"):
            of = [a for a in arms if a[:2] == (net, name) and a.method == method and a.inputs == "contrast"]
            found = [by[str(a)] for a in of]
            axis.errorbar(
                [a.epochs for a in of], [r.mean for r in found], yerr=[r.std for r in found],
                marker="o", markersize=4, color=COLOURS[method], label=method,
            )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_xticks([a.epochs for a in of], [str(a.epochs) for a in of])
        axis.minorticks_off()
        axis.set_xlabel("epochs", fontsize=9)
        axis.set_title(f"{net}, {name}", fontsize=9, loc="left")
    axes[1].set_ylabel("test accuracy (%)", fontsize=9)
    axes[1].legend(fontsize=8, frameon=False)
    for axis in axes:
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return png(figure)


def _losses(axis: Any, curves: dict[str, list[dict[float, list[float]]]], goal: float) -> None:
    """Every method at the rate that ends soonest, one line a seed."""
    for method, found in curves.items():
        lr = min(found[0], key=lambda lr: np.mean([len(f[lr]) if f[lr][-1] <= goal else 1e9 for f in found]))
        for k, f in enumerate(found):
            steps = 10 * np.arange(len(f[lr]))
            label = f"{method}, rate {lr:g}" if k == 0 else None
            axis.plot(steps, f[lr], color=COLOURS[method], linewidth=1, label=label)
    axis.axhline(goal, color="#33485a", linewidth=0.8, linestyle=":")
    axis.set_xscale("symlog", linthresh=10)
    axis.set_yscale("log")
    axis.set_xlabel("steps", fontsize=9)
    axis.set_title("loss on ill-conditioned inputs", fontsize=9, loc="left")
    axis.legend(fontsize=8, frameon=False)
