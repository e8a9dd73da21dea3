"""DCDM: deep conjugate direction method (Kaneda, Akar, Chen, Kala, Hyde, Teran; ICML 2023, arXiv 2205.10763).

A x = b with A symmetric positive definite and large. A network f proposes where to go, and an exact line search and
A-orthogonality to the last directions keep the method of conjugate directions right whatever it proposes ::

    d = f(r / |r|)                       r = b - A x
    d = d - sum_i p_i (d.A p_i) / (p_i.A p_i)      over the last ``keep`` directions p_i
    x = x + d (r.d) / (d.A d)

The A-norm of the error never grows. With f(r) = r this is the method of conjugate gradients, with f(r) parallel to
A^-1 r it ends after one step. A network is trained on the spectrum of one matrix of a kind, without any solution
(:func:`gradmatch.solve.train_direction_net`), and then serves others: larger grids, obstacles.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.core.krylov import LinearOperator, as_operator, asymmetry, cg
from gradmatch.core.tap import evaluating
from gradmatch.solve._direction_net import DirectionNet
from gradmatch.solve._null_space import NullSpace

__all__ = ["DirectionInfo", "DirectionNet", "DirectionSolver"]

Proposal = Callable[[Tensor], Tensor]
FLAT = 1e-12
"""Curvature d.Ad / d.d up to this share of the diagonal's largest entry is none (our own safeguard)."""


@dataclass(frozen=True)
class DirectionInfo:
    """How a solution was found, with an entry for each right-hand side.

    Attributes:
        residuals: |b - A x| over that of the start, before the first and after every iteration.
        iterations: directions taken from the proposer.
        replaced: how many of them were no use (no curvature, or no descent) and replaced by the residual.
        fallbacks: iterations of conjugate gradients after ``max_iter``.
        converged: whether the last residual is at most ``tol``, or what rounding leaves of b.
    """

    residuals: Float[Tensor, "k b"]
    iterations: Int[Tensor, " b"]
    replaced: Int[Tensor, " b"]
    fallbacks: Int[Tensor, " b"]
    converged: Bool[Tensor, " b"]


