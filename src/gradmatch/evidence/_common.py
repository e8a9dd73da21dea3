"""What every experiment shares: its settings, rows, verdict arithmetic, parallel runs, result file and picture.

An experiment is a module ``gradmatch.evidence.<family>.<slug>`` with ``CLAIM`` and ``RULE`` (sentences written
before the run) and ``run(settings) -> Result``. The verdict is computed from the rows by that rule.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from gradmatch.catalog import VERDICTS
from gradmatch.core import checks
from gradmatch.core.cpu import keep_freed_memory
from gradmatch.core.examples import Examples
from gradmatch.core.picture import png, subplots
from gradmatch.core.store import read_json, write_bytes, write_json

BUDGETS = ("small", "full")
_REPORTED = ("gradmatch", "torch", "numpy", "scipy", "scikit-learn")


@dataclass(frozen=True)
class Settings:
    """How an experiment is run.

    Attributes:
        seeds: number of seeds, 0..seeds-1; default None takes the experiment's own.
        budget: "small" (minutes on two cores) or "full" (towards the paper's scale).
        out: folder of the result files.
        runs: folder where finished parts of a long experiment are kept, so that it can be stopped and resumed.
        workers: processes of one thread each.
        quiet: no progress bar.
    """

    seeds: int | None = None
    budget: str = "small"
    out: Path = Path("results")
    runs: Path = Path("runs")
    workers: int = 2
    quiet: bool = False

    def __post_init__(self) -> None:
        checks.one_of("budget", self.budget, BUDGETS)
        if self.seeds is not None:
            checks.whole("seeds", self.seeds)

    @property
    def full(self) -> bool:
        """Whether the paper's scale is asked for."""
        return self.budget == "full"

    def seed_list(self, default: int) -> list[int]:
        """The seeds of this run: 0.. of the number asked for, else of ``default``."""
        return list(range(self.seeds if self.seeds is not None else default))


@dataclass(frozen=True)
class Row:
    """One method under one condition: a value a seed, and what it cost in words."""

    method: str
    values: tuple[float, ...]
    cost: str = ""

    def __post_init__(self) -> None:
        checks.require(len(self.values) > 0, f"row {self.method!r} has no values.")
        bad = [v for v in self.values if not math.isfinite(v)]
        checks.require(not bad, f"row {self.method!r} has the values {self.values}; they must be finite.")

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return float(np.mean(self.values))

    @property
    def std(self) -> float:
        """Standard deviation over the seeds (n - 1 in the denominator); 0 for a single one."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else 0.0


@dataclass(frozen=True)
class Result:
    """What an experiment found; see DESIGN's file format."""

    slug: str
    title: str
    claim: str
    rule: str
    verdict: str
    reason: str
    metric: str
    rows: tuple[Row, ...]
    higher_is_better: bool = True
    links: dict[str, str] = field(default_factory=dict)
    pictures: tuple[tuple[str, bytes], ...] = ()
    seconds: float | None = None
    """Wall time of the whole; default that of this run and of the parts it read from earlier ones."""

    def __post_init__(self) -> None:
        checks.one_of("verdict", self.verdict, VERDICTS)
        names = [r.method for r in self.rows]
        checks.require(len(set(names)) == len(names), f"result {self.slug!r} has two rows of one name.")

    def row(self, method: str) -> Row:
        """The row of that name."""
        found = [r for r in self.rows if r.method == method]
        checks.require(bool(found), f"result {self.slug!r} has no row {method!r}.")
        return found[0]


@dataclass(frozen=True)
class Gain:
    """Paired difference of two rows over the seeds: mean and standard error (infinite for one seed)."""

    mean: float
    error: float

    def above(self, margin: float = 0.0, noise: float = 2.0) -> bool:
        """Whether the difference exceeds ``margin`` by ``noise`` standard errors."""
        return self.mean - noise * self.error > margin

    def below(self, margin: float = 0.0, noise: float = 2.0) -> bool:
        """Whether the difference is under ``margin`` by ``noise`` standard errors."""
        return self.mean + noise * self.error < margin

    def __str__(self) -> str:
        if math.isinf(self.error):
            return f"{self.mean:+.3g} (one seed, noise unknown)"
        return f"{self.mean:+.3g} +- {self.error:.2g}"


class Experiment(Protocol):
    """What a module of evidence offers."""

    CLAIM: str
    RULE: str

    def run(self, settings: Settings) -> Result:
        """Run the experiment; the verdict follows from the rows by ``RULE``."""
        ...


def gain(a: Row | Sequence[float], b: Row | Sequence[float]) -> Gain:
    """a - b, paired by seed."""
    left, right = (np.asarray(r.values if isinstance(r, Row) else r, dtype=float) for r in (a, b))
    checks.same_length("a", left, "b", right)
    difference = left - right
    n = len(difference)
    return Gain(float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(n)) if n > 1 else math.inf)


