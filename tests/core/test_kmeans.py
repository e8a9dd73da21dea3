"""One-dimensional k-means against a plain dynamic programme, Lloyd with restarts, and the edges of its input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gradmatch.core.checks import InputError
from gradmatch.core.kmeans import kmeans_1d


def optimum(x: np.ndarray, k: int, w: np.ndarray) -> float:
    """The least cost by the O(k n^2) programme."""
    order = np.argsort(x)
    x, w = x[order], w[order]
    mass, first, second = (np.concatenate([[0], np.cumsum(v)]) for v in (w, w * x, w * x * x))
    best = np.full(len(x) + 1, np.inf)
    best[0] = 0
    for _ in range(k):
        new = np.full(len(x) + 1, np.inf)
        new[0] = 0
        for i in range(1, len(x) + 1):
            a = np.arange(i)
            cost = second[i] - second[a] - (first[i] - first[a]) ** 2 / (mass[i] - mass[a])
            new[i] = (best[a] + np.maximum(cost, 0)).min()
        best = np.minimum(new, best)
    return float(best[-1])


def cost_of(x: torch.Tensor, codes: torch.Tensor, w: torch.Tensor) -> float:
    return float(((x.double()[:, None] - codes) ** 2).amin(1) @ w.double())


@pytest.mark.parametrize("trial", range(12))
def test_is_the_optimum(trial: int) -> None:
    g = torch.Generator().manual_seed(trial)
    for _ in range(6):
        n, k = (int(torch.randint(1, most, (1,), generator=g)) for most in (70, 10))
        x = torch.randn(n, generator=g)
        x = [x, x.sign() * x.abs() ** 4, (3 * x).round() / 3][trial % 3]
        w = torch.rand(n, generator=g) + 0.1 if trial % 2 else torch.ones(n)
        found = kmeans_1d(x, k, w if trial % 2 else None)
        wanted = optimum(x.double().numpy(), k, w.double().numpy())
        assert found.gap == 0
        assert found.cost == pytest.approx(wanted, abs=1e-9, rel=1e-7)
        assert cost_of(x, found.codes, w) == pytest.approx(wanted, abs=1e-6, rel=1e-6)
        assert len(found.codes) == k
        assert bool((found.codes.diff() >= 0).all())


def test_many_values_are_cut_in_cells_without_loss() -> None:
    x = torch.randn(3000, generator=torch.Generator().manual_seed(0)) ** 3
    found = kmeans_1d(x, 5)
    assert found.gap == 0
    assert found.cost == pytest.approx(optimum(x.double().numpy(), 5, np.ones(3000)), rel=1e-9)


@pytest.mark.parametrize("k", [4, 16])
def test_never_worse_than_lloyd_with_restarts(k: int) -> None:
    from sklearn.cluster import KMeans

    x = torch.randn(4000, generator=torch.Generator().manual_seed(k))
    x = x.sign() * x.abs() ** 2.5
    theirs = KMeans(k, n_init=10, random_state=0).fit(x[:, None].numpy()).inertia_
    assert kmeans_1d(x, k).cost <= theirs * (1 + 1e-6)


def test_few_distinct_values_are_kept_exactly() -> None:
    values = torch.arange(256).half() / 7
    x = values[torch.randint(256, (5000,), generator=torch.Generator().manual_seed(0))]
    found = kmeans_1d(torch.cat([values, x]), 256)
    assert found.cost == 0
    assert torch.equal(found.codes, values.double())
    constant = kmeans_1d(torch.full((9,), 0.3), 4)
    assert constant.cost == 0
    assert torch.allclose(constant.codes, torch.full((4,), 0.3).double())


def test_a_shift_moves_codes_and_nothing_else() -> None:
    x = torch.randn(500, generator=torch.Generator().manual_seed(0)).double()
    near, far = kmeans_1d(x, 7), kmeans_1d(x + 1e4, 7)
    assert torch.allclose(far.codes - 1e4, near.codes, atol=1e-6)
    assert far.cost == pytest.approx(near.cost, rel=1e-6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: kmeans_1d(torch.empty(0), 2), "values is empty"),
        (lambda: kmeans_1d(torch.tensor([1.0, float("nan")]), 2), "NaN or infinite"),
        (lambda: kmeans_1d(torch.ones(3), 0), "k is 0"),
        (lambda: kmeans_1d(torch.ones(3), 2, torch.ones(2)), "3 entries and weights has 2"),
        (lambda: kmeans_1d(torch.ones(3), 2, torch.zeros(3)), "not above 0"),
    ],
)
def test_refuses(call, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()
