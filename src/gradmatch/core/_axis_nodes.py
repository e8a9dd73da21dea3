"""Axes while they are being joined: a union-find whose members may be cut into factors and stretches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence


class Node:
    """An axis, or a factor or stretch of one, while the network is traced (union-find over equal ones)."""

    __slots__ = ("fixed", "kind", "parent", "parts", "size")

    def __init__(self, size: int, fixed: bool = False, kind: str = "leaf", parts: Sequence[Node] = ()):
        self.size, self.fixed, self.kind, self.parts = size, fixed, kind, list(parts)
        self.parent: Node | None = None


def find(node: Node) -> Node:
    """The node that stands for all those joined with ``node``."""
    while node.parent is not None:
        if node.parent.parent is not None:
            node.parent = node.parent.parent
        node = node.parent
    return node


def freeze(node: Node) -> None:
    """No permutation of this axis."""
    node = find(node)
    if not node.fixed:
        node.fixed = True
        for part in node.parts:
            freeze(part)


def join(a: Node, b: Node) -> Node:
    """Permute both alike; where their factors do not fit each other, neither."""
    a, b = find(a), find(b)
    if a is b:
        return a
    if a.fixed or b.fixed:
        freeze(a)
        freeze(b)
    if b.kind == "leaf" and a.kind != "leaf":
        a, b = b, a
    if a.kind != "leaf" and not (a.kind == b.kind and _refine(a, b)):
        freeze(a)
        freeze(b)
    a.parent = b
    return b


def _refine(a: Node, b: Node) -> bool:
    """Join two lists of factors (or stretches) part by part, cutting the larger of two; False where it fails."""
    xs, ys = list(a.parts), list(b.parts)
    while xs and ys:
        x, y = find(xs.pop(0)), find(ys.pop(0))
        if x.size == y.size:
            join(x, y)
            continue
        large, small, rest = (x, y, xs) if x.size > y.size else (y, x, ys)
        if a.kind == "product" and large.size % small.size:
            return False
        left = large.size // small.size if a.kind == "product" else large.size - small.size
        first, second = cut(large, [small.size, left], a.kind)
        join(first, small)
        rest.insert(0, second)
    return True


def cut(node: Node, sizes: Sequence[int], kind: str) -> list[Node]:
    """Factors ("product") or stretches ("concat") of an axis, of these sizes."""
    node = find(node)
    parts = [Node(s, fixed=node.fixed) for s in sizes]
    if node.kind == "leaf":
        node.kind, node.parts = kind, parts
    else:
        join(node, Node(node.size, node.fixed, kind, parts))
    return parts


def product(nodes: Iterable[Node]) -> Node:
    """One axis that runs over every combination of the nodes' entries."""
    kept = [find(n) for n in nodes if n.size != 1]
    if len(kept) == 1:
        return kept[0]
    size = math.prod(n.size for n in kept)
    return Node(size, all(n.fixed for n in kept), "product" if kept else "leaf", kept)


def concat(nodes: Sequence[Node]) -> Node:
    """One axis that runs over the nodes' entries one after the other."""
    kept = [find(n) for n in nodes if n.size > 0]
    if len(kept) == 1:
        return kept[0]
    return Node(sum(n.size for n in kept), all(n.fixed for n in kept), "concat", kept)


def leaf_nodes(node: Node) -> Iterator[Node]:
    """The undivided parts of an axis."""
    node = find(node)
    if node.kind == "leaf":
        yield node
    for part in node.parts:
        yield from leaf_nodes(part)
