"""The observed entries of a matrix, read from what users have, and the same entries ordered for one half of a sweep."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradmatch.core import checks

BLOCK_BYTES = 2**22
"""Size of one padded batch of regressions: it stays in a cache of a few megabytes."""


@dataclass(frozen=True)
class Entries:
    """Observed entries of a matrix of ``shape`` (m, n), ordered by row and then by column, none of them twice."""

    rows: Int[Tensor, " N"]
    cols: Int[Tensor, " N"]
    values: Float[Tensor, " N"]
    shape: tuple[int, int]

    def __len__(self) -> int:
        return len(self.values)

    def take(self, index: Tensor) -> Entries:
        """The entries of those numbers, which must ascend."""
        return Entries(self.rows[index], self.cols[index], self.values[index], self.shape)

    def sides(self) -> tuple[Side, Side]:
        """The two halves: a regression for every column on the rows' factors, and one for every row."""
        m, n = self.shape
        by_row, order = Side(self.rows, self.cols, self.values, m, n), self._by_column()
        return Side(self.cols[order], self.rows[order], self.values[order], n, m), by_row

    def _by_column(self) -> Tensor:
        """Numbers of the entries ordered by column and then by row."""
        if self.cols.device.type != "cpu":
            return torch.argsort(self.cols, stable=True)
        ends = np.searchsorted(
            self.rows.numpy(), np.arange(self.shape[0] + 1)
        )  # scipy counts where torch would sort
        numbered = sp.csr_matrix((np.arange(len(self)), self.cols.numpy(), ends), self.shape)
        return torch.from_numpy(numbered.tocsc().data)


