"""Outliers and bulk of the Hessian, what moves which, and whether batch size leads to another basin.

All networks but the last are 12 tanh units (or as named) in float64 with weights N(0, 1/fan_in), and every spectrum is
exact. "Classes": 1,000 images of the first C classes of Fashion-MNIST, mean-pooled to 7 x 7, pixels raw in [0, 1] or
standardised, and digits, trained to a fixed loss. "Blobs": tight clusters with a tenth of labels at random. "Widths":
600 images at 4 x 4, to loss .60. "Overlap": two clusters that come nearer. "Basins": MLP 784-128-10 on 5,000 images, a
full batch until it stalls, then batches of 64 or 16 at the same rate, and the loss on the segment between the two ends.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from gradmatch.core.picture import png, subplots
from gradmatch.evidence._common import Result, Row, Settings, gain, kept, parallel, verdict_of
from gradmatch.evidence.analysis._spectrum_runs import RUNS

SLUG = "hessian-spectrum"
TITLE = "Hessian spectrum: bulk and outliers"
CLAIM = (
    "The Hessian of a trained network is a bulk at zero, which grows with the network's width, and a few outliers, "
    "about as many as classes, which the data set; small batches that follow a large one stay in its basin."
)
RULE = (
    "Conditions; 'in every seed' or, for differences, by more than two standard errors, paired by seed. Outliers: "
    "(1-4) raw Fashion-MNIST of 2, 3, 5, 10 classes: the largest ratio of neighbouring eigenvalues is after C - 1 in "
    "every seed; (5-7) the same with standardised inputs, 2, 3, 5 classes; (8-11) digits, 2, 3, 5, 10 classes; (12-14) "
    "blobs of k = 2, 3, 5: the largest ratio is after k or k - 1 in every seed; (15) blobs: the number above a tenth "
    "of the largest grows at every step of k = 2, 3, 5, 8. Width 10, 20, 40, 60 at equal loss: (16) the share of "
    "eigenvalues within .001 of the largest around 0 grows at every step; (17) the number above a twentieth of the "
    "largest stays within 1. Overlap of two clusters at separation 6, 4, 2: (18) the largest eigenvalue and (19) the "
    "number above a twentieth of it grow at every step. Training, 5 classes: (20) the residual part's share of the "
    "Hessian's norm and (21) the smallest eigenvalue's size relative to the largest fall. Basins: the barrier is under "
    ".01 in every seed for batch (22) 64 and (23) 16 without momentum, (24) 64 and (25) 16 with momentum .9. 'holds' "
    "if all are met, 'holds in part' if some are, 'does not hold' if none is. The error of the quadrature and the "
    "barrier between independent networks are shown and not judged."
)

COUNTS = {
    ("fashion", "raw"): (2, 3, 5, 10),
    ("fashion", "standardised"): (2, 3, 5),
    ("digits", "raw"): (2, 3, 5, 10),
}
CLUSTERS, WIDTHS, SEPARATIONS = (2, 3, 5, 8), (10, 20, 40, 60), (6.0, 4.0, 2.0)
BASINS = {0.0: 500, 0.9: 150}
"""Momentum, and the full-batch steps after which the loss stalls."""
FLAT, BATCHES, GAPS = 0.01, ("64", "16"), (2, 3, 5)
FIVE = ("classes", "fashion", 5, "raw")

Cell = tuple[Any, ...]
Found = dict[Cell, list[dict[str, Any]]]
"""What was measured by run and arguments, a dict for each seed."""


def cells() -> list[Cell]:
    """Every run with its arguments, the long ones first."""
    found: list[Cell] = [("basins", m, steps) for m, steps in BASINS.items()]
    found += [("classes", source, c, scaling) for (source, scaling), cs in COUNTS.items() for c in cs]
    found += [("quadrature",)] + [("widths", w) for w in WIDTHS]
    return found + [("overlap", s) for s in SEPARATIONS] + [("blobs", k) for k in CLUSTERS]


def _one(settings: Settings, seed: int, cell: Cell) -> dict[str, Any]:
    name = "-".join(str(part) for part in (*cell, seed))
    found = kept(settings, SLUG, name, {"version": 1}, lambda: RUNS[cell[0]](seed, *cell[1:]))
    return dict(found)


def run(settings: Settings) -> Result:
    """Train everything, read the spectra, judge by ``RULE``."""
    seeds = settings.seed_list(3)
    tasks = [(settings, seed, cell) for cell in cells() for seed in seeds]
    done = parallel(_one, tasks, settings, label="spectra")
    found: Found = {}
    for (_, _, cell), value in zip(tasks, done, strict=True):
        found.setdefault(cell, []).append(value)
    return judged(found)


def judged(found: Found) -> Result:
    """Rows, conditions and verdict."""
    sheet = _Sheet(found)
    for part in (_outliers, _width_and_overlap, _course_of_training, _barriers, _tools):
        part(sheet)
    failed = [name for name, ok in sheet.met.items() if not ok]
    reason = f"{len(sheet.met) - len(failed)} of {len(sheet.met)} conditions met"
    reason += f"; not met: {', '.join(failed)}." if failed else "."
    return Result(
        SLUG,
        TITLE,
        CLAIM,
        RULE,
        verdict_of(list(sheet.met.values())),
        reason,
        "as named in the row",
        tuple(sheet.rows),
        pictures=((f"{SLUG}.png", picture(found)),),
        links={"paper": "https://arxiv.org/abs/1706.04454"},
    )


class _Sheet:
    """The rows so far, and which conditions were met."""

    def __init__(self, found: Found) -> None:
        self.found = found
        self.rows: list[Row] = []
        self.met: dict[str, bool] = {}

    def row(self, name: str, cell: Cell, pick: Callable[[dict[str, Any]], float], cost: str = "") -> Row:
        self.rows.append(Row(name, tuple(float(pick(v)) for v in self.found[cell]), cost))
        return self.rows[-1]

    def series(self, text: str, name: str, values: Sequence[float], key: str) -> list[Row]:
        return [
            self.row(text.format(v), (name, v), lambda d: float(d[key]), self.mean((name, v), "loss"))
            for v in values
        ]

    def mean(self, cell: Cell, key: str) -> str:
        values = [v[key] for v in self.found[cell] if key in v]
        return f"{key} {sum(values) / len(values):.3g}" if values else ""

    def between(self, cell: Cell, key: str) -> str:
        values = [v[key] for v in self.found[cell]]
        return f"{key} {min(values):.1f}..{max(values):.1f}"


def _outliers(sheet: _Sheet) -> None:
    for (source, scaling), counts in COUNTS.items():
        for c in counts:
            cell = ("classes", source, c, scaling)
            cost = f"{sheet.between(cell, 'ratio')}, {sheet.mean(cell, 'loss')}"
            row = sheet.row(
                f"largest ratio after: {source} {scaling}, {c} classes", cell, lambda v: float(v["gap"]), cost
            )
            sheet.met[f"C - 1 ({source} {scaling}, {c})"] = set(row.values) == {c - 1}
    for k in CLUSTERS:
        cost = sheet.between(("blobs", k), "ratio")
        row = sheet.row(f"largest ratio after: {k} blobs", ("blobs", k), lambda v: float(v["gap"]), cost)
        if k in GAPS:
            sheet.met[f"k or k - 1 (blobs, {k})"] = set(row.values) <= {k - 1, k}
    counts_ = sheet.series("eigenvalues above a tenth of the largest: {} blobs", "blobs", CLUSTERS, "count")
    sheet.met["outliers grow with k"] = _grows(counts_)


def _width_and_overlap(sheet: _Sheet) -> None:
    sheet.met["bulk grows with width"] = _grows(
        sheet.series("share within .001 around 0: width {}", "widths", WIDTHS, "share")
    )
    counts = sheet.series("eigenvalues above a twentieth of the largest: width {}", "widths", WIDTHS, "count")
    change = gain(counts[-1], counts[0])
    sheet.met["outliers do not grow with width"] = abs(change.mean) + 2 * change.error <= 1
    sheet.series("largest eigenvalue: width {}", "widths", WIDTHS, "top")
    for text, key in (
        ("largest eigenvalue", "top"),
        ("eigenvalues above a twentieth of the largest", "count"),
    ):
        rows = sheet.series(text + ": separation {:g}", "overlap", SEPARATIONS, key)
        sheet.met[f"{text} grow with overlap"] = _grows(rows)


def _course_of_training(sheet: _Sheet) -> None:
    for text, key, sign in (
        ("share of the residual part", "residual", 1),
        ("smallest over largest", "low", -1),
    ):
        start, end = (
            sheet.row(f"{text}, 5 classes, {when}", FIVE, lambda v, key=key, i=i: float(v[key][i]))  # type: ignore[misc]
            for i, when in enumerate(("at the start", "trained"))
        )
        falls = gain([sign * v for v in start.values], [sign * v for v in end.values])
        sheet.met[f"{text} falls"] = falls.above()
    sheet.row(
        "leading eigenvectors inside the mean logit gradients, 5 classes", FIVE, lambda v: float(v["energy"])
    )


def _barriers(sheet: _Sheet) -> None:
    for momentum, steps in BASINS.items():
        cell = ("basins", momentum, steps)
        for batch in BATCHES:
            runs = [v[batch] for v in sheet.found[cell]]
            start, end = (sum(r["losses"][i] for r in runs) / len(runs) for i in (0, -1))
            peak = max(max(r["path"]) for r in runs)
            row = sheet.row(
                f"barrier: batch {batch}, momentum {momentum:g}",
                cell,
                lambda v, b=batch: float(v[b]["barrier"]),  # type: ignore[misc]
                f"loss {start:.2f} to {end:.2f}, up to {peak:.2f} on the way",
            )
            sheet.met[f"no barrier (batch {batch}, momentum {momentum:g})"] = max(row.values) < FLAT
    apart = ("basins", 0.9, BASINS[0.9])
    sheet.row("barrier: independent networks", apart, lambda v: float(v["independent"]["barrier"]))


def _tools(sheet: _Sheet) -> None:
    for key, text in (("kappa", "by the kappa rule"), ("pyhessian", "of PyHessian")):
        sheet.row(f"L1 error of the density, width {text}", ("quadrature",), lambda v, key=key: float(v[key]))  # type: ignore[misc]


def _grows(rows: Sequence[Row]) -> bool:
    """Whether every row is above the one before."""
    return all(gain(b, a).above() for a, b in itertools.pairwise(rows))


# --- picture -----------------------------------------------------------------------------------------------

COLOURS = ("#2a6f97", "#d1495b", "#edae49", "#3d8f5f", "#6b4e9b")


def picture(found: Found) -> bytes:
    """Six panels: outliers by classes, before and after training, widths, overlap, quadrature, segments."""
    figure, axes = subplots(2, 3, figsize=(13, 7.4))
    panels = (_classes, _training, _widths, _overlap, _quadrature, _segments)
    for axis, panel in zip(axes.flat, panels, strict=True):
        panel(axis, found)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=7.5, frameon=False)
    return png(figure)


def _label(axis: Any, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)


def _classes(axis: Any, found: Found) -> None:
    for colour, c in zip(COLOURS, COUNTS["fashion", "raw"], strict=False):
        top = found["classes", "fashion", c, "raw"][0]["top"][: 2 * c + 2]
        axis.plot(range(1, len(top) + 1), top, "o-", color=colour, ms=4, lw=1, label=f"{c} classes")
        axis.plot([c - 0.5], [math.sqrt(top[c - 2] * top[c - 1])], "|", color=colour, ms=22, mew=1.5)
    axis.set_yscale("log")
    axis.xaxis.get_major_locator().set_params(integer=True)
    _label(axis, "C classes: bars stand after place C - 1", "place", "eigenvalue")


def _training(axis: Any, found: Found) -> None:
    curves = found["classes", "fashion", 5, "raw"][0]["curves"]
    for colour, (grid, height), name in zip(
        COLOURS, curves, ("at the start", "trained to loss .29"), strict=False
    ):
        shown = [max(h, 1e-4) for h in height]
        axis.fill_between(grid, 1e-4, shown, color=colour, alpha=0.25, lw=0)
        axis.plot(grid, shown, color=colour, lw=1.2, label=name)
    axis.set_yscale("log")
    axis.set_ylim(1e-4, None)
    _label(axis, "Training, 5 classes: outliers leave the bulk", "eigenvalue", "density")


def _widths(axis: Any, found: Found) -> None:
    for colour, w in zip(COLOURS, WIDTHS, strict=False):
        values = found["widths", w][0]["values"]
        axis.plot(range(1, len(values) + 1), values, color=colour, lw=1.4, label=f"{w} units")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(1e-5, None)
    _label(axis, "Width at equal loss: the top stays, the bulk grows", "place", "eigenvalue")


def _overlap(axis: Any, found: Found) -> None:
    for colour, s in zip(COLOURS, SEPARATIONS, strict=False):
        values = found["overlap", s][0]["values"]
        axis.plot(
            range(1, len(values) + 1), values, "o-", color=colour, ms=3, lw=1, label=f"separation {s:g}"
        )
    axis.set_yscale("log")
    _label(axis, "Two clusters: nearer means larger eigenvalues", "place", "eigenvalue")


def _quadrature(axis: Any, found: Found) -> None:
    grid, estimate, truth = found["quadrature",][0]["curves"]
    axis.fill_between(
        grid, 1e-4, [max(t, 1e-4) for t in truth], color="#a9cfe3", lw=0, label="exact, smoothed"
    )
    axis.plot(grid, [max(t, 1e-4) for t in estimate], color=COLOURS[1], lw=1, label="10 probes of 100 steps")
    axis.set_yscale("log")
    error = found["quadrature",][0]["kappa"]
    _label(axis, f"Quadrature: {error:.3f} of the mass misplaced", "eigenvalue", "density")


def _segments(axis: Any, found: Found) -> None:
    styles = iter(zip(COLOURS, ("-", "-", "--", "--", ":"), strict=True))
    for momentum, steps in BASINS.items():
        for batch in ("64", "16", "independent"):
            one = found["basins", momentum, steps][0].get(batch)
            if one is None:
                continue
            colour, line = next(styles)
            t = [k / (len(one["losses"]) - 1) for k in range(len(one["losses"]))]
            name = (
                f"batch {batch}, momentum {momentum:g}" if batch != "independent" else "independent networks"
            )
            axis.plot(t, one["losses"], line, color=colour, lw=1.5, label=name)
    _label(axis, "From the large batch's end to the small batch's", "t", "training loss")
