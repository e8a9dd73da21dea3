"""The picture of the GNS experiment: convergence on five problems, and paths over Rosenbrock's valley."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gradmatch.core.picture import png, subplots
from gradmatch.evidence.optim import _gns_problems as problems
from gradmatch.optim._newton_rules import GradientDescent
from gradmatch.optim._regularised import minimize
from gradmatch.optim.gns import minimize_gns

COLOURS = {
    "exact": "#12355b", "weighted Gauss-Newton": "#2a9d8f", "full Gauss-Newton": "#2a9d8f", "Gauss-Newton": "#2a9d8f",
    "empirical Fisher": "#e9a23b", "Fisher term": "#e9a23b", "diagonal": "#b56576", "no curvature": "#8a8a8a",
    "gradient descent": "#c9c9c9", "L-BFGS": "#c8553d",
}  # fmt: skip
PANELS = (
    ("LogSumExp mu 1", "f - f*"),
    ("LogSumExp mu 0.1", "f - f*"),
    ("breast cancer l2 0.0001", "gradient norm"),
    ("digits l2 0.001", "gradient norm"),
    ("Chebyshev p 4", "f"),
)


def picture(runs: dict[tuple[str, str], list[dict[str, Any]]], budget: Any) -> bytes:
    """A PNG; the first seed of every run is drawn."""
    figure, axes = subplots(2, 3, figsize=(13, 7))
    for axis, (name, label) in zip(axes.flat, PANELS, strict=False):
        for (problem, method), found in runs.items():
            if problem != name or method not in COLOURS:
                continue
            curve = np.maximum(found[0]["curve"], 1e-16)
            dashed = ":" if method == "L-BFGS" else "-"
            axis.plot(
                range(1, len(curve) + 1), curve, dashed, color=COLOURS[method], label=method, linewidth=1.8
            )
        axis.set(xscale="log", yscale="log")
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_xlabel("iterations", fontsize=9)
        axis.set_ylabel(label, fontsize=9)
        if axis.lines:
            axis.legend(fontsize=7, frameon=False)
        axis.grid(alpha=0.25)
    _valley(axes[1, 2])
    for axis in axes.flat:
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return png(figure)


def _valley(axis: Any) -> None:
    """Level lines of log |u| and the first 60 iterates from (-2, 2) for p = 2."""
    x, y = np.meshgrid(np.linspace(-2.4, 1.6, 200), np.linspace(-0.6, 4.2, 200))
    size = np.log10(np.hypot(1 - x, 10 * (y - x**2)) + 1e-3)
    axis.contourf(x, y, size, 20, cmap="Blues_r", alpha=0.65)
    own = problems.power_of_norm(problems.rosenbrock(), 2.0, torch.tensor([-2.0, 2.0]).double())
    for name, colour in (("exact", "#12355b"), ("no curvature", "#5b5b5b"), ("gradient descent", "#c8553d")):
        path = [own.start]
        value = _seen(own.value, path)
        if name == "gradient descent":
            minimize(value, own.start, GradientDescent(), 1.0, hess=None, max_iter=60)
        else:
            minimize_gns(value, own.start, hess=own.matrices.get(name), max_iter=60, f_star=0.0, tol=1e-12)
        points = torch.stack(_falling(own.value, path))
        axis.plot(points[:, 0], points[:, 1], "o-", color=colour, markersize=3.5, linewidth=1.2, label=name)
    axis.plot(1, 1, "*", color="#e9a23b", markersize=14)
    axis.set_title("Rosenbrock's valley, 60 iterations", loc="left", fontsize=10)
    axis.legend(fontsize=7)


def _seen(value: Any, path: list[torch.Tensor]) -> Any:
    def call(x: torch.Tensor) -> Any:
        path.append(x.detach().clone())
        return value(x)

    return call


def _falling(value: Any, path: list[torch.Tensor]) -> list[torch.Tensor]:
    """The points at which f was lower than at all before: the iterates, without rejected trials."""
    kept, best = [path[0]], float(value(path[0])[0])
    for x in path[1:]:
        f = float(value(x)[0])
        if f < best:
            kept.append(x)
            best = f
    return kept
