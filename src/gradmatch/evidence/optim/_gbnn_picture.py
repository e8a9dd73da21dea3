"""The picture of the boosting experiment: a decision growing unit by unit, and what is left when units go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradmatch.core.picture import blank, png
from gradmatch.evidence._common import Row
from gradmatch.optim import GBNNClassifier

SHOWN = ("digits", "breast cancer", "Friedman-1")


def picture(rows: Sequence[Row], cells: dict[str, list[dict[str, Any]]]) -> bytes:
    """A PNG of both."""
    figure = blank(figsize=(11, 6.6))
    halves: Any = figure.subfigures(2, 1, height_ratios=(0.9, 1))
    _draw_decisions(halves[0].subplots(1, 5))
    axes = halves[1].subplots(1, 3)
    for axis, name in zip(axes, SHOWN, strict=True):
        _draw_kept(axis, name, rows, cells[name])
    axes[0].legend(fontsize=7, frameon=False, loc="lower right")
    return png(figure)


def _draw_decisions(axes: Any) -> None:
    """Two spirals after 1, 3, 10, 40 and 160 units."""
    rng = np.random.default_rng(0)
    y = np.arange(400) % 2
    turn = np.sqrt(rng.random(400)) * 2.2 * np.pi
    X = np.stack([turn * np.cos(turn + np.pi * y), turn * np.sin(turn + np.pi * y)], 1) / 3
    X = X + 0.08 * rng.standard_normal(X.shape)
    model = GBNNClassifier(total_units=160, eta=0.5, l2=1e-4, restarts=2, random_state=0).fit(X, y)
    line = np.linspace(-2.6, 2.6, 160)
    grid = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
    for axis, t in zip(axes, (1, 3, 10, 40, model.n_steps_), strict=True):
        p = model.predict_proba(grid, min(t, model.n_steps_))[:, 1].reshape(160, 160)
        axis.imshow(
            p, extent=(-2.6, 2.6, -2.6, 2.6), origin="lower", cmap="RdBu_r", vmin=0, vmax=1, alpha=0.8
        )
        axis.scatter(*X.T, c=y, cmap="RdBu_r", s=5, edgecolors="white", linewidths=0.2)
        axis.set_title(f"{t} unit{'s' if t > 1 else ''}", fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])


def _draw_kept(axis: Any, name: str, rows: Sequence[Row], cells: list[dict[str, Any]]) -> None:
    """Quality against the share of units kept."""
    curves = np.array(
        [
            np.interp(np.linspace(0, 1, 61), np.linspace(0, 1, len(c["prefixes"])), c["prefixes"])
            for c in cells
        ]
    )
    share = np.linspace(0, 100, 61)
    mean, spread = curves.mean(0), curves.std(0)
    axis.plot(share, mean, color="#1f6f8b", label="boosted, last units off")
    axis.fill_between(share, mean - spread, mean + spread, color="#1f6f8b", alpha=0.15, lw=0)
    full = next(r.mean for r in rows if r.method.endswith(f"{name}, MLP by L-BFGS"))
    kept = [float(np.mean([c["removed"][s] for c in cells])) for s in ("0.25", "0.5", "0.75")]
    axis.plot(
        [25, 50, 75, 100],
        [*kept, full],
        "o-",
        color="#b5542f",
        ms=4,
        label="trained as a whole, random units off",
    )
    regression = name == "Friedman-1"
    axis.set(
        xlabel="% of the hidden units kept", title=f"{name}: test {'RMSE' if regression else 'accuracy (%)'}"
    )
    if regression:
        axis.set_ylim(1, 8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.title.set_size(10)
