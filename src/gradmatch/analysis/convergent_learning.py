"""Do different networks learn the same representations? (Li, Yosinski, Clune, Lipson, Hopcroft; ICLR 2016,
arXiv 1511.07543.)

Networks trained from different seeds are compared unit by unit and group by group, by the correlations of their
activations on the same data. Three alignments of growing freedom:

1. one to one (:func:`match_units`): a permutation with the largest sum of correlations, or for each unit the best
   one of the other network with re-use (semi-matching);
2. few to one (:func:`sparse_predict`): each unit of B from all units of A by
   min_w mean (z_B - Z_A w)^2 + lambda |w|_1 on standardised activations;
3. many to many (:func:`cocluster`): clusters of the joint graph.

:func:`unit_report` does 1 and 2 for all layers and pairs, with the rotation test of :func:`rotated`: were a
representation distributed without preferred axes, mixing B's units into others of the same covariance would change
nothing. Code of the paper: yixuanli/convergent_learning (Caffe; not verified against).
Everything follows from streaming moments (:func:`gradmatch.analysis.collect`); mutual information needs samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradmatch.analysis._activations import Activations, collect
from gradmatch.analysis._cocluster import cocluster
from gradmatch.analysis._sparse import SparsePrediction, sparse_predict
from gradmatch.analysis._unit_match import UnitMatch, match_all, match_units, rotated
from gradmatch.core import checks

__all__ = [
    "Activations",
    "LayerReport",
    "SparsePrediction",
    "UnitMatch",
    "cocluster",
    "collect",
    "layer_report",
    "match_all",
    "match_units",
    "rotated",
    "sparse_predict",
    "unit_report",
]


@dataclass(frozen=True)
class LayerReport:
    """One layer of one pair of networks; see the fields of :class:`UnitMatch` and :class:`SparsePrediction`.

    Attributes:
        one2one, semi, chance: mean correlation matched one to one, best for each, and in random pairs.
        common, unique: shares of units above 0.5 and below 0.3, one to one.
        ridge, single: held-out loss from all units and from the best one.
        whitened, turned: mean correlation after mixing B's units, keeping their covariance and plainly.
        cka: linear CKA, biased, of the two layers.
        dead: units that do not vary, in A and B.
    """

    layer: str
    networks: tuple[int, int]
    one2one: float
    semi: float
    chance: float
    common: float
    unique: float
    ridge: float
    single: float
    whitened: float
    turned: float
    cka: float
    dead: tuple[int, int]


def unit_report(
    models: Sequence[nn.Module], data: Any, *, seed: int = 0, **options: Any
) -> list[LayerReport]:
    """How alike networks are, for every layer and pair; ``options`` are those of :func:`collect`.

    Trained networks share much that untrained ones share too: put the report of those beside it.
    """
    seen = collect(models, data, seed=seed, **options)
    pairs = list(itertools.combinations(range(len(models)), 2))
    checks.require(bool(pairs), "models is one network; at least two are compared.")
    return [layer_report(seen, layer, a, b, seed) for layer in seen.layers for a, b in pairs]


def layer_report(seen: Activations, layer: str, a: int, b: int, seed: int = 0) -> LayerReport:
    """One line of :func:`unit_report`."""
    one, semi = (match_units(seen, layer, a, b, how) for how in ("one2one", "semi"))
    table = seen.correlation(layer, a, b)
    alive = seen.alive(layer, a), seen.alive(layer, b)
    products, rows, columns = seen.moments(layer).products, seen.place(layer, a), seen.place(layer, b)
    inner, own, other = (
        float(products[i, j].square().sum()) for i, j in ((rows, columns), (rows, rows), (columns, columns))
    )
    prediction = sparse_predict(seen, layer, a, b, (1.0,), seed=seed)
    return LayerReport(
        layer=layer,
        networks=(a, b),
        one2one=one.mean,
        semi=semi.mean,
        chance=float(table[alive[0]][:, alive[1]].mean()),
        common=one.above(0.5),
        unique=one.below(0.3),
        ridge=float(prediction.ridge.mean()),
        single=float(prediction.single.mean()),
        whitened=rotated(seen, layer, a, b, seed=seed).mean,
        turned=rotated(seen, layer, a, b, whiten=False, seed=seed).mean,
        cka=inner / (own * other) ** 0.5,
        dead=(len(one.dead_a), len(one.dead_b)),
    )
