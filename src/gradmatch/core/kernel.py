"""Similarities between items: a matrix, feature rows with a linear kernel, or a function of two blocks of rows.

A kernel is rectangular, [items, candidates]. It answers in two precisions: ``block`` and ``row`` in the
precision of its source, for bulk work, and ``exact`` in float64, for decisions. With feature rows the full
matrix is built only when it fits a stated number of bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from gradmatch.core import checks

BlockKernel = Callable[[Tensor, Tensor], Tensor]
"""Similarities [a, b] of feature rows [a, m] and [b, m]."""

KernelName = Literal["cosine", "dot"] | BlockKernel
Kind = Literal["similarity", "features"]

_ROWS_AT_ONCE = 4096
_PRODUCT_BLOCK = 1024
_COLUMNS_ONE_BY_ONE = 8


def as_float(name: str, source: Any) -> Tensor:
    """``source`` as a finite float32 or float64 tensor on its own device."""
    tensor = source.detach() if isinstance(source, Tensor) else torch.as_tensor(source)
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.to(torch.float32)
    if tensor.numel() and bool(torch.isfinite(tensor.sum())):  # one pass, where looking at each takes three
        return tensor
    return checks.finite(name, tensor)


def unit_rows(features: Tensor, name: str = "features") -> Tensor:
    """Feature rows [n, m] scaled to length one; rows of zeros have no direction and are refused."""
    return features / _row_norms(features, name).to(features.dtype)


def _row_norms(features: Tensor, name: str = "features") -> Tensor:
    """Lengths [n, 1] in float64, none of them zero."""
    norms = torch.cat([part.double().norm(dim=1, keepdim=True) for part in features.split(_ROWS_AT_ONCE)])
    zero = torch.nonzero(norms.flatten() == 0).flatten().tolist()
    checks.require(
        not zero,
        f"{name} has only zeros in row {checks.listing(zero)}; cosine similarity needs nonzero rows.",
    )
    return norms


def _own_products(rows: Tensor) -> Tensor:
    """``rows @ rows.T`` by blocks of one triangle, copied to the other: half the work, and symmetric to the bit."""
    out = rows.new_empty(len(rows), len(rows))
    pieces = [slice(s, s + _PRODUCT_BLOCK) for s in range(0, len(rows), _PRODUCT_BLOCK)]
    for k, upper in enumerate(pieces):
        for left in pieces[: k + 1]:
            block = rows[upper] @ rows[left].T
            out[upper, left] = block
            if left != upper:
                out[left, upper] = block.T
    return out


class Kernel(ABC):
    """Similarities s(i, c) of ``items`` items and ``columns`` candidates."""

    items: int
    columns: int
    device: torch.device
    exact_blocks: bool
    """Whether ``row`` and ``whole`` hold the very values of ``exact``, so that no answer needs confirming."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The working precision of ``block``."""

    @abstractmethod
    def block(self, rows: Tensor, columns: slice) -> Tensor:
        """Fresh memory [rows, columns] in the working precision; the caller may overwrite it."""

    @abstractmethod
    def row(self, item: int) -> Tensor:
        """Similarities [columns] of one item with all candidates, in the precision of the source."""

    @abstractmethod
    def whole(self, columns: Tensor) -> Tensor:
        """Similarities [items, len(columns)] of a few candidates, in the precision of the source."""

    @abstractmethod
    def exact(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Similarities [len(rows), len(columns)] in float64."""

    @abstractmethod
    def sums(self, weights: Tensor) -> Tensor:
        """Weighted sums over the items, float64 [columns]."""

    @property
    def nonnegative(self) -> bool:
        """Whether it is known that no similarity is below zero."""
        return False


class MatrixKernel(Kernel):
    """A similarity matrix that exists already; row i belongs to item i, column j to candidate j.

    Blocks of a float64 matrix come from a float32 copy, made at the first use, if that fits ``copy_limit`` bytes
    and float32 can hold the values.
    """

    exact_blocks = True

    def __init__(self, matrix: Tensor, candidates: Tensor | None = None, copy_limit: int = 0) -> None:
        self.matrix = matrix if candidates is None else matrix[:, candidates]
        self.items, self.columns = self.matrix.shape
        self.device = matrix.device
        self._copy_limit = copy_limit

    @cached_property
    def bulk(self) -> Tensor:
        """The matrix in the precision of bulk work."""
        if self.matrix.dtype == torch.float64 and 4 * self.matrix.numel() <= self._copy_limit:
            copy = self.matrix.float()
            if bool(torch.isfinite(copy.sum())):
                return copy
        return self.matrix

    @property
    def dtype(self) -> torch.dtype:
        return self.bulk.dtype

    def block(self, rows: Tensor, columns: slice) -> Tensor:
        return self.bulk[:, columns].index_select(0, rows)

    def row(self, item: int) -> Tensor:
        return self.matrix[item]

    def whole(self, columns: Tensor) -> Tensor:
        if len(columns) > _COLUMNS_ONE_BY_ONE:
            return self.matrix.index_select(1, columns)
        return torch.stack([self.matrix[:, c] for c in columns.tolist()]).T

    def exact(self, rows: Tensor, columns: Tensor) -> Tensor:
        return self.matrix[rows[:, None], columns].double()

    def sums(self, weights: Tensor) -> Tensor:
        total = torch.zeros(self.columns, dtype=torch.float64, device=self.device)
        for rows in torch.arange(self.items, device=self.device).split(_ROWS_AT_ONCE):
            total += weights[rows] @ self.matrix[rows[0] : rows[-1] + 1].double()
        return total

    @property
    def nonnegative(self) -> bool:
        return float(self.matrix.min()) >= 0


class LinearKernel(Kernel):
    """s(i, c) = offset + scale <f_i, f_c> of feature rows; never n x n unless that fits ``gram_limit`` bytes.

    With ``unit`` the rows count as scaled to length one. The float64 answers scale the given rows in float64,
    so that s(i, i) is one and s(i, j) = s(j, i) to float64 rounding also for float32 features.
    """

    def __init__(
        self,
        features: Tensor,
        candidates: Tensor | None = None,
        *,
        offset: float = 0.0,
        scale: float = 1.0,
        gram_limit: int = 0,
        unit: bool = False,
    ) -> None:
        self.given, self.candidates = features, candidates
        self.norms = _row_norms(features) if unit else None
        self.features = unit_rows(features) if unit else features
        self.chosen = self.features if candidates is None else self.features[candidates]
        self.offset, self.scale = offset, scale
        self.items, self.columns = len(features), len(self.chosen)
        self.device = features.device
        self.exact_blocks = features.dtype == torch.float64
        self.gram: Tensor | None = None
        if self.items * self.columns * features.element_size() <= gram_limit:
            product = _own_products(self.features) if candidates is None else self.features @ self.chosen.T
            self.gram = self._affine(product)

    @property
    def dtype(self) -> torch.dtype:
        return self.features.dtype

    def _affine(self, products: Tensor) -> Tensor:
        if self.scale != 1.0:
            products.mul_(self.scale)
        return products.add_(self.offset) if self.offset else products

    def block(self, rows: Tensor, columns: slice) -> Tensor:
        if self.gram is not None:
            return self.gram[:, columns].index_select(0, rows)
        return self._affine(self.features.index_select(0, rows) @ self.chosen[columns].T)

    def row(self, item: int) -> Tensor:
        if self.gram is not None:
            return self.gram[item]
        return self._affine(self.chosen @ self.features[item])

    def doubled(self, items: Tensor | slice) -> Tensor:
        """Feature rows of ``items`` in float64."""
        rows = self.given[items].double()
        return rows if self.norms is None else rows / self.norms[items]

    def _pieces(self) -> list[slice]:
        return [slice(s, s + _ROWS_AT_ONCE) for s in range(0, self.items, _ROWS_AT_ONCE)]

    def whole(self, columns: Tensor) -> Tensor:
        if self.gram is not None:  # rows lie together in memory, and the matrix of all with all is symmetric
            return self.gram[columns].T if self.candidates is None else self.gram.index_select(1, columns)
        return self._affine(self.features @ self.chosen.index_select(0, columns).T)

    def exact(self, rows: Tensor, columns: Tensor) -> Tensor:
        names = columns if self.candidates is None else self.candidates[columns]
        chosen = self.doubled(names).T
        parts = [self._affine(self.doubled(part) @ chosen) for part in rows.split(_ROWS_AT_ONCE)]
        return torch.cat(parts)

    def sums(self, weights: Tensor) -> Tensor:
        every = torch.arange(self.columns, device=self.device)
        return self.project(self.weighted_features(weights), float(weights.sum()), every)

    def weighted_features(self, weights: Tensor) -> Tensor:
        """sum_i w_i f_i in float64."""
        total = torch.zeros(self.given.shape[1], dtype=torch.float64, device=self.device)
        for piece in self._pieces():
            total += weights[piece] @ self.doubled(piece)
        return total

    def project(self, vector: Tensor, count: float, columns: Tensor) -> Tensor:
        """offset * count + scale <vector, f_c> in float64: similarities with a weighted sum of items."""
        names = columns if self.candidates is None else self.candidates[columns]
        products = torch.cat([self.doubled(part) @ vector for part in names.split(_ROWS_AT_ONCE)])
        return products.mul_(self.scale).add_(self.offset * count)

    @property
    def nonnegative(self) -> bool:
        return self.norms is not None and self.offset >= abs(self.scale)


class FunctionKernel(Kernel):
    """Any similarity given as a function of two blocks of feature rows, evaluated block by block."""

    exact_blocks = False

    def __init__(self, function: BlockKernel, features: Tensor, candidates: Tensor | None = None) -> None:
        self.function, self.features = function, features
        self.chosen = features if candidates is None else features[candidates]
        self.items, self.columns = len(features), len(self.chosen)
        self.device = features.device

    @property
    def dtype(self) -> torch.dtype:
        return self.features.dtype

    def _call(self, a: Tensor, b: Tensor) -> Tensor:
        found = self.function(a, b)
        checks.require(
            isinstance(found, Tensor) and found.shape == (len(a), len(b)),
            f"kernel gave {getattr(found, 'shape', type(found).__name__)} for {len(a)} and {len(b)} rows; "
            f"it must give a tensor of shape ({len(a)}, {len(b)}).",
        )
        return checks.finite("kernel", found).clone()

    def block(self, rows: Tensor, columns: slice) -> Tensor:
        return self._call(self.features.index_select(0, rows), self.chosen[columns])

    def row(self, item: int) -> Tensor:
        return self._call(self.features[item : item + 1].double(), self.chosen.double())[0]

    def whole(self, columns: Tensor) -> Tensor:
        return self._call(self.features, self.chosen.index_select(0, columns))

    def exact(self, rows: Tensor, columns: Tensor) -> Tensor:
        if not len(rows):
            return torch.zeros(0, len(columns), dtype=torch.float64, device=self.device)
        return self._call(self.features[rows].double(), self.chosen.index_select(0, columns).double())

    def sums(self, weights: Tensor) -> Tensor:
        total = torch.zeros(self.columns, dtype=torch.float64, device=self.device)
        chosen = self.chosen.double()
        for w, rows in zip(weights.split(256), self.features.split(256), strict=True):
            total += w @ self._call(rows.double(), chosen)
        return total


def as_kernel(
    source: Any,
    kind: Kind = "similarity",
    kernel: KernelName = "cosine",
    candidates: Tensor | None = None,
    gram_limit: int = 2**28,
) -> Kernel:
    """Read a similarity matrix [n, n] or feature rows [n, m] as a kernel.

    Args:
        source: array or tensor; float32 and float64 keep their precision, anything else becomes float32.
        kind: what ``source`` is.
        kernel: for features: ``"cosine"`` is (1 + cos) / 2 in [0, 1], ``"dot"`` the inner product, or a
            function of two blocks of rows.
        candidates: columns to keep; default all.
        gram_limit: bytes up to which the matrix of a named kernel is built (0 never builds it), or a float64 matrix
            is copied to float32 for bulk work.

    Raises:
        InputError: wrong shape, NaN or infinity, zero rows under ``"cosine"``.
    """
    checks.one_of("kind", kind, ("similarity", "features"))
    tensor = as_float("similarity" if kind == "similarity" else "features", source)
    shape = tuple(tensor.shape)
    if kind == "similarity":
        checks.require(
            tensor.ndim == 2 and shape[0] == shape[1] and shape[0] > 0,
            f"similarity is of shape {shape}; it must be (n, n), or pass kind='features' for feature rows.",
        )
        return MatrixKernel(tensor, candidates, gram_limit)
    checks.require(tensor.ndim == 2 and min(shape) > 0, f"features is of shape {shape}; it must be (n, m).")
    if callable(kernel):
        return FunctionKernel(kernel, tensor, candidates)
    checks.one_of("kernel", kernel, ("cosine", "dot"))
    if kernel == "dot":
        return LinearKernel(tensor, candidates, gram_limit=gram_limit)
    return LinearKernel(tensor, candidates, offset=0.5, scale=0.5, gram_limit=gram_limit, unit=True)
