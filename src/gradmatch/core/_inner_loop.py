"""The inner training loop that an unrolled gradient differentiates: its arguments, checked, and one step of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradmatch.core import checks

Tensors = Any
"""One tensor, or a list, tuple or mapping of tensors."""

StepLoss = Callable[[Any, int, Any], Tensor]
State = tuple[list[Tensor], list[Tensor]]
"""Parameters and velocities; the second list is empty without momentum."""


@dataclass
class InnerLoop:
    """The inner loop: what is fixed during one call, with every tensor detached from its past."""

    step_loss: StepLoss
    theta0: list[Tensor]
    velocity0: list[Tensor]
    pack_theta: Callable[[Sequence[Any]], Any]
    inputs: list[Tensor]
    pack_inputs: Callable[[Sequence[Any]], Any]
    pack_grads: Callable[[Sequence[Any]], Any]
    wanted: list[int]  # positions of the differentiated inputs
    lr: Tensor
    steps: int
    momentum: float
    weight_decay: float

    @classmethod
    def create(
        cls,
        step_loss: StepLoss,
        theta0: Tensors,
        inputs: Tensors,
        lr: float | Tensor,
        steps: int,
        momentum: float,
        weight_decay: float,
        velocity0: Tensors | None,
    ) -> InnerLoop:
        theta, pack_theta = _opened("theta0", theta0)
        xs, pack_inputs = _opened("inputs", inputs)
        checks.require(
            all(t.is_floating_point() for t in theta),
            "theta0 holds whole numbers; parameters must be floating.",
        )
        steps = checks.whole("steps", steps)
        momentum = checks.fraction("momentum", momentum, zero=True, one=False)
        checks.require(
            velocity0 is None or momentum > 0,
            "velocity0 is given with momentum 0; it needs momentum above 0.",
        )
        velocity: list[Tensor] = []
        if momentum:
            if isinstance(velocity0, Mapping) and isinstance(theta0, Mapping):
                checks.require(
                    set(velocity0) == set(theta0),
                    "velocity0 has other names than theta0; it needs one tensor each.",
                )
                velocity0 = {name: velocity0[name] for name in theta0}
            given = None if velocity0 is None else _opened("velocity0", velocity0)[0]
            velocity = [torch.zeros_like(t) for t in theta] if given is None else given
            checks.require(
                [v.shape for v in velocity] == [t.shape for t in theta],
                "velocity0 has other shapes than theta0; it must have one tensor for each parameter.",
            )
        wanted = [k for k, x in enumerate(xs) if x.requires_grad]
        wanted = wanted or [k for k, x in enumerate(xs) if x.is_floating_point()]
        checks.require(bool(wanted), "inputs has no floating tensor; there is nothing to differentiate.")
        return cls(
            step_loss,
            [t.detach() for t in theta],
            [v.detach() for v in velocity],
            pack_theta,
            [x.detach() for x in xs],
            pack_inputs,
            _grads_packer(inputs, wanted),
            wanted,
            _rate(lr, steps, theta[0]),
            steps,
            momentum,
            checks.nonnegative("weight_decay", weight_decay),
        )

    def leaves(self) -> list[Tensor]:
        """The inputs, the wanted ones as fresh leaves that require grad."""
        return [x.detach().requires_grad_() if k in self.wanted else x for k, x in enumerate(self.inputs)]

    def gradient(
        self, theta: list[Tensor], i: int, inputs: list[Tensor], graph: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Loss and parameter gradient of step i; ``theta`` must require grad."""
        loss = self.step_loss(self.pack_theta(theta), i, self.pack_inputs(inputs))
        checks.require(
            isinstance(loss, Tensor) and loss.ndim == 0,
            f"step_loss gave {getattr(loss, 'shape', type(loss).__name__)}; it must give a scalar tensor.",
        )
        checks.require(loss.requires_grad, "step_loss does not depend on theta; its gradient is needed.")
        grads = torch.autograd.grad(
            loss, theta, create_graph=graph, allow_unused=True, materialize_grads=True
        )
        return loss.detach(), list(grads)

    def update(self, theta: list[Tensor], velocity: list[Tensor], grads: list[Tensor], rate: Tensor) -> State:
        """One SGD step; the same operations in every mode, so that all modes see the same bits."""
        if self.weight_decay:
            grads = [g + self.weight_decay * t for g, t in zip(grads, theta, strict=True)]
        if self.momentum:
            velocity = grads = [self.momentum * v + g for v, g in zip(velocity, grads, strict=True)]
        return [t - rate * g for t, g in zip(theta, grads, strict=True)], velocity

    def advance(self, state: State, i: int) -> tuple[State, Tensor]:
        """Step i without a graph."""
        theta = [t.detach().requires_grad_() for t in state[0]]
        with torch.enable_grad():
            loss, grads = self.gradient(theta, i, self.inputs, graph=False)
        with torch.no_grad():
            return self.update(state[0], state[1], grads, self.rate(i)), loss

    def rate(self, i: int) -> Tensor:
        return self.lr[i] if self.lr.ndim else self.lr


def _opened(name: str, value: Tensors) -> tuple[list[Tensor], Callable[[Sequence[Any]], Any]]:
    """The tensors of a structure as a list, and the function that puts such a list back into it."""
    pack: Callable[[Sequence[Any]], Any]
    if isinstance(value, Tensor):
        tensors, pack = [value], lambda parts: parts[0]
    elif isinstance(value, Mapping):
        keys = list(value)
        tensors, pack = list(value.values()), lambda parts: dict(zip(keys, parts, strict=True))
    elif isinstance(value, list | tuple):
        tensors, pack = list(value), list
    else:
        checks.refuse(
            f"{name} is a {type(value).__name__}; it must be a tensor, or a list or dict of tensors."
        )
    checks.require(
        bool(tensors) and all(isinstance(t, Tensor) for t in tensors),
        f"{name} holds {checks.listing([type(t).__name__ for t in tensors]) or 'nothing'}; it needs tensors.",
    )
    for t in tensors:
        checks.finite(name, t.detach())
    return tensors, pack


def _grads_packer(inputs: Tensors, wanted: list[int]) -> Callable[[Sequence[Any]], Any]:
    if isinstance(inputs, Tensor):
        return lambda grads: grads[0]
    if isinstance(inputs, Mapping):
        names = [key for k, key in enumerate(inputs) if k in wanted]
        return lambda grads: dict(zip(names, grads, strict=True))
    places, size = dict(zip(wanted, range(len(wanted)), strict=True)), len(inputs)
    return lambda grads: [grads[places[k]] if k in places else None for k in range(size)]


def _rate(lr: float | Tensor, steps: int, like: Tensor) -> Tensor:
    rate = (
        lr.detach() if isinstance(lr, Tensor) else torch.tensor(checks.number("lr", lr), dtype=torch.float64)
    )
    rate = rate.to(dtype=like.dtype, device=like.device)
    checks.require(
        rate.ndim == 0 or tuple(rate.shape) == (steps,),
        f"lr has shape {tuple(rate.shape)}; it must be a number or a vector of {steps} rates, one a step.",
    )
    return checks.finite("lr", rate)
