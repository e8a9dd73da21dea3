"""What reshaping, slicing, joining and reordering do to axes; rules as in :mod:`gradmatch.core._axis_rules`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from gradmatch.core._axis_nodes import Node, concat, cut, freeze, join, product


class Trace(Protocol):
    """What a rule needs of the trace."""

    def of(self, tensor: Tensor) -> tuple[Node, ...]:
        """A tensor's axes."""
        ...

    def set(self, tensor: Tensor, nodes: Sequence[Node]) -> None:
        """Give a tensor its axes."""
        ...


Given = dict[str, Any]
Rule = Callable[[Trace, Given, Any], None]


def unit() -> Node:
    """An axis of one entry."""
    return Node(1, fixed=True)


def tensors_of(given: Given) -> list[Tensor]:
    flat: list[Any] = []
    for value in given.values():
        flat += value if isinstance(value, list | tuple) else [value]
    return [t for t in flat if isinstance(t, Tensor)]


def place_of(tensor: Tensor, dim: int) -> int:
    return dim % max(tensor.ndim, 1)


def places_of(tensor: Tensor, dim: Any) -> list[int]:
    if dim is None or dim == []:
        return list(range(tensor.ndim))
    return [place_of(tensor, d) for d in (dim if isinstance(dim, list | tuple) else [dim])]


def view(trace: Trace, given: Given, out: Tensor) -> None:
    """Axes are merged into products and cut into factors, block by block of equal numbers of entries."""
    source = tensors_of(given)[0]
    nodes, sizes, made = list(trace.of(source)), list(out.shape), []
    if source.numel() == 0:
        for node in nodes:
            freeze(node)
        return
    while nodes or sizes:
        block, into = [nodes.pop(0)] if nodes else [], [sizes.pop(0)] if sizes else []
        have, want = (block[0].size if block else 1), (into[0] if into else 1)
        while have != want:
            if have < want:
                block.append(nodes.pop(0))
                have *= block[-1].size
            else:
                into.append(sizes.pop(0))
                want *= into[-1]
        made += _recut(block, into)
    trace.set(out, made)


def _recut(block: list[Node], into: list[int]) -> list[Node]:
    """The axes ``into`` which a block of axes is reshaped."""
    whole, wide = product(block), [s for s in into if s != 1]
    factors = [whole] if len(wide) == 1 else cut(whole, wide, "product") if wide else []
    left = iter(factors)
    return [unit() if s == 1 else next(left) for s in into]


def transpose(trace: Trace, given: Given, out: Tensor) -> None:
    """Two axes change places; without ``dim0`` the only two."""
    nodes = list(trace.of(tensors_of(given)[0]))
    if len(nodes) > 1:
        i, j = given.get("dim0", 0) % len(nodes), given.get("dim1", 1) % len(nodes)
        nodes[i], nodes[j] = nodes[j], nodes[i]
    trace.set(out, nodes)


def permute(trace: Trace, given: Given, out: Tensor) -> None:
    """Axes in another order."""
    nodes = trace.of(given["self"])
    trace.set(out, [nodes[d % len(nodes)] for d in given["dims"]])


def unsqueeze(trace: Trace, given: Given, out: Tensor) -> None:
    """A new axis of one entry."""
    nodes = list(trace.of(given["self"]))
    nodes.insert(given["dim"] % out.ndim, unit())
    trace.set(out, nodes)


def squeeze(trace: Trace, given: Given, out: Tensor) -> None:
    """Axes of one entry go."""
    source = given["self"]
    gone = [d for d in places_of(source, given.get("dim")) if source.shape[d] == 1]
    trace.set(out, [n for d, n in enumerate(trace.of(source)) if d not in gone])


def expand(trace: Trace, given: Given, out: Tensor) -> None:
    """Copies along an axis of one entry (or a new one) are alike, so it is free."""
    own = list(trace.of(tensors_of(given)[0]))
    own = [unit() for _ in range(out.ndim - len(own))] + own
    trace.set(out, [n if n.size == s else Node(s) for n, s in zip(own, out.shape, strict=True)])


def repeat(trace: Trace, given: Given, out: Tensor) -> None:
    """The whole axis again and again; the copies are alike."""
    own = list(trace.of(given["self"]))
    own = [unit() for _ in range(out.ndim - len(own))] + own
    trace.set(
        out, [product([Node(r), n]) if r > 1 else n for r, n in zip(given["repeats"], own, strict=True)]
    )


