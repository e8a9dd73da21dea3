"""Neurons grouped by the distribution of their weights, and put in order so that no group's members need be stored.

A neuron is described by 16 quantiles of w / max|w| and by max|w| over that of its tensor [reading: the paper speaks of
the weight distribution]. Where several layers write into one stream (a residual sum), their descriptions stand side
by side and the stream gets one order for all of them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.core._axes import Leaf
from gradmatch.core.assign import Permutation, PermutationSpec
from gradmatch.weights._coded import is_transposed, matrix_of

QUANTILES = 16
ROUNDS = 50


def description(matrix: Float[Tensor, "out in"]) -> Float[Tensor, "out 17"]:
    """Quantiles of each row in units of its largest entry, and that in units of the matrix's."""
    largest = matrix.abs().amax(1, keepdim=True)
    at = torch.linspace(0, matrix.shape[1] - 1, QUANTILES, device=matrix.device).round().long()
    shape = (matrix / largest.clamp_min(1e-30)).sort(1).values[:, at]
    return torch.cat([shape, largest / largest.max().clamp_min(1e-30)], 1)


def clusters(rows: Float[Tensor, "n d"], count: int, seed: int) -> Int[Tensor, " n"]:
    """A cluster for each row by k-means from k-means++ seeds; none is empty, the first is the one of least mean."""
    g = torch.Generator(rows.device).manual_seed(seed)
    centres = rows[torch.randint(len(rows), (1,), generator=g, device=rows.device)]
    while len(centres) < count:
        away = torch.cdist(rows, centres).amin(1).square()
        away = away if bool(away.sum() > 0) else torch.ones_like(away)
        centres = torch.cat([centres, rows[torch.multinomial(away, 1, generator=g)]])
    found = torch.full((len(rows),), -1, device=rows.device)
    for _ in range(ROUNDS):
        apart = torch.cdist(rows, centres)
        nearest = _none_empty(apart, apart.argmin(1))
        if torch.equal(nearest, found):
            break
        found = nearest
        sums = torch.zeros_like(centres).index_add_(0, found, rows)
        centres = sums / torch.bincount(found, minlength=count)[:, None]
    return centres.mean(1).argsort(stable=True).argsort()[found]


def _none_empty(apart: Tensor, nearest: Tensor) -> Tensor:
    """The row that fits its cluster worst goes to an empty one, where there are such."""
    sizes = torch.bincount(nearest, minlength=apart.shape[1])
    for empty in torch.nonzero(sizes == 0).flatten().tolist():
        own = apart.gather(1, nearest[:, None])[:, 0].masked_fill(sizes[nearest] < 2, -1)
        worst = int(own.argmax())
        sizes[nearest[worst]] -= 1
        nearest[worst], sizes[empty] = empty, 1
    return nearest


def grouped(
    network: nn.Module, layers: Sequence[str], groups: int, example: Any, seed: int
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy of the network with its neurons in order of their groups, and the groups' ends of each layer (G,).

    Layers whose output order is fixed, and all layers of a network whose axes cannot be read off a run, keep their
    order and get one group; a warning names them.
    """
    parts = dict(network.named_modules())
    matrices = {n: matrix_of(network, n) for n in layers}
    ends = {n: torch.tensor([len(m)], dtype=torch.int32) for n, m in matrices.items()}
    try:
        spec = PermutationSpec.from_module(network, example)
    except (checks.InputError, RuntimeError) as error:
        warnings.warn(f"the order of neurons is kept, in one group a layer: {error}", stacklevel=4)
        return copy.deepcopy(network), ends
    streams: dict[str, list[str]] = {}
    for name in layers:
        axis = spec.axes[f"{name}.weight"][1 if is_transposed(parts[name]) else 0]
        if isinstance(axis, Leaf) and axis.name is not None:
            streams.setdefault(axis.name, []).append(name)
    order = {}
    for stream, writers in streams.items():
        found = clusters(
            torch.cat([description(matrices[n].float()) for n in writers], 1), groups, seed
        ).cpu()
        order[stream] = found.argsort(stable=True)
        for name in writers:
            ends[name] = torch.bincount(found, minlength=groups).cumsum(0).int()
    fixed = [n for n in layers if len(ends[n]) < groups]
    if fixed:
        warnings.warn(
            f"{checks.listing(fixed)}: the order of outputs is fixed there, so these have one group.",
            stacklevel=4,
        )
    return permuted(network, Permutation(spec, order)), ends


def permuted(network: nn.Module, permutation: Permutation) -> nn.Module:
    """A copy of the network with its units in another order."""
    made = copy.deepcopy(network)
    made.load_state_dict(permutation.apply(network))
    return made


def even_ends(rows: int, groups: int) -> Int[Tensor, " G"]:
    """Ends of stretches of nearly equal length."""
    return torch.tensor([(k + 1) * rows // groups for k in range(groups)], dtype=torch.int32)
