"""Sums of squares of pulled-back vectors, entry by entry: the diagonal of J^T S S^T J for any factor S.

With J_n the Jacobian of example n's outputs in the parameters and s_nr some vectors over its outputs,
``squared_pullbacks`` is sum_n sum_r (J_n^T s_nr)^2. The factor decides what that is: with S S^T the covariance of the
score it is the diagonal of a Fisher matrix, with S S^T the Hessian of the loss that of the Gauss-Newton matrix. Squares
are taken for each example and column before anything is summed.

For layers that are known one forward pass serves all columns, and of the backward passes only what arrives at the
layers' outputs is kept: D^2 A^2 for a linear layer, one product per example for a layer with positions. Other
parameters go through batched per-example products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gradmatch.core import _layerwise, _squares
from gradmatch.core._batches import Batch
from gradmatch.core.checks import finite, refuse, require, whole
from gradmatch.core.problem import ParamValues, Problem

__all__ = ["Factor", "softmax_factor", "squared_pullbacks"]

Factor = Callable[[Tensor, Batch], Tensor]
"""(outputs [m, ...], their batch) -> vectors [R, m, ...] over the outputs."""
_BUDGET = 2**23  # numbers held at once in what arrives at the layers


def softmax_factor(logits: Tensor) -> Tensor:
    """C - 1 vectors [C - 1, m, C] whose outer products sum to diag(p) - p p^T, the score's covariance.

    The obvious factor has a column sqrt(p_c) (e_c - p) for each class: diag(u) (I - u u^T) with u = sqrt(p). A
    Householder reflection that sends the first axis to u turns one column into zeros and leaves the sum of squares as
    it is, so one backward pass is saved; with two classes that is half of the work.

    >>> s = softmax_factor(torch.tensor([[0.0, 1.0, 2.0]]).double())
    >>> p = torch.softmax(torch.tensor([0.0, 1.0, 2.0]).double(), 0)
    >>> torch.allclose(torch.einsum("rmc,rmd->cd", s, s), p.diag() - p.outer(p))
    True
    """
    u = torch.softmax(logits.detach().to(torch.promote_types(logits.dtype, torch.float32)), 1).sqrt()
    v = u.clone()
    v[:, 0] += 1
    reflection = torch.diag_embed(torch.ones_like(u)) - v[:, :, None] * v[:, None, :] / v[:, 0, None, None]
    return (u[:, :, None] * reflection[:, :, 1:]).permute(2, 0, 1).to(logits.dtype)


def squared_pullbacks(
    problem: Problem,
    factor: Factor,
    params: ParamValues | None = None,
    *,
    chunk: int | None = None,
    tier: str = "auto",
    after: Callable[[int, dict[str, Tensor]], object] | None = None,
    start: tuple[int, dict[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Sum over examples and columns of (J_n^T s_nr)^2, by block, in at least single precision.

    Args:
        factor: see :data:`Factor`; called for each piece of a batch, and once before for the first two examples. It
            must give an example the same vectors whatever stands beside it.
        chunk: examples at once; default what fits 32 MiB of layer gradients.
        tier: "auto" (known layers read off one pass) or "vmap".
        after: called after every batch with the number of examples done and the sums so far.
        start: what ``after`` was last called with in a run to be continued.

    Raises:
        InputError: a model in train mode whose examples are coupled, outputs that are no tensor, or a result that is
            not finite.
    """
    blocks = problem.resolve(params)
    done, total = start if start is not None else (0, {})
    total = total or {
        k: p.new_zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32)) for k, p in blocks.items()
    }
    total = {k: t.detach() for k, t in total.items()}
    reader = _Reader(problem, blocks, factor, tier)
    for batch in problem.batches():
        if batch.start == 0:  # also in a run that goes on, so that it cuts its pieces as the one before
            reader.prepare(batch.take(slice(0, 2)))
        if batch.start < done:
            continue
        first = 0
        while first < batch.size:
            size = reader.fitting if chunk is None else whole("chunk", chunk)
            part = batch.take(slice(first, min(first + size, batch.size)))
            for name, value in reader.squares(part).items():
                total[name] += value.view_as(total[name])
            first += part.size
        done = batch.start + batch.size
        if after is not None:
            after(done, total)
    return {k: finite(f"sum of squares of {k}", t) for k, t in total.items()}


