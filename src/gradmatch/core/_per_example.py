"""Per-example gradients of a batch, block by block, each by the cheapest tier that is right for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gradmatch.core import _layerwise, _reading
from gradmatch.core._batches import Batch
from gradmatch.core.checks import InputError, listing
from gradmatch.core.problem import Problem, twice_differentiable

Tier = Literal["auto", "layerwise", "vmap", "loop"]
TIERS: tuple[Tier, ...] = ("auto", "layerwise", "vmap", "loop")
_BUDGET = 2**25  # numbers of per-example gradients held at once: 128 MiB in float32


def _slices(m: int, step: int) -> list[slice]:
    """0..m in pieces of ``step``, at least one example each."""
    return [slice(a, min(a + max(1, step), m)) for a in range(0, m, max(1, step))]


def summed_gradient(
    problem: Problem,
    blocks: Mapping[str, Tensor],
    batch: Batch,
    differentiable: bool,
    fixed: Mapping[str, Tensor] | None = None,
) -> list[Tensor]:
    """Gradient of a batch's summed loss in ``blocks``, with further blocks held at ``fixed``."""
    with torch.enable_grad(), twice_differentiable() if differentiable else nullcontext():
        loss = problem.batch_losses({**(fixed or {}), **blocks}, batch).sum()
    leaves = list(blocks.values())
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in leaves]
    return list(torch.autograd.grad(loss, leaves, create_graph=differentiable, materialize_grads=True))


