"""What a singular system cannot answer: cells without an equation, and constants where only differences count."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import scipy.sparse as sp
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core.krylov import LinearOperator, MatrixOperator

FLAT = 1e-10
"""Row sums up to this share of the diagonal count as zero."""


@dataclass(frozen=True)
class NullSpace:
    """``cells`` that have an equation (None: all), and orthonormal columns ``basis`` that A maps to 0."""

    cells: Bool[Tensor, " n"] | None
    basis: Float[Tensor, "n q"]

    @staticmethod
    def of(operator: LinearOperator, given: Any = None) -> NullSpace:
        """From ``given`` columns, or found in a matrix; nothing is found in an operator known by its products.

        Found are rows of zeros, and connected parts all of whose rows sum to zero (pressure without a wall at which
        it is fixed), for which constants are mapped to 0.
        """
        n = operator.shape[0]
        empty = torch.zeros(n, 0, dtype=operator.dtype, device=operator.device)
        if given is not None:
            columns = torch.as_tensor(given).to(empty)
            columns = columns[:, None] if columns.ndim == 1 else columns
            checks.require(
                columns.ndim == 2 and len(columns) == n,
                f"null_space has shape {tuple(columns.shape)}; it must be ({n},) or ({n}, q).",
            )
            basis: Tensor = torch.linalg.qr(checks.finite("null_space", columns)).Q
            gap = float(operator.matvec(basis).norm())
            checks.require(gap <= 1e-6 * _size(operator), "null_space has columns that A does not map to 0.")
            return NullSpace(None, basis)
        if not isinstance(operator, MatrixOperator):
            return NullSpace(None, empty)
        return _found(operator, empty)

    def projected(self, vectors: Float[Tensor, "n b"]) -> Float[Tensor, "n b"]:
        """Without their part in the null space."""
        if self.cells is not None:
            vectors = vectors * self.cells[:, None]
        return vectors - self.basis @ (self.basis.T @ vectors) if self.basis.shape[1] else vectors

    def answerable(self, b: Float[Tensor, "n b"], tol: float) -> Float[Tensor, "n b"]:
        """The right-hand sides in the range of A; says so where more than ``tol`` of one is taken away."""
        kept = self.projected(b)
        lost = (b - kept).norm(dim=0) / b.norm(dim=0).clamp_min(torch.finfo(b.dtype).tiny)
        if bool((lost > tol).any()):
            warnings.warn(
                f"b has {float(lost.max()):.2g} of its norm outside the range of the singular A; that part was taken "
                f"away.",
                stacklevel=3,
            )
        return kept


def _size(operator: LinearOperator) -> float:
    probe = torch.randn(operator.shape[1], generator=torch.Generator().manual_seed(0)).to(
        dtype=operator.dtype, device=operator.device
    )
    return float(operator.matvec(probe).norm() / probe.norm())


def _found(operator: MatrixOperator, empty: Tensor) -> NullSpace:
    matrix, n = operator.matrix, operator.shape[0]
    if matrix.layout == torch.strided:
        csr = sp.csr_matrix(matrix.cpu().numpy())
    else:
        parts = (matrix.values(), matrix.col_indices(), matrix.crow_indices())
        csr = sp.csr_matrix(tuple(t.cpu().numpy() for t in parts), operator.shape)
    csr.eliminate_zeros()
    filled = torch.from_numpy(csr.getnnz(1) > 0)
    _, part = sp.csgraph.connected_components(csr, directed=False)
    part, diagonal = torch.from_numpy(part).long(), torch.from_numpy(csr.diagonal())
    slack = FLAT * diagonal.abs().clamp_min(torch.finfo(diagonal.dtype).tiny)
    sums = torch.from_numpy(csr.sum(1)).flatten()
    tied = torch.zeros(int(part.max()) + 1, dtype=torch.long).index_add_(0, part, (sums.abs() > slack).long())
    free = ((tied == 0)[part] & filled).nonzero().flatten()
    cells = None if bool(filled.all()) else filled.to(empty.device)
    if not len(free):
        return NullSpace(cells, empty)
    names, column = torch.unique(part[free], return_inverse=True)
    basis = torch.zeros(n, len(names), dtype=empty.dtype)
    basis[free, column] = 1
    return NullSpace(cells, (basis / basis.norm(dim=0)).to(empty.device))
