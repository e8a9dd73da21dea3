"""From a recorded call of a known layer to its parameters' per-example gradients or their norms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmatch.core._layerwise import BATCH_NORMS, INSTANCE_NORMS, Call, is_transposed_linear

_BUDGET = 2**24  # numbers held at once in unfolded inputs or products: 64 MiB in float32


def _factors(call: Call, rows: slice) -> tuple[Tensor, Tensor]:
    """A [m, g, K, L] and D [m, g, O, L]: inputs and output gradients over L positions, in g channel groups."""
    x, delta, module = call.x[rows], call.delta[rows], call.module
    if call.family == "linear":
        m = len(x)
        return x.reshape(m, -1, x.shape[-1]).mT[:, None], delta.reshape(m, -1, delta.shape[-1]).mT[:, None]
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    if any(module._reversed_padding_repeated_twice):
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    size, stride, dilation = module.kernel_size, module.stride, module.dilation
    if isinstance(module, nn.Conv1d):  # a picture of height 1
        x, size, stride, dilation = x[:, :, None], (1, *size), (1, *stride), (1, *dilation)
    pair = (size[0], size[1]), (stride[0], stride[1]), (dilation[0], dilation[1])
    columns = F.unfold(x, pair[0], dilation=pair[2], stride=pair[1])
    return columns.unflatten(1, (module.groups, -1)), delta.flatten(2).unflatten(1, (module.groups, -1))


def _entrywise(call: Call) -> tuple[Tensor, Tensor]:
    """Normalised input and output gradient of a normalisation layer, [m, parameters, positions] both."""
    x, delta, module = call.x, call.delta, call.module
    if isinstance(module, nn.LayerNorm):
        x = F.layer_norm(x, module.normalized_shape, eps=module.eps)
    elif isinstance(module, nn.RMSNorm):
        x = F.rms_norm(x, module.normalized_shape, eps=module.eps)
    elif isinstance(module, nn.GroupNorm):
        x = F.group_norm(x, module.num_groups, eps=module.eps)
    elif isinstance(module, INSTANCE_NORMS) and (call.stats is None or module.training):
        x = F.instance_norm(x, eps=module.eps)
    else:
        assert isinstance(module, (*INSTANCE_NORMS, *BATCH_NORMS))
        assert call.stats is not None
        x = F.batch_norm(x, *call.stats, training=False, eps=module.eps)
    m = len(x)
    if call.family == "channelwise":
        return x.reshape(m, x.shape[1], -1), delta.reshape(m, x.shape[1], -1)
    width = module.normalized_shape
    numel = int(torch.Size(width).numel())  # type: ignore[arg-type]
    return x.reshape(m, -1, numel).mT, delta.reshape(m, -1, numel).mT


def _token_sums(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """For an embedding, over the distinct (example, token) pairs: example, token and summed gradient [pairs, d]."""
    module = call.module
    assert isinstance(module, nn.Embedding)
    m, rows = len(call.x), module.num_embeddings
    tokens = call.x.reshape(m, -1).long()
    keys = (torch.arange(m, device=tokens.device)[:, None] * rows + tokens).reshape(-1)
    delta = call.delta.reshape(-1, module.embedding_dim)
    if module.padding_idx is not None:
        delta = delta * (tokens.reshape(-1, 1) != module.padding_idx)
    pairs, place = torch.unique(keys, return_inverse=True)
    sums = delta.new_zeros(len(pairs), delta.shape[1]).index_add_(0, place, delta)
    return pairs // rows, pairs % rows, sums


def _gram_is_cheaper(k: int, o: int, positions: int) -> bool:
    return positions == 1 or positions * (k + o) < k * o


def _steps(call: Call, formed: bool) -> list[slice]:
    """Runs of examples whose unfolded inputs and (if ``formed``) gradients fit the budget."""
    weight = call.module.weight
    assert isinstance(weight, Tensor)
    conv = isinstance(call.module, (nn.Conv1d, nn.Conv2d))
    groups = call.module.groups if isinstance(call.module, (nn.Conv1d, nn.Conv2d)) else 1
    o = call.delta.shape[1 if conv else -1]
    k, positions = weight.numel() // o, call.delta[0].numel() // o
    each = k * groups * positions + (positions**2 if _gram_is_cheaper(k, o // groups, positions) else 0)
    each = max(each, weight.numel()) if formed else each
    step = max(1, _BUDGET // max(1, each))
    return [slice(s, min(s + step, len(call.x))) for s in range(0, len(call.x), step)]


def _product_norms2(a: Tensor, d: Tensor) -> Tensor:
    """|D A^T|^2 for each example, [m], by whichever product is the smaller."""
    k, positions = a.shape[-2:]
    o = d.shape[-2]
    if positions == 1:
        return (a.square().sum((2, 3)) * d.square().sum((2, 3))).sum(1)
    if _gram_is_cheaper(k, o, positions):
        return ((a.mT @ a) * (d.mT @ d)).sum((1, 2, 3)).clamp(min=0)
    return (d @ a.mT).square().sum((1, 2, 3))


def norms2(call: Call) -> dict[str, Tensor]:
    """Squared norm [m] of each example's gradient, for each parameter of the call."""
    found: dict[str, Tensor] = {}
    m = len(call.x)
    if call.family == "embedding":
        example, _, sums = _token_sums(call)
        found["weight"] = sums.new_zeros(m).index_add_(0, example, sums.square().sum(1))
    elif call.family in ("linear", "conv"):
        if "weight" in call.names:
            found["weight"] = torch.cat(
                [_product_norms2(*_factors(call, rows)) for rows in _steps(call, formed=False)]
            )
        if "bias" in call.names:
            found["bias"] = _bias(call).square().sum(1)
    else:
        x, delta = _entrywise(call)
        found["weight"] = (x * delta).sum(2).square().sum(1)
        found["bias"] = delta.sum(2).square().sum(1)
    return {name: found[k] for k, name in call.names.items()}


def rows(call: Call) -> dict[str, Tensor]:
    """Each example's gradient [m, numel], for each parameter of the call."""
    found: dict[str, Tensor] = {}
    m = len(call.x)
    if call.family == "embedding":
        example, token, sums = _token_sums(call)
        shape = m, call.module.num_embeddings, sums.shape[1]
        found["weight"] = sums.new_zeros(shape).index_put_((example, token), sums)  # type: ignore[arg-type]
    elif call.family in ("linear", "conv"):
        if "weight" in call.names:
            swap = is_transposed_linear(call.module)  # its weight is (in, out)
            factors = (_factors(call, part) for part in _steps(call, formed=True))
            found["weight"] = torch.cat([a @ d.mT if swap else d @ a.mT for a, d in factors])
        if "bias" in call.names:
            found["bias"] = _bias(call)
    else:
        x, delta = _entrywise(call)
        found["weight"], found["bias"] = (x * delta).sum(2), delta.sum(2)
    return {name: found[k].reshape(m, -1) for k, name in call.names.items()}


def _bias(call: Call) -> Tensor:
    m = len(call.x)
    if call.family == "conv":
        return call.delta.flatten(2).sum(2)
    return call.delta.reshape(m, -1, call.delta.shape[-1]).sum(1)
