"""Traces, diagonals and spectral densities from a few random vectors, each with its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradmatch.core._lanczos import lanczos
from gradmatch.core._operators import LinearOperator, as_operator, square
from gradmatch.core._probes import Estimate, ProbeKind, probe_vectors
from gradmatch.core.checks import finite, positive, require, whole

__all__ = [
    "SpectralDensity",
    "gaussian_width",
    "hutchinson",
    "hutchinson_diagonal",
    "hutchpp",
    "spectral_density",
]

_BASIS = 2**28  # numbers of the Krylov bases held at once: 1 GiB in float32


def _chunks(count: int, chunk: int) -> list[int]:
    return [min(chunk, count - s) for s in range(0, count, chunk)]


def _samples(operator: LinearOperator, vectors: Tensor) -> Tensor:
    """z . A z of every column, in float64."""
    return (vectors.double() * operator.matvec(vectors).double()).sum(0)


def hutchinson(
    A: Any,
    probes: int = 32,
    *,
    generator: torch.Generator,
    kind: ProbeKind = "rademacher",
    chunk: int = 16,
    size: int | None = None,
) -> Estimate:
    """The trace of A as the mean of z . A z (Hutchinson 1990).

    Args:
        A: square; whatever :func:`as_operator` takes.
        probes: number of z. With signs the variance is 2 sum_{i != j} a_ij^2 / probes for symmetric A, so a diagonal
            A is exact with one.
        generator: of the probes.
        kind: "rademacher", "gaussian", or "sphere" (scaled by P).
        chunk: probes multiplied at once.
        size: P, where A is a function.

    >>> hutchinson(torch.diag(torch.arange(4.0)), 3, generator=torch.Generator()).value
    6.0
    """
    operator = square(as_operator(A, size), symmetric=False)
    parts = [
        _samples(operator, probe_vectors(operator, width, generator, kind))
        for width in _chunks(whole("probes", probes), whole("chunk", chunk))
    ]
    return Estimate.of(torch.cat(parts) * (operator.shape[0] if kind == "sphere" else 1))


def hutchinson_diagonal(
    A: Any,
    probes: int = 32,
    *,
    generator: torch.Generator,
    chunk: int = 16,
    size: int | None = None,
) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"]]:
    """The diagonal of A as the mean of z * A z over random signs (Bekas, Kokiopoulou, Saad 2007), and standard errors.

    >>> hutchinson_diagonal(torch.diag(torch.arange(3.0)), 2, generator=torch.Generator())[0]
    tensor([0., 1., 2.], dtype=torch.float64)
    """
    operator = square(as_operator(A, size), symmetric=False)
    n = whole("probes", probes)
    mean = torch.zeros(operator.shape[0], dtype=torch.float64, device=operator.device)
    spread, seen = torch.zeros_like(mean), 0
    for width in _chunks(n, whole("chunk", chunk)):
        z = probe_vectors(operator, width, generator)
        rows = z.double() * operator.matvec(z).double()
        # sums of squares about the mean, merged: sum z^2 - n mean^2 would cancel
        own, gap = rows.mean(1), rows.mean(1) - mean
        spread += (rows - own[:, None]).square().sum(1) + gap.square() * (seen * width / (seen + width))
        mean += gap * (width / (seen + width))
        seen += width
    error = (spread / (n - 1) / n).sqrt() if n > 1 else torch.full_like(mean, math.inf)
    return finite("the diagonal", mean), error


def hutchpp(
    A: Any,
    products: int = 48,
    *,
    generator: torch.Generator,
    chunk: int = 16,
    size: int | None = None,
) -> Estimate:
    """The trace of A by Hutch++ (Meyer, Musco, Musco, Woodruff, SOSA 2021): exact on a sketched range.

    A third of the products makes Q = orth(A S), a third gives tr Q^T A Q, and a third are Hutchinson probes of what is
    left, (I - QQ^T) A (I - QQ^T). For a quickly falling spectrum the error is far below that of as many plain probes.

    Args:
        A: square; whatever :func:`as_operator` takes.
        products: products with A in all, at least 3. Where a third of them spans the whole space, the result is exact.
        generator: of the sketch and the probes.
        chunk: vectors multiplied at once.
        size: P, where A is a function.
    """
    operator = square(as_operator(A, size), symmetric=False)
    p = operator.shape[0]
    third = whole("products", products, least=3) // 3
    sketch = probe_vectors(operator, min(third, p), generator)
    q = torch.linalg.qr(finite("A S", _product(operator, sketch, chunk)))[0]
    inside = float((q.double() * _product(operator, q, chunk).double()).sum())
    if third >= p:
        return Estimate.of(torch.zeros(2), inside)
    parts = []
    for width in _chunks(third, whole("chunk", chunk)):
        z = probe_vectors(operator, width, generator)
        parts.append(_samples(operator, z - q @ (q.T @ z)))
    return Estimate.of(torch.cat(parts), inside)


def _product(operator: LinearOperator, vectors: Tensor, chunk: int) -> Tensor:
    return torch.cat([operator.matvec(part) for part in vectors.split(whole("chunk", chunk), dim=1)], dim=1)


# --- spectral density --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpectralDensity:
    """A spectrum of P eigenvalues as a few weighted nodes for each probe.

    Attributes:
        nodes: where the mass is [probes, m], float64; rows that ended early are filled up with weight 0.
        weights: mass at each node [probes, m]; each row sums to 1.
        size: P.
    """

    nodes: Float[Tensor, "n m"]
    weights: Float[Tensor, "n m"]
    size: int

    def trace(self, function: Callable[[Tensor], Tensor] | None = None) -> Estimate:
        """The trace of ``function``(A), by default of A itself: P times the mean of sum weight * function(node)."""
        values = self.nodes if function is None else function(self.nodes)
        found = torch.where(self.weights > 0, self.weights * values, 0).sum(
            1
        )  # a pole at an unused node is none
        return Estimate.of(self.size * found)

    def range(self) -> tuple[float, float]:
        """Smallest and largest node of any weight."""
        used = self.nodes[self.weights > 0]
        return float(used.min()), float(used.max())

    def width(self, kappa: float = 3.0, margin: float = 0.05) -> float:
        """Width of the Gaussians for these many steps, by :func:`gaussian_width`."""
        return gaussian_width(*self.range(), self.nodes.shape[1], kappa, margin)

    def evaluate(self, grid: Tensor, width: float | None = None) -> tuple[Tensor, Tensor]:
        """Density at ``grid`` [g], of integral 1, and its standard error over the probes."""
        sigma = self.width() if width is None else positive("width", width)
        each = torch.stack(
            [smoothed(grid, n, w, sigma) for n, w in zip(self.nodes, self.weights, strict=True)]
        )
        n = len(each)
        error = each.std(0) / math.sqrt(n) if n > 1 else torch.full_like(each[0], math.inf)
        return each.mean(0), error

    def grid(self, points: int = 1024, width: float | None = None) -> Tensor:
        """Evenly spaced places [points] that hold the density with all its tails."""
        sigma = self.width() if width is None else positive("width", width)
        low, high = self.range()
        ends = low - 4 * sigma, high + 4 * sigma
        return torch.linspace(*ends, whole("points", points, least=2), dtype=torch.float64)


def gaussian_width(low: float, high: float, steps: int, kappa: float = 3.0, margin: float = 0.05) -> float:
    """2 / ((m - 1) sqrt(8 ln kappa)) for m steps, on the range padded by ``margin`` and scaled to [-1, 1].

    The rule of Lin, Saad, Yang (SIAM Review 58, 2016), with the padding of curvlinops. ``kappa`` is the ratio by which
    a Gaussian at one of m evenly spread nodes has fallen half-way to the next.
    """
    require(positive("kappa", kappa) > 1, f"kappa is {kappa:g}; it must be above 1.")
    half = max((high - low) / 2, 1e-12 * max(abs(low), abs(high), 1e-300)) * (1 + 2 * margin)
    return 2 / ((max(steps, 2) - 1) * math.sqrt(8 * math.log(kappa))) * half


def smoothed(grid: Tensor, nodes: Tensor, weights: Tensor | None = None, width: float = 1.0) -> Tensor:
    """Weighted nodes (an exact spectrum: equal weights) as a density at ``grid``, a Gaussian of ``width`` at each."""
    place, at = grid.double(), nodes.double()
    mass = torch.full_like(at, 1 / len(at)) if weights is None else weights.double()
    total = torch.zeros_like(place)
    for x, w in zip(at.split(256), mass.split(256), strict=True):
        total += torch.exp(-0.5 * ((place[:, None] - x) / width).square()) @ w
    return total / (width * math.sqrt(2 * math.pi))


def spectral_density(
    A: Any,
    steps: int = 100,
    probes: int = 4,
    *,
    generator: torch.Generator,
    kind: ProbeKind = "sphere",
    chunk: int | None = None,
    size: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> SpectralDensity:
    """Stochastic Lanczos quadrature: the nodes and weights of ``probes`` Lanczos runs of ``steps`` steps.

    For a unit vector v, v . f(A) v is the integral of f over a measure of mass 1; m Lanczos steps from v give its Gauss
    quadrature, exact for polynomials up to degree 2 m - 1 (Golub and Meurant 1994; Ubaru, Chen, Saad 2017).

    Args:
        A: symmetric; whatever :func:`as_operator` takes.
        steps: m, at most P are made.
        probes: random unit vectors; the standard errors come from their spread.
        generator: of the probes.
        kind: of the probes; all are scaled to length 1.
        chunk: probes run at once; default what keeps the Krylov bases under 1 GiB in float32.
        size: P, where A is a function.
        progress: called after every product with (products so far, products in all).

    >>> A = torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64))
    >>> found = spectral_density(A, 5, 2, generator=torch.Generator().manual_seed(0))
    >>> found.nodes[0].round(decimals=6)
    tensor([1., 2., 3., 4., 5.], dtype=torch.float64)
    """
    operator = square(as_operator(A, size))
    p = operator.shape[0]
    m, n = min(whole("steps", steps), p), whole("probes", probes)
    at_once = max(1, _BASIS // (p * m)) if chunk is None else whole("chunk", chunk)
    nodes = torch.zeros(n, m, dtype=torch.float64)
    weights, row = torch.zeros_like(nodes), 0
    counted = _Counted(operator, n * m, progress)
    for width in _chunks(n, at_once):
        run = lanczos(counted, probe_vectors(operator, width, generator, kind), m)
        for k in range(width):
            x, w = run.quadrature(k)
            nodes[row, : len(x)], weights[row, : len(x)] = x.cpu(), w.cpu()
            row += 1
    return SpectralDensity(nodes, weights, p)


class _Counted:
    """An operator that reports its products."""

    symmetric = True

    def __init__(
        self, operator: LinearOperator, total: int, progress: Callable[[int, int], object] | None
    ) -> None:
        self.operator, self.total, self.progress, self.done = operator, total, progress, 0
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device

    def matvec(self, vectors: Tensor) -> Tensor:
        product = self.operator.matvec(vectors)
        self.done += vectors.shape[1]
        if self.progress is not None:
            self.progress(self.done, self.total)
        return product