def beats(
    a: Row | Sequence[float], b: Row | Sequence[float], *, margin: float = 0.0, noise: float = 2.0
) -> bool:
    """Whether a - b, paired by seed, exceeds ``margin`` by ``noise`` standard errors; never so for one seed."""
    return gain(a, b).above(margin, noise)


def verdict_of(conditions: Sequence[bool], *, needed: Sequence[bool] = ()) -> str:
    """ "holds" if every condition is met, "does not hold" if none is (or one of ``needed`` fails), else in part."""
    if needed and not all(needed):
        return "does not hold"
    if all(conditions):
        return "holds"
    return "holds in part" if any(conditions) or needed else "does not hold"


def tally(met: Mapping[Any, bool] | Sequence[bool]) -> str:
    """How many conditions are met, and which are not: by their names, or their places from 1.

    >>> tally([True, False, True])
    'Conditions met: 2 of 3 (not 2).'
    """
    named = dict(met) if isinstance(met, Mapping) else dict(enumerate(met, 1))
    missed = ", ".join(str(k) for k, ok in named.items() if not ok)
    return f"Conditions met: {sum(named.values())} of {len(named)}" + (f" (not {missed})." if missed else ".")


def parallel(
    work: Callable[..., Any], tasks: Iterable[tuple[Any, ...]], settings: Settings, *, label: str = "runs"
) -> list[Any]:
    """``[work(*task) for task in tasks]`` in worker processes of one thread each, with a progress bar.

    ``work`` must be importable (defined at the top of a module). The order of the results is that of the tasks.
    """
    todo = list(tasks)
    with _bar(settings, label, len(todo)) as advance:
        if settings.workers <= 1:
            return [_counted(_alone(work, task), advance) for task in todo]
        from joblib import Parallel, delayed

        pool = Parallel(n_jobs=settings.workers, return_as="generator", batch_size=1)
        return [_counted(r, advance) for r in pool(delayed(_alone)(work, task) for task in todo)]


