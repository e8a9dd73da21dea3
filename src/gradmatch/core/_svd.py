"""What the singular vectors of two matrices have in common.

A weight (out, in, ...) is read as the matrix (out, rest): for convolutions the columns run over input channels and
kernel places. Singular vectors have no sign and, inside a tie, no direction; everything here is a sum of products
(u . u')(v . v') over all pairs, in which neither shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradmatch.core import checks

FLOOR = 1e-6
"""Singular values below this share of the largest have no direction of their own in single precision."""


@dataclass(frozen=True)
class Singular:
    """The leading part of a decomposition: U (out, k), s (k,) in falling order, Vh (k, in), float64."""

    u: Tensor
    s: Tensor
    vh: Tensor

    def __len__(self) -> int:
        return len(self.s)


def as_matrix(weight: Tensor) -> Tensor:
    """(out, in, ...) as (out, rest), float64."""
    checks.require(
        weight.ndim >= 2, f"weight has the shape {tuple(weight.shape)}; a matrix needs two axes or more."
    )
    return weight.detach().flatten(1).double()


def singular(weight: Tensor, gamma: float = 0.0) -> Singular:
    """Singular vectors whose value is at least ``gamma`` times the largest (and at least 1e-6 of it).

    For gamma of 0.001 and more they come from the eigenvectors of the smaller Gram matrix, whose loss of half the
    digits does not show at that size; this is several times faster than the decomposition of a wide matrix.

    >>> len(singular(torch.diag(torch.tensor([4.0, 2.0, 1.0])), gamma=0.4))
    2
    """
    checks.fraction("gamma", gamma, zero=True)
    matrix = as_matrix(weight)
    if gamma >= 1e-3:
        tall = matrix.shape[0] > matrix.shape[1]
        work = matrix.T if tall else matrix
        values, vectors = torch.linalg.eigh(work @ work.T)
        s, u = values.clamp_min(0).sqrt().flip(0), vectors.flip(1)
        keep = s >= gamma * s[0] if s[0] > 0 else torch.zeros_like(s, dtype=torch.bool)
        u, s = u[:, keep], s[keep]
        v = (work.T @ u) / s
        return Singular(v, s, u.T) if tall else Singular(u, s, v.T)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    keep = s >= max(gamma, FLOOR) * s[0] if s[0] > 0 else torch.zeros_like(s, dtype=torch.bool)
    return Singular(u[:, keep], s[keep], vh[keep])


def overlap(a: Singular, b: Singular) -> float:
    """Sum over all pairs of (u_i . u'_j)(v_i . v'_j): the inner product of the partial isometries U Vh."""
    return float(((a.u.T @ b.u) * (a.vh @ b.vh.T)).sum())
