"""Units of one network predicted from few units of another."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gradmatch.analysis._activations import Activations, Moments
from gradmatch.analysis._lasso import lasso_path
from gradmatch.core import checks

LAMBDAS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
RIDGE = 1e-3


@dataclass(frozen=True)
class SparsePrediction:
    """Units of B predicted from A's. Losses are shares of a unit's variance; 1 is predicting its mean.

    Attributes:
        lambdas: penalties (L,).
        losses, fit_losses: on the odd examples and on the even ones, on which weights are fitted (L, units of B).
        weights: for standardised activations (L, living units of A, living units of B).
        nonzero: how many weights of each unit are not zero (L, units of B).
        single: the best single unit, on the odd examples (units of B).
        shuffled: the same weights on A's units in random order (L, units of B).
        ridge: all units with a small ridge penalty (units of B).
        a, b: the living units.
    """

    layer: str
    lambdas: tuple[float, ...]
    losses: Float[Tensor, "l b"]
    fit_losses: Float[Tensor, "l b"]
    weights: Float[Tensor, "l a b"]
    nonzero: Tensor
    single: Tensor
    shuffled: Tensor
    ridge: Tensor
    a: Tensor
    b: Tensor


def sparse_predict(
    activations: Activations,
    layer: str,
    a: int = 0,
    b: int = 1,
    lambdas: Sequence[float] = LAMBDAS,
    *,
    ridge: float = RIDGE,
    seed: int = 0,
) -> SparsePrediction:
    """How well, and by how few units of ``a``, each unit of ``b`` is predicted.

    Args:
        activations: of :func:`gradmatch.analysis.collect`; the even examples fit, the odd ones test.
        lambdas: penalties; the default is the paper's grid without 1e-5.
        ridge: penalty |w|^2 of the dense prediction, which also replaces lambda 0 where units outnumber samples.
        seed: of the order of shuffled units.

    Raises:
        InputError: negative penalties, all units dead, or no examples in one half.
    """
    checks.require(len(lambdas) > 0, "lambdas is empty; at least one penalty is needed.")
    checks.positive("ridge", ridge)
    fit, test = (activations.moments(layer, h) for h in (0, 1))
    checks.require(
        fit.count > 1 and test.count > 1, "there are fewer than two examples in a half; give more data."
    )
    alive = activations.alive(layer, a), activations.alive(layer, b)
    places = [activations.place(layer, k).start + own for k, own in zip((a, b), alive, strict=True)]
    (gram, cross, _), held = (_standardised(m, fit, *places) for m in (fit, test))
    dense = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), cross)
    values = [float(v) for v in lambdas]
    few = fit.count <= len(gram) and 0.0 in values
    if few:
        warnings.warn(
            f"layer {layer!r} has {fit.count} samples for {len(gram)} units; lambda 0 becomes the ridge {ridge:g}.",
            stacklevel=2,
        )
    solved = iter(lasso_path(gram, cross, [v for v in values if v or not few]))
    weights = torch.stack([dense if few and not v else next(solved) for v in values])
    best = torch.zeros_like(dense)
    rows, columns = cross.abs().argmax(0), torch.arange(cross.shape[1])
    best[rows, columns] = cross[rows, columns]
    order = torch.randperm(len(gram), generator=torch.Generator().manual_seed(checks.whole("seed", seed, 0)))
    return SparsePrediction(
        layer,
        tuple(values),
        torch.stack([_loss(w, *held) for w in weights]),
        torch.stack([_loss(w, gram, cross, torch.ones(cross.shape[1], dtype=gram.dtype)) for w in weights]),
        weights,
        (weights != 0).sum(1),
        _loss(best, *held),
        torch.stack([_loss(w[order], *held) for w in weights]),
        _loss(dense, *held),
        *alive,
    )


def _standardised(
    moments: Moments, fit: Moments, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Second moments Z_A'Z_A / n, Z_A'Z_B / n and those of Z_B, standardised by the means and deviations of ``fit``."""
    gap, scale = (moments.mean - fit.mean) / fit.deviation.clamp_min(1e-300), fit.deviation.clamp_min(1e-300)

    def block(i: Tensor, j: Tensor) -> Tensor:
        found: Tensor = moments.products[i][:, j] / (moments.count * scale[i][:, None] * scale[j])
        return found + gap[i][:, None] * gap[j]

    own = (
        moments.products.diagonal()[columns] / (moments.count * scale[columns].square())
        + gap[columns].square()
    )
    return block(rows, rows), block(rows, columns), own


def _loss(weights: Tensor, gram: Tensor, cross: Tensor, own: Tensor) -> Tensor:
    """Mean squared errors over those of predicting the mean."""
    errors: Tensor = own - 2 * (weights * cross).sum(0) + (weights * (gram @ weights)).sum(0)
    return errors / own
