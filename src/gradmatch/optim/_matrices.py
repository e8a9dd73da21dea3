"""Curvature matrices of a loss read off the graph that a closure leaves: whole, by their rows, or by products.

With z the outputs, J = dz / dtheta and B the Hessian of the mean loss in z, the Gauss-Newton matrix is J^T B J. Where
the loss is convex in z with one block for each example, it is X^T X with one row of X for each column of the root of
B: few rows keep a system small (Woodbury), else P products are taken, many at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gradmatch.core._metrics import loss_roots
from gradmatch.core._operators import FunctionOperator
from gradmatch.core._second import Pull, slopes_of
from gradmatch.core.checks import require
from gradmatch.core.shifted import LowRank, Matrix
from gradmatch.optim._parts import wide_dtype
from gradmatch.optim._vector import Vector

_AT_ONCE = 64
Losses = Callable[[Tensor], Tensor]


def _whole(size: int, product: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """[P, P] of V [b, P] -> (M v) [b, P], symmetrised."""
    unit = torch.eye(size, dtype=like.dtype, device=like.device)
    matrix = torch.cat([product(part) for part in torch.split(unit, _AT_ONCE)])
    return (matrix + matrix.T) / 2


def _as_matrix(size: int, product: Callable[[Tensor], Tensor], like: Tensor, dense: bool) -> Matrix:
    if dense:
        return _whole(size, product, like)

    def matvec(v: Tensor) -> Tensor:
        return product(v.T if v.ndim == 2 else v[None]).T.reshape(v.shape)

    return FunctionOperator(matvec, (size, size), like.dtype, like.device)


def hessian(vector: Vector, loss: Tensor, dense: bool = True) -> Matrix:
    """The Hessian of ``loss``."""
    slopes, pull = slopes_of(loss, vector.params), Pull()

    def product(v: Tensor) -> Tensor:
        return vector.flat(pull(slopes, vector.params, vector.blocks(v)), 1)

    return _as_matrix(vector.size, product, vector.read(), dense)


def gauss_newton(vector: Vector, outputs: Tensor, losses: Losses, dense: bool = True) -> Matrix:
    """J^T B J of the mean loss, by rows where they are fewer than P."""
    z, slope, by_example = _slope(outputs, losses)
    pull = Pull()
    if dense and by_example and outputs.numel() <= vector.size:
        return LowRank(torch.cat(list(_rows(vector, outputs, z, slope))))
    u = torch.zeros_like(outputs, requires_grad=True)
    back = slopes_of(outputs, vector.params, u)

    def product(v: Tensor) -> Tensor:
        (moved,) = pull(back, [u], vector.blocks(v))
        (bent,) = pull([slope], [z], [moved.to(z.dtype)])
        return vector.flat(pull([outputs], vector.params, [bent.to(outputs.dtype)]), 1)

    return _as_matrix(vector.size, product, vector.read(), dense)


def gauss_newton_diagonal(vector: Vector, outputs: Tensor, losses: Losses) -> Tensor:
    """The diagonal [P] of J^T B J."""
    z, slope, by_example = _slope(outputs, losses)
    require(by_example, 'loss_of_outputs gave one number; curvature="diagonal" needs per-example losses.')
    total = torch.zeros(vector.size, dtype=vector.dtype, device=outputs.device)
    for rows in _rows(vector, outputs, z, slope):
        total += rows.square().sum(0)
    return total


def empirical_fisher(vector: Vector, outputs: Tensor, losses: Losses) -> Matrix:
    """(1/n) sum_i g_i g_i^T of per-example gradients, by its rows where they are fewer than P."""
    found, pull = losses(outputs), Pull()
    require(
        found.ndim == 1,
        f"loss_of_outputs gave shape {tuple(found.shape)}; empirical_fisher needs one loss for each example, (n,).",
    )
    unit = torch.eye(len(found), dtype=found.dtype, device=found.device) / len(found) ** 0.5
    parts = (vector.flat(pull([found], vector.params, [v]), 1) for v in torch.split(unit, _AT_ONCE))
    if len(found) <= vector.size:
        return LowRank(torch.cat(list(parts)))
    total = torch.zeros(vector.size, vector.size, dtype=vector.dtype, device=found.device)
    for rows in parts:
        total.addmm_(rows.T, rows)
    return total


def _slope(outputs: Tensor, losses: Losses) -> tuple[Tensor, Tensor, bool]:
    """Outputs as a leaf, the gradient of the mean loss there with its graph, and whether losses are per example."""
    with torch.enable_grad():
        z = outputs.detach().to(wide_dtype(outputs)).requires_grad_()
        found = losses(z)
        slope = slopes_of(found.mean(), [z])[0]
    return z, slope, found.ndim == 1 and len(found) == len(z)


def _rows(vector: Vector, outputs: Tensor, z: Tensor, slope: Tensor) -> Iterator[Tensor]:
    """Rows [m, P] of X with X^T X = J^T B J, some examples of one column of the root at a time."""
    pull = Pull()
    unit = torch.eye(len(z), dtype=z.dtype, device=z.device)
    for column in loss_roots(lambda v: pull([slope], [z], [v])[0], z.detach()):
        for part in torch.split(unit, _AT_ONCE):
            own = part.reshape(*part.shape, *[1] * (column.ndim - 1)) * column
            yield vector.flat(pull([outputs], vector.params, [own.to(outputs.dtype)]), 1)