class Engine:
    """Per-example gradients and norms of batches at fixed parameters, remembering what worked."""

    def __init__(
        self, problem: Problem, blocks: Mapping[str, Tensor], differentiable: bool, tier: Tier
    ) -> None:
        self.problem, self.blocks, self.differentiable = problem, dict(blocks), differentiable
        self.vmap = tier != "loop"
        self.strict = tier
        self.layerwise = tier in ("auto", "layerwise") and not differentiable and problem.module is not None
        self.checked = bool(problem.active("dropout"))  # two passes differ then, so they cannot be compared
        self.rest: set[str] = set()
        self.used: set[str] = set()
        self.memory: dict[torch.dtype, Tensor] = {}

    def report(self) -> tuple[str, tuple[str, ...]]:
        """The tiers used, joined by "+", and the blocks that the layerwise one could not read."""
        direct = tuple(k for k in self.blocks if k in self.rest or "layerwise" not in self.used)
        return "+".join(sorted(self.used)), direct

    def rows(self, batch: Batch, out: Mapping[str, Tensor]) -> None:
        """Write the gradients [m, numel] of every block into ``out``."""
        rest = list(self.blocks)
        if self.layerwise:
            done = self._read(batch)
            for name, uses in done.uses.items():
                if uses:
                    _reading.rows(uses, out[name])
                else:
                    out[name].zero_()
            squares = {k: out[k].square().sum(1) for k in done.uses} if self._unproven(batch) else {}
            rest = done.rest if self._settle(batch, squares, done) else rest
        for name, value in self.direct(batch, rest).items():
            out[name].copy_(value)

    def norms2(self, batch: Batch) -> dict[str, Tensor]:
        """Squared norms [m] by block."""
        return self._norms2(batch, None)

    def sums(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Squared norms [m] and the gradient summed over the batch [numel], by block, from one pass."""
        totals = {k: torch.zeros_like(p.detach()).flatten() for k, p in self.blocks.items()}
        return self._norms2(batch, totals), totals

    def _norms2(self, batch: Batch, totals: dict[str, Tensor] | None) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        rest = list(self.blocks)
        if self.layerwise:
            done = self._read(batch)
            sums: dict[str, Tensor] = {}
            for name, uses in done.uses.items():
                if not uses:
                    found[name] = self.blocks[name].new_zeros(batch.size)
                elif totals is None:
                    found[name] = _reading.norms2(uses)
                else:
                    found[name], sums[name] = _reading.norms2_and_sum(uses)
            rest = done.rest if self._settle(batch, found, done) else rest
            if totals is not None:
                totals |= {k: t for k, t in sums.items() if k not in rest}
        found |= {k: self.blocks[k].detach().new_empty(batch.size) for k in rest}
        for part, rows in self._direct_parts(batch, rest):
            for name, value in rows.items():
                found[name][part] = _reading.square_norms(value)
                if totals is not None:
                    totals[name] += value.sum(0)
        return found

    def stream(self, batch: Batch) -> Iterator[tuple[str, slice, Tensor]]:
        """Gradients block by block: a block's name, some of the examples, and their rows [m, numel].

        Rows are overwritten by the next; only they and the activations of the batch are held, never [m, P].
        """
        if self.layerwise and self._unproven(batch):
            self.norms2(batch)  # proves the layerwise tier on this batch, or gives it up
        rest = list(self.blocks)
        if self.layerwise:
            done = self._read(batch)
            self._settle(batch, {}, done)
            for name, uses in done.uses.items():
                for part in _slices(batch.size, _BUDGET // self.blocks[name].numel()):
                    rows = self._scratch(part.stop - part.start, self.blocks[name])
                    _reading.rows(_reading.taken(uses, part), rows) if uses else rows.zero_()
                    yield name, part, rows
            rest = done.rest
        for part, blocks in self._direct_parts(batch, rest):
            for name, rows in blocks.items():
                yield name, part, rows

    def _scratch(self, m: int, block: Tensor) -> Tensor:
        """Memory that is used again: touched before, it costs an eighth of fresh memory."""
        if block.dtype not in self.memory or self.memory[block.dtype].numel() < m * block.numel():
            self.memory[block.dtype] = block.detach().new_empty(m * block.numel())
        return self.memory[block.dtype][: m * block.numel()].view(m, -1)

    def _direct_parts(self, batch: Batch, names: list[str]) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """Some examples at once, as many as fit, and the rows of the named blocks."""
        if names:
            for part in _slices(batch.size, _BUDGET // sum(self.blocks[k].numel() for k in names)):
                yield part, self.direct(batch.take(part), names)

    def _read(self, batch: Batch) -> _layerwise.Pass:
        done = _layerwise.run(self.problem, self.blocks, batch)
        if self.strict == "layerwise" and done.rest:
            raise InputError(f'tier is "layerwise"; {listing(done.rest)} cannot be read so, use "auto".')
        return done

    def _unproven(self, batch: Batch) -> bool:
        """Whether the layerwise tier has still to prove itself, and can on this batch."""
        return not self.checked and batch.size > 1

    def _settle(self, batch: Batch, squares: Mapping[str, Tensor], done: _layerwise.Pass) -> bool:
        """Whether what was read off the batch may be kept; if not, this tier is given up for good."""
        if squares and self._unproven(batch):
            self.checked = True
            if not self._agrees(squares, batch):
                if self.strict == "layerwise":
                    raise InputError(
                        'tier is "layerwise"; the first dimension inside the model is not the example.'
                    )
                self.layerwise = False
                return False
        self.used |= {"layerwise"} if done.uses else set()
        self.rest |= set(done.rest)
        return True

    def _agrees(self, squares: Mapping[str, Tensor], batch: Batch) -> bool:
        """Compare the example with the largest gradient with a pass of its own.

        Shapes alone cannot show that a layer's first dimension is the example (it may be time, as long as the batch),
        nor that examples do not mix.
        """
        worst = int(torch.stack(list(squares.values())).sum(0).argmax())
        single = batch.take(slice(worst, worst + 1))
        wrt = {k: self.blocks[k] for k in squares}
        fixed = {k: p.detach() for k, p in self.blocks.items() if k not in wrt}
        truth = summed_gradient(self.problem, wrt, single, False, fixed)
        exact = [float(g.square().sum()) for g in truth]
        read = [float(v[worst]) for v in squares.values()]
        slack = min(0.1, 50 * torch.finfo(self.problem.space.dtype).eps ** 0.5)
        floor = 1e-4 * slack * max(exact)
        return all(abs(r - e) <= slack * e + floor for r, e in zip(read, exact, strict=True))

    def direct(self, batch: Batch, names: list[str] | None = None) -> dict[str, Tensor]:
        """Gradients [m, numel] of some blocks (None: all), by vmap or else one by one."""
        names = list(self.blocks) if names is None else names
        if not names:
            return {}
        wrt = {k: self.blocks[k] for k in names}
        fixed = {k: p if self.differentiable else p.detach() for k, p in self.blocks.items() if k not in wrt}
        if not self.differentiable:
            wrt = {k: p.detach() for k, p in wrt.items()}
        with torch.set_grad_enabled(self.differentiable), twice_differentiable():
            grads = self._vmapped(wrt, fixed, batch) if self.vmap else None
            if grads is None:
                self.used.add("loop")
                singles = [batch.take(slice(i, i + 1)) for i in range(batch.size)]
                each = [
                    torch.func.grad(_one_loss(self.problem, fixed))(wrt, s.inputs, s.target) for s in singles
                ]
                grads = {k: torch.stack([g[k] for g in each]) for k in wrt}
        return {k: g.reshape(batch.size, -1) for k, g in grads.items()}

    def _vmapped(
        self, wrt: dict[str, Tensor], fixed: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor] | None:
        one = torch.func.grad(_one_loss(self.problem, fixed))

        def single(p: dict[str, Tensor], inputs: Any, target: Any) -> Any:
            return one(p, *tree_map(lambda t: t[None], (inputs, target)))

        try:
            batched = torch.func.vmap(single, in_dims=(None, 0, 0), randomness="different")
            grads: dict[str, Tensor] = batched(wrt, batch.inputs, batch.target)
        except (
            RuntimeError
        ):  # of many texts: it branches on data, or an operation has no or a broken batching rule
            if self.strict == "vmap":
                raise
            self.vmap = False
            return None
        self.used.add("vmap")
        return grads


def _one_loss(problem: Problem, fixed: Mapping[str, Tensor]) -> Any:
    def loss(p: Mapping[str, Tensor], inputs: Any, target: Any) -> Tensor:
        return problem.losses(problem.outputs({**fixed, **p}, inputs), target, 1)[0]

    return loss


def refuse_coupled(problem: Problem) -> None:
    found = problem.active("batchnorm")
    if found:
        raise InputError(
            f"model has batch norm in train mode in {listing(found)}; one example has no gradient of its own there, "
            "call model.eval()."
        )
