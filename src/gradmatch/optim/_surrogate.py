"""Parts of target-based surrogates: divergences between outputs, step sizes in target space, Armijo descent inside."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradmatch.core.checks import one_of, positive, require, whole
from gradmatch.optim._vector import Vector

Divergence = Callable[[Tensor, Tensor], Tensor]
"""(new outputs, old outputs), both [b, ...], -> elementwise parts of a divergence, summed over an example later."""
SCHEDULES = ("constant", "sqrt", "exp", "armijo", "adagrad", "adagrad_diagonal")


def l2(new: Tensor, old: Tensor) -> Tensor:
    """|z' - z|^2 / 2."""
    return (new - old).square() / 2


def logistic(new: Tensor, old: Tensor) -> Tensor:
    """p (1 - p) + 1e-5 times |z' - z|^2 / 2, with p the sigmoid of the old outputs: a Newton-like weight."""
    p = torch.sigmoid(old)
    return (p * (1 - p) + 1e-5) * (new - old).square() / 2


def kl(new: Tensor, old: Tensor) -> Tensor:
    """KL(z' || z) of outputs on the simplex: the surrogate is then KL(z' || z exp(-eta g)) / eta, up to a constant."""
    for name, z in (("new", new), ("old", old)):
        off = (z.detach().sum(-1) - 1).abs().max()
        require(
            bool((z > 0).all()) and float(off) < 1e-3,
            f'{name} outputs lie off the simplex (sums are off by {float(off):.2g}); divergence="kl" needs '
            "probabilities above 0 along the last dimension.",
        )
    return new * (new.log() - old.log())


DIVERGENCES: dict[str, Divergence] = {"l2": l2, "logistic": logistic, "kl": kl}


def per_example(t: Tensor) -> Tensor:
    """Sums over everything but the batch [b]."""
    return t.flatten(1).sum(1) if t.ndim > 1 else t


class Target(NamedTuple):
    """What one expensive call told: outputs z [b, ...], losses [b], and the gradient g of their sum, without graph."""

    z: Tensor
    losses: Tensor
    g: Tensor


@dataclass(frozen=True)
class Surrogate:
    """q(z') = mean over the batch of l + <g, z' - z> + D(z', z) / eta; ``eta`` a number or shaped as z."""

    at: Target
    eta: float | Tensor
    divergence: Divergence

    def __call__(self, new: Tensor) -> Tensor:
        """q at new outputs, with their graph."""
        z, losses, g = self.at
        return (losses + per_example(g * (new - z) + self.divergence(new, z) / self.eta)).mean()


@dataclass(frozen=True)
class TargetStep:
    """Step sizes eta in target space.

    constant, sqrt (eta0 / sqrt(t)), exp (eta0 T^(-t/T)), adagrad (eta0 over the root of the summed mean |g_i|^2), its
    diagonal form (a sum for each data point and output), and armijo: from twice the last eta, times 0.9 until
    l(z - eta g) <= l(z) - c eta |g|^2, all as means over the batch, in [1e-4, 1e4].
    """

    schedule: str = "constant"
    total: int | None = None
    c: float = 0.5

    def __post_init__(self) -> None:
        one_of("eta_schedule", self.schedule, SCHEDULES)
        require(
            (self.total is not None) == (self.schedule == "exp"),
            f"total_steps is {self.total!r} with eta_schedule={self.schedule!r}; 'exp' alone needs it.",
        )
        if self.total is not None:
            whole("total_steps", self.total)
        positive("armijo_c", self.c)

    def eta(
        self,
        eta0: float,
        at: Target,
        memory: dict[str, Any],
        value: Callable[[Tensor], float],
        index: Tensor | None,
    ) -> float | Tensor:
        """This step's eta; ``value`` calls the target loss, for "armijo" alone."""
        t = memory["step"]
        if self.schedule == "sqrt":
            return eta0 / math.sqrt(t)
        if self.schedule == "exp":
            assert self.total is not None
            return eta0 * math.exp(-t / self.total * math.log(self.total))
        if self.schedule == "adagrad":
            memory["squares"] = memory.get("squares", 0.0) + float(per_example(at.g.square()).mean())
            return eta0 / math.sqrt(max(memory["squares"], torch.finfo(at.g.dtype).tiny))
        if self.schedule == "adagrad_diagonal":
            return self._diagonal(eta0, at, memory, index)
        return self._armijo(eta0, at, memory, value) if self.schedule == "armijo" else eta0

    def _armijo(
        self, eta0: float, at: Target, memory: dict[str, Any], value: Callable[[Tensor], float]
    ) -> float:
        eta = min(1e4, max(1e-4, 2 * memory["eta"] if "eta" in memory else eta0))
        here, slope = float(at.losses.mean()), float(per_example(at.g.square()).mean())
        while eta > 1e-4 and not value(at.z - eta * at.g) <= here - self.c * eta * slope:
            eta = max(1e-4, 0.9 * eta)
        memory["eta"] = eta
        return eta

    @staticmethod
    def _diagonal(eta0: float, at: Target, memory: dict[str, Any], index: Tensor | None) -> Tensor:
        require(
            index is not None, 'eta_schedule="adagrad_diagonal" keeps a sum for each data point; pass index=.'
        )
        assert index is not None
        require(
            index.shape == (len(at.z),) and not index.is_floating_point() and int(index.min()) >= 0,
            f"index is {index.dtype} of shape {tuple(index.shape)}; it needs each example's place, ({len(at.z)},).",
        )
        sums: Tensor = memory.get("sums", at.g.new_zeros((0, *at.g.shape[1:])))
        missing = int(index.max()) + 1 - len(sums)
        if missing > 0:
            sums = torch.cat([sums, sums.new_zeros((missing, *sums.shape[1:]))])
        sums.index_add_(0, index, at.g.square())
        memory["sums"] = sums
        return eta0 / sums[index].sqrt().clamp(min=torch.finfo(at.g.dtype).tiny ** 0.5)


