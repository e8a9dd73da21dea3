"""The picture of the Bellman-step experiment: images in 2 and 3 calls, error against calls, and the ring's paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gradmatch.core.path import LinearPath
from gradmatch.core.picture import blank, png
from gradmatch.core.sampler import Solver
from gradmatch.evidence._common import Row
from gradmatch.evidence.generate import _boss_arms as arms
from gradmatch.zoo import MixtureOracle

COLOURS = {
    "uniform": "#8a8a8a",
    "Bellman": "#1f6f8b",
    "reflow, t uniform": "#d9a441",
    "reflow, t in {k/K}": "#c8553d",
    "BOSS": "#0b3c49",
    "straightened at uniform times": "#7fb7c9",
}


def picture(rows: Sequence[Row], exact: dict[str, Any], seed: int) -> bytes:
    """A PNG."""
    figure = blank(figsize=(15, 7))
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    _images(parts[0], exact, seed)
    axes = parts[1].subplots(1, 4)
    two, every = ("uniform", "Bellman"), tuple(COLOURS)
    _curves(axes[0], rows, "images, exact field: Frechet distance", two, "exact field of real images")
    _curves(axes[1], rows, "trained network: Frechet distance", every, "trained network")
    _curves(axes[2], rows, "trained network: end-point error", every, "trained network, against 100 calls")
    axes[1].get_legend().remove()
    _ring(axes[3], seed)
    return png(figure)


def _images(figure: Any, exact: dict[str, Any], seed: int) -> None:
    """The same eight noises by each schedule."""
    model, x = MixtureOracle(arms.images14()[0][:3000], 0.1), arms.noise((196,), 16, seed)
    strips = [("100 calls", arms.uniform(100))]
    for calls in (2, 3):
        strips += [
            (f"{name}, {calls} calls", torch.tensor(exact[f"{name} {calls}"]["times"]))
            for name in ("uniform", "Bellman")
        ]
    axes = figure.subplots(len(strips), 1)
    for axis, (title, times) in zip(axes, strips, strict=True):
        images = arms.ends(model, x, times).reshape(-1, 14, 14).numpy()
        axis.imshow(np.hstack(list(images)), cmap="gray", vmin=-1, vmax=1)
        marks = "" if len(times) > 5 else "   t = " + ", ".join(f"{1 - float(t):.2f}" for t in times)
        axis.set_ylabel(title + marks.replace("   ", "\n"), rotation=0, ha="right", va="center", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)


def _curves(axis: Any, rows: Sequence[Row], head: str, methods: Sequence[str], title: str) -> None:
    for method in methods:
        mine = []
        for row in rows:
            what, _, rest = row.method.rpartition(", ")
            if what == f"{head}, {method}":
                mine.append((int(rest.split()[0]), row))
        if mine:
            calls, means = [c for c, _ in mine], [r.mean for _, r in mine]
            axis.errorbar(
                calls,
                means,
                [r.std for _, r in mine],
                fmt="o-",
                color=COLOURS[method],
                label=method,
                capsize=2,
            )
    axis.set_yscale("log")
    axis.set_xlabel("network calls")
    axis.set_ylabel(head.partition(": ")[2])
    axis.set_title(title, loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=6.5)


def _ring(axis: Any, seed: int) -> None:
    """Fine paths, and where four Bellman calls lead: the cost is low, the end points are off."""
    angles = torch.arange(8) * torch.pi / 4
    model = MixtureOracle(torch.stack([angles.cos(), angles.sin()], 1) * 4, 0.15)
    x = arms.noise((2,), 60, seed)
    fine = Solver(arms.uniform(100)).run(model, LinearPath(), x, record=True)
    assert fine.states is not None
    for path in fine.states.transpose(0, 1).numpy():
        axis.plot(*path.T, color="#cccccc", linewidth=0.7)
    axis.plot(*fine.x.numpy().T, ".", color="#444444", markersize=5, label="100 calls")
    for name, times in (
        ("uniform", arms.uniform(3)),
        ("Bellman", arms.schedules(model, (2,), (3,), seed)[3]),
    ):
        axis.plot(
            *arms.ends(model, x, times).numpy().T,
            "x",
            color=COLOURS[name],
            markersize=5,
            label=f"{name}, 3 calls",
        )
    axis.set_aspect("equal")
    axis.set_title("where it misleads: a ring", loc="left", fontsize=10)
    axis.axis("off")
    axis.legend(fontsize=7, loc="upper right")
