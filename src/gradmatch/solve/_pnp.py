"""Plug-and-play reconstruction: a proximal operator, learned or not, in proximal gradient descent and in ADMM.

For measurements y = A x + noise ::

    PGD:    x <- f(x - eta A^T (A x - y))                                descends  |A x - y|^2 / 2 + R(x) / eta
    ADMM:   x <- argmin |A x - y|^2 / 2 + rho |x - z + u|^2 / 2,
            z <- f(x + u),   u <- u + x - z                              seeks     |A z - y|^2 / 2 + rho R(z)

with f the proximal operator of R. So eta and rho set how much the prior weighs: a prior learned at noise sigma belongs
to measurements of noise s with rho = s^2 / sigma^2, and eta cannot go beyond 1 / |A^T A|.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core.krylov import FunctionOperator, cg

METHODS, STARTS, ORDERS = ("pgd", "admm"), ("adjoint", "zeros"), ("data", "prox")
BELOW_BOUND = 0.95
POWER_STEPS = 50
Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Reconstruction:
    """What was found.

    Attributes:
        x: images (b, ...).
        objective: |A x - y|^2 / 2 + R(x) / eta (rho R(x) for ADMM) after every iteration, (iterations, b), up to a
            constant; None for a prox whose R is not known.
        misfit: |A x - y| after every iteration, (iterations, b).
        change: |x_k - x_{k-1}| (PGD) or |x - z| (ADMM), (iterations, b).
        weight: eta or rho.
    """

    x: Float[Tensor, "b ..."]
    objective: Float[Tensor, "k b"] | None
    misfit: Float[Tensor, "k b"]
    change: Float[Tensor, "k b"]
    weight: float


@torch.no_grad()
def pnp(
    y: Float[Tensor, "b ..."],
    A: Map,
    AT: Map,
    prox: Map,
    method: str = "pgd",
    eta: float | None = None,
    *,
    rho: float = 0.05,
    iters: int = 100,
    x0: str | Tensor = "adjoint",
    first: str = "data",
    tol: float = 1e-5,
    inner: int = 30,
    force: bool = False,
    seed: int = 0,
) -> Reconstruction:
    """Reconstruct images from linear measurements.

    Args:
        y: measurements.
        A, AT: a linear map of batches and its adjoint.
        prox: f, on batches of images: a :class:`gradmatch.solve.LearnedProx` (whose R is then followed too), or any
            denoiser.
        method: "pgd" or "admm".
        eta: step of "pgd"; default 0.95 / |A^T A|, below which the objective never rises. (The released script takes
            2, which is valid only where |A^T A| is at most 1/2.)
        rho: of "admm"; 0.05 as published.
        iters: iterations; 80 with ADMM as published.
        x0: "adjoint" (A^T y), "zeros", or images to start from.
        first: of ADMM, whether it begins with the "data" or the "prox".
        tol, inner: conjugate gradients of ADMM's data step end at this residual or after this many, as published.
        force: allow an eta beyond the bound.
        seed: of the vectors that estimate |A^T A| and test that AT is the adjoint.

    Raises:
        InputError: AT is not the adjoint of A, eta beyond the bound, options out of range, a result that is not finite.

    >>> y = torch.tensor([[3.0, 0.5]])
    >>> soft = lambda v: v.sign() * (v.abs() - 0.95).clamp_min(0)
    >>> pnp(y, lambda x: x, lambda x: x, soft, iters=200).x.round(decimals=3)
    tensor([[2., 0.]])
    """
    checks.one_of("method", method, METHODS)
    checks.one_of("first", first, ORDERS)
    checks.positive("tol", tol)
    checks.positive("rho", rho)
    checks.whole("inner", inner)
    start = AT(checks.floating("y", y))
    _require_adjoint(A, AT, start, y, seed)
    if isinstance(x0, Tensor):
        checks.require(
            x0.shape == start.shape, f"x0 has shape {tuple(x0.shape)}; it must be {tuple(start.shape)}."
        )
        start = checks.finite("x0", x0)
    elif checks.one_of("x0", x0, STARTS) == "zeros":
        start = torch.zeros_like(start)
    if method == "pgd":
        size = norm_of(A, AT, start, seed)
        eta = BELOW_BOUND / size if eta is None else checks.positive("eta", eta)
        checks.require(
            force or eta * size < 1,
            f"eta is {eta:g} and 1 / |A^T A| is {1 / size:.4g}; it must be below that for the objective to descend "
            f"(force=True takes it all the same).",
        )
    run = _Run(y, A, AT, prox, 1 / eta if method == "pgd" and eta is not None else rho)
    if method == "pgd" and eta is not None:
        return run.result(run.pgd(start, eta, checks.whole("iters", iters)), eta)
    return run.result(run.admm(start, rho, checks.whole("iters", iters), first, tol, inner), rho)


class _Run:
    def __init__(self, y: Tensor, A: Map, AT: Map, prox: Map, weight: float) -> None:
        self.y, self.A, self.AT, self.weight = y, A, AT, weight
        self.prox, self.with_prior = prox, getattr(prox, "prox_and_prior", None)
        self.objective: list[Tensor] = []
        self.misfit: list[Tensor] = []
        self.change: list[Tensor] = []

    def pgd(self, x: Tensor, eta: float, iters: int) -> Tensor:
        gap = self.A(x) - self.y
        for _ in range(iters):
            new, prior = self._proxed(x - eta * self.AT(gap))
            gap = self.A(new) - self.y
            self._note(gap, prior, new - x)
            x = new
        return x

    def admm(self, z: Tensor, rho: float, iters: int, first: str, tol: float, inner: int) -> Tensor:
        x, u, shape, adjoint = z, torch.zeros_like(z), z.shape, self.AT(self.y)
        n = z[0].numel()

        def normal(columns: Tensor) -> Tensor:
            images = columns.T.reshape(-1, *shape[1:])
            return (self.AT(self.A(images)) + rho * images).flatten(1).T

        operator = FunctionOperator(normal, (n, n), z.dtype, z.device)

        def data(v: Tensor, x: Tensor) -> Tensor:
            right, start = (t.flatten(1).T for t in (adjoint + rho * v, x))
            return cg(operator, right, start, tol=tol, max_iter=inner, shared=False).x.T.reshape(shape)

        for _ in range(iters):
            if first == "data":
                x = data(z - u, x)
                z, prior = self._proxed(x + u)
            else:
                z, prior = self._proxed(x + u)
                x = data(z - u, x)
            u = u + x - z
            self._note(self.A(z) - self.y, prior, x - z)
        return z

    def _proxed(self, v: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.with_prior is None:
            return self.prox(v), None
        x, prior = self.with_prior(v)
        return x, prior

    def _note(self, gap: Tensor, prior: Tensor | None, change: Tensor) -> None:
        misfit = gap.flatten(1).norm(dim=1)
        self.misfit.append(misfit)
        self.change.append(change.flatten(1).norm(dim=1))
        if prior is not None:
            self.objective.append(misfit.double().square() / 2 + self.weight * prior.double())

    def result(self, x: Tensor, weight: float) -> Reconstruction:
        objective = torch.stack(self.objective) if self.objective else None
        return Reconstruction(
            checks.finite("the reconstruction", x),
            objective,
            torch.stack(self.misfit),
            torch.stack(self.change),
            weight,
        )


def norm_of(A: Map, AT: Map, like: Tensor, seed: int = 0) -> float:
    """The largest eigenvalue of A^T A on images shaped as ``like``, the largest of all, by power iteration."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
    for _ in range(POWER_STEPS):
        sizes = v.flatten(1).norm(dim=1).clamp_min(torch.finfo(v.dtype).tiny)
        v = AT(A(v / sizes.reshape(-1, *[1] * (v.ndim - 1))))
    size = float(v.flatten(1).norm(dim=1).max())
    checks.require(size > 0, "A maps everything to 0; there is nothing to reconstruct from.")
    return size


def _require_adjoint(A: Map, AT: Map, image: Tensor, y: Tensor, seed: int) -> None:
    """<A u, v> = <u, A^T v> for random u and v."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (image, y))
    image_u: Any = A(u)
    checks.require(
        isinstance(image_u, Tensor) and image_u.shape == y.shape,
        f"A gives {tuple(getattr(image_u, 'shape', ()))}; y has shape {tuple(y.shape)}.",
    )
    left, right = float((image_u * v).sum()), float((u * AT(v)).sum())
    slack = 100 * torch.finfo(y.dtype).eps * float(image_u.norm() * v.norm())
    checks.require(
        abs(left - right) <= slack,
        f"AT is not the adjoint of A: <A u, v> is {left:.6g} and <u, AT v> is {right:.6g}.",
    )
