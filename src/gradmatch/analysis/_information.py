"""Mutual information of all pairs of two sets of units, from joint histograms made by one product."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gradmatch.core import checks


def mutual_information(a: Float[Tensor, "n p"], b: Float[Tensor, "n q"], bins: int) -> Float[Tensor, "p q"]:
    """In nats, with ``bins`` equally frequent bins a unit, less the bias (k - 1)(l - 1) / 2n of k and l occupied bins.

    Units that are often 0 have fewer bins, since ties stay together.
    """
    checks.same_length("a", a, "b", b)
    n = len(a)
    (x, k), (y, m) = (_one_hot(side, bins) for side in (a, b))
    joint = (x.flatten(1).T @ y.flatten(1)).reshape(a.shape[1], bins, b.shape[1], bins).transpose(
        1, 2
    ).double() / n
    outer = joint.sum(3, keepdim=True) * joint.sum(2, keepdim=True)
    terms = torch.where(joint > 0, joint * (joint.clamp_min(1e-300) / outer.clamp_min(1e-300)).log(), 0)
    return terms.sum((2, 3)) - (k[:, None] - 1) * (m - 1) / (2 * n)


def _one_hot(units: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Membership (n, units, bins), and how many bins each unit occupies."""
    values = units.float().T.contiguous()
    inner = torch.arange(1, bins, dtype=values.dtype) / bins
    edges = torch.quantile(values, inner.to(values), dim=1).T.contiguous()
    places = torch.searchsorted(edges, values)
    hot = torch.nn.functional.one_hot(places, bins).float()
    return hot.transpose(0, 1), (hot.sum(1) > 0).sum(1).double()
