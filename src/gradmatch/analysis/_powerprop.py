"""Powerpropagation as an optimizer: what a sparsifying reparametrisation does to a step (arXiv 2110.00296, 2507.12224).

With w = t |t|^{a-1}, gradient flow in t is, in w, dw/dt = -a^2 |w|^{2(a-1)/a} dL/dw: weights near zero hardly move, so
that training sorts weights into few large and many small ones. The same preconditioner works for any optimizer, where
the reparametrisation is undone by optimizers that normalise gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import SGD, Optimizer

from gradmatch.core import checks

__all__ = ["PowerPropagated", "reparametrize"]


class PowerPropagated(Optimizer):
    """Any optimizer with its gradient, or its finished step, multiplied by |w|^{2(a-1)/a}.

    Matrices and larger tensors are preconditioned; vectors (biases, scales) are not. It is an optimizer itself: the
    parameter groups are those of the one inside, so schedulers work on either.

    Args:
        optimizer: the one inside.
        alpha: a, at least 1; 1 changes nothing, to the bit.
        divide: by the mean of the factor over the tensor, so that rates keep their meaning. Without it, a rate times
            a^2 and no momentum is SGD on the reparametrised weights to first order.
        where: "gradient" (before the optimizer) or "step" (its finished step); "auto" is "gradient" for SGD, and
            "step" for others, which normalise gradients and with them the factor.

    Raises:
        InputError: alpha below 1, or weights that are exactly 0 and would never move.

    >>> w = nn.Parameter(torch.ones(2, 2))
    >>> PowerPropagated(SGD([w], 0.1), alpha=2.0).param_groups[0]["lr"]
    0.1
    """

    def __init__(
        self,
        optimizer: Optimizer,
        alpha: float = 2.0,
        *,
        divide: bool = True,
        where: Literal["auto", "gradient", "step"] = "auto",
    ) -> None:
        checks.require(checks.number("alpha", alpha) >= 1, f"alpha is {alpha}; it must be at least 1.")
        checks.one_of("where", where, ("auto", "gradient", "step"))
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer, self.alpha, self.divide = optimizer, alpha, bool(divide)
        self.param_groups, self.state = optimizer.param_groups, optimizer.state
        auto = "gradient" if isinstance(optimizer, SGD) else "step"
        self.where = auto if where == "auto" else where
        still = sum(int((w == 0).sum()) for w in self.weights) if alpha > 1 else 0
        checks.require(
            still == 0,
            f"{still} weights are exactly 0; with alpha above 1 they would never move, so start them elsewhere.",
        )

    @property
    def weights(self) -> list[Tensor]:
        """The preconditioned parameters."""
        return [p for group in self.param_groups for p in group["params"] if p.ndim >= 2]

    def factor(self, weight: Tensor) -> Tensor:
        """|w|^{2(a-1)/a}, divided by its mean if so asked."""
        found = weight.detach().abs().pow(2 * (self.alpha - 1) / self.alpha)
        return found / found.mean() if self.divide else found

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of the optimizer inside, preconditioned; returns the closure's loss."""
        if self.alpha == 1:
            return self.optimizer.step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        weights = [w for w in self.weights if w.grad is not None]
        factors = [self.factor(w) for w in weights]
        if self.where == "gradient":
            grads = [w.grad for w in weights]
            for w, g, f in zip(weights, grads, factors, strict=True):
                w.grad = g * f if g is not None else None
            self.optimizer.step()
            for w, g in zip(weights, grads, strict=True):
                w.grad = g
            return loss
        before = [w.detach().clone() for w in weights]
        self.optimizer.step()
        with torch.no_grad():
            for w, old, f in zip(weights, before, factors, strict=True):
                w.copy_(torch.addcmul(old, f, w - old))
        return loss

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer inside."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """That of the optimizer inside."""
        self.optimizer.load_state_dict(state_dict)
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state


class _Power(nn.Module):
    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, theta: Tensor) -> Tensor:
        return theta * theta.abs().pow(self.alpha - 1)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.sign() * weight.abs().pow(1 / self.alpha)


def reparametrize(module: nn.Module, alpha: float = 2.0) -> nn.Module:
    """Give every weight of two or more modes the form w = t |t|^{a-1}, in place; w is as before.

    Raises:
        InputError: alpha below 1.

    >>> sum(p.numel() for p in reparametrize(nn.Linear(3, 2)).parameters())
    8
    """
    checks.require(checks.number("alpha", alpha) >= 1, f"alpha is {alpha}; it must be at least 1.")
    for part in list(module.modules()):
        for name, p in list(part.named_parameters(recurse=False)):
            if p.ndim >= 2:
                parametrize.register_parametrization(part, name, _Power(alpha))
    return module
