"""Picture of the experiment with Lion and the program search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradmatch.core.picture import png, subplots
from gradmatch.evidence._common import Result
from gradmatch.evidence.optim.lion import (
    ADAMW,
    CELLS,
    CHAINS,
    CONSTANTS,
    EVOLUTION,
    LION,
    NETWORKS,
    SINGLE,
    STAGES,
)


def picture(
    result: Result,
    known: dict[tuple[str, int], list[float]],
    searched: dict[tuple[str, int], dict[str, Any]],
    seeds: Sequence[int],
) -> bytes:
    """Accuracy by batch size; the searches' curves; what is left on other rows; a program found, and simplified."""
    figure, axes = subplots(2, 3, figsize=(14, 7.6), width_ratios=[1, 1.2, 1.1], height_ratios=[1, 1])
    colors = {LION: "#c44e52", ADAMW: "#4c72b0"}
    for axis, network in zip(axes[:, 0], NETWORKS, strict=True):
        batches = [b for n, b, _ in CELLS if n == network]
        for k, (method, color) in enumerate(colors.items()):
            own = [result.row(f"{method}, {network}, batch {b}") for b in batches]
            places = [i + 0.12 * (2 * k - 1) for i in range(len(batches))]
            axis.errorbar(
                places,
                [r.mean for r in own],
                [r.std for r in own],
                fmt="o",
                color=color,
                capsize=3,
                label=method,
            )
            for place, r in zip(places, own, strict=True):
                axis.plot([place] * len(r.values), r.values, ".", color=color, alpha=0.5)
        axis.set_xticks(range(len(batches)), [f"batch {b}" for b in batches])
        axis.set_xlim(-0.5, len(batches) - 0.5)
        axis.set_title(f"{network} on Fashion-MNIST: test accuracy", loc="left", fontsize=10)
        axis.legend(fontsize=8)
    lines = {EVOLUTION: "#c44e52", SINGLE: "#8c8c8c", CHAINS: "#55a868", CONSTANTS: "#dd8452"}
    axis = axes[0, 1]
    for name, color in lines.items():
        for s in seeds:
            curve = [x / known["AdamW", s][0] for x in searched[name, s]["curve"]]
            axis.plot(
                range(1, len(curve) + 1),
                curve,
                color=color,
                linewidth=1.4,
                label=name if s == seeds[0] else None,
            )
    axis.axhline(1, color=colors[ADAMW], linestyle="--", label="AdamW, rate tuned")
    axis.set_xscale("log")
    axis.set_xlabel("mutations")
    axis.set_title("best loss on the proxy / tuned AdamW's", loc="left", fontsize=10)
    axis.legend(fontsize=8)
    axis = axes[1, 1]
    for k, (name, color) in enumerate(lines.items()):
        for i in range(len(STAGES)):
            ratios = [searched[name, s]["scores"][i] / known["AdamW", s][i] for s in seeds]
            axis.plot(
                [i + 0.17 * (k - 1.5)] * len(ratios), ratios, "o", color=color, label=name if i == 0 else None
            )
    axis.axhline(1, color=colors[ADAMW], linestyle="--")
    axis.set_xticks(range(len(STAGES)), [s.replace(", ", ",\n") for s in STAGES])
    axis.set_title("what is left of it elsewhere (below the line is better)", loc="left", fontsize=10)
    first = searched[EVOLUTION, seeds[0]]
    for axis, key, title in zip(
        axes[:, 2], ("found", "simplified"), ("as evolution found it", "simplified"), strict=True
    ):
        axis.axis("off")
        axis.set_title(f"seed {seeds[0]}: {title}", loc="left", fontsize=10)
        axis.text(0, 0.98, first[key].rstrip(), family="monospace", fontsize=7.5, va="top")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return png(figure, dpi=120)
