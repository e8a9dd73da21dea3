"""Lanczos with full reorthogonalisation, for many starting vectors at once, and extreme eigenpairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradmatch.core._operators import LinearOperator, as_operator, as_vectors, square
from gradmatch.core._probes import probe_vectors
from gradmatch.core.checks import finite, positive, require, whole

__all__ = ["Eigenpairs", "Lanczos", "eigenpairs", "lanczos"]

_AGAIN = 0.5**0.5  # a vector that lost more than this share of its length is orthogonalised once more


@dataclass(frozen=True)
class Lanczos:
    """Tridiagonal matrices T = Q^T A Q of ``b`` starting vectors, one each.

    Attributes:
        diagonal, off: entries of T [b, m] in float64; ``off[:, j]`` couples step j with j + 1, and the last one is
            the length of what remained.
        steps: rows of T that count for each start [b]; fewer than m where an invariant subspace was found.
        basis: rows of Q^T [b, m, P], orthonormal.
    """

    diagonal: Float[Tensor, "b m"]
    off: Float[Tensor, "b m"]
    steps: Int[Tensor, " b"]
    basis: Float[Tensor, "b m P"]

    def tridiagonal(self, k: int = 0) -> Float[Tensor, "m m"]:
        """T of start ``k``, only the rows that count."""
        m = int(self.steps[k])
        off = self.off[k, : m - 1]
        return torch.diag(self.diagonal[k, :m]) + torch.diag(off, 1) + torch.diag(off, -1)

    def quadrature(self, k: int = 0) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
        """Nodes (eigenvalues of T, ascending) and weights (squared first components, of sum 1)."""
        nodes, vectors = torch.linalg.eigh(self.tridiagonal(k))
        return nodes, vectors[0].square()

    def ritz(self, k: int = 0) -> tuple[Float[Tensor, " m"], Float[Tensor, "P m"], Float[Tensor, " m"]]:
        """Ritz values ascending, vectors as columns, and norms of A v - value v."""
        m = int(self.steps[k])
        values, s = torch.linalg.eigh(self.tridiagonal(k))
        vectors = self.basis[k, :m].T @ s.to(self.basis.dtype)
        return values, vectors, (self.off[k, m - 1] * s[-1]).abs()


def lanczos(A: Any, start: Any, steps: int) -> Lanczos:
    """Lanczos from one start [P] or several [P, b], which share their products with A.

    Every new vector is orthogonalised against all earlier ones, once more where much of it was lost, so that no ghost
    copies of eigenvalues appear. T is kept in float64. The basis takes b * steps * P numbers.

    Args:
        A: symmetric; whatever :func:`as_operator` takes (for a function, P is the length of ``start``).
        start: starting vectors of any length above 0.
        steps: most steps; at most P are made.

    Raises:
        InputError: A not symmetric, a start of length 0, values that are not finite.

    >>> A = torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64))
    >>> lanczos(A, torch.ones(5), 5).ritz()[0].round(decimals=6)
    tensor([1., 2., 3., 4., 5.], dtype=torch.float64)
    """
    first = torch.as_tensor(start)
    operator = square(as_operator(A, len(first), dtype=first.dtype, device=first.device))
    vectors = as_vectors("start", first, operator)
    p, b = vectors.shape
    m = min(whole("steps", steps), p)
    lengths = vectors.norm(dim=0)
    require(bool((lengths > 0).all()), "start has a vector of length 0.")
    basis = torch.zeros(b, m, p, dtype=operator.dtype, device=operator.device)
    basis[:, 0] = (vectors / lengths).T
    diagonal = torch.zeros(b, m, dtype=torch.float64, device=operator.device)
    off, sizes = torch.zeros_like(diagonal), torch.full((b,), m, device=operator.device)
    going = torch.ones(b, dtype=torch.bool, device=operator.device)
    size = torch.zeros(b, dtype=torch.float64, device=operator.device)
    for j in range(m):
        q = basis[:, j]
        w = finite("a product with A", operator.matvec(q.T)).T
        diagonal[:, j] = torch.where(going, _dots(q, w), 0)
        w = torch.addcmul(w, q, diagonal[:, j, None].to(w.dtype), value=-1)
        if j:
            w.addcmul_(basis[:, j - 1], off[:, j - 1, None].to(w.dtype), value=-1)
        w = _orthogonal(w, basis[:, : j + 1])
        length = torch.linalg.vector_norm(w, dim=1, dtype=torch.float64)
        size = torch.maximum(size, torch.maximum(diagonal[:, j].abs(), length))
        ends = going & (length <= 10 * torch.finfo(operator.dtype).eps * size)
        sizes[ends], length[ends] = j + 1, 0
        going = going & ~ends
        off[:, j] = torch.where(going, length, 0)
        if not bool(going.any()):
            break
        if j + 1 < m:
            basis[:, j + 1] = w * torch.where(going, 1 / length, 0)[:, None].to(w.dtype)
    m = int(sizes.max())
    return Lanczos(diagonal[:, :m], off[:, :m], sizes, basis[:, :m])


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of rows, in float64."""
    return torch.stack([torch.dot(x, y) for x, y in zip(a.double(), b.double(), strict=True)])


