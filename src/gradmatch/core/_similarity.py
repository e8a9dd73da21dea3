"""How alike two networks see the same examples: linear CKA, biased and debiased, and RSA.

With the rows of X (n, p) and Y (n, q) the same examples, K = X X^T and L = Y Y^T:

- biased CKA is the cosine of the centred Gram matrices, <HKH, HLH> / (|HKH| |HLH|), in [0, 1] (Kornblith, Norouzi,
  Lee, Hinton; ICML 2019, arXiv 1905.00414). It nears 1 for any features that are much wider than n;
- debiased CKA puts the unbiased estimate of HSIC (Song, Smola, Gretton, Bedo, Borgwardt; JMLR 2012) in place of each
  inner product: about 0 for unrelated features at any width, and possibly below 0. That estimate is the inner product
  of the Gram matrices without their diagonals, centred with the factors n - 2 and (n - 1)(n - 2);
- RSA is Pearson's correlation of the cosine similarities of all pairs of examples.

Neither knows an orthogonal map or a scale. All are differentiable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from gradmatch.core.checks import finite, refuse, require

FLOOR = 1e-24
"""Put under the squared norm of a debiased Gram matrix, whose estimate may be 0 or below."""
_CACHED = 2**19  # numbers worked on at once: 2 MiB in float32


def linear_cka(
    x: Float[Tensor, "n ..."], y: Float[Tensor, "n ..."], *, debiased: bool = False
) -> Float[Tensor, ""]:
    """Linear CKA of two sets of features of the same examples.

    Computed from Gram matrices (n, n) or from products of features (p, q), whichever is less work.

    Args:
        x, y: features, flattened for each example; half precision is computed in float32.
        debiased: the unbiased estimate, which needs four examples; biased features saturate where they are wide.

    Returns:
        A scalar; 0 where one side does not vary.

    Raises:
        InputError: different numbers of examples, fewer than 2 (debiased 4), or values that are not finite.

    >>> x = torch.randn(50, 8)
    >>> round(float(linear_cka(x, 3 * x)), 4)
    1.0
    """
    a, b = _features("x", x, debiased), _features("y", y, debiased)
    require(len(a) == len(b), f"x has {len(a)} examples and y has {len(b)}; they must be the same examples.")
    if a.dtype != b.dtype:
        a, b = a.double(), b.double()
    n, p, q = len(a), a.shape[1], b.shape[1]
    if n * (p + q) <= p * p + q * q + p * q:
        k, l_ = _relation(a, debiased), _relation(b, debiased)
        value = (k * l_).sum() / (_norm(k.square().sum(), debiased) * _norm(l_.square().sum(), debiased))
    else:
        value = _debiased_by_features(a, b) if debiased else _biased_by_features(a, b)
    return _checked(value, {"x": a, "y": b})


def cka_matrix(
    xs: Sequence[Tensor], ys: Sequence[Tensor] | None = None, *, debiased: bool = False
) -> Float[Tensor, "a b"]:
    """:func:`linear_cka` of every pair; each Gram matrix is made once.

    >>> cka_matrix([torch.randn(9, 3), torch.randn(9, 5)]).shape
    torch.Size([2, 2])
    """
    sides: list[Tensor] = []
    for name, features in (("xs", xs), ("ys", xs if ys is None else ys)):
        require(len(features) > 0, f"{name} is empty; at least one set of features is needed.")
        if name == "ys" and ys is None:
            sides.append(sides[0])
            continue
        rows = {f"{name}[{k}]": _features(f"{name}[{k}]", f, debiased) for k, f in enumerate(features)}
        sizes = sorted({len(r) for r in rows.values()})
        require(len(sizes) == 1, f"{name} is of {sizes} examples; all must be of the same.")
        sides.append(torch.stack([_relation(r, debiased).flatten() for r in rows.values()]))
        _checked(sides[-1].sum(), rows)
    a, b = sides
    require(a.shape[1] == b.shape[1], "xs and ys are of different numbers of examples.")
    norms = [_norm(s.square().sum(1), debiased) for s in sides]
    return (a @ b.T) / (norms[0][:, None] * norms[1])


def rsa(x: Float[Tensor, "n ..."], y: Float[Tensor, "n ..."]) -> Float[Tensor, ""]:
    """Correlation, over all pairs of examples, of their cosine similarities in x and in y.

    A zero row is as unlike all others as an orthogonal one; where one side's similarities are all equal, 0.

    Raises:
        InputError: different numbers of examples, fewer than 3, or values that are not finite.
    """
    sides = []
    for name, value in (("x", x), ("y", y)):
        rows = _features(name, value, False)
        require(len(rows) >= 3, f"{name} has {len(rows)} examples; RSA needs at least 3.")
        unit = torch.nn.functional.normalize(rows, dim=1)
        i, j = torch.triu_indices(len(rows), len(rows), 1, device=rows.device)
        pairs = (unit @ unit.T)[i, j]
        sides.append(pairs - pairs.mean())
    a, b = sides
    a, b = (a, b) if a.dtype == b.dtype else (a.double(), b.double())
    require(len(a) == len(b), f"x has {len(x)} examples and y has {len(y)}; they must be the same examples.")
    value = (a @ b) / (a.square().sum() * b.square().sum()).clamp_min(FLOOR).sqrt()
    return _checked(value, {"x": x.detach(), "y": y.detach()})


def _features(name: str, value: Tensor, debiased: bool) -> Tensor:
    require(
        isinstance(value, Tensor) and value.ndim >= 1 and value.is_floating_point(),
        f"{name} is {getattr(value, 'dtype', type(value).__name__)}; it must be a floating tensor (n, ...).",
    )
    least = 4 if debiased else 2
    require(len(value) >= least, f"{name} has {len(value)} examples; at least {least} are needed.")
    rows = value.reshape(len(value), -1)
    return rows if rows.dtype == torch.float64 else rows.float()


def _checked(value: Tensor, features: Mapping[str, Tensor]) -> Tensor:
    """``value`` if it is finite; looking at every feature first would take as long as a third of the work."""
    if not bool(torch.isfinite(value.detach())):
        for name, rows in features.items():
            finite(name, rows.detach())
        refuse(
            f"{' and '.join(features)} are so large that their products overflow {value.dtype}; scale them."
        )
    return value


def _centred_gram(x: Tensor) -> tuple[Tensor, Tensor]:
    """The Gram matrix of features less their mean, and that mean; some columns at a time, which stay in the cache."""
    gram, means = x.new_zeros(len(x), len(x)), []
    for part in x.split(max(256, _CACHED // len(x)), 1):
        means.append(part.mean(0))
        gram = gram + _gram(part - means[-1])
    return gram, torch.cat(means)


def _gram(x: Tensor) -> Tensor:
    """X X^T, the product of the two halves of the rows once."""
    if len(x) < 64:
        return x @ x.T
    a, b = x.tensor_split(2)
    corner = a @ b.T
    return torch.cat([torch.cat([a @ a.T, corner], 1), torch.cat([corner.T, b @ b.T], 1)])


def _varies(energy: Tensor, mean: Tensor, n: int) -> Tensor:
    """Whether features vary by more than their rounding, given the squares of what is left without the mean."""
    share = energy.detach() / (energy.detach() + n * mean.detach().square().sum())
    return ~(
        share <= (8 * torch.finfo(mean.dtype).eps) ** 2
    )  # NaN and infinity go on to where they are refused


def _relation(x: Tensor, debiased: bool) -> Tensor:
    """The Gram matrix of a set of features, centred; their inner products are what CKA is made of."""
    n, (gram, mean) = (
        len(x),
        _centred_gram(x),
    )  # after the product, differences of large numbers lose what is left
    gram = gram * _varies(gram.diagonal().sum(), mean, n)
    if not debiased:
        return gram
    gram = gram - torch.diag(gram.diagonal())
    sums = gram.sum(0)
    gram = gram - (sums[:, None] + sums) / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
    return gram - torch.diag(gram.diagonal())


def _norm(squares: Tensor, debiased: bool) -> Tensor:
    return squares.clamp_min(FLOOR if debiased else torch.finfo(squares.dtype).tiny).sqrt()


def _centred(x: Tensor) -> Tensor:
    mean = x.mean(0)
    rest = x - mean
    return rest * _varies(rest.square().sum(), mean, len(x))


def _biased_by_features(x: Tensor, y: Tensor) -> Tensor:
    """|Yc^T Xc|^2 / (|Xc^T Xc| |Yc^T Yc|)."""
    a, b = _centred(x), _centred(y)
    inner, own, other = ((u.T @ v).square().sum() for u, v in ((b, a), (a, a), (b, b)))
    return inner / (_norm(own, False) * _norm(other, False))


def _debiased_by_features(x: Tensor, y: Tensor) -> Tensor:
    """The same three estimates of HSIC without Gram matrices: K 1 = X (X^T 1), and the diagonals taken out."""
    a, b = _centred(x), _centred(y)
    n = len(a)

    def hsic(u: Tensor, v: Tensor) -> Tensor:
        squares = u.square().sum(1), v.square().sum(1)
        sums = tuple(w @ w.sum(0) - s for w, s in zip((u, v), squares, strict=True))
        trace = (u.T @ v).square().sum() - squares[0] @ squares[1]
        total = sums[0].sum() * sums[1].sum() / ((n - 1) * (n - 2))
        return trace + total - 2 / (n - 2) * (sums[0] @ sums[1])

    return hsic(a, b) / (_norm(hsic(a, a), True) * _norm(hsic(b, b), True))
