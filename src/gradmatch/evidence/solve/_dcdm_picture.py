"""The picture of the direction experiment: fields after a few iterations, and iterations and seconds against size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradmatch.core.picture import blank, png
from gradmatch.evidence._common import Row

COLOURS = {
    "CG": "#b5542f",
    "IC(0)-PCG": "#c9a227",
    "deflated PCG, 16": "#9aa5ad",
    "AMG-CG": "#7d6ba0",
    "DCDM, 2 kept": "#1f6f8b",
    "DCDM, 6 kept": "#5aa9a1",
}


def picture(rows: Sequence[Row], sizes: Sequence[int], fields: dict[str, Any]) -> bytes:
    """A PNG of both."""
    figure = blank(figsize=(11, 7.2))
    halves: Any = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    _draw_fields(halves[0].subplots(1, 4), fields)
    axes = halves[1].subplots(1, 3)
    for name, values in fields["curves"].items():
        axes[0].semilogy(values, color=COLOURS["CG" if name == "CG" else "DCDM, 2 kept"], label=name)
    axes[0].axhline(1e-4, color="#33485a", lw=0.6, ls=":")
    axes[0].set(xlabel="iteration", title="residual around the disc, 64 x 64", ylim=(1e-8, 5))
    found = {r.method: r.mean for r in rows}
    for axis, what in ((axes[1], "iterations"), (axes[2], "seconds")):
        for name, colour in COLOURS.items():
            values = [found.get(f"{what}, white noise, {n} x {n}, {name}") for n in sizes]
            if None not in values:
                axis.loglog(sizes, values, "o-", ms=4, color=colour, label=name)
        axis.set_xticks(sizes, [str(n) for n in sizes])
        axis.minorticks_off()
        axis.set(xlabel="side of the grid (trained on 32)", title=f"{what} to 1e-4, white noise")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_size(10)
        axis.legend(fontsize=7, frameon=False)
    return png(figure)


def _draw_fields(axes: Any, fields: dict[str, Any]) -> None:
    import numpy as np

    top = float(np.nanmax(np.abs(fields["exact"])))
    steps = fields["steps"]
    shown = [
        ("b", "what is asked for (right-hand side)"),
        ("CG", f"conjugate gradients\nafter {steps} iterations"),
        ("DCDM", f"learned directions\nafter {steps} iterations"),
        ("exact", "the solution"),
    ]
    for axis, (key, title) in zip(axes, shown, strict=True):
        limit = float(np.nanmax(np.abs(fields["b"]))) if key == "b" else top
        axis.imshow(fields[key], cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.set_facecolor("#d5d8da")
        axis.set_title(title, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
