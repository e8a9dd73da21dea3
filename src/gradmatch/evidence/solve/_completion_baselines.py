"""Matrices and baselines of the matrix-completion experiment: soft-impute and gradient descent on the factors."""

from __future__ import annotations

import numpy as np
import torch

from gradmatch.solve._entries import Entries, as_entries


def low_rank(m: int, n: int, k: int, kappa: float, rng: np.random.Generator) -> np.ndarray:
    """Random orthonormal factors with k singular values from ``kappa`` down to 1."""
    U, V = (np.linalg.qr(rng.standard_normal((size, k)))[0] for size in (m, n))
    M: np.ndarray = U * np.linspace(kappa, 1, k) @ V.T
    return M


def hide(M: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """NaN at all but a random ``share`` of the entries."""
    return np.where(rng.random(M.shape) < share, M, np.nan)


def soft_impute(seen: np.ndarray, strength: float, iterations: int) -> np.ndarray:
    """Fill in, take the SVD, shrink singular values by ``strength`` times the first, again (Mazumder et al. 2010)."""
    known = ~np.isnan(seen)
    filled = np.where(known, seen, 0.0)
    shrinkage = strength * np.linalg.norm(filled, 2)
    X = np.zeros_like(filled)
    for _ in range(iterations):
        u, s, v = np.linalg.svd(np.where(known, seen, X), full_matrices=False)
        X = u * np.maximum(s - shrinkage, 0) @ v
    return X


def factor_descent(seen: np.ndarray, rank: int, rate: float, iterations: int) -> np.ndarray:
    """Gradient descent on |P(U V^T - M)|^2 / 2 in balanced factors from the spectral start, steps rate / (p s_1)."""
    entries: Entries = as_entries(seen, None, None, None, torch.float64)
    share = len(entries) / seen.size
    u, s, v = np.linalg.svd(np.nan_to_num(seen) / share, full_matrices=False)
    root = np.sqrt(s[:rank])
    U, V = torch.from_numpy(u[:, :rank] * root), torch.from_numpy(v[:rank].T * root)
    by_column, by_row = entries.sides()
    step = rate / (share * s[0])
    for _ in range(iterations):
        down_U = by_row.gather(by_row.residual(V, U), V)
        down_V = by_column.gather(by_column.residual(U, V), U)
        U, V = U + step * down_U, V + step * down_V
    found = (U @ V.T).numpy()
    return found if np.isfinite(found).all() else np.zeros_like(found)
