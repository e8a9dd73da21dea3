"""ADAHESSIAN (Yao, Gholami, Shen, Mustafa, Keutzer, Mahoney; AAAI 2021, arXiv 2006.00719).

Adam whose second moment is that of the Hessian's diagonal in place of the gradient. With signs z, D = z * (H z) is one
more backward pass and has E[D] = diag(H). D^s are its absolute values averaged over blocks of weights, and with m, v
moving averages of g and (D^s)^2, t steps and u of them with a new D:

    w <- (1 - lr wd) w - lr m / (1 - b1^t) / ((sqrt(v / (1 - b2^u)))^k + eps)

The public code averages |D| over blocks, the paper's formula D itself. v is corrected by the number of its own updates:
corrected by that of the steps, it would be too small wherever D is refreshed every few steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core._second import refuse_ends
from gradmatch.core.foreach import Tensors
from gradmatch.core.hutchinson import hessian_diagonals
from gradmatch.core.problem import twice_differentiable
from gradmatch.optim import _protocol
from gradmatch.optim._adam import AdamFamily
from gradmatch.optim._base import Numbers, State, wide_dtype
from gradmatch.optim._parts import refuse_sparse
from gradmatch.optim._twice import refuse_once_differentiable

BLOCKS = ("conv", "row", None)
AVERAGES = ("abs", "signed")


class AdaHessian(AdamFamily):
    """Adam on the curvature of every weight, at one Hessian-vector product a step.

    Step it with a closure that returns the loss and does not call backward (the graph is freed inside), or call
    ``loss.backward(create_graph=True)`` and then ``step()``. Both leave plain gradients in ``grad``. In the first way
    attention is computed by plain products; in the second do so yourself, inside
    ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``.

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer.
        lr: learning rate, default 0.15 (paper, images; 0.047 for translation).
        betas: rates of the two averages, default (0.9, 0.999); the paper has (0.9, 0.98) for translation. A run of less
            than a hundred steps wants a smaller second one.
        eps: default 1e-4. Flat directions have a curvature near 0, so that it bounds their steps: do not copy Adam's.
        weight_decay: decoupled, times lr; default 0. The paper has 5e-4 / lr for images.
        hessian_power: k, default 1; 0 leaves the curvature out.
        block: weights whose curvature is averaged. "conv" (default, the public code for images): the kernel window of
            tensors of three or more dimensions. "row": rows of matrices too. A number b: stretches of b weights of each
            tensor in its order, the last one shorter (32 for the paper's transformers). None: no averaging.
        average: "abs" averages |D| (public code), "signed" D (the paper's formula).
        n_samples: signs drawn for each D, default 1; their D are averaged before ``average``.
        hessian_every: a parameter's D is made at its steps 1, 1 + f, 1 + 2 f, ... (paper: 1 to 5); default 1.
        generator: of the signs, default one of seed 0 where the first parameter is; its state is in ``state_dict``.
        sync: average D, and the gradients of a closure, over the ranks of torch.distributed, which must draw the same
            signs (generators of one seed).
        foreach: False updates tensor by tensor; else lists of tensors in blocks that stay in cache.

    State is two tensors a parameter, "exp_avg" and "exp_hessian_diag_sq".

    Raises:
        InputError: settings out of range, gradients without graph (no ``create_graph=True``, or replaced by clipping),
            sparse gradients, complex weights, a loss scaled by ``GradScaler`` (the curvature is scaled as well: train
            in bfloat16 without it), or a model with an operation that has no second derivative.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    >>> optimizer = AdaHessian([w], lr=1.0, eps=0.0)
    >>> h = torch.tensor([1.0, 10.0, 100.0])
    >>> _ = optimizer.step(lambda: (0.5 * h * w**2).sum())  # a quadratic's first step is Newton's
    >>> w.detach()
    tensor([0., 0., 0.])
    """

    protocols: ClassVar[tuple[_protocol.Protocol, ...]] = ("graph", "loss closure")
    buffers: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_hessian_diag_sq")
    counters: ClassVar[tuple[str, ...]] = ("step", "hessian_step")
    _step_supports_amp_scaling = True  # makes GradScaler leave its scale here, where it is refused

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        hessian_power: float = 1.0,
        *,
        block: str | int | None = "conv",
        average: str = "abs",
        n_samples: int = 1,
        hessian_every: int = 1,
        generator: torch.Generator | None = None,
        sync: bool = False,
        foreach: bool | None = None,
    ) -> None:
        self.n_samples, self.sync = checks.whole("n_samples", n_samples), bool(sync)
        self._diagonals: dict[Tensor, Tensor] = {}
        self._examined = False
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "foreach": foreach}
        curvature = {"hessian_power": hessian_power, "block": block, "average": average}
        super().__init__(params, {**adam, **curvature, "hessian_every": hessian_every})
        device = self.param_groups[0]["params"][0].device
        self._generator = torch.Generator(device).manual_seed(0) if generator is None else generator

    # --- gradients and curvature ---------------------------------------------------------------------------

    def _gradients(self, closure: Callable[[], Any] | None) -> Tensor | None:
        checks.require(
            not hasattr(self, "found_inf"),
            "AdaHessian.step was called by a GradScaler, whose scale multiplies the curvature too; train in bfloat16, "
            "or pass enabled=False to the GradScaler.",
        )
        loss, pairs = self._from_graph() if closure is None else self._from_closure(closure)
        fresh = self._due()
        due = [(p, g) for p, g in pairs if p in fresh]
        self._diagonals = {}
        if due:
            owners, slopes = zip(*due, strict=True)
            try:
                if not self._examined:  # such a place would be passed by without a word
                    refuse_ends(slopes)
                    self._examined = True
                found = hessian_diagonals(slopes, owners, self._generator, self.n_samples)
            except RuntimeError as error:
                refuse_once_differentiable(self._name, closure, error)
                raise
            self._diagonals = dict(zip(owners, found, strict=True))
            self._average_over_ranks(found)
        for p, g in pairs:
            p.grad = g.detach()  # a new tensor: whoever holds the graph's own is not disturbed
        if closure is not None:
            self._average_over_ranks([g.detach() for _, g in pairs])
        return loss

    def _from_graph(self) -> tuple[None, list[tuple[Tensor, Tensor]]]:
        params = self._all_params()
        if any(p.grad is not None and p.grad.layout is not torch.strided for p in params):
            refuse_sparse(self._name)
        _protocol.require_graph(self._name, params, self.protocols)
        return None, [(p, p.grad) for p in params if p.grad is not None]

    def _from_closure(self, closure: Callable[[], Any]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        params = [p for p in self._all_params() if p.requires_grad]
        with twice_differentiable():
            loss = _protocol.loss_with_graph(self._name, self._all_params(), closure, self.protocols)
            found = torch.autograd.grad(loss, params, create_graph=bool(self._due()), allow_unused=True)
        for p in params:
            p.grad = None
        if any(g is not None and g.layout is not torch.strided for g in found):
            refuse_sparse(self._name)
        pairs = [(p, g) for p, g in zip(params, found, strict=True) if g is not None]
        return loss.detach(), pairs

    def _due(self) -> set[Tensor]:
        """Parameters whose next step has a new D."""
        return {
            p
            for group in self.param_groups
            for p in group["params"]
            if self.state.get(p, {}).get("step", 0) % group["hessian_every"] == 0
        }

    def _average_over_ranks(self, tensors: Iterable[Tensor]) -> None:
        if self.sync and torch.distributed.is_available() and torch.distributed.is_initialized():
            for t in tensors:
                torch.distributed.all_reduce(t.div_(torch.distributed.get_world_size()))

    # --- the rule ------------------------------------------------------------------------------------------

    def _prepare(self, p: Tensor, s: State, group: dict[str, Any]) -> State:
        if p not in self._diagonals:
            return {}
        s["hessian_step"] += 1
        d = self._diagonals.pop(p).to(wide_dtype(p))
        return {"diagonal": averaged(d.abs_() if group["average"] == "abs" else d, group["block"])}

    def denominator(self, a: Tensors, s: State, c: Numbers) -> Tensors:
        """Move v where there is a new D; its root to the power of k."""
        v = s["exp_hessian_diag_sq"]
        if "diagonal" in s:
            v.mul_(c["beta2"]).addcmul_(s["diagonal"], s["diagonal"], value=1 - c["beta2"])
        return (v.sqrt() if c["power"] == 1 else v.pow(c["power"] / 2)).add_(c["eps"])

    def _numbers(self, group: dict[str, Any], counts: State) -> Numbers:
        lr, power, (beta1, beta2) = float(group["lr"]), float(group["hessian_power"]), group["betas"]
        root = math.sqrt(1 - beta2 ** counts["hessian_step"]) ** power
        own = {"step_size": lr * root / (1 - beta1 ** counts["step"]), "eps": float(group["eps"]) * root}
        return {**super()._numbers(group, counts), **own, "power": power}

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        checks.fraction("hessian_power", group["hessian_power"], zero=True)
        if isinstance(group["block"], int):
            checks.whole("block", group["block"])
        else:
            checks.one_of("block", group["block"], BLOCKS)
        checks.one_of("average", group["average"], AVERAGES)
        checks.whole("hessian_every", group["hessian_every"])

    # --- the generator travels with the state --------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with the state of the generator of signs."""
        return {**super().state_dict(), "generator": self._generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, with the state of the generator of signs."""
        super().load_state_dict(state_dict)
        if "generator" in state_dict:
            self._generator.set_state(state_dict["generator"].cpu())


def averaged(d: Tensor, block: str | int | None) -> Tensor:
    """Every entry replaced by the mean of its block; see ``block`` of :class:`AdaHessian`.

    >>> averaged(torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0]), 2)
    tensor([2., 2., 6., 6., 9.])
    """
    if isinstance(block, int):
        flat = d.flatten()
        whole = len(flat) // block * block
        parts = [flat[:whole].view(-1, block), flat[None, whole:]]
        return torch.cat(
            [p.mean(1, keepdim=True).expand_as(p).flatten() for p in parts if p.numel()]
        ).view_as(d)
    if block is None or d.ndim < 2 or (d.ndim == 2 and block == "conv"):
        return d
    return d.mean(tuple(range(min(2, d.ndim - 1), d.ndim)), keepdim=True).expand_as(d).contiguous()
