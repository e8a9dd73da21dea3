"""From the recorded calls of known layers to a parameter's per-example gradients, or only their norms."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from gradmatch.core._layerwise import BATCH_NORMS, INSTANCE_NORMS, Call, Uses, is_transposed_linear

_BUDGET = 2**24  # numbers held at once in unfolded inputs or products: 64 MiB in float32


def rows(uses: Uses, out: Tensor) -> None:
    """Write each example's gradient [m, numel] of the parameter that ``uses`` (at least one) describes."""
    _write_rows(*uses[0], out)
    for call, local in uses[1:]:
        more = torch.empty_like(out)
        _write_rows(call, local, more)
        out += more


def taken(uses: Uses, part: slice) -> Uses:
    """The same uses for some of the examples only."""
    made: dict[int, Call] = {}
    for call, _ in uses:
        if id(call) not in made:
            own = made[id(call)] = copy.copy(call)
            own.x, own.delta = call.x[part], call.delta[part]
    return [(made[id(call)], local) for call, local in uses]


def square_norms(rows: Tensor) -> Tensor:
    """Squared norm [m] of every row, without a second array of squares."""
    return torch.linalg.vector_norm(rows, dim=1).square()


def norms2(uses: Uses) -> Tensor:
    """Squared norm [m] of each example's gradient of the parameter that ``uses`` (at least one) describes."""
    calls = sorted((call for call, local in uses if local == "weight"), key=lambda call: call.family)
    families = [call.family for call in calls]
    if len(uses) == 1 and families in (["linear"], ["conv"], ["embedding"]):
        return _weight_norms2(calls[0])
    if families == ["embedding", "linear"] and not is_transposed_linear(calls[1].module):
        parts = _weight_norms2(calls[0]) + _weight_norms2(calls[1]) + 2 * _tied_product(*calls)
        return parts.clamp(min=0)
    call, local = uses[0]
    total = call.delta.new_empty(len(call.x), call.module.get_parameter(local).numel())
    rows(uses, total)
    return square_norms(total)


def norms2_and_sum(uses: Uses) -> tuple[Tensor, Tensor]:
    """The same norms [m], and the gradient summed over the examples [numel]."""
    (call, local), numel = uses[0], uses[0][0].module.get_parameter(uses[0][1]).numel()
    if len(uses) > 1 or local != "weight" or call.family not in ("linear", "conv", "embedding"):
        if sorted(c.family for c, name in uses if name == "weight") == ["embedding", "linear"]:
            return norms2(uses), sum((_weight_sum(c) for c, _ in uses), start=call.delta.new_zeros(numel))
        formed = call.delta.new_empty(len(call.x), numel)
        rows(uses, formed)
        return square_norms(formed), formed.sum(0)
    if call.family == "embedding" or _gram_is_cheaper(call):
        return _weight_norms2(call), _weight_sum(call)
    squares, total = [], call.delta.new_zeros(numel)
    for part in _steps(call, formed=True):  # the rows are at hand, and adding them up is the cheapest
        formed = _weight_rows(call, part)
        squares.append(square_norms(formed))
        total += formed.sum(0)
    return torch.cat(squares), total


def _weight_sum(call: Call) -> Tensor:
    """The gradient [numel] of the examples' summed loss for the weight of an embedding, linear or convolution layer."""
    weight = call.module.weight
    assert isinstance(weight, Tensor)
    if call.family == "embedding":
        _, token, sums = _token_sums(call)
        return sums.new_zeros(weight.shape).index_add_(0, token, sums).flatten()
    if call.family == "linear":
        a, d = (_sequence(t).flatten(0, 1) for t in (call.x, call.delta))
        return (a.T @ d if is_transposed_linear(call.module) else d.T @ a).flatten()
    x, delta, size, stride, dilation, padding = _picture(call, slice(None))
    shape = (*weight.shape[:2], *size)
    groups = _sizes(call)[0]
    return conv2d_weight(
        x, shape, delta, stride=stride, padding=padding, dilation=dilation, groups=groups
    ).flatten()


def _write_rows(call: Call, local: str, out: Tensor) -> None:
    if call.family == "embedding":
        example, token, sums = _token_sums(call)
        out.zero_().unflatten(1, (-1, sums.shape[1])).index_put_((example, token), sums.to(out.dtype))
    elif call.family in ("linear", "conv") and local == "weight":
        _write_weight_rows(call, out)
    elif call.family in ("linear", "conv"):
        delta = call.delta.flatten(2) if call.family == "conv" else _sequence(call.delta).mT
        out.copy_(delta.sum(2))
    else:
        x, delta = _entrywise(call, call.x if local == "bias" else _normalised(call))
        out.copy_(delta.sum(2) if local == "bias" else (x * delta).sum(2))