class DirectionSolver:
    """Solve A x = b along proposed directions.

    Args:
        A: symmetric positive (semi-)definite: a scipy sparse matrix, a torch tensor (dense, COO, CSR), an array or an
            operator (see :func:`gradmatch.core.krylov.as_operator`).
        propose: an ``nn.Module`` from (b, 1, *grid) to the same (with ``grid_shape``), in its own precision; a
            function of residuals [n, b]; an approximate inverse as an operator, scipy's ``LinearOperator`` included
            (a multigrid cycle, a factorisation); or "residual", which is the method of conjugate gradients.
        grid_shape: of the unknowns, for a network; the product is n.
        keep: directions that a new one is made A-orthogonal to; 2 as published. More help away from the training size.
        tol: end when the residual has fallen to this share; 1e-4 as in the published tests.
        max_iter: most proposals, 100.
        normalize: hand the proposer unit residuals.
        recompute: r = b - A x anew in every iteration, as published; False saves that product.
        fallback: "cg" goes on from there with conjugate gradients after ``max_iter``; None gives what there is.
        null_space: columns [n, q] that A maps to 0. Default: zero rows, and constants on parts of a matrix whose rows
            sum to 0, are found; the solution has no part in them.
        dtype: of the solver, float64. In float32, residuals stall near 1e-6.
        device: of the solver; default where A is. A network is asked where it is.

    Raises:
        InputError: A not square or not symmetric, a grid that does not fit, options out of range.

    >>> import scipy.sparse as sp
    >>> A = sp.diags([2.0, -1.0, -1.0], [0, 1, -1], shape=(50, 50))
    >>> x, info = DirectionSolver(A, "residual", tol=1e-8).solve(np.ones(50))
    >>> bool(np.allclose(A @ x, 1)), int(info.iterations)
    (True, 25)
    """

    def __init__(
        self,
        A: Any,
        propose: str | Proposal | nn.Module | LinearOperator | Any = "residual",
        *,
        grid_shape: tuple[int, ...] | None = None,
        keep: int = 2,
        tol: float = 1e-4,
        max_iter: int = 100,
        normalize: bool = True,
        recompute: bool = True,
        fallback: str | None = "cg",
        null_space: Any = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> None:
        self.operator = as_operator(A, dtype=dtype, device=device)
        n, p = self.operator.shape
        checks.require(n == p, f"A has shape ({n}, {p}); it must be square.")
        gap = asymmetry(self.operator, torch.Generator().manual_seed(0))
        slack = torch.finfo(self.operator.dtype).eps ** 0.5
        checks.require(
            gap <= slack,
            f"A is not symmetric: u.Av and v.Au differ by {gap:.2g} of their size for random u, v.",
        )
        self.keep, self.max_iter = checks.whole("keep", keep, 0), checks.whole("max_iter", max_iter, 0)
        self.tol, self.normalize, self.recompute = checks.positive("tol", tol), normalize, recompute
        self.fallback = checks.one_of("fallback", fallback, ("cg", None))
        self.null_space = NullSpace.of(self.operator, null_space)
        self.scale = self._scale()
        self.network = propose if isinstance(propose, nn.Module) else None
        self.propose = self._proposer(propose, grid_shape)

    def solve(self, b: Any, x0: Any = None, mask: Any = None) -> tuple[Any, DirectionInfo]:
        """Solve for one right-hand side [n] or many [n, k], each ending on its own.

        Args:
            b: right-hand sides, numpy or torch; x comes back alike. For a singular A the part outside its range is
                taken away, with a warning where it is more than ``tol`` of b.
            x0: where to start, shaped as ``b``; default 0.
            mask: cells that may move, bool [n] or in the shape of the grid; default those that have an equation.

        Raises:
            InputError: shapes that do not fit, NaN, or a direction of no positive curvature.
        """
        rhs = self._columns("b", b)
        x = torch.zeros_like(rhs) if x0 is None else self._columns("x0", x0).clone()
        checks.same_length("x0", x.T, "b", rhs.T)
        cells = None if mask is None else torch.as_tensor(mask, device=rhs.device).flatten().bool()
        checks.require(
            cells is None or len(cells) == len(rhs),
            f"mask has {0 if cells is None else len(cells)} cells; A has {len(rhs)} unknowns.",
        )
        rhs = self.null_space.answerable(rhs, self.tol)
        r = rhs - self.operator.matvec(x)
        if cells is not None:
            r = r * cells[:, None]
        run = _Run(self, rhs, x, r, cells)
        with nullcontext() if self.network is None else evaluating(self.network):
            while run.k < self.max_iter and run.step():
                pass
        run.leave()
        if self.fallback is not None:
            run.finish()
        x = self.null_space.projected(run.found) if x0 is None else run.found
        return self._like(b, x), run.info()

    # --- preparation ---------------------------------------------------------------------------------------

    def _columns(self, name: str, values: Any) -> Tensor:
        found = torch.as_tensor(values).detach().to(dtype=self.operator.dtype, device=self.operator.device)
        columns, n = found[:, None] if found.ndim == 1 else found, self.operator.shape[0]
        checks.require(
            columns.ndim == 2 and len(columns) == n,
            f"{name} has shape {tuple(found.shape)}; it must be ({n},) or ({n}, k).",
        )
        return checks.finite(name, columns)

    def _like(self, b: Any, x: Tensor) -> Any:
        found = x[:, 0] if np.ndim(b) == 1 else x
        return found if isinstance(b, Tensor) else found.cpu().numpy()

    def _scale(self) -> float:
        diagonal = getattr(self.operator, "diagonal", None)
        if diagonal is not None:
            return float(diagonal().max())
        probe = torch.randn(self.operator.shape[0], 1, generator=torch.Generator().manual_seed(0))
        probe = probe.to(dtype=self.operator.dtype, device=self.operator.device)
        return float((probe * self.operator.matvec(probe)).sum() / probe.square().sum())

    def _proposer(self, propose: Any, grid_shape: tuple[int, ...] | None) -> Proposal | None:
        if isinstance(propose, str):
            checks.one_of("propose", propose, ("residual",))
            return None
        if isinstance(propose, nn.Module):
            return _on_grid(propose, grid_shape, self.operator.shape[0])
        if hasattr(propose, "shape"):
            inverse = as_operator(propose, dtype=self.operator.dtype, device=self.operator.device)
            checks.require(
                inverse.shape == self.operator.shape,
                f"propose has shape {inverse.shape}; it must be {self.operator.shape} as A.",
            )
            return inverse.matvec
        checks.require(callable(propose), f"propose is a {type(propose).__name__}; it must be callable.")
        proposal: Proposal = propose
        return proposal


class _Run:
    """One solve. ``columns`` are the right-hand sides still in the work; what is known of all lies in ``found``."""

    def __init__(
        self, solver: DirectionSolver, rhs: Tensor, x: Tensor, r: Tensor, cells: Tensor | None
    ) -> None:
        self.solver, self.cells, self.all_rhs = solver, cells, rhs
        self.rhs, self.x, self.r, self.found = rhs, x, r, x.clone()
        size = r.norm(dim=0)
        self.first = torch.where(size > 0, size, 1.0)
        rounding = 10 * torch.finfo(rhs.dtype).eps * rhs.norm(dim=0) / self.first
        self.goal = rounding.clamp_min(solver.tol)
        self.norms = size / self.first
        self.history = [self.norms.clone()]
        self.columns = torch.arange(x.shape[1], device=x.device)
        self.iterations, self.replaced, self.fallbacks = (torch.zeros_like(self.columns) for _ in range(3))
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []
        self.k = 0

    def step(self) -> bool:
        """One iteration of all right-hand sides that go on; False if there was none."""
        self._narrow((self.norms > self.goal)[self.columns])
        if not len(self.columns):
            return False
        p, image, curve = self._direction()
        alpha = (self.r * p).sum(0) / curve
        self.x = self.x + alpha * p
        if self.solver.recompute:
            self.r = self._masked(self.rhs - self.solver.operator.matvec(self.x))
        else:
            self.r = self.r - alpha * image
        self.kept = [*self.kept, (p, image, curve)][-self.solver.keep :] if self.solver.keep else []
        self.k += 1
        self.iterations[self.columns] += 1
        self.norms[self.columns] = checks.finite(
            "the residual", self.r.norm(dim=0) / self.first[self.columns]
        )
        self.history.append(self.norms.clone())
        return True

    def _direction(self) -> tuple[Tensor, Tensor, Tensor]:
        """A direction for each column with its image A d and curvature d.A d, A-orthogonal to those kept."""
        if self.solver.propose is None:
            d, image, curve = self._conjugate(self.r)
        else:
            given = self.r / self.r.norm(dim=0) if self.solver.normalize else self.r
            proposed = self.solver.propose(given)
            got = tuple(proposed.shape) if isinstance(proposed, Tensor) else type(proposed).__name__
            checks.require(
                got == tuple(given.shape),
                f"propose gave {got} for residuals of shape {tuple(given.shape)}; it must give a tensor of that shape.",
            )
            d, image, curve = self._conjugate(self._masked(proposed.detach().to(self.r)))
        slope = (self.r * d).sum(0)
        bad = ~(curve > self._flat(d)) | ~slope.isfinite() | (slope == 0)
        if bool(bad.any()):
            self.replaced[self.columns[bad]] += self.solver.propose is not None
            for mine, own in zip((d, image), self._conjugate(self.r), strict=False):
                mine[:, bad] = own[:, bad]
            curve = (d * image).sum(0)
            checks.require(
                bool((curve > self._flat(d)).all()),
                "A has no positive curvature along a residual: it is not positive definite, or b lies outside the "
                "range of a singular A whose null_space was not given.",
            )
        return d, image, curve

    def _flat(self, d: Tensor) -> Tensor:
        return FLAT * self.solver.scale * d.square().sum(0)

    def _conjugate(self, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image = self._image(d)
        given = d  # both coefficients from the direction as proposed: classical Gram-Schmidt, as published
        for p, image_p, curve_p in self.kept:
            along = (given * image_p).sum(0) / curve_p
            d, image = d - along * p, image - along * image_p
        return d, image, (d * image).sum(0)

    def _masked(self, vectors: Tensor) -> Tensor:
        vectors = self.solver.null_space.projected(vectors)
        return vectors if self.cells is None else vectors * self.cells[:, None]

    def _narrow(self, live: Tensor) -> None:
        if bool(live.all()):
            return
        self.leave()
        self.columns, self.rhs, self.x, self.r = (
            t[..., live] for t in (self.columns, self.rhs, self.x, self.r)
        )
        self.kept = [(p[:, live], image[:, live], curve[live]) for p, image, curve in self.kept]

    def leave(self) -> None:
        """Note the present solutions."""
        self.found[:, self.columns] = self.x

    def finish(self) -> None:
        """Conjugate gradients for the right-hand sides that have not converged."""
        which = (self.norms > self.goal).nonzero().flatten()
        if not len(which):
            return
        r = self._masked(self.all_rhs[:, which] - self.solver.operator.matvec(self.found[:, which]))
        operator = self.solver.operator
        if self.cells is not None:
            operator = as_operator(self._image, len(r), dtype=r.dtype, device=r.device)
        start = self.norms[which]
        found = cg(operator, r, tol=float((self.goal[which] / start).min()))
        checks.require(
            not bool(found.indefinite.any()), "A is not positive definite: conjugate gradients met p.Ap <= 0."
        )
        self.found[:, which] += found.x
        self.fallbacks[which] = found.iterations
        for norms in found.history[1:]:
            self.norms[which] = norms * start
            self.history.append(self.norms.clone())

    def _image(self, vectors: Tensor) -> Tensor:
        columns = vectors[:, None] if vectors.ndim == 1 else vectors
        return self._masked(self.solver.operator.matvec(columns)).reshape(vectors.shape)

    def info(self) -> DirectionInfo:
        """How it went, in the order of the right-hand sides."""
        history, done = torch.stack(self.history), self.norms <= self.goal
        return DirectionInfo(history, self.iterations, self.replaced, self.fallbacks, done)


def _on_grid(net: nn.Module, grid_shape: tuple[int, ...] | None, n: int) -> Proposal:
    """A network as a function of residuals [n, b], in its own precision and place, without gradient."""
    checks.require(grid_shape is not None, "grid_shape is None; a network needs the shape of the grid.")
    assert grid_shape is not None
    shape = tuple(checks.whole("grid_shape", side) for side in grid_shape)
    checks.require(
        int(np.prod(shape)) == n,
        f"grid_shape is {shape} with {int(np.prod(shape))} cells; A has {n} unknowns.",
    )
    pooling = getattr(net, "pooling", 1)
    checks.require(
        all(side % pooling == 0 for side in shape),
        f"grid_shape is {shape}; every side must be divisible by {pooling}, by which the network pools.",
    )
    dims = getattr(net, "dims", len(shape))
    checks.require(dims == len(shape), f"grid_shape is {shape}; the network is for {dims} dimensions.")
    first = next(net.parameters(), torch.zeros(()))

    @torch.no_grad()
    def propose(r: Tensor) -> Tensor:
        images = r.T.reshape(-1, 1, *shape).to(first)
        found: Tensor = net(images)
        return found.reshape(len(images), n).T

    return propose
