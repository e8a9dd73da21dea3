"""Incomplete Cholesky against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from gradmatch.core._incomplete import _factor, _lower
from gradmatch.core.checks import InputError
from gradmatch.core.krylov import as_operator, cg, incomplete_cholesky


def laplacian(n: int, corner: float = 0.0) -> sp.csr_matrix:
    line = sp.diags([2.0, -1.0, -1.0], [0, 1, -1], shape=(n, n))
    side = sp.diags([1.0, corner, corner], [0, 1, -1], shape=(n, n))
    return (sp.kron(side, line) + sp.kron(line, sp.identity(n))).tocsr()


@pytest.mark.parametrize("corner", [0.0, -0.2])
def test_the_product_equals_the_matrix_on_its_pattern_and_nothing_is_filled_in(corner: float) -> None:
    A = laplacian(6, corner) + 0.5 * sp.identity(36)
    L = _factor(_lower(as_operator(A)))
    product = (L @ L.T).toarray()
    pattern = A.toarray() != 0
    assert np.allclose(product[pattern], A.toarray()[pattern], atol=1e-12)
    assert not (L.toarray()[~pattern]).any()
    assert not np.triu(L.toarray(), 1).any()
    r = torch.from_numpy(np.random.default_rng(0).standard_normal((36, 3)))
    apply = incomplete_cholesky(A)
    assert np.allclose(apply(r).numpy(), np.linalg.solve(product, r.numpy()))
    assert np.allclose(apply(r[:, 0]).numpy(), apply(r).numpy()[:, 0])


def test_it_saves_iterations_and_leaves_empty_rows_alone() -> None:
    A = laplacian(20).tolil()
    A[7] = 0
    A[:, 7] = 0
    A = A.tocsr()
    b = np.random.default_rng(0).standard_normal(400)
    b[7] = 0
    plain, fast = cg(A, b, tol=1e-8), cg(A, b, tol=1e-8, precondition=incomplete_cholesky(A))
    assert int(fast.iterations) < 0.5 * int(plain.iterations)
    assert np.allclose(A @ fast.x.numpy(), b, atol=1e-6)
    dense = incomplete_cholesky(torch.from_numpy(A.toarray()))
    assert torch.allclose(dense(torch.from_numpy(b)), incomplete_cholesky(A)(torch.from_numpy(b)))


def test_refuses() -> None:
    with pytest.raises(InputError, match="known by its products only"):
        incomplete_cholesky(as_operator(lambda v: v, 3))
    with pytest.raises(InputError, match="pivot -3 in row 1"):
        incomplete_cholesky(np.array([[1.0, 2.0], [2.0, 1.0]]))
