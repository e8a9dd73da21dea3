"""What a comparison of optimizers found: tables, paired differences, and one sentence where there are none."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core.store import load_tensors, read_json, save_tensors, write_json

__all__ = ["Paired", "SolutionReport"]

State = dict[str, Tensor]
IDENTITY = ("optimizer", "at", "seed", "rate")
LEAST, RATE = 0.05, 0.05
"""Smallest difference, relative to the larger mean, that is called one of kind; rate of false ones accepted."""
SHARES = re.compile(r"acc|sparsity|hoyer|cosine|calibration|transfer|forgetting")
"""Metrics between 0 and 1, of which small values are not blown up to large relative differences."""
FILE, WEIGHTS = "solutions.json", "weights.safetensors"


@dataclass(frozen=True)
class Paired:
    """a - b of one metric, paired by seed: mean, standard error and the 95 % interval of Student's t."""

    metric: str
    a: str
    b: str
    values: tuple[float, ...]
    scale: float

    @property
    def mean(self) -> float:
        """Mean difference."""
        return float(np.mean(self.values))

    @property
    def error(self) -> float:
        """Standard error; infinite for one seed."""
        n = len(self.values)
        return float(np.std(self.values, ddof=1) / math.sqrt(n)) if n > 1 else math.inf

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean."""
        if len(self.values) < 2:
            return -math.inf, math.inf
        from scipy.stats import t

        half = float(t.ppf(0.975, len(self.values) - 1)) * self.error
        return self.mean - half, self.mean + half

    @property
    def p_value(self) -> float:
        """Of Student's two-sided t-test that the mean is 0; 1 for one seed or where all differences are 0."""
        if len(self.values) < 2 or not any(self.values):
            return 1.0
        from scipy.stats import t

        return float(2 * t.sf(abs(self.mean) / max(self.error, 1e-300), len(self.values) - 1))

    @property
    def matters(self) -> bool:
        """Whether the mean difference is at least 5 % of the larger mean, or for shares one point in a hundred."""
        return abs(self.mean) >= LEAST * self.scale

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.metric}: {self.a} - {self.b} = {self.mean:+.3g} (95 %: {low:+.3g} to {high:+.3g})"


