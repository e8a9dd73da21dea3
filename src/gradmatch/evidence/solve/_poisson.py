"""Discrete Poisson systems on a square, with and without a disc in it, and right-hand sides for them."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

OBSTACLES = ("held disc", "solid disc")
RADIUS = 0.15


def disc(n: int) -> np.ndarray:
    """Cells (n, n) in a disc of radius 0.15 n around the centre."""
    at = np.arange(n) - (n - 1) / 2
    return at[:, None] ** 2 + at**2 <= (RADIUS * n) ** 2


def poisson(n: int, obstacle: str | None = None) -> sp.csr_matrix:
    """The five-point Laplacian of n x n cells, zero beyond the box.

    The rows of a disc are zero. Around a "held disc" the solution is zero in it; a "solid disc" lets nothing through,
    as a body in a fluid does, so that its neighbours count one neighbour less.
    """
    line = sp.diags([1.0, 1.0], [1, -1], shape=(n, n))
    neighbours = (sp.kron(line, sp.identity(n)) + sp.kron(sp.identity(n), line)).tocsr()
    degree = np.full(n * n, 4.0)
    if obstacle is not None:
        free = sp.diags((~disc(n)).ravel().astype(float))
        if obstacle == "solid disc":
            degree -= neighbours @ disc(n).ravel().astype(float)
        neighbours = free @ neighbours @ free
        degree *= free.diagonal()
    A = (sp.diags(degree) - neighbours).tocsr()
    A.eliminate_zeros()
    return A


def right_hand_sides(kind: str, n: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Columns [n^2, count]: "random" (white noise) or "blocks" (8 x 8 constant patches of random height)."""
    if kind == "random":
        return rng.standard_normal((n * n, count))
    heights = rng.standard_normal((8, 8, count))
    return heights.repeat(n // 8, 0).repeat(n // 8, 1).reshape(n * n, count)
