"""Products with second derivatives of one batch, from graphs that are built once and read many times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradmatch.core._batches import Batch
from gradmatch.core.checks import InputError, require
from gradmatch.core.problem import Problem, twice_differentiable

Metric = Callable[[Tensor], Tensor]
"""U [b, m, ...] -> M U for a symmetric M with one block an example, in the space of the outputs."""
Product = Callable[[Sequence[Tensor]], list[Tensor]]
"""Blocks [b, *shape] of b vectors -> blocks of their products."""


class Pull:
    """(d outputs / d inputs)^T on several vectors at once, from a graph that is kept.

    ``batched`` turns False for good where an operation has no batched backward; vectors then go one by one.
    """

    def __init__(self) -> None:
        self.batched = True

    def __call__(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]
    ) -> list[Tensor]:
        """For each k, sum_i of (d outputs_i / d inputs)^T vectors_i[k], as blocks [b, *shape] of the inputs."""
        width = len(vectors[0])
        used = [(o, v) for o, v in zip(outputs, vectors, strict=True) if o.requires_grad]
        if not used:
            return [torch.zeros((width, *x.shape), dtype=x.dtype, device=x.device) for x in inputs]
        tops, slopes = zip(*used, strict=True)
        if width > 1 and self.batched:
            try:
                with _SharedFactor():
                    return _grad(tops, inputs, slopes, width)
            except RuntimeError:  # the formulas of some derivatives cannot be batched; single vectors decide
                found = self._each(tops, inputs, slopes)
                self.batched = False
                return found
        return self._each(tops, inputs, slopes)

    @staticmethod
    def _each(tops: Sequence[Tensor], inputs: Sequence[Tensor], slopes: Sequence[Tensor]) -> list[Tensor]:
        rows = [_grad(tops, inputs, [v[k] for v in slopes], None) for k in range(len(slopes[0]))]
        return [torch.stack(column) for column in zip(*rows, strict=True)]


class _SharedFactor(TorchDispatchMode):
    """Batched products in which all share one factor, such as the data, become one product of two matrices.

    The results are laid out so that the next such product can take them as they are.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bmm.default:
            a, b = args
            if b.stride(0) == 0 != a.stride(0):
                return (a.reshape(-1, a.shape[2]) @ b[0]).view(*a.shape[:2], -1)
            if a.stride(0) == 0 != b.stride(0):
                side_by_side = b.mT.reshape(-1, b.shape[1]).T
                return (a[0] @ side_by_side).view(a.shape[1], len(b), -1).transpose(0, 1)
        return func(*args, **(kwargs or {}))


def _grad(
    tops: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor], width: int | None
) -> list[Tensor]:
    def pulled(slopes: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(tops, inputs, slopes, retain_graph=True, allow_unused=True)
        return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True))

    if width is None:
        return list(pulled(tuple(vectors)))
    # torch.func's rules know more operations than those behind is_grads_batched, which loops over the others
    return list(torch.func.vmap(pulled)(tuple(vectors)))


def slopes_of(value: Tensor, leaves: Sequence[Tensor], vector: Tensor | None = None) -> list[Tensor]:
    """Gradients of ``value`` in the leaves, with their graph."""
    if not value.requires_grad:
        return [torch.zeros_like(p) for p in leaves]
    grads = torch.autograd.grad(
        value, leaves, vector, create_graph=True, allow_unused=True, materialize_grads=True
    )
    refuse_ends(grads)
    return list(grads)


def refuse_ends(grads: Sequence[Tensor]) -> None:
    """Raise if a graph has a place that must not be differentiated again.

    Such a place (of ``once_differentiable``) is joined to no parameter, so autograd would pass it by without a word.
    """
    todo, seen = [g.grad_fn for g in grads], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("it has a function that is differentiable only once")
        todo += [following for following, _ in node.next_functions]


