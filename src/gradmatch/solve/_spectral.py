"""The start of alternating minimisation: leading singular vectors of the observed entries, clipped; and incoherence."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from gradmatch.solve._entries import Side

DENSE = 300
"""Smaller dimension up to which the singular vectors are taken from the dense matrix."""
POWERS, SPARE = 10, 10
"""Rounds of subspace iteration and vectors iterated beyond those wanted."""
CLIP_QUANTILE, CLIP_SHARE = 0.9, 0.1


def incoherence(U: Float[Tensor, "m k"]) -> float:
    """sqrt(m / k) max_i |e_i^T U| of orthonormal columns: 1 if all rows are alike, sqrt(m / k) for identity columns."""
    m, k = U.shape
    return float(U.norm(dim=1).max()) * math.sqrt(m / k)


def subspace_distance(U: Float[Tensor, "m k"], V: Float[Tensor, "m k"]) -> float:
    """Sine of the largest angle between the column spaces, |(I - Q Q^T) P|_2 with P, Q their orthonormal bases."""
    P, Q = torch.linalg.qr(U).Q, torch.linalg.qr(V).Q
    return float(torch.linalg.matrix_norm(P - Q @ (Q.T @ P), 2))


def leading_vectors(
    side: Side, values: Tensor, rank: int, generator: torch.Generator
) -> Float[Tensor, "m k"]:
    """The ``rank`` leading left singular vectors of the matrix with ``values`` on the pattern of ``side`` [m, n]."""
    A = side.matrix(values)
    if min(side.count, side.width) <= max(DENSE, rank):
        U: Tensor = torch.linalg.svd(A.to_dense(), full_matrices=False).U
        return U[:, :rank]
    across = torch.sparse_csc_tensor(
        side.offsets, side.index, values, size=(side.width, side.count), check_invariants=False
    ).to_sparse_csr()
    start = torch.randn(side.width, min(rank + SPARE, side.width, side.count), generator=generator)
    basis = torch.linalg.qr(A @ start.to(values)).Q
    for _ in range(POWERS):
        basis = torch.linalg.qr(A @ torch.linalg.qr(across @ basis).Q).Q
    turn = torch.linalg.svd((across @ basis).T, full_matrices=False).U
    leading: Tensor = basis @ turn[:, :rank]
    return leading


def clipped(U: Float[Tensor, "m k"], mu: float | str = "auto") -> Float[Tensor, "m k"]:
    """Entries above 2 mu sqrt(k / m) in magnitude set to 0, orthonormal again.

    ``mu="auto"`` is sqrt(m / k) times the 0.9 quantile of the row norms (the largest norm could never clip anything:
    an entry is at most its row's norm). At most a tenth of the entries goes, the largest, and no column is emptied.
    """
    m, k = U.shape
    limit = 2 * (float(U.norm(dim=1).quantile(CLIP_QUANTILE)) if mu == "auto" else float(mu) * (k / m) ** 0.5)
    kept = math.ceil((1 - CLIP_SHARE) * m * k)
    limit = max(limit, float(U.abs().flatten().kthvalue(kept).values))
    over = U.abs() > limit
    over &= ~over.logical_or(U == 0).all(0)
    return torch.linalg.qr(U.masked_fill(over, 0.0)).Q if bool(over.any()) else U