def _orthogonal(w: Tensor, basis: Tensor) -> Tensor:
    """Rows w [b, P] less their parts along the rows of basis [b, m, P], for each b by products with one matrix."""
    return torch.stack([_without(one, rows) for one, rows in zip(w, basis, strict=True)])


def _without(w: Tensor, rows: Tensor) -> Tensor:
    length = float(w.norm())
    for _ in range(2):
        w = torch.addmv(w, rows.T, rows @ w, alpha=-1)
        left = float(w.norm())
        if left > _AGAIN * length:
            break
        length = left
    return w


# --- extreme eigenpairs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues descending [k], eigenvectors as columns [P, k], norms of A v - value v, products with A spent."""

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "P k"]
    residuals: Float[Tensor, " k"]
    products: int
    converged: bool


def eigenpairs(
    A: Any,
    largest: int = 1,
    smallest: int = 0,
    *,
    generator: torch.Generator,
    tol: float = 1e-5,
    block: int = 2,
    max_products: int = 2000,
    size: int | None = None,
    progress: Callable[[int, float], object] | None = None,
) -> Eigenpairs:
    """The algebraically largest and smallest eigenvalues, by block Lanczos with full reorthogonalisation and restarts.

    A basis Q grows by A times its last block; H = Q^T A Q is kept whole, and when the basis is full the best Ritz
    vectors are kept with the newest block (thick restart; Wu and Simon, SIAM J. Matrix Anal. 22, 2000).

    Args:
        A: symmetric; whatever :func:`as_operator` takes.
        largest, smallest: how many of each end.
        generator: of the starting block.
        tol: wanted residual norms, relative to the largest |eigenvalue|.
        block: vectors multiplied at once; eigenvalues of a higher multiplicity may be found fewer times.
        max_products: most products; then the best there is is given, with ``converged`` False.
        size: P, where A is a function.
        progress: called after every block with (products, largest relative residual).

    Raises:
        InputError: A not symmetric, more pairs asked for than P, values that are not finite.
    """
    operator = square(as_operator(A, size))
    p = operator.shape[0]
    top, bottom = whole("largest", largest, least=0), whole("smallest", smallest, least=0)
    require(
        1 <= top + bottom <= p,
        f"largest + smallest is {top + bottom}; it must be between 1 and P = {p}.",
    )
    limit, most = positive("tol", tol), whole("max_products", max_products)
    space = _Subspace(operator, top, bottom, min(whole("block", block), p), generator)
    while True:
        space.grow()
        worst = space.judge()
        if progress is not None:
            progress(space.products, worst)
        if worst <= limit or space.filled == p or space.products >= most:
            return space.result(worst <= limit or space.filled == p)
        if space.full:
            space.restart()


