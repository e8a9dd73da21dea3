"""Picture of the experiment with AdaHessian."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradmatch.core.picture import png, subplots
from gradmatch.evidence._common import Result
from gradmatch.evidence.optim.adahessian import (
    ABLATIONS,
    ADAM,
    ADAMW,
    CELLS,
    OURS,
    SGD,
    STARTS,
    Found,
    descend,
)
from gradmatch.optim import AdaHessian

COLORS = {OURS: "#c44e52", ADAM: "#4c72b0", ADAMW: "#8fb1dd", SGD: "#8c8c8c"}


def rosenbrock(x: Tensor) -> Tensor:
    """(1 - x)^2 + 100 (y - x^2)^2 over the last dimension."""
    return (1 - x[..., 0]) ** 2 + 100 * (x[..., 1] - x[..., 0] ** 2) ** 2


def picture(result: Result, found: Found) -> bytes:
    """Rosenbrock's valley; steps by rate on the quadratic; accuracy by rate in every cell; the ablations."""
    figure, axes = subplots(2, 3, figsize=(14, 7.4))
    _valley(axes[0, 0])
    _steps(axes[0, 1], result)
    for axis, (data, epochs) in zip((*axes[1, :2], axes[0, 2]), CELLS, strict=True):
        for method, color in COLORS.items():
            by_rate = found[data, epochs, method]
            rates = sorted(by_rate)
            scale = [r / rates[0] for r in rates]  # grids have one ratio: shown from their lowest rate
            own = torch.tensor([[t for _, t in by_rate[r]] for r in rates])
            axis.errorbar(
                scale,
                own.mean(1),
                own.std(1, correction=0),
                color=color,
                marker="o",
                markersize=4,
                capsize=2,
                label=method,
            )
        axis.set_xscale("log")
        axis.set_xlabel("lr / the lowest of its four")
        axis.set_title(f"{data}, {epochs} epochs: test accuracy (%)", loc="left", fontsize=10)
    axes[1, 0].legend(fontsize=8)
    _ablations(axes[1, 2], result)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return png(figure, dpi=120)


def _valley(axis: Any) -> None:
    axis.set_title("Rosenbrock's valley, 400 steps each", loc="left", fontsize=10)
    grid = torch.stack(
        torch.meshgrid(torch.linspace(-1.8, 1.4, 200), torch.linspace(-0.8, 2.6, 200), indexing="xy"), -1
    )
    axis.contourf(
        grid[..., 0], grid[..., 1], (rosenbrock(grid) + 0.05).log(), levels=24, cmap="Greys_r", alpha=0.75
    )
    arms = {
        OURS: lambda p: AdaHessian(p, 0.15),
        ADAM: lambda p: torch.optim.Adam(p, 0.05),
        SGD: lambda p: torch.optim.SGD(p, 2e-4, momentum=0.9),
    }
    for name, make in arms.items():
        path = descend(make, rosenbrock, torch.tensor([-1.4, 2.2], dtype=torch.float64), 400)
        at = torch.stack([x for _, x in path])
        label = f"{name}, f {path[-1][0]:.2g}"
        axis.plot(at[:, 0], at[:, 1], ".-", color=COLORS[name], linewidth=1.2, markersize=4, label=label)
    axis.plot(1, 1, "*", color="gold", markersize=13, markeredgecolor="black")
    axis.legend(fontsize=8, loc="lower left")


def _steps(axis: Any, result: Result) -> None:
    """Steps to 1e-6 by rate, from both starts."""
    for start, style in zip(STARTS, ("o-", "s--"), strict=True):
        for method in (OURS, ADAM):
            head = f"{method}, steps on the quadratic, {start}, lr "
            rows = [
                (float(r.method.removeprefix(head)), r.mean) for r in result.rows if r.method.startswith(head)
            ]
            axis.plot(*zip(*rows, strict=True), style, color=COLORS[method], label=f"{method}, {start}")
    axis.axhline(601, color="0.7", linewidth=1)
    axis.set_xscale("log")
    axis.set_xlabel("lr")
    axis.legend(fontsize=8)
    axis.set_title("steps on a quadratic of condition 1e4 (600 at most)", loc="left", fontsize=10)


def _ablations(axis: Any, result: Result) -> None:
    """What AdaHessian's parts do on digits."""
    names = ["as it comes", *ABLATIONS]
    for k, epochs in enumerate((8, 30)):
        heads = [OURS, *(f"{OURS}, {name}" for name in ABLATIONS)]
        rows = [result.row(f"{head}, digits, {epochs} epochs") for head in heads]
        places = [i + 0.2 * (2 * k - 1) for i in range(len(rows))]
        axis.errorbar(
            [r.mean for r in rows], places, xerr=[r.std for r in rows], fmt="o", capsize=3,
            color=("#e7a3a5", COLORS[OURS])[k], label=f"{epochs} epochs",
        )  # fmt: skip
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.legend(fontsize=8)
    axis.set_title("AdaHessian's parts, digits: test accuracy (%)", loc="left", fontsize=10)
