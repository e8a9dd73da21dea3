"""The picture of the latent-flow experiment: samples in rows, and the distance against the calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradmatch.core.picture import blank, png
from gradmatch.core.store import load_tensors
from gradmatch.evidence._common import Row

STRIPS = (
    ("real test images", "real"),
    ("through the autoencoder", "reconstructed"),
    ("latent flow, 10 calls", "latent-flow-0-10"),
    ("latent flow, 50 calls", "latent-flow-0-50"),
    ("latent DDPM, 10 calls", "latent-DDPM-0"),
    ("pixel flow, 10 calls", "pixel-flow-0"),
    ("labels 0 to 9, guidance 1.5", "labels-0-1.5"),
    ("to be filled in", "hole-0"),
    ("by the latent flow", "filled-flow-0"),
    ("by regression", "filled-regression-0"),
    ("the truth", "truth-0"),
)


def picture(folder: Path, rows: Sequence[Row]) -> bytes:
    """A PNG."""
    figure = blank(figsize=(11, 8))
    parts: Any = figure.subfigures(1, 2, width_ratios=(1, 1.15))
    left, right = parts
    axes = left.subplots(len(STRIPS), 1)
    for axis, (title, name) in zip(axes, STRIPS, strict=True):
        images = load_tensors(folder / f"{name}.safetensors")[0]["x"][:, 0]
        axis.imshow(np.hstack(list(images.numpy())), cmap="gray", vmin=0, vmax=1, aspect="equal")
        axis.set_title(title, loc="left", fontsize=7.5, pad=2)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    axis = right.subplots(1, 1)
    found = {r.method: r for r in rows}
    for arm, step, colour in (
        ("latent flow", "Euler", "#1f6f8b"),
        ("latent flow", "Heun", "#7fb7c9"),
        ("latent DDPM", "DDIM", "#c8553d"),
        ("pixel flow", "Euler", "#8a8a8a"),
    ):
        mine = [(c, found[k]) for c in (3, 5, 10, 50) if (k := f"{arm}, {step}, {c} calls") in found]
        calls, means = [c for c, _ in mine], [r.mean for _, r in mine]
        axis.errorbar(
            calls, means, [r.std for _, r in mine], fmt="o-", color=colour, label=f"{arm}, {step}", capsize=3
        )
    for name, style in (("reconstructions by the autoencoder", "--"), ("two draws of real images", ":")):
        axis.axhline(found[name].mean, color="#333", linestyle=style, linewidth=1, label=name)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks([3, 5, 10, 50], ["3", "5", "10", "50"])
    axis.minorticks_off()
    axis.set_xlabel("network calls")
    axis.set_ylabel("Frechet distance in the judge's features")
    axis.set_title("equal training time", loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8)
    return png(figure)
