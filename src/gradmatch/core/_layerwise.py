"""Per-example gradients of known layers, read off one forward and one backward pass.

For a layer that multiplies, the gradient of example i is D_i A_i^T: A_i its inputs (columns: positions) and D_i the
gradients of its loss in the layer's outputs. So the pass that yields D for every layer at once holds all per-example
gradients, and their norms come without forming them: |D A^T|^2 = <A^T A, D^T D>, or for one position |A|^2 |D|^2.
For normalisation layers A is the normalised input and the product is taken entry by entry; for an embedding A is an
indicator of tokens.

That is right only if every use of a parameter is a call of its own layer. The autograd graph says how often a parameter
is used; one with other uses, or of an unknown or reshaping layer, is left to the caller. Several calls add up, also of
two layers that share a weight.
"""

from __future__ import annotations

from collections import Counter
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
    """One call of a known layer: its raw input, its output's place in the graph, and what arrives there."""

    module: nn.Module
    family: str
    x: Tensor
    edge: GradientEdge
    version: int
    broadcast: bool  # one row for all examples, as positions are embedded
    stats: tuple[Tensor, Tensor] | None
    delta: Tensor = field(init=False)


Uses = list[tuple[Call, str]]  # calls that use a parameter, each with the layer's own name for it


@dataclass
class Pass:
    """One forward and backward pass: losses, the uses of each parameter that can be read, and the other names."""

    losses: Tensor
    uses: dict[str, Uses]
    rest: list[str]


def run(problem: Problem, blocks: Mapping[str, Tensor], batch: Batch) -> Pass:
    """Run the batch at ``blocks``, leaves that require grad."""
    losses, uses, calls = record(problem, blocks, batch.size, lambda: problem.batch_losses(blocks, batch))
    grads = torch.autograd.grad(losses.sum(), [c.edge for c in calls], allow_unused=True) if calls else ()
    lost = set()
    for call, delta in zip(calls, grads, strict=True):
        if delta is None or not sound(call, delta, batch.size):
            lost.add(id(call))  # its output left the graph, or its input was written over
        else:
            call.delta = delta
            call.x = call.x.expand(batch.size, *call.x.shape[1:]) if call.broadcast else call.x
    kept = {k: u for k, u in uses.items() if not any(id(c) in lost for c, _ in u)}
    return Pass(losses.detach(), kept, [k for k in blocks if k not in kept])


def record(
    problem: Problem, blocks: Mapping[str, Tensor], m: int, forward: Callable[[], Tensor]
) -> tuple[Tensor, dict[str, Uses], list[Call]]:
    """A forward pass of m examples with its graph: the result, the uses of what can be read, and their calls."""
    seen: dict[str, list[tuple[Call | None, str]]] = {}
    with ExitStack() as stack, torch.enable_grad():
        for module, names in _owners(problem, blocks):
            handle = module.register_forward_hook(_recorder(seen, names, m), with_kwargs=True)
            stack.callback(handle.remove)
        result = forward()
    graph = _Graph(result)
    found = {name: _trusted(seen.get(name, []), graph, p) for name, p in blocks.items()}
    uses = {name: u for name, u in found.items() if u is not None}
    return result, uses, list({id(c): c for found in uses.values() for c, _ in found}.values())


def sound(call: Call, delta: Tensor, m: int) -> bool:
    """Whether what arrived at a call's output tells m examples apart, and its input is still what it was."""
    return len(delta) == m and call.x._version == call.version


def _owners(problem: Problem, blocks: Mapping[str, Tensor]) -> list[tuple[nn.Module, dict[str, str]]]:
    """Layers with parameters of their own among ``blocks``, and the blocks' names for those.

    A parameter that several layers share goes by the first one's name.
    """
    if problem.module is None:
        return []
    first = {id(p): name for name, p in problem.module.named_parameters()}
    found = []
    for module in problem.module.modules():
        names = {k: first[id(p)] for k, p in module.named_parameters(recurse=False)}
        names = {k: name for k, name in names.items() if name in blocks}
        if names:
            found.append((module, names))
    return found


def _recorder(
    seen: dict[str, list[tuple[Call | None, str]]], names: dict[str, str], m: int
) -> Callable[..., Any]:
    def record(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor | None:
        given = [*args, *kwargs.values()]
        readable = len(given) == 1 and isinstance(output, Tensor) and output.grad_fn is not None
        call = _call(module, given[0].detach(), output, m) if readable else None
        for local, name in names.items():
            seen.setdefault(name, []).append((call, local))
        # An in-place operation on a view rewrites its history, and the place noted above would be cut off.
        return output.clone() if call is not None and output._is_view() else None

    return record


def _call(module: nn.Module, x: Tensor, output: Tensor, m: int) -> Call | None:
    family = _family(module)
    if family is None:
        return None
    broadcast = family == "embedding" and m > 1 and x.shape[:1] == output.shape[:1] == (1,)
    if not (broadcast or _batched(module, family, x, output, m)):
        return None
    mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    stats = None if mean is None or var is None else (mean, var)
    return Call(module, family, x, get_gradient_edge(output), x._version, broadcast, stats)


class _Graph:
    """Who uses what in the graph behind some losses."""

    def __init__(self, losses: Tensor) -> None:
        self.leaves: Counter[int] = Counter()  # edges to each leaf tensor, by id
        self.consumers: dict[Any, list[Any]] = {}
        stack, visited = [losses.grad_fn], {losses.grad_fn}
        while stack:
            node = stack.pop()
            for following, _ in node.next_functions if node is not None else ():
                if following is None:
                    continue
                leaf = getattr(following, "variable", None)
                if leaf is not None:
                    self.leaves[id(leaf)] += 1
                self.consumers.setdefault(following, []).append(node)
                if following not in visited:
                    visited.add(following)
                    stack.append(following)


def _trusted(found: list[tuple[Call | None, str]], graph: _Graph, leaf: Tensor) -> Uses | None:
    """The calls that make up all uses of a parameter, none if it is not used, or None if they do not add up."""
    calls = [(call, local) for call, local in found if call is not None]
    count = graph.leaves[id(leaf)]
    if len(calls) < len(found) or count not in (0, len(calls)):
        return None
    if count == 0:
        return []
    for call, _ in calls:
        if call.broadcast:  # its own gradient is summed over examples; that of the sum it enters is not
            consumers = graph.consumers.get(call.edge.node, [])
            if (
                len(consumers) != 1
                or type(consumers[0]).__name__ != "AddBackward0"
                or consumers[0]._saved_alpha != 1
            ):
                return None
            call.edge = GradientEdge(consumers[0], 0)
    return calls
