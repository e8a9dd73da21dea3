"""Reads off a network which axes of its parameters must be permuted together.

The network runs once on an example, and every operation PyTorch carries out is watched. Each axis of each stored
tensor starts as a group of its own; an operation joins axes that it matches entry by entry (the output axis of one
layer with the input axis of the next, a batch-norm's statistics with its channels, both sides of a residual sum),
cuts them into factors and stretches where a tensor is reshaped or sliced (heads, flattened maps, fused projections),
and fixes those whose entries have a place (inputs, outputs, pixels, token ids). What an operation does that is not
known here is fixed, so an unknown one costs freedom and never correctness.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradmatch.core._axes import Axis, Concat, Leaf, Product, leaves
from gradmatch.core._axis_nodes import Node, find, freeze, leaf_nodes
from gradmatch.core._axis_rules import RULES


class AxisTrace(TorchDispatchMode):
    """Within the block, the axes of every tensor that passes are followed.

    Args:
        stored: the state dict's own tensors by name.
    """

    def __init__(self, stored: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.stored = dict(stored)
        self._nodes: dict[int, tuple[Node, ...]] = {}
        self._alive: list[Tensor] = []  # an id is only unique while its tensor lives
        self.used: set[int] = set()
        for tensor in self.stored.values():
            if id(tensor) not in self._nodes:  # tied tensors share their axes
                self.set(tensor, [Node(s) for s in tensor.shape])

    def set(self, tensor: Tensor, nodes: Iterable[Node]) -> None:
        """Give a tensor its axes."""
        self._nodes[id(tensor)] = tuple(nodes)
        self._alive.append(tensor)

    def fix(self, tensor: Tensor) -> None:
        """Every entry of ``tensor`` has its place."""
        for node in self.of(tensor):
            freeze(node)

    def known(self, tensor: Tensor) -> tuple[Node, ...] | None:
        """A tensor's axes if it was followed so far."""
        return self._nodes.get(id(tensor))

    def of(self, tensor: Tensor) -> tuple[Node, ...]:
        """A tensor's axes. One made on the way is free along axes on which it is constant, and fixed on others."""
        if id(tensor) not in self._nodes:
            uniform = [
                tensor.shape[d] > 1 and bool((tensor == tensor.narrow(d, 0, 1)).all())
                for d in range(tensor.ndim)
            ]
            self.set(tensor, [Node(n, fixed=not u) for n, u in zip(tensor.shape, uniform, strict=True)])
        return self._nodes[id(tensor)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = _bound(func, args, kwargs or {})
        made = [t for t in _tensors(out) if not any(t is g for g in _tensors(list(given.values())))]
        taken = _tensors(list(given.values()))
        if not taken:  # a constant: judged by its values when it is used
            return out
        self.used.update(id(t) for t in taken)
        name = func._schema.name.removeprefix("aten::")
        rule = RULES.get(name) or RULES.get(name.rstrip("_"))
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = RULES["add"]
        if rule is None:
            for tensor in taken:
                self.fix(tensor)
        else:
            rule(self, given, out)
        for tensor in made:
            if id(tensor) not in self._nodes:
                self.set(tensor, [Node(s, fixed=True) for s in tensor.shape])
        return out

    def axes(self) -> tuple[dict[str, tuple[Axis, ...]], dict[int, str]]:
        """The axes of the stored tensors, and the group names by the identity of their nodes.

        A group is named after the tensor whose axis shows it first. One that occurs on a single axis is fixed:
        nothing in this run shows that its entries may change places.
        """
        distinct = {id(t): t for t in self.stored.values()}
        counts = Counter(id(n) for t in distinct.values() for axis in self.of(t) for n in leaf_nodes(axis))
        names: dict[int, str] = {}
        for key, tensor in self.stored.items():
            for axis in self.of(tensor):
                for node in leaf_nodes(axis):
                    if node.fixed or node.size == 1 or counts[id(node)] < 2 or id(node) in names:
                        continue
                    owner = key.rpartition(".")[0] or key
                    taken = set(names.values())
                    free = (f"{owner}.{k}" if k else owner for k in range(len(taken) + 1))
                    names[id(node)] = next(n for n in free if n not in taken)
        return {k: tuple(self.layout(n, names) for n in self.of(t)) for k, t in self.stored.items()}, names

    def layout(self, node: Node, names: Mapping[int, str]) -> Axis:
        """A node as an axis."""
        node = find(node)
        if node.kind == "leaf":
            return Leaf(node.size, names.get(id(node)))
        parts = tuple(self.layout(p, names) for p in node.parts)
        made: Axis = Product(parts) if node.kind == "product" else Concat(parts)
        return made if any(leaf.name for _, leaf in leaves(made)) else Leaf(node.size)


def _bound(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the names of the operation's schema, defaults filled in."""
    schema = func._schema.arguments
    found = {a.name: a.default_value for a in schema if a.has_default_value()}
    found.update({a.name: v for a, v in zip(schema, args, strict=False)})
    return found | dict(kwargs)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, list | tuple) else []
