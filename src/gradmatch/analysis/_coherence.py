"""What a measurement of coherence is made of, and how it follows from sums of gradients."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core.gradients import GradStats
from gradmatch.core.store import load_tensors, save_tensors

__all__ = ["ESTIMATORS", "Coherence", "Estimator", "Groups", "ratio"]

Estimator = Literal["sample", "unbiased"]
Groups = Literal["layer", "parameter"]
ESTIMATORS: tuple[Estimator, ...] = ("sample", "unbiased")
GROUPS: tuple[Groups, ...] = ("layer", "parameter")
DEAD = 1e-8
"""Norm below which a gradient counts as zero: such examples lower alpha, so their share is reported."""


@dataclass(frozen=True)
class Coherence:
    """How much gradients agree.

    Attributes:
        alpha: of all parameters; NaN if every gradient is zero.
        count: m, the examples.
        groups: names of the layers or parameters.
        alphas: alpha of each group, NaN where all its gradients are zero.
        shares: each group's share of the mean squared norm; alpha is the sum of shares times alphas.
        norms: norm of every example's gradient [m], float64.
        estimator: "sample" or "unbiased".
    """

    alpha: float
    count: int
    groups: tuple[str, ...]
    alphas: Tensor
    shares: Tensor
    norms: Tensor
    estimator: str

    @property
    def m_coherence(self) -> float:
        """m alpha: how many examples a step on one of them helps, itself included."""
        return self.count * self.alpha

    @property
    def dead(self) -> float:
        """Share of the examples whose gradient is shorter than 1e-8."""
        return float((self.norms < DEAD).double().mean())

    @property
    def per_group(self) -> dict[str, float]:
        """alpha by group."""
        return dict(zip(self.groups, self.alphas.tolist(), strict=True))

    @classmethod
    def of(
        cls, stats: GradStats, norms: Tensor, groups: Groups | None = "layer", estimator: Estimator = "sample"
    ) -> Coherence:
        """From sums that may have been gathered by several workers and merged."""
        checks.one_of("estimator", estimator, ESTIMATORS)
        if groups is not None:
            checks.one_of("groups", groups, GROUPS)
        m = int(stats.count.sum())
        checks.require(m >= 2, f"data has {m} example; coherence needs at least 2.")
        total, squares = stats.total.sum(0), stats.norm2.sum(0)
        together = torch.stack([total[part].square().sum() for part in stats.space.slices.values()])
        names, belongs = _grouped(stats.space.names, groups)
        mine, own = (belongs.to(v.device) @ v for v in (together, squares))
        whole = float(squares.sum())
        if whole == 0:
            warnings.warn("all gradients are zero, so their coherence is undefined.", stacklevel=3)
        shares = own / whole if whole else torch.zeros_like(own)
        return cls(
            float(ratio(together.sum(), squares.sum(), m, estimator)),
            m,
            names,
            ratio(mine, own, m, estimator).cpu(),
            shares.cpu(),
            norms.double().cpu(),
            estimator,
        )

    def table(self) -> list[tuple[str, float, float]]:
        """(group, alpha, share), the largest share first."""
        rows = zip(self.groups, self.alphas.tolist(), self.shares.tolist(), strict=True)
        return sorted(rows, key=lambda row: -row[2])

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file."""
        header = {k: getattr(self, k) for k in ("count", "groups", "estimator")}
        tensors = {"alphas": self.alphas, "shares": self.shares, "norms": self.norms}
        return save_tensors(path, tensors | {"alpha": torch.tensor(self.alpha, dtype=torch.float64)}, header)

    @classmethod
    def load(cls, path: str | Path) -> Coherence:
        """What :meth:`save` wrote."""
        t, header = load_tensors(path)
        groups = tuple(header["groups"])
        alpha = float(t["alpha"])
        return cls(alpha, header["count"], groups, t["alphas"], t["shares"], t["norms"], header["estimator"])


def ratio(together: Tensor, squares: Tensor, m: int, estimator: str) -> Tensor:
    """alpha from |sum g|^2 and sum |g|^2; 0 / 0 is NaN."""
    if estimator == "unbiased":
        return (together - squares) / ((m - 1) * squares)
    return together / (m * squares)


def _grouped(names: Sequence[str], groups: Groups | None) -> tuple[tuple[str, ...], Tensor]:
    """Names of the groups, and which parameters belong to each [groups, parameters] as ones and zeros."""
    keys = [name.rpartition(".")[0] or name if groups == "layer" else name for name in names]
    found = [] if groups is None else list(dict.fromkeys(keys))
    belongs = [[float(key == group) for key in keys] for group in found]
    return tuple(found), torch.tensor(belongs, dtype=torch.float64).reshape(len(found), len(names))
