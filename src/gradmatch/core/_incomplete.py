"""Incomplete Cholesky without fill, a preconditioner for sparse matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import splu
from torch import Tensor

from gradmatch.core._operators import MatrixOperator, as_operator, square
from gradmatch.core.checks import InputError, require

__all__ = ["incomplete_cholesky"]


def incomplete_cholesky(A: Any) -> Callable[[Tensor], Tensor]:
    """r -> (L L^T)^-1 r with L lower triangular on the pattern of A and (L L^T)_ij = A_ij there: IC(0).

    Made row by row in Python (a second for 200,000 entries) and applied by SuperLU's triangular solves, on the CPU.
    Rows of zeros are left alone. It exists for M-matrices, such as discrete Laplacians (Meijerink, van der Vorst 1977).

    Raises:
        InputError: A known by its products only, not symmetric, or with a pivot that is not above zero.

    >>> A = sp.diags([2.0, -1.0, -1.0], [0, 1, -1], shape=(5, 5)).tocsr()
    >>> bool(torch.allclose(incomplete_cholesky(A)(torch.from_numpy(A @ np.ones(5))), torch.ones(5).double()))
    True
    """
    operator = square(as_operator(A))
    if not isinstance(operator, MatrixOperator):
        raise InputError("A is known by its products only; incomplete_cholesky needs a matrix.")
    # without fill the triangle is its own factor: SuperLU, told not to reorder or pivot, only solves with it
    triangle = splu(
        _factor(_lower(operator)).tocsc(), "NATURAL", diag_pivot_thresh=0.0, options={"SymmetricMode": True}
    )

    def apply(r: Tensor) -> Tensor:
        columns = r.detach().cpu().double().numpy()
        return torch.from_numpy(triangle.solve(triangle.solve(columns), "T")).to(r)

    return apply


def _lower(operator: MatrixOperator) -> sp.csr_matrix:
    matrix = operator.matrix.cpu().double()
    if matrix.layout == torch.strided:
        return sp.tril(sp.csr_matrix(matrix.numpy()), format="csr")
    parts = (matrix.values().numpy(), matrix.col_indices().numpy(), matrix.crow_indices().numpy())
    lower = sp.tril(sp.csr_matrix(parts, operator.shape), format="csr")
    lower.sort_indices()
    return lower


def _factor(lower: sp.csr_matrix) -> sp.csr_matrix:
    """L row by row: l_ij = (a_ij - sum_k l_ik l_jk) / l_jj, and the pivot last."""
    ends, columns, values = lower.indptr.tolist(), lower.indices.tolist(), lower.data.tolist()
    rows: list[dict[int, float]] = []
    pivots: list[float] = []
    for i in range(lower.shape[0]):
        row: dict[int, float] = {}
        diagonal, any_entry = 0.0, False
        for at in range(ends[i], ends[i + 1]):
            j, value = columns[at], values[at]
            any_entry |= value != 0
            if j == i:
                diagonal = value
                continue
            other = rows[j]
            for k, own in row.items():
                if k in other:
                    value -= own * other[k]
            row[j] = value / pivots[j]
        pivot = diagonal - sum(own * own for own in row.values()) if any_entry else 1.0
        require(pivot > 0, f"A has the pivot {pivot:.3g} in row {i}; incomplete Cholesky needs them above 0.")
        rows.append(row)
        pivots.append(pivot**0.5)
    sizes = np.array([len(row) + 1 for row in rows])
    index = [j for i, row in enumerate(rows) for j in (*row, i)]
    data = [value for row, pivot in zip(rows, pivots, strict=True) for value in (*row.values(), pivot)]
    return sp.csr_matrix((data, index, np.concatenate([[0], sizes.cumsum()])), lower.shape)
