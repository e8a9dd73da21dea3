"""diffGrad (Dubey, Chakraborty, Roy, Mukherjee, Singh, Chaudhuri; IEEE TNNLS 31(11) 2020, arXiv 1909.11015).

Adam whose step is multiplied, weight by weight, by a friction that grows with the change of the gradient since the
step before. With p that earlier gradient (zero at first) and m, v Adam's averages of the gradient g:

    xi = 1 / (1 + exp(-|p - g|))  in [0.5, 1),   p <- g
    w <- w - lr sqrt(1 - b2^t) / (1 - b1^t) * xi m / (sqrt(v) + eps)

Only the step is scaled; m in the state is not. Where gradients change by far less than 1 from step to step, as they do
in trained networks, xi is close to 0.5 and diffGrad is Adam at half its learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core.foreach import Tensors, each
from gradmatch.optim._adam import AdamFamily
from gradmatch.optim._base import Numbers, State

Friction = Callable[[Tensor], Tensor]
"""From the signed difference p - g to the factor of the step, element by element (it may be called on any piece)."""


class DiffGrad(AdamFamily):
    """Adam with a friction factor in [0.5, 1).

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer.
        lr: learning rate, default 1e-3 (paper); to compare with Adam, compare with Adam at half of it too.
        betas: rates of the two averages, default (0.9, 0.999).
        eps: default 1e-8; beside the uncorrected or the corrected root of v, see ``eps_mode``.
        weight_decay: default 0; added to the gradient as weight_decay * w, also in the gradient that is remembered.
        decoupled: shrink weights by lr * weight_decay instead (not in the paper).
        eps_mode: "uncorrected" has eps beside sqrt(v), as in the public code; "corrected" beside sqrt(v / (1 - b2^t)),
            as in the paper's formula and in ``torch.optim.Adam``.
        friction: "abs" is sigmoid(|p - g|); or a function of the signed difference p - g, such as ``torch.sigmoid``
            (found in public ports as version 1, in (0, 1)) or ``lambda d: 9 * torch.sigmoid(0.5 * d.abs()) - 4``
            (their version 2, in [0.5, 5)). A function is not kept in ``state_dict``.
        maximize: ascend.
        foreach: False updates tensor by tensor; else lists of tensors in blocks that stay in cache.
        flat: keep parameters, gradients and state as views of long vectors: many small tensors cost one call.
        compile: with ``flat``, run the rule as one compiled kernel (needs a C++ compiler).

    State is three tensors a parameter, "exp_avg", "exp_avg_sq" and "previous_grad" (a copy, never the gradient itself).
    A parameter without gradient keeps its old "previous_grad". Friction depends on the scale of the loss: a loss
    times 1000 makes diffGrad Adam, a loss over 1000 makes it Adam at lr / 2, so unscale before the step under AMP.

    Raises:
        InputError: lr, eps or weight_decay below 0, betas outside [0, 1), complex weights, sparse gradients, or a
            friction function that returns another shape or NaN.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = DiffGrad([w], lr=0.1)
    >>> (1000 * w).sum().backward()
    >>> optimizer.step()
    >>> round(float(w.detach()), 4)
    0.9
    """

    buffers: ClassVar[tuple[str, ...]] = (*AdamFamily.buffers, "previous_grad")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled: bool = False,
        eps_mode: str = "uncorrected",
        friction: str | Friction = "abs",
        maximize: bool = False,
        foreach: bool | None = None,
        flat: bool = False,
        compile: bool = False,
    ) -> None:
        if not callable(friction):
            checks.one_of("friction", friction, ("abs",))
        self._friction = None if isinstance(friction, str) else friction
        checks.require(
            not (compile and self._friction is not None),
            "compile=True with a friction function; a compiled rule cannot check what it returns, so use 'abs'.",
        )
        settings = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled": decoupled,
        }
        switches = {"maximize": maximize, "foreach": foreach, "flat": flat, "compile": compile}
        super().__init__(params, {**settings, "eps_mode": eps_mode, **switches})

    def numerator_factor(self, a: Tensors, s: State, c: Numbers) -> Tensors:
        """xi, of the change of the gradient; remembers the gradient."""
        previous = s["previous_grad"]
        difference = previous.sub(a)
        previous.copy_(a)
        if self._friction is None:
            return difference.abs_().sigmoid_()
        return each(self._checked, difference)

    def _checked(self, difference: Tensor) -> Tensor:
        assert self._friction is not None
        found = self._friction(difference)
        checks.require(
            isinstance(found, Tensor) and found.shape == difference.shape,
            f"friction returned {tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__}; it must "
            f"return a tensor shaped as its argument, here {tuple(difference.shape)}.",
        )
        checks.require(not bool(torch.isnan(found).any()), "friction returned NaN; it must return numbers.")
        return found.clone()  # the step multiplies it in place
