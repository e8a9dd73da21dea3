"""Units of one network matched with those of another, and with mixtures of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmatch.analysis._activations import Activations
from gradmatch.analysis._information import mutual_information
from gradmatch.core import checks
from gradmatch.core.assign import Permutation, PermutationSpec, linear_assignments

TAIL = 1e-4
"""Directions below this share of the largest variance are left out of a rotation."""


@dataclass(frozen=True)
class UnitMatch:
    """Units of network A and what was found for them in network B.

    Attributes:
        layer, how, score: what was matched.
        a: living units of A (n,); ``b`` the unit of B for each, -1 where B has fewer.
        scores: correlation (or mutual information in nats) of each pair (n,), 0 where there is none.
        dead_a, dead_b: units that do not vary and were left out.
    """

    layer: str
    how: str
    score: str
    a: Tensor
    b: Tensor
    scores: Tensor
    dead_a: Tensor
    dead_b: Tensor
    sizes: tuple[int, int]

    @property
    def mean(self) -> float:
        """Mean score over A's living units."""
        return float(self.scores.mean())

    def above(self, threshold: float) -> float:
        """Share of A's living units whose score exceeds ``threshold``."""
        return float((self.scores > threshold).double().mean())

    def below(self, threshold: float = 0.3) -> float:
        """Share of units that only A has, by a score under ``threshold``."""
        return float((self.scores < threshold).double().mean())

    def permutation(self, spec: PermutationSpec | None = None, group: str | None = None) -> Permutation:
        """The match as the order of B's units; what was left out fills the rest in order.

        With a specification and the name of its group it can be applied to B's weights.

        Raises:
            InputError: a semi-matching, or networks of different widths.
        """
        checks.require(
            self.how == "one2one" and self.sizes[0] == self.sizes[1],
            f"this is a {self.how} match of {self.sizes[0]} and {self.sizes[1]} units; it is no permutation.",
        )
        order = torch.full((self.sizes[0],), -1)
        order[self.a] = self.b
        order[order < 0] = _others(self.sizes[1], order[order >= 0])
        name = group or self.layer
        return Permutation(PermutationSpec({}, {name: len(order)}) if spec is None else spec, {name: order})


def match_units(
    activations: Activations,
    layer: str,
    a: int = 0,
    b: int = 1,
    how: str = "one2one",
    score: str = "corr",
    *,
    absolute: bool = False,
    bins: int = 16,
) -> UnitMatch:
    """Which unit of network ``b`` does what each unit of network ``a`` does.

    Layers of different widths are matched as far as the narrower goes.

    Args:
        activations: of :func:`gradmatch.analysis.collect`.
        layer: which.
        a, b: which networks.
        how: "one2one" (exact assignment) or "semi" (best for each, with re-use).
        score: "corr", or "mi" for mutual information of ``bins`` equally frequent bins, less its bias; the units'
            activations must have been kept (``collect(..., samples=...)``).
        absolute: count opposite units as alike; wrong where units are to be averaged after a ReLU.

    Raises:
        InputError: no such layer or network, all units dead, or no samples for "mi".

    >>> from gradmatch.analysis import collect
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())
    >>> seen = collect([net, net], (torch.randn(50, 4), torch.zeros(50)))
    >>> match_units(seen, "1").b.tolist() == match_units(seen, "1").a.tolist()
    True
    """
    return match_all(activations, layer, [(a, b)], how, score, absolute=absolute, bins=bins)[0]


def match_all(
    activations: Activations,
    layer: str,
    pairs: Sequence[tuple[int, int]] | None = None,
    how: str = "one2one",
    score: str = "corr",
    *,
    absolute: bool = False,
    bins: int = 16,
) -> list[UnitMatch]:
    """:func:`match_units` for several pairs (default all) of networks, assigned side by side."""
    checks.one_of("how", how, ("one2one", "semi"))
    checks.one_of("score", score, ("corr", "mi"))
    chosen = list(itertools.combinations(range(activations.networks), 2)) if pairs is None else list(pairs)
    tables, alive = [], []
    for a, b in chosen:
        living = activations.alive(layer, a), activations.alive(layer, b)
        if score == "corr":
            table = activations.correlation(layer, a, b)
            table = table.abs() if absolute else table
        else:
            table = _information(activations, layer, a, b, bins)
        tables.append(table[living[0]][:, living[1]])
        alive.append(living)
    best = [t.argmax(1) for t in tables] if how == "semi" else linear_assignments(tables)
    return [
        _match(activations, layer, how, score, pair, living, table, columns)
        for pair, living, table, columns in zip(chosen, alive, tables, best, strict=True)
    ]


def _match(
    activations: Activations, layer: str, how: str, score: str, pair: tuple[int, int], alive: tuple[Tensor, Tensor],
    table: Tensor, columns: Tensor,
) -> UnitMatch:  # fmt: skip
    found = columns >= 0
    scores = torch.where(found, table[torch.arange(len(columns)), columns.clamp_min(0)], 0)
    units = torch.where(found, alive[1][columns.clamp_min(0)], -1)
    sizes = activations.units[layer][pair[0]], activations.units[layer][pair[1]]
    dead_a, dead_b = (_others(n, own) for n, own in zip(sizes, alive, strict=True))
    return UnitMatch(layer, how, score, alive[0], units, scores, dead_a, dead_b, sizes)


def _others(n: int, units: Tensor) -> Tensor:
    """Those of n units that are not among ``units``."""
    rest = torch.ones(n, dtype=torch.bool)
    rest[units] = False
    return torch.nonzero(rest).flatten()


def _information(activations: Activations, layer: str, a: int, b: int, bins: int) -> Tensor:
    checks.whole("bins", bins, 2)
    checks.require(
        layer in activations.samples,
        "score is 'mi', but no activations were kept; collect(..., samples=5000) keeps some.",
    )
    rows = activations.samples[layer]
    return mutual_information(
        rows[:, activations.place(layer, a)], rows[:, activations.place(layer, b)], bins
    )


def rotated(
    activations: Activations, layer: str, a: int = 0, b: int = 1, *, whiten: bool = True, seed: int = 0
) -> UnitMatch:
    """The one-to-one match of A with B whose units were mixed at random.

    With Z_B'Z_B / n = V E V' (eigenvalues above 1e-4 of the largest), B' = Z_B V E^-1/2 Q E^1/2 V' with Q random
    orthogonal has the covariance of B and other axes. Without ``whiten`` it is Z_B Q, which keeps the few directions
    that hold most variance, and understates what mixing does.
    """
    alive = activations.alive(layer, a), activations.alive(layer, b)
    gram = activations.correlation(layer, b, b)[alive[1]][:, alive[1]]
    cross = activations.correlation(layer, a, b)[alive[0]][:, alive[1]]
    values, vectors = torch.linalg.eigh(gram)
    generator = torch.Generator().manual_seed(checks.whole("seed", seed, 0))
    keep = values > TAIL * values[-1] if whiten else torch.ones_like(values, dtype=torch.bool)
    draw = torch.randn(int(keep.sum()), int(keep.sum()), generator=generator, dtype=gram.dtype)
    q, r = torch.linalg.qr(draw)
    q = q * r.diagonal().sign()  # uniform over all rotations
    if whiten:
        roots, basis = values[keep].sqrt(), vectors[:, keep]
        mix = basis / roots @ q @ (basis * roots).T
    else:
        mix = q
    spread = ((mix.T @ gram) * mix.T).sum(1).clamp_min(1e-12).sqrt()
    table = (cross @ mix) / spread
    columns = linear_assignments([table])[0]
    return _match(activations, layer, "one2one", "corr", (a, b), alive, table, columns)
