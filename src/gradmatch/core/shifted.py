r"""Systems (H + r I + s B) x = g for one H and many shifts s, and the norms that a metric B makes.

H may be nothing, a diagonal [P], a matrix [P, P], a sum of squares of few rows (:class:`LowRank`) or an operator known
by its products; B is the identity, a diagonal or a matrix. :func:`shifted` prepares H once:

=============  ========================================================================================
"cholesky"     one factorisation for every shift: P^3 / 3
"eigen"        one generalised eigendecomposition of (H, B), then 2 P^2 a shift; from about 15 shifts on
               it is the cheaper one
"woodbury"     r rows: one r x r eigendecomposition, then O(P r) a shift, O(P r) memory for B = I
"cg"           conjugate gradients, H by its products alone
=============  ========================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from gradmatch.core._cg import cg
from gradmatch.core._operators import FunctionOperator, LinearOperator
from gradmatch.core.checks import InputError, finite, nonnegative, one_of, require

__all__ = ["SOLVERS", "LowRank", "Matrix", "Metric", "Shifted", "Solver", "shifted"]

Solver = Literal["auto", "cholesky", "eigen", "woodbury", "cg"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)


@dataclass(frozen=True)
class LowRank:
    """H = rows^T rows, of ``rows`` [r, P]."""

    rows: Float[Tensor, "r P"]


Matrix = Tensor | LowRank | LinearOperator | None


class Metric:
    """A symmetric positive definite B and its norms: |h|^2 = h.B h and the dual |g|_*^2 = g.B^{-1} g.

    Args:
        b: None for the identity, a diagonal [P] or a matrix [P, P].

    Raises:
        InputError: another shape, or a B that is not symmetric and positive definite.

    >>> metric = Metric(torch.tensor([4.0, 1.0]))
    >>> metric.norm2(torch.tensor([1.0, 0.0])), metric.dual2(torch.tensor([1.0, 0.0]))
    (4.0, 0.25)
    """

    def __init__(self, b: Tensor | None = None) -> None:
        self.b, self.factor = b, None
        if b is None:
            return
        finite("metric", b)
        require(
            b.ndim == 1 or (b.ndim == 2 and b.shape[0] == b.shape[1]),
            f"metric has shape {tuple(b.shape)}; it must be a diagonal (P,) or a matrix (P, P).",
        )
        if b.ndim == 1:
            require(
                bool((b > 0).all()), "metric has entries that are not above 0; B must be positive definite."
            )
            return
        require_symmetric("metric", b)
        self.factor, info = torch.linalg.cholesky_ex(b)
        require(not int(info), "metric is not positive definite; its Cholesky factor does not exist.")

    def fits(self, size: int) -> Metric:
        """Itself, if B is of that size."""
        require(
            self.b is None or len(self.b) == size,
            f"metric is of size {0 if self.b is None else len(self.b)}; there are {size} parameters.",
        )
        return self

    def times(self, h: Tensor) -> Tensor:
        """B h."""
        if self.b is None:
            return h
        return self.b @ h if self.b.ndim == 2 else self._columns(self.b, h) * h

    def solve(self, g: Tensor) -> Tensor:
        """B^{-1} g of g [P] or [P, b]."""
        if self.b is None:
            return g
        if self.factor is None:
            return g / self._columns(self.b, g)
        columns = g[:, None] if g.ndim == 1 else g
        return torch.cholesky_solve(columns, self.factor).reshape(g.shape)

    @staticmethod
    def _columns(b: Tensor, h: Tensor) -> Tensor:
        return b if h.ndim == 1 else b[:, None]

    def norm2(self, h: Tensor) -> float:
        """|h|^2."""
        return float(h @ self.times(h))

    def dual2(self, g: Tensor) -> float:
        """|g|_*^2."""
        return float(g @ self.solve(g))

    def dense(self, size: int, like: Tensor) -> Tensor:
        """B [P, P]."""
        if self.b is None:
            return torch.eye(size, dtype=like.dtype, device=like.device)
        return torch.diag(self.b) if self.b.ndim == 1 else self.b


class Shifted(Protocol):
    """H, prepared."""

    def solve(self, shift: float, g: Tensor) -> Tensor | None:
        """x [P] with (H + r I + shift B) x = g, or None where that matrix is not positive definite."""


def shifted(h: Matrix, metric: Metric, size: int, *, ridge: float = 0.0, solver: Solver = "auto") -> Shifted:
    """Prepare H + ridge I for many shifts.

    Args:
        h: None (zero), [P], [P, P], :class:`LowRank` or an operator.
        metric: B.
        size: P.
        ridge: r >= 0.
        solver: see the module. "auto" takes Woodbury for at most P / 4 rows, CG for operators, else Cholesky; a
            diagonal H with a diagonal B is divided by.

    Raises:
        InputError: an H of another size, not finite or not symmetric; a solver that H does not allow.
    """
    one_of("solver", solver, SOLVERS)
    metric.fits(size)
    nonnegative("ridge", ridge)
    if isinstance(h, LowRank):
        return _of_rows(h.rows, metric, size, ridge, solver)
    require(solver != "woodbury", 'solver is "woodbury"; it needs a Hessian given by its rows (LowRank).')
    if h is not None and not isinstance(h, Tensor):
        require(
            solver in ("auto", "cg"),
            f"solver is {solver!r}; a Hessian known by products alone is solved by cg.",
        )
        return _ByProducts(h, metric, ridge)
    if h is None:
        if ridge == 0:
            return _Scaled(metric)
        reference = metric.b if metric.b is not None else torch.empty(0, dtype=torch.float64)
        h = torch.zeros(size, dtype=reference.dtype, device=reference.device)
    finite("the Hessian", h)
    require(
        h.shape in ((size,), (size, size)),
        f"the Hessian has shape {tuple(h.shape)}; it must be ({size},) or ({size}, {size}).",
    )
    if h.ndim == 1 and (metric.b is None or metric.b.ndim == 1):
        return _Diagonal(h + ridge, metric)
    h = torch.diag(h) if h.ndim == 1 else h
    require_symmetric("the Hessian", h)
    if solver == "cg":
        return _ByProducts(FunctionOperator(h.matmul, (size, size), h.dtype, h.device), metric, ridge)
    return _dense(h, metric, ridge, solver)


def _of_rows(rows: Tensor, metric: Metric, size: int, ridge: float, solver: Solver) -> Shifted:
    finite("rows of the Hessian", rows)
    require(
        rows.ndim == 2 and rows.shape[1] == size,
        f"rows of the Hessian have shape {tuple(rows.shape)}; they must be (r, {size}).",
    )
    if solver == "cg":
        operator = FunctionOperator(lambda v: rows.T @ (rows @ v), (size, size), rows.dtype, rows.device)
        return _ByProducts(operator, metric, ridge)
    plain = ridge == 0 or metric.b is None  # else r I is neither part of B nor of few rows
    if solver == "woodbury" or (solver == "auto" and plain and 4 * len(rows) <= size):
        require(
            plain, 'solver is "woodbury" with weight decay and a metric; it needs one of them to be absent.'
        )
        return _Woodbury(rows, metric, ridge)
    return _dense(rows.T @ rows, metric, ridge, solver)


def _dense(h: Tensor, metric: Metric, ridge: float, solver: Solver) -> Shifted:
    if ridge:
        h = h.clone()
        h.diagonal().add_(ridge)
    return _Eigen(h, metric) if solver == "eigen" else _Cholesky(h, metric)


def require_symmetric(name: str, matrix: Tensor) -> None:
    """Refuse a matrix that differs from its transpose by more than rounding.

    A Hessian in which large terms cancel may be all rounding, so differences of some eps pass whatever its size.
    """
    slack = float((matrix - matrix.T).abs().max())
    if slack > 1e-3 * float(matrix.abs().max()) + 1e3 * torch.finfo(matrix.dtype).eps:
        raise InputError(f"{name} differs from its transpose by {slack:.2g}; it must be symmetric.")


@dataclass(frozen=True)
class _Scaled:
    """H = 0."""

    metric: Metric

    def solve(self, shift: float, g: Tensor) -> Tensor | None:
        return self.metric.solve(g) / shift if shift > 0 else None


@dataclass(frozen=True)
class _Diagonal:
    h: Tensor
    metric: Metric

    def solve(self, shift: float, g: Tensor) -> Tensor | None:
        values = self.h + shift * (1.0 if self.metric.b is None else self.metric.b)
        return g / values if bool((values > 0).all()) else None


@dataclass(frozen=True)
class _Cholesky:
    h: Tensor
    metric: Metric

    def solve(self, shift: float, g: Tensor) -> Tensor | None:
        b = self.metric.b
        if b is not None and b.ndim == 2:
            matrix = torch.add(self.h, b, alpha=shift)
        else:
            matrix = self.h.clone()
            matrix.diagonal().add_(shift * (1.0 if b is None else b))
        factor, info = torch.linalg.cholesky_ex(matrix)
        return None if int(info) else torch.cholesky_solve(g[:, None], factor)[:, 0]


class _Eigen:
    """B = L L^T, L^{-1} H L^{-T} = Q diag(q) Q^T: x = V (q + s)^{-1} V^T g with V = L^{-T} Q."""

    def __init__(self, h: Tensor, metric: Metric) -> None:
        if metric.b is None:
            self.values, self.vectors = torch.linalg.eigh(h)
            return
        factor = metric.b.sqrt().diag() if metric.factor is None else metric.factor
        half = torch.linalg.solve_triangular(factor, h, upper=False)
        whitened = torch.linalg.solve_triangular(factor, half.T, upper=False)
        self.values, q = torch.linalg.eigh((whitened + whitened.T) / 2)
        self.vectors = torch.linalg.solve_triangular(factor.T, q, upper=True)

    def solve(self, shift: float, g: Tensor) -> Tensor | None:
        values = self.values + shift
        if float(values[0]) <= 0:
            return None
        found: Tensor = self.vectors @ ((self.vectors.T @ g) / values)
        return found


class _Woodbury:
    """(s B + X^T X)^{-1} g = (y - Y (s I + X Y)^{-1} X y) / s with Y = B^{-1} X^T and y = B^{-1} g."""

    def __init__(self, rows: Tensor, metric: Metric, ridge: float) -> None:
        self.rows, self.metric, self.ridge = rows, metric, ridge
        self.spread = metric.solve(rows.T)
        inner = rows @ self.spread
        self.values, self.vectors = torch.linalg.eigh((inner + inner.T) / 2)

    def solve(self, shift: float, g: Tensor) -> Tensor | None:
        shift = shift + self.ridge
        if shift <= 0:
            return None
        y = self.metric.solve(g)
        inside = (self.vectors.T @ (self.rows @ y)) / (self.values.clamp(min=0) + shift)
        return (y - self.spread @ (self.vectors @ inside)) / shift


@dataclass(frozen=True)
class _ByProducts:
    h: LinearOperator
    metric: Metric
    ridge: float

    def solve(self, shift: float, g: Tensor) -> Tensor | None:
        def product(v: Tensor) -> Tensor:
            return self.h.matvec(v) + self.ridge * v + shift * self.metric.times(v)

        operator = FunctionOperator(product, (len(g), len(g)), g.dtype, g.device)
        found = cg(operator, g, tol=torch.finfo(g.dtype).eps ** 0.6)
        return None if bool(found.indefinite.any()) else found.x
