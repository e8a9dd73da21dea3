"""Permutations found by gradients of the loss in the middle, passed straight through the assignments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.core._batches import Batch, OrderedData
from gradmatch.core.assign import (
    Permutation,
    PermutationSpec,
    Weights,
    apply_matrices,
    linear_assignments,
    sinkhorn,
)
from gradmatch.core.problem import Loss, Problem
from gradmatch.core.tap import evaluating
from gradmatch.weights._statistics import tracking
from gradmatch.weights.weight_matching import network_of, weight_match

__all__ = ["ste_match"]

FORMS = ("sinkhorn", "reference")
State = dict[str, Tensor]


@dataclass(frozen=True)
class _Defaults:
    lr: float
    batch_size: int
    steps: int


DEFAULTS = {"sinkhorn": _Defaults(0.1, 500, 200), "reference": _Defaults(1e-2, 1000, 200)}


def ste_match(
    spec: PermutationSpec,
    a: Weights,
    b: Weights,
    data: Any,
    *,
    ste: str = "sinkhorn",
    model: nn.Module | None = None,
    loss: str | Loss = "cross_entropy",
    steps: int | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    tau: float = 1.0,
    rounds: int = 20,
    every: int = 10,
    seed: int = 0,
    progress: Callable[[int, int], Any] | None = None,
) -> Permutation:
    """The permutation of B under which the network half-way to A has a low loss.

    "sinkhorn" (default) keeps a score matrix X for each group, S = sinkhorn(X / tau): forward the exact assignment P
    of S, backward the gradient through S. It sees the loss alone. "reference" (the public code of git-re-basin) moves
    weights theta, from theta_a on: P is their weight matching with B, and the gradient in the middle
    (theta_a + P(theta_b)) / 2 is passed to theta. At its first step that is weight matching, and short runs stay
    there. Which of the two the paper ran could not be verified.

    Args:
        spec, a, b, model: as :func:`activation_match`.
        data: labelled training data; in memory (tensors, ``Examples``) batches are drawn at random, else the source's
            own are walked again and again.
        ste: "sinkhorn" or "reference".
        loss: per-example loss, as :class:`gradmatch.core.problem.Problem` takes it.
        steps: updates; 200 (the public code ran 250 epochs of MNIST for "reference").
        lr: default 0.1 (Adam) for "sinkhorn", 0.01 (SGD, momentum 0.9) for "reference".
        batch_size: default 500 and 1000.
        tau, rounds: of the Sinkhorn scaling.
        every: the loss in the middle on all data is looked at after so many steps; the best permutation is kept.
        seed: of the scores' start and the batches.

    Raises:
        InputError: options out of range, no network, data that do not fit, or a loss that is not finite.
    """
    checks.one_of("ste", ste, FORMS)
    default = DEFAULTS[ste]
    checks.whole("every", every)
    count = checks.whole("steps", default.steps if steps is None else steps)
    rate = checks.positive("lr", default.lr if lr is None else lr)
    generator = torch.Generator().manual_seed(checks.whole("seed", seed, 0))
    module, (state_a, state_b) = network_of(spec, a, b, model)
    with evaluating(module):
        for norm in tracking(module):  # statistics of the batch, as averaged ones belong to neither end
            norm.train()
        source = OrderedData(data, batch_size or default.batch_size, check_order=False)
        problem = Problem(module, loss, data, batch_size=source.batch_size, allow=("order", "batchnorm"))
        middle = _Middle(spec, problem, state_a, state_b)
        kind = (
            _Sinkhorn(middle, tau, rounds, rate, generator) if ste == "sinkhorn" else _Reference(middle, rate)
        )
        best, least = Permutation.identity(spec), float("inf")
        for step, batch in zip(range(1, count + 1), _stream(source, generator), strict=False):
            kind.step(batch)
            if step % every == 0 or step == count:
                found = kind.permutation()
                value = middle.whole_loss(found)
                best, least = (found, value) if value < least else (best, least)
            if progress is not None:
                progress(step, count)
    return best


def _stream(source: OrderedData, generator: torch.Generator) -> Iterator[Batch]:
    """Batches without end."""
    if source._whole is None:
        while True:
            yield from source
    everything = Batch(*source._whole, start=0)
    size = min(source.batch_size, source.n)
    while True:
        yield everything.take(torch.randperm(source.n, generator=generator)[:size])


class _Middle:
    """The network half-way between A and a permuted B, and its loss."""

    def __init__(self, spec: PermutationSpec, problem: Problem, a: State, b: State) -> None:
        self.spec, self.problem, self.a, self.b = spec, problem, a, b

    def state(self, permuted: State) -> State:
        """(A + permuted B) / 2; whole numbers stay A's, and running statistics have no gradient."""
        means = {k: (t + permuted[k]) / 2 if t.is_floating_point() else t.clone() for k, t in self.a.items()}
        return {k: t.detach() if k in self.spec.buffers else t for k, t in means.items()}

    def loss(self, state: State, batch: Batch) -> Tensor:
        """Mean loss on a batch."""
        outputs = self.problem.outputs(state, batch.inputs)
        return self.problem.losses(outputs, batch.target, batch.size).mean()

    @torch.no_grad()
    def whole_loss(self, permutation: Permutation) -> float:
        """Mean loss on all data."""
        state = self.state(permutation.apply(self.b))
        total = sum(float(self.loss(state, batch)) * batch.size for batch in self.problem.batches())
        return checks.number("the loss in the middle", total / self.problem.n)


