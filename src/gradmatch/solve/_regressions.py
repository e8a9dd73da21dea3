"""Three ways to solve all the small regressions of one half of a sweep: exactly, by conjugate gradients, by sketching.

Each takes the residual r = M - <u_i, v_j> at the present v and returns the change of v, so that a regression whose
normal matrix is singular takes the least change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from gradmatch.core.krylov import FunctionOperator, cg
from gradmatch.solve._entries import Side

SOLVERS = ("auto", "exact", "pcg", "sketch")
AUTO_RANK = 8
"""Rank from which ``auto`` takes conjugate gradients; below, factorising the small matrices is as fast."""
FEW, ENOUGH = 2, 32
"""Entries per rank up to which ``auto`` solves a regression exactly, and above which sketching one pays."""
SINGLE_TOL = 1e-4
"""Inner tolerance down to which single precision carries the directions; the residual stays in double."""


@dataclass(frozen=True)
class Inner:
    """How the regressions are solved.

    Attributes:
        solver: "exact", "pcg", "sketch" or "auto".
        tol: a regression stops when its gradient has fallen to this share of what it was at the start.
        most: most steps of conjugate gradients.
        ridge: weight of |v|^2.
        sketch_rows: rows of a sketch for each of the k columns.
        generator: of the sketches.
    """

    solver: str
    tol: float
    most: int
    ridge: float
    sketch_rows: int
    generator: torch.Generator

    def change(
        self, side: Side, fixed: Float[Tensor, "w k"], free: Float[Tensor, "c k"], r: Float[Tensor, " N"]
    ) -> tuple[Float[Tensor, "c k"], float]:
        """The change of ``free`` and the inner steps taken, on average over the regressions."""
        rank = fixed.shape[1]
        if self.solver == "exact" or (self.solver == "auto" and rank < AUTO_RANK):
            return exact(side, fixed, free, r, self), 1.0
        if self.solver == "pcg":
            return pcg(side, fixed, free, r, self)
        few, many = side.parted((ENOUGH if self.solver == "sketch" else FEW) * rank)
        change, steps = torch.zeros_like(free), 0.0
        if few.side.count:
            change[few.which] = exact(few.side, fixed, free[few.which], r[few.entries], self)
            steps += few.side.count
        if many.side.count:
            inexact = sketched if self.solver == "sketch" else pcg
            change[many.which], own = inexact(many.side, fixed, free[many.which], r[many.entries], self)
            steps += own * many.side.count
        return change, steps / side.count


def exact(side: Side, fixed: Tensor, free: Tensor, r: Tensor, how: Inner) -> Tensor:
    """Normal equations (sum_i u_i u_i^T + ridge I) d = sum_i r_i u_i - ridge v, in batches by Cholesky."""
    slope = side.gather(r, fixed) - how.ridge * free
    change = -free if how.ridge > 0 else torch.zeros_like(free)  # of a regression without entries
    for which, normal in _normal_matrices(side, fixed):
        normal.diagonal(dim1=1, dim2=2).add_(how.ridge)
        change[which] = _spd_solve(normal, slope[which])
    return change


def _normal_matrices(side: Side, fixed: Tensor) -> Iterator[tuple[Tensor | slice, Float[Tensor, "b k k"]]]:
    """sum_i u_i u_i^T of all regressions, in batches: sums of the small products, or products of the rows gathered."""
    width, k = fixed.shape
    if k < AUTO_RANK:
        products = (fixed[:, :, None] * fixed[:, None, :]).reshape(width, k * k)
        yield slice(None), side.gather(torch.ones_like(side.values), products).reshape(-1, k, k)
        return
    padded = torch.cat([fixed, fixed.new_zeros(1, k)])
    for which, index in side.blocks(k):
        rows = padded[index]
        yield which, rows.mT @ rows


def _spd_solve(normal: Float[Tensor, "b k k"], right: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
    """Least-norm solutions; those that Cholesky cannot be trusted with go by eigenvalues."""
    factor, failed = torch.linalg.cholesky_ex(normal)
    pivots = factor.diagonal(dim1=1, dim2=2)
    floor = 100 * normal.shape[1] * torch.finfo(normal.dtype).eps
    weak = (failed != 0) | (pivots.amin(1).square() <= floor * pivots.amax(1).square())
    found = torch.cholesky_solve(right[:, :, None], factor)[:, :, 0]
    if bool(weak.any()):
        values, vectors = torch.linalg.eigh(normal[weak])
        kept = values > floor * values[:, -1:]
        inverse = torch.where(kept, values, torch.inf).reciprocal()
        turned = (right[weak, None] @ vectors)[:, 0] * inverse
        found[weak] = (vectors @ turned[:, :, None])[:, :, 0]
    return found


def pcg(side: Side, fixed: Tensor, free: Tensor, r: Tensor, how: Inner) -> tuple[Tensor, float]:
    """Conjugate gradients on the normal equations of all regressions at once, two passes over the entries a step.

    With orthonormal columns in ``fixed`` the preconditioner (p U^T U)^-1 is a number and changes nothing. A solution
    wanted to ``tol`` needs directions of no more digits than that, so they are kept in single precision where the
    tolerance allows; the residual that they correct is the caller's, in full precision.
    """
    digits = torch.float32 if how.tol >= SINGLE_TOL else fixed.dtype
    rows = fixed.to(digits)
    scale = (
        r.abs().max().clamp_min(torch.finfo(r.dtype).tiny)
    )  # single precision loses squares of small numbers
    slope = side.gather((r / scale).to(digits), rows) - how.ridge * (free / scale).to(digits)
    change, steps = _conjugate_gradients(
        lambda p: side.gather(side.products(rows, p), rows) + how.ridge * p, slope, how
    )
    return change.to(free.dtype) * scale, steps


def sketched(side: Side, fixed: Tensor, free: Tensor, r: Tensor, how: Inner) -> tuple[Tensor, float]:
    """Regressions preconditioned by the R of a QR of their sketch, y = R v, solved by conjugate gradients in y."""
    padded = torch.cat([fixed, fixed.new_zeros(1, fixed.shape[1])])
    residuals = torch.cat([r, r.new_zeros(1)])
    change, steps = torch.zeros_like(free), 0.0
    for which, index in side.blocks(fixed.shape[1], extra=4):
        place = side.offsets[which, None] + torch.arange(index.shape[1], device=index.device)
        b = residuals[torch.where(index == side.width, len(r), place)]
        A = padded[index]
        if how.ridge > 0:  # as rows sqrt(ridge) I with right-hand side -sqrt(ridge) v
            root = how.ridge**0.5
            eye = root * torch.eye(A.shape[2], dtype=A.dtype, device=A.device).expand(len(A), -1, -1)
            A, b = torch.cat([A, eye], 1), torch.cat([b, -root * free[which]], 1)
        R = sketch_preconditioner(A, how.sketch_rows * A.shape[2], how.generator)
        good = torch.linalg.solve_triangular(R, A, upper=True, left=False)
        slope = (b[:, None] @ good)[:, 0]
        y, own = _conjugate_gradients(partial(_normal_product, good), slope, how)
        change[which] = torch.linalg.solve_triangular(R, y[:, :, None], upper=True)[:, :, 0]
        steps += own * len(which)
    return change, steps / side.count


def sketch_preconditioner(
    A: Float[Tensor, "b c k"], rows: int, generator: torch.Generator
) -> Float[Tensor, "b k k"]:
    """R of a QR of S A, S a subsampled randomised Hadamard transform; the columns of A R^-1 are nearly orthonormal.

    S = sqrt(1 / rows) P H D: random signs D, Hadamard transform H of entries +-1 over the next power of two, and
    rows P drawn without replacement (all of them where there are no more).
    """
    count, most = A.shape[1], 1 << (A.shape[1] - 1).bit_length()
    signs = torch.randint(2, (count,), generator=generator).to(A) * 2 - 1
    mixed = hadamard(torch.nn.functional.pad(A * signs[:, None], (0, 0, 0, most - count)))
    rows = min(rows, most)
    chosen = torch.randperm(most, generator=generator)[:rows].to(A.device)
    R: Tensor = torch.linalg.qr(mixed[:, chosen] / rows**0.5, mode="r").R
    return R


def hadamard(x: Float[Tensor, "b c k"]) -> Float[Tensor, "b c k"]:
    """The Walsh-Hadamard transform along dimension 1, of entries +-1; its size must be a power of two."""
    b, c, k = x.shape
    half = 1
    while half < c:
        left, right = x.reshape(b, c // (2 * half), 2, half, k).unbind(2)
        x = torch.stack([left + right, left - right], 2)
        half *= 2
    return x.reshape(b, c, k)


def _normal_product(A: Float[Tensor, "b c k"], p: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
    """A^T A p for every matrix of a batch."""
    return (A @ p[:, :, None]).mT.matmul(A)[:, 0]


def _conjugate_gradients(
    normal: Callable[[Tensor], Tensor], slope: Float[Tensor, "c k"], how: Inner
) -> tuple[Float[Tensor, "c k"], float]:
    """Solutions of N_j d_j = slope_j, each ending on its own, and the steps taken on average.

    ``normal`` is d -> N d over all regressions. One whose slope is 0 has nothing to do and takes no step.
    """
    k = slope.shape[1]
    operator = FunctionOperator(lambda p: normal(p.T).T, (k, k), slope.dtype, slope.device)
    found = cg(operator, slope.T, tol=how.tol, max_iter=how.most, shared=False)
    return found.x.T, float(found.iterations.double().mean())
