"""The picture of the reflection experiment: densities, paths, shares against calls, and garments drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradmatch.core.picture import blank, png
from gradmatch.core.store import load_tensors
from gradmatch.evidence._common import Row
from gradmatch.evidence.generate import _w2sd_arms as arms

COLOURS = {
    "strong": "#8a8a8a",
    "weak": "#c8553d",
    "W2SD": "#1f6f8b",
    "extrapolation": "#d9a441",
    "S2WD": "#6b4c7a",
}
STRIPS = ("weak, T 50", "strong, T 50", "W2SD, T 25, lambda 12", "W2SD, T 50, lambda 49", "extrapolation by 1, T 50",
          "S2WD, T 50, lambda 49")  # fmt: skip


def picture(rows: Sequence[Row], folder: Path, chosen: dict[int, Any]) -> bytes:
    """A PNG."""
    figure = blank(figsize=(14, 9))
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 1.05))
    axes = parts[0].subplots(1, 3)
    _densities(axes[0])
    _shares(axes[1], rows, "mixture", "exact mixture: share of the lighter mode")
    bags = min(chosen)
    _shares(axes[2], rows, f"weak of {bags} bags", f"networks, weak of {bags} bags: share of bags")
    strips = parts[1].subplots(len(STRIPS), 1)
    for axis, name in zip(strips, STRIPS, strict=True):
        images = load_tensors(folder / f"{bags}-0-{name}.safetensors")[0]["x"][:, 0]
        axis.imshow(np.hstack(list(images.numpy())), cmap="gray", vmin=0, vmax=1)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    return png(figure)


def _densities(axis: Any) -> None:
    """Histograms of the exact mixture, and the ideal as a line."""
    strong, weak = arms.mixture(arms.STRONG), arms.mixture(arms.WEAK)
    x = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    grid = np.linspace(-6, 6, 121)
    for name, key in (("strong", "strong, T 50"), ("weak", "weak, T 50"), ("W2SD", "W2SD, T 50, lambda 49")):
        samples, _ = arms.METHODS[key](arms.STABLE, strong, weak, x)
        axis.hist(samples.numpy().ravel(), grid, density=True, histtype="step", color=COLOURS[name], label=name,
                  linewidth=2.2 if name == "W2SD" else 1.3)  # fmt: skip
    bell = [np.exp(-((grid - m) ** 2) / 0.5) / np.sqrt(0.5 * np.pi) for m in (-4, 4)]
    axis.plot(grid, 0.5 * (bell[0] + bell[1]), ":", color="#222", label="ideal")
    axis.set_title("what the models draw", loc="left", fontsize=10)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set_yticks([])
    axis.legend(fontsize=8, loc="upper center")


def _shares(axis: Any, rows: Sequence[Row], part: str, title: str) -> None:
    """Share of the minority against network calls."""
    head = f"{part}: share of the minority, "
    for kind, colour in COLOURS.items():
        mine = [r for r in rows if r.method.startswith(f"{head}{kind}") and ", weak " not in r.method]
        calls = [int(r.cost.split()[0]) for r in mine]
        axis.errorbar(
            calls, [r.mean for r in mine], [r.std for r in mine], fmt="o", color=colour, label=kind, capsize=3
        )
    axis.axhline(0.5, color="#222", linestyle=":", linewidth=1)
    axis.set_xlabel("network calls")
    axis.set_ylim(0, None)
    axis.set_title(title, loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8)
