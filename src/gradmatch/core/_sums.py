"""Norms and the sum of per-example gradients from one pass, and products of gradients with given vectors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradmatch.core._batches import Batch
from gradmatch.core._per_example import Engine, refuse_coupled
from gradmatch.core._stats import GradStats
from gradmatch.core.checks import finite, require, whole
from gradmatch.core.problem import ParamValues, Problem, twice_differentiable

__all__ = ["GradSums", "gradient_products", "gradient_sums"]


@dataclass(frozen=True)
class GradSums:
    """Norms [m] of per-example gradients, and count, sum of gradients and squared norms by block of the same examples.

    ``tier`` and ``direct`` as in :class:`GradNorms`.
    """

    norms: Tensor
    stats: GradStats
    tier: str
    direct: tuple[str, ...]


def gradient_sums(
    problem: Problem,
    params: ParamValues | None = None,
    chunk: int | None = None,
    subset: Tensor | None = None,
) -> GradSums:
    """Norms and the sum of per-example gradients, from one pass in memory that does not grow with the examples.

    Per-example gradients are formed only for parameters that cannot be read off the pass, as many at once as fit
    128 MiB.

    Args:
        chunk: examples at once; default: the batch.
        subset: mask [n] of the examples to count; default: all.
    """
    refuse_coupled(problem)
    engine = Engine(problem, problem.resolve(params), False, "auto")
    names, stats, norms = problem.space.names, GradStats(problem.space), []
    for batch in _chosen(problem, subset):
        for part in batch.split(None if chunk is None else whole("chunk", chunk)):
            squares, totals = engine.sums(part)
            by_block = torch.stack([squares[k].double() for k in names], dim=1)
            stats.update_sums(part.size, torch.cat([totals[k] for k in names]), by_block.sum(0))
            norms.append(by_block.sum(1).sqrt())
    return GradSums(torch.cat(norms), stats, *engine.report())


def _chosen(problem: Problem, subset: Tensor | None) -> Iterator[Batch]:
    """The batches, or what a mask leaves of them."""
    if subset is None:
        yield from problem.batches()
        return
    require(
        subset.shape == (problem.n,) and subset.dtype == torch.bool and bool(subset.any()),
        f"subset is {subset.dtype} of shape {tuple(subset.shape)} with {int(subset.sum())} true; it must be a mask "
        f"of shape ({problem.n},) with at least one example.",
    )
    for batch in problem.batches():
        kept = (
            torch.nonzero(subset[batch.start : batch.start + batch.size]).flatten().to(problem.space.device)
        )
        if len(kept):
            yield batch.take(kept)


def gradient_products(
    problem: Problem, vectors: Tensor, groups: Tensor | None = None, params: ParamValues | None = None
) -> Float[Tensor, " n"]:
    """<g_i, v> of every example's gradient with a vector [P], or with that of its group among vectors [G, P].

    One forward-mode pass (a Jacobian-vector product of the per-example losses), so that no gradient is formed; models
    without forward-mode derivatives go through per-example gradients.

    Args:
        groups: which vector belongs to each example (long [n]), where there are several.
    """
    require(
        (vectors.ndim == 1) == (groups is None) and vectors.shape[-1] == problem.space.size,
        f"vectors has shape {tuple(vectors.shape)}; it must be (P,) = ({problem.space.size},), or (G, P) with groups.",
    )
    rows = vectors.detach().to(problem.space.device, problem.space.dtype).reshape(-1, problem.space.size)
    ids = torch.zeros(problem.n, dtype=torch.long) if groups is None else groups
    require(len(ids) == problem.n, f"groups has {len(ids)} ids; there are {problem.n} examples.")
    blocks = {k: p.detach() for k, p in problem.resolve(params).items()}
    tangents = [problem.space.unflatten(row) for row in rows]
    found = torch.empty(problem.n, dtype=problem.space.dtype, device=problem.space.device)
    forward = not _convention_only_backward(problem)
    for batch in problem.batches():
        here = ids[batch.start : batch.start + batch.size].to(problem.space.device)
        for g in here.unique().tolist():
            places = torch.nonzero(here == g).flatten()
            part = batch.take(places)
            values = _forward_products(problem, blocks, part, tangents[g]) if forward else None
            if values is None:
                forward = False
                values = _row_products(problem, part, rows[g], params)
            found[batch.start + places] = values
    return finite("products with gradients", found)


def _convention_only_backward(problem: Problem) -> bool:
    """Whether an embedding's backward is no derivative: it skips the padding token, or divides by frequencies."""
    modules = () if problem.module is None else problem.module.modules()
    kinds = (nn.Embedding, nn.EmbeddingBag)
    return any(isinstance(m, kinds) and (m.padding_idx is not None or m.scale_grad_by_freq) for m in modules)


def _forward_products(
    problem: Problem, blocks: dict[str, Tensor], part: Batch, tangent: dict[str, Tensor]
) -> Tensor | None:
    try:
        with twice_differentiable():
            values: Tensor = torch.func.jvp(lambda p: problem.batch_losses(p, part), (blocks,), (tangent,))[1]
    except (RuntimeError, NotImplementedError) as error:
        if not any(word in str(error) for word in ("forward AD", "forward-mode", "jvp")):
            raise
        return None
    return values


def _row_products(problem: Problem, part: Batch, vector: Tensor, params: ParamValues | None) -> Tensor:
    refuse_coupled(problem)
    engine = Engine(problem, problem.resolve(params), False, "auto")
    found = torch.zeros(part.size, dtype=vector.dtype, device=vector.device)
    for name, some, rows in engine.stream(part):
        found[some] += rows @ vector[problem.space.slices[name]]
    return found
