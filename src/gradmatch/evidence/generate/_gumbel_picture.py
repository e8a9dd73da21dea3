"""The picture of the experiment: a path on the triangle, KL by alphabet, text, and guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gradmatch.core.path import Prediction
from gradmatch.core.picture import png, subplots
from gradmatch.core.sampler import Solver
from gradmatch.core.simplex import GumbelPath, gumbel_noise
from gradmatch.evidence._common import Row

COLOURS = {"published": "#c8553d", "consistent": "#12606b", "linear": "#d9a441", "uniform": "#8a8a8a"}
CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]])


def picture(rows: Sequence[Row], texts: dict[str, list[dict[str, Any]]], budget: Any) -> bytes:
    """A PNG."""
    by = {r.method: r for r in rows}
    figure, axes = subplots(1, 5, figsize=(18, 4), width_ratios=[1, 1, 1.2, 1, 1.2])
    for axis, signal, title in ((axes[0], None, "published path"), (axes[1], 4.0, "consistent path")):
        _triangle(axis, signal)
        axis.set_title(f"{title}, exact posterior", loc="left", fontsize=10)
    axis = axes[2]
    for name in ("uniform", "published", "linear", "consistent"):
        label = f"K {{k}}: {name}" + ("" if name == "uniform" else ", posterior")
        found = [by[label.format(k=k)] for k in budget.ks]
        means, stds = [r.mean for r in found], [r.std for r in found]
        axis.errorbar(budget.ks, means, stds, marker="o", color=COLOURS[name], label=name, capsize=2)
    floor = [by[f"K {k}: floor"].mean for k in budget.ks]
    axis.plot(budget.ks, floor, ":", color="#444444", label="sampling floor")
    axis.set(xscale="log", yscale="log", xlabel="alphabet", ylabel="KL a position")
    axis.set_xticks(budget.ks, [str(k) for k in budget.ks])
    axis.minorticks_off()
    axis.set_title("peaked toy, trained", loc="left", fontsize=10)
    axis.legend(fontsize=8)
    _guidance(axes[3], by)
    lines = [
        f"{path}:\n" + "\n".join(f"  {line}" for line in runs[0]["lines"][:6]) for path, runs in texts.items()
    ]
    axes[4].text(
        0, 1, "\n".join(lines), family="monospace", fontsize=8, va="top", transform=axes[4].transAxes
    )
    axes[4].axis("off")
    axes[4].set_title("windows of text", loc="left", fontsize=10)
    return png(figure, dpi=120)


def _triangle(axis: Any, signal: float | None) -> None:
    """Where 400 points go, with tokens of probabilities .6, .3 and .1: grey at the start, coloured at the end."""
    path, prior = GumbelPath(signal=signal), torch.tensor([0.6, 0.3, 0.1])
    g = torch.Generator().manual_seed(0)
    start = path.prior(gumbel_noise(400, 1, 3, generator=g))

    def model(x: torch.Tensor, t: torch.Tensor, cond: Any = None) -> Prediction:
        return Prediction("posterior", path.posterior(x, t, prior))

    found = Solver(torch.linspace(0, 1, 51), "exponential").run(model, path, start, record=True)
    assert found.states is not None
    ways = found.states[:, :, 0].numpy() @ CORNERS
    for way in ways.transpose(1, 0, 2)[:60]:
        axis.plot(way[:, 0], way[:, 1], color="#b8b8b8", linewidth=0.5)
    axis.plot(*ways[0].T, ".", color="#8a8a8a", markersize=2)
    colours = np.array(["#c8553d", "#12606b", "#d9a441"])[found.x[:, 0].argmax(-1).numpy()]
    axis.scatter(*ways[-1].T, c=colours, s=8)
    axis.plot(*np.vstack([CORNERS, CORNERS[:1]]).T, color="#333333", linewidth=1)
    for corner, share in zip(CORNERS, prior.tolist(), strict=True):
        shift = -0.09 if corner[1] == 0 else 0.04
        axis.text(corner[0], corner[1] + shift, f"{share:g}", ha="center", fontsize=9)
    axis.set_aspect("equal")
    axis.axis("off")


def _guidance(axis: Any, by: dict[str, Row]) -> None:
    from gradmatch.evidence.generate.gumbel_flow import SCALES

    names = [f"scale {s:g}" for s in SCALES]
    x = [by[f"guidance, 2-gram KL: {n}"].mean for n in names]
    y = [by[f"guidance, vowels: {n}"].mean for n in names]
    axis.plot(x, y, "o-", color=COLOURS["published"])
    for a, b, s in zip(x, y, SCALES, strict=True):
        axis.annotate(f"{s:g}", (a, b), textcoords="offset points", xytext=(5, -9), fontsize=8)
    for name, marker in (("random", "x"), ("best of 4", "s")):
        axis.plot(
            by[f"guidance, 2-gram KL: {name}"].mean,
            by[f"guidance, vowels: {name}"].mean,
            marker,
            label=name,
            color="#444444",
        )
    axis.set(xlabel="2-gram KL to held-out text", ylabel="vowels in 16 letters")
    axis.set_title("guidance towards vowels", loc="left", fontsize=10)
    axis.legend(fontsize=8)
