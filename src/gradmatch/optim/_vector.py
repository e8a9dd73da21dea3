"""What optimizers share that take all their parameters as one vector and ask for the loss again and again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradmatch.core import checks
from gradmatch.optim._base import OptimizerBase
from gradmatch.optim._parts import wide_dtype


class Vector:
    """Parameters strung together: read, written and differentiated as one vector [P], kept in float32 at least."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self.sizes = [p.numel() for p in self.params]
        self.dtype = wide_dtype(self.params[0])
        for p in self.params[1:]:
            self.dtype = torch.promote_types(self.dtype, wide_dtype(p))

    @property
    def size(self) -> int:
        """P."""
        return sum(self.sizes)

    def read(self) -> Tensor:
        """A copy of the values [P]."""
        return self.flat([p.detach() for p in self.params])

    def write(self, x: Tensor) -> None:
        """Set the parameters to x [P]."""
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.blocks(x))

    def flat(self, blocks: Sequence[Tensor], batch: int = 0) -> Tensor:
        """[*batch, P] of blocks [*batch, *shape]."""
        return torch.cat([b.reshape((*b.shape[:batch], -1)).to(self.dtype) for b in blocks], -1)

    def blocks(self, x: Tensor) -> list[Tensor]:
        """Blocks [*batch, *shape] of [*batch, P], in the parameters' own types."""
        parts = torch.split(x, self.sizes, -1)
        return [
            t.reshape((*x.shape[:-1], *p.shape)).to(p.dtype) for t, p in zip(parts, self.params, strict=True)
        ]

    def gradient(self, loss: Tensor) -> Tensor:
        """The gradient [P] of a scalar; parameters it does not depend on have 0."""
        found = torch.autograd.grad(loss, self.params, allow_unused=True, materialize_grads=True)
        return self.flat(found)


def reached(value: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """The parameters that the graph of ``value`` ends in."""
    todo, seen, found = [value.grad_fn], set(), {id(value)}
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        todo += [following for following, _ in node.next_functions]
    return [p for p in params if id(p) in found]


class VectorOptimizer(OptimizerBase):
    """An optimizer of one vector: its groups are one, so all must have the same settings.

    State lies with the first parameter.
    """

    def _check(self, group: dict[str, Any]) -> None:
        for name in ("maximize", "foreach", "flat", "compile"):
            checks.require(not group[name], f"{name} is {group[name]!r}; {self._name} has no such option.")
        first = self.param_groups[0]
        for name in self.defaults:
            checks.require(
                group[name] == first[name],
                f"{name} is {group[name]!r} in a group and {first[name]!r} in the first; {self._name} moves all "
                "parameters together and needs the same in each.",
            )
        devices = {p.device for g in self.param_groups for p in g["params"]}
        checks.require(
            len(devices) == 1, f"parameters lie on {len(devices)} devices; {self._name} needs one."
        )
        self._check_settings(group)

    def _check_settings(self, group: dict[str, Any]) -> None:
        """Refuse settings that are out of range."""

    def _memory(self) -> dict[str, Any]:
        """What the optimizer keeps from step to step."""
        state: dict[str, Any] = self.state[self._all_params()[0]]
        return state
