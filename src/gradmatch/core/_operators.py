"""Linear operators: one protocol for matrices of every kind and for products that are never a matrix."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gradmatch.core.checks import InputError, finite, require, whole

__all__ = ["FunctionOperator", "LinearOperator", "MatrixOperator", "as_operator", "asymmetry", "dense"]

Product = Callable[[Tensor], Tensor]


@runtime_checkable
class LinearOperator(Protocol):
    """A linear map from R^P to R^N that is known by its products.

    ``matvec`` takes V [P] or [P, b], on ``device`` and in ``dtype``, and gives [N] or [N, b]: column j is A V[:, j].
    ``symmetric`` says that A = A^T, which nothing here can see from products alone.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(N, P)."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the vectors."""

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""

    @property
    def symmetric(self) -> bool:
        """Whether A = A^T."""

    def matvec(self, vectors: Tensor) -> Tensor:
        """A V, shaped as V but for the first dimension."""


@dataclass(frozen=True)
class FunctionOperator:
    """An operator from the function that computes its products."""

    function: Product
    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    symmetric: bool = True

    def matvec(self, vectors: Tensor) -> Tensor:
        """The function's value, checked for its shape."""
        product = self.function(vectors)
        expected = (self.shape[0], *vectors.shape[1:])
        require(
            isinstance(product, Tensor) and product.shape == expected,
            f"operator gave {getattr(product, 'shape', type(product).__name__)} for V of shape "
            f"{tuple(vectors.shape)}; it must give {expected}.",
        )
        return product


@dataclass(frozen=True)
class MatrixOperator:
    """An operator from a matrix in memory: dense, or sparse CSR."""

    matrix: Tensor
    symmetric: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(N, P)."""
        return int(self.matrix.shape[0]), int(self.matrix.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """Type of the entries."""
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return self.matrix.device

    def matvec(self, vectors: Tensor) -> Tensor:
        """The matrix product; one column goes the way of a vector, which is faster for sparse matrices."""
        if vectors.ndim == 2 and vectors.shape[1] == 1:
            return (self.matrix @ vectors[:, 0])[:, None]
        return self.matrix @ vectors

    def diagonal(self) -> Tensor:
        """The diagonal [min(N, P)]."""
        if self.matrix.layout == torch.strided:
            return self.matrix.diagonal()
        rows = torch.repeat_interleave(self.matrix.crow_indices().diff())
        on = rows == self.matrix.col_indices()
        out = torch.zeros(min(self.shape), dtype=self.dtype, device=self.device)
        return out.index_add_(0, rows[on], self.matrix.values()[on])


def as_operator(
    source: Any,
    size: int | None = None,
    *,
    symmetric: bool | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> LinearOperator:
    """An operator from whatever stands for a matrix.

    Args:
        source: an operator, given back as it is; a scipy sparse matrix or ``LinearOperator``; a torch tensor, dense
            or sparse (COO, CSR); a numpy array; or a function V -> A V of [P] and [P, b], with ``size``.
        size: P, for a function; the operator is then square.
        symmetric: whether A = A^T. Default: looked up for matrices (entries equal to rounding), True for functions
            and scipy operators.
        dtype, device: of the vectors. Default: the matrix's own (whole numbers become float64); for functions
            float64 on the CPU.

    Raises:
        InputError: something else, entries that are not finite or not real, a function without its size.

    >>> as_operator(torch.diag(torch.tensor([1.0, 2.0]))).matvec(torch.ones(2))
    tensor([1., 2.])
    """
    where = torch.device("cpu" if device is None else device)
    if isinstance(source, FunctionOperator | MatrixOperator) or (
        isinstance(source, LinearOperator) and not hasattr(source, "matmat")
    ):
        return source
    if hasattr(source, "tocsr"):
        return _matrix(_from_scipy(source), symmetric, dtype, device)
    if hasattr(source, "matmat") and hasattr(source, "shape"):
        return _from_scipy_operator(source, symmetric, dtype or torch.float64, where)
    if isinstance(source, Tensor | np.ndarray):
        return _matrix(torch.as_tensor(source).detach(), symmetric, dtype, device)
    require(
        callable(source),
        f"A is {type(source).__name__}; it must be an operator, a scipy or torch matrix, an array or a function.",
    )
    if size is None:
        raise InputError("size is None; a function needs P, the length of its vectors.")
    p = whole("size", size)
    return FunctionOperator(source, (p, p), dtype or torch.float64, where, symmetric is not False)


def _matrix(
    matrix: Tensor, symmetric: bool | None, dtype: torch.dtype | None, device: torch.device | str | None
) -> MatrixOperator:
    require(
        matrix.ndim == 2 and min(matrix.shape) > 0,
        f"A has shape {tuple(matrix.shape)}; it must be a matrix with at least one row and column.",
    )
    require(not matrix.is_complex(), "A is complex; only real matrices are taken.")
    if dtype is None and not matrix.is_floating_point():
        dtype = torch.float64
    matrix = matrix.to(device=device, dtype=dtype)
    if matrix.layout != torch.strided:
        with warnings.catch_warnings():  # torch warns once that CSR is in beta
            warnings.simplefilter("ignore")
            matrix = matrix.to_sparse_csr()
    finite("A", matrix if matrix.layout == torch.strided else matrix.values())
    return MatrixOperator(matrix, _is_symmetric(matrix) if symmetric is None else symmetric)


def _from_scipy(source: Any) -> Tensor:
    csr = source.tocsr()
    csr.sum_duplicates()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.sparse_csr_tensor(
            torch.from_numpy(csr.indptr.astype(np.int64)),
            torch.from_numpy(csr.indices.astype(np.int64)),
            torch.from_numpy(csr.data.copy()),
            csr.shape,
        )


def _from_scipy_operator(
    source: Any, symmetric: bool | None, dtype: torch.dtype, device: torch.device
) -> LinearOperator:
    def product(vectors: Tensor) -> Tensor:
        array = vectors.detach().cpu().numpy()
        found = source.matvec(array) if array.ndim == 1 else source.matmat(array)
        return torch.as_tensor(found).to(dtype=dtype, device=device)

    n, p = source.shape
    return FunctionOperator(product, (int(n), int(p)), dtype, device, symmetric is not False)


def _is_symmetric(matrix: Tensor) -> bool:
    if matrix.shape[0] != matrix.shape[1]:
        return False
    slack = 8 * torch.finfo(matrix.dtype).eps
    if matrix.layout == torch.strided:
        return bool((matrix - matrix.T).abs().max() <= slack * matrix.abs().max())
    rows = torch.repeat_interleave(matrix.crow_indices().diff())
    columns, values = matrix.col_indices(), matrix.values()
    if not len(values):
        return True
    indices = torch.cat([torch.stack([rows, columns]), torch.stack([columns, rows])], 1)
    gap = torch.sparse_coo_tensor(indices, torch.cat([values, -values]), matrix.shape).coalesce().values()
    return bool(gap.abs().max() <= slack * values.abs().max())


def square(operator: LinearOperator, symmetric: bool = True) -> LinearOperator:
    """The operator, refused unless it is square (and symmetric)."""
    n, p = operator.shape
    require(n == p, f"A has shape ({n}, {p}); it must be square.")
    require(
        operator.symmetric or not symmetric,
        "A is not symmetric; this method needs A = A^T (say symmetric=True if rounding alone spoils it).",
    )
    return operator


def as_vectors(name: str, values: Any, operator: LinearOperator) -> Tensor:
    """``values`` as finite columns [P, b] in the operator's type and place."""
    vectors = torch.as_tensor(values).to(dtype=operator.dtype, device=operator.device)
    columns = vectors[:, None] if vectors.ndim == 1 else vectors
    p = operator.shape[1]
    require(
        columns.ndim == 2 and len(columns) == p and columns.shape[1] > 0,
        f"{name} has shape {tuple(vectors.shape)}; it must be ({p},) or ({p}, b).",
    )
    return finite(name, columns)


