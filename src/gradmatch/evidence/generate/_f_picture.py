"""The picture of the f-distill experiment: exact students over the target, and samples of the networks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gradmatch.core.picture import blank, png
from gradmatch.evidence.generate import _f_arms as arms

COLOURS = {
    "rkl": "#b5542f", "sf": "#d9914a", "neyman": "#e3c04f", "js": "#1f6f8b", "sh": "#5aa9a1", "kl": "#0b3c49",
    "jf": "#7d6ba0",
}  # fmt: skip
NAMES = {
    "rkl": "reverse KL", "sf": "softened reverse KL", "neyman": "Neyman", "js": "Jensen-Shannon",
    "sh": "squared Hellinger", "kl": "KL", "jf": "Jeffreys",
}  # fmt: skip


def picture(exact: dict[str, Tensor], samples: dict[str, Tensor]) -> bytes:
    """A PNG."""
    figure = blank(figsize=(13, 6.2))
    parts: Any = figure.subfigures(1, 2, width_ratios=(0.9, 1.5))
    _densities(parts[0].subplots(2, 1, sharex=True), exact)
    _clouds(parts[1].subplots(2, 4).flatten(), samples)
    return png(figure)


def _densities(axes: Any, exact: dict[str, Tensor]) -> None:
    x = torch.linspace(-6, 7, 600)

    def normal(mean: float, std: float) -> Tensor:
        return torch.exp(-0.5 * ((x - mean) / std).square()) / (std * math.sqrt(2 * math.pi))

    target = arms.SMALL_MODE * normal(-2, 0.6) + (1 - arms.SMALL_MODE) * normal(2, 0.6)
    halves = (("rkl", "sf", "neyman"), ("js", "sh", "kl", "jf"))
    titles = ("weights that seek a mode", "weights that cover both")
    for axis, names, title in zip(axes, halves, titles, strict=True):
        axis.fill_between(x, target, color="#d8dee3", label="teacher")
        for name in names:
            mu, s = exact[name][0].tolist()
            axis.plot(x, normal(mu, math.exp(s)), color=COLOURS[name], lw=2, label=NAMES[name])
        axis.set_title(title, fontsize=10, loc="left")
        axis.legend(fontsize=8, frameon=False)
        axis.set_yticks([])
        axis.spines[["top", "right", "left"]].set_visible(False)


def _clouds(axes: Any, samples: dict[str, Tensor]) -> None:
    order = ["the data", "teacher, 50 calls", "teacher, 2 calls", "teacher, 1 call"]
    order += [n for n in samples if "student" in n]
    for axis in axes:
        axis.axis("off")
    for axis, name in zip(axes, order, strict=False):
        x = samples[name]
        label, _, rest = name.partition(" ")
        colour = COLOURS.get(label, "#55636e")
        axis.plot(x[:, 0], x[:, 1], ",", color=colour, alpha=0.8)
        axis.set(xlim=(-2.8, 2.8), ylim=(-2.8, 2.8), aspect="equal")
        axis.set_title(f"{NAMES[label]} {rest}" if label in NAMES else name, fontsize=9)
