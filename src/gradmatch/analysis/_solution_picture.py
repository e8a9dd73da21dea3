"""A comparison of optimizers as one picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gradmatch.core.picture import blank, png

if TYPE_CHECKING:
    from gradmatch.analysis._solution_report import SolutionReport

COLOURS = ("#2f6fab", "#d08a1d", "#1b7f5c", "#b23a48", "#7b4fa3", "#5b6770", "#c05f9a", "#3aa6a6")
MOST = 28
"""Metrics shown."""


def draw(report: SolutionReport, title: str = "") -> bytes:
    """PNG: every metric by optimizer, rates tried, and for a stream what is left of each task and class codes."""
    stream = "final_acc" in report.metrics
    figure = blank(figsize=(13, 8.2))
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    _fingerprints(left.subplots(), report)
    panels = right.subplots(2, 1, height_ratios=(1, 1.1))
    _rates(panels[0], report, stream)
    if stream:
        _matrices(right, panels[1], report)
    else:
        _trade(panels[1], report)
    figure.suptitle(title or _title(report), fontsize=12, x=0.01, ha="left")
    return png(figure, dpi=120)


def _title(report: SolutionReport) -> str:
    what = {"train_loss": "training loss", "new_task_acc": "accuracy on new tasks"}.get(
        report.matched_on or "", ""
    )
    return f"Solutions at equal {what} ({report.target:.3g})" if what else "Solutions, each at its best rate"


def _fingerprints(axis: Any, report: SolutionReport) -> None:
    """Rows of metrics, columns of optimizers; colour is the distance from the row's mean in its noise."""
    names, metrics = report.optimizers, report.metrics[:MOST]
    means = np.array([[np.mean(report.values(m, n)) for n in names] for m in metrics])
    noise = np.array([[np.std(report.values(m, n)) for n in names] for m in metrics])
    spread = np.sqrt((noise**2).mean(1, keepdims=True)) + 0.02 * np.abs(means).max(1, keepdims=True) + 1e-12
    shade = np.tanh((means - means.mean(1, keepdims=True)) / (4 * spread))
    axis.imshow(np.nan_to_num(shade), cmap="PuOr_r", vmin=-1.6, vmax=1.6, aspect="auto")
    for i, row in enumerate(means):
        for j, value in enumerate(row):
            axis.text(j, i, f"{value:.3g}±{noise[i, j]:.1g}", ha="center", va="center", fontsize=7)
    sure = {p.metric for p in report.differences()}
    axis.set_yticks(range(len(metrics)), [f"{m} *" if m in sure else m for m in metrics], fontsize=8)
    axis.set_xticks(range(len(names)), names, fontsize=9)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("mean ± deviation over seeds; * differs at a false discovery rate of 5 %", fontsize=8)


def _rates(axis: Any, report: SolutionReport, stream: bool) -> None:
    """What was kept against what was learned, or held-out accuracy against the rate, over the grid of rates."""
    for k, name in enumerate(report.optimizers):
        own = [c for c in report.curve if c["optimizer"] == name]
        rates = sorted({c["rate"] for c in own}, key=lambda r: (r is None, r))
        of = {r: [c for c in own if c["rate"] == r] for r in rates}
        if stream:
            x = [np.mean([c["new_task_acc"] for c in of[r]]) for r in rates]
            y = [np.mean([c["final_acc"] for c in of[r]]) for r in rates]
            for r in rates:
                axis.plot(
                    [c["new_task_acc"] for c in of[r]],
                    [c["final_acc"] for c in of[r]],
                    ".",
                    color=COLOURS[k % 8],
                    alpha=0.35,
                )
        else:
            x = [np.nan if r is None else r for r in rates]
            y = [np.mean([c["held_acc"] for c in of[r]]) for r in rates]
        axis.plot(x, y, "o-", color=COLOURS[k % 8], label=name, markersize=5)
    axis.set_xscale("linear" if stream else "log")
    axis.set_xlabel("accuracy on each task when just learned" if stream else "learning rate", fontsize=9)
    axis.set_title(
        "accuracy on all tasks in the end" if stream else "held-out accuracy", fontsize=10, loc="left"
    )
    axis.legend(fontsize=8, frameon=False)
    _plain(axis)


def _trade(axis: Any, report: SolutionReport) -> None:
    """Two metrics against each other, a point a seed."""
    wanted = [
        m
        for m in ("hessian_trace", "margin", "test_acc", "weight_stable_rank", "hoyer")
        if m in report.metrics
    ]
    across, up = (wanted * 2)[:2] if wanted else (report.metrics[0], report.metrics[-1])
    for k, name in enumerate(report.optimizers):
        for at, marker, alpha in (("matched", "o", 0.95), ("best", "x", 0.6)):
            if any(r["at"] == at for r in report.rows):
                label = f"{name}, {at}"
                x, y = (report.values(m, name, at) for m in (across, up))
                axis.plot(x, y, marker, color=COLOURS[k % 8], alpha=alpha, label=label)
    axis.set_xlabel(across, fontsize=9)
    axis.set_title(f"{up} against {across}", fontsize=10, loc="left")
    axis.legend(fontsize=7, frameon=False, ncols=2)
    _plain(axis)


def _matrices(figure: Any, axis: Any, report: SolutionReport) -> None:
    """A[i, j] and class cosines of every optimizer, from 0 (dark) to 1, mean over the seeds."""
    axis.set_axis_off()
    names = report.optimizers
    for k, name in enumerate(names):
        runs = [d for key, d in report.details.items() if key.startswith(f"{name}/{report.at}/")]
        for row, (key, shades) in enumerate((("accuracies", "viridis"), ("class_cosines", "magma"))):
            own = axis.inset_axes((k / len(names), 0.5 - 0.52 * row, 0.9 / len(names), 0.42))
            values = np.nanmean(np.array([d[key] for d in runs], dtype=float), 0)
            own.imshow(values, cmap=shades, vmin=0, vmax=1)
            own.set_xticks([])
            own.set_yticks([])
            if row == 0:
                own.set_title(name, fontsize=8)
    axis.text(0, 0.99, "accuracy on task (across) after task (down)", fontsize=8, transform=axis.transAxes)
    axis.text(0, 0.42, "cosines of class means of hidden activations", fontsize=8, transform=axis.transAxes)


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