class Side:
    """One half of a sweep: ``count`` regressions at once, min_v sum_i (<u_i, v> - M_ij)^2 over the i observed with j.

    Entries are ordered by regression (``owner``); ``index`` names the row of the fixed factor, of ``width`` rows.
    Kept as the pattern of a compressed sparse matrix (count, width), on which the two products that everything is
    made of are one pass each: sampled products <u_i, v_j> on the pattern, and sums over the pattern.
    """

    def __init__(self, owner: Tensor, index: Tensor, values: Tensor, count: int, width: int) -> None:
        self.owner, self.index, self.values = owner, index, values
        self.count, self.width = count, width
        self.counts = torch.bincount(owner, minlength=count)
        self.offsets = torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)])
        self._blocks: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._parts: dict[int, tuple[Part, Part]] = {}

    def matrix(self, values: Float[Tensor, " N"]) -> Tensor:
        """The sparse matrix (count, width) with these values on the pattern."""
        _silence_beta_warning()
        return torch.sparse_csr_tensor(
            self.offsets, self.index, values, size=(self.count, self.width), check_invariants=False
        )

    def products(self, fixed: Float[Tensor, "w k"], free: Float[Tensor, "c k"]) -> Float[Tensor, " N"]:
        """<u_i, v_j> for every entry."""
        pattern = self.matrix(fixed.new_zeros(len(self.index)))
        found: Tensor = torch.sparse.sampled_addmm(pattern, free, fixed.T, beta=0.0).values()
        return found

    def residual(self, fixed: Float[Tensor, "w k"], free: Float[Tensor, "c k"]) -> Float[Tensor, " N"]:
        """M_ij - <u_i, v_j> for every entry."""
        given = self.matrix(self.values)
        found: Tensor = torch.sparse.sampled_addmm(given, free, fixed.T, beta=1.0, alpha=-1.0).values()
        return found

    def gather(self, values: Float[Tensor, " N"], fixed: Float[Tensor, "w k"]) -> Float[Tensor, "c k"]:
        """sum_i values_ij u_i for every regression j."""
        return self.matrix(values) @ fixed

    def parted(self, most: int) -> tuple[Part, Part]:
        """Regressions with up to ``most`` entries, and those with more."""
        if most not in self._parts:
            small = self.counts <= most
            self._parts[most] = Part.of(self, small), Part.of(self, ~small)
        return self._parts[most]

    def blocks(self, rank: int, extra: int = 0) -> list[tuple[Tensor, Tensor]]:
        """Batches of regressions as (which [b], index [b, longest]); an absent entry is numbered ``width``.

        ``extra`` numbers are reserved for each entry of the batch besides its row of the factor.
        """
        key = rank + extra
        if key not in self._blocks:
            self._blocks[key] = list(self._cut(key))
        return self._blocks[key]

    def _cut(self, numbers: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.argsort(self.counts, descending=True)
        lengths = self.counts[order].tolist()
        start = 0
        while start < self.count and lengths[start]:  # a regression without entries is in no block
            size = max(1, BLOCK_BYTES // (lengths[start] * numbers * self.values.element_size()))
            which = order[start : start + size]
            place = torch.arange(lengths[start], device=order.device)
            there = place < self.counts[which, None]
            index = self.index[(self.offsets[which, None] + place).clamp_max(len(self.index) - 1)]
            yield which, torch.where(there, index, self.width)
            start += size


@dataclass(frozen=True)
class Part:
    """Some regressions of a side as a side of their own, and where they and their entries stand in the whole."""

    side: Side
    which: Tensor | slice
    entries: Tensor | slice

    @staticmethod
    def of(side: Side, chosen: Tensor) -> Part:
        """The part of the regressions marked in ``chosen``, bool [count]."""
        if bool(chosen.all()):
            return Part(side, slice(None), slice(None))
        entries = chosen[side.owner].nonzero().flatten()
        renamed = (chosen.cumsum(0) - 1)[side.owner[entries]]
        own = Side(renamed, side.index[entries], side.values[entries], int(chosen.sum()), side.width)
        return Part(own, chosen.nonzero().flatten(), entries)


@functools.cache
def _silence_beta_warning() -> None:
    """PyTorch warns once a process that its CSR layout is in beta; let that happen here, unseen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), size=(1, 1))


def as_entries(X: Any, cols: Any, values: Any, shape: Any, dtype: torch.dtype, device: Any = None) -> Entries:
    """Read coordinates and values, or a matrix, as :class:`Entries`.

    Args:
        X: row numbers, with ``cols``, ``values`` and perhaps ``shape``; or alone: a scipy sparse matrix or a torch
            sparse tensor, whose stored entries are the observed ones (stored zeros too), a dense array or tensor
            with NaN where nothing was observed, or a NumPy masked array, whose masked entries were not.

    Raises:
        InputError: coordinates outside the shape or twice, values that are not finite, or nothing observed.
    """
    if cols is not None or values is not None:
        checks.require(
            cols is not None and values is not None,
            "cols and values go together: fit(rows, cols, values, shape), or fit(X) with a matrix.",
        )
        rows, cols = whole_numbers("rows", X), whole_numbers("cols", cols)
        values = torch.as_tensor(values)
        checks.same_length("rows", rows, "cols", cols)
        checks.same_length("rows", rows, "values", values)
        if shape is None and len(rows):
            shape = (int(rows.max()) + 1, int(cols.max()) + 1)
    else:
        checks.require(shape is None, "shape is given with a matrix, which has its own.")
        rows, cols, values, shape = _of_matrix(X)
    checks.require(len(rows) > 0, "the matrix has no observed entry; at least one is needed.")
    checks.require(
        isinstance(shape, Sequence) and len(shape) == 2, f"shape is {shape!r}; it must be (rows, columns)."
    )
    device = values.device if device is None else torch.device(device)
    rows, cols, values = (t.to(device) for t in (rows, cols, values.detach().to(dtype)))
    checks.finite("values", values)
    return _ordered(rows, cols, values, (int(shape[0]), int(shape[1])))


def require_identifiable(
    entries: Entries,
    rank: int,
    ridge: float,
    *,
    names: Sequence[str] = ("row", "column"),
    split: bool = False,
) -> None:
    """Refuse what a matrix of that rank cannot be recovered from, and warn where there are too few entries in all.

    Raises:
        InputError: a rank above the smaller side, or without a ridge a row or column with fewer than ``rank`` entries.
    """
    (m, n), part = entries.shape, " of a part (split)" if split else ""
    both = len(names) > 1
    checks.require(
        rank <= (min(m, n) if both else n),
        f"rank is {rank}; it must be at most min{(m, n)} = {min(m, n)}.",
    )
    for name, numbers, size in (("row", entries.rows, m), ("column", entries.cols, n)):
        counts = torch.bincount(numbers, minlength=size)
        short = (counts < rank).nonzero().flatten().tolist()
        if name in names and short and ridge == 0:
            checks.refuse(
                f"{len(short)} {name}s{part} have fewer than rank {rank} observed entries ({name} {short[0]} has "
                f"{int(counts[short[0]])}), so that their factors are not determined; lower the rank, leave them "
                f"out or set ridge above 0."
            )
    free = rank * (m + n - rank)
    if both and len(entries) < free:
        warnings.warn(
            f"{len(entries)} observed entries{part} are fewer than the {free} degrees of freedom of a matrix of rank "
            f"{rank}; the data do not determine it.",
            stacklevel=3,
        )


def whole_numbers(name: str, numbers: Any) -> Tensor:
    """Coordinates as a long tensor (N,)."""
    found = torch.as_tensor(numbers)
    checks.require(
        found.ndim == 1 and not found.is_floating_point() and found.dtype != torch.bool,
        f"{name} is {found.dtype} of shape {tuple(found.shape)}; it must be whole numbers of shape (N,).",
    )
    return found.long()


def _of_matrix(X: Any) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    if sp.issparse(X):
        coo = X.tocoo()
        return (
            whole_numbers("rows", coo.row),
            whole_numbers("cols", coo.col),
            torch.as_tensor(coo.data),
            coo.shape,
        )
    if isinstance(X, Tensor) and X.layout != torch.strided:
        given: Any = X if X.layout == torch.sparse_coo else X.to_sparse_coo()  # type: ignore[no-untyped-call]
        rows, cols = given._indices()  # unlike indices(), does not add up duplicates before they are seen
        return rows, cols, given._values(), tuple(X.shape)
    dense = X if isinstance(X, Tensor) else torch.as_tensor(_array(X))
    checks.require(
        dense.ndim == 2 and dense.is_floating_point(),
        f"X is {dense.dtype} of shape {tuple(dense.shape)}; it must be a matrix of floats with NaN where unobserved.",
    )
    rows, cols = (~dense.isnan()).nonzero(as_tuple=True)
    return rows, cols, dense[rows, cols], tuple(dense.shape)


def _array(X: Any) -> np.ndarray:
    """A NumPy array that torch may share, NaN where a masked one is masked."""
    if isinstance(X, np.ma.MaskedArray):
        floats: Any = X if np.issubdtype(X.dtype, np.inexact) else X.astype(np.float64)
        return np.asarray(floats.filled(np.nan))
    array = np.asarray(X)
    return array if array.flags.writeable else array.copy()


def _ordered(rows: Tensor, cols: Tensor, values: Tensor, shape: tuple[int, int]) -> Entries:
    for name, numbers, size in (("rows", rows, shape[0]), ("cols", cols, shape[1])):
        low, high = int(numbers.min()), int(numbers.max())
        checks.require(
            low >= 0 and high < size,
            f"{name} runs from {low} to {high}; it must lie in 0..{size - 1} for shape {shape}.",
        )
    key = rows * shape[1] + cols
    if bool((key.diff() > 0).all()):  # in order and none twice, as most come
        return Entries(rows, cols, values, shape)
    key, order = torch.sort(key)
    twice = (key.diff() == 0).nonzero().flatten()
    if len(twice):
        at = divmod(int(key[twice[0]]), shape[1])
        checks.refuse(
            f"values has {len(twice)} entries at coordinates given before, the first at {at}; each may come once."
        )
    return Entries(rows[order], cols[order], values[order], shape)
