"""What stands between J^T and J: the loss's Hessian in the outputs, or outer products of its slopes there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from gradmatch.core._batches import Batch
from gradmatch.core._second import Metric, Pull, slopes_of
from gradmatch.core.checks import require
from gradmatch.core.problem import LOSSES, Problem, following_tokens

_ENTRIES = 2048  # most outputs of an example whose loss Hessian is factored


def loss_slope(problem: Problem, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The outputs z as a leaf, and the gradient of the batch's summed loss in z with its graph."""
    with torch.enable_grad():
        z = outputs.detach().requires_grad_()
        return z, slopes_of(problem.losses(z, batch.target, batch.size).sum(), [z])[0]


def loss_metric(problem: Problem, outputs: Tensor, batch: Batch, pull: Pull) -> Metric:
    """B, the Hessian of the loss in the outputs."""
    z, slope = loss_slope(problem, outputs, batch)
    return lambda vectors: pull([slope], [z], [vectors])[0]


def outer_metric(slopes: Tensor, axes: tuple[int, ...]) -> Metric:
    """Mean over s of r_s r_s^T of slopes r [S, m, ...], a block for all that ``axes`` (of [m, ...]) do not span."""
    own = tuple(a + 1 for a in axes)

    def multiply(vectors: Tensor) -> Tensor:
        parts = [r * ((r * vectors).sum(own, keepdim=True) if own else r * vectors) for r in slopes]
        return torch.stack(parts).mean(0) if len(parts) > 1 else parts[0]

    return multiply


LIKELIHOODS = ("cross_entropy", "mse", "next_token")
"""Losses that are negative log-likelihoods: of classes, of a Gaussian of variance D / 2 for D entries, of tokens."""


def is_likelihood(problem: Problem) -> bool:
    """Whether the loss is one of ours that is a likelihood, and not a function of the user's of that name."""
    return problem.loss_name in LIKELIHOODS and problem.loss is LOSSES[problem.loss_name]


def class_axes(problem: Problem, outputs: Tensor) -> tuple[int, ...]:
    """Axes of the outputs [m, ...] that one draw from the model's distribution spans."""
    if problem.loss_name == "mse":
        return tuple(range(1, outputs.ndim))
    return (1,) if problem.loss_name == "cross_entropy" else (outputs.ndim - 1,)


def sampled_slopes(problem: Problem, outputs: Tensor, batch: Batch, samples: int, seed: int) -> Tensor:
    """Slopes [S, m, ...] of the loss for targets drawn from the model, scaled so that the mean of r r^T is B.

    Where an example has several positions (pixels, tokens), each is a draw of its own, weighted as in the loss. What
    is drawn depends on the seed and the example's place in the data alone, so batches may be cut in any way.
    """
    if problem.loss_name == "mse":
        uniform = numbered_uniforms(seed, batch.start, samples, outputs.shape).to(outputs.device)
        entries = outputs[0].numel() if outputs.ndim > 1 else 1
        return torch.special.ndtri(uniform).to(outputs.dtype) * (2 / entries) ** 0.5
    axis = class_axes(problem, outputs)[0]
    p = outputs.softmax(axis).movedim(axis, -1)
    uniform = numbered_uniforms(seed, batch.start, samples, p.shape[:-1]).to(p.device)
    steps = p.double().cumsum(-1)
    steps[..., -1] = 1  # rounding must not leave a gap above the last class
    drawn = torch.searchsorted(steps, uniform.movedim(0, -1).contiguous()).movedim(-1, 0)
    hot = nn.functional.one_hot(drawn, p.shape[-1]).to(p.dtype)
    weight = _position_weights(problem, outputs, batch)
    return ((p - hot) * weight.sqrt()[..., None]).movedim(-1, axis + 1 if axis == 1 else -1)


def numbered_uniforms(seed: int, first: int, samples: int, shape: Sequence[int]) -> Tensor:
    """Numbers in (0, 1) [samples, *shape], float64, for examples ``first``, ``first`` + 1, ... along shape[0].

    Entry k of example i comes from the pair (i, k) by the mixing function of SplitMix64 (Steele, Lea, Flood 2014).
    """
    per = samples * math.prod(shape[1:])
    example = torch.arange(first, first + shape[0])[:, None]
    state = _mixed(example + seed) + torch.arange(1, per + 1) * _GOLDEN
    bits = (_mixed(state) >> 11) & (2**53 - 1)
    flat = (bits.double() + 0.5) / 2**53
    return flat.reshape(shape[0], samples, *shape[1:]).movedim(1, 0)


_GOLDEN, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


def _mixed(z: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, whose arithmetic wraps; shifts are made logical by masks."""
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _FIRST
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _SECOND
    return z ^ ((z >> 31) & (2**33 - 1))


def _position_weights(problem: Problem, outputs: Tensor, batch: Batch) -> Tensor:
    """What each position [m, ...] counts in its example's loss."""
    if problem.loss_name == "cross_entropy":
        shape = (outputs.shape[0], *outputs.shape[2:])
        return torch.full(
            shape, 1 / max(1, outputs[0, 0].numel()), dtype=outputs.dtype, device=outputs.device
        )
    counts = (following_tokens(batch.target) != -100).to(outputs.dtype)
    weights = counts / counts.sum(1, keepdim=True).clamp(min=1)
    return torch.cat([weights, torch.zeros_like(weights[:, :1])], 1)


def loss_roots(metric: Metric, outputs: Tensor) -> Iterator[Tensor]:
    """Columns of a root of each example's B [D, D], those that vanish for all examples left out."""
    m, entries = len(outputs), outputs[0].numel()
    require(
        entries <= _ENTRIES,
        f"model has {entries} outputs for an example; the loss Hessian is factored for at most {_ENTRIES} "
        '(kind="sampled_fisher" needs no factor).',
    )
    unit = torch.eye(entries, dtype=outputs.dtype, device=outputs.device)
    vectors = unit[:, None].expand(entries, m, entries).reshape(entries, *outputs.shape)
    blocks = metric(vectors).detach().reshape(entries, m, entries).transpose(0, 1)
    values, columns = torch.linalg.eigh((blocks + blocks.mT) / 2)
    slack = 100 * entries * torch.finfo(outputs.dtype).eps * values.abs().max()
    require(
        bool(values.min() >= -slack),
        "loss is not convex in the outputs, so its Hessian there has no root; use dense() or products.",
    )
    for c in range(entries - 1, -1, -1):
        if bool((values[:, c] > slack).any()):
            yield (columns[:, :, c] * values[:, c, None].clamp(min=0).sqrt()).reshape(outputs.shape)
