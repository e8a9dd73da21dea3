"""Gradients of a Problem: mean, by group, by example, and their norms and moments.

Ask for the statistic; the cheapest tier that is right computes it:

- "layerwise": one forward and backward pass from which the per-example gradients of known layers are read;
- "vmap": one reverse pass for each example, batched;
- "loop": the same one example at a time, where a model cannot be batched that way.

Nothing here touches ``.grad``, module modes or buffers. ``differentiable=True`` keeps the graph, to parameters that
require grad and to inputs that do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor

from gradmatch.core._batches import Batch
from gradmatch.core._per_example import TIERS, Engine, Tier, refuse_coupled, summed_gradient
from gradmatch.core._stats import GradStats
from gradmatch.core._sums import GradSums, gradient_products, gradient_sums
from gradmatch.core.checks import InputError, finite, labels, one_of, require, whole
from gradmatch.core.problem import ParamValues, Problem, hard_labels

__all__ = [
    "GradNorms",
    "GradStats",
    "GradSums",
    "Moments",
    "class_gradients",
    "diagonal_moments",
    "gradient",
    "gradient_norms",
    "gradient_products",
    "gradient_stats",
    "gradient_sums",
    "group_gradients",
    "iter_per_example_gradients",
    "per_example_gradients",
]

_BUDGET = 2**25  # numbers of a per-example block held at once: 128 MiB in float32


# --- mean gradients ----------------------------------------------------------------------------------------


def gradient(
    problem: Problem, params: ParamValues | None = None, differentiable: bool = False
) -> list[Tensor]:
    """Gradient of the mean loss over all examples: one tensor for each block of ``problem.space``.

    Args:
        params: where to take it (dict, list or flat vector); default: the model's own parameters.
        differentiable: keep the graph, to inputs and parameters that require grad.
    """
    blocks = problem.resolve(params, differentiable)
    total: list[Tensor] | None = None
    for batch in problem.batches(differentiable):
        part = summed_gradient(problem, blocks, batch, differentiable)
        total = part if total is None else [a + b for a, b in zip(total, part, strict=True)]
    assert total is not None
    return [finite(f"gradient of {k}", t / problem.n) for k, t in zip(blocks, total, strict=True)]


def group_gradients(
    problem: Problem,
    groups: Tensor | None = None,
    params: ParamValues | None = None,
    differentiable: bool = False,
) -> Float[Tensor, "G P"]:
    """Gradient of each group's mean loss, [G, P], for ids 0..G-1; default: the problem's groups.

    Each batch goes through the model group by group, so all groups together cost one pass over the data.
    """
    ids = problem.groups if groups is None else groups
    if ids is None:
        raise InputError("groups is None and the problem has none; group ids of shape (n,) are needed.")
    require(len(ids) == problem.n, f"groups has {len(ids)} ids; there are {problem.n} examples.")
    count = labels("groups", ids)
    blocks = problem.resolve(params, differentiable)
    totals: list[Tensor] = [torch.zeros((), dtype=problem.space.dtype, device=problem.space.device)] * count
    for batch in problem.batches(differentiable):
        here = ids[batch.start : batch.start + batch.size].to(problem.space.device)
        for g in here.unique().tolist():
            part = batch.take(torch.nonzero(here == g).flatten())
            flat = problem.space.flatten(summed_gradient(problem, blocks, part, differentiable))
            totals[g] = totals[g] + flat
    sizes = torch.bincount(ids, minlength=count).to(problem.space.device)
    return finite("group gradients", torch.stack(totals) / sizes[:, None])


def class_gradients(
    problem: Problem, params: ParamValues | None = None, differentiable: bool = False
) -> Float[Tensor, "C P"]:
    """Gradient of each class's mean loss, [C, P]; targets must be class ids 0..C-1, each present."""
    ids = torch.cat([hard_labels(batch.target) for batch in problem.data])
    return group_gradients(problem, ids, params, differentiable)


# --- per-example gradients ---------------------------------------------------------------------------------


def per_example_gradients(
    problem: Problem,
    params: ParamValues | None = None,
    chunk: int | None = None,
    differentiable: bool = False,
    tier: Tier = "auto",
) -> Float[Tensor, "n P"]:
    """Gradient of every example's loss, [n, P], columns in the order of ``problem.space``.

    Args:
        chunk: examples at once; default: what fits 128 MiB of gradients.
        differentiable: keep the graph, to inputs and parameters that require grad (never "layerwise").
        tier: "auto", or one tier by name.

    >>> from torch import nn
    >>> problem = Problem(nn.Linear(3, 2), "cross_entropy", (torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])))
    >>> per_example_gradients(problem).shape
    torch.Size([5, 8])
    """
    one_of("tier", tier, TIERS)
    if differentiable:
        parts = iter_per_example_gradients(problem, params, chunk, differentiable, tier)
        return torch.cat([rows for _, rows in parts])
    result = _block(problem, problem.n)
    for _ in _pieces(problem, params, chunk, tier, lambda part: result[part.start : part.start + part.size]):
        pass
    return result


def iter_per_example_gradients(
    problem: Problem,
    params: ParamValues | None = None,
    chunk: int | None = None,
    differentiable: bool = False,
    tier: Tier = "auto",
) -> Iterator[tuple[Batch, Float[Tensor, "m P"]]]:
    """The same in pieces of at most ``chunk`` examples, each with its batch, so that [n, P] is never held."""
    one_of("tier", tier, TIERS)
    require(not (differentiable and tier == "layerwise"), 'tier is "layerwise"; differentiable needs "vmap".')
    if not differentiable:
        return _pieces(problem, params, chunk, tier, lambda part: _block(problem, part.size))
    return _differentiable_pieces(problem, params, chunk, tier)


