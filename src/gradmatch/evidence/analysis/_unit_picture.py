"""What the pairs of networks of ``convergent_learning`` gave, and its picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from gradmatch.core.picture import blank, png

Runs = dict[str, list[dict[str, Any]]]
"""For each kind of pair what was measured in every seed's."""
TRAINED = "MLP, decay 3e-3"


def values(
    runs: Sequence[dict[str, Any]], layer: int, key: str, place: int | None = None
) -> tuple[float, ...]:
    """One figure of one layer, a value a pair."""
    found = [r["layers"][layer][key] for r in runs]
    return tuple(float(v if place is None else v[place]) for v in found)


def mean(figures: Sequence[float]) -> float:
    """Their mean."""
    return sum(figures) / len(figures)


def picture(runs: Runs, lambdas: Sequence[float]) -> bytes:
    """Correlations by layer and sorted, and prediction paths; below, first-layer units of A over those of B."""
    figure = blank(figsize=(13.5, 6.4))
    top, bottom = cast(Any, figure).subfigures(2, 1, height_ratios=(2.1, 1))
    left, middle, right = top.subplots(1, 3)
    _bars(left, runs)
    _curves(middle, runs)
    _paths(right, runs, lambdas)
    shown = runs[TRAINED][0]["weights"]
    side = round(len(shown["a"][0]) ** 0.5)
    grid = bottom.subplots(2, len(shown["scores"]))
    for k, score in enumerate(shown["scores"]):
        for axis, weight in zip(grid[:, k], (shown["a"][k], shown["b"][k]), strict=True):
            image = torch.tensor(weight).reshape(side, side)
            limit = float(image.abs().max()) or 1.0
            axis.imshow(image, cmap="RdBu_r", vmin=-limit, vmax=limit)
            axis.set_xticks([])
            axis.set_yticks([])
        grid[0, k].set_title(f"{score:.2f}", fontsize=8)
    grid[0, 0].set_ylabel("A", fontsize=10, rotation=0, labelpad=10)
    grid[1, 0].set_ylabel("B", fontsize=10, rotation=0, labelpad=10)
    bottom.suptitle(
        "First-layer weights of matched units, from the best to the worst match (correlation above)",
        fontsize=11,
    )
    return png(figure)


def _bars(axis: Any, runs: Runs) -> None:
    """Matched correlation of every layer: trained, untrained, mixed."""
    series = {
        "trained (decay 3e-3)": (runs[TRAINED], "one2one", "#2f6f9f"),
        "trained, B mixed": (runs[TRAINED], "mixed", "#9fc1d8"),
        "shuffled labels": (runs["MLP, shuffled labels"], "one2one", "#d9a441"),
        "untrained": (runs["MLP, untrained"], "one2one", "#b8b8b8"),
    }
    count = len(runs[TRAINED][0]["layers"])
    for k, (name, (own, key, color)) in enumerate(series.items()):
        places = [i + 0.2 * (k - 1.5) for i in range(count)]
        heights = [values(own, i, key) for i in range(count)]
        axis.bar(places, [mean(v) for v in heights], 0.18, color=color, label=name)
        for place, each in zip(places, heights, strict=True):
            axis.plot([place] * len(each), each, ".", color="#1d2b36", ms=3)
    axis.set_xticks(range(count), [f"layer {i + 1}" for i in range(count)])
    axis.set_title("MLP: correlation, one to one", loc="left", fontsize=11)
    axis.set_ylim(0, 1.05)
    axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper center")
    axis.spines[["top", "right"]].set_visible(False)


def _curves(axis: Any, runs: Runs) -> None:
    """Correlations of the second layer of one pair, sorted: the paper's own picture."""
    for kind, how, label, color in (
        (TRAINED, "semi", "best of B for each unit of A", "#9fc1d8"),
        (TRAINED, "one2one", "one to one", "#2f6f9f"),
        ("MLP, untrained", "one2one", "one to one, untrained", "#b8b8b8"),
    ):
        curve = runs[kind][0]["curves"][how]
        axis.plot(range(1, len(curve) + 1), curve, color=color, lw=2, label=label)
    axis.axhline(0.3, color="#33485a", lw=0.7, ls=":")
    axis.text(1, 0.27, "below: only one network has it", fontsize=7, color="#33485a", va="top")
    axis.set_title("Units of layer 2, best match first", loc="left", fontsize=11)
    axis.set_xlabel("unit of A")
    axis.set_ylim(0, 1.05)
    axis.legend(frameon=False, fontsize=8, loc="upper right")
    axis.spines[["top", "right"]].set_visible(False)


def _paths(axis: Any, runs: Runs, lambdas: Sequence[float]) -> None:
    """Held-out error of the lasso against how many units it uses, beside the best single unit and all units."""
    for kind, color in (("MLP, decay 3e-3", "#2f6f9f"), ("ConvNet", "#7b5aa6")):
        for k, style in zip(range(3), ("-", "--", ":"), strict=True):
            own = runs[kind]
            units = [1.0, *(mean(values(own, k, "nonzero", i)) for i in range(len(lambdas)))]
            losses = [
                mean(values(own, k, "single")),
                *(mean(values(own, k, "losses", i)) for i in range(len(lambdas))),
            ]
            axis.plot(
                units,
                losses,
                style,
                color=color,
                marker="o",
                ms=3.5,
                label=f"{kind.split(',')[0]}, layer {k + 1}",
            )
    axis.set_xscale("log")
    axis.set_ylim(0, None)
    axis.set_xlabel("units of A used (1: the best one)")
    axis.set_title("Share of a unit's variance left unexplained, held out", loc="left", fontsize=11)
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
