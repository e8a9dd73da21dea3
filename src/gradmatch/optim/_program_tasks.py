"""Proxy tasks that score programs: a small training run each, lower is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.core import checks
from gradmatch.core.examples import as_examples
from gradmatch.optim._program import Program
from gradmatch.optim._program_functions import Layout
from gradmatch.optim._program_run import Machine, ProgramOptimizer


class Task(Protocol):
    """What scores a program. The same program must get the same score: all randomness comes from ``seed``."""

    @property
    def seed(self) -> int | None:
        """Of everything drawn; None is refused by a search."""

    def __call__(self, program: Program) -> float:
        """The score, lower is better; infinity for a program that fails."""


def cosine(lr: float, steps: int) -> list[float]:
    """Learning rates from ``lr`` to near 0."""
    return [lr * 0.5 * (1 + math.cos(math.pi * t / steps)) for t in range(steps)]


@dataclass(frozen=True)
class MLPTask:
    """Training a classifier of one hidden layer; the score is its mean cross-entropy on validation rows.

    All runs, which differ in initial weights and order, are one batched program with its gradient written out: 60
    steps of two runs of 64-16-10 take a few milliseconds.

    Attributes:
        train: labelled rows (x, y), x of any shape.
        validation: labelled rows.
        lr: peak of the cosine schedule that the program reads as ``lr``.
        hidden: width of the layer.
        steps: updates.
        batch_size: rows drawn for each.
        runs: of which the mean is taken; one is noisy.
        seed: of the runs.
    """

    train: Any
    validation: Any
    lr: float = 1e-2
    hidden: int = 16
    steps: int = 60
    batch_size: int = 64
    runs: int = 2
    seed: int | None = 0

    def __post_init__(self) -> None:
        checks.positive("lr", self.lr)
        for name in ("hidden", "steps", "batch_size", "runs"):
            checks.whole(name, getattr(self, name))
        object.__setattr__(self, "train", as_examples(self.train))
        object.__setattr__(self, "validation", as_examples(self.validation))

    def describe(self) -> dict[str, Any]:
        """What decides the score, for the record of a run."""
        shapes = [list(e.x.shape) for e in (self.train, self.validation)]
        sums = [float(e.x.double().sum()) for e in (self.train, self.validation)]
        own = {name: getattr(self, name) for name in ("lr", "hidden", "steps", "batch_size", "runs", "seed")}
        return {"task": "mlp", "shapes": shapes, "sums": sums, **own}

    @torch.inference_mode()
    def __call__(self, program: Program) -> float:
        """Mean validation loss of the runs, infinite if one diverges."""
        x, y = self.train.x.flatten(1), self.train.y
        classes = max(self.train.classes, self.validation.classes)
        w, g, parts, slopes, layout, rows = self._start(x.shape[1], classes, len(x))
        step = Machine(program, layout)
        states = [torch.zeros_like(w) for _ in step.states]
        targets = F.one_hot(y, classes).to(x.dtype) / self.batch_size
        for t, lr in enumerate(cosine(self.lr, self.steps)):
            _slopes(x[rows[t]], targets[rows[t]], parts, slopes, self.batch_size)
            update, states = step(w, g, lr, states)
            w.sub_(update)
            if t % 10 == 9 and not math.isfinite(float(w.sum())):
                return math.inf
        z = _outputs(self.validation.x.flatten(1).expand(self.runs, -1, -1), parts)[1]
        loss = F.cross_entropy(z.flatten(0, 1), self.validation.y.repeat(self.runs))
        return float(loss) if math.isfinite(float(loss)) else math.inf

    def _start(self, inputs: int, classes: int, n: int) -> tuple[Any, ...]:
        """Weights and gradients (runs, P), their parts as matrices, and the rows of every batch (steps, runs, b)."""
        generator = torch.Generator().manual_seed(checks.whole("seed", self.seed, 0))
        sizes = [inputs * self.hidden, self.hidden, self.hidden * classes, classes]
        w, g = torch.zeros(self.runs, sum(sizes)), torch.zeros(self.runs, sum(sizes))
        shapes = [(inputs, self.hidden), (1, self.hidden), (self.hidden, classes), (1, classes)]
        parts, slopes = (
            [
                part.view(self.runs, *s)
                for part, s in zip(torch.split_with_sizes(v, sizes, 1), shapes, strict=True)
            ]
            for v in (w, g)
        )
        for matrix, fan_in in ((parts[0], inputs), (parts[2], self.hidden)):
            matrix.copy_((2 * torch.rand(matrix.shape, generator=generator) - 1) / math.sqrt(fan_in))
        rows = torch.randint(n, (self.steps, self.runs, self.batch_size), generator=generator)
        return w, g, parts, slopes, Layout(sizes), rows

    def with_lr(self, lr: float) -> MLPTask:
        """The same task at another peak rate."""
        return replace(self, lr=lr)


def _outputs(x: Tensor, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Hidden values and logits (runs, b, .)."""
    w1, b1, w2, b2 = parts
    h = torch.baddbmm(b1, x, w1).clamp_(min=0)
    return h, torch.baddbmm(b2, h, w2)


