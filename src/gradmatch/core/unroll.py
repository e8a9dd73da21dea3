"""Gradients through an inner training loop, with memory that does not grow with the number of steps.

The inner loop is SGD with heavy-ball momentum mu and weight decay, as in ``torch.optim.SGD``::

    g_i = grad_theta l_i(theta_i, X)
    v_{i+1} = mu v_i + g_i + wd theta_i,   theta_{i+1} = theta_i - b_i v_{i+1}

and the wanted numbers are the gradients of L(theta_N) in the inputs X (images, labels, anything the step
losses use), in the rates b_i and in theta_0. The exact adjoint runs the loop forward without a graph, keeping
only the states, and then backwards with lam = dL/dtheta_{i+1} and nu = dL/dv_{i+1}::

    a = nu - b_i lam,      dL/dX += (d g_i / dX)^T a,      dL/db_i = -<lam, v_{i+1}>
    lam <- lam + wd a + H_i a,      nu <- mu a

Both products with a come from one backward pass through the graph of one step. Dropping H_i a treats the
trajectory as constant inside every g_i: a biased but slightly cheaper estimate, exact at N = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gradmatch.core import checks
from gradmatch.core._inner_loop import InnerLoop, State, StepLoss, Tensors

MODES = ("exact", "full", "checkpoint", "tesla")
STORES = ("memory", "cpu", "recompute")


@dataclass(frozen=True)
class UnrolledGradient:
    """The outer loss and its gradients; unpacks as ``loss, grads``.

    Attributes:
        loss: outer loss of the final parameters, detached.
        grads: gradients in the inputs, in their structure (a mapping holds only the differentiated entries, a
            list holds ``None`` for the others).
        lr_grad: gradient in the rate, of the shape of ``lr``.
        theta: final parameters, detached, in the structure of ``theta0``.
        velocity: final momentum buffer in the same structure; ``None`` without momentum.
        step_losses: inner loss of every step (N,).
        theta0_grad: gradient in the initial parameters; ``None`` unless asked for.
    """

    loss: Tensor
    grads: Any
    lr_grad: Tensor
    theta: Any
    velocity: Any
    step_losses: Tensor
    theta0_grad: Any = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.loss, self.grads))


def unrolled_gradient(
    step_loss: StepLoss,
    theta0: Tensors,
    outer_loss: Callable[[Any], Tensor],
    inputs: Tensors,
    lr: float | Tensor,
    steps: int,
    mode: str = "exact",
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    velocity0: Tensors | None = None,
    state_store: str = "memory",
    theta0_grad: bool = False,
) -> UnrolledGradient:
    """Gradient of ``outer_loss(theta_N)`` after N steps of SGD, in the inputs and rates of those steps.

    Args:
        step_loss: ``step_loss(theta, i, inputs) -> scalar``, the loss of inner step i = 0..N-1. It is called
            more than once for the same i and must then do the same thing (choose batch and augmentation by i).
            Batches taken as ``inputs[k][index]`` add up over repeated samples by themselves.
        theta0: initial parameters: one tensor, or a list or mapping of tensors, handed to ``step_loss`` and
            ``outer_loss`` in that form. A mapping with ``torch.func.functional_call`` has no flattening cost;
            cut a flat tensor with ``torch.split`` (its gradient is one concatenation). Several members at
            once: stack them and let both losses sum over members; the gradients are then the members' own.
        outer_loss: ``outer_loss(theta_N) -> scalar``, any differentiable function of the final parameters.
        inputs: tensors the step losses differentiate: those that require grad, or else every floating one.
        lr: rate; a number or scalar tensor shared by the steps, or a vector (N,).
        steps: number N of inner steps.
        mode: "exact" (adjoint, one step's graph at a time), "tesla" (the same without the Hessian products:
            biased for N > 1), "full" (autograd through the whole loop), "checkpoint" (full, each step
            recomputed by ``torch.utils.checkpoint``).
        momentum: heavy-ball factor in [0, 1); default 0.
        weight_decay: L2 factor added to the gradient; default 0.
        velocity0: initial momentum buffer; default zeros. With ``theta0`` taken inside a trajectory this
            differentiates a window of the loop only.
        state_store: where "exact" and "tesla" keep the states: "memory" (the parameters' device), "cpu", or
            "recompute" (about sqrt(N) of them kept, the others rolled out again; the same bits result).
        theta0_grad: also return the gradient in ``theta0``. In "tesla" it lacks the Hessian products too.

    Raises:
        InputError: unknown mode or store, wrong shapes, nothing to differentiate, a loss that is not finite.

    >>> target = torch.ones(3, dtype=torch.float64)
    >>> pull = lambda theta, i, x: 0.5 * (theta - x).square().sum()
    >>> out = unrolled_gradient(pull, torch.zeros_like(target), lambda t: t.sum(), target, 0.5, 2)
    >>> out.grads
    tensor([0.7500, 0.7500, 0.7500], dtype=torch.float64)
    """
    loop = InnerLoop.create(step_loss, theta0, inputs, lr, steps, momentum, weight_decay, velocity0)
    checks.one_of("mode", mode, MODES)
    checks.one_of("state_store", state_store, STORES)
    if mode in ("full", "checkpoint"):
        return _through_graph(loop, outer_loss, mode == "checkpoint", theta0_grad)
    return _adjoint(loop, outer_loss, mode == "exact", state_store, theta0_grad)


# ---------------------------------------------------------------- autograd through the loop


def _through_graph(
    loop: InnerLoop, outer_loss: Callable[[Any], Tensor], recompute: bool, theta0_grad: bool
) -> UnrolledGradient:
    inputs, lr = loop.leaves(), loop.lr.detach().requires_grad_()
    start = [t.detach().requires_grad_() for t in loop.theta0]
    theta, velocity, losses = start, loop.velocity0, []
    count = len(theta)

    def step(i: int, rate: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        old = list(tensors[:count])
        loss, grads = loop.gradient(old, i, inputs, graph=True)
        new, speed = loop.update(old, list(tensors[count:]), grads, rate)
        return (loss, *new, *speed)

    with torch.enable_grad():
        for i in range(loop.steps):
            args = [lr[i] if lr.ndim else lr, *theta, *velocity]
            out = checkpoint(step, i, *args, use_reentrant=False) if recompute else step(i, *args)
            losses.append(out[0])
            theta, velocity = list(out[1 : count + 1]), list(out[count + 1 :])
        loss = _outer(outer_loss, loop, theta, losses)
        wanted = [inputs[k] for k in loop.wanted] + [lr] + (start if theta0_grad else [])
        grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    cut = len(loop.wanted)
    first = list(grads[cut + 1 :]) if theta0_grad else None
    return _result(loop, loss, grads[:cut], grads[cut], (theta, velocity), losses, first)


# ---------------------------------------------------------------- the adjoint


def _adjoint(
    loop: InnerLoop, outer_loss: Callable[[Any], Tensor], recursion: bool, store: str, theta0_grad: bool
) -> UnrolledGradient:
    states = _States(loop, store)
    end, losses = states.roll_out()
    final = [t.detach().requires_grad_() for t in end[0]]
    with torch.enable_grad():
        loss = _outer(outer_loss, loop, final, losses)
        lam = list(torch.autograd.grad(loss, final, allow_unused=True, materialize_grads=True))
    nu = [torch.zeros_like(v) for v in loop.velocity0]
    totals = [torch.zeros_like(loop.inputs[k]) for k in loop.wanted]
    rates: list[Tensor] = [loop.lr] * loop.steps
    for i in reversed(range(loop.steps)):
        with_theta = recursion and (i > 0 or theta0_grad)
        theta, velocity = states.before(i)
        lam, nu, rates[i] = _pull_back(loop, i, theta, velocity, lam, nu, totals, with_theta)
    lr_grad = torch.stack(rates) if loop.lr.ndim else torch.stack(rates).sum()
    return _result(loop, loss, totals, lr_grad, end, losses, lam if theta0_grad else None)


def _pull_back(
    loop: InnerLoop,
    i: int,
    theta: list[Tensor],
    velocity: list[Tensor],
    lam: list[Tensor],
    nu: list[Tensor],
    totals: list[Tensor],
    with_theta: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Take (lam, nu) back over step i; adds to ``totals`` and returns dL/db_i with the new pair."""
    inputs, theta = loop.leaves(), [t.detach().requires_grad_() for t in theta]
    rate = loop.rate(i)
    with torch.enable_grad():
        grads = loop.gradient(theta, i, inputs, graph=True)[1]
    with torch.no_grad():
        speed = [g.detach() for g in grads]
        if loop.weight_decay:
            speed = [g + loop.weight_decay * t for g, t in zip(speed, theta, strict=True)]
        if loop.momentum:
            speed = [loop.momentum * v + g for v, g in zip(velocity, speed, strict=True)]
        rate_grad = -torch.stack([(m * v).sum() for m, v in zip(lam, speed, strict=True)]).sum()
        a = [-rate * m for m in lam]
        if loop.momentum:
            a = [n + x for n, x in zip(nu, a, strict=True)]
            nu = [loop.momentum * x for x in a]
    live = [k for k, g in enumerate(grads) if g.requires_grad]
    wanted = [inputs[k] for k in loop.wanted] + (theta if with_theta else [])
    pulled: Sequence[Tensor | None] = [None] * len(wanted)  # a loss linear in theta has nothing to pull
    if live:
        pulled = torch.autograd.grad(
            [grads[k] for k in live], wanted, [a[k] for k in live], allow_unused=True
        )
    with torch.no_grad():
        for total, part in zip(totals, pulled, strict=False):
            if part is not None:
                total += part
        if loop.weight_decay:
            lam = [m + loop.weight_decay * x for m, x in zip(lam, a, strict=True)]
        if with_theta:
            products = pulled[len(totals) :]
            lam = [m if p is None else m + p for m, p in zip(lam, products, strict=True)]
    return lam, nu, rate_grad


class _States:
    """The states before every step: all kept (here or on the CPU), or one in about sqrt(N) kept."""

    def __init__(self, loop: InnerLoop, store: str) -> None:
        self.loop, self.store = loop, store
        self.every = max(1, math.isqrt(loop.steps - 1) + 1) if store == "recompute" else 1
        self.kept: dict[int, State] = {}

    def roll_out(self) -> tuple[State, list[Tensor]]:
        """Run the loop, keeping states; the final state and the step losses."""
        state: State = (self.loop.theta0, self.loop.velocity0)
        losses = []
        for i in range(self.loop.steps):
            if i % self.every == 0:
                self.kept[i] = self._moved(state, torch.device("cpu")) if self.store == "cpu" else state
            state, loss = self.loop.advance(state, i)
            losses.append(loss)
        return state, losses

    def before(self, i: int) -> State:
        """The state before step i, given away: steps are asked for once, from the last to the first."""
        if i not in self.kept:
            first = i - i % self.every
            for k in range(first, i):
                self.kept[k + 1] = self.loop.advance(self.kept[k], k)[0]
        return self._moved(self.kept.pop(i), self.loop.theta0[0].device)

    @staticmethod
    def _moved(state: State, device: torch.device) -> State:
        return [t.to(device) for t in state[0]], [v.to(device) for v in state[1]]


def _outer(
    outer_loss: Callable[[Any], Tensor], loop: InnerLoop, theta: list[Tensor], losses: list[Tensor]
) -> Tensor:
    """The outer loss, after every inner loss has been seen to be finite."""
    bad = torch.nonzero(~torch.isfinite(torch.stack(losses))).flatten().tolist()
    if bad:
        checks.refuse(
            f"step_loss is {float(losses[bad[0]])} at inner step {bad[0]} of {loop.steps}; "
            "it must stay finite (lower lr, or look at the inputs)."
        )
    loss = outer_loss(loop.pack_theta(theta))
    checks.require(
        isinstance(loss, Tensor) and loss.ndim == 0,
        f"outer_loss gave {getattr(loss, 'shape', type(loss).__name__)}; it must give a scalar tensor.",
    )
    checks.require(loss.requires_grad, "outer_loss does not depend on theta; its gradient is needed.")
    if not bool(torch.isfinite(loss)):
        checks.refuse(
            f"outer_loss is {float(loss.detach())} after inner step {loop.steps - 1} of {loop.steps}; "
            "it must be finite (lower lr)."
        )
    return loss


def _result(
    loop: InnerLoop,
    loss: Tensor,
    grads: Sequence[Tensor],
    lr_grad: Tensor,
    end: State,
    losses: list[Tensor],
    start: list[Tensor] | None,
) -> UnrolledGradient:
    theta, velocity = ([t.detach() for t in part] for part in end)
    return UnrolledGradient(
        loss=loss.detach(),
        grads=loop.pack_grads(grads),
        lr_grad=lr_grad,
        theta=loop.pack_theta(theta),
        velocity=loop.pack_theta(velocity) if loop.momentum else None,
        step_losses=torch.stack(losses).detach(),
        theta0_grad=None if start is None else loop.pack_theta(start),
    )
