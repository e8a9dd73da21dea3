"""The Adam family: two moving averages, with a projector, a factor on the numerator and a denominator to be replaced.

With g the gradient, d what is squared (g itself in Adam) and P a projector (the identity in Adam):

    a = P g                                         projector
    m <- b1 m + (1 - b1) a,   v <- b2 v + (1 - b2) d^2
    w <- (1 - lr wd) w - step_size P^T [ factor * m / denominator(v) ]

The step size is lr / (1 - b1^t) times m / (sqrt(v) / root + eps) with root = sqrt(1 - b2^t), computed as
lr root / (1 - b1^t) times m / (sqrt(v) + eps root), one operation less. ``eps_mode`` "uncorrected" leaves out the last
root and so puts eps beside the uncorrected sqrt(v), as early public code did. ``decoupled`` False adds wd w to g
instead of shrinking w.

Where no hook is replaced and the numbers lie on a CPU, torch's fused kernel takes the step: the arrays are read once,
where seven operations read them seven times. ``foreach=False`` is the formula, operation by operation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import compress
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.core.flat import dense
from gradmatch.core.foreach import TensorList, Tensors
from gradmatch.optim._base import Numbers, OptimizerBase, State, check_betas, scale_

EPS_MODES = ("corrected", "uncorrected")


class Projector(Protocol):
    """The map P of one parameter to a space of fewer numbers, and back."""

    def down(self, gradient: Tensor, state: State) -> Tensor:
        """P g; may change what the projector keeps in the parameter's ``state``."""

    def up(self, update: Tensor, state: State) -> Tensor:
        """P^T u, shaped as the parameter."""


class AdamFamily(OptimizerBase):
    """Base of the Adam family; it is AdamW itself where no hook is replaced.

    Groups hold lr, betas, eps and weight_decay, and may hold eps_mode and decoupled.

    Hooks: :meth:`projector` of a parameter, which then is updated in its own shape; :meth:`numerator_factor`, called
    before m moves, and :meth:`denominator`, called after, both on a Tensor or a TensorList.
    """

    buffers: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def projector(self, p: Tensor, group: dict[str, Any]) -> Projector | None:
        """The projector of a parameter, or None to work in its own space."""
        return None

    def numerator_factor(self, a: Tensors, s: State, c: Numbers) -> Tensors | None:
        """A new tensor that multiplies m in the step (not in the state), or None for 1."""
        return None

    def denominator(self, a: Tensors, s: State, c: Numbers) -> Tensors:
        """Move v, and return a new tensor to divide by."""
        v = s["exp_avg_sq"]
        v.mul_(c["beta2"]).addcmul_(a, a, value=1 - c["beta2"])
        return v.sqrt().add_(c["eps"])

    # --- the kernel ----------------------------------------------------------------------------------------

    def _rule(self, p: Tensors, g: Tensors, s: State, c: Numbers) -> None:
        if isinstance(c["fused"], float) and c["fused"]:
            lists = [_listed(x) for x in (p, g, s["exp_avg"], s["exp_avg_sq"])]
            fit = [_fusable(row) for row in zip(*lists, strict=True)]
            if any(fit):
                _fused_step([list(compress(own, fit)) for own in lists], c)
            if all(fit):
                return
            p, g, m, v = (
                TensorList(t for t, done in zip(own, fit, strict=True) if not done) for own in lists
            )
            s = {"exp_avg": m, "exp_avg_sq": v}
        a = self._decayed(p, g, c)
        numerator, denominator = self._direction(a, s, c)
        p.addcdiv_(numerator, denominator, value=-c["step_size"])

    def _whole(self, p: Tensor, group: dict[str, Any]) -> bool:
        return self.projector(p, group) is not None

    def _update_whole(self, p: Tensor, g: Tensor, s: State, c: Numbers, group: dict[str, Any]) -> None:
        projector = self.projector(p, group)
        assert projector is not None
        a = projector.down(self._decayed(p, g, c), s)
        numerator, denominator = self._direction(a, s, c)
        p.sub_(projector.up(numerator / denominator, s), alpha=c["step_size"])

    def _decayed(self, p: Tensors, g: Tensors, c: Numbers) -> Tensors:
        """Shrink the weights, or give the gradient with its L2 term, whichever the group asks for."""
        scale_(p, c["decay"])
        return g if isinstance(c["l2"], float) and c["l2"] == 0.0 else g.add(p, alpha=c["l2"])

    def _direction(self, a: Tensors, s: State, c: Numbers) -> tuple[Tensors, Tensors]:
        factor = self.numerator_factor(a, s, c)
        m = s["exp_avg"].lerp_(a, 1 - c["beta1"])
        return (m if factor is None else factor.mul_(m)), self.denominator(a, s, c)

    def _numbers(self, group: dict[str, Any], counts: State) -> Numbers:
        lr, decay, t = float(group["lr"]), float(group["weight_decay"]), counts["step"]
        beta1, beta2 = group["betas"]
        first, root = 1 - beta1**t, math.sqrt(1 - beta2**t)
        decoupled = group.get("decoupled", True)
        corrected = group.get("eps_mode", "corrected") == "corrected"
        return {
            "step_size": lr * root / first,
            "eps": float(group["eps"]) * (root if corrected else 1.0),
            "beta1": float(beta1),
            "beta2": float(beta2),
            "decay": 1 - lr * decay if decoupled else 1.0,
            "l2": 0.0 if decoupled else decay,
            "fused": float(self._unhooked and group["foreach"] is not False),
        }

    @property
    def _unhooked(self) -> bool:
        """Whether the rule is Adam's own."""
        own = type(self)
        return (
            own.numerator_factor is AdamFamily.numerator_factor and own.denominator is AdamFamily.denominator
        )

    def _check(self, group: dict[str, Any]) -> None:
        checks.nonnegative("lr", group["lr"])
        checks.nonnegative("eps", group["eps"])
        checks.nonnegative("weight_decay", group["weight_decay"])
        check_betas(group["betas"])
        checks.one_of("eps_mode", group.get("eps_mode", "corrected"), EPS_MODES)


_FOR_GOOD = torch.tensor(math.inf)
"""A count of steps at which torch's kernel corrects nothing: the correction is in step_size and eps already."""


def _listed(x: Tensors) -> list[Tensor]:
    return x.tensors if isinstance(x, TensorList) else [x]


def _fusable(row: Sequence[Tensor]) -> bool:
    """Whether the kernel, which goes through memory in its order, may have these tensors of one shape."""
    p = row[0]
    if p.device.type != "cpu" or not hasattr(torch, "_fused_adam_"):
        return False
    if any(t.dtype is not p.dtype or type(t) not in (Tensor, nn.Parameter) for t in row):
        return False
    return all(t.is_contiguous() for t in row) or (dense(p) and all(t.stride() == p.stride() for t in row))


def _fused_step(lists: list[list[Tensor]], c: Numbers) -> None:
    """The rule by torch's kernel, on contiguous tensors of one type."""
    lr, l2 = c["step_size"], c["l2"]
    decay = (1 - c["decay"]) / lr if lr else 0.0  # the kernel multiplies it by its rate
    kernel = torch._fused_adam_ if l2 else torch._fused_adamw_
    p, g, m, v = lists
    kernel(
        p,
        g,
        m,
        v,
        [],
        [_FOR_GOOD] * len(lists[0]),
        lr=lr,
        beta1=c["beta1"],
        beta2=c["beta2"],
        weight_decay=l2 or decay,
        eps=c["eps"],
        amsgrad=False,
        maximize=False,
    )
