"""Coordinate ascent on sum <A, pi(B)>: one exact assignment of a group at a time, others fixed.

With everything but group g fixed the sum is <P_g, C_g>, C_g the sum over all places of g of A B^T with that axis in
the rows and B permuted along its other axes. Three kinds of places:

- no other group on the tensor (biases, norms, first and last layers): its part of C_g never changes;
- one other group h (most weights): when h changes some of its units, only their columns enter: the part is updated
  by a product as thin as the change, so that late sweeps, in which little moves, cost little;
- more (attention, or g itself on two axes): computed anew.

A group is visited again only after a neighbour changed. What a change gains is summed in float64, for small gains
from the tensors themselves, so that the sum never falls and rounding cannot make the ascent go round in circles.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradmatch.core._axes import leaves
from gradmatch.core.assign import Occurrence, PermutationSpec, expose, linear_assignments

TOLERANCE = 1e-9
"""A group must gain more than this share of the sum's size; sums of float32 products cannot tell less apart."""
DOUBTFUL = 100
"""Gains under so many rounding errors of the scores are summed again, from the tensors in float64."""

Orders = dict[str, Tensor]


class Ascent:
    """State of one ascent: the sum's parts for every group, up to date with the present orders.

    Args:
        spec: the groups.
        a, b: state dicts; B is permuted.
        keys: names of the tensors that count.
        orders: where to start.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        a: Mapping[str, Tensor],
        b: Mapping[str, Tensor],
        keys: Collection[str],
        orders: Orders,
    ) -> None:
        self.spec, self.orders = spec, dict(orders)
        self.a, self.b = ({k: _workable(w[k]) for k in keys} for w in (a, b))
        self.places = {g: [o for o in spec.occurrences(g) if o.tensor in self.a] for g in spec.sizes}
        self.groups = [g for g, own in self.places.items() if own]
        self.coupled: set[str] = set()
        self.neighbours: dict[str, set[str]] = {g: set() for g in self.groups}
        self.kept = {g: torch.zeros(n, n, dtype=torch.float64) for g, n in spec.sizes.items()}
        self.pairs: dict[str, list[_Pair]] = {g: [] for g in self.groups}
        self.anew: dict[str, list[Occurrence]] = {g: [] for g in self.groups}
        for g in self.groups:
            for place in self.places[g]:
                self._sort(g, place)
        self.value = sum(self._inner(k, self.orders) for k in self.a)
        squares = {k: float(self.a[k].square().sum() * self.b[k].square().sum()) ** 0.5 for k in self.a}
        self.noise = {
            g: DOUBTFUL * torch.finfo(torch.float32).eps * sum(squares[o.tensor] for o in own) / spec.sizes[g]
            for g, own in self.places.items()
        }

    def _sort(self, group: str, place: Occurrence) -> None:
        """Settle of which kind a place is."""
        key = place.tensor
        others = [
            Occurrence(key, d, path)
            for d, axis in enumerate(self.spec.axes[key])
            for path, leaf in leaves(axis)
            if leaf.name is not None and (d, path) != (place.dim, place.path)
        ]
        names = [self._name(o) for o in others]
        self.neighbours[group] |= {n for n in names if n != group}
        if group in names:
            self.coupled.add(group)
        if not others:
            self.kept[group] += self._whole(place, {})
        elif len(others) == 1 and names[0] != group and others[0].dim != place.dim:
            a, b = (self._cube(w[key], place, others[0]) for w in (self.a, self.b))
            self.pairs[group].append(_Pair(a, b, names[0]))
        else:
            self.anew[group].append(place)

    def _name(self, place: Occurrence) -> str:
        axis = self.spec.axes[place.tensor][place.dim]
        return next(leaf.name for path, leaf in leaves(axis) if path == place.path and leaf.name is not None)

    def _whole(self, place: Occurrence, orders: Orders) -> Tensor:
        """A B^T with the place's axis in the rows, B permuted along all others."""
        axis = self.spec.axes[place.tensor][place.dim]
        pair = self.a[place.tensor], self.spec.permuted(place.tensor, self.b[place.tensor], orders, place)
        left, right = (
            t.movedim(d, 0).flatten(1) if t.ndim > 1 else t[:, None]
            for t, d in (expose(w, place.dim, axis, place.path) for w in pair)
        )
        return (left @ right.T).double().cpu()

    def _cube(self, tensor: Tensor, place: Occurrence, other: Occurrence) -> Tensor:
        """The tensor as (units of the other group, rest, units of this group)."""
        key = place.tensor
        first, second = sorted(
            (place, other), key=lambda o: -o.dim
        )  # the later axis first: indices stay valid
        tensor, high = expose(tensor, first.dim, self.spec.axes[key][first.dim], first.path)
        before = tensor.ndim
        tensor, low = expose(tensor, second.dim, self.spec.axes[key][second.dim], second.path)
        high += tensor.ndim - before
        mine, theirs = (high, low) if first is place else (low, high)
        return tensor.movedim((theirs, mine), (0, -1)).reshape(tensor.shape[theirs], -1, tensor.shape[mine])

    def _inner(self, key: str, orders: Orders) -> float:
        return float((self.a[key].double() * self.spec.permuted(key, self.b[key], orders).double()).sum())

    def gain(self, group: str, new: Tensor, scores: Tensor) -> float:
        """What the sum gains when ``group`` takes the order ``new``."""
        old = self.orders[group]
        rows = torch.nonzero(new != old).flatten()
        found = float((scores[rows, new[rows]] - scores[rows, old[rows]]).sum())
        if group not in self.coupled and found > self.noise[group] * len(rows) ** 0.5:
            return found
        changed, keys = self.orders | {group: new}, {o.tensor for o in self.places[group]}
        return sum(self._inner(k, changed) - self._inner(k, self.orders) for k in keys)

    def scores(self, group: str) -> Tensor:
        """The group's C (n, n) at the present orders, float64; changed in place by the next call."""
        kept = self.kept[group]
        for pair in self.pairs[group]:
            pair.update(kept, self.orders[pair.other])
        for place in self.anew[group]:
            kept = kept + self._whole(place, self.orders)
        return kept

    def visit(self, groups: Sequence[str]) -> list[str]:
        """Give each of some groups, no two of them neighbours, its best order; those that this changed."""
        scores = [self.scores(g) for g in groups]
        moved = []
        for group, own, new in zip(groups, scores, linear_assignments(scores), strict=True):
            if torch.equal(new, self.orders[group]):
                continue
            gained = self.gain(group, new, own)
            if gained > TOLERANCE * abs(self.value):
                self.orders[group], self.value = new, self.value + gained
                moved.append(group)
        return moved

    def run(
        self,
        max_sweeps: int,
        sequence: Callable[[int], Sequence[int]],
        progress: Callable[[int, float], Any] | None = None,
    ) -> int:
        """Sweep until nothing gains, each time over the groups in the order that ``sequence(how many)`` gives.

        Returns the number of sweeps, the last of which changed nothing.
        """
        stale = set(self.groups)
        for sweep in range(1, max_sweeps + 1):
            before = self.value
            for level in self._levels(sequence(len(self.groups))):
                due = [g for g in level if g in stale]
                stale.difference_update(due)
                for group in self.visit(due):
                    stale |= self.neighbours[group] | ({group} & self.coupled)
            if progress is not None:
                progress(sweep, self.value)
            if self.value == before:
                return sweep
        return max_sweeps

    def _levels(self, sequence: Sequence[int]) -> list[list[str]]:
        """A sequence of groups cut into sets that can be visited side by side, with the result of one by one.

        A group only depends on its neighbours: it comes after those that stand before it in the sequence.
        """
        at: dict[str, int] = {}
        for k in sequence:
            group = self.groups[k]
            at[group] = 1 + max((at.get(n, -1) for n in self.neighbours[group]), default=-1)
        return [[g for g in at if at[g] == level] for level in range(max(at.values(), default=-1) + 1)]


class _Pair:
    """A place with one other group on its tensor: its part of the scores, for the order that was last asked for."""

    def __init__(self, a: Tensor, b: Tensor, other: str) -> None:
        self.a, self.b, self.other = a.contiguous(), b.contiguous(), other
        self.order: Tensor | None = None

    def update(self, scores: Tensor, order: Tensor) -> None:
        """Bring ``scores`` from the last order of the other group to ``order``."""
        if self.order is None:
            scores += self._product(self.a, self.b[order])
        else:
            changed = torch.nonzero(order != self.order).flatten()
            if len(changed):
                rows = self.b[order[changed]] - self.b[self.order[changed]]
                scores += self._product(self.a[changed], rows)
        self.order = order

    @staticmethod
    def _product(a: Tensor, b: Tensor) -> Tensor:
        return (a.reshape(-1, a.shape[-1]).T @ b.reshape(-1, b.shape[-1])).cpu()


def _workable(tensor: Tensor) -> Tensor:
    """float32, or float64 as it is: products of half precision lose what decides an assignment."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
