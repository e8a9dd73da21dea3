"""Sums of squared per-example gradients of known layers, for several vectors pulled back through one forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from gradmatch.core import _reading
from gradmatch.core._layerwise import Call, Uses, is_transposed_linear

_BUDGET = 2**22  # numbers held at once in products or rows: 16 MiB in float32, near enough to the caches


def squares(uses: Uses, deltas: Mapping[int, Tensor]) -> Tensor:
    """Sum over examples and columns of the squared gradient, [numel] in at least single precision.

    ``deltas`` has for the id of each call what arrives at its output for every column, [R, m, ...].
    """
    call, local = uses[0]
    numel = call.module.get_parameter(local).numel()
    total = torch.zeros(numel, dtype=_wide(call.x, deltas[id(call)]), device=call.x.device)
    if len(uses) > 1 or (call.family in ("positionwise", "channelwise")):
        _add_row_squares(uses, deltas, total)
    elif call.family == "embedding":
        for delta in deltas[id(call)]:
            _, token, sums = _reading._token_sums(restricted(call, slice(None), delta))
            total.view(-1, sums.shape[1]).index_add_(0, token, sums.to(total.dtype).square())
    elif local == "bias":
        total += _positions(call, deltas[id(call)].to(total.dtype)).sum(3).square_().sum((0, 1))
    else:
        _add_weight_squares(call, deltas[id(call)], total)
    return total


def _wide(*tensors: Tensor) -> torch.dtype:
    """Single precision or what is wider: squares of small gradients vanish in half precision."""
    found = torch.float32
    for t in tensors:
        found = torch.promote_types(found, t.dtype) if t.is_floating_point() else found
    return found


def restricted(call: Call, part: slice, delta: Tensor, dtype: torch.dtype | None = None) -> Call:
    """Some examples of a call, with what arrives at its output there."""
    x = call.x[part]
    some = replace(call, x=x.to(dtype) if dtype is not None and x.is_floating_point() else x)
    some.delta = delta[part] if dtype is None else delta[part].to(dtype)
    return some


def _positions(call: Call, deltas: Tensor) -> Tensor:
    """[R, m, O, L] of what arrives at a linear or convolution layer."""
    if call.family == "conv":
        return deltas.flatten(3)
    return deltas.reshape(*deltas.shape[:2], -1, deltas.shape[-1]).mT


def _add_row_squares(uses: Uses, deltas: Mapping[int, Tensor], total: Tensor) -> None:
    columns, m = deltas[id(uses[0][0])].shape[:2]
    step = max(1, _BUDGET // len(total))
    for first in range(0, m, step):
        part = slice(first, min(first + step, m))
        out = torch.empty(part.stop - first, len(total), dtype=total.dtype, device=total.device)
        for r in range(columns):
            _reading.rows(
                [(restricted(c, part, deltas[id(c)][r], total.dtype), name) for c, name in uses], out
            )
            total += out.square_().sum(0)


def _add_weight_squares(call: Call, deltas: Tensor, total: Tensor) -> None:
    """For the weight of a linear or convolution layer; columns stand beside the outputs in one product."""
    columns, m = deltas.shape[:2]
    probe = restricted(call, slice(0, 1), deltas[0])
    groups, k, o, positions = _reading._sizes(probe)
    swapped = is_transposed_linear(call.module)
    target = total.view(groups, k, o).mT if swapped else total.view(groups, o, k)
    step = max(1, _BUDGET // (groups * max(k * positions, k * o * columns if positions > 1 else 0)))
    for first in range(0, m, step):
        part = slice(first, min(first + step, m))
        a = _reading._factors(restricted(call, part, deltas[0], total.dtype), slice(None))[0]
        d = deltas[:, part].to(total.dtype)
        d = _positions(call, d)
        d = d.unflatten(2, (groups, o)).permute(1, 2, 0, 3, 4)  # [m, g, R, O, L]
        if positions == 1:
            target += torch.einsum("mgo,mgk->gok", d.square().sum((2, 4)), a[..., 0].square())
        else:
            products = d.reshape(len(a), groups, columns * o, positions) @ a.mT
            target += products.square_().sum(0).unflatten(1, (columns, o)).sum(1)
