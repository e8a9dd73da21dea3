"""Tasks that come one after the other, and how much of each is left afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core.examples import Examples

__all__ = ["Stream", "class_stream", "memory_figures", "permuted_stream"]


@dataclass(frozen=True)
class Stream:
    """Tasks in the order in which they are learned, all with the labels of one shared head.

    A network is not told which task it sees, so that forgetting shows: outputs of other tasks are not masked.

    Attributes:
        train, test: a data set for each task.
        names: of the tasks.
    """

    train: tuple[Examples, ...]
    test: tuple[Examples, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def classes(self) -> int:
        """Outputs of the shared head."""
        return max(e.classes for e in self.train)


def class_stream(train: Examples, test: Examples, per_task: int = 2) -> Stream:
    """Class-incremental tasks: classes (0, 1), (2, 3), ... in turn, with their own labels.

    Raises:
        InputError: ``per_task`` does not divide the classes into at least two tasks.
    """
    size = checks.whole("per_task", per_task)
    checks.require(
        train.classes % size == 0 and train.classes > size,
        f"per_task is {size}; it must divide the {train.classes} classes into at least 2 tasks.",
    )
    groups = [range(c, c + size) for c in range(0, train.classes, size)]

    def of(examples: Examples, group: range) -> Examples:
        return examples.take(torch.nonzero(torch.isin(examples.y, torch.tensor(list(group)))).flatten())

    return Stream(
        tuple(of(train, g) for g in groups),
        tuple(of(test, g) for g in groups),
        tuple("+".join(map(str, g)) for g in groups),
    )


def permuted_stream(train: Examples, test: Examples, tasks: int = 5, seed: int = 0) -> Stream:
    """The same data with its inputs' entries in another fixed order for each task; the first is as it came."""
    checks.whole("tasks", tasks, least=2)
    generator = torch.Generator().manual_seed(checks.whole("seed", seed, least=0))
    width = train.x[0].numel()
    orders = [torch.arange(width), *(torch.randperm(width, generator=generator) for _ in range(tasks - 1))]

    def of(examples: Examples, order: Tensor) -> Examples:
        x = examples.x.flatten(1)[:, order].reshape(examples.x.shape)
        return Examples(x, examples.y, examples.classes)

    return Stream(
        tuple(of(train, o) for o in orders),
        tuple(of(test, o) for o in orders),
        tuple(f"permutation {k}" for k in range(tasks)),
    )


def memory_figures(accuracies: Tensor | Sequence[Sequence[float]]) -> dict[str, float]:
    """What a matrix A[i, j], the accuracy on task j after learning task i, says about forgetting.

    "new_task_acc" is the mean of A[i, i], "final_acc" that of the last row; "backward_transfer" the mean change of
    the earlier tasks since they were learned, and "forgetting" that of their best accuracy so far to the last.
    """
    a = torch.as_tensor(accuracies, dtype=torch.float64)
    checks.require(
        a.ndim == 2 and a.shape[0] == a.shape[1],
        f"accuracies has shape {tuple(a.shape)}; it must be (tasks, tasks).",
    )
    found = {"new_task_acc": float(a.diagonal().mean()), "final_acc": float(a[-1].mean())}
    if len(a) > 1:
        found["backward_transfer"] = float((a[-1] - a.diagonal())[:-1].mean())
        found["forgetting"] = float((a.max(0).values - a[-1])[:-1].mean())
    return found
