"""The runs and measurements of a comparison of optimizers, done once, in several processes, and kept."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.analysis._solution import class_cosines, describe_solution, hidden_vectors
from gradmatch.analysis._solution_report import SolutionReport
from gradmatch.analysis._solution_runs import Outcome, Setup, State, run
from gradmatch.analysis._streams import Stream, memory_figures
from gradmatch.core import checks
from gradmatch.core.assign import linear_assignment
from gradmatch.core.checks import InputError
from gradmatch.core.cpu import keep_freed_memory, threads
from gradmatch.core.examples import Examples
from gradmatch.core.networks import Network, build
from gradmatch.core.problem import Problem
from gradmatch.core.segment import segment
from gradmatch.core.store import RunFolder, load_tensors, save_tensors

Key = tuple[str, float | None, int]
Solutions = Mapping[tuple[str, str, int], tuple[float | None, Outcome, str]]
"""(optimizer, at, seed) -> its rate, its run, and the name of the state."""


def require_deterministic(model_fn: Network) -> None:
    """Refuse a factory that makes different networks under one seed."""
    one, other = (build(model_fn, 0).state_dict() for _ in range(2))
    same = one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    checks.require(
        same,
        "model_fn makes different networks under one seed; it must draw its weights from torch's global generator.",
    )


def held_out(stream: Stream, share: float) -> tuple[Stream, tuple[Examples, ...]]:
    """The stream without a share of each class of every task's training examples, and those."""
    kept, held = [], []
    for data in stream.train:
        generator = torch.Generator().manual_seed(0)
        own: list[Tensor] = []
        for label in range(data.classes):
            of = data.of_class(label)
            count = min(len(of) - 1, max(1, round(share * len(of)))) if len(of) > 1 else 0
            own.append(of[torch.randperm(len(of), generator=generator)[:count]])
        out = torch.zeros(len(data), dtype=torch.bool).index_fill_(0, torch.cat(own), True)
        kept.append(data.take(torch.nonzero(~out).flatten()))
        held.append(data.take(torch.nonzero(out).flatten()))
    return replace(stream, train=tuple(kept)), tuple(held)


def new_task_accuracy(figures: Mapping[str, Any]) -> float:
    """Mean held-out accuracy on every task just after it was learned."""
    return memory_figures(figures["held"])["new_task_acc"]


def means(
    tried: Mapping[Key, Outcome], score: Callable[[Mapping[str, Any]], float]
) -> dict[tuple[str, Any], float]:
    """Mean score over the seeds by (optimizer, rate)."""
    found: dict[tuple[str, Any], list[float]] = {}
    for (name, rate, _), outcome in tried.items():
        found.setdefault((name, rate), []).append(score(outcome.figures))
    return {k: sum(v) / len(v) for k, v in found.items()}


def best_rates(tried: Mapping[Key, Outcome], score: Callable[[Mapping[str, Any]], float]) -> dict[str, Any]:
    """The rate with the best mean score of each optimizer."""
    best: dict[str, tuple[float, Any]] = {}
    for (name, rate), value in means(tried, score).items():
        if name not in best or value > best[name][0]:
            best[name] = (value, rate)
    return {name: rate for name, (_, rate) in best.items()}


def matched_rates(
    learned: Mapping[tuple[str, Any], float], target: float, tolerance: float
) -> dict[str, Any]:
    """The rate of each optimizer whose score is nearest to the target.

    Raises:
        InputError: one is further away than the tolerance.
    """
    found = {}
    for name in dict.fromkeys(n for n, _ in learned):
        gaps = {rate: abs(value - target) for (n, rate), value in learned.items() if n == name}
        rate = min(gaps, key=lambda r: gaps[r])
        checks.require(
            gaps[rate] <= tolerance,
            f"{name} comes no closer than {gaps[rate]:.3f} to a new-task accuracy of {target:.3f}, and the tolerance "
            f"is {tolerance:g}; give it other rates, a target, or match_on=None.",
        )
        found[name] = rate
    return found


