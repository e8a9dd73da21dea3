"""The inner training of trajectory matching: a student's SGD steps on a synthetic set, and gradients through them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from gradmatch.core import checks
from gradmatch.core._params import ParamSpace
from gradmatch.core.networks import active_dropout, has_batchnorm, seeded
from gradmatch.core.unroll import MODES, unrolled_gradient

Augment = Callable[[Tensor, torch.Generator], Tensor]
SEEDS = 2**62


def require_matchable(net: nn.Module, allow_batchnorm: bool = False, replayed: bool = False) -> None:
    """Refuse networks whose training step is not a function of parameters and batch alone."""
    checks.require(
        allow_batchnorm or not (has_batchnorm(net) and net.training),
        "network has batch norm in train mode, whose running statistics are no part of a trajectory; use group or "
        "instance norm, or pass allow_batchnorm to match with batch statistics.",
    )
    random = active_dropout(net)
    checks.require(
        replayed or not random,
        f"network has active dropout ({checks.listing(random)}), which would differ between the passes over a step; "
        "leave it out, or have its draws replayed (allow_dropout, or a generator for trajectory_grad).",
    )


@dataclass(frozen=True)
class Inner:
    """The loss of an inner step: the same batch, augmentation and random layers every time step i is asked for.

    Attributes:
        net: the student as ``net(params, x) -> outputs``.
        indices: the samples of every step; None for all of them in order.
        seeds: one for each step, of its augmentation and random layers.
    """

    net: Callable[[dict[str, Tensor], Tensor], Tensor]
    indices: Sequence[Tensor | None]
    seeds: Sequence[int]
    augment: Augment | None
    random_layers: bool

    def outputs(self, params: dict[str, Tensor], i: int, x: Tensor) -> Tensor:
        """Student outputs for the whole batch ``x`` of step i."""
        if self.augment is not None:
            x = self.augment(x, torch.Generator().manual_seed(self.seeds[i]))
        with seeded(self.seeds[i] + 1) if self.random_layers else nullcontext():
            return self.net(params, x)

    def loss(self, params: dict[str, Tensor], i: int, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Cross-entropy of step i, its samples taken from the synthetic set."""
        index = self.indices[i]
        y = inputs["logits"].softmax(1) if "logits" in inputs else labels
        x = inputs["images"] if index is None else inputs["images"][index]
        return F.cross_entropy(self.outputs(params, i, x), y if index is None else y[index])