class _Reader:
    """Sums of squares over one piece of a batch at a time, remembering what worked."""

    def __init__(self, problem: Problem, blocks: Mapping[str, Tensor], factor: Factor, tier: str) -> None:
        self.problem, self.blocks, self.factor = problem, dict(blocks), factor
        self.layerwise = tier == "auto" and problem.module is not None
        self.batched, self.fitting = True, 1
        self.readable = frozenset(self.blocks)

    def prepare(self, batch: Batch) -> None:
        """See on two examples (or the only one) which blocks can be read off layers, and how many examples fit."""
        if not self.layerwise:
            self.fitting = 2**30  # products take as many at once as fit
            return
        vectors, uses, deltas = self._read(batch)
        self.layerwise = bool(uses) and self._agrees(batch, vectors, uses, deltas)
        self.readable = frozenset(uses)
        each = sum(d[:, :1].numel() for d in deltas.values())
        # what was read off one example says nothing of layers whose first axis is something else
        self.fitting = max(1, _BUDGET // max(each, 1)) if batch.size > 1 else 1

    def squares(self, batch: Batch) -> dict[str, Tensor]:
        """Sums [numel] of every block."""
        if not self.layerwise:
            outputs = self._outputs(batch, {k: p.detach() for k, p in self.blocks.items()})
            return self._direct(batch, self.factor(outputs.detach(), batch), list(self.blocks))
        vectors, uses, deltas = self._read(batch)
        found = {
            k: _squares.squares(u, deltas) if u else torch.zeros_like(self.blocks[k]).flatten()
            for k, u in uses.items()
        }
        return found | self._direct(batch, vectors, [k for k in self.blocks if k not in uses])

    def _read(self, batch: Batch) -> tuple[Tensor, dict[str, _layerwise.Uses], dict[int, Tensor]]:
        """The vectors, the uses of what can be read off one pass, and what arrives at their calls."""
        outputs, uses, calls = _layerwise.record(
            self.problem, self.blocks, batch.size, lambda: self._outputs(batch, self.blocks)
        )
        vectors = self.factor(outputs.detach(), batch)
        deltas = self._arriving(outputs, vectors, calls, batch.size)
        kept = {k: u for k, u in uses.items() if k in self.readable and all(id(c) in deltas for c, _ in u)}
        return vectors, kept, deltas

    def _outputs(self, batch: Batch, blocks: Mapping[str, Tensor]) -> Tensor:
        outputs = self.problem.outputs(blocks, batch.inputs)
        if not isinstance(outputs, Tensor):
            refuse(
                f"model returns {type(outputs).__name__}; it must return logits (or an output with .logits)."
            )
        require(
            outputs.ndim > 1 and len(outputs) == batch.size,
            f"model returns shape {tuple(outputs.shape)} for {batch.size} examples; it must return logits for each.",
        )
        return finite("model outputs", outputs)

    def _arriving(
        self, outputs: Tensor, vectors: Tensor, calls: list[_layerwise.Call], m: int
    ) -> dict[int, Tensor]:
        """What arrives at each call's output for every vector, [R, m, ...], by the call's id."""
        if not calls:
            return {}
        edges, columns = [c.edge for c in calls], []
        for r, vector in enumerate(vectors):
            columns.append(
                torch.autograd.grad(
                    outputs, edges, vector, retain_graph=r + 1 < len(vectors), allow_unused=True
                )
            )
        found = {}
        for k, call in enumerate(calls):
            parts = [column[k] for column in columns]
            if all(d is not None and _layerwise.sound(call, d, m) for d in parts):
                call.x = call.x.expand(m, *call.x.shape[1:]) if call.broadcast else call.x
                found[id(call)] = torch.stack(parts)
        return found

    def _agrees(
        self, batch: Batch, vectors: Tensor, uses: Mapping[str, _layerwise.Uses], deltas: Mapping[int, Tensor]
    ) -> bool:
        """Compare one example with a pass of its own: shapes cannot show that a layer's first axis is the example."""
        worst = int(vectors.flatten(2).square().sum((0, 2)).argmax())
        at = slice(worst, worst + 1)
        truth = self._looped(batch.take(at), vectors[:, at], list(uses))
        slack = 50 * torch.finfo(self.problem.space.dtype).eps ** 0.5
        floor = 1e-4 * max((float(t.sum()) for t in truth.values()), default=0.0)
        for name, found in uses.items():
            one = [(_squares.restricted(c, at, deltas[id(c)][0]), local) for c, local in found]
            rows = {id(s): deltas[id(c)][:, at] for (s, _), (c, _) in zip(one, found, strict=True)}
            read = float(_squares.squares(one, rows).sum()) if found else 0.0
            if abs(read - float(truth[name].sum())) > min(0.1, slack) * (float(truth[name].sum()) + floor):
                return False
        return True

    def _direct(self, batch: Batch, vectors: Tensor, names: list[str]) -> dict[str, Tensor]:
        """Sums [numel] of some blocks from per-example products, batched or else one by one."""
        if not names:
            return {}
        numel = sum(self.blocks[k].numel() for k in names) * len(vectors)
        step, total = max(1, _BUDGET // numel), dict.fromkeys(names, torch.zeros(()))
        for first in range(0, batch.size, step):
            part = slice(first, min(first + step, batch.size))
            found = self._vmapped(batch.take(part), vectors[:, part], names) if self.batched else None
            if found is None:
                found = self._looped(batch.take(part), vectors[:, part], names)
            total = {k: total[k].to(found[k].device) + found[k] for k in names}
        return total

    def _vmapped(self, batch: Batch, vectors: Tensor, names: list[str]) -> dict[str, Tensor] | None:
        fixed = {k: p.detach() for k, p in self.blocks.items() if k not in names}
        wrt = {k: self.blocks[k].detach() for k in names}

        def one(p: dict[str, Tensor], inputs: Any, columns: Tensor) -> dict[str, Tensor]:
            single = tree_map(lambda t: t[None], inputs)
            pull = torch.func.vjp(lambda q: self.problem.outputs({**fixed, **q}, single)[0], p)[1]
            return {k: _squared(g) for k, g in torch.func.vmap(lambda s: pull(s)[0])(columns).items()}

        try:
            found = torch.func.vmap(one, in_dims=(None, 0, 1))(wrt, batch.inputs, vectors)
        except (
            RuntimeError
        ):  # of many texts: it branches on data, or an operation has no or a broken batching rule
            self.batched = False
            return None
        return {k: v.sum(0) for k, v in found.items()}

    def _looped(self, batch: Batch, vectors: Tensor, names: list[str]) -> dict[str, Tensor]:
        total: dict[str, Tensor] = dict.fromkeys(names, torch.zeros(()))
        wrt = [self.blocks[k] for k in names]
        for i in range(batch.size):
            with torch.enable_grad():
                outputs = self.problem.outputs(self.blocks, batch.take(slice(i, i + 1)).inputs)
            for vector in vectors[:, i : i + 1]:
                grads = torch.autograd.grad(
                    outputs, wrt, vector, retain_graph=True, materialize_grads=True, allow_unused=True
                )
                total = {
                    k: total[k].to(g.device) + _squared(g[None]) for k, g in zip(names, grads, strict=True)
                }
        return total


def _squared(gradients: Tensor) -> Tensor:
    """Sum of squares over the first axis, flat."""
    wide = gradients.to(torch.promote_types(gradients.dtype, torch.float32))
    return wide.flatten(1).square().sum(0)
