"""A problem: model, per-example loss and data in a fixed order, the ground every gradient statistic stands on.

The loss of example i is l_i(theta) = loss(model(theta, x_i), y_i), and the objective is the mean over all n
examples. Only per-example losses come in, and only this package reduces them, so batches of unequal size never give
a mean of means. The chain parameters -> outputs -> loss stays open in the middle: with J the Jacobian of a batch's
outputs in the parameters and B the Hessian of its summed loss in the outputs, ``jvp`` is V -> J V, ``vjp`` is
U -> J^T U and ``loss_hessian`` is U -> B U; the Gauss-Newton matrix is their product.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from gradmatch.core._batches import Batch, OrderedData
from gradmatch.core._params import ParamSpace, ParamValues
from gradmatch.core.checks import InputError, finite, listing, one_of, require

__all__ = [
    "LOSSES",
    "Batch",
    "ParamSpace",
    "ParamValues",
    "Problem",
    "cross_entropy",
    "mse",
    "next_token",
    "twice_differentiable",
]

Loss = Callable[[Any, Any], Tensor]


def cross_entropy(outputs: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy [m] of logits [m, C, ...] with class ids [m, ...] or probabilities [m, C, ...].

    Further positions of an example (pixels, tokens) are averaged within the example.
    """
    if not target.is_floating_point() and target.dtype != torch.long:
        target = target.long()  # arrays of int32 and bool are class ids, too
    try:
        losses = F.cross_entropy(outputs, target, reduction="none")
    except (IndexError, RuntimeError) as error:
        reason = _unfit(outputs, target)
        if reason is None:
            raise
        raise InputError(reason) from error
    return losses if losses.ndim == 1 else losses.flatten(1).mean(1)


def _unfit(outputs: Tensor, target: Tensor) -> str | None:
    """Why torch could not take the cross-entropy, where it is the target's fault."""
    if outputs.ndim < 2:
        return f"model gives outputs of shape {tuple(outputs.shape)}; cross_entropy needs logits (m, C)."
    if target.is_floating_point():
        needed = f"class ids, or probabilities of the outputs' shape {tuple(outputs.shape)}"
        got = f"target is {target.dtype} of shape {tuple(target.shape)}"
        return None if target.shape == outputs.shape else f"{got}; cross_entropy needs {needed}."
    if torch._C._functorch.is_functorch_wrapped_tensor(target):  # values are out of reach inside vmap
        return None
    ids, most = target[target != -100].tolist(), outputs.shape[1] - 1
    if not ids or (min(ids) >= 0 and max(ids) <= most):
        return None
    return f"target has class ids from {min(ids)} to {max(ids)}; the model's outputs are for 0..{most}."


def mse(outputs: Tensor, target: Tensor) -> Tensor:
    """Squared error [m], averaged over the entries of an example; outputs and target have one shape [m, ...]."""
    require(
        outputs.shape == target.shape,
        f"target has shape {tuple(target.shape)}; mse needs the outputs' shape {tuple(outputs.shape)}.",
    )
    return (outputs - target).square().flatten(1).mean(1) if outputs.ndim > 1 else (outputs - target).square()


def next_token(outputs: Tensor, target: Tensor | Mapping[str, Tensor]) -> Tensor:
    """Causal language-model loss [m]: mean cross-entropy of logits [m, T, V] with the token that follows.

    ``target`` is token ids [m, T], with -100 where nothing counts, or a batch dict with "input_ids" and perhaps
    "attention_mask". An example in which no token counts has loss 0.
    """
    following = following_tokens(target)
    losses = F.cross_entropy(outputs[:, :-1].transpose(1, 2), following, reduction="none", ignore_index=-100)
    return losses.sum(1) / (following != -100).sum(1).clamp(min=1)


def following_tokens(target: Tensor | Mapping[str, Tensor]) -> Tensor:
    """The token [m, T - 1] that follows each position but the last, -100 where nothing counts."""
    if isinstance(target, Mapping):
        ids, mask = target["input_ids"], target.get("attention_mask")
        target = ids if mask is None else ids.masked_fill(mask == 0, -100)
    return target[:, 1:]


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "mse": mse, "next_token": next_token}


