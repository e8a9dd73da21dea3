"""Per-example gradients of known layers, read off one forward and one backward pass.

For a layer that multiplies, the gradient of example i is D_i A_i^T: A_i its inputs (columns: positions) and D_i the
gradients of its loss in the layer's outputs. So the pass that yields D for every layer at once holds all per-example
gradients, and their norms come without forming them: |D A^T|^2 = <A^T A, D^T D>, or for one position |A|^2 |D|^2.
For normalisation layers A is the normalised input and the product is taken entry by entry; for an embedding A is an
indicator of tokens.

That is right only if a parameter is used exactly once, by its own layer's call. The autograd graph says how often it is
used, and whatever is used otherwise (tied, shared, reshaped, called twice, unknown layer) is left to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gradmatch.core._batches import Batch
from gradmatch.core.problem import Problem

INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether it is the linear layer of transformers' GPT-2, whose weight is (in, out)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _family(module: nn.Module) -> str | None:
    """How the layer's gradient is read, or None; exact types only, as a subclass may compute anything."""
    kind = type(module)
    if kind is nn.Linear or is_transposed_linear(module):
        return "linear"
    if kind in (nn.Conv1d, nn.Conv2d):
        return "conv"
    if kind is nn.Embedding:
        plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        return "embedding" if plain else None
    if kind in (nn.LayerNorm, nn.RMSNorm):
        return "positionwise"
    if kind is nn.GroupNorm or kind in INSTANCE_NORMS:
        return "channelwise"
    if kind in BATCH_NORMS and module.track_running_stats and not module.training:
        return "channelwise"
    return None


def _batched(module: nn.Module, family: str, x: Tensor, y: Tensor, m: int) -> bool:
    """Whether the first dimension of input and output is the example."""
    if x.shape[:1] != (m,) or y.shape[:1] != (m,):
        return False
    if family == "conv":
        return x.ndim == (3 if type(module) is nn.Conv1d else 4)
    if family == "positionwise":
        return x.ndim > len(module.normalized_shape)  # type: ignore[arg-type]
    if type(module) in INSTANCE_NORMS:
        return x.ndim == {1: 3, 2: 4, 3: 5}[INSTANCE_NORMS.index(type(module)) + 1]
    return True


@dataclass
class Call:
    """One call of a known layer: its raw input, its output's place in the graph, and what was learnt there later."""

    module: nn.Module
    family: str
    names: dict[str, str]  # the layer's own name of a parameter ("weight", "bias") -> the parameter's name
    x: Tensor
    edge: GradientEdge
    version: int
    stats: tuple[Tensor, Tensor] | None
    delta: Tensor = field(init=False)


@dataclass
class Pass:
    """One forward and backward pass: losses, the calls that can be trusted, and the names of the other parameters."""

    losses: Tensor
    calls: list[Call]
    rest: list[str]
    gradient: dict[str, Tensor] | None


def run(problem: Problem, blocks: Mapping[str, Tensor], batch: Batch, with_gradient: bool = False) -> Pass:
    """Run the batch at ``blocks`` (leaves that require grad); ``with_gradient`` adds the summed gradient."""
    seen: dict[str, list[Call | None]] = {}
    with ExitStack() as stack, torch.enable_grad():
        for module, names in _owners(problem, blocks):
            handle = module.register_forward_hook(_recorder(seen, names, batch.size), with_kwargs=True)
            stack.callback(handle.remove)
        losses = problem.batch_losses(blocks, batch)
    uses = _uses(losses, blocks)
    calls, rest = _trusted(seen, uses)
    wanted: list[Any] = [call.edge for call in calls] + (list(blocks.values()) if with_gradient else [])
    grads = torch.autograd.grad(losses.sum(), wanted, allow_unused=True) if wanted else ()
    kept = []
    for call, delta in zip(calls, grads, strict=False):
        if delta is None or call.x._version != call.version:
            rest += list(call.names.values())  # its output left the graph, or its input was written over
        else:
            call.delta = delta
            kept.append(call)
    gradient = None
    if with_gradient:
        found = zip(blocks.items(), grads[len(grads) - len(blocks) :], strict=True)
        gradient = {name: torch.zeros_like(p) if g is None else g for (name, p), g in found}
    return Pass(losses.detach(), kept, rest, gradient)


def _owners(problem: Problem, blocks: Mapping[str, Tensor]) -> list[tuple[nn.Module, dict[str, str]]]:
    """Layers with parameters of their own among ``blocks``, with the names of those."""
    if problem.module is None:
        return []
    found = []
    for prefix, module in problem.module.named_modules():
        local = [name for name, _ in module.named_parameters(recurse=False)]
        names = {k: f"{prefix}.{k}" if prefix else k for k in local}
        names = {k: name for k, name in names.items() if name in blocks}
        if names:
            found.append((module, names))
    return found


def _recorder(seen: dict[str, list[Call | None]], names: dict[str, str], m: int) -> Callable[..., Any]:
    def record(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor | None:
        family = _family(module)
        call = None
        given = [*args, *kwargs.values()]
        if (
            family is not None
            and len(given) == 1
            and isinstance(output, Tensor)
            and output.grad_fn is not None
            and _batched(module, family, given[0], output, m)
        ):
            x = given[0].detach()
            mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
            stats = None if mean is None or var is None else (mean, var)
            call = Call(module, family, names, x, get_gradient_edge(output), x._version, stats)
        for name in names.values():
            seen.setdefault(name, []).append(call)
        # An in-place operation on a view rewrites its history, and the place noted above would be cut off.
        return output.clone() if call is not None and output._is_view() else None

    return record


def _uses(losses: Tensor, blocks: Mapping[str, Tensor]) -> dict[str, int]:
    """How many edges of the losses' graph lead to each block."""
    names = {id(p): name for name, p in blocks.items()}
    count = dict.fromkeys(blocks, 0)
    stack, visited = [losses.grad_fn], {losses.grad_fn}
    while stack:
        node = stack.pop()
        for following, _ in node.next_functions if node is not None else ():
            leaf = getattr(following, "variable", None)
            if leaf is not None and id(leaf) in names:
                count[names[id(leaf)]] += 1
            if following is not None and following not in visited:
                visited.add(following)
                stack.append(following)
    return count


def _trusted(seen: Mapping[str, list[Call | None]], uses: Mapping[str, int]) -> tuple[list[Call], list[str]]:
    """Calls whose parameters the graph shows to be used there and nowhere else, and the parameters left over."""
    calls: dict[int, Call] = {}
    rest = []
    for name, count in uses.items():
        records = seen.get(name, [])
        if count == 0 and not (records and None in records):
            continue  # not used at all: its gradient is zero
        if count == 1 and len(records) == 1 and records[0] is not None:
            calls[id(records[0])] = records[0]
        else:
            rest.append(name)
    left = set(rest)
    for call in calls.values():
        call.names = {k: name for k, name in call.names.items() if name not in left}
    return list(calls.values()), rest
