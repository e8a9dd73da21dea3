"""The picture of the experiment: what was learned of known priors, R of images getting worse, and reconstructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradmatch.core.picture import blank, png
from gradmatch.evidence.solve import _lpn_toys as toys

COLOURS = {"squares": "#9aa5ad", "absolute": "#c9a227", "gamma 0.1": "#1f6f8b"}
NAMES = {"squares": "squares", "absolute": "absolute values", "gamma 0.1": "proximal matching"}
COLUMNS = ("measured", "classical", "total variation", "plain denoiser", "LPN", "truth")


def picture(known: Sequence[dict[str, Any]], shown: Sequence[dict[str, Any]]) -> bytes:
    """A PNG of both."""
    figure = blank(figsize=(12, 9))
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 1.35))
    axes = parts[0].subplots(1, 4)
    _draw_known(axes, known)
    _draw_priors(axes[3], shown)
    halves = parts[1].subfigures(1, 2)
    for half, task in zip(halves, ("deblurring", "filling in"), strict=True):
        _draw_images(half, task, shown[0])
    return png(figure)


def _draw_known(axes: Any, known: Sequence[dict[str, Any]]) -> None:
    axes[0].plot(toys.AT, toys.soft_threshold(toys.AT), "k--", lw=1, label="soft threshold")
    axes[1].plot(toys.AT_R, np.abs(toys.AT_R), "k--", lw=1, label="|x|")
    for name, colour in COLOURS.items():
        for axis, at, which in ((axes[0], toys.AT, 0), (axes[1], toys.AT_R, 1)):
            axis.plot(at, np.mean([k[name][which] for k in known], 0), color=colour, label=NAMES[name])
    hull, raw = (g(toys.BETWEEN) for g in (toys.mixture_hull, toys.mixture_prior))
    learned = np.mean([k["mixture"][1] for k in known], 0)
    modes = np.abs(np.abs(toys.BETWEEN) - toys.MODES) < 1e-9
    for R, style, colour, name in (
        (raw, ":", "#9aa5ad", "- sigma² log p"),
        (hull, "--", "k", "R of its prox"),
        (learned, "-", COLOURS["gamma 0.1"], "learned"),
    ):
        axes[2].plot(toys.BETWEEN, R - R[modes].mean(), style, color=colour, lw=1.5, label=name)
    axes[2].set_ylim(-0.3, 1.6)
    for axis, title in zip(axes, ("Laplace: f(y)", "Laplace: R(x)", "two modes: R(x)"), strict=False):
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=7, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)


def _draw_priors(axis: Any, shown: Sequence[dict[str, Any]]) -> None:
    for (way, curve), colour in zip(
        shown[0]["priors"].items(), ("#b5542f", "#1f6f8b", "#c9a227"), strict=True
    ):
        strength = np.array([s for s, _ in curve])
        values = np.array([[v for _, v in s["priors"][way]] for s in shown])
        axis.plot(
            strength / strength[-1], (values - values[:, :1]).mean(0), "o-", color=colour, ms=3, label=way
        )
    axis.set_title("images getting worse: R", fontsize=10)
    axis.set_xlabel("noise to 0.3, blur to 2, mixing to 0.5", fontsize=8)
    axis.legend(fontsize=7, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_images(figure: Any, task: str, shown: dict[str, Any]) -> None:
    figure.suptitle({"deblurring": "blurred", "filling in": "a quarter of the pixels"}[task], fontsize=11)
    axes = figure.subplots(4, len(COLUMNS), gridspec_kw={"wspace": 0, "hspace": 0})
    for j, name in enumerate(COLUMNS):
        for i in range(4):
            axes[i, j].imshow(shown["shown"][task][name][i, 0], cmap="gray", vmin=0, vmax=1)
            axes[i, j].axis("off")
        score = shown[task].get(name)
        axes[0, j].set_title(
            f"{name}\n{score[0]:.1f} dB" if score and name != "measured" else f"{name}\n", fontsize=7.5
        )
