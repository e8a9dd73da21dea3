"""One page about stopping: errors along training, samples of two dimensions, and digits."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradmatch.core.picture import blank, png

INK, KERNEL, MORE, NETWORK, MARK = "#1d2b36", "#2a6f97", "#9cc3e6", "#d1495b", "#edae49"
Found = dict[tuple[Any, ...], list[dict[str, Any]]]


def picture(found: Found) -> bytes:
    """A PNG."""
    figure = blank(figsize=(13, 7.6))
    above, below = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    left, right = above.subfigures(1, 2, width_ratios=(1.15, 2))
    _errors(left.subplots(), found)
    _scatter(right, found["scatter",][0])
    left, right = below.subfigures(1, 2, width_ratios=(1.15, 2))
    _digit_curves(left.subplots(), found["digits",])
    _digits(right, found["digits",][0])
    return png(figure, dpi=120)


def _line(axis: Any, runs: list[dict[str, Any]], key: str, colour: str, label: str) -> None:
    """Mean over the seeds and their range, where steps are those of every seed."""
    common = sorted(set.intersection(*(set(r["grid"]) for r in runs)))
    values = np.array([[r[key][r["grid"].index(k)] for k in common] for r in runs])
    axis.plot(common, values.mean(0), color=colour, lw=1.8, label=label)
    axis.fill_between(common, values.min(0), values.max(0), color=colour, alpha=0.18, lw=0)


def _errors(axis: Any, found: Found) -> None:
    for count, colour in ((200, KERNEL), (800, MORE)):
        runs = found["kernel", count]
        _line(axis, runs, "curve", colour, f"kernel, {count} labels")
        for name, mark in (("rule with norm 1", "v"), ("rule", "o"), ("hold-out", "s")):
            steps = [r["steps"][name] for r in runs]
            label = name if count == 200 else None
            axis.plot(
                np.exp(np.mean(np.log(np.maximum(steps, 1)))),
                np.mean([r["errors"][name] for r in runs]),
                mark,
                color=MARK,
                mec=INK,
                ms=7,
                label=label,
                zorder=5,
            )
    _line(axis, found["network", 200], "curve", NETWORK, "network of 512 units, 200 labels")
    _finish(axis, "error of f along training, and where each rule stops", "steps", "lower left")
    axis.set_yscale("log")
    axis.set_ylim(bottom=0.018)


def _finish(axis: Any, title: str, x: str, place: str) -> None:
    axis.set_xscale("log")
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(x, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=7.5, frameon=False, loc=place)


def _scatter(figure: Any, found: dict[str, Any]) -> None:
    figure.suptitle(
        "samples of the kernel's score after so many steps (training points orange)",
        fontsize=10,
        x=0.02,
        ha="left",
    )
    train = np.array(found["train"])
    for axis, (name, points) in zip(figure.subplots(1, 3), found["samples"].items(), strict=True):
        xy = np.array(points)
        axis.plot(*xy.T, ".", color=KERNEL, ms=3, alpha=0.5)
        axis.plot(*train.T, ".", color=MARK, ms=2.5, alpha=0.9)
        axis.set_title(name, fontsize=9)
        axis.set_xlim(-2.1, 2.1)
        axis.set_ylim(-2.1, 2.1)
        axis.set_aspect("equal")
        axis.set_xticks([])
        axis.set_yticks([])


def _digit_curves(axis: Any, runs: list[dict[str, Any]]) -> None:
    _line(axis, runs, "losses", KERNEL, "hold-out loss")
    other = axis.twinx()
    places = [(np.mean([r["stop"] for r in runs]), "hold-out"), (1000, "1,000 steps"), (1e5, "100,000 steps")]
    values = [[r["at"][name]["mmd"] for r in runs] for _, name in places]
    other.plot([k for k, _ in places], np.mean(values, 1), "o--", color=NETWORK, ms=5, lw=1)
    other.set_ylabel("MMD of samples to test digits", fontsize=8, color=NETWORK)
    other.tick_params(labelsize=8)
    other.spines["top"].set_visible(False)
    axis.plot([], [], "o--", color=NETWORK, ms=5, lw=1, label="MMD of samples")
    _finish(axis, "digits: the score's loss, and how samples come out", "steps", "upper right")


def _digits(figure: Any, found: dict[str, Any]) -> None:
    figure.suptitle(
        "digits drawn at each stop, and below each its nearest training digit", fontsize=10, x=0.02, ha="left"
    )
    axes = figure.subplots(6, 10)
    for k, (name, at) in enumerate(found["at"].items()):
        for row, key in ((2 * k, "images"), (2 * k + 1, "nearest")):
            for axis, image in zip(axes[row], at[key], strict=True):
                axis.imshow(
                    np.array(image).reshape(8, 8), cmap="gray_r" if key == "images" else "Oranges", vmin=0
                )
                axis.set_xticks([])
                axis.set_yticks([])
                for spine in axis.spines.values():
                    spine.set_visible(False)
        label = name if name != "hold-out" else f"hold-out\n({found['stop']} steps)"
        axes[2 * k][0].set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