def require_matched_losses(found: Mapping[Key, Outcome], target: float, tolerance: float) -> None:
    """Refuse runs that did not come to the target loss."""
    gaps = {k: abs(o.figures["matched_loss"] / target - 1) for k, o in found.items()}
    worst = max(gaps, key=lambda k: gaps[k])
    checks.require(
        gaps[worst] <= tolerance,
        f"{worst[0]} comes no closer than {gaps[worst]:.1%} to a training loss of {target:.4g} (seed {worst[2]}), and "
        f"the tolerance is {tolerance:.1%}; give it more epochs or other rates, a target, or match_on=None.",
    )


class Jobs:
    """Work on a setup, each piece done once and kept in a folder if there is one."""

    def __init__(
        self,
        setup: Setup,
        workers: int,
        out: Path | None,
        progress: Callable[[str, int, int], object] | None,
    ) -> None:
        self.setup, self.workers, self.progress = setup, checks.whole("workers", workers), progress
        self.out = None if out is None else RunFolder(out, _config(setup), resume=True).path / "runs"

    def runs(
        self, tasks: Sequence[tuple[str, Any, int, float | None]], label: str, tolerance: float = 0.05
    ) -> dict[Key, Outcome]:
        """Train each (optimizer, rate, seed, target); rates that diverge are left out, unless all of one do."""
        outcomes = list(self._map(_run, [(self.setup, *t, tolerance, self._file(*t)) for t in tasks], label))
        found = {
            (n, r, s): o for (n, r, s, _), o in zip(tasks, outcomes, strict=True) if isinstance(o, Outcome)
        }
        for (name, _, _, _), outcome in zip(tasks, outcomes, strict=True):
            if isinstance(outcome, InputError):
                if not any(n == name for n, _, _ in found):
                    raise outcome
                warnings.warn(str(outcome), stacklevel=4)
        broken = {(n, r) for (n, r, s, _) in tasks if (n, r, s) not in found}
        return {k: o for k, o in found.items() if k[:2] not in broken}

    def report(
        self,
        solutions: Solutions,
        metrics: list[str],
        sample: int,
        curve: list[dict[str, Any]],
        matched_on: str | None,
        target: float | None,
    ) -> SolutionReport:
        """Describe every solution, and every two of one seed."""
        states = {"/".join(map(str, k)): o.states[which] for k, (_, o, which) in solutions.items()}
        states |= {f"start/{k[2]}": o.states["start"] for k, (_, o, _) in solutions.items()}
        tasks = [
            (self.setup, o.states[which], o.states["start"], metrics, sample, key[2])
            for key, (_, o, which) in solutions.items()
        ]
        rows, details = [], {}
        for (key, (rate, outcome, _)), (found, detail) in zip(
            solutions.items(), self._map(_describe, tasks, "measuring"), strict=True
        ):
            memory = memory_figures(outcome.figures["test"]) if len(self.setup.stream) > 1 else {}
            rows.append({"optimizer": key[0], "at": key[1], "seed": key[2], "rate": rate, **memory, **found})
            details["/".join(map(str, key))] = {**detail, "accuracies": outcome.figures["test"]}
        names = list(dict.fromkeys(k[0] for k in solutions))
        kinds = {k[1:] for k in solutions}
        two = [(a, b, at, seed) for at, seed in sorted(kinds) for a, b in itertools.combinations(names, 2)]
        tasks2 = [(self.setup, states[f"{a}/{at}/{s}"], states[f"{b}/{at}/{s}"]) for a, b, at, s in two]
        pairs = [
            {"a": a, "b": b, "at": at, "seed": s, **found}
            for (a, b, at, s), found in zip(two, self._map(_between, tasks2, "pairs"), strict=True)
        ]
        return SolutionReport(tuple(rows), tuple(pairs), tuple(curve), matched_on, target, details, states)

    def _file(self, *words: Any) -> Path | None:
        return (
            None
            if self.out is None
            else self.out / ("-".join(map(str, words)).replace("/", "_") + ".safetensors")
        )

    def _map(self, work: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], label: str) -> Iterator[Any]:
        found: Iterable[Any]
        if self.workers == 1 or len(tasks) < 2:
            found = (work(*task) for task in tasks)
        else:
            joblib = importlib.import_module("joblib")
            pool = joblib.Parallel(n_jobs=self.workers, return_as="generator", batch_size=1)
            found = pool(joblib.delayed(_alone)(work, task) for task in tasks)
        for done, result in enumerate(found, 1):
            if self.progress is not None:
                self.progress(label, done, len(tasks))
            yield result


