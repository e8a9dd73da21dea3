"""What the greedy selectors share: their result, their reading of arguments, and how ties are broken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core.kernel import Kernel, KernelName, Kind, as_float, as_kernel

EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Picks:
    """Items in the order picked: ``indices`` long [k], and the gain of each when picked, float64 [k]."""

    indices: Tensor
    gains: Tensor

    def __len__(self) -> int:
        return len(self.indices)


def lowest(values: Tensor, tolerance: float) -> int:
    """The first index whose value is within ``tolerance`` of the largest."""
    return int(torch.nonzero(values >= values.max() - tolerance)[0])


def as_picks(picked: list[int], gains: list[float], names: Tensor) -> Picks:
    chosen = torch.tensor(picked, dtype=torch.long, device=names.device)
    return Picks(names[chosen], torch.tensor(gains, dtype=torch.float64))


def read(
    source: Any,
    budget: int,
    kind: Kind,
    kernel: KernelName,
    weights: Any,
    candidates: Any,
    gram_limit: int,
) -> tuple[Kernel, Tensor, Tensor]:
    """The checked kernel, the item index of every candidate, and float64 weights of all items."""
    n = len(source)
    device = source.device if isinstance(source, Tensor) else torch.device("cpu")
    subset = None
    if candidates is not None:
        subset = torch.as_tensor(candidates, device=device).long().unique()
        checks.require(
            len(subset) == len(candidates) and len(subset) > 0,
            f"candidates has {len(candidates)} entries, {len(subset)} different; they must be distinct, at least 1.",
        )
        checks.require(
            int(subset[0]) >= 0 and int(subset[-1]) < n,
            f"candidates runs from {int(subset[0])} to {int(subset[-1])}; it must be within 0..{n - 1}.",
        )
    similarities = as_kernel(source, kind, kernel, subset, gram_limit)
    checks.whole("budget", budget, 1, similarities.columns)
    if weights is None:
        w = torch.ones(n, dtype=torch.float64, device=device)
    else:
        w = as_float("weights", weights).to(device=device, dtype=torch.float64)
        checks.require(
            w.shape == (n,) and bool((w >= 0).all()),
            f"weights is of shape {tuple(w.shape)}, least {float(w.min())}; it must be ({n},) of at least 0.",
        )
    names = torch.arange(n, device=device) if subset is None else subset
    return similarities, names, w
