"""Optimizers Qualitatively Alter Solutions And We Should Leverage This (Pascanu et al., 2025, arXiv 2507.12224).

Which optimizer gives what kind of solution? Compared at equal steps, an optimizer that has learned less seems to forget
less, to be flatter, sparser and so on. So every optimizer starts from the same weights and sees the same batches; its
rate comes from one grid, by held-out training examples; and solutions are compared where they fit equally well:

* one task: at an equal training loss, each run stopped where it comes to it;
* a stream of tasks: at an equal accuracy on new tasks, by choice of the rate (lower rates forget less, always);
* besides, each at its own best rate.

Differences are paired by seed. On a convex problem all find the same solution, and the report says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gradmatch.analysis import _solution_jobs as jobs
from gradmatch.analysis._powerprop import PowerPropagated, reparametrize
from gradmatch.analysis._shampoo import Shampoo
from gradmatch.analysis._solution import METRICS, describe_solution
from gradmatch.analysis._solution_jobs import Jobs
from gradmatch.analysis._solution_report import Paired, SolutionReport
from gradmatch.analysis._solution_runs import Factory, Setup
from gradmatch.analysis._streams import Stream, class_stream, memory_figures, permuted_stream
from gradmatch.core import checks
from gradmatch.core.examples import Examples, as_examples
from gradmatch.core.networks import Network

__all__ = [
    "Paired",
    "PowerPropagated",
    "Shampoo",
    "SolutionReport",
    "Stream",
    "class_stream",
    "compare_optimizers",
    "describe_solution",
    "permuted_stream",
    "reparametrize",
]

Match = Literal["auto", "train_loss", "new_task_acc"]
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
TUNING_SEED = 10_000


def compare_optimizers(
    model_fn: Network,
    optimizers: Mapping[str, Factory],
    data: Any,
    *,
    match_on: Match | None = "auto",
    rates: Sequence[float] | Mapping[str, Sequence[float]] = RATES,
    target: float | None = None,
    tolerance: float | None = None,
    seeds: int = 3,
    epochs: int = 5,
    batch_size: int = 64,
    schedule: Literal["cosine"] | None = None,
    l2: float = 0.0,
    reset_state: bool = False,
    metrics: Iterable[str] | None = None,
    sample: int = 500,
    held: float = 0.1,
    device: str | None = None,
    workers: int = 1,
    out: str | Path | None = None,
    progress: Callable[[str, int, int], object] | None = None,
) -> SolutionReport:
    """Train one classifier with several optimizers and say how the solutions differ.

    Args:
        model_fn: a function that makes the network, the same one for the same seed of torch's generator.
        optimizers: by name, ``factory(params, lr=rate)``: any class of ``torch.optim``, or a function of yours. What
            an optimizer declares as ``protocols`` (a graph, a closure) is followed.
        data: a ``Split``, a pair (train, test) of labelled data, or a :class:`Stream` of tasks.
        match_on: "train_loss" (one task), "new_task_acc" (a stream: the mean accuracy on each task when it has just
            been learned, on held-out examples), "auto" (whichever fits) or None (each at its best rate only).
        rates: learning rates tried, the same for all or by name; an empty grid calls ``factory(params)``.
        target: the loss or accuracy to match. Default: what all can reach.
        tolerance: of the match; default 5 % of the loss, or 0.02 of accuracy.
        seeds: number of seeds; each decides the start and the batches of one run of every optimizer.
        epochs, batch_size: for every task. A run that has not come to the target loss goes on for as long again.
        schedule: of the rates within a task: constant or "cosine".
        l2: lambda in loss + lambda / 2 |w|^2, part of the objective for all alike.
        reset_state: begin every task with a new optimizer.
        metrics: families of :func:`describe_solution`; default all.
        sample: training examples for the metrics that need derivatives.
        held: share of every class held out of training, by which rates are chosen.
        workers: processes of one thread each.
        out: folder for finished runs; the same call goes on from there.
        progress: called with (what, done, of).

    Raises:
        InputError: a ``model_fn`` that is not deterministic under a seed, runs that diverge at every rate, or a match
            that is not reached (with the closest gap).

    >>> x, y = torch.randn(60, 4), torch.arange(60) % 2
    >>> report = compare_optimizers(
    ...     lambda: torch.nn.Linear(4, 2), {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}, ((x, y), (x, y)),
    ...     match_on=None, rates=[0.01], seeds=2, epochs=1, metrics=["fit"],
    ... )
    >>> report.optimizers, len(report.rows)
    (['sgd', 'adam'], 4)
    """
    stream = data if isinstance(data, Stream) else _single(data)
    plan = _plan(match_on, stream, optimizers, rates, target, tolerance, schedule)
    _check_numbers(seeds, epochs, batch_size, l2, sample)
    for name in metrics or ():
        checks.one_of("metrics", name, METRICS)
    jobs.require_deterministic(model_fn)
    kept, held_out = jobs.held_out(stream, checks.fraction("held", held, one=False))
    setup = Setup(
        model_fn,
        dict(optimizers),
        kept,
        held_out,
        epochs,
        batch_size,
        checks.one_of("schedule", schedule, (None, "cosine")),
        l2,
        bool(reset_state),
        device or "cpu",
    )
    work = Jobs(setup, workers, None if out is None else Path(out), progress)
    wanted = list(METRICS) if metrics is None else list(metrics)
    if len(stream) > 1:
        return _on_stream(work, plan, list(range(seeds)), wanted, sample)
    return _on_one_task(work, plan, list(range(seeds)), wanted, sample)


@dataclass(frozen=True)
class _Plan:
    match_on: str | None
    grids: dict[str, tuple[float | None, ...]]
    target: float | None
    tolerance: float


def _plan(
    match_on: Match | None,
    stream: Stream,
    optimizers: Mapping[str, Factory],
    rates: Sequence[float] | Mapping[str, Sequence[float]],
    target: float | None,
    tolerance: float | None,
    schedule: str | None,
) -> _Plan:
    checks.require(bool(optimizers), "optimizers is empty; at least one is needed.")
    for name, factory in optimizers.items():
        checks.require(
            callable(factory), f"optimizers[{name!r}] is {factory!r}; it must be factory(params, lr=rate)."
        )
    fitting = "new_task_acc" if len(stream) > 1 else "train_loss"
    if match_on is not None:
        checks.one_of("match_on", match_on, ("auto", "train_loss", "new_task_acc"))
        kind = "a stream of tasks" if len(stream) > 1 else "one task"
        checks.require(
            match_on in ("auto", fitting), f"match_on is {match_on!r}; {kind} is matched on {fitting!r}."
        )
    grids: dict[str, tuple[float | None, ...]] = {}
    for name in optimizers:
        grid = rates.get(name, RATES) if isinstance(rates, Mapping) else rates
        grids[name] = tuple(checks.positive("rates", r) for r in grid) or (None,)
    strange = [k for k in rates if k not in optimizers] if isinstance(rates, Mapping) else []
    checks.require(not strange, f"rates has {checks.listing(strange)}, which optimizers has not.")
    if target is not None:
        checks.positive("target", target)
    default = 0.02 if fitting == "new_task_acc" else 0.05
    found = default if tolerance is None else checks.positive("tolerance", tolerance)
    return _Plan(None if match_on is None else fitting, grids, target, found)


def _check_numbers(seeds: int, epochs: int, batch_size: int, l2: float, sample: int) -> None:
    for name, value in (("seeds", seeds), ("epochs", epochs), ("batch_size", batch_size), ("sample", sample)):
        checks.whole(name, value)
    checks.nonnegative("l2", l2)
    if seeds < 2:
        warnings.warn("seeds is 1: differences cannot be told from noise.", stacklevel=3)


def _single(data: Any) -> Stream:
    train, test = (data.train, data.test) if hasattr(data, "train") else data
    first: Examples = as_examples(train, name="train")
    return Stream((first,), (as_examples(test, first.classes, name="test"),), ("task",))


def _on_one_task(
    work: Jobs, plan: _Plan, seeds: list[int], metrics: list[str], sample: int
) -> SolutionReport:
    grid = [(name, rate, TUNING_SEED, None) for name, rates in plan.grids.items() for rate in rates]
    tried = work.runs(grid, "rates")
    best = jobs.best_rates(tried, lambda f: f["held"][-1][0])
    target = None
    if plan.match_on is not None:
        slowest = max(tried[name, rate, TUNING_SEED].figures["loss"] for name, rate in best.items())
        target = plan.target if plan.target is not None else 1.1 * slowest
    found = work.runs([(n, r, s, target) for n, r in best.items() for s in seeds], "training", plan.tolerance)
    solutions = {(n, "best", s): (r, found[n, r, s], "final") for n, r in best.items() for s in seeds}
    if target is not None:
        jobs.require_matched_losses(found, target, plan.tolerance)
        solutions |= {
            (n, "matched", s): (r, found[n, r, s], "matched") for n, r in best.items() for s in seeds
        }
    curve = [
        {
            "optimizer": n,
            "rate": r,
            "seed": s,
            "held_acc": o.figures["held"][-1][0],
            "train_loss": o.figures["loss"],
        }
        for (n, r, s), o in tried.items()
    ]
    return work.report(solutions, metrics, sample, curve, plan.match_on, target)


def _on_stream(work: Jobs, plan: _Plan, seeds: list[int], metrics: list[str], sample: int) -> SolutionReport:
    grid = [(n, r, s, None) for n, rates in plan.grids.items() for r in rates for s in seeds]
    tried = work.runs(grid, "training")
    learned = jobs.means(tried, jobs.new_task_accuracy)
    best = jobs.best_rates(tried, jobs.new_task_accuracy)
    solutions = {(n, "best", s): (r, tried[n, r, s], "final") for n, r in best.items() for s in seeds}
    target = None
    if plan.match_on is not None:
        target = plan.target if plan.target is not None else min(learned[n, r] for n, r in best.items())
        matched = jobs.matched_rates(learned, target, plan.tolerance)
        solutions |= {
            (n, "matched", s): (r, tried[n, r, s], "final") for n, r in matched.items() for s in seeds
        }
    curve = [
        {
            "optimizer": n,
            "rate": r,
            "seed": s,
            "held_new_task_acc": jobs.new_task_accuracy(o.figures),
            **memory_figures(o.figures["test"]),
        }
        for (n, r, s), o in tried.items()
    ]
    return work.report(solutions, metrics, sample, curve, plan.match_on, target)
