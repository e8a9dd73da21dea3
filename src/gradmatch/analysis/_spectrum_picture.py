"""A spectrum as a picture."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from gradmatch.core.picture import png, subplots

if TYPE_CHECKING:
    from gradmatch.analysis._spectrum import Spectrum

INK, LINE, FILL, MARK = "#1d2b36", "#2a6f97", "#a9cfe3", "#d1495b"


def draw(found: Spectrum, title: str = "") -> bytes:
    """PNG: the density (where known) with the largest eigenvalues as ticks, and the eigenvalues in order."""
    wide = found.masses() is not None
    figure, axes = subplots(1, 2 if wide else 1, figsize=(11 if wide else 6, 4.2), squeeze=False)
    if wide:
        _density(axes[0, 0], found)
    _order(axes[0, -1], found)
    figure.suptitle(
        title or f"{found.kind.replace('_', ' ').capitalize()} of {found.size:,} parameters",
        fontsize=12,
        x=0.01,
        ha="left",
    )
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return png(figure)


def _density(axis: Any, found: Spectrum) -> None:
    grid, height = found.curve()
    x, y = grid.numpy(), height.numpy()
    floor = float(height.max()) * 1e-7
    axis.fill_between(x, floor, y.clip(floor), color=FILL, lw=0)
    axis.plot(x, y.clip(floor), color=LINE, lw=1.2)
    axis.set_yscale("log")
    axis.set_ylim(floor, float(height.max()) * 3)
    known = [*found.top.tolist(), *found.bottom.tolist()]
    axis.plot(known, [floor * 1.9] * len(known), "|", color=MARK, ms=11, mew=1.3, label="eigenvalues, exact")
    axis.set_xlabel("eigenvalue", fontsize=9)
    axis.set_ylabel("density", fontsize=9)
    axis.legend(fontsize=8, frameon=False, loc="upper right")
    share = found.share_below()
    words = f"{share:.1%} of {found.size:,} lie within 0.001 of the largest around 0" if share else ""
    axis.set_title(words, fontsize=9, loc="left", color=INK)


def _order(axis: Any, found: Spectrum) -> None:
    values = [v for v in found.top.tolist() if v > 0]
    places = range(1, len(values) + 1)
    axis.vlines(places, min(values, default=1) / 2, values, color=FILL, lw=3)
    axis.plot(places, values, "o", color=LINE, ms=5)
    axis.set_yscale("log")
    place, ratio = found.gap()
    if 0 < place < len(values):
        axis.axvline(place + 0.5, color=MARK, lw=1, ls="--")
        axis.annotate(
            f"largest ratio {ratio:.2g}, after {place}",
            (place + 0.6, math.sqrt(values[place - 1] * max(values))),
            fontsize=8,
            color=MARK,
        )
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("place", fontsize=9)
    axis.set_ylabel("largest eigenvalues", fontsize=9)
    low = f", smallest {float(found.bottom[-1]):.3g}" if len(found.bottom) else ""
    axis.set_title(f"largest {float(found.top[0]):.3g}{low}; loss {found.loss:.3g}", fontsize=9, loc="left")
