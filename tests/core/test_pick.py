"""Greedy selection against greedy selection written out the slow way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradmatch.core.checks import InputError
from gradmatch.core.kernel import LinearKernel, MatrixKernel
from gradmatch.core.pick import (
    Picks,
    by_class,
    facility_location,
    graph_cut,
    graph_cut_bins,
    herding,
    largest_remainder,
    log_det,
)


def cosine01(x: Tensor) -> Tensor:
    x = x.double()
    x = x / x.norm(dim=1, keepdim=True)
    return 0.5 + 0.5 * x @ x.T


def greedy(n: int, budget: int, gain, candidates=None) -> tuple[list[int], list[float]]:
    """Plain greedy: all gains from nothing for each pick, the first of the largest (to float64 rounding)."""
    picks: list[int] = []
    gains: list[float] = []
    for _ in range(budget):
        left = [j for j in (range(n) if candidates is None else sorted(candidates)) if j not in picks]
        values = gain(left, picks)
        best = int(torch.nonzero(values >= values.max() - 1e-12)[0])
        picks.append(left[best])
        gains.append(float(values[best]))
    return picks, gains


def naive_facility(s: Tensor, budget: int, w: Tensor | None = None, candidates=None):
    s = s.double()
    w = torch.ones(len(s), dtype=torch.float64) if w is None else w.double()

    def gain(left: list[int], a: list[int]) -> Tensor:
        best = s[:, a].max(1).values.clamp(min=0) if a else torch.zeros(len(s), dtype=torch.float64)
        return (w[:, None] * (s[:, left] - best[:, None]).clamp(min=0)).sum(0)

    return greedy(len(s), budget, gain, candidates)


def naive_cut(s: Tensor, budget: int, lam: float = 1.0, w: Tensor | None = None, candidates=None):
    s = s.double()
    w = torch.ones(len(s), dtype=torch.float64) if w is None else w.double()
    return greedy(
        len(s), budget, lambda left, a: lam * (w @ s[:, left]) - 2 * s[a][:, left].sum(0), candidates
    )


def same(picks: Picks, reference: tuple[list[int], list[float]], atol: float = 1e-9) -> None:
    assert picks.indices.tolist() == reference[0]
    assert torch.allclose(picks.gains, torch.tensor(reference[1], dtype=torch.float64), atol=atol)


@pytest.fixture(scope="module")
def rows() -> Tensor:
    g = torch.Generator().manual_seed(3)
    centres = torch.randn(4, 12, generator=g)
    return centres[torch.arange(60) % 4] + 0.6 * torch.randn(60, 12, generator=g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gram_limit", [0, 2**28])
def test_features_equal_naive(rows: Tensor, dtype: torch.dtype, gram_limit: int) -> None:
    x = rows.to(dtype)
    found = facility_location(x, 40, kind="features", gram_limit=gram_limit)
    same(found, naive_facility(cosine01(x), 40), 1e-5)
    found = graph_cut(x, 60, kind="features", gram_limit=gram_limit)
    same(found, naive_cut(cosine01(x), 60), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matrix_equals_naive_to_the_last_digit_given(rows: Tensor, dtype: torch.dtype) -> None:
    s = cosine01(rows).to(dtype)
    same(facility_location(s, 60), naive_facility(s, 60))
    same(graph_cut(s, 60), naive_cut(s, 60))


def test_dot_products_below_zero_and_weights(rows: Tensor) -> None:
    x = rows.double()
    w = torch.rand(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    some = [50, 3, 7, 11, 20, 33, 41, 2]
    s = x @ x.T
    for limit in (0, 2**28):
        common = {"kind": "features", "kernel": "dot", "weights": w, "gram_limit": limit}
        same(facility_location(x, 8, candidates=some, **common), naive_facility(s, 8, w, some))
        same(graph_cut(x, 8, candidates=some, lam=0.7, **common), naive_cut(s, 8, 0.7, w, some))
        same(facility_location(x, 20, **common), naive_facility(s, 20, w))
    same(facility_location(s, 8, candidates=some, weights=w), naive_facility(s, 8, w, some))


def test_float32_ranks_by_float64_when_gains_are_close() -> None:
    """Columns that differ in the eighth digit: float32 sums put others first, confirmation does not."""
    g = torch.Generator().manual_seed(1)
    base = torch.rand(400, 1, generator=g, dtype=torch.float64)
    s = (base + 2e-7 * torch.rand(400, 400, generator=g, dtype=torch.float64)).float()
    assert (
        s.sum(0).argsort(descending=True)[:5].tolist()
        != s.double().sum(0).argsort(descending=True)[:5].tolist()
    )
    same(facility_location(s, 6), naive_facility(s, 6))
    same(graph_cut(s, 6), naive_cut(s, 6))


def test_gains_in_millions_are_picked_to_the_end() -> None:
    """With entries of a million rounding alone passes any fixed mark for candidates that add nothing."""
    for seed in range(12):
        g = torch.Generator().manual_seed(seed)
        s = 1e6 * torch.randn(49, 49, generator=g, dtype=torch.float64)
        covered, left, expected = torch.zeros(49, dtype=torch.float64), torch.ones(49).bool(), []
        while len(expected) < 45:
            gains = (s - covered[:, None]).clamp(min=0).sum(0).masked_fill(~left, -1)
            best = gains.max() if gains.max() > 1e-6 else 0.0
            expected.append(int(torch.nonzero((gains >= best - 1e-6) & left)[0]))
            left[expected[-1]] = False
            covered = torch.maximum(covered, s[:, expected[-1]])
        assert facility_location(s, 45).indices.tolist() == expected


def test_function_kernel_equals_the_matrix_it_describes(rows: Tensor) -> None:
    def rbf(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-(torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") ** 2) / 20)

    s = rbf(rows.double(), rows.double())
    same(facility_location(rows.double(), 12, kind="features", kernel=rbf), naive_facility(s, 12))
    same(graph_cut(rows, 60, kind="features", kernel=rbf), naive_cut(s, 60), 1e-6)
    with pytest.raises(InputError, match=r"must give a tensor of shape \(60, 60\)"):
        graph_cut(rows, 2, kind="features", kernel=lambda a, b: torch.ones(3, 3))


def test_ties_go_to_the_lowest_index() -> None:
    g = torch.Generator().manual_seed(0)
    unique = torch.randn(37, 19, generator=g)
    x = unique.repeat(5, 1)  # every item five times; copies sit at different places of a matrix product
    for limit in (0, 2**28):
        found = facility_location(x, 20, kind="features", gram_limit=limit).indices
        assert bool((found < 37).all()), found
        first = graph_cut(x, 5, kind="features", gram_limit=limit).indices
        assert int(first[0]) < 37
    s = torch.randint(0, 3, (40, 40), generator=g).float()
    s = s + s.T
    same(facility_location(s, 40), naive_facility(s, 40), 0)
    same(graph_cut(s, 40), naive_cut(s, 40), 0)
    assert facility_location(torch.ones(5, 5), 5).indices.tolist() == [0, 1, 2, 3, 4]
    assert herding(torch.ones(4, 2), 4).indices.tolist() == [0, 1, 2, 3]


def test_bins_equal_one_cut_after_another(rows: Tensor) -> None:
    for limit in (0, 2**28):
        bins = graph_cut_bins(rows, [13, 20, 27], kind="features", gram_limit=limit)
        left = torch.arange(60)
        for found in bins:
            alone = graph_cut(rows[left], len(found), kind="features")
            assert found.indices.tolist() == left[alone.indices].tolist()
            assert torch.allclose(found.gains, alone.gains, atol=1e-5)
            left = left[~torch.isin(left, found.indices)]
        assert not len(left)


def test_the_matrix_is_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0))
    largest = 0
    plain = LinearKernel._affine

    def watched(self: LinearKernel, products: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, products.numel())
        return plain(self, products)

    monkeypatch.setattr(LinearKernel, "_affine", watched)
    facility_location(x, 5, kind="features", gram_limit=0)
    graph_cut(x, 5, kind="features", gram_limit=0)
    assert 0 < largest <= 2**20


def test_facility_location_adds_up_to_its_objective(rows: Tensor) -> None:
    """The gains are those of F(A) = sum_i max(0, max_A s), written as a set function."""
    s = rows.double() @ rows.double().T
    found = facility_location(s, 10)

    def value(a: list[int]) -> float:
        return float(s[:, a].max(1).values.clamp(min=0).sum())

    for k in range(1, 11):
        assert float(found.gains[:k].sum()) == pytest.approx(value(found.indices[:k].tolist()), abs=1e-9)


def test_herding_equals_its_definition(rows: Tensor) -> None:
    x = rows.double()

    def nearness(left: list[int], a: list[int]) -> Tensor:
        return torch.stack([-(x[[*a, j]].mean(0) - x.mean(0)).norm() for j in left])

    same(herding(x, 15), greedy(60, 15, nearness), 1e-9)


def test_log_det_equals_determinants(rows: Tensor) -> None:
    s = rows.double() @ rows.double().T

    def gains(left: list[int], a: list[int]) -> Tensor:
        def value(p: list[int]) -> Tensor:
            return torch.logdet(s[p][:, p] + 1e-3 * torch.eye(len(p), dtype=torch.float64))

        return torch.stack([value([*a, j]) - (value(a) if a else 0.0) for j in left])

    same(log_det(s, 12, ridge=1e-3), greedy(60, 12, gains), 1e-8)
    same(log_det(rows.double(), 12, kind="features", kernel="dot", ridge=1e-3), greedy(60, 12, gains), 1e-8)
    with pytest.raises(InputError, match="positive semi-definite"):
        log_det(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 2)


def test_by_class_keeps_budgets(rows: Tensor) -> None:
    y = torch.arange(60) % 3
    found = by_class(y, [4, 5, 6], lambda own, k: graph_cut(rows[own], k, kind="features"))
    assert torch.bincount(y[found.indices]).tolist() == [4, 5, 6]
    own = torch.nonzero(y == 1).flatten()
    assert found.indices[4:9].tolist() == own[graph_cut(rows[own], 5, kind="features").indices].tolist()


def test_largest_remainder_shares_exactly() -> None:
    g = torch.Generator().manual_seed(0)
    for total, sizes in [
        (7, [10, 10, 10]),
        (0, [1, 2]),
        (60, [60] * 10),
        (13, [5, 0, 9]),
        (3, [0.1, 0.2, 0.3]),
    ]:
        shares = largest_remainder(total, sizes, g)
        quota = [total * s / sum(sizes) for s in sizes]
        assert sum(shares) == total
        assert all(abs(k - q) < 1 for k, q in zip(shares, quota, strict=True))
    assert largest_remainder(13, [5, 0, 9], g)[1] == 0
    assert largest_remainder(6, [0.1, 0.2, 0.3], g) == [1, 2, 3]
    winners = {tuple(largest_remainder(1, [1, 1, 1], torch.Generator().manual_seed(s))) for s in range(20)}
    assert len(winners) == 3


def test_numpy_and_the_global_generator(rows: Tensor) -> None:
    before = torch.random.get_rng_state()
    assert facility_location(rows.numpy(), 5, kind="features").indices.tolist() == (
        facility_location(rows, 5, kind="features").indices.tolist()
    )
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: facility_location(torch.ones(3, 2), 1), r"\(3, 2\); it must be \(n, n\)"),
        (lambda: facility_location(torch.eye(3), 4), "budget is 4; it must be between 1 and 3"),
        (lambda: facility_location(torch.eye(3), 0), "budget is 0"),
        (lambda: graph_cut(torch.full((2, 2), float("nan")), 1), "4 NaN or infinite"),
        (lambda: graph_cut(torch.eye(3), 1, lam=0), "lam is 0; it must be above 0"),
        (lambda: graph_cut(torch.eye(3), 1, kind="rows"), "kind is 'rows'"),
        (lambda: graph_cut(torch.eye(3), 1, kind="features", kernel="rbf"), "kernel is 'rbf'"),
        (lambda: graph_cut(torch.tensor([[1.0], [0.0]]), 1, kind="features"), "only zeros in row 1"),
        (lambda: facility_location(torch.eye(3), 1, weights=[1, -1, 1]), "weights is of shape"),
        (lambda: facility_location(torch.eye(3), 1, candidates=[0, 0]), "must be distinct"),
        (lambda: facility_location(torch.eye(3), 1, candidates=[0, 3]), "within 0..2"),
        (lambda: graph_cut_bins(torch.eye(3), []), "sizes is empty"),
        (lambda: graph_cut_bins(torch.eye(3), [2, 2]), "budget is 4"),
        (lambda: herding(torch.ones(3), 1), r"\(n, m\)"),
        (lambda: log_det(torch.eye(2), 1, ridge=0), "ridge"),
        (lambda: largest_remainder(3, [0.0], torch.Generator()), "not all 0"),
        (lambda: by_class(torch.tensor([0, 1]), [1], lambda own, k: Picks(own, own)), "one for each of 2"),
    ],
)
def test_refuses(call, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()


def test_the_matrix_of_features_is_symmetric_to_the_bit_and_equal_to_the_product():
    rows = torch.nn.functional.normalize(
        torch.randn(1500, 7, generator=torch.Generator().manual_seed(3)), dim=1
    )
    gram = LinearKernel(rows, gram_limit=2**30).gram
    assert torch.equal(gram, gram.T)
    assert torch.allclose(gram, rows @ rows.T, atol=1e-6)


def test_columns_of_a_matrix_come_the_same_one_by_one_and_together():
    matrix = torch.randn(40, 40, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for count in (1, 3, 20):
        columns = torch.randperm(40, generator=torch.Generator().manual_seed(5))[:count]
        assert torch.equal(MatrixKernel(matrix).whole(columns), matrix[:, columns])