def twice_differentiable() -> AbstractContextManager[None]:
    """Attention by plain products inside this context: fused kernels have no second or forward derivatives."""
    return sdpa_kernel(SDPBackend.MATH)


_ALLOWED = ("dropout", "batchnorm", "order")


def _batch_norms(model: nn.Module) -> list[str]:
    return [
        name
        for name, m in model.named_modules()
        if isinstance(m, _BatchNorm) and (m.training or not m.track_running_stats)
    ]


def _dropouts(model: nn.Module) -> list[str]:
    """Modules in train mode that hold a drop rate: nn.Dropout, and attention or recurrent ones with an attribute."""

    def active(m: nn.Module) -> bool:
        if isinstance(m, nn.modules.dropout._DropoutNd):
            return m.p > 0
        return any("drop" in key and isinstance(v, float) and v > 0 for key, v in vars(m).items())

    return [name or type(m).__name__ for name, m in model.named_modules() if m.training and active(m)]


class Problem:
    """Model, per-example loss and data in a fixed order, with optional groups.

    Args:
        model: an ``nn.Module``, called as ``model(inputs)``, ``model(*inputs)`` for a tuple or ``model(**inputs)``
            for a dict (of an output with ``.logits`` the logits are taken); or a function
            ``model(params, inputs) -> outputs`` of a dict of tensors, given with ``params``.
        loss: "cross_entropy" (class ids or probabilities), "mse" (mean over an example's entries), "next_token"
            (causal language models), or any ``loss(outputs, target) -> [m]`` with one loss for each example.
        data: ``(inputs, target)`` tensors, a dict of tensors ("labels" is the target; without it the dict itself),
            ``Examples``, a ``Dataset``, a ``DataLoader`` in fixed order, or a list of batches of any sizes.
        params: the tensors of a functional model, by name.
        select: regular expression (``re.search``) or list of names: which parameters to differentiate in.
            Default: all that require grad. The others are constants.
        groups: group id of each example (long [n]), or "class" (hard labels), "batch" or "example".
        batch_size: examples taken at once from data without batches of its own (default 256).
            Numbers in float64 are brought to the parameters' type, if that is another.
        allow: names of what is refused otherwise: "dropout" and "batchnorm" (active in train mode; dropout then
            draws from torch's global generator) and "order" (data that changes between passes).

    A list or loader is walked once here, to count and check it. Module modes, buffers and ``.grad`` are never
    touched.

    Raises:
        InputError: active dropout or batch norm, shuffled or changing or non-finite data, groups that do not fit.

    >>> problem = Problem(nn.Linear(3, 2), "cross_entropy", (torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])))
    >>> problem.n, problem.space.size, problem.example_losses().shape
    (5, 8, torch.Size([5]))
    """

    def __init__(
        self,
        model: nn.Module | Callable[[Mapping[str, Tensor], Any], Any],
        loss: str | Loss,
        data: Any,
        *,
        params: Mapping[str, Tensor] | None = None,
        select: str | Sequence[str] | None = None,
        groups: Tensor | str | None = None,
        batch_size: int = 256,
        allow: str | Sequence[str] = (),
    ) -> None:
        self.allow = frozenset([allow] if isinstance(allow, str) else allow)
        for name in self.allow:
            one_of("allow", name, _ALLOWED)
        require(callable(model), f"model is {type(model).__name__}; it must be an nn.Module or a function.")
        is_module = isinstance(model, nn.Module)
        require(
            is_module == (params is None),
            "params belong to a functional model; an nn.Module brings its own and a function needs them.",
        )
        self.model = model
        self.module: nn.Module | None = model if isinstance(model, nn.Module) else None
        self._params = params
        self.space = ParamSpace.of(model if isinstance(model, nn.Module) else dict(params or {}), select)
        self.loss: Loss = LOSSES[one_of("loss", loss, LOSSES)] if isinstance(loss, str) else loss
        self.loss_name = loss if isinstance(loss, str) else getattr(loss, "__name__", "callable")
        self._cast: torch.dtype | None = None
        self.check_mode()
        self.data = OrderedData(data, batch_size, check_order="order" not in self.allow)
        self.n = self.data.n
        self.groups = self._group_ids(groups)

    def _group_ids(self, groups: Tensor | str | None) -> Tensor | None:
        if groups is None:
            return None
        require("order" not in self.allow, 'groups need data in a fixed order, and allow has "order".')
        if isinstance(groups, str):
            kind = one_of("groups", groups, ("class", "batch", "example"))
            if kind == "class":
                return torch.cat([hard_labels(batch.target).cpu() for batch in self.data])
            if kind == "example":
                return torch.arange(self.n)
            return torch.repeat_interleave(torch.arange(len(self.data.sizes)), torch.tensor(self.data.sizes))
        ids = torch.as_tensor(groups)
        require(
            ids.shape == (self.n,) and not ids.is_floating_point() and int(ids.min()) >= 0,
            f"groups is {ids.dtype} of shape {tuple(ids.shape)}; it needs ids of at least 0, shape ({self.n},).",
        )
        return ids.long().cpu()

    # --- modes ---------------------------------------------------------------------------------------------

    def active(self, kind: str) -> list[str]:
        """Names of the modules with active ``kind``: "dropout" or "batchnorm"."""
        if self.module is None:
            return []
        return {"dropout": _dropouts, "batchnorm": _batch_norms}[kind](self.module)

    def check_mode(self) -> None:
        """Refuse active dropout and batch norm that were not allowed by name."""
        for kind in ("dropout", "batchnorm"):
            found = [] if kind in self.allow else self.active(kind)
            if found:
                raise InputError(
                    f'model has active {kind} in {listing(found)}; call model.eval(), or accept it with allow="{kind}".'
                )

    # --- data ----------------------------------------------------------------------------------------------

    def batches(self, differentiable: bool = False) -> Iterator[Batch]:
        """The data, batch by batch in order, on the parameters' device; cut from its graph by default."""
        self.check_mode()
        for batch in self.data:
            batch = batch if differentiable else batch.detached()
            inputs, target = tree_map(self._placed, (batch.inputs, batch.target))
            groups = None
            if self.groups is not None:
                groups = self.groups[batch.start : batch.start + batch.size].to(self.space.device)
            yield Batch(inputs, target, batch.start, groups)

    def _placed(self, t: Tensor) -> Tensor:
        dtype = self._cast if t.is_floating_point() else None
        if dtype is None and t.dtype == torch.float64 and self.space.dtype != torch.float64:
            # arrays are float64 where nobody chose it, and no layer multiplies two types
            dtype = self.space.dtype
        return t.to(self.space.device, dtype)

    def astype(self, dtype: torch.dtype) -> Problem:
        """The same problem in another floating type: a copy of the model's tensors, and data cast batch by batch."""
        other = copy.copy(self)
        other._cast = dtype
        if self.module is not None:
            other.model = other.module = copy.deepcopy(self.module).to(dtype)
        else:
            other._params = {k: p.detach().to(dtype) for k, p in self.live_params().items()}
        found = ParamSpace.of(other.live_params())
        other.space = found.select(self.space.names)
        return other

    # --- parameters ----------------------------------------------------------------------------------------

    def live_params(self) -> dict[str, Tensor]:
        """All current parameters by name, selected or not, with their graph."""
        return dict(self.module.named_parameters()) if self.module is not None else dict(self._params or {})

    def resolve(self, params: ParamValues | None = None, differentiable: bool = False) -> dict[str, Tensor]:
        """The selected blocks by name, ready to be differentiated in.

        ``params`` may be a dict, a list in the order of ``space`` or a flat vector [P]; default: the model's own.
        With ``differentiable`` the graph behind them is kept, otherwise they become leaves of their own.
        """
        blocks = self.space.named(self.live_params() if params is None else params)
        return {
            k: p if differentiable and p.requires_grad else p.detach().requires_grad_()
            for k, p in blocks.items()
        }

    # --- parameters -> outputs -> loss ---------------------------------------------------------------------

    def outputs(self, params: Mapping[str, Tensor], inputs: Any) -> Any:
        """Model outputs at the given blocks; parameters that are not given are constants."""
        full = {k: p.detach() for k, p in self.live_params().items() if k not in params} | dict(params)
        if self.module is None:
            return self.model(full, inputs)
        if self.module.training:  # running statistics are written in place: let a copy take the writes
            full |= {k: b.clone() for k, b in self.module.named_buffers()}
        if isinstance(inputs, Mapping):
            result = functional_call(self.module, full, (), dict(inputs))
        else:
            result = functional_call(self.module, full, inputs if isinstance(inputs, tuple) else (inputs,))
        return result.logits if hasattr(result, "logits") else result

    def losses(self, outputs: Any, target: Any, size: int | None = None) -> Tensor:
        """Per-example losses [m] of outputs; ``size`` is the m they are checked against."""
        losses = self.loss(outputs, target)
        if not isinstance(losses, Tensor) or losses.ndim != 1 or (size is not None and len(losses) != size):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise InputError(
                f"loss returned {got}; it must return one loss for each example, shape ({size or 'm'},)."
            )
        return losses

    def batch_losses(self, params: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Per-example losses [m] of a batch at the given blocks, with their graph."""
        return self.losses(self.outputs(params, batch.inputs), batch.target, batch.size)

    def example_losses(self, params: ParamValues | None = None) -> Tensor:
        """Losses [n] of all examples in their order."""
        blocks = self.resolve(params)
        with torch.no_grad():
            return finite("losses", torch.cat([self.batch_losses(blocks, b) for b in self.batches()]))

    def jvp(self, vector: Tensor, batch: Batch, params: ParamValues | None = None) -> tuple[Tensor, Tensor]:
        """Outputs and J v, both shaped as the outputs, for a flat direction v [P]."""
        blocks, tangent = self._constants(params), self.space.unflatten(vector)
        with twice_differentiable():
            outputs, product = torch.func.jvp(lambda p: self.outputs(p, batch.inputs), (blocks,), (tangent,))[
                :2
            ]
        return outputs, product

    def vjp(
        self, batch: Batch, params: ParamValues | None = None
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Outputs and the map from a cotangent u, shaped as the outputs, to J^T u [P]; it may be called often."""
        outputs, pull = torch.func.vjp(lambda p: self.outputs(p, batch.inputs), self._constants(params))[:2]
        return outputs, lambda u: self.space.flatten(pull(u)[0])

    def loss_hessian(self, outputs: Tensor, target: Any, vector: Tensor) -> Tensor:
        """B u: the Hessian of the summed loss in the outputs times ``vector`` u, all shaped as the outputs.

        B has one block for each example, as the loss of an example depends on its own output alone.
        """

        def slope(z: Tensor) -> Tensor:
            gradient: Tensor = torch.func.grad(lambda y: self.losses(y, target).sum())(z)
            return (gradient * vector).sum()

        product: Tensor = torch.func.grad(slope)(outputs.detach())
        return product

    def _constants(self, params: ParamValues | None) -> dict[str, Tensor]:
        return {k: p.detach() for k, p in self.resolve(params).items()}


def hard_labels(target: Any) -> Tensor:
    """``target`` if it holds one class id for each example, long [m]; refused otherwise."""
    if not isinstance(target, Tensor) or target.ndim != 1 or target.is_floating_point():
        got = f"{target.dtype} of shape {tuple(target.shape)}" if isinstance(target, Tensor) else "no tensor"
        raise InputError(f"target is {got}; classes need one class id for each example, shape (m,).")
    return target.long()
