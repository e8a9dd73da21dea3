"""One page about coherence: agreement in training, memorising or not, and labels that their class disowns."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from gradmatch.core.picture import blank, png
from gradmatch.datasets.fashion_mnist import NAMES

COLOURS = {"real": "#1b7f5c", "50% noise": "#d08a1d", "random": "#b23a48"}
LINES = {
    "SGD, batch 50": "#8a8f98",
    "winsorised c=2, batch 50": "#2f6fab",
    "SGD, batch 15": "#c0c4ca",
    "M3 of 3 x 5": "#7b4fa3",
}
SCORES = {"class": "#1b7f5c", "crowd": "#d08a1d", "loss": "#33485a"}


def picture(
    followed: dict[Any, dict[str, Any]],
    trained: dict[Any, dict[str, Any]],
    seeds: list[int],
    suspects: list[tuple[Tensor, int, int]],
) -> bytes:
    """A PNG: curves above, the ten training images with the lowest class-conditional score below."""
    figure = blank(figsize=(12, 6.6))
    above, below = figure.subfigures(2, 1, height_ratios=(2.6, 1))
    axes = above.subplots(1, 3)
    _coherences(axes[0], followed, seeds)
    _accuracies(axes[1], trained, seeds)
    _aucs(axes[2], followed, seeds)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    _images(below, suspects)
    return png(figure)


def _band(
    axis: Any, x: list[int], curves: list[list[float]], colour: str, label: str, line: str = "-"
) -> None:
    values = np.array(curves)
    axis.plot(x, values.mean(0), line, color=colour, label=label, linewidth=1.8)
    axis.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)


def _coherences(axis: Any, followed: dict[Any, dict[str, Any]], seeds: list[int]) -> None:
    for labels, colour in COLOURS.items():
        runs = [followed[labels, "centred", s]["m"] for s in seeds]
        epochs = [int(e) for e in runs[0]]
        _band(
            axis,
            epochs,
            [list(r.values()) for r in runs],
            colour,
            f"{labels} labels" if labels != "50% noise" else labels,
        )
    axis.axhline(1, color="#999999", linewidth=0.8, linestyle=":")
    axis.text(-0.9, 1.06, "each example helps itself only", fontsize=7, color="#777777")
    axis.set_xscale("symlog", linthresh=1)
    axis.set_yscale("log")
    shown = [e for e in epochs if e != 40]  # its number would touch that of 60
    axis.set_xticks(shown, [str(e) for e in shown])
    axis.minorticks_off()
    axis.set_xlabel("epoch", fontsize=9)
    axis.set_title("m-coherence: examples helped by a step on one", fontsize=10, loc="left")
    axis.legend(fontsize=8, frameon=False)


def _accuracies(axis: Any, trained: dict[Any, dict[str, Any]], seeds: list[int]) -> None:
    for name, colour in LINES.items():
        runs = [trained[name, 0.5, 0.1, s]["test"] for s in seeds]
        _band(
            axis,
            list(range(1, len(runs[0]) + 1)),
            runs,
            colour,
            name,
            "--" if name.startswith("SGD") else "-",
        )
    axis.set_xlabel("epoch", fontsize=9)
    axis.set_title("test accuracy, half of the labels redrawn", fontsize=10, loc="left")
    axis.legend(fontsize=8, frameon=False)


def _aucs(axis: Any, followed: dict[Any, dict[str, Any]], seeds: list[int]) -> None:
    names = {"class": "agreement with its class", "crowd": "agreement with all", "loss": "loss"}
    for score, colour in SCORES.items():
        for scaling, line in (("centred", "-"), ("standardised", ":")):
            runs = [followed["50% noise", scaling, s]["auc"] for s in seeds]
            epochs = [int(e) for e in runs[0]]
            curves = [[r[str(e)][score] for e in epochs] for r in runs]
            label = names[score] if scaling == "centred" else ""
            _band(axis, epochs, curves, colour, label, line)
    axis.axhline(0.5, color="#999999", linewidth=0.8, linestyle=":")
    axis.set_xlabel("epoch (dotted: inputs standardised, not centred)", fontsize=9)
    axis.set_title("AUC of finding the wrong labels", fontsize=10, loc="left")
    axis.legend(fontsize=8, frameon=False)


def _images(figure: Any, suspects: list[tuple[Tensor, int, int]]) -> None:
    figure.suptitle(
        "lowest agreement with their class after 5 epochs: the label given, and the true one",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    for axis, (image, given, true) in zip(figure.subplots(1, len(suspects)), suspects, strict=True):
        axis.imshow(image.numpy(), cmap="gray_r")
        axis.set_axis_off()
        right = given == true
        axis.set_title(f"“{NAMES[given]}”", fontsize=8, color="#b23a48" if not right else "#1b7f5c")
        axis.text(0.5, -0.12, NAMES[true], fontsize=8, ha="center", transform=axis.transAxes)