class Inner(NamedTuple):
    """What an inner loop did: steps taken, forward passes, the surrogate's last value."""

    steps: int
    forwards: int
    value: float


def armijo_descent(
    vector: Vector,
    outputs: Callable[[], Tensor],
    surrogate: Callable[[Tensor], Tensor],
    first: Tensor,
    memory: dict[str, Any],
    steps: int,
    tol: float,
    c: float = 0.1,
    shrink: float = 0.8,
    trials: int = 100,
) -> Inner:
    """Gradient descent on a surrogate with backtracking, c as in the paper.

    A step length that was accepted at once is doubled for the next; it lives in ``memory`` (10 at first). The graph of
    an accepted trial serves the next gradient, so m steps cost m + backtracks forward passes, beside ``first``.
    """
    length = memory.get("length", 10.0)
    q, forwards, taken = surrogate(first), 0, 0
    x, value = vector.read(), float(q.detach())
    while taken < steps:
        g = vector.gradient(q)
        slope = float(g @ g)
        if not math.sqrt(slope) > tol:
            break
        tried = 0
        while tried < trials:
            tried += 1
            vector.write(x - length * g)
            forwards += 1
            q = surrogate(outputs())
            if float(q.detach()) <= value - c * length * slope:
                break
            length *= shrink
        else:  # the decrease is under what the floating type shows
            vector.write(x)
            break
        x, value, taken = vector.read(), float(q.detach()), taken + 1
        memory["length"] = length
        length *= 2 if tried == 1 else 1
    return Inner(taken, forwards, value)


def run_inner(
    make: Callable[[list[Tensor]], Any],
    vector: Vector,
    outputs: Callable[[], Tensor],
    surrogate: Callable[[Tensor], Tensor],
    first: Tensor,
    steps: int,
) -> Inner:
    """``steps`` of any torch optimizer, made anew for each surrogate; gradients are left as found."""
    optimizer, held = make(vector.params), [p.grad for p in vector.params]
    forwards, ready = 0, [first]

    def closure() -> Tensor:
        nonlocal forwards
        if ready:
            z = ready.pop()
        else:
            z, forwards = outputs(), forwards + 1
        q = surrogate(z)
        found = torch.autograd.grad(q, vector.params)
        for p, g in zip(vector.params, found, strict=True):
            p.grad = g
        return q.detach()

    try:
        for _ in range(steps):
            optimizer.step(closure)
    finally:
        for p, g in zip(vector.params, held, strict=True):
            p.grad = g
    with torch.no_grad():
        value = float(surrogate(outputs()))
    return Inner(steps, forwards + 1, value)
