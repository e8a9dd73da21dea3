"""The picture of the super-resolution experiment: images by every method, and their radial spectra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradmatch.core.picture import blank, png
from gradmatch.core.store import load_tensors
from gradmatch.evidence._common import Row
from gradmatch.evidence.generate import _difiisr_arms as arms
from gradmatch.generate.difiisr import radial_profile

METHODS = {
    "the truth": "#222222",
    "bicubic": "#b9b9b9",
    "regression": "#d9a441",
    "15 steps": "#6b4c7a",
    "student, plain": "#7fb7c9",
    "student, visual": "#1f6f8b",
    "student, perceptual": "#c8553d",
    "student, both": "#0b3c49",
}


def picture(rows: Sequence[Row], folder: Path) -> bytes:
    """A PNG."""
    figure = blank(figsize=(15, 8.5))
    parts: Any = figure.subfigures(1, 2, width_ratios=(1.5, 1))
    both = parts[0].subfigures(1, 2)
    curves = parts[1].subplots(2, 1)
    for part, axis, data in zip(both, curves, (arms.GARMENTS, arms.PHOTOS), strict=True):
        found = load_tensors(folder / f"{data}-0.safetensors")[0]
        axes = part.subplots(len(METHODS), 1)
        for k, name in enumerate(METHODS):
            images = found[name.replace(" ", "-").replace(",", "")][:8, 0]
            axes[k].imshow(np.hstack(list(images.numpy())), cmap="gray", vmin=0, vmax=1)
            axes[k].set_title(name, loc="left", fontsize=8, pad=2)
            axes[k].axis("off")
        part.suptitle(data, fontsize=11)
        _spectra(axis, found, rows, data)
    return png(figure, dpi=120)


def _spectra(axis: Any, found: dict[str, torch.Tensor], rows: Sequence[Row], data: str) -> None:
    """Mean log amplitude by radius, less that of the truth."""
    bins = 12
    radius = (np.arange(bins) + 0.5) / bins
    true = radial_profile(found["the-truth"], bins).mean(0)
    for name, colour in METHODS.items():
        mean = radial_profile(found[name.replace(" ", "-").replace(",", "")], bins).mean(0) - true
        high = next(r for r in rows if r.method == f"{data}: log-spectrum error, high band, {name}")
        axis.plot(radius, mean.numpy(), color=colour, label=f"{name} ({high.mean:.2f})", linewidth=1.8)
    axis.axvline(1 / arms.SCALE, color="#999", linestyle=":", linewidth=1)
    axis.set_xlabel("frequency (1: Nyquist; dotted: that of the small image)")
    axis.set_ylabel("log amplitude, less the truth's")
    axis.set_title(f"{data}: radial spectra (high-band error)", loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7)