def _write_weight_rows(call: Call, out: Tensor) -> None:
    if call.family == "linear" and _sizes(call)[3] == 1:  # written in place: fresh memory would cost the most
        a, d = _sequence(call.x)[:, 0], _sequence(call.delta)[:, 0]
        a, d = (d, a) if is_transposed_linear(call.module) else (a, d)
        torch.mul(d[:, :, None], a[:, None], out=out.unflatten(1, (d.shape[1], a.shape[1])))
        return
    for part in _steps(call, formed=True):
        out[part] = _weight_rows(call, part)


# --- layers that multiply ----------------------------------------------------------------------------------


def _sequence(t: Tensor) -> Tensor:
    """[m, positions, features] of [m, ..., features]."""
    return t.reshape(len(t), -1, t.shape[-1])


def _sizes(call: Call) -> tuple[int, int, int, int]:
    """Channel groups g, fan-in K and outputs O of a group, and positions L."""
    weight = call.module.weight
    assert isinstance(weight, Tensor)
    conv = isinstance(call.module, (nn.Conv1d, nn.Conv2d))
    groups = call.module.groups if isinstance(call.module, (nn.Conv1d, nn.Conv2d)) else 1
    outputs = call.delta.shape[1 if conv else -1]
    return groups, weight.numel() // outputs, outputs // groups, call.delta[0].numel() // outputs


def _gram_is_cheaper(call: Call) -> bool:
    _, k, o, positions = _sizes(call)
    return positions == 1 or positions * (k + o) < k * o


