"""What a permutation does to one axis of a parameter: a small tree of factors and stretches.

An axis of n entries is a :class:`Leaf` (a named group of units, or fixed), a :class:`Product` (the first part is the
slowest index: channels x pixels of a flattened map, heads x their width) or a :class:`Concat` (stretches one after
the other: fused query, key and value). A permutation gives every named group an order, and through the tree every
axis an index.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradmatch.core import checks

Order = Mapping[str, Tensor]
"""For each group, which old unit stands at each new place (n,)."""


@dataclass(frozen=True)
class Leaf:
    """``size`` entries permuted as the group ``name``, or fixed."""

    size: int
    name: str | None = None


@dataclass(frozen=True)
class Product:
    """Every combination of its parts' entries, the last part's running fastest."""

    parts: tuple[Axis, ...]

    @property
    def size(self) -> int:
        """Entries in all."""
        return math.prod(p.size for p in self.parts)


@dataclass(frozen=True)
class Concat:
    """Its parts' entries one after the other."""

    parts: tuple[Axis, ...]

    @property
    def size(self) -> int:
        """Entries in all."""
        return sum(p.size for p in self.parts)


Axis = Leaf | Product | Concat
Path = tuple[int, ...]
"""The way from an axis to one of its leaves: the place of the part at each level."""


def leaves(axis: Axis, path: Path = ()) -> Iterator[tuple[Path, Leaf]]:
    """Every leaf with the way to it."""
    if isinstance(axis, Leaf):
        yield path, axis
    else:
        for k, part in enumerate(axis.parts):
            yield from leaves(part, (*path, k))


def index(axis: Axis, order: Order, skip: Path | None = None) -> Tensor | None:
    """Which old entry stands at each new place (n,), or None where nothing moves; the leaf at ``skip`` stays."""
    if isinstance(axis, Leaf):
        return None if skip == () or axis.name is None else order.get(axis.name)
    below = [
        index(part, order, skip[1:] if skip is not None and skip[0] == k else None)
        for k, part in enumerate(axis.parts)
    ]
    if all(b is None for b in below):
        return None
    filled = [torch.arange(p.size) if b is None else b.cpu() for p, b in zip(axis.parts, below, strict=True)]
    found, at = torch.zeros(1, dtype=torch.long), 0
    if isinstance(axis, Product):
        for part, own in zip(axis.parts, filled, strict=True):
            found = (found[:, None] * part.size + own).flatten()
        return found
    stretches = []
    for part, own in zip(axis.parts, filled, strict=True):
        stretches.append(own + at)
        at += part.size
    return torch.cat(stretches)


def expose(tensor: Tensor, dim: int, axis: Axis, path: Path) -> tuple[Tensor, int]:
    """A view of ``tensor`` in which one leaf of its axis ``dim`` is a dimension of its own, and which."""
    for k in path:
        assert not isinstance(axis, Leaf)
        sizes = [p.size for p in axis.parts]
        if isinstance(axis, Product):
            tensor, dim = tensor.unflatten(dim, sizes), dim + k
        else:
            tensor = tensor.narrow(dim, sum(sizes[:k]), sizes[k])
        axis = axis.parts[k]
    return tensor, dim


def multiply(tensor: Tensor, dim: int, axis: Axis, matrices: Mapping[str, Tensor]) -> Tensor:
    """``tensor`` with a matrix (n, n) of each group applied along its leaves of axis ``dim``; differentiable."""
    if isinstance(axis, Leaf):
        if axis.name is None or axis.name not in matrices:
            return tensor
        return torch.tensordot(tensor, matrices[axis.name], dims=([dim], [1])).movedim(-1, dim)
    sizes = [p.size for p in axis.parts]
    if isinstance(axis, Product):
        tensor = tensor.unflatten(dim, sizes)
        for k, part in enumerate(axis.parts):
            tensor = multiply(tensor, dim + k, part, matrices)
        return tensor.flatten(dim, dim + len(sizes) - 1)
    split = tensor.split(sizes, dim)
    return torch.cat([multiply(t, dim, p, matrices) for t, p in zip(split, axis.parts, strict=True)], dim)


def to_json(axis: Axis) -> Any:
    """An axis as JSON values; see :func:`from_json`."""
    if isinstance(axis, Leaf):
        return axis.size if axis.name is None else {"group": axis.name, "size": axis.size}
    return {type(axis).__name__.lower(): [to_json(p) for p in axis.parts]}


def from_json(value: Any) -> Axis:
    """The axis that :func:`to_json` wrote."""
    if isinstance(value, int):
        return Leaf(value)
    if "group" in value:
        return Leaf(int(value["size"]), str(value["group"]))
    (kind, parts), *_ = value.items()
    checks.one_of("axis", kind, ("product", "concat"))
    below = tuple(from_json(p) for p in parts)
    return Product(below) if kind == "product" else Concat(below)


def parse(entry: Any, size: int, known: dict[str, int], where: str) -> Axis:
    """An axis as written by hand.

    Args:
        entry: a group's name, None (fixed), a whole number (fixed, of that size), a tuple of entries (product) or a
            list of entries (concat). Of the sizes in a tuple or list at most one may be unknown.
        size: entries of the axis.
        known: sizes of the groups met so far; this axis's are added.
        where: the axis in words, for the error.
    """
    if entry is None or isinstance(entry, str | int):
        if isinstance(entry, str):
            checks.require(
                known.setdefault(entry, size) == size,
                f"axes: {where} gives group {entry!r} {size} units; it has {known[entry]} elsewhere.",
            )
        checks.require(not isinstance(entry, int) or entry == size, f"axes: {where} has {size}, not {entry}.")
        return Leaf(size, entry if isinstance(entry, str) else None)
    checks.require(
        isinstance(entry, tuple | list) and len(entry) > 0,
        f"axes: {where} is {entry!r}; an axis is a name, None, a whole number, or a tuple or list of those.",
    )
    sizes = [_known_size(e, known) for e in entry]
    given = [s for s in sizes if s is not None]
    rest = size // math.prod(given) if isinstance(entry, tuple) else size - sum(given)
    total = math.prod([*given, rest]) if isinstance(entry, tuple) else size
    unknown = len(sizes) - len(given)
    fits = unknown <= 1 and total == size and (rest > 0 if unknown else rest == isinstance(entry, tuple))
    checks.require(fits, f"axes: {where} of {size} entries cannot be cut as {entry!r}.")
    parts = tuple(parse(e, rest if s is None else s, known, where) for e, s in zip(entry, sizes, strict=True))
    return Product(parts) if isinstance(entry, tuple) else Concat(parts)


def _known_size(entry: Any, known: Mapping[str, int]) -> int | None:
    if isinstance(entry, int):
        return entry
    if isinstance(entry, str):
        return known.get(entry)
    if isinstance(entry, tuple | list):
        below = [_known_size(e, known) for e in entry]
        if any(b is None for b in below):
            return None
        whole = [b for b in below if b is not None]
        return math.prod(whole) if isinstance(entry, tuple) else sum(whole)
    return None
