"""The comparison at the end of a distillation or selection: learned, random and all the real data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradmatch.core.cpu import keep_freed_memory, threads
from gradmatch.core.examples import Examples
from gradmatch.core.networks import Network
from gradmatch.data._common import Evaluation, SyntheticDataset, channel_moments, evaluate

ALL_PASSES = 120_000
"""Real images that the network of the row "all data" may see: at least two epochs, at most the evaluator's."""
POOL_SECONDS = 20.0
"""Work left from which on worker processes pay for being started."""


@dataclass(frozen=True)
class Score:
    """One row: what was trained on, how networks trained on it do on the real test set, in how long."""

    name: str
    images: int
    accuracies: tuple[float, ...]
    seconds: float
    note: str

    @property
    def mean(self) -> float:
        """Mean accuracy."""
        return float(np.mean(self.accuracies))

    @property
    def std(self) -> float:
        """Standard deviation over the networks (n - 1); 0 for one."""
        return float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else 0.0

    def cells(self) -> tuple[str, ...]:
        """For a table."""
        from gradmatch.cli._show import minutes

        spread = f" ± {100 * self.std:.1f}" if len(self.accuracies) > 1 else ""
        return (
            self.name,
            f"{self.images:,}",
            f"{100 * self.mean:.1f}{spread} %",
            minutes(self.seconds),
            self.note,
        )

    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"mean": self.mean, "std": self.std, "accuracies": list(self.accuracies)}


HEAD = ("trained on", "images", "test accuracy", "training", "how")


@dataclass(frozen=True)
class Group:
    """A row to be measured: one network is trained on each of ``sets``."""

    name: str
    sets: Sequence[SyntheticDataset]
    note: str
    options: dict[str, Any]


def part_of(train: Examples, indices: Tensor | None = None) -> SyntheticDataset:
    """Real images as a set to train on, standardised as all of them are."""
    mean, std = channel_moments(train.x)
    some = train if indices is None else train.take(indices)
    return SyntheticDataset(some.x, some.y, train.classes, None, mean, std)


def learned(name: str, made: SyntheticDataset, networks: int, epochs: int) -> Group:
    """Several networks trained on one set."""
    note = f"{networks} networks" if networks > 1 else "1 network"
    return Group(name, [made] * networks, note + (", soft labels" if made.soft else ""), {"epochs": epochs})


def drawn(name: str, draws: Sequence[SyntheticDataset], epochs: int) -> Group:
    """One network on each of several random draws."""
    note = f"{len(draws)} draws, a network each" if len(draws) > 1 else "1 draw"
    return Group(name, draws, note, {"epochs": epochs})


def everything(train: Examples, epochs: int) -> Group:
    """One network on all the real data, for as many epochs as stay cheap (the row says how many)."""
    count = all_epochs(len(train), epochs)
    options: dict[str, Any] = {"epochs": count}
    if count < epochs:  # few epochs want a larger rate than the evaluator's many
        options |= {"lr": 0.05, "batch_size": 128}
    return Group("all real images", [part_of(train)], "1 network", options)


def all_epochs(examples: int, epochs: int) -> int:
    """Epochs over all the data that the comparison can afford.

    >>> all_epochs(60_000, 300), all_epochs(1_000, 300), all_epochs(50, 300)
    (2, 120, 300)
    """
    return min(epochs, max(2, ALL_PASSES // examples))


def compare(
    groups: Sequence[Group],
    network: Network,
    test: Examples,
    *,
    seed: int = 0,
    device: str | None = None,
    advance: Callable[[int, int], object] = lambda done, total: None,
) -> list[Score]:
    """Train and test every network of every group; the k-th of each starts from the same seed.

    On the CPU each network has one thread, so that figures are the same whether they run one after the other or,
    where much is left to do after the first, side by side in worker processes.
    """
    tasks = [
        (g, (made, network, test, {"seed": seed + k, "device": device, **group.options}))
        for g, group in enumerate(groups)
        for k, made in enumerate(group.sets)
    ]
    began = time.perf_counter()
    found = [(tasks[0][0], _one(*tasks[0][1]))]
    advance(1, len(tasks))
    left = (time.perf_counter() - began) * (len(tasks) - 1)
    # the longest first: the last group is all the data
    rest = tasks[:0:-1]
    for (g, _), result in zip(rest, _results([t for _, t in rest], left, device, test), strict=True):
        found.append((g, result))
        advance(len(found), len(tasks))
    return [
        _row(group, [result for h, result in sorted(found, key=lambda f: f[0]) if h == g])
        for g, group in enumerate(groups)
    ]


def _results(
    tasks: Sequence[tuple[Any, ...]], seconds: float, device: str | None, test: Examples
) -> Iterator[Evaluation]:
    """The tasks' results in their order, from worker processes where that pays and can be done."""
    on_cpu = torch.device(device or test.x.device).type == "cpu"
    if seconds < POOL_SECONDS or not on_cpu or find_spec("joblib") is None or _workers() < 2:
        return (_one(*task) for task in tasks)
    from joblib import Parallel, delayed

    pool = Parallel(
        n_jobs=min(_workers(), len(tasks)), return_as="generator", batch_size=1, pre_dispatch="all"
    )
    results: Iterator[Evaluation] = pool(delayed(_one)(*task) for task in tasks)
    return results


def _workers() -> int:
    import joblib

    return int(joblib.cpu_count())


def _one(made: SyntheticDataset, network: Network, test: Examples, options: dict[str, Any]) -> Evaluation:
    keep_freed_memory()
    with threads(1):
        return evaluate(made, network, test, networks=1, program="loop", **options)


def _row(group: Group, found: Sequence[Evaluation]) -> Score:
    return Score(
        group.name,
        len(group.sets[0]),
        tuple(a for e in found for a in e.accuracies),
        sum(e.seconds for e in found),
        f"{group.note}, {group.options['epochs']} epochs",
    )
