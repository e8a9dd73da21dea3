"""Distances between two lists of gradients, and similarities of two sets of features.

``linear_cka``, ``cka_matrix`` and ``rsa`` compare features, see :mod:`gradmatch.core._similarity`.

With A and B two lists of tensors, one for each parameter:

- "filter_cosine": every tensor of two or more dimensions is reshaped to (out, rest), and over its rows r the sum of
  1 - <A_r, B_r> / (|A_r| |B_r| + eps) is taken, then the sum over tensors; tensors of fewer dimensions add nothing.
- "cosine": 1 - <A, B> / (|A| |B| + eps) of the two lists as flat vectors.
- "mse": |A - B|^2 of the two lists as flat vectors (a sum, no mean).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradmatch.core._similarity import cka_matrix, linear_cka, rsa
from gradmatch.core.checks import finite, listing, nonnegative, one_of, require

__all__ = ["DISTANCES", "cka_matrix", "gradient_distance", "linear_cka", "rsa"]

DISTANCES = ("filter_cosine", "cosine", "mse")


def gradient_distance(
    a: Sequence[Tensor], b: Sequence[Tensor], kind: str = "filter_cosine", eps: float = 1e-6
) -> Tensor:
    """Distance of two gradient lists, a scalar with its graph.

    First and second derivatives are finite also where a row is exactly zero; such a row costs 1, not 0.

    Args:
        a, b: equally many tensors of pairwise equal shapes.
        kind: "filter_cosine", "cosine" or "mse", as at the head of this module.
        eps: added to the product of norms; 1e-6 is the customary value. It shows where that product is as small.

    Raises:
        InputError: lists that do not fit each other, an unknown kind, NaN or infinity in what is compared.

    >>> w = [torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([5.0, 5.0])]
    >>> v = [torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([0.0, 0.0])]
    >>> round(float(gradient_distance(w, v)), 4), float(gradient_distance(w, v, kind="mse"))
    (1.0, 53.0)
    """
    one_of("kind", kind, DISTANCES)
    nonnegative("eps", eps)
    require(len(a) == len(b), f"a has {len(a)} tensors and b has {len(b)}; they must be equally many.")
    require(len(a) > 0, "a is empty; at least one tensor is needed.")
    differing = [i for i, (s, t) in enumerate(zip(a, b, strict=True)) if s.shape != t.shape]
    require(
        not differing,
        f"a and b differ in shape at position {listing(differing)}; the tensors must be pairwise alike.",
    )
    pairs = list(zip(a, b, strict=True))
    if kind == "mse":
        total = sum(((s - t).square().sum() for s, t in pairs), start=a[0].new_zeros(()))
    elif kind == "cosine":
        flat_a, flat_b = (torch.cat([t.reshape(1, -1) for t in side], dim=1) for side in (a, b))
        total = _one_minus_cosine(flat_a, flat_b, eps)
    else:
        rows = ((s.reshape(len(s), -1), t.reshape(len(t), -1)) for s, t in pairs if s.ndim >= 2 and s.numel())
        total = sum((_one_minus_cosine(s, t, eps) for s, t in rows), start=a[0].new_zeros(()))
    finite(f"the {kind} distance of a and b", total.detach())
    return total


def _one_minus_cosine(a: Tensor, b: Tensor, eps: float) -> Tensor:
    """Sum over rows [r, k] of one minus the cosine."""
    return (1 - (a * b).sum(1) / (_row_norms(a) * _row_norms(b) + eps)).sum()


def _row_norms(a: Tensor) -> Tensor:
    """Norm of each row [r, k], with derivatives 0 where the row is zero.

    Rows are scaled by their largest entry first: the second derivative of the square root of a small sum of squares
    overflows long before the entries themselves are negligible. The scale is a constant, as the norm is homogeneous.
    """
    scale = a.detach().abs().amax(1, keepdim=True)
    there = scale > torch.finfo(a.dtype).tiny
    scale = torch.where(there, scale, 1)
    squares = (a / scale).square().sum(1)
    there = there[:, 0]
    return torch.where(there, squares, 1).sqrt() * there * scale[:, 0]
