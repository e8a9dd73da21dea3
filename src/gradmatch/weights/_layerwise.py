"""Which layers of a network are compressed, on what data, and the learning of one after the other."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from gradmatch.core import checks
from gradmatch.core.assign import call
from gradmatch.core.tap import evaluating
from gradmatch.weights._coded import Coded, as_weight, is_compressible, matrix_of
from gradmatch.weights._fisher_data import First
from gradmatch.weights._mapping import Learned, Learner, Learning

AT_ONCE = 4096
"""Inputs of a layer at once when the error of all of them is taken."""


def calibration_batches(data: Any, examples: int, batch_size: int, model: nn.Module) -> list[Any]:
    """Batches of inputs on the model's device, checked; none of None."""
    if data is None:
        return []
    first = next(model.parameters(), None)
    place = None if first is None else first.device
    data = (data, torch.zeros(len(data))) if isinstance(data, Tensor) else data
    found = [
        tree_map(lambda t: t.to(place), inputs) for inputs, _ in First(data, examples, batch_size, False)
    ]
    for batch in found:
        for tensor in tree_leaves(batch):
            checks.finite("calibration", tensor)
    return found


def few(batch: Any) -> Any:
    """Two inputs of a batch, as positional or keyword arguments."""
    return tree_map(lambda t: t[:2], batch)


def chosen(
    model: nn.Module,
    data: list[Any],
    wanted: Callable[[str], bool] | None,
    keep_first_last: bool,
    groups: int,
) -> list[str]:
    """The layers to compress, in the order in which the network runs them; checked."""
    shared: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        shared[id(parameter)] = shared.get(id(parameter), 0) + 1
    parts = {n: m for n, m in model.named_modules() if is_compressible(m)}
    order = _run_order(model, list(parts), data[0]) if data else list(parts)
    order = order[1:-1] if keep_first_last else order
    order = [n for n in order if wanted is None or wanted(n)]
    names = [n for n in order if shared[id(parts[n].weight)] == 1]
    ends = " The first and the last are left out; keep_first_last=False takes these too." * keep_first_last
    checks.require(
        bool(names), f"model has no chosen Linear or convolution layer that is not tied to another.{ends}"
    )
    for name in names:
        weight = parts[name].weight
        assert isinstance(weight, Tensor)
        checks.require(
            weight.is_floating_point(), f"layer {name!r} has {weight.dtype} weights; they must be floating."
        )
        checks.finite(f"weight of layer {name!r}", weight)
        out = len(matrix_of(model, name))
        checks.require(groups <= out, f"groups is {groups}, but layer {name!r} has {out} output neurons.")
    return names


def _run_order(model: nn.Module, names: Sequence[str], batch: Any) -> list[str]:
    """Names in the order of a run; layers that it does not reach come last."""
    seen: dict[str, None] = {}
    parts = dict(model.named_modules())
    with ExitStack() as stack, evaluating(model):
        for name in names:
            hook = parts[name].register_forward_hook(lambda _, __, ___, name=name: seen.setdefault(name))
            stack.callback(hook.remove)
        call(model, few(batch))
    return [*seen, *(n for n in names if n not in seen)]


def pairs(float_net: nn.Module, net: nn.Module, name: str, data: list[Any]) -> tuple[Tensor, Tensor] | None:
    """The layer's inputs in the network compressed so far, and its outputs in the float one; None if never reached."""
    inputs, outputs = _seen(net, name, data, 0), _seen(float_net, name, data, 1)
    if not inputs:
        warnings.warn(
            f"the calibration data does not reach layer {name!r}; it keeps the k-means start.", stacklevel=3
        )
        return None
    linear = inputs[0].ndim != 4 and not isinstance(
        dict(net.named_modules())[name], nn.Conv1d | nn.Conv2d | nn.Conv3d
    )
    x, y = (torch.cat([t.flatten(0, -2) if linear else t for t in side]) for side in (inputs, outputs))
    checks.finite(f"outputs of layer {name!r}", y)
    return x, y


def _seen(network: nn.Module, name: str, data: list[Any], side: int) -> list[Tensor]:
    """Every input (side 0) or output of a layer in a run over the data."""
    found: list[Tensor] = []
    layer = dict(network.named_modules())[name]
    hook = layer.register_forward_hook(lambda _, args, out: found.append((args[0], out)[side]))
    try:
        for batch in data:
            call(network, batch)
    finally:
        hook.remove()
    return found


# --- learning one layer ------------------------------------------------------------------------------------


def by_output(
    net: nn.Module,
    name: str,
    matrix: Tensor,
    start: Coded,
    seen: tuple[Tensor, Tensor] | None,
    options: Learning,
    seed: int,
    tick: Callable[[], None],
) -> tuple[Learned, float]:
    """One layer learned from its k-means start, and the mean square that its error compares with.

    Args:
        net: the network compressed so far.
        matrix: the layer's weights (out, in).
        seen: inputs in ``net`` and outputs in the float network; without them the start is taken, and the error is that
            of the weights.
    """
    if seen is None:
        error = float((start.dense() - matrix).square().mean())
        return Learned(start, error, error), max(float(matrix.float().square().mean()), 1e-30)
    x, y = seen
    layer = net.get_submodule(name)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    batches = _batches(len(x), options.batch_size, seed)
    neurons = y.shape[1] if y.ndim > 2 else y.shape[-1]

    def output(matrix: Tensor, inputs: Tensor) -> Tensor:
        made = as_weight(layer, matrix, weight.shape).to(weight.dtype)
        found: Tensor = functional_call(layer, {"weight": made}, (inputs,))
        return found.float()

    def error_of(matrix: Tensor) -> float:
        parts = zip(torch.split(x, AT_ONCE), torch.split(y, AT_ONCE), strict=True)
        total = sum(float((output(matrix, a) - b).square().sum(dtype=torch.float64)) for a, b in parts)
        return total / y.numel()

    def slope(matrix: Tensor) -> Tensor:
        index = next(batches).to(x.device)
        with torch.enable_grad():
            matrix = matrix.requires_grad_()
            off = output(matrix, x[index]) - y[index]
            loss = off.square().sum() * (neurons / off.numel())  # summed over neurons, else a mean
            return torch.autograd.grad(loss, matrix)[0]

    found = Learner(start, matrix.float(), options).run(slope, error_of, tick)
    return found, max(float(y.float().square().mean()), 1e-30)


def _batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Places of batches, all of the data in a new order again and again."""
    g = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.split(torch.randperm(count, generator=g), min(size, count))
