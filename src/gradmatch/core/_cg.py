"""Conjugate gradients for one or many right-hand sides, preconditioned and deflated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gradmatch.core._operators import LinearOperator, as_operator, as_vectors, square
from gradmatch.core.checks import InputError, finite, nonnegative, one_of, require, whole

__all__ = ["Deflation", "Solution", "cg", "jacobi"]

Preconditioner = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Solution:
    """What a solver found; every field but ``x`` has an entry for each right-hand side.

    Attributes:
        x: solution [P] or [P, b], shaped as the right-hand side.
        residuals: norm of the residual (by the recurrence) over what ``tol`` is relative to.
        iterations: products with A that were spent on each.
        converged: whether the residual came under ``tol``.
        indefinite: whether a direction p with p.Ap <= 0 ended the work; A is not positive definite there.
        history: relative residuals before the first and after every iteration; constant after a column's end.
    """

    x: Tensor
    residuals: Float[Tensor, " b"]
    iterations: Int[Tensor, " b"]
    converged: Bool[Tensor, " b"]
    indefinite: Bool[Tensor, " b"]
    history: Float[Tensor, "k b"]


class Deflation:
    """A subspace that is solved exactly, so that CG works on the rest of the spectrum alone.

    With W [P, k] spanning it, r |-> W (W^T A W)^{-1} W^T r is the exact solution inside, and directions are kept
    A-orthogonal to it (Saad, Yeung, Erhel, Guyomarc'h, SIAM J. Sci. Comput. 21, 2000). Good choices are the
    eigenvectors or Ritz vectors of the smallest eigenvalues. One object serves any number of right-hand sides.

    Raises:
        InputError: columns that are linearly dependent, or a subspace on which A is not positive definite.
    """

    def __init__(self, A: Any, basis: Any) -> None:
        operator = square(as_operator(A))
        w = as_vectors("basis", basis, operator)
        require(w.shape[1] < len(w), f"basis has {w.shape[1]} columns; it must have fewer than P = {len(w)}.")
        self.w, triangle = torch.linalg.qr(w)
        pivots = triangle.diagonal().abs()
        slack = len(w) * torch.finfo(w.dtype).eps * pivots.max()
        require(bool((pivots > slack).all()), "basis has linearly dependent columns.")
        self.aw = finite("A W", operator.matvec(self.w))
        inner = self.w.T @ self.aw
        factor, info = torch.linalg.cholesky_ex((inner + inner.T) / 2)
        require(not int(info), "A is not positive definite on the span of basis.")
        self._factor = factor

    def solve(self, residual: Tensor) -> Tensor:
        """W (W^T A W)^{-1} W^T r of r [P, b]."""
        return self.w @ torch.cholesky_solve(self.w.T @ residual, self._factor)

    def clean(self, vectors: Tensor) -> Tensor:
        """z [P, b] less its part in the subspace, so that W^T A z = 0."""
        return vectors - self.w @ torch.cholesky_solve(self.aw.T @ vectors, self._factor)


def jacobi(A: Any) -> Preconditioner:
    """Division by the diagonal of a matrix, or of the diagonal [P] itself.

    Raises:
        InputError: an operator that has no ``diagonal()``, or entries that are not all above zero.
    """
    if isinstance(A, Tensor) and A.ndim == 1:
        values = A
    else:
        operator = as_operator(A)
        found = getattr(operator, "diagonal", None)
        if found is None:
            raise InputError("A is known by its products only; jacobi needs a matrix or the diagonal itself.")
        values = found()
    require(bool((values > 0).all()), "A has diagonal entries that are not above 0; jacobi divides by them.")
    inverse = (1 / values)[:, None]
    return lambda r: r * (inverse if r.ndim == 2 else inverse[:, 0])


def cg(
    A: Any,
    b: Any,
    x0: Any = None,
    *,
    tol: float = 1e-6,
    max_iter: int | None = None,
    precondition: Preconditioner | LinearOperator | None = None,
    deflation: Deflation | None = None,
    relative_to: Literal["rhs", "start"] = "rhs",
    shared: bool = True,
) -> Solution:
    """Solve A x = b for a symmetric positive definite A, all right-hand sides together, each ending on its own.

    Args:
        A: whatever :func:`as_operator` takes; for a function, P is the length of ``b``.
        b: right-hand sides [P] or [P, b].
        x0: where to start, shaped as ``b``; default 0.
        tol: a column ends when its residual norm is at most ``tol`` times that of ``b`` (or of the first residual).
        max_iter: most iterations; default 10 P, as scipy.
        precondition: an approximation of A^{-1}, symmetric positive definite: a function of [P, b] or an operator.
        deflation: a subspace solved exactly.
        relative_to: "rhs" (as scipy) or "start".
        shared: all columns have the same A, and columns that ended leave the products. Say False where ``A`` (and
            ``precondition``) treat column j by an operator of its own; ended columns then stay in and do not move.

    Raises:
        InputError: A not square or not symmetric, shapes that do not fit, values that are not finite.

    >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    >>> found = cg(A, torch.tensor([1.0, 2.0]), tol=1e-12)
    >>> found.x, found.iterations
    (tensor([0.0909, 0.6364], dtype=torch.float64), tensor([2]))
    """
    operator = square(_operator_for(A, b))
    rhs = as_vectors("b", b, operator)
    one_of("relative_to", relative_to, ("rhs", "start"))
    limit = nonnegative("tol", tol)
    most = 10 * len(rhs) if max_iter is None else whole("max_iter", max_iter, least=0)
    x = torch.zeros_like(rhs) if x0 is None else as_vectors("x0", x0, operator).clone()
    require(x.shape == rhs.shape, f"x0 has {x.shape[1]} columns; b has {rhs.shape[1]}.")
    r = rhs.clone() if x0 is None else rhs - operator.matvec(x)
    start = r
    if deflation is not None:
        x = x + deflation.solve(r)
        r = rhs - operator.matvec(x)
    scale = (rhs if relative_to == "rhs" else start).norm(dim=0)
    run = _Run(operator, _inverse(precondition), deflation, x, r, scale, limit, shared)
    while run.k < most and run.step():
        pass
    found = run.solution()
    return found if torch.as_tensor(b).ndim == 2 else _as_vector(found)


def _operator_for(A: Any, b: Any) -> LinearOperator:
    if callable(A) and not isinstance(A, LinearOperator) and not hasattr(A, "shape"):
        rhs = torch.as_tensor(b)
        dtype = rhs.dtype if rhs.is_floating_point() else torch.float64
        return as_operator(A, len(rhs), dtype=dtype, device=rhs.device)
    return as_operator(A)


def _inverse(precondition: Preconditioner | LinearOperator | None) -> Preconditioner | None:
    return precondition.matvec if isinstance(precondition, LinearOperator) else precondition


def _as_vector(found: Solution) -> Solution:
    return Solution(
        found.x[:, 0],
        found.residuals,
        found.iterations,
        found.converged,
        found.indefinite,
        found.history,
    )


class _Run:
    """The state of CG. Names as in the textbook: x, r, z = M^{-1} r, direction p, rz = r.z, one entry a column.

    ``columns`` says which right-hand sides are still in the work; what is known of the others lies in ``found_*``.
    """

    def __init__(
        self,
        operator: LinearOperator,
        inverse: Preconditioner | None,
        deflation: Deflation | None,
        x: Tensor,
        r: Tensor,
        scale: Tensor,
        tol: float,
        shared: bool,
    ) -> None:
        self.operator, self.inverse, self.deflation = operator, inverse, deflation
        self.tol, self.shared, self.k = tol, shared, 0
        # a right-hand side of 0 is solved by 0, and everything is relative to 1 there
        self.scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        self.columns = torch.arange(x.shape[1], device=x.device)
        self.x, self.r, self.p = x, r, torch.zeros_like(r)
        self.rz = torch.ones_like(scale)
        self.spent = torch.zeros_like(self.columns)
        self.indefinite = torch.zeros_like(self.columns, dtype=torch.bool)
        norms = finite("the residual", r.norm(dim=0) / self.scale)
        self.live = norms > tol
        self.history = [(self.columns, norms)]
        self.found_x, self.found_spent = x, self.spent
        self.found_indefinite = self.indefinite

    def step(self) -> bool:
        """One iteration of all columns that go on; False if there was none."""
        going = int(self.live.sum())
        if not going:
            return False
        if self.shared and 2 * going <= len(self.live):
            self._narrow()
        z = self.r if self.inverse is None else self.inverse(self.r)
        z = z if self.deflation is None else self.deflation.clean(z)
        rz = (self.r * z).sum(0)
        self.p = torch.addcmul(z, rz / self.rz, self.p)
        product = self.operator.matvec(self.p)
        curvature = (self.p * product).sum(0)
        moves = self.live & (curvature > 0)
        alpha = torch.where(moves, rz / curvature, 0)
        self.x.addcmul_(self.p, alpha)
        self.r = torch.addcmul(self.r, product, alpha, value=-1)
        self.rz = torch.where(moves, rz, 1)  # ended columns must not divide by 0 later
        self.k += 1
        self._judge(moves)
        return True

    def _judge(self, moves: Tensor) -> None:
        """Who has converged, who has met a direction of no positive curvature."""
        norms = finite("the residual of CG", self.r.norm(dim=0) / self.scale)
        self.history.append((self.columns, norms))
        self.spent = self.spent + self.live
        self.indefinite = self.indefinite | (self.live & ~moves)
        self.live = moves & (norms > self.tol)

    def _narrow(self) -> None:
        """Take the columns that ended out of the work."""
        self._keep()
        live = self.live
        self.x, self.r, self.p = self.x[:, live], self.r[:, live], self.p[:, live]
        self.rz, self.scale, self.columns = self.rz[live], self.scale[live], self.columns[live]
        self.spent, self.indefinite, self.live = self.spent[live], self.indefinite[live], live[live]

    def _keep(self) -> None:
        if self.x is not self.found_x:
            self.found_x[:, self.columns] = self.x
        self.found_spent = self.found_spent.index_copy(0, self.columns, self.spent)
        self.found_indefinite = self.found_indefinite.index_copy(0, self.columns, self.indefinite)

    def solution(self) -> Solution:
        """Everything, in the order of the right-hand sides."""
        self._keep()
        norms, rows = self.history[0][1], []
        for columns, found in self.history:
            norms = norms.index_copy(0, columns, found)
            rows.append(norms)
        return Solution(
            self.found_x,
            norms,
            self.found_spent,
            norms <= self.tol,
            self.found_indefinite,
            torch.stack(rows),
        )
