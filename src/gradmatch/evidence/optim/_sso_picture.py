"""The picture of the SSO experiment: loss by call, loss in equal time, and rounds of imitation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradmatch.core.picture import png, subplots
from gradmatch.evidence._common import Row

COLOURS = {
    "gradient descent": "#8a8a8a", "SGD": "#8a8a8a", "momentum": "#b5a27a", "Adam": "#c8553d", "Adagrad": "#d9a441",
    "Armijo": "#b56576", "SSO m 1": "#a8d5d0", "SSO m 10": "#2a9d8f", "SSO m 20": "#12606b", "SSO m 100": "#12355b",
}  # fmt: skip


def picture(chosen: dict[Any, Any], rows: Sequence[Row], budget: Any) -> bytes:
    """A PNG."""
    from gradmatch.evidence.optim.sso import CELLS, cell_name

    figure, axes = subplots(2, 4, figsize=(15, 6.6))
    spots: list[tuple[Any, str, str, int | None, str, int]] = []
    title = "logistic regression: gap to the optimum"
    spots.append((axes[0, 0], "logistic", "", None, title, budget.logistic_calls[-1]))
    places = [axes[0, 1], axes[0, 2], axes[1, 1], axes[1, 2]]
    for axis, cell in zip(places, CELLS, strict=True):
        spots.append((axis, "digits", *cell, cell_name(*cell), budget.calls[-1]))
    for axis, where, kind, batch, title, at in spots:
        for (arm, mark), runs in chosen.items():
            if arm[:3] == (where, kind, batch) and mark == at:
                curve = np.exp(np.mean([np.log(np.clip(r[0], 1e-8, None)) for r in runs], 0))
                axis.plot(
                    np.arange(len(curve)) + 1, curve, color=COLOURS[arm[3]], label=arm[3], linewidth=1.8
                )
        axis.set(xscale="log", yscale="log")
        axis.set_ylim(top=min(axis.get_ylim()[1], 10))
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("calls of the target gradient", fontsize=9)
        axis.legend(fontsize=7, frameon=False)
    by = {r.method: r for r in rows}
    for axis, batch in ((axes[0, 3], None), (axes[1, 3], 64)):
        _equal_time(axis, by, batch, budget)
    _imitation(axes[1, 0], by)
    for axis in axes.flat:
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return png(figure, dpi=120)


def _equal_time(axis: Any, by: dict[str, Row], batch: int | None, budget: Any) -> None:
    from gradmatch.evidence.optim.sso import FACTORS, OURS, cell_name

    for kind, style in (("softmax", "-"), ("squared", "--")):
        name, calls = cell_name(kind, batch), budget.calls[0]
        ours = [by[f"{name}, time of {calls} Adam calls at {f}: {OURS}"].mean for f in FACTORS]
        axis.plot(range(len(FACTORS)), ours, style, marker="o", color=COLOURS[OURS], label=f"SSO, {kind}")
        axis.axhline(
            by[f"{name}, {calls} calls: Adam"].mean,
            linestyle=style,
            color=COLOURS["Adam"],
            label=f"Adam, {kind}",
        )
    axis.set_yscale("log")
    axis.set_xticks(range(len(FACTORS)), [str(f) for f in FACTORS])
    axis.set_xlabel("extra cost of a target gradient (forward passes)", fontsize=9)
    what = "full batch" if batch is None else f"batch {batch}"
    axis.set_title(f"in the time of {budget.calls[0]} Adam calls, {what}", loc="left", fontsize=10)
    axis.legend(fontsize=7, frameon=False)


def _imitation(axis: Any, by: dict[str, Row]) -> None:
    own = [(name.split(": ")[1], row) for name, row in by.items() if name.startswith("imitation: ")]
    for k, (name, row) in enumerate(reversed(own)):
        axis.barh(k, row.mean, color=COLOURS[name], height=0.6)
        axis.plot(row.values, [k] * len(row.values), ".", color="#1d2b36")
    axis.set_yticks(range(len(own)), [name for name, _ in reversed(own)])
    axis.set_xlabel("rounds of interaction", fontsize=9)
    axis.set_title("imitating a cart-pole's controller, to 95 %", loc="left", fontsize=10)