def distance_to(target: dict[str, Tensor], scale: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    """theta -> |theta - target|^2 / scale."""

    def loss(theta: dict[str, Tensor]) -> Tensor:
        return torch.stack([(theta[k] - t).square().sum() for k, t in target.items()]).sum() / scale

    return loss


def squared_gap(start: Tensor, target: Tensor) -> Tensor:
    """|start - target|^2, refused where it is 0."""
    gap = (start - target).square().sum()
    checks.require(
        bool(gap > 0), "the trajectory's start equals its target; the expert must have moved between them."
    )
    return gap


def batch_order(
    count: int, batch_syn: int | None, steps: int, generator: torch.Generator
) -> list[Tensor | None]:
    """Indices of every inner step: random permutations cut into chunks; None where a chunk is the whole set."""
    if batch_syn is None or batch_syn >= count:
        return [None] * steps
    chunks: list[Tensor] = []
    while len(chunks) < steps:
        chunks += torch.split(torch.randperm(count, generator=generator), batch_syn)
    return list(chunks[:steps])


@dataclass(frozen=True)
class TrajectoryGradient:
    """What :func:`trajectory_grad` gives; unpacks as ``loss, grad_x, grad_lr``.

    Attributes:
        loss: normalised squared distance of the last parameters from the target.
        grad_x: gradient in every batch's inputs.
        grad_lr: gradient in the rate.
        grad_y: gradient in every batch's probabilities; None unless asked for.
        theta: the last parameters, by name.
    """

    loss: Tensor
    grad_x: list[Tensor]
    grad_lr: Tensor
    grad_y: list[Tensor] | None
    theta: dict[str, Tensor]

    def __iter__(self) -> Any:
        return iter((self.loss, self.grad_x, self.grad_lr))


def trajectory_grad(
    model_fn: nn.Module | Callable[[dict[str, Tensor], Tensor], Tensor],
    theta0: Mapping[str, Tensor] | Tensor,
    target: Mapping[str, Tensor] | Tensor,
    batches: Sequence[tuple[Tensor, Tensor]],
    lr: float | Tensor,
    unroll: str = "exact",
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    augment: Augment | None = None,
    generator: torch.Generator | None = None,
    labels: bool = False,
    state_store: str = "memory",
) -> TrajectoryGradient:
    """Gradient of |theta_N - target|^2 / |theta_0 - target|^2 after one SGD step on each batch in turn.

    Args:
        model_fn: an ``nn.Module``, or a function ``(params, x) -> outputs`` of named parameters.
        theta0, target: named parameters; for a module also one flat vector (P,) each, in its order.
        batches: pairs (x, y); y as ``loss`` takes it.
        lr: step size, a number or a vector of one for each batch.
        unroll: "exact", "tesla", "full" or "checkpoint"; see :func:`gradmatch.core.unroll.unrolled_gradient`.
        loss: any differentiable ``loss(outputs, y)``; default cross-entropy, which also takes probabilities.
        augment, generator: ``augment(x, generator)`` on every batch, and the source of its draws (and of dropout's),
            which are drawn once and replayed.
        labels: also differentiate in y (which must be floating).
        state_store: "memory", "cpu" or "recompute".

    Raises:
        InputError: start equals target, random layers without a generator, batch norm in train mode, an unknown
            ``unroll``, or a loss that is not finite.
    """
    checks.one_of("unroll", unroll, MODES)
    checks.require(len(batches) > 0, "batches is empty; at least one step is needed.")
    checks.require(augment is None or generator is not None, "augment needs a generator to draw from.")
    module = model_fn if isinstance(model_fn, nn.Module) else None
    if module is not None:
        require_matchable(module, replayed=generator is not None)
        space = ParamSpace.of({k: p.detach() for k, p in module.named_parameters()})
        theta0, target = space.named(theta0), space.named(target)
    assert isinstance(theta0, Mapping)
    assert isinstance(target, Mapping)
    start, end = (
        torch.cat([t.flatten() for t in v.values()]) for v in (theta0, {k: target[k] for k in theta0})
    )
    xs, ys, n = [x for x, _ in batches], [y for _, y in batches], len(batches)
    seeds = [0] * n if generator is None else torch.randint(SEEDS, (n,), generator=generator).tolist()
    call = model_fn if module is None else caller(module)
    inner = Inner(call, [None] * n, seeds, augment, module is not None and bool(active_dropout(module)))

    def step_loss(params: dict[str, Tensor], i: int, inputs: list[Tensor]) -> Tensor:
        return loss(inner.outputs(params, i, inputs[i]), inputs[n + i] if labels else ys[i])

    inputs = [t.detach() for t in (xs + ys if labels else xs)]
    outer = distance_to(dict(target), squared_gap(start, end))
    result = unrolled_gradient(step_loss, dict(theta0), outer, inputs, lr, n, unroll, state_store=state_store)
    return TrajectoryGradient(
        result.loss, result.grads[:n], result.lr_grad, result.grads[n:] if labels else None, result.theta
    )


def caller(module: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """``module`` as a function of named parameters, in which its frozen ones are constants, as for the experts."""
    frozen = [k for k, p in module.named_parameters() if not p.requires_grad]

    def call(params: dict[str, Tensor], x: Tensor) -> Tensor:
        held = {k: params[k].detach() for k in frozen}
        out: Tensor = functional_call(module, {**params, **held}, (x,))
        return out

    return call
