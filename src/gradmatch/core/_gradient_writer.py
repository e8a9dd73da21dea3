"""The parts of a gradient store computed, in this process or in several."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from gradmatch.core import _reading, _workers, cpu
from gradmatch.core._batches import Batch
from gradmatch.core._gradient_store import DTYPES, GradientStore, Progress, part_file
from gradmatch.core._per_example import Engine
from gradmatch.core.checks import finite, require, whole
from gradmatch.core.problem import Problem
from gradmatch.core.store import save_tensors

_START_SECONDS = 8.0  # importing torch in a fresh worker and sending it the problem


def write(
    problem: Problem,
    store: GradientStore,
    parts: Sequence[int],
    workers: int | None,
    progress: Progress | None,
) -> None:
    """Write those of ``parts`` that are not there."""
    todo = sorted(set(parts) - set(store.present()))
    on_cpu = problem.space.device.type == "cpu"
    if workers is not None:
        require(
            whole("workers", workers) == 1 or on_cpu,
            f"workers is {workers} for a model on {problem.space.device}; use one, or shards on several devices.",
        )
    elif todo and on_cpu:
        began = time.perf_counter()
        _here(problem, store, todo[:1], parts, progress)
        todo = todo[1:]
        rest, cores = (time.perf_counter() - began) * len(todo), _workers.available()
        workers = cores if rest > _START_SECONDS + rest / cores else 1
    if todo and workers is not None and workers > 1:
        _in_processes(problem, store, todo, parts, min(workers, len(todo)), progress)
    else:
        _here(problem, store, todo, parts, progress)


def _here(
    problem: Problem,
    store: GradientStore,
    todo: Sequence[int],
    parts: Sequence[int],
    progress: Progress | None,
) -> None:
    if not todo:
        return
    writer = _Writer(problem, store)
    numbers = {start: number for number, (start, _) in enumerate(store.manifest["parts"])}
    part: list[tuple[Tensor, Tensor]] = []
    number = -1
    with cpu.threads(1) if problem.space.device.type == "cpu" else nullcontext():
        for batch in problem.batches():
            number = numbers.get(batch.start, number)
            if number not in todo:
                continue
            part.append(writer.features(batch))
            if batch.start + batch.size == store.manifest["parts"][number][1]:
                features, norms = (torch.cat(pieces) for pieces in zip(*part, strict=True))
                save_tensors(part_file(store.path, number), {"features": features, "norms": norms})
                part = []
                _report(store, parts, progress)


def _report(store: GradientStore, parts: Sequence[int], progress: Progress | None) -> None:
    if progress is not None:
        sizes = {
            k: stop - start for k, (start, stop) in enumerate(store.manifest["parts"]) if k in set(parts)
        }
        progress(sum(sizes.get(k, 0) for k in store.present()), sum(sizes.values()))


class _Writer:
    """Features and norms of batches."""

    def __init__(self, problem: Problem, store: GradientStore) -> None:
        self.engine = Engine(problem, problem.resolve(), False, "auto")
        self.space, self.width = problem.space, store.shape[1]
        self.dtype = DTYPES[store.manifest["dtype"]]
        self.projection = store.projection(self.space.device)

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Rows [m, k] in the store's type, and norms [m]."""
        wide = torch.float64 if self.space.dtype == torch.float64 else torch.float32
        out = torch.zeros(batch.size, self.width, dtype=wide, device=self.space.device)
        squares = torch.zeros(batch.size, dtype=torch.float64, device=self.space.device)
        for name, part, rows in self.engine.stream(batch):
            rows = rows.to(wide)
            squares[part] += _reading.square_norms(rows).double()
            if self.projection is None:
                out[part, self.space.slices[name]] = rows
            else:
                self.projection.add(name, rows, out[part])
        finite("per-example gradients", squares)
        if self.dtype != wide:
            out = finite(f"gradients as {self.dtype}", out.to(self.dtype))
        return out.cpu(), squares.sqrt().cpu()


def _in_processes(
    problem: Problem,
    store: GradientStore,
    todo: Sequence[int],
    parts: Sequence[int],
    workers: int,
    progress: Progress | None,
) -> None:
    """Every worker writes every ``workers``-th part; what is there is counted from outside."""
    require(
        importlib.util.find_spec("joblib") is not None,
        f"workers is {workers}; more than one needs 'pip install joblib'.",
    )
    loky = importlib.import_module("joblib.externals.loky")
    pool = loky.get_reusable_executor(max_workers=workers)
    tasks = [pool.submit(_task, problem, store.path, todo[k::workers]) for k in range(workers)]
    while not all(task.done() for task in tasks):
        time.sleep(0.1)
        _report(store, parts, progress)
    for task in tasks:
        task.result()
    _report(store, parts, progress)


def _task(problem: Problem, path: Path, todo: Sequence[int]) -> None:
    cpu.keep_freed_memory()
    _here(problem, GradientStore(path), todo, todo, None)
