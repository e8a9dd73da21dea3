"""How near generated samples come to real ones, on any features; each figure has a noise floor from real data alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gradmatch.core import checks


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two sets of features (n, d), (m, d), in float64.

    Both covariances divide by n - 1. With d features it is biased upwards by about d^2 / n: compare at equal n.

    Raises:
        InputError: fewer than two rows, widths that differ, or features that are not finite.

    >>> round(frechet_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [5.0]])), 6)
    9.0
    """
    x, y = _features("a", a, 2), _features("b", b, 2)
    checks.require(
        x.shape[1] == y.shape[1],
        f"a has {x.shape[1]} features and b {y.shape[1]}; they must be equally many.",
    )
    mean = (x.mean(0) - y.mean(0)).square().sum()
    first, second = (torch.atleast_2d(torch.cov(f.T)) for f in (x, y))
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    return max(0.0, float(mean + first.trace() + second.trace() - 2 * cross))


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Share of fake rows within a real row's k-nearest-neighbour ball, and of real rows within a fake row's.

    The improved precision and recall of Kynkaanniemi et al. (arXiv 1904.06991), k = 3 as published.

    >>> x = torch.randn(50, 2)
    >>> precision_recall(x, x)
    (1.0, 1.0)
    """
    x, y = _features("real", real, k + 1), _features("fake", fake, k + 1)
    return _covered(x, y, k), _covered(y, x, k)


def _covered(centres: Tensor, points: Tensor, k: int) -> float:
    radii = torch.cdist(centres, centres).kthvalue(k + 1, dim=1).values  # the nearest is the row itself
    return float((torch.cdist(points, centres) <= radii).any(1).double().mean())


def shares(labels: Tensor, classes: int) -> Tensor:
    """Share of each class (classes,) float64."""
    checks.require(len(labels) > 0, "labels is empty; at least one is needed.")
    checks.require(
        labels.ndim == 1
        and not labels.is_floating_point()
        and 0 <= int(labels.min()) <= int(labels.max()) < classes,
        f"labels is {labels.dtype} of shape {tuple(labels.shape)}, from {float(labels.min()):g} to "
        f"{float(labels.max()):g}; it must be whole numbers in 0..{classes - 1}, (n,).",
    )
    return torch.bincount(labels, minlength=classes).double() / len(labels)


def noise_floor(
    metric: Callable[[Tensor, Tensor], float], real: Tensor, n: int, *, repeats: int = 5, seed: int = 0
) -> tuple[float, float]:
    """Mean and deviation of ``metric`` between two disjoint draws of ``n`` real rows: what perfection would score.

    Args:
        metric: of two sets of rows.
        real: (m, ...) with m >= 2 n.
        n: rows in each set, as many as there are generated samples.
        repeats: draws.
    """
    checks.require(
        len(real) >= 2 * checks.whole("n", n, 2),
        f"real has {len(real)} rows; two disjoint draws of {n} need {2 * n}.",
    )
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(checks.whole("repeats", repeats)):
        order = torch.randperm(len(real), generator=generator)
        found.append(metric(real[order[:n]], real[order[n : 2 * n]]))
    values = torch.tensor(found, dtype=torch.float64)
    return float(values.mean()), float(values.std()) if len(found) > 1 else 0.0


def _features(name: str, rows: Tensor, least: int) -> Tensor:
    checks.require(
        rows.ndim == 2 and len(rows) >= least,
        f"{name} is of shape {tuple(rows.shape)}; it must be (n, d) with n of {least} or more.",
    )
    return checks.finite(name, rows.detach().double())
