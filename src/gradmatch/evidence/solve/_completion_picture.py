"""The picture of the matrix-completion experiment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradmatch.core.picture import blank, png
from gradmatch.evidence._common import Row
from gradmatch.evidence.solve._completion_baselines import hide
from gradmatch.solve import MatrixCompletion

COLOURS = {
    "exact": "#b5542f",
    "default": "#1f6f8b",
    "1 step": "#9aa5ad",
    "2 steps": "#5aa9a1",
    "4 steps": "#7d6ba0",
}


def picture(
    rows: Sequence[Row],
    rates: list[dict[str, list[float]]],
    phases: list[dict[str, list[float]]],
    curves: dict[str, Any],
    photograph: np.ndarray,
) -> bytes:
    """The photograph before and after, and below it errors, samples and seconds."""
    figure = blank(figsize=(11, 7))
    halves: Any = figure.subfigures(2, 1, height_ratios=(0.95, 1))
    top, bottom = halves
    _draw_photographs(top.subplots(1, 4), photograph)
    axes = bottom.subplots(1, 4)
    _draw_rates(axes[0], rates)
    _draw_curves(axes[1], curves)
    _draw_seconds(axes[2], rows)
    for name in ("exact", "default"):
        share = np.mean([p[name] for p in phases], 0)
        axes[3].plot(
            phases[0]["ratios"],
            share,
            "o-" if name == "exact" else "s--",
            ms=4,
            color=COLOURS[name],
            label=name,
        )
    axes[3].set(xlabel="samples / degrees of freedom", title="share recovered")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_size(10)
        axis.legend(fontsize=7, frameon=False)
    return png(figure)


def _draw_photographs(axes: Any, M: np.ndarray) -> None:
    seen = hide(M, 0.4, np.random.default_rng(0))
    shown = {"40 % of the pixels": np.nan_to_num(seen, nan=1.0), "the photograph": M}
    for name, solver in (("exact", "exact"), ("default", "pcg")):
        model = MatrixCompletion(10, tol=0, max_iter=20, bias="mean", solver=solver).fit(seen)
        X = np.asarray(model.complete())
        psnr = -10 * np.log10(np.mean((X - M)[np.isnan(seen)] ** 2))
        words = "exact regressions" if name == "exact" else "approximate regressions"
        shown[f"rank 10, {words}\n{psnr:.1f} dB on the hidden pixels"] = np.where(np.isnan(seen), X, seen)
    for axis, title in zip(axes, [list(shown)[i] for i in (0, 2, 3, 1)], strict=True):
        axis.imshow(shown[title], cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=9)
        axis.axis("off")


def _draw_rates(axis: Any, rates: list[dict[str, list[float]]]) -> None:
    for name in COLOURS:
        curve = np.exp(np.mean([np.log(r[f"10% kappa 1, {name}"][:-1]) for r in rates], 0))
        axis.semilogy(
            range(1, len(curve) + 1), curve, color=COLOURS[name], label=name, lw=3 if name == "exact" else 1.5
        )
    axis.set(xlabel="sweep", title="error, 400 x 300 of rank 5")


def _draw_curves(axis: Any, curves: dict[str, Any]) -> None:
    for name, points in curves.items():
        seconds, errors = zip(*points, strict=True)
        axis.semilogy(seconds, errors, "o-", ms=3, color=COLOURS[name], label=name)
    axis.set(xlabel="seconds on one core", title="error, 3,000 x 3,000 of rank 100")


def _draw_seconds(axis: Any, rows: Sequence[Row]) -> None:
    found, ranks = {r.method: r for r in rows}, (5, 20, 50, 100)
    for name in ("exact", "default"):
        seconds = [found[f"seconds of a half-sweep, rank {k}, {name}"].mean for k in ranks]
        axis.loglog(ranks, seconds, "o-", color=COLOURS[name], label=name)
    axis.set_xticks(ranks, [str(k) for k in ranks])
    axis.minorticks_off()
    axis.set(xlabel="rank", title="seconds of a half-sweep")
