"""Activation statistics of an averaged network set right again: batch-norm's re-estimated, others by REPAIR."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradmatch.core import checks
from gradmatch.core._axes import leaves
from gradmatch.core._batches import OrderedData
from gradmatch.core.assign import PermutationSpec, Weights, call

__all__ = ["repair", "reset_statistics"]

State = Mapping[str, Tensor]


def tracking(module: nn.Module) -> list[_BatchNorm]:
    """The batch-norm layers that keep running statistics."""
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def reset_statistics(
    model: nn.Module, state: State, data: Any, *, batch_size: int = 512
) -> dict[str, Tensor]:
    """``state`` with batch-norm's running statistics measured anew: the mean over the batches of one pass.

    Averaged weights see other activations than either end; statistics that are averaged too leave the barrier where
    it was.

    Args:
        model: the network of the state dict; not changed.
        data: training inputs, with or without labels.

    Raises:
        InputError: a network without running statistics, or data that do not fit.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    >>> data = torch.randn(50, 2), torch.zeros(50)
    >>> float(reset_statistics(net, net.state_dict(), data)["1.running_var"].max()) < 1
    True
    """
    clone = copy.deepcopy(model)
    clone.load_state_dict(dict(state))
    layers = tracking(clone.eval())
    checks.require(
        bool(layers), "model has no batch-norm with running statistics; there is nothing to reset."
    )
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean over batches
        layer.train()
    with torch.no_grad():
        for batch in OrderedData(data, batch_size, check_order=False):
            call(clone, batch.inputs)
    return {k: t.detach() for k, t in clone.state_dict().items()}


def repair(
    spec: PermutationSpec,
    model: nn.Module,
    ends: Sequence[Weights],
    merged: State,
    data: Any,
    *,
    batch_size: int = 512,
) -> dict[str, Tensor]:
    """REPAIR (Jordan, Sedghi, Saukh, Entezari, Neyshabur; ICLR 2023, arXiv 2211.08403) for networks without batch-norm.

    The units of an averaged network vary less than those of its ends. Each hidden unit of a linear or convolution
    layer gets the mean of the ends' means and the mean of their standard deviations, by a scale and a shift that are
    folded into its weight and bias; layers are corrected in one pass, each seeing the corrected ones before it.

    Args:
        spec: says which layers are hidden: those whose units are in a group.
        model: the network of the state dicts; not changed.
        ends: the aligned networks.
        merged: their average.
        data: training inputs.

    Raises:
        InputError: a network with batch-norm (use :func:`reset_statistics`), or hidden layers without bias.
    """
    checks.require(
        not tracking(model),
        "model has batch-norm; its statistics are re-estimated by reset_statistics instead.",
    )
    clone = copy.deepcopy(model).eval()
    hidden = {
        name: part
        for name, part in clone.named_modules()
        if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and any(leaf.name for _, leaf in leaves(spec.axes[f"{name}.weight"][0]))
    }
    bare = [name for name, part in hidden.items() if part.bias is None]
    checks.require(not bare, f"model has no bias in {checks.listing(bare)}; the shift of repair needs one.")
    inputs = [b.inputs for b in OrderedData(data, batch_size, check_order=False)]
    measured = []
    for end in ends:
        clone.load_state_dict(spec.check(end, "ends"))
        with _watched(hidden, None) as moments:
            _pass(clone, inputs)
        measured.append({k: m.mean_and_deviation() for k, m in moments.items()})
    goals = {k: tuple(torch.stack([m[k][i] for m in measured]).mean(0) for i in range(2)) for k in hidden}
    clone.load_state_dict(dict(merged))
    with _watched(hidden, goals) as moments:
        _pass(clone, inputs)
    with torch.no_grad():
        for k, part in hidden.items():
            mean, deviation = moments[k].mean_and_deviation()
            scale = goals[k][1] / deviation.clamp_min(1e-12)
            part.weight.mul_(scale.to(part.weight).reshape(-1, *[1] * (part.weight.ndim - 1)))
            assert part.bias is not None
            part.bias.copy_(((part.bias - mean) * scale + goals[k][0]).to(part.bias))
    return {k: t.detach() for k, t in clone.state_dict().items()}


@torch.no_grad()
def _pass(module: nn.Module, inputs: Sequence[Any]) -> None:
    for batch in inputs:
        call(module, batch)


class _Running:
    """Sums, of batches, of each unit's outputs and their squares (float64)."""

    def __init__(self) -> None:
        self.count, self.total, self.square = 0, torch.zeros(()).double(), torch.zeros(()).double()

    def add(self, units: Tensor) -> None:
        self.count += units.shape[1]
        self.total = self.total + units.double().sum(1)
        self.square = self.square + units.double().square().sum(1)

    def mean_and_deviation(self) -> tuple[Tensor, Tensor]:
        mean = self.total / self.count
        return mean, (self.square / self.count - mean.square()).clamp_min(0).sqrt()


@contextmanager
def _watched(
    hidden: Mapping[str, nn.Module], goals: Mapping[str, tuple[Tensor, ...]] | None
) -> Iterator[dict[str, _Running]]:
    """Within the block the layers' outputs are measured and, with goals, passed on with these mean and deviation."""
    found = {name: _Running() for name in hidden}

    def look(name: str, part: nn.Module, out: Tensor) -> Tensor | None:
        axis = out.ndim - 1 if isinstance(part, nn.Linear) else 1
        units = out.movedim(axis, 0).flatten(1)
        found[name].add(units)
        if goals is None:
            return None
        mean, deviation = units.mean(1), units.std(1, correction=0).clamp_min(1e-12)
        shape = [-1 if d == axis else 1 for d in range(out.ndim)]
        goal = [g.to(out).reshape(shape) for g in goals[name]]
        return (out - mean.reshape(shape)) / deviation.reshape(shape) * goal[1] + goal[0]

    handles = [
        part.register_forward_hook(lambda part, _, out, name=name: look(name, part, out))
        for name, part in hidden.items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
