"""Krylov methods for any linear operator: solving, extreme eigenpairs, traces and spectral densities.

Everything takes what :func:`as_operator` takes: an operator (``shape, dtype, device, symmetric, matvec``), a scipy
sparse matrix, a torch tensor (dense, COO, CSR), an array, or a function V -> A V with its size. Products are asked for
in blocks [P, b], so an operator that is faster on several vectors is used that way.

======================  =================================================================================
:func:`cg`              A x = b for one or many b; preconditioned (:func:`jacobi`, :func:`incomplete_cholesky` or
                        your own), deflated (:class:`Deflation`); every right-hand side ends on its own
:func:`lanczos`         tridiagonal T = Q^T A Q with full reorthogonalisation, several starts at once
:func:`eigenpairs`      largest and smallest eigenvalues, by block Lanczos with thick restarts
:func:`hutchinson`      trace from random signs; :func:`hutchinson_diagonal` the diagonal
:func:`hutchpp`         trace, exact on a sketched range
:func:`spectral_density`  stochastic Lanczos quadrature: the density of eigenvalues, and the trace of f(A)
======================  =================================================================================

Random vectors come from an explicit generator; estimates carry their standard error and are summed in float64.
"""

from __future__ import annotations

from gradmatch.core._cg import Deflation, Solution, cg, jacobi
from gradmatch.core._incomplete import incomplete_cholesky
from gradmatch.core._lanczos import Eigenpairs, Lanczos, eigenpairs, lanczos
from gradmatch.core._operators import (
    FunctionOperator,
    LinearOperator,
    MatrixOperator,
    as_operator,
    asymmetry,
    dense,
)
from gradmatch.core._probes import Estimate, probe_vectors
from gradmatch.core._traces import (
    SpectralDensity,
    gaussian_width,
    hutchinson,
    hutchinson_diagonal,
    hutchpp,
    smoothed,
    spectral_density,
)

__all__ = [
    "Deflation",
    "Eigenpairs",
    "Estimate",
    "FunctionOperator",
    "Lanczos",
    "LinearOperator",
    "MatrixOperator",
    "Solution",
    "SpectralDensity",
    "as_operator",
    "asymmetry",
    "cg",
    "dense",
    "eigenpairs",
    "gaussian_width",
    "hutchinson",
    "hutchinson_diagonal",
    "hutchpp",
    "incomplete_cholesky",
    "jacobi",
    "lanczos",
    "probe_vectors",
    "smoothed",
    "spectral_density",
]