def _steps(call: Call, formed: bool) -> list[slice]:
    """Runs of examples whose unfolded inputs, and gradients if ``formed`` or Gram matrices if not, fit the budget."""
    groups, k, o, positions = _sizes(call)
    each = groups * max(k * positions, k * o if formed else positions**2)
    step = max(1, _BUDGET // each)
    return [slice(s, min(s + step, len(call.x))) for s in range(0, len(call.x), step)]


def _weight_norms2(call: Call) -> Tensor:
    """Squared norms [m] for the weight of one embedding, linear or convolution layer, by the smaller product."""
    if call.family == "embedding":
        example, _, sums = _token_sums(call)
        return sums.new_zeros(len(call.x)).index_add_(0, example, sums.square().sum(1))
    if not _gram_is_cheaper(call):
        return torch.cat([square_norms(_weight_rows(call, part)) for part in _steps(call, formed=True)])
    return torch.cat([_gram_norms2(*_factors(call, part)) for part in _steps(call, formed=False)])


def _gram_norms2(a: Tensor, d: Tensor) -> Tensor:
    """|D A^T|^2 = <A^T A, D^T D>, [m], of A [m, g, K, L] and D [m, g, O, L]."""
    if a.shape[3] == 1:
        return (a.square().sum((2, 3)) * d.square().sum((2, 3))).sum(1)
    return ((a.mT @ a) * (d.mT @ d)).sum((1, 2, 3)).clamp(min=0)


def _weight_rows(call: Call, part: slice) -> Tensor:
    """Gradients [m, numel] of some examples for the weight of a linear or convolution layer."""
    if call.family == "conv" and call.x.device.type == "cpu":
        return _grouped_weight_rows(call, part)
    a, d = _factors(call, part)
    return (a @ d.mT if is_transposed_linear(call.module) else d @ a.mT).flatten(1)


def _factors(call: Call, part: slice) -> tuple[Tensor, Tensor]:
    """A [m, g, K, L] and D [m, g, O, L]: inputs and output gradients over L positions, in g channel groups."""
    if call.family == "linear":
        return _sequence(call.x[part]).mT[:, None], _sequence(call.delta[part]).mT[:, None]
    x, delta, size, stride, dilation, padding = _picture(call, part)
    groups = _sizes(call)[0]
    columns = F.unfold(x, size, dilation=dilation, padding=padding, stride=stride)
    return columns.unflatten(1, (groups, -1)), delta.flatten(2).unflatten(1, (groups, -1))


def _grouped_weight_rows(call: Call, part: slice) -> Tensor:
    """The same as one convolution with the examples as channel groups; on a CPU about twice as fast as unfolding."""
    x, delta, size, stride, dilation, padding = _picture(call, part)
    m, groups = len(x), _sizes(call)[0]
    shape = (m * delta.shape[1], x.shape[1] // groups, *size)
    images, slopes = (t.reshape(1, -1, *t.shape[2:]) for t in (x, delta))
    weights = conv2d_weight(
        images, shape, slopes, stride=stride, padding=padding, dilation=dilation, groups=m * groups
    )
    return weights.reshape(m, -1)


Pair = tuple[int, int]


def _picture(call: Call, part: slice) -> tuple[Tensor, Tensor, Pair, Pair, Pair, Pair]:
    """Input and output gradient as pictures, with kernel size, stride, dilation and padding; 1-d has height 1.

    The input comes padded where convolutions cannot pad so themselves: not by zeros, or more on one side.
    """
    x, delta, module = call.x[part], call.delta[part], call.module
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    size, stride, dilation = module.kernel_size, module.stride, module.dilation
    ends = module._reversed_padding_repeated_twice  # (left, right), last dimension first
    before, after = tuple(ends[-2::-2]), tuple(ends[::-2])
    if module.padding_mode != "zeros" or before != after:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x, before = F.pad(x, ends, mode=mode), (0,) * len(before)
    if isinstance(module, nn.Conv1d):
        x, delta = x[:, :, None], delta[:, :, None]
        size, stride, dilation, before = (1, *size), (1, *stride), (1, *dilation), (0, *before)
    pairs = [(pair[0], pair[1]) for pair in (size, stride, dilation, before)]
    return x, delta, pairs[0], pairs[1], pairs[2], pairs[3]


# --- embeddings --------------------------------------------------------------------------------------------


def _token_slopes(call: Call) -> tuple[Tensor, Tensor]:
    """Tokens [m, T] and output gradients [m, T, d], zero for the padding token."""
    module = call.module
    assert isinstance(module, nn.Embedding)
    tokens, delta = call.x.reshape(len(call.x), -1).long(), _sequence(call.delta)
    if module.padding_idx is not None:
        delta = delta * (tokens != module.padding_idx)[:, :, None]
    return tokens, delta


def _token_sums(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Over the distinct (example, token) pairs: example, token and summed gradient [pairs, d]."""
    tokens, delta = _token_slopes(call)
    count = int(tokens.max()) + 1
    keys = torch.arange(len(tokens), device=tokens.device)[:, None] * count + tokens
    pairs, place = torch.unique(keys.flatten(), return_inverse=True)
    sums = delta.new_zeros(len(pairs), delta.shape[2]).index_add_(0, place, delta.flatten(0, 1))
    return pairs // count, pairs % count, sums


def _tied_product(embedding: Call, linear: Call) -> Tensor:
    """<E_i, W_i> for each example, [m]: the two gradients of a weight that embeds tokens and reads them out.

    With e_s the embedding's output gradient at position s, and a_t, d_t the read-out's input and output gradient, it is
    the sum over s and t of <e_s, a_t> d_t[token_s].
    """
    tokens, slopes = _token_slopes(embedding)
    inputs, delta = _sequence(linear.x), _sequence(linear.delta)
    read = delta.gather(2, tokens[:, None, :].expand(-1, delta.shape[1], -1))
    return ((inputs @ slopes.mT) * read).sum((1, 2))


# --- normalisation layers ----------------------------------------------------------------------------------


def _normalised(call: Call) -> Tensor:
    """The layer's input after normalisation, before scale and shift."""
    x, module = call.x, call.module
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, eps=module.eps)
    assert isinstance(module, (*INSTANCE_NORMS, *BATCH_NORMS))
    if call.stats is None or (isinstance(module, INSTANCE_NORMS) and module.training):
        return F.instance_norm(x, eps=module.eps)
    return F.batch_norm(x, *call.stats, training=False, eps=module.eps)


def _entrywise(call: Call, x: Tensor) -> tuple[Tensor, Tensor]:
    """x and the output gradient as [m, parameters, positions]."""
    m = len(x)
    if call.family == "channelwise":
        return x.reshape(m, x.shape[1], -1), call.delta.reshape(m, x.shape[1], -1)
    weight = call.module.weight
    assert isinstance(weight, Tensor)
    return x.reshape(m, -1, weight.numel()).mT, call.delta.reshape(m, -1, weight.numel()).mT