@dataclass(frozen=True)
class SolutionReport:
    """Solutions by optimizer and seed.

    Attributes:
        rows: a dict for each solution: "optimizer", "at" ("matched" or "best"), "seed", "rate", and its metrics.
        pairs: a dict for each two optimizers and seed: "a", "b", "at", "seed", "barrier", "midpoint_gap" and
            "unit_similarity" of their solutions.
        curve: a dict for each run on the grid of rates: "optimizer", "rate", "seed", and what it was chosen by.
        matched_on: "train_loss", "new_task_acc" or None, with the target and what every optimizer came to.
        details: accuracy matrices and class cosines by "optimizer/at/seed".
        states: weights of every solution by "optimizer/at/seed", and of the start by "start/seed".
    """

    rows: tuple[dict[str, Any], ...]
    pairs: tuple[dict[str, Any], ...]
    curve: tuple[dict[str, Any], ...]
    matched_on: str | None
    target: float | None
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict, repr=False)

    @property
    def optimizers(self) -> list[str]:
        """Names in their order."""
        return list(dict.fromkeys(r["optimizer"] for r in self.rows))

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics."""
        return [k for k in dict.fromkeys(k for r in self.rows for k in r) if k not in IDENTITY]

    @property
    def at(self) -> str:
        """Where solutions are compared unless asked otherwise: "matched" if they were, else "best"."""
        return "best" if self.matched_on is None else "matched"

    def values(self, metric: str, optimizer: str, at: str | None = None) -> list[float]:
        """The metric of one optimizer's solutions, by seed."""
        where = self.at if at is None else checks.one_of("at", at, ("matched", "best"))
        found = [r for r in self.rows if r["optimizer"] == optimizer and r["at"] == where]
        checks.require(
            bool(found) and metric in found[0],
            f"there is no {metric!r} of {optimizer!r} at {where!r}; metrics are {checks.listing(self.metrics, 40)}.",
        )
        return [float(r[metric]) for r in sorted(found, key=lambda r: r["seed"])]

    def table(self, at: str | None = None) -> list[dict[str, Any]]:
        """One dict for each metric: "metric", and mean and deviation over the seeds by optimizer."""
        rows = []
        for metric in self.metrics:
            row: dict[str, Any] = {"metric": metric}
            for name in self.optimizers:
                values = self.values(metric, name, at)
                row[name] = (
                    float(np.mean(values)),
                    float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
                )
            rows.append(row)
        return rows

    def to_pandas(self) -> Any:
        """All solutions as a ``pandas.DataFrame``."""
        import pandas

        return pandas.DataFrame(list(self.rows))

    def paired(self, metric: str, a: str, b: str, at: str | None = None) -> Paired:
        """Difference of two optimizers in one metric, paired by seed."""
        left, right = self.values(metric, a, at), self.values(metric, b, at)
        scale = max(abs(float(np.mean(left))), abs(float(np.mean(right))))
        scale = max(scale, 0.2) if SHARES.search(metric) else scale
        return Paired(metric, a, b, tuple(x - y for x, y in zip(left, right, strict=True)), scale)

    def differences(self, at: str | None = None) -> list[Paired]:
        """All differences that matter, at a false discovery rate of 5 % over all of them (Benjamini and Hochberg).

        The surest comes first.
        """
        names = self.optimizers
        found = [
            self.paired(metric, a, b, at)
            for metric in self.metrics
            for k, a in enumerate(names)
            for b in names[k + 1 :]
        ]
        found.sort(key=lambda p: p.p_value)
        sure = [k for k, p in enumerate(found, 1) if p.p_value <= RATE * k / len(found)]
        return [p for p in found[: sure[-1] if sure else 0] if p.matters]

    def summary(self) -> str:
        """The differences in words, or that there are none."""
        found = self.differences()
        if not found:
            return "no qualitative difference: no metric differs by more than 5 % and the noise."
        return "\n".join(map(str, found))

    def picture(self, title: str = "") -> bytes:
        """A PNG of all metrics, the rates tried, and how the solutions relate (needs matplotlib)."""
        from gradmatch.analysis._solution_picture import draw

        return draw(self, title)

    def save(self, folder: str | Path) -> Path:
        """Write ``solutions.json`` and ``weights.safetensors``; gives the folder."""
        home = Path(folder)
        plain = {k: getattr(self, k) for k in ("rows", "pairs", "curve", "matched_on", "target", "details")}
        tensors = {f"{key}|{name}": t for key, state in self.states.items() for name, t in state.items()}
        if tensors:
            save_tensors(home / WEIGHTS, tensors)
        write_json(home / FILE, _plain(plain))
        return home

    @classmethod
    def load(cls, folder: str | Path) -> SolutionReport:
        """What :meth:`save` wrote."""
        home = Path(folder)
        found = _nans(read_json(home / FILE))
        states: dict[str, State] = {}
        if (home / WEIGHTS).exists():
            for key, tensor in load_tensors(home / WEIGHTS)[0].items():
                run, _, name = key.partition("|")
                states.setdefault(run, {})[name] = tensor
        rows, pairs, curve = (tuple(found[k]) for k in ("rows", "pairs", "curve"))
        return cls(rows, pairs, curve, found["matched_on"], found["target"], found["details"], states)


def _plain(value: Any) -> Any:
    """JSON values, NaN as null."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _nans(value: Any, key: str = "") -> Any:
    """null as NaN, except where it stands for no rate, no target or no matching."""
    if isinstance(value, dict):
        return {k: _nans(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_nans(v) for v in value]
    return math.nan if value is None and key not in ("rate", "target", "matched_on") else value
