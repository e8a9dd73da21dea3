"""The comparison at the end of a distillation or selection: learned, random and all the real data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from gradmatch.core.examples import Examples
from gradmatch.core.networks import Network
from gradmatch.data._common import Evaluation, SyntheticDataset, channel_moments, evaluate

ALL_PASSES = 120_000
"""Real images that the network of the row "all data" may see: at least two epochs, at most the evaluator's."""


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


def score_set(
    name: str, made: SyntheticDataset, network: Network, test: Examples, networks: int, **options: Any
) -> Score:
    """Fresh networks trained on one set."""
    found = evaluate(made, network, test, networks=networks, **options)
    return _row(name, len(made), [found], f"{networks} networks" if networks > 1 else "1 network", options)


def score_draws(
    name: str, draws: Sequence[SyntheticDataset], network: Network, test: Examples, **options: Any
) -> Score:
    """One network trained on each of several random draws."""
    seed = options.pop("seed", 0)
    found = [
        evaluate(made, network, test, networks=1, seed=seed + k, **options) for k, made in enumerate(draws)
    ]
    note = f"{len(draws)} draws, a network each" if len(draws) > 1 else "1 draw"
    return _row(name, len(draws[0]), found, note, options)


def part_of(train: Examples, indices: Tensor | None = None) -> SyntheticDataset:
    """Real images as a set to train on, standardised as all of them are."""
    mean, std = channel_moments(train.x)
    some = train if indices is None else train.take(indices)
    return SyntheticDataset(some.x, some.y, train.classes, None, mean, std)


def score_all(train: Examples, network: Network, test: Examples, epochs: int, **options: Any) -> Score:
    """One network on all the real data, for as many epochs as stay cheap (the row says how many)."""
    count = all_epochs(len(train), epochs)
    if count < epochs:  # few epochs want a larger rate than the evaluator's many
        options |= {"lr": 0.05, "batch_size": 128}
    found = evaluate(part_of(train), network, test, networks=1, epochs=count, **options)
    return _row("all real images", len(train), [found], "1 network", {"epochs": count})


def all_epochs(examples: int, epochs: int) -> int:
    """Epochs over all the data that the comparison can afford.

    >>> all_epochs(60_000, 300), all_epochs(1_000, 300), all_epochs(50, 300)
    (2, 120, 300)
    """
    return min(epochs, max(2, ALL_PASSES // examples))


def _row(name: str, images: int, found: list[Evaluation], note: str, options: dict[str, Any]) -> Score:
    accuracies = tuple(a for e in found for a in e.accuracies)
    return Score(
        name,
        images,
        accuracies,
        sum(e.seconds for e in found),
        f"{note}, {options.get('epochs', 300)} epochs",
    )
