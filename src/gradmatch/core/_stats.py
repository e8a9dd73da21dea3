"""Streaming moments of gradients that merge across batches, shards and workers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gradmatch.core._params import ParamSpace
from gradmatch.core.checks import InputError, finite, require, whole

__all__ = ["GradStats"]


class GradStats:
    """Count, sum g, sum |g|^2 by layer and, if asked for, sum g^2 by entry, for each group; in float64.

    A layer is a block of ``space``. Statistics of disjoint data add up: ``a.merge(b)`` equals the statistics of both,
    in any order of merging to rounding.

    Args:
        space: the blocks the gradients are made of.
        groups: number of groups G.
        second: also keep sum g^2 for every entry, which ``variance`` needs.

    >>> space = ParamSpace.of({"w": torch.zeros(2)})
    >>> stats = GradStats(space).update(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    >>> stats.mean.tolist(), float(stats.norm2_mean)
    ([2.0, 0.0], 5.0)
    """

    def __init__(self, space: ParamSpace, groups: int = 1, second: bool = False) -> None:
        groups = whole("groups", groups)
        self.space = space
        self.count = torch.zeros(groups, dtype=torch.long, device=space.device)
        self.total = torch.zeros(groups, space.size, dtype=torch.float64, device=space.device)
        self.norm2 = torch.zeros(groups, len(space), dtype=torch.float64, device=space.device)
        self.square = torch.zeros_like(self.total) if second else None

    @property
    def groups(self) -> int:
        """Number of groups G."""
        return len(self.count)

    def update(self, gradients: Tensor | Mapping[str, Tensor], groups: Tensor | None = None) -> GradStats:
        """Add per-example gradients [m, P] (or named blocks [m, *shape]) with group ids [m]; returns itself."""
        if not isinstance(gradients, Tensor):
            gradients = self.space.flatten(gradients, batch_dims=1)
        require(
            gradients.ndim == 2 and gradients.shape[1] == self.space.size,
            f"gradients has shape {tuple(gradients.shape)}; it must be (m, {self.space.size}).",
        )
        rows = finite("gradients", gradients.detach()).double()
        ids = self._ids(groups, len(rows))
        self.count += torch.bincount(ids, minlength=self.groups)
        self._add(self.total, ids, rows)
        squares = rows.square()
        layers = [part.sum(1) for part in squares.split(list(self.space.numels), dim=1)]
        self.norm2.index_add_(0, ids, torch.stack(layers, 1))
        if self.square is not None:
            self._add(self.square, ids, squares)
        return self

    def update_sums(self, count: int, total: Tensor, norm2: Tensor, group: int = 0) -> GradStats:
        """Add what is already summed over ``count`` examples of one group: sum g [P] and sum |g|^2 by layer."""
        require(self.square is None, "second moments are kept; they need per-example gradients, see update.")
        require(
            total.shape == self.total.shape[1:] and norm2.shape == self.norm2.shape[1:],
            f"total and norm2 have shapes {tuple(total.shape)} and {tuple(norm2.shape)}; they must be "
            f"({self.space.size},) and ({len(self.space)},).",
        )
        self.count[group] += count
        self.total[group] += finite("total", total.detach()).double()
        self.norm2[group] += finite("norm2", norm2.detach()).double()
        return self

    def merge(self, other: GradStats) -> GradStats:
        """The statistics of both, as a new object; both must describe the same blocks and groups."""
        same = self.space.names == other.space.names and self.space.shapes == other.space.shapes
        require(same, "other is over different parameters; only statistics of the same blocks can be merged.")
        require(
            self.groups == other.groups and (self.square is None) == (other.square is None),
            f"other has {other.groups} groups, second={other.square is not None}; merging needs {self.groups} groups, "
            f"second={self.square is not None}.",
        )
        merged = GradStats(self.space, self.groups, self.square is not None)
        for name, mine in self.state_dict().items():
            getattr(merged, name).copy_(mine + other.state_dict()[name].to(mine.device))
        return merged

    @property
    def mean(self) -> Tensor:
        """Mean gradient over all groups [P]."""
        return self.total.sum(0) / self._seen()

    @property
    def norm2_mean(self) -> Tensor:
        """Mean squared norm of a gradient over all groups and layers, a scalar."""
        return self.norm2.sum() / self._seen()

    @property
    def group_mean(self) -> Tensor:
        """Mean gradient of each group [G, P]."""
        return self.total / self._seen_each()

    @property
    def group_norm2_mean(self) -> Tensor:
        """Mean squared norm by group and layer [G, L]."""
        return self.norm2 / self._seen_each()

    @property
    def variance(self) -> Tensor:
        """Variance of every entry within each group [G, P], divided by the count."""
        if self.square is None:
            raise InputError("second is False; variance needs GradStats(..., second=True).")
        return (self.square / self._seen_each() - self.group_mean.square()).clamp(min=0)

    def state_dict(self) -> dict[str, Tensor]:
        """All sums as tensors by name."""
        state = {"count": self.count, "total": self.total, "norm2": self.norm2}
        return state if self.square is None else state | {"square": self.square}

    @classmethod
    def from_state_dict(cls, space: ParamSpace, state: Mapping[str, Tensor]) -> GradStats:
        """What ``state_dict`` gave, over the same space."""
        missing = {"count", "total", "norm2"} - set(state)
        require(not missing, f"state lacks {sorted(missing)}; it must come from GradStats.state_dict().")
        stats = cls(space, len(state["count"]), "square" in state)
        for name, tensor in stats.state_dict().items():
            require(
                state[name].shape == tensor.shape,
                f"state[{name!r}] has shape {tuple(state[name].shape)}; this space needs {tuple(tensor.shape)}.",
            )
            tensor.copy_(state[name])
        return stats

    def _ids(self, groups: Tensor | None, m: int) -> Tensor:
        if groups is None:
            require(self.groups == 1, f"groups is None; with {self.groups} groups each example needs an id.")
            return torch.zeros(m, dtype=torch.long, device=self.count.device)
        require(groups.shape == (m,), f"groups has shape {tuple(groups.shape)}; it must be ({m},).")
        fits = m == 0 or (int(groups.min()) >= 0 and int(groups.max()) < self.groups)
        require(fits, f"groups has ids outside 0..{self.groups - 1}; there are {self.groups} groups.")
        return groups.long().to(self.count.device)

    def _add(self, into: Tensor, ids: Tensor, rows: Tensor) -> None:
        if self.groups == 1:
            into[0] += rows.sum(0)
        else:
            into.index_add_(0, ids, rows)

    def _seen(self) -> Tensor:
        require(bool(self.count.sum() > 0), "no gradient has been added yet; call update first.")
        return self.count.sum()

    def _seen_each(self) -> Tensor:
        empty = torch.nonzero(self.count == 0).flatten().tolist()
        require(not empty, f"groups {empty[:5]} have no example; each needs at least one.")
        return self.count[:, None]