def _alone(work: Callable[..., Any], task: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    keep_freed_memory()
    return work(*task)


def _counted(result: Any, advance: Callable[[], None]) -> Any:
    advance()
    return result


class _bar:
    """A rich progress bar over whole tasks, or nothing when quiet."""

    def __init__(self, settings: Settings, label: str, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, disable=settings.quiet)
        self.task = self.progress.add_task(label, total=total)

    def __enter__(self) -> Callable[[], None]:
        self.progress.start()
        return lambda: self.progress.advance(self.task)

    def __exit__(self, *error: object) -> None:
        self.progress.stop()


def kept(settings: Settings, slug: str, name: str, config: dict[str, Any], make: Callable[[], Any]) -> Any:
    """A finished part of a long experiment: read from ``runs`` if it is there with equal ``config``, else made.

    What it took to make is kept with it, so that :func:`spared` can tell what a later run saved.
    """
    file = settings.runs / slug / f"{name}.json"
    if file.exists():
        found = read_json(file)
        if found.get("config") == config:
            file.touch()
            return found["value"]
    began = time.perf_counter()
    value = make()
    took = time.perf_counter() - began
    write_json(file, {"config": config, "value": value, "seconds": took, "made": time.time()})
    return value


def spared(settings: Settings, slug: str, since: float) -> float:
    """Seconds of the parts that were made before ``since`` (a clock time) and read again after it, in all."""
    total = 0.0
    for file in (settings.runs / slug).glob("**/*.json"):
        if file.stat().st_mtime < since:
            continue
        found = read_json(file)
        if isinstance(found, dict) and found.get("made", math.inf) < since:
            total += found.get("seconds", 0.0)
    return total


def raw(train: Examples, test: Examples) -> tuple[Examples, Examples]:
    """Both as they are."""
    return train, test


def standardised(train: Examples, test: Examples) -> tuple[Examples, Examples]:
    """Per-channel mean 0 and deviation 1 on the training set, the same map on the test set."""
    axes = [d for d in range(train.x.ndim) if d != 1] if train.x.ndim > 2 else [0]
    mean, std = train.x.mean(axes, keepdim=True), train.x.std(axes, keepdim=True).clamp_min(1e-6)
    return tuple(Examples((e.x - mean) / std, e.y, e.classes) for e in (train, test))  # type: ignore[return-value]


def centred(train: Examples, test: Examples) -> tuple[Examples, Examples]:
    """The training set's mean image taken from both; scale untouched."""
    mean = train.x.mean(0, keepdim=True)
    return tuple(Examples(e.x - mean, e.y, e.classes) for e in (train, test))  # type: ignore[return-value]


PREPROCESSINGS = {"raw": raw, "standardised": standardised, "centred": centred}
"""Input scaling by name: fitted on the training set, applied to both."""


def hold_out(train: Examples, per_class: int, seed: int) -> tuple[Examples, Examples]:
    """The training set less ``per_class`` examples of each class, and those, for choosing settings."""
    generator = torch.Generator().manual_seed(seed)
    held, rest = [], []
    for label in range(train.classes):
        of = train.of_class(label)
        checks.require(
            len(of) > per_class, f"class {label} has {len(of)} samples; {per_class} are to be held out."
        )
        order = of[torch.randperm(len(of), generator=generator)]
        held.append(order[:per_class])
        rest.append(order[per_class:])
    return train.take(torch.cat(rest).sort().values), train.take(torch.cat(held).sort().values)


def per_class(examples: Examples, count: int, seed: int) -> Examples:
    """``count`` examples of each class, drawn without replacement."""
    return hold_out(examples, count, seed)[1]


def relabelled(examples: Examples, classes: Sequence[int]) -> Examples:
    """Only the named classes, relabelled 0.. in that order."""
    index = torch.cat([examples.of_class(c) for c in classes]).sort().values
    table = torch.full((examples.classes,), -1, dtype=torch.long)
    table[torch.tensor(classes)] = torch.arange(len(classes))
    return Examples(examples.x[index], table[examples.y[index]], len(classes))


def halved(examples: Examples) -> Examples:
    """Images at half the side, by the mean of 2 x 2 pixels."""
    return Examples(torch.nn.functional.avg_pool2d(examples.x, 2), examples.y, examples.classes)


def accuracy(logits: Tensor, y: Tensor) -> float:
    """Share of right answers."""
    return float((logits.argmax(-1) == y).double().mean())


def bar_picture(rows: Sequence[Row], metric: str, title: str) -> bytes:
    """A PNG of every row's mean with its standard deviation, and each seed as a dot.

    Bars start at 0; where that would hide the differences, the means are points on a shorter axis instead.
    """
    figure, axis = subplots(figsize=(8, 0.9 + 0.3 * len(rows)))
    places, means = np.arange(len(rows))[::-1], [r.mean for r in rows]
    low, high = min(min(r.values) for r in rows), max(max(r.values) for r in rows)
    if low > 0 and high < 3 * low:
        axis.plot(means, places, "o", color="#3f7ea6", markersize=7)
        axis.grid(axis="y", alpha=0.3)
    else:
        axis.barh(places, means, color="#7aa6c2", height=0.7)
    axis.errorbar(means, places, xerr=[r.std for r in rows], fmt="none", ecolor="#33485a")
    for place, row in zip(places, rows, strict=True):
        axis.plot(row.values, [place] * len(row.values), ".", color="#1d2b36", markersize=4)
    axis.set_yticks(places, [r.method for r in rows], fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_xlabel(metric, fontsize=9)
    axis.set_title(title, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    return png(figure)


def write_result(result: Result, settings: Settings, seconds: float) -> Path:
    """Write ``<slug>.json`` and its pictures into ``settings.out``, each atomically."""
    pictures = result.pictures or (
        (f"{result.slug}.png", bar_picture(result.rows, result.metric, result.title)),
    )
    for name, content in pictures:
        write_bytes(settings.out / name, content)
    seeds = max(len(r.values) for r in result.rows)
    command = f"gradmatch evidence {result.slug}"
    command += f" --seeds {settings.seeds}" if settings.seeds is not None else ""
    command += f" --budget {settings.budget}" if settings.full else ""
    return write_json(
        settings.out / f"{result.slug}.json",
        {
            "slug": result.slug,
            "title": result.title,
            "claim": result.claim,
            "rule": result.rule,
            "verdict": result.verdict,
            "reason": result.reason
            if seeds > 1
            else f"One seed, so the noise is unknown. {result.reason}".strip(),
            "metric": result.metric,
            "higher_is_better": result.higher_is_better,
            "rows": [
                {"method": r.method, "mean": r.mean, "std": r.std, "values": list(r.values), "cost": r.cost}
                for r in result.rows
            ],
            "budget": settings.budget,
            "seeds": seeds,
            "wall_seconds": round(seconds if result.seconds is None else result.seconds, 1),
            "command": command,
            "versions": _versions(),
            "pictures": [name for name, _ in pictures],
            "links": result.links,
        },
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _REPORTED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def experiment(slug: str) -> Experiment:
    """The module of one experiment.

    Raises:
        InputError: there is none of that name yet.
    """
    name = slug.replace("-", "_")
    found = [f for f in sorted(Path(__file__).parent.glob(f"*/{name}.py")) if not name.startswith("_")]
    checks.require(
        bool(found), f"evidence {slug!r} is not built yet; 'gradmatch list --built' shows what is."
    )
    return cast(Experiment, import_module(f"gradmatch.evidence.{found[0].parent.name}.{name}"))


def experiments() -> list[str]:
    """Slugs of all experiments that are built."""
    files = sorted(Path(__file__).parent.glob("*/[a-z]*.py"))
    return [f.stem.replace("_", "-") for f in files]


def run_experiment(slug: str, settings: Settings) -> tuple[Result, Path]:
    """Run one experiment and write its result and picture."""
    module = experiment(slug)
    keep_freed_memory()
    since, began = time.time(), time.perf_counter()
    result: Result = module.run(settings)
    seconds = time.perf_counter() - began + spared(settings, slug, since) / settings.workers
    return result, write_result(result, settings, seconds)