class _Subspace:
    """Orthonormal Q (rows of ``q``) with A Q = Q H + N B^T, where N is the next block and B its coupling to Q."""

    def __init__(
        self, operator: LinearOperator, top: int, bottom: int, block: int, generator: torch.Generator
    ) -> None:
        self.operator, self.generator, self.block = operator, generator, block
        self.top, self.bottom = top, bottom
        self.p, self.products = operator.shape[0], 0
        k = top + bottom
        self.spare = k // 2 + 8  # Ritz vectors kept beyond those asked for, shared by the ends in use
        self.room = min(self.p, 2 * (k + self.spare) + 2 * block)
        self.q = torch.empty(self.room, self.p, dtype=operator.dtype, device=operator.device)
        self.h = self.coupling = torch.zeros(0, 0, dtype=torch.float64, device=operator.device)
        self.next = self._block(self.q[:0], block)
        self.values = self.s = self.residuals = self.h

    @property
    def filled(self) -> int:
        """Rows of Q in use."""
        return len(self.h)

    @property
    def full(self) -> bool:
        """Whether Q has to be restarted before it can grow."""
        return self.filled + len(self.next) > self.room and self.room < self.p

    def grow(self) -> None:
        """Take the next block into Q, its products into H, and what remains of them as the next block."""
        old, new = self.filled, self.filled + len(self.next)
        self.q[old:new] = self.next
        w = finite("a product with A", self.operator.matvec(self.next.T)).T
        self.products += new - old
        along = torch.zeros(new, new - old, dtype=torch.float64, device=self.h.device)
        for _ in range(2):
            part = self.q[:new] @ w.T
            w = w - part.T @ self.q[:new]
            along += part.double()
        h = torch.zeros(new, new, dtype=torch.float64, device=self.h.device)
        h[:old, :old] = self.h
        h[:, old:] = along
        h[old:] = along.T
        self.h = (h + h.T) / 2
        self.next, triangle = self._split(w, h.abs().max().item())
        self.coupling = torch.zeros(new, len(self.next), dtype=torch.float64, device=h.device)
        self.coupling[old:] = triangle

    def _split(self, w: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Orthonormal rows N and C with w = C N; where nothing is left, N is drawn anew and C is 0."""
        width = min(len(w), self.p - self.filled)
        u, lengths, n = torch.linalg.svd(w, full_matrices=False)
        kept = int((lengths[:width] > 10 * torch.finfo(w.dtype).eps * scale).sum())
        coupling = (u * lengths)[:, :width].double()
        coupling[:, kept:] = 0
        return self._block(n[:kept], width), coupling

    def _block(self, rows: Tensor, width: int) -> Tensor:
        """``rows`` filled up with random ones to ``width``, orthonormal and orthogonal to Q."""
        n, q = rows, self.q[: self.filled]
        if width > len(rows):
            drawn = probe_vectors(self.operator, width - len(rows), self.generator, "sphere")
            n = torch.cat([rows, drawn.T])
        for _ in range(2):
            n = n - (n @ q.T) @ q
        found, triangle = torch.linalg.qr(n.T)
        return (
            found.T * triangle.diagonal().sign()[:, None]
        )  # QR may turn a vector round, which C must not see

    def judge(self) -> float:
        """Ritz pairs of both ends; the largest relative residual, infinite while there are too few."""
        self.values, self.s = torch.linalg.eigh(self.h)
        scale = self.values.abs().max()
        self.residuals = (self.coupling.T @ self.s).norm(dim=0) / torch.where(scale > 0, scale, 1)
        if self.filled < self.top + self.bottom:
            return float("inf")
        return float(self.residuals[self._ends()].max())

    def _ends(self, spare: int = 0) -> Tensor:
        """Places of the wanted Ritz values, descending, with ``spare`` more at each end in use."""
        m = self.filled
        top = min(m, self.top + spare) if self.top else 0
        bottom = min(m - top, self.bottom + spare) if self.bottom else 0
        return torch.tensor([*range(m - 1, m - 1 - top, -1), *range(bottom - 1, -1, -1)])

    def restart(self) -> None:
        """Keep the best Ritz vectors of the ends, and the next block."""
        keep = self._ends(self.spare // (1 + (self.top > 0 and self.bottom > 0)))
        s = self.s[:, keep]
        self.q[: len(keep)] = s.T.to(self.q.dtype) @ self.q[: self.filled]
        self.h, self.coupling = torch.diag(self.values[keep]), s.T @ self.coupling

    def result(self, converged: bool) -> Eigenpairs:
        """The wanted pairs, with residuals in the units of A."""
        ends = self._ends()
        values = self.values[ends]
        vectors = (self.s[:, ends].T.to(self.q.dtype) @ self.q[: self.filled]).T
        return Eigenpairs(
            values, vectors, self.residuals[ends] * self.values.abs().max(), self.products, converged
        )
