"""Two sets of feature vectors compared token by token, and by how their tokens relate to one another.

Vectors are scaled to length 1 in float32 (float64 stays) as v / max(|v|, eps), so that a zero vector gives no NaN; its
gradient is of order 1 / eps, however, so a projector's last layer must not start at zero.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gradmatch.core import checks

EPS = 1e-6


def unit(v: Tensor, eps: float = EPS) -> Tensor:
    """``v`` (..., d) at length 1."""
    v = _single(v)
    return v / _length(v, eps).unsqueeze(-1)


def token_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Mean over tokens of the cosine of a and b (n, tokens, d), for each example (n,)."""
    _alike(a, b)
    a, b = _single(a), _single(b)  # lengths divide the products: no scaled copy of a or b is made
    return (torch.linalg.vecdot(a, b) / (_length(a) * _length(b))).mean(-1)


def relation_mismatch(a: Tensor, b: Tensor, *, chunk: int | None = None) -> Tensor:
    """Mean squared difference of the tokens' similarity matrices, for each example (n,).

    S_a[i, j] = cos(a_i, a_j) over the tokens of one example; a and b (n, tokens, d) and (n, tokens, e) may have
    different widths. Where there are more than d + e tokens the matrices are never formed: |A A^T - B B^T|^2 =
    |A^T A|^2 - 2 |A^T B|^2 + |B^T B|^2, linear in the number of tokens.

    Args:
        chunk: examples at once, for less memory; also in the backward pass, where each chunk is computed again.

    >>> a = torch.randn(2, 5, 3)
    >>> turn = torch.linalg.qr(torch.randn(3, 3)).Q
    >>> bool((relation_mismatch(a, 2 * a @ turn) < 1e-6).all())
    True
    """
    _alike(a, b)
    if chunk is None or chunk >= len(a):
        return _mismatch(a, b)
    parts = zip(torch.split(a, checks.whole("chunk", chunk)), torch.split(b, chunk), strict=True)
    found: list[Tensor] = [checkpoint(_mismatch, x, y, use_reentrant=False) for x, y in parts]
    return torch.cat(found)


def _mismatch(a: Tensor, b: Tensor) -> Tensor:
    n = a.shape[1]
    if n <= a.shape[2] + b.shape[2]:
        return (_similarities(a) - _similarities(b)).square().mean((1, 2))
    a, b = unit(a), unit(b)

    def square(x: Tensor, y: Tensor) -> Tensor:
        return (x.mT @ y).square().sum((1, 2))

    return ((square(a, a) - 2 * square(a, b) + square(b, b)) / n**2).clamp_min(0)


def _similarities(v: Tensor) -> Tensor:
    """Cosines of all pairs of tokens (n, tokens, tokens)."""
    v = _single(v)
    length = _length(v)
    return (v @ v.mT) / (length.unsqueeze(2) * length.unsqueeze(1))


def _single(v: Tensor) -> Tensor:
    return v if v.dtype == torch.float64 else v.float()


def _length(v: Tensor, eps: float = EPS) -> Tensor:
    return torch.linalg.vector_norm(v, dim=-1).clamp_min(eps)


def _alike(a: Tensor, b: Tensor) -> None:
    checks.require(
        a.ndim == 3 and a.shape[:2] == b.shape[:2] and b.ndim == 3,
        f"features are of shapes {tuple(a.shape)} and {tuple(b.shape)}; both must be (examples, tokens, width).",
    )