def dense(
    source: Any,
    size: int | None = None,
    chunk: int = 64,
    progress: Callable[[int, int], object] | None = None,
) -> Float[Tensor, "N P"]:
    """The matrix of an operator, by its products with ``chunk`` unit vectors at a time.

    ``progress`` is called with (products done, in all).
    """
    operator = as_operator(source, size)
    if isinstance(operator, MatrixOperator):
        return operator.matrix.to_dense()
    n, p = operator.shape
    out = torch.empty(n, p, dtype=operator.dtype, device=operator.device)
    for start in range(0, p, whole("chunk", chunk)):
        width = min(chunk, p - start)
        unit = torch.zeros(p, width, dtype=operator.dtype, device=operator.device)
        unit[start : start + width].fill_diagonal_(1)
        out[:, start : start + width] = operator.matvec(unit)
        if progress is not None:
            progress(start + width, p)
    return finite("the matrix of the operator", out)


def asymmetry(source: Any, generator: torch.Generator, size: int | None = None, probes: int = 4) -> float:
    """Largest |u.Av - v.Au| / (|u.Av| + |v.Au|) over random pairs: rounding for a symmetric operator."""
    operator = square(as_operator(source, size), symmetric=False)
    from gradmatch.core._probes import probe_vectors

    u, v = probe_vectors(operator, 2 * whole("probes", probes), generator, "gaussian").chunk(2, dim=1)
    left, right = (u * operator.matvec(v)).sum(0).double(), (v * operator.matvec(u)).sum(0).double()
    scale = (left.abs() + right.abs()).clamp_min(torch.finfo(torch.float64).tiny)
    return cast(float, ((left - right).abs() / scale).max().item())
