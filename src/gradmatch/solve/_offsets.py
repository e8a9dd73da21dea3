"""What is subtracted from a matrix before it is factorised: its mean, or a number for every row and column."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gradmatch.solve._entries import Entries

BIASES = ("none", "mean", "additive")
ROUNDS = 20
"""Rounds of back-fitting of the additive offsets; each at least halves the error unless rows hardly overlap."""


@dataclass(frozen=True)
class Offsets:
    """mean + rows[i] + cols[j]."""

    mean: Tensor
    rows: Float[Tensor, " m"]
    cols: Float[Tensor, " n"]
    kind: str

    @staticmethod
    def fit(entries: Entries, kind: str) -> Offsets:
        """Least squares over the observed entries, by alternating averages."""
        values, (m, n) = entries.values, entries.shape
        mean = values.new_zeros(()) if kind == "none" else values.mean()
        found = Offsets(mean, values.new_zeros(m), values.new_zeros(n), kind)
        for _ in range(ROUNDS if kind == "additive" else 0):
            rows = _averages(entries.rows, values - mean - found.cols[entries.cols], m)
            cols = _averages(entries.cols, values - mean - rows[entries.rows], n)
            found = Offsets(mean, rows, cols, kind)
        return found

    def of_rows(self, entries: Entries) -> Offsets:
        """The same columns with the rows of other entries."""
        rest, m = entries.values - self.mean - self.cols[entries.cols], entries.shape[0]
        rows = _averages(entries.rows, rest, m) if self.kind == "additive" else rest.new_zeros(m)
        return Offsets(self.mean, rows, self.cols, self.kind)

    def at(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Offsets of the given coordinates."""
        return self.mean + self.rows[rows] + self.cols[cols]

    def removed(self, entries: Entries) -> Entries:
        """The entries less their offsets."""
        return Entries(
            entries.rows, entries.cols, entries.values - self.at(entries.rows, entries.cols), entries.shape
        )

    def dense(self) -> Float[Tensor, "m n"]:
        """All offsets."""
        return self.mean + self.rows[:, None] + self.cols


def _averages(owner: Tensor, values: Tensor, count: int) -> Tensor:
    total = torch.zeros(count, dtype=values.dtype, device=values.device).index_add_(0, owner, values)
    return total / torch.bincount(owner, minlength=count).clamp_min(1)