def _config(setup: Setup) -> dict[str, Any]:
    """What decides the runs, as JSON values."""
    first = build(setup.model_fn, 0)
    code = hashlib.sha256()
    for data in (*setup.stream.train, *setup.stream.test):
        for t in (data.x, data.y):
            flat: Any = t.contiguous().reshape(-1).view(torch.uint8).numpy()
            code.update(flat)
    for p in first.state_dict().values():
        flat = p.contiguous().reshape(-1).view(torch.uint8).numpy()
        code.update(flat)
    return {
        "optimizers": {k: getattr(f, "__qualname__", type(f).__name__) for k, f in setup.factories.items()},
        "data and start": code.hexdigest()[:16],
        **{k: getattr(setup, k) for k in ("epochs", "batch_size", "schedule", "l2", "reset_state")},
    }


def _alone(work: Callable[..., Any], task: tuple[Any, ...]) -> Any:
    keep_freed_memory()
    return work(*task)


def _run(
    setup: Setup,
    name: str,
    rate: float | None,
    seed: int,
    target: float | None,
    tolerance: float,
    file: Path | None,
) -> Outcome | InputError:
    """One run, read from its file if it is there; a refusal comes back as a value."""
    if file is not None and file.exists():
        tensors, figures = load_tensors(file)
        states: dict[str, State] = {}
        for key, tensor in tensors.items():
            at, _, own = key.partition("|")
            states.setdefault(at, {})[own] = tensor
        return Outcome(figures, states)
    try:
        outcome = run(setup, name, rate, seed, target, tolerance)
    except InputError as error:
        return error
    if file is not None:
        flat = {f"{at}|{k}": t for at, state in outcome.states.items() for k, t in state.items()}
        save_tensors(file, flat, outcome.figures)
    return outcome


def _network(setup: Setup, state: State) -> nn.Module:
    model = build(setup.model_fn, 0, setup.device)
    model.load_state_dict(state)
    return model.eval()


def _together(parts: Sequence[Examples]) -> Examples:
    if len(parts) == 1:
        return parts[0]
    classes = max(p.classes for p in parts)
    return Examples(torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts]), classes)


def _describe(
    setup: Setup, state: State, start: State, metrics: list[str], sample: int, seed: int
) -> tuple[dict[str, float], dict[str, Any]]:
    with threads(1):
        model, train, test = (
            _network(setup, state),
            _together(setup.stream.train),
            _together(setup.stream.test),
        )
        found = describe_solution(
            model, (train, test), start=start, metrics=metrics, sample=sample, seed=seed
        )
        cosines = class_cosines(hidden_vectors(model, test)[1], test.y, train.classes)
    return found, {"class_cosines": cosines.tolist()}


def _between(setup: Setup, a: State, b: State) -> dict[str, float]:
    """The loss on the way from one solution to the other, and how alike their units are after the best matching."""
    with threads(1):
        one, other = _network(setup, a), _network(setup, b)
        train = _together(setup.stream.train)
        few = train.take(torch.arange(0, len(train), max(1, len(train) // 2000)))
        way = segment(Problem(one, "cross_entropy", (few.x, few.y)), one, other, points=11)
        left, right = (hidden_vectors(m, few)[1] for m in (one, other))
    return {
        "barrier": way.barrier,
        "midpoint_gap": way.midpoint_gap,
        "unit_similarity": _unit_similarity(left, right),
    }


def _unit_similarity(a: Tensor, b: Tensor) -> float:
    """Mean correlation of hidden units over examples, each with its partner in the best one-to-one matching."""
    live = [(x - x.mean(0)) / x.std(0).clamp(min=1e-12) for x in (a.double(), b.double())]
    correlations = live[0].T @ live[1] / (len(a) - 1)
    partner = linear_assignment(correlations)
    return float(correlations.gather(1, partner[:, None]).mean())
