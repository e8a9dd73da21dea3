"""Lion: EvoLved Sign Momentum (Chen, Liang, Huang, Real, Wang, Liu, Pham, Dong, Luong, Hsieh, Lu, Le; NeurIPS 2023,
arXiv 2302.06675, algorithm 2). The program search that found it is :mod:`gradmatch.optim.program_search`.

With gradient g, weights w, one buffer m (zero at first), learning rate lr and decoupled decay wd:

1. w <- (1 - lr wd) w
2. w <- w - lr sign(b1 m + (1 - b1) g), with sign(0) = 0
3. m <- b2 m + (1 - b2) g

No epsilon and no bias correction; every weight moves by lr or not at all, whatever the scale of the loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from gradmatch.core import checks
from gradmatch.core.foreach import Tensors
from gradmatch.optim._base import Numbers, OptimizerBase, State, check_betas, scale_


class Lion(OptimizerBase):
    """Sign momentum with half of AdamW's state.

    To port from AdamW divide the learning rate (initial, peak and end alike) by 3 to 10 and multiply the weight decay
    by as much, so that lr * weight_decay keeps its size. The decay is scaled by schedulers along with lr, as published.

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer.
        lr: length of every weight's step, default 1e-4 (paper, ImageNet).
        betas: (b1, b2): weight of m in the step, and in its own average. Default (0.9, 0.99); the paper has
            (0.95, 0.98) for language models.
        weight_decay: decoupled, times lr; default 0.
        maximize: ascend.
        foreach: False updates tensor by tensor; else lists of tensors in blocks that stay in cache.
        flat: keep parameters, gradients and state as views of long vectors: many small tensors cost one call. Make
            the optimizer after the model is on its device.
        compile: with ``flat``, run the rule as one compiled kernel (needs a C++ compiler; ten seconds, once).

    State is float32 for parameters of half precision, which would lose small increments of m.

    Raises:
        InputError: lr or weight_decay below 0, a beta outside [0, 1), complex parameters or sparse gradients.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.0]))
    >>> optimizer = Lion([w], lr=0.1)
    >>> w.square().sum().backward()
    >>> optimizer.step()
    >>> [round(x, 3) for x in w.tolist()]
    [0.9, -1.9, 0.0]
    """

    buffers: ClassVar[tuple[str, ...]] = ("exp_avg",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        flat: bool = False,
        compile: bool = False,
    ) -> None:
        switches = {"maximize": maximize, "foreach": foreach, "flat": flat, "compile": compile}
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, **switches})

    def _check(self, group: dict[str, Any]) -> None:
        checks.nonnegative("lr", group["lr"])
        checks.nonnegative("weight_decay", group["weight_decay"])
        check_betas(group["betas"])

    def _numbers(self, group: dict[str, Any], counts: State) -> Numbers:
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        decay = 1 - lr * float(group["weight_decay"])
        return {"lr": lr, "decay": decay, "beta1": float(beta1), "beta2": float(beta2)}

    def _rule(self, p: Tensors, g: Tensors, s: State, c: Numbers) -> None:
        m = s["exp_avg"]
        scale_(p, c["decay"])
        p.add_(m.lerp(g, 1 - c["beta1"]).sign_(), alpha=-c["lr"])
        m.lerp_(g, 1 - c["beta2"])