def _slopes(x: Tensor, target: Tensor, parts: Sequence[Tensor], slopes: Sequence[Tensor], batch: int) -> None:
    """Gradient of the mean cross-entropy in all parts; ``target`` is one-hot over the batch size."""
    h, z = _outputs(x, parts)
    dz = torch.softmax(z, -1).div_(batch).sub_(target)
    dh = torch.bmm(dz, parts[2].transpose(1, 2)).mul_(h > 0)
    torch.bmm(h.transpose(1, 2), dz, out=slopes[2])
    torch.sum(dz, 1, keepdim=True, out=slopes[3])
    torch.bmm(x.transpose(1, 2), dh, out=slopes[0])
    torch.sum(dh, 1, keepdim=True, out=slopes[1])


@dataclass(frozen=True)
class ModelTask:
    """Training any model of yours with a program; the score is its mean validation loss.

    Attributes:
        make_model: gives a fresh ``nn.Module``; called with the global generator seeded, which is left as found.
        loss: of (outputs, targets), a scalar.
        train: batches (inputs, targets), walked again and again: a list, or a loader in fixed order.
        validation: batches (inputs, targets).
        lr: peak of the cosine schedule.
        steps: updates.
        runs: initialisations of which the mean is taken.
        seed: of the initial weights.
    """

    make_model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    train: Sequence[tuple[Tensor, Tensor]]
    validation: Sequence[tuple[Tensor, Tensor]]
    lr: float = 1e-2
    steps: int = 100
    runs: int = 1
    seed: int | None = 0

    def __call__(self, program: Program) -> float:
        """Mean validation loss, infinite for a program whose update is not finite."""
        first = checks.whole("seed", self.seed, 0)
        try:
            return sum(self._run(program, first + k) for k in range(self.runs)) / self.runs
        except checks.InputError:
            return math.inf

    def _run(self, program: Program, seed: int) -> float:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.make_model()
        optimizer = ProgramOptimizer(model.parameters(), program, lr=self.lr)
        batches: list[Any] = []
        for lr in cosine(self.lr, self.steps):
            batches = batches or list(self.train)
            x, y = batches.pop(0)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            torch.autograd.backward(self.loss(model(x), y))
            optimizer.step()
        model.eval()
        with torch.no_grad():
            losses = [float(self.loss(model(x), y)) * len(y) for x, y in self.validation]
        total = sum(losses) / sum(len(y) for _, y in self.validation)
        return total if math.isfinite(total) else math.inf

    def with_lr(self, lr: float) -> ModelTask:
        """The same task at another peak rate."""
        return replace(self, lr=lr)


def tuned(task: Any, program: Program, grid: Sequence[float]) -> Any:
    """``task`` at the rate of ``grid`` where ``program`` does best."""
    return min((task.with_lr(lr) for lr in grid), key=lambda own: own(program))


def seeded_tasks(tasks: Task | Iterable[Task]) -> tuple[Any, ...]:
    """One task or several as a tuple; refused if empty, not callable or without a seed."""
    own = tuple(tasks) if isinstance(tasks, Iterable) else (tasks,)
    checks.require(len(own) > 0, "tasks is empty; a search needs at least one.")
    for i, task in enumerate(own):
        checks.require(
            callable(task), f"tasks[{i}] is a {type(task).__name__}; it must be a function of a program."
        )
        checks.require(
            getattr(task, "seed", None) is not None,
            f"tasks[{i}] has no seed; give it one, so that equal programs get equal scores.",
        )
    return own