def _block(problem: Problem, m: int) -> Tensor:
    return torch.empty(m, problem.space.size, dtype=problem.space.dtype, device=problem.space.device)


def _scratch(problem: Problem) -> Callable[[Batch], Tensor]:
    """One block written over by every piece: memory touched before costs an eighth of fresh memory."""
    block = _block(problem, 0)

    def place(part: Batch) -> Tensor:
        nonlocal block
        block = block if len(block) >= part.size else _block(problem, part.size)
        return block[: part.size]

    return place


def _pieces(
    problem: Problem,
    params: ParamValues | None,
    chunk: int | None,
    tier: Tier,
    place: Callable[[Batch], Tensor],
) -> Iterator[tuple[Batch, Tensor]]:
    """Per-example gradients piece by piece, each written where ``place`` says."""
    refuse_coupled(problem)
    chunk = max(1, _BUDGET // problem.space.size) if chunk is None else whole("chunk", chunk)
    engine = Engine(problem, problem.resolve(params), False, tier)
    for batch in problem.batches():
        for part in batch.split(chunk):
            block = place(part)
            engine.rows(part, {name: block[:, columns] for name, columns in problem.space.slices.items()})
            if not bool(torch.isfinite(block.sum())):  # one cheap look; the sum alone may overflow
                finite("per-example gradients", block)
            yield part, block


def _differentiable_pieces(
    problem: Problem, params: ParamValues | None, chunk: int | None, tier: Tier
) -> Iterator[tuple[Batch, Tensor]]:
    refuse_coupled(problem)
    chunk = max(1, _BUDGET // problem.space.size) if chunk is None else whole("chunk", chunk)
    engine = Engine(problem, problem.resolve(params, differentiable=True), True, tier)
    for batch in problem.batches(differentiable=True):
        for part in batch.split(chunk):
            rows = engine.direct(part)
            block = torch.cat([rows[k].to(problem.space.dtype) for k in problem.space.names], dim=1)
            finite("per-example gradients", block.detach())
            yield part, block


# --- norms and moments -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradNorms:
    """Norms [n] of per-example gradients, squared norms [n, L] by block, and how they were computed.

    ``tier`` names the tiers used, joined by "+"; ``direct`` the blocks that the layerwise tier could not read.
    """

    norms: Tensor
    squares: Tensor
    names: tuple[str, ...]
    tier: str
    direct: tuple[str, ...]


@overload
def gradient_norms(
    problem: Problem, params: ParamValues | None = ..., chunk: int | None = ..., tier: Tier = ...
) -> Tensor: ...
@overload
def gradient_norms(
    problem: Problem,
    params: ParamValues | None = ...,
    chunk: int | None = ...,
    tier: Tier = ...,
    *,
    return_tier: Literal[True],
) -> GradNorms: ...
def gradient_norms(
    problem: Problem,
    params: ParamValues | None = None,
    chunk: int | None = None,
    tier: Tier = "auto",
    *,
    return_tier: bool = False,
) -> Tensor | GradNorms:
    """Euclidean norm of every example's gradient, [n].

    Linear, convolution (1d, 2d), embedding and normalisation layers are read off one forward and backward pass;
    parameters of other layers, or used more than once, go through per-example gradients.

    Args:
        chunk: examples at once; default: the batch, of which the direct part takes what fits 128 MiB.
        return_tier: give a :class:`GradNorms`, which also says which tier was used and has norms by block.
    """
    one_of("tier", tier, TIERS)
    refuse_coupled(problem)
    engine = Engine(problem, problem.resolve(params), False, tier)
    parts = []
    for batch in problem.batches():
        for part in batch.split(None if chunk is None else whole("chunk", chunk)):
            found = engine.norms2(part)
            parts.append(torch.stack([found[k].to(problem.space.dtype) for k in problem.space.names], dim=1))
    squares = finite("gradient norms", torch.cat(parts))
    norms = squares.sum(1).sqrt()
    if not return_tier:
        return norms
    return GradNorms(norms, squares, problem.space.names, *engine.report())


@dataclass(frozen=True)
class Moments:
    """Number of examples, sum of g [P] and sum of g^2 [P] over them (float64)."""

    count: int
    total: Tensor
    square: Tensor


def diagonal_moments(
    problem: Problem, params: ParamValues | None = None, chunk: int | None = None
) -> Moments:
    """First and second moment sums of every gradient entry over the examples; squares are taken per example."""
    total = torch.zeros(problem.space.size, dtype=torch.float64, device=problem.space.device)
    square = torch.zeros_like(total)
    for _, rows in _pieces(problem, params, chunk, "auto", _scratch(problem)):
        total += rows.sum(0, dtype=torch.float64)
        square += rows.square().sum(0, dtype=torch.float64)
    return Moments(problem.n, total, square)


def gradient_stats(
    problem: Problem, params: ParamValues | None = None, second: bool = False, chunk: int | None = None
) -> GradStats:
    """GradStats of the whole problem, by its groups if it has any (every id below the largest counts as a group)."""
    if problem.groups is None and not second:
        return gradient_sums(problem, params, chunk).stats
    count = 1 if problem.groups is None else int(problem.groups.max()) + 1
    stats = GradStats(problem.space, count, second)
    for part, rows in _pieces(problem, params, chunk, "auto", _scratch(problem)):
        stats.update(rows, part.groups)
    return stats
