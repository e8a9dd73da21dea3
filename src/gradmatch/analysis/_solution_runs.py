"""One training run of one optimizer: the same start and batches for all, stopped at an equal loss if so asked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from gradmatch.analysis._streams import Stream
from gradmatch.core import checks
from gradmatch.core.cpu import threads
from gradmatch.core.examples import Examples
from gradmatch.core.networks import Network, build

__all__ = ["Factory", "Outcome", "Setup", "run"]

Factory = Callable[..., Optimizer]
"""``factory(params, lr=rate)``, such as any class of ``torch.optim``; called without ``lr`` where the rate is None."""
State = dict[str, Tensor]
LOOKS = 10  # times in an epoch that the training loss is looked at


@dataclass(frozen=True)
class Setup:
    """What all runs of a comparison share; ``held`` are the examples held out of every task's training data."""

    model_fn: Network
    factories: dict[str, Factory]
    stream: Stream
    held: tuple[Examples, ...]
    epochs: int
    batch_size: int
    schedule: str | None
    l2: float
    reset_state: bool
    device: str


@dataclass
class Outcome:
    """What one run gave: figures as JSON values, and states of the network by name ("start", "final", "matched")."""

    figures: dict[str, Any]
    states: dict[str, State] = field(default_factory=dict)


class _Run:
    """A network in training that can be set back to an earlier moment."""

    def __init__(self, setup: Setup, name: str, rate: float | None, seed: int) -> None:
        self.setup, self.name, self.rate = setup, name, rate
        self.model = build(setup.model_fn, seed, setup.device).train()
        self.order = torch.Generator().manual_seed(seed)
        self.batches: list[Tensor] = []
        self.begin(setup.stream.train[0])
        self.optimizer = self._new_optimizer()

    def _new_optimizer(self) -> Optimizer:
        factory, params = self.setup.factories[self.name], list(self.model.parameters())
        return factory(params) if self.rate is None else factory(params, lr=self.rate)

    def begin(self, data: Examples) -> None:
        """Take up a task."""
        self.data, self.done, self.batches = data.to(self.setup.device), 0, []
        self.per_epoch = -(-len(data) // self.setup.batch_size)
        if self.setup.reset_state and hasattr(self, "optimizer"):
            self.optimizer = self._new_optimizer()

    def step(self) -> float:
        """One step; gives the loss of its batch before it."""
        if not self.batches:
            order = torch.randperm(len(self.data), generator=self.order)
            self.batches = list(torch.split(order, self.setup.batch_size))[::-1]
        own = self.batches.pop().to(self.data.x.device)
        self._set_rate()
        loss = self._update(self.data.x[own], self.data.y[own])
        checks.require(
            loss == loss and abs(loss) < 1e30,
            f"{self.name} diverged at rate {self.rate} after {self.done} steps; leave that rate out.",
        )
        self.done += 1
        return loss

    def _set_rate(self) -> None:
        if self.setup.schedule == "cosine":
            share = min(1.0, self.done / (self.setup.epochs * self.per_epoch))
            for group in self.optimizer.param_groups:
                start = group.setdefault("initial_lr", group["lr"])
                group["lr"] = 0.5 * start * (1 + torch.cos(torch.tensor(share * torch.pi)).item())

    def _update(self, x: Tensor, y: Tensor) -> float:
        """One update in the protocol that the optimizer declares; others are stepped after backward."""
        protocols = getattr(self.optimizer, "protocols", ("grad",))
        if "grad" in protocols or "graph" in protocols:
            loss = self._loss(self.model(x), y)
            params = list(self.model.parameters())
            graph = "grad" not in protocols
            grads = torch.autograd.grad(loss, params, create_graph=graph, allow_unused=True)
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            self.optimizer.step()
            self.optimizer.zero_grad()  # the graph goes with the gradients
            return float(loss.detach())
        closure: Any = lambda: self._loss(self.model(x), y)  # noqa: E731
        if "loss closure" not in protocols:
            closure = lambda: (self.model(x), lambda z: self._loss(z, y))  # noqa: E731
        return float(self.optimizer.step(closure))

    def _loss(self, logits: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, y)
        if self.setup.l2:
            for p in self.model.parameters():
                loss = loss + 0.5 * self.setup.l2 * p.square().sum()
        return loss

    @torch.no_grad()
    def whole_loss(self) -> float:
        """Objective on all training examples of the task, in eval mode."""
        self.model.eval()
        total = 0.0
        for x, y in zip(torch.split(self.data.x, 1000), torch.split(self.data.y, 1000), strict=True):
            total += float(F.cross_entropy(self.model(x), y, reduction="sum"))
        self.model.train()
        penalty = sum(float(p.square().sum()) for p in self.model.parameters()) if self.setup.l2 else 0.0
        return total / len(self.data) + 0.5 * self.setup.l2 * penalty

    @torch.no_grad()
    def accuracy(self, data: Examples) -> float:
        self.model.eval()
        right = sum(
            int((self.model(x.to(self.setup.device)).argmax(1).cpu() == y).sum())
            for x, y in zip(torch.split(data.x, 1000), torch.split(data.y, 1000), strict=True)
        )
        self.model.train()
        return right / len(data)

    def state(self) -> State:
        """The network's tensors, copied to the CPU."""
        return {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}

    def mark(self) -> tuple[Any, ...]:
        """The present moment, to come back to."""
        held = (self.model.state_dict(), self.optimizer.state_dict(), self.order.get_state(), self.batches)
        return (*copy.deepcopy(held), self.done)

    def back(self, mark: tuple[Any, ...]) -> None:
        """Come back to a marked moment."""
        model, optimizer, order, batches, self.done = mark
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(copy.deepcopy(optimizer))
        self.order.set_state(order)
        self.batches = list(batches)


def run(
    setup: Setup,
    name: str,
    rate: float | None,
    seed: int,
    target: float | None = None,
    tolerance: float = 0.05,
) -> Outcome:
    """Train on every task in turn; with ``target`` also keep the state at that training loss."""
    with threads(1):
        job = _Run(setup, name, rate, seed)
        outcome = Outcome({"name": name, "rate": rate, "seed": seed}, {"start": job.state()})
        test: list[list[float]] = []
        held: list[list[float]] = []
        for number, data in enumerate(setup.stream.train):
            if number:
                job.begin(data)
            losses = _fit(job, outcome, target, tolerance)
            if number == 0:
                outcome.figures["first_loss"] = losses[0]
            test.append([job.accuracy(e) for e in setup.stream.test])
            held.append([job.accuracy(e) for e in setup.held])
        outcome.states["final"] = job.state()
        outcome.figures |= {"test": test, "held": held, "loss": job.whole_loss()}
    return outcome


def _fit(job: _Run, outcome: Outcome, target: float | None, tolerance: float) -> list[float]:
    """Train on the present task, past its epochs if the target was not met by then; the losses of the batches.

    The loss is looked at some times in an epoch; where it went past the target, the steps since are taken again one by
    one, and the state nearest to the target is kept.
    """
    losses, total = [], job.setup.epochs * job.per_epoch
    look = max(1, job.per_epoch // LOOKS)
    limit = total if target is None or job.setup.schedule is not None else 2 * total
    met, before = target is None, float("inf")
    while job.done < total or (not met and job.done < limit):
        mark = None if met else job.mark()
        losses += [job.step() for _ in range(min(look, (total if met else limit) - job.done))]
        if mark is not None and target is not None:
            now, after = job.mark(), job.whole_loss()
            if min(before, after) <= target and max(before, after) >= target * (1 - tolerance):
                job.back(mark)
                met = _nearest(job, outcome, target, now[-1] - mark[-1]) <= tolerance * target
                job.back(now)
            before = after
    if target is not None and "matched" not in outcome.states:
        outcome.figures["matched_loss"] = job.whole_loss()
        outcome.states["matched"] = job.state()
    return losses


def _nearest(job: _Run, outcome: Outcome, target: float, steps: int) -> float:
    """Keep the state whose training loss is nearest to the target so far, over the next steps; how near it is."""
    best = abs(float(outcome.figures.get("matched_loss", "inf")) - target)
    for _ in range(steps):
        job.step()
        loss = job.whole_loss()
        if abs(loss - target) < best:
            best = abs(loss - target)
            outcome.figures |= {"matched_loss": loss, "matched_step": job.done}
            outcome.states["matched"] = job.state()
    return best