class _Sinkhorn:
    def __init__(
        self, middle: _Middle, tau: float, rounds: int, lr: float, generator: torch.Generator
    ) -> None:
        self.middle, self.tau, self.rounds = middle, tau, rounds
        self.scores = {
            g: (0.01 * torch.randn(n, n, generator=generator))
            .to(middle.problem.space.device)
            .requires_grad_()
            for g, n in middle.spec.sizes.items()
        }
        self.optimizer = torch.optim.Adam(list(self.scores.values()), lr)

    def _soft(self) -> State:
        return {g: sinkhorn(x, tau=self.tau, rounds=self.rounds) for g, x in self.scores.items()}

    def step(self, batch: Batch) -> None:
        """One update of all scores."""
        soft = self._soft()
        hard = {
            g: torch.eye(len(o), device=soft[g].device)[o]
            for g, o in zip(soft, linear_assignments(list(soft.values())), strict=True)
        }
        through = {g: hard[g] + s - s.detach() for g, s in soft.items()}
        state = self.middle.state(apply_matrices(self.middle.spec, self.middle.b, through))
        loss = self.middle.loss(state, batch)
        checks.number("the loss in the middle", loss.detach())
        gradients = torch.autograd.grad(loss, list(self.scores.values()))
        for x, g in zip(self.scores.values(), gradients, strict=True):
            x.grad = g
        self.optimizer.step()

    @torch.no_grad()
    def permutation(self) -> Permutation:
        """The present assignment."""
        soft = self._soft()
        return Permutation(
            self.middle.spec, dict(zip(soft, linear_assignments(list(soft.values())), strict=True))
        )


class _Reference:
    def __init__(self, middle: _Middle, lr: float) -> None:
        self.middle = middle
        self.moving = {
            k: t.clone().requires_grad_()
            for k, t in middle.a.items()
            if k in middle.problem.space.names and t.is_floating_point()
        }
        self.optimizer = torch.optim.SGD(list(self.moving.values()), lr, momentum=0.9)

    def permutation(self) -> Permutation:
        """The weight matching of the moving weights with B."""
        moving = self.middle.a | {k: t.detach() for k, t in self.moving.items()}
        return weight_match(self.middle.spec, moving, self.middle.b)

    def step(self, batch: Batch) -> None:
        """The gradient in the middle, passed to the moving weights with the half of the chain rule."""
        state = self.middle.state(self.permutation().apply(self.middle.b))
        leaves = {k: state[k].detach().requires_grad_() for k in self.moving}
        loss = self.middle.loss(state | leaves, batch)
        checks.number("the loss in the middle", loss.detach())
        for k, g in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            self.moving[k].grad = g / 2
        self.optimizer.step()