def hessian_product(problem: Problem, leaves: Mapping[str, Tensor], batch: Batch, pull: Pull) -> Product:
    """V -> H V, H the Hessian of the batch's summed loss."""
    with torch.enable_grad(), twice_differentiable():
        slopes = slopes_of(problem.batch_losses(leaves, batch).sum(), list(leaves.values()))
    return lambda vectors: pull(slopes, list(leaves.values()), vectors)


def residual_product(problem: Problem, leaves: Mapping[str, Tensor], batch: Batch, pull: Pull) -> Product:
    """V -> R V, R the Hessian of sum_c (dl / df_c) f_c with the loss's slope held: H without J^T B J."""
    with torch.enable_grad(), twice_differentiable():
        outputs = _outputs(problem, leaves, batch)
        z = outputs.detach().requires_grad_()
        slope = slopes_of(problem.losses(z, batch.target, batch.size).sum(), [z])[0].detach()
        slopes = slopes_of((outputs * slope).sum(), list(leaves.values()))
    return lambda vectors: pull(slopes, list(leaves.values()), vectors)


def metric_product(
    problem: Problem,
    leaves: Mapping[str, Tensor],
    batch: Batch,
    pull: Pull,
    metric: Callable[[Tensor, Batch], Metric],
) -> Product:
    """V -> J^T M J V for the metric M that ``metric`` makes of the outputs.

    J V is read off the graph of u -> J^T u, which is linear in u: its own transpose.
    """
    blocks = list(leaves.values())
    with torch.enable_grad(), twice_differentiable():
        outputs = _outputs(problem, leaves, batch)
        u = torch.zeros_like(outputs, requires_grad=True)
        back = slopes_of(outputs, blocks, u)
        multiply = metric(outputs.detach(), batch)

    def product(vectors: Sequence[Tensor]) -> list[Tensor]:
        moved = pull(back, [u], vectors)[0]
        return pull([outputs], blocks, [multiply(moved)])

    return product


def _outputs(problem: Problem, leaves: Mapping[str, Tensor], batch: Batch) -> Tensor:
    outputs = problem.outputs(leaves, batch.inputs)
    require(
        isinstance(outputs, Tensor),
        f"model gives {type(outputs).__name__}; this curvature needs outputs that are one tensor.",
    )
    return outputs


# --- naming the module that cannot be differentiated twice --------------------------------------------------


def refuse_once_differentiable(problem: Problem, error: RuntimeError) -> None:
    """Raise a sentence that names the first module without a double backward, if there is one."""
    if problem.module is None:
        return
    seen: list[tuple[str, nn.Module, Any]] = []
    leaves = [(n, m) for n, m in problem.module.named_modules() if not list(m.children())]
    hooks = [
        m.register_forward_hook(lambda m, inputs, _, n=n: seen.append((n, m, inputs))) for n, m in leaves
    ]
    try:
        with torch.no_grad():
            problem.outputs(problem.resolve(), next(problem.batches()).inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for name, module, inputs in seen:
        if not differentiable_twice(module, inputs):
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise InputError(
                f"model has {name!r} ({type(module).__name__}), which cannot be differentiated twice: {reason}."
            ) from error


def differentiable_twice(module: nn.Module, inputs: Any) -> bool:
    """Whether a module has second derivatives at these positional inputs."""
    at = [t.detach().requires_grad_() if t.is_floating_point() else t for t in tree_leaves(inputs)]
    try:
        with torch.enable_grad(), twice_differentiable():
            value = sum(
                o.square().sum()
                for o in tree_leaves(module(*at))
                if isinstance(o, Tensor) and o.requires_grad
            )
            wrt = [t for t in (*at, *module.parameters()) if t.requires_grad]
            if not isinstance(value, Tensor) or not wrt:
                return True
            slopes = slopes_of(value, wrt)
            Pull()(slopes, wrt, [torch.ones_like(s)[None] for s in slopes])
    except RuntimeError:
        return False
    return True
