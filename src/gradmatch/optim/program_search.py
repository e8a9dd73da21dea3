"""Symbolic discovery of optimizers (Chen et al.; NeurIPS 2023, arXiv 2302.06675): the search that found Lion.

A population of programs, all AdamW at first, evolves with aging: draw a tournament, copy its fittest, mutate one
statement, score the child on a small proxy task, append it, drop the oldest. Programs that compute the same have the
same fingerprint and are scored once. What is found on the proxy is then scored on larger tasks, fewer each time
(:func:`funnel`), and loses the statements that do nothing there (:func:`simplify`).
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradmatch.core import checks
from gradmatch.core.store import RunFolder, write_bytes
from gradmatch.optim import programs
from gradmatch.optim._program import Program
from gradmatch.optim._program_functions import FUNCTIONS
from gradmatch.optim._program_mutate import mutate
from gradmatch.optim._program_refine import funnel, simplify
from gradmatch.optim._program_result import SearchResult
from gradmatch.optim._program_tasks import MLPTask, ModelTask, Task, seeded_tasks, tuned

__all__ = ["MLPTask", "ModelTask", "ProgramSearch", "SearchResult", "Task", "funnel", "simplify", "tuned"]

STRATEGIES = ("evolution", "random", "chains")
CHAIN = 8
TOP = 50
_RESULT, _SOURCE = "result.json", "best.py"
Progress = Callable[[int, int, dict[str, float]], object]


@dataclass
class _State:
    """A search in the middle."""

    population: deque[tuple[Program, float]]
    rng: np.random.Generator
    initial: float
    history: list[float] = field(default_factory=list)
    hits: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    top: dict[str, tuple[float, Program]] = field(default_factory=dict)
    best: tuple[float, Program] | None = None
    stalled: int = 0


class ProgramSearch:
    """Regularised evolution of optimizer programs.

    Args:
        init: the program of the whole first population, default AdamW.
        tasks: what scores a program: one task or several, of which the mean is taken. A task is
            :class:`MLPTask`, :class:`ModelTask`, or any function of a program with a ``seed``; equal programs must
            get equal scores.
        functions: names that new statements draw from, default all.
        population: programs alive, default 100 (paper 1000).
        tournament: drawn at each cycle, default 25.
        max_len: longest program.
        cache: score programs of equal fingerprint once.
        strategy: "evolution"; or the baselines "random", single mutations of ``init``, and "chains", 1 to 8 of them.
        restart: refill the population with the best program after this many mutations without a better one.
        constants_only: mutate constants alone, to tune a program that was found.
        seed: of the search.

    Raises:
        InputError: options out of range, an unknown function, a task without seed, or an initial program that fails
            abstract execution or scores infinity.

    >>> from gradmatch.optim import programs
    >>> def task(program): return float(len(program.trimmed()))
    >>> task.seed = 0
    >>> found = ProgramSearch(programs.adamw(), tasks=[task], population=10, tournament=5).run(300)
    >>> found.fitness < found.initial
    True
    """

    def __init__(
        self,
        init: Program | str | None = None,
        *,
        tasks: Task | Iterable[Task],
        functions: Sequence[str] = tuple(FUNCTIONS),
        population: int = 100,
        tournament: int = 25,
        max_len: int = 20,
        cache: bool = True,
        strategy: str = "evolution",
        restart: int | None = None,
        constants_only: bool = False,
        seed: int = 0,
    ) -> None:
        init = programs.adamw() if init is None else init
        self.init = Program.parse(init) if isinstance(init, str) else init
        self.init.kinds()
        self.tasks = seeded_tasks(tasks)
        for name in functions:
            checks.one_of("functions", name, FUNCTIONS)
        self.functions = tuple(functions)
        self.population = checks.whole("population", population)
        self.tournament = checks.whole("tournament", tournament, 1, self.population)
        self.max_len = checks.whole("max_len", max_len, len(self.init))
        self.cache, self.constants_only = bool(cache), bool(constants_only)
        self.strategy = checks.one_of("strategy", strategy, STRATEGIES)
        self.restart = None if restart is None else checks.whole("restart", restart)
        self.seed = checks.whole("seed", seed, 0)

    def describe(self) -> dict[str, Any]:
        """The settings that decide the result, as JSON values."""
        names = ("functions", "population", "tournament", "max_len", "cache", "strategy", "restart")
        own = {name: getattr(self, name) for name in (*names, "constants_only", "seed")}
        tasks = [t.describe() if hasattr(t, "describe") else {"seed": t.seed} for t in self.tasks]
        return {"init": self.init.to_source(), **own, "functions": list(self.functions), "tasks": tasks}

    def run(
        self,
        n_evaluations: int,
        *,
        out: str | Path | None = None,
        resume: bool = False,
        save_every: float = 2.0,
        progress: Progress | None = None,
    ) -> SearchResult:
        """Mutate and score ``n_evaluations`` programs (those found in the cache among them).

        Args:
            n_evaluations: mutations in all.
            out: folder that keeps the state, so that a stopped search goes on with ``resume`` to the same result, and
                at the end result.json and best.py.
            resume: go on with what ``out`` holds, or start where it holds nothing.
            save_every: seconds between two states.
            progress: called after each mutation with (done, all, figures).
        """
        checks.whole("n_evaluations", n_evaluations, 0)
        folder = None
        if out is not None:
            folder = RunFolder(out, {**self.describe(), "n_evaluations": n_evaluations}, resume)
            if (folder.path / _RESULT).exists():
                return SearchResult.load(folder.path / _RESULT)
        state = self._load(folder) or self._begin()
        saved = time.monotonic()
        while len(state.history) < n_evaluations:
            self._cycle(state)
            if folder is not None and time.monotonic() - saved >= save_every:
                self._save(folder, state)
                saved = time.monotonic()
            if progress is not None:
                assert state.best is not None
                figures = {"best": state.best[0], "start": state.initial}
                progress(len(state.history), n_evaluations, figures)
        result = self._result(state)
        if folder is not None:
            folder.finish(lambda path: self._write(path, result))
        return result

    # --- the cycle -----------------------------------------------------------------------------------------

    def score(self, program: Program) -> float:
        """Mean score over the tasks; infinity where one fails."""
        total = 0.0
        for task in self.tasks:
            found = float(task(program))
            if not math.isfinite(found):
                return math.inf
            total += found
        return total / len(self.tasks)

    def _begin(self) -> _State:
        initial = self.score(self.init)
        checks.require(
            math.isfinite(initial), f"init scores {initial} on the tasks; a search needs a program that runs."
        )
        state = _State(
            deque([(self.init, initial)] * self.population), np.random.default_rng(self.seed), initial
        )
        self._note(state, self.init, initial)
        return state

    def _cycle(self, state: _State) -> None:
        child = self._child(state)
        key = child.fingerprint()
        if self.cache and key in state.scores:
            fitness = state.scores[key]
            state.hits += 1
        else:
            fitness = self.score(child)
        assert state.best is not None
        state.stalled = 0 if fitness < state.best[0] else state.stalled + 1
        self._note(state, child, fitness, key)
        state.history.append(fitness)
        state.population.append((child, fitness))
        state.population.popleft()
        if self.restart is not None and state.stalled >= self.restart:
            best_fitness, best = state.best
            state.population = deque([(best, best_fitness)] * self.population)
            state.stalled = 0

    def _child(self, state: _State) -> Program:
        rng, parent, changes = state.rng, self.init, 1
        if self.strategy == "evolution":
            drawn = rng.choice(self.population, self.tournament, replace=False)
            parent = min((state.population[i] for i in sorted(drawn)), key=lambda own: own[1])[0]
        elif self.strategy == "chains":
            changes = int(rng.integers(1, CHAIN + 1))
        for _ in range(changes):
            parent = mutate(parent, rng, self.functions, self.max_len, self.constants_only)
        return parent

    def _note(self, state: _State, program: Program, fitness: float, key: str | None = None) -> None:
        key = program.fingerprint() if key is None else key
        state.scores[key] = fitness
        if state.best is None or fitness < state.best[0]:
            state.best = (fitness, program)
        if key not in state.top and math.isfinite(fitness):
            state.top[key] = (fitness, program)
            if len(state.top) > TOP:
                del state.top[max(state.top, key=lambda k: state.top[k][0])]

    def _result(self, state: _State) -> SearchResult:
        assert state.best is not None
        top = sorted(state.top.values(), key=lambda own: own[0])
        return SearchResult(
            state.best[1],
            state.best[0],
            state.initial,
            tuple(state.history),
            state.hits,
            tuple((p, x) for x, p in top),
        )

    # --- the folder ----------------------------------------------------------------------------------------

    def _save(self, folder: RunFolder, state: _State) -> None:
        sources = list(dict.fromkeys(p.to_source() for p, _ in state.population))
        place = {source: i for i, source in enumerate(sources)}
        assert state.best is not None
        keys, top = list(state.scores), list(state.top.items())
        tensors = {
            "history": torch.tensor(state.history, dtype=torch.float64),
            "fitness": torch.tensor([x for _, x in state.population], dtype=torch.float64),
            "program": torch.tensor([place[p.to_source()] for p, _ in state.population]),
            "scores": torch.tensor([state.scores[k] for k in keys], dtype=torch.float64),
            "top": torch.tensor([x for _, (x, _) in top], dtype=torch.float64),
            "best": torch.tensor([state.best[0], state.initial], dtype=torch.float64),
        }
        info = {
            "programs": sources,
            "keys": keys,
            "top": [[k, p.to_source()] for k, (_, p) in top],
            "best": state.best[1].to_source(),
            "rng": state.rng.bit_generator.state,
            "hits": state.hits,
            "stalled": state.stalled,
        }
        folder.save(len(state.history), tensors, info)

    def _load(self, folder: RunFolder | None) -> _State | None:
        found = None if folder is None else folder.load()
        if found is None:
            return None
        _, tensors, info = found
        kinds = [Program.parse(source) for source in info["programs"]]
        pairs = zip(tensors["program"].tolist(), tensors["fitness"].tolist(), strict=True)
        rng = np.random.default_rng()
        rng.bit_generator.state = info["rng"]
        best, initial = tensors["best"].tolist()
        top = zip(info["top"], tensors["top"].tolist(), strict=True)
        return _State(
            deque((kinds[i], x) for i, x in pairs),
            rng,
            initial,
            tensors["history"].tolist(),
            int(info["hits"]),
            dict(zip(info["keys"], tensors["scores"].tolist(), strict=True)),
            {key: (x, Program.parse(source)) for (key, source), x in top},
            (best, Program.parse(info["best"])),
            int(info["stalled"]),
        )

    @staticmethod
    def _write(path: Path, result: SearchResult) -> None:
        head = f"# score {result.fitness!r}; the program at the start {result.initial!r}\n"
        write_bytes(path / _SOURCE, (head + result.best.to_source()).encode())
        result.save(path / _RESULT)
