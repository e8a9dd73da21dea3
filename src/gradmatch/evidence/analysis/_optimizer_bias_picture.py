"""One page about optimizers and solutions: what is kept, how codes relate, what pruning leaves."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradmatch.analysis import SolutionReport
from gradmatch.core.picture import blank, png
from gradmatch.datasets.fashion_mnist import NAMES

COLOURS = {
    "SGD": "#8a8f98",
    "SGD, one epoch": "#c0c4ca",
    "Adam": "#b23a48",
    "Adagrad": "#d08a1d",
    "Shampoo": "#1b7f5c",
    "Shampoo, averaged 0.995": "#2f6fab",
    "Shampoo, averaged 0.95": "#9cc3e6",
}
SHOWN = ("Adam", "Adagrad", "Shampoo")
LINES = {
    "SGD": ("#8a8f98", "-"),
    "SGD, alpha 2": ("#1b7f5c", "-"),
    "SGD, alpha 3": ("#2f6fab", "-"),
    "SGD, alpha 4": ("#9cc3e6", "-"),
    "Adam": ("#b23a48", "--"),
    "Adam, alpha 2 on the step": ("#d08a1d", "--"),
    "Adam, alpha 2 on the gradient": ("#e8a8ae", ":"),
}


def picture(found: dict[str, SolutionReport]) -> bytes:
    """A PNG."""
    figure = blank(figsize=(13, 7))
    above, below = figure.subfigures(2, 1, height_ratios=(1.3, 1))
    panels = above.subplots(1, 3)
    _curves(panels[0], [found["pairs"], found["stopped"]], "pairs of classes")
    _curves(panels[1], [found["permuted"]], "permuted pixels")
    _pruning(panels[2], found["sparsity"])
    for axis in panels:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    _maps(below, found["pairs"])
    return png(figure, dpi=120)


def _curves(axis: Any, reports: list[SolutionReport], title: str) -> None:
    for report in reports:
        for name in report.optimizers:
            own = [c for c in report.curve if c["optimizer"] == name]
            rates = sorted({c["rate"] for c in own})
            x, y = (
                [np.mean([c[k] for c in own if c["rate"] == r]) for r in rates]
                for k in ("new_task_acc", "final_acc")
            )
            axis.plot(x, y, "o-", color=COLOURS[name], label=name, markersize=4)
            axis.plot(
                [c["new_task_acc"] for c in own],
                [c["final_acc"] for c in own],
                ".",
                color=COLOURS[name],
                alpha=0.3,
                ms=3,
            )
        if report.target is not None:
            axis.axvline(report.target, color="#bbbbbb", linewidth=0.8, linestyle=":")
    axis.set_xlabel("accuracy on each task when just learned, over rates", fontsize=9)
    axis.set_title(f"accuracy on all tasks in the end: {title}", fontsize=10, loc="left")
    axis.legend(fontsize=7, frameon=False)


def _pruning(axis: Any, report: SolutionReport) -> None:
    shares = (0, 50, 80, 90, 95)
    for name in report.optimizers:
        metrics = ["test_acc", *(f"acc_pruned_{s}" for s in shares[1:])]
        values = np.array([report.values(m, name) for m in metrics])
        colour, line = LINES[name]
        axis.plot(
            range(len(shares)), values.mean(1), line, color=colour, label=name, marker="o", markersize=3
        )
    axis.set_xticks(range(len(shares)), [f"{s} %" for s in shares])
    axis.set_xlabel("weights set to zero", fontsize=9)
    axis.set_title("test accuracy after pruning", fontsize=10, loc="left")
    axis.legend(fontsize=7, frameon=False)


def _maps(figure: Any, report: SolutionReport) -> None:
    """What is left of each pair after each, and cosines of class means, mean over the seeds."""
    shown = [n for n in SHOWN if n in report.optimizers]
    axes = figure.subplots(1, 2 * len(shown))
    figure.suptitle(
        "at equal new-task accuracy: accuracy on a pair (across) after learning a pair (down); cosines of class means",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    for k, name in enumerate(shown):
        runs = [d for key, d in report.details.items() if key.startswith(f"{name}/matched/")]
        for axis, key, shades in (
            (axes[k], "accuracies", "viridis"),
            (axes[len(shown) + k], "class_cosines", "magma"),
        ):
            values = np.nanmean(np.array([d[key] for d in runs], dtype=float), 0)
            axis.imshow(values, cmap=shades, vmin=0, vmax=1)
            axis.set_title(name, fontsize=9)
            axis.tick_params(length=0, labelsize=6)
            if key == "accuracies":
                axis.set_xticks(range(len(values)), [f"{2 * i}+{2 * i + 1}" for i in range(len(values))])
                axis.set_yticks(range(len(values)), [f"{2 * i}+{2 * i + 1}" for i in range(len(values))])
                for i, j in np.ndindex(values.shape):
                    shade = "white" if values[i, j] < 0.6 else "black"
                    axis.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=6, color=shade)
            else:
                axis.set_xticks([])
                axis.set_yticks(range(10), NAMES if k == 0 else [], fontsize=6)
