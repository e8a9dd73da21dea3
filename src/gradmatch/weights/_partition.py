"""Cutting the operations of an edge into groups with the least distance within them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gradmatch.core import checks

ENUMERATED = 10
"""Most operations of which every partition is looked at."""
TRIES = 20
"""Random starts of the search among more."""


def best_partition(
    distances: Float[Tensor, "n n"], n_groups: int, singletons: bool | None = None
) -> tuple[tuple[tuple[int, ...], ...], float]:
    """The groups with the least sum of distances within them, and that sum.

    Args:
        distances: symmetric.
        singletons: groups of one are allowed; default only if there are fewer than 2 operations a group.

    >>> best_partition(torch.tensor([[0.0, 1, 9, 9], [1, 0, 9, 9], [9, 9, 0, 2], [9, 9, 2, 0]]), 2)
    (((0, 1), (2, 3)), 3.0)
    """
    n = len(distances)
    least = 1 if (n < 2 * n_groups if singletons is None else singletons) else 2
    checks.require(n >= least * n_groups, f"n_groups is {n_groups}; {n} operations are too few for that.")
    d = distances.double()
    labels = _all_labels(n, n_groups, least) if n <= ENUMERATED else searched(d, n_groups, least)
    same = labels[:, :, None] == labels[:, None, :]
    within = (same * d.triu(1)).sum((1, 2))
    best = labels[int(within.argmin())]
    groups = sorted(tuple(torch.nonzero(best == k).flatten().tolist()) for k in range(n_groups))
    return tuple(groups), float(within.min())


def _all_labels(n: int, n_groups: int, least: int) -> Tensor:
    """Every partition into so many groups of at least ``least``, as labels (N, n); group k is met after group k - 1."""
    partial: list[list[int]] = [[0]]
    for _ in range(n - 1):
        partial = [[*p, k] for p in partial for k in range(min(max(p) + 2, n_groups))]
    labels = torch.tensor(partial)
    sizes = torch.stack([(labels == k).sum(1) for k in range(n_groups)], 1)
    return labels[(sizes >= least).all(1)]


def searched(d: Tensor, n_groups: int, least: int) -> Tensor:
    """Good partitions (tries, n): each from a random balanced one, by moves and swaps as long as they help."""
    g, n, found = torch.Generator().manual_seed(0), len(d), []
    for _ in range(TRIES):
        labels = torch.empty(n, dtype=torch.long)
        labels[torch.randperm(n, generator=g)] = torch.arange(n) % n_groups
        while True:
            options = [labels]
            for i in range(n):
                for k in range(n_groups):
                    if k != int(labels[i]) and int((labels == labels[i]).sum()) > least:
                        options.append(labels.clone().index_fill_(0, torch.tensor([i]), k))
                for j in range(i):
                    if labels[i] != labels[j]:
                        swapped = labels.clone()
                        swapped[[i, j]] = labels[[j, i]]
                        options.append(swapped)
            every = torch.stack(options)
            within = ((every[:, :, None] == every[:, None, :]) * d.triu(1)).sum((1, 2))
            if within.min() >= within[0] - 1e-12:
                break
            labels = every[int(within.argmin())]
        found.append(labels)
    return torch.stack(found)