def select(trace: Trace, given: Given, out: Any) -> None:
    """One entry of an axis (or each on its own): its entries have their places."""
    nodes = list(trace.of(given["self"]))
    freeze(nodes.pop(given["dim"] % len(nodes)))
    for result in [out] if isinstance(out, Tensor) else out:
        trace.set(result, nodes)


def slicing(trace: Trace, given: Given, out: Tensor) -> None:
    """A stretch of an axis is cut off; with a step its entries are fixed."""
    source = given["self"]
    nodes, d = list(trace.of(source)), place_of(source, given["dim"])
    size, length, step = source.shape[d], out.shape[d], int(given.get("step") or 1)
    if length != size:
        start = int(given.get("start") or 0)
        start = max(0, start + size) if start < 0 else min(start, size)
        if step == 1 and length > 0:
            widths = [w for w in (start, length, size - start - length) if w > 0]
            nodes[d] = cut(nodes[d], widths, "concat")[1 if start else 0]
        else:
            freeze(nodes[d])
            nodes[d] = Node(length, fixed=True)
    trace.set(out, nodes)


def split(trace: Trace, given: Given, out: Sequence[Tensor]) -> None:
    """Stretches of an axis."""
    source = given["self"]
    nodes, d = list(trace.of(source)), place_of(source, given["dim"])
    widths = [t.shape[d] for t in out]
    parts = cut(nodes[d], widths, "concat") if len(widths) > 1 and all(widths) else [nodes[d]] * len(widths)
    for result, part in zip(out, parts, strict=True):
        trace.set(result, [*nodes[:d], part, *nodes[d + 1 :]])


def cat(trace: Trace, given: Given, out: Tensor) -> None:
    """Axes one after the other; the other axes are joined."""
    d = place_of(out, given["dim"])
    sources = [trace.of(t) for t in given["tensors"] if t.ndim == out.ndim]
    for other in sources[1:]:
        for k, (x, y) in enumerate(zip(sources[0], other, strict=True)):
            if k != d:
                join(x, y)
    trace.set(out, [*sources[0][:d], concat([s[d] for s in sources]), *sources[0][d + 1 :]])


def stack(trace: Trace, given: Given, out: Tensor) -> None:
    """A new axis whose entries have their places."""
    sources = [trace.of(t) for t in given["tensors"]]
    for other in sources[1:]:
        for x, y in zip(sources[0], other, strict=True):
            join(x, y)
    nodes, d = list(sources[0]), place_of(out, given["dim"])
    nodes.insert(d, Node(len(sources), fixed=True))
    trace.set(out, nodes)


def pad(trace: Trace, given: Given, out: Tensor) -> None:
    """Constants before and after an axis; zero channels, as in parameter-free shortcuts, are all alike."""
    nodes, width = list(trace.of(given["self"])), given["pad"]
    for k in range(len(width) // 2):
        before, after, d = width[2 * k], width[2 * k + 1], len(nodes) - 1 - k
        if before < 0 or after < 0:
            freeze(nodes[d])
            nodes[d] = Node(out.shape[d], fixed=True)
        elif before or after:
            nodes[d] = concat([Node(before), nodes[d], Node(after)])
    trace.set(out, nodes)


def glu(trace: Trace, given: Given, out: Tensor) -> None:
    """One half of an axis is gated by the other, entry by entry."""
    nodes, d = list(trace.of(given["self"])), place_of(given["self"], given["dim"])
    first, second = cut(nodes[d], [out.shape[d]] * 2, "concat")
    nodes[d] = join(first, second)
    trace.set(out, nodes)


SHAPE_RULES: dict[Rule, str] = {
    glu: "glu",
    view: "view _unsafe_view reshape _reshape_alias",
    transpose: "t transpose",
    permute: "permute",
    unsqueeze: "unsqueeze",
    squeeze: "squeeze",
    expand: "expand",
    repeat: "repeat",
    select: "select unbind",
    slicing: "slice",
    split: "split split_with_sizes unsafe_split unsafe_split_with_sizes",
    cat: "cat",
    stack: "stack",
    pad: "constant_pad_nd",
}
