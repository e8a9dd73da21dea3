"""The picture of the U-REPA experiment: the same noises by every arm, and the three figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradmatch.core.picture import blank, png
from gradmatch.evidence._common import Row

COLOURS = ("#8a8a8a", "#d9a441", "#c8553d", "#1f6f8b", "#7fb7c9", "#0b3c49")


def picture(rows: Sequence[Row], samples: dict[str, Tensor]) -> bytes:
    """A PNG."""
    figure = blank(figsize=(12, 4.6))
    parts: Any = figure.subfigures(1, 2, width_ratios=(1, 1.25))
    for axis, (arm, images) in zip(parts[0].subplots(len(samples), 1), samples.items(), strict=True):
        axis.imshow(torch.cat(list(images[:, 0]), 1), cmap="gray", vmin=-1, vmax=1)
        axis.set_title(arm, fontsize=8, loc="left", pad=2)
        axis.axis("off")
    heads = ("mismatch of the middle's relations", "probe of the middle", "Frechet distance")
    axes = parts[1].subplots(1, 3, sharey=True)
    for axis, head in zip(axes, heads, strict=True):
        mine = [r for r in rows if r.method.startswith(f"{head}, ")]
        for place, (row, colour) in enumerate(zip(mine, COLOURS, strict=False)):
            axis.errorbar(row.mean, -place, xerr=row.std, fmt="o", color=colour, capsize=3)
            axis.plot(row.values, [-place] * len(row.values), ".", color=colour, ms=3)
        axis.set_yticks(
            [-k for k in range(len(mine))], [r.method.removeprefix(f"{head}, ") for r in mine], fontsize=8
        )
        axis.set_title(head.replace(" of ", "\nof ", 1), fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return png(figure)
