"""Picture of the experiment with diffGrad."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gradmatch.core.picture import png, subplots
from gradmatch.evidence._common import Result
from gradmatch.evidence.optim.diffgrad import (
    ADAM,
    COLUMNS,
    FRICTION_STEPS,
    FUNCTIONS,
    HALF,
    OURS,
    RATES,
    descend,
)


def picture(
    result: Result, friction: list[dict[str, list[float]]], cells: Sequence[tuple[str, int]]
) -> bytes:
    """The two functions with their paths; accuracy against rate in every cell; the friction's histogram."""
    figure, axes = subplots(2, 4, figsize=(14, 6.2))
    colors = {HALF: "#8fb1dd", ADAM: "#4c72b0", OURS: "#c44e52"}
    panels = (
        (axes[0, 0], "F1", ("Adam 0.1", "diffGrad 0.1", "Adam 0.05"), "F1: where 300 steps end"),
        (axes[0, 1], "F2", ("Adam 0.1", "diffGrad 0.1", "Adam 0.05"), "F2: where 300 steps end"),
        (axes[0, 2], "F1", ("Adam 0.1", "diffGrad 0.2"), "F1: diffGrad at twice the rate"),
    )
    for axis, f, columns, title in panels:
        x = torch.linspace(-1.05, 0.75, 500, dtype=torch.float64)
        axis.plot(x, FUNCTIONS[f](x), color="0.7", linewidth=2)
        for k, column in enumerate(columns):
            path = descend(f, *COLUMNS[column])
            color = colors[HALF if column == "Adam 0.05" else ADAM if column.startswith("Adam") else OURS]
            axis.plot(path[::2, 0], path[::2, 1] + 0.05 * (k + 1), ".", color=color, markersize=3, alpha=0.6)
            axis.plot(path[-1, 0], path[-1, 1], "o", color=color, markersize=10 - 2.5 * k, label=column)
        axis.set_title(title, loc="left", fontsize=10)
        axis.legend(fontsize=8)
    axis = axes[0, 3]
    for k, color in zip(FRICTION_STEPS, ("#f0b7a4", "#dd8452", "#8c3b1d"), strict=True):
        counts = torch.tensor([s[str(k)][2:] for s in friction]).sum(0)
        edges = torch.linspace(0.5, 0.6, len(counts) + 1)
        axis.stairs(
            (counts / counts.sum()).tolist(), edges.tolist(), color=color, label=f"step {k}", linewidth=1.8
        )
    axis.set_yscale("log")
    axis.set_title("friction of the weights (at least 0.5)", loc="left", fontsize=10)
    axis.legend(fontsize=8)
    for axis, (data, batch) in zip(axes[1], cells, strict=True):
        for method, color in colors.items():
            rows = [(rate, result.row(f"{method}, {data}, batch {batch}, rate {rate:g}")) for rate in RATES]
            axis.errorbar(
                [rate for rate, _ in rows],
                [100 * r.mean for _, r in rows],
                [100 * r.std for _, r in rows],
                color=color,
                label=method,
                marker="o",
                capsize=2,
                linewidth=5 if method == HALF else 1.5,
                markersize=4,
            )
        axis.set_xscale("log")
        axis.set_title(f"{data}, batch {batch}", loc="left", fontsize=10)
        axis.set_xlabel("lr")
    axes[1, 0].set_ylabel("test accuracy (%)")
    figure.supxlabel(
        "Lower row: if diffGrad were more than Adam at half its rate, the red curves would leave the light blue ones.",
        fontsize=10,
    )
    axes[1, 0].legend(fontsize=8)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return png(figure, dpi=120)
