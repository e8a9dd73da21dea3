"""Every check, refusal and pitfall of low-rank matrix completion, against dense and closed-form references."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor

from gradmatch.core.checks import InputError
from gradmatch.solve import MatrixCompletion, matrix_completion
from gradmatch.solve._entries import Side, as_entries
from gradmatch.solve._regressions import Inner, hadamard, sketch_preconditioner
from gradmatch.solve._spectral import clipped, incoherence, leading_vectors, subspace_distance
from gradmatch.solve.matrix_completion import orthonormal


def low_rank(m: int, n: int, k: int, seed: int = 0, kappa: float = 1.0) -> np.ndarray:
    """Orthonormal factors with singular values from kappa to 1."""
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.standard_normal((size, k)))[0] for size in (m, n))
    return U * np.linspace(kappa, 1, k) @ V.T


def sampled(M: np.ndarray, share: float, seed: int = 0) -> np.ndarray:
    """NaN where unobserved."""
    return np.where(np.random.default_rng(seed + 100).random(M.shape) < share, M, np.nan)


def error(model: MatrixCompletion, M: np.ndarray) -> float:
    return float(np.linalg.norm(model.complete() - M) / np.linalg.norm(M))


def inner(solver: str, **changed) -> Inner:
    options = {"tol": 0.1, "most": 4, "ridge": 0.0, "sketch_rows": 16} | changed
    return Inner(solver, generator=torch.Generator().manual_seed(0), **options)


def columns(seen: np.ndarray) -> Side:
    return as_entries(seen, None, None, None, torch.float64).sides()[0]


def basis(m: int, k: int, seed: int = 0) -> Tensor:
    drawn = torch.randn(m, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q


def regressions(U: np.ndarray, seen: np.ndarray, ridge: float = 0.0) -> np.ndarray:
    """Every column's least squares by itself."""
    found = []
    for column in seen.T:
        there = ~np.isnan(column)
        A = np.concatenate([U[there], np.sqrt(ridge) * np.eye(U.shape[1])])
        b = np.concatenate([column[there], np.zeros(U.shape[1])])
        found.append(np.linalg.lstsq(A, b, rcond=None)[0])
    return np.array(found)


# --- the two products -----------------------------------------------------------------------------------------


def test_sparse_residual_and_products_equal_dense_masked_ones() -> None:
    seen = sampled(low_rank(40, 30, 3), 0.4)
    U, V = basis(40, 3, 1), basis(30, 3, 2)
    mask = ~torch.from_numpy(seen).isnan()
    dense = (torch.from_numpy(seen) - U @ V.T).nan_to_num()
    for side, fixed, free, expected, there in zip(
        as_entries(seen, None, None, None, torch.float64).sides(), (U, V), (V, U), (dense.T, dense), (mask.T, mask),
        strict=True,
    ):  # fmt: skip
        r = side.residual(fixed, free)
        assert torch.allclose(r, expected[there], atol=1e-12, rtol=0)
        assert torch.allclose(side.products(fixed, free), (free @ fixed.T)[there], atol=1e-12, rtol=0)
        assert torch.allclose(side.gather(r, fixed), expected @ fixed, atol=1e-12, rtol=0)


# --- inner solvers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("solver", ["exact", "pcg", "sketch"])
def test_every_solver_solves_the_regressions_of_the_loop(solver: str, ridge: float) -> None:
    seen = sampled(low_rank(400, 25, 5) + 0.1 * low_rank(400, 25, 20, 7), 0.7)
    seen[30:, :3] = np.nan  # columns of other lengths, too short to be sketched
    side, U = columns(seen), basis(400, 5)
    V = basis(25, 5, 3)
    how = inner(solver, tol=0.0, most=40, ridge=ridge)
    change, _ = how.change(side, U, V, side.residual(U, V))
    assert np.allclose((V + change).numpy(), regressions(U.numpy(), seen, ridge), atol=1e-8)


@pytest.mark.parametrize("rank", [2, 9])
def test_batches_of_any_size_give_the_same_regressions(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradmatch.solve._entries.BLOCK_BYTES", 16000)
    seen = sampled(low_rank(60, 40, rank), 0.5)
    side = columns(seen)
    blocks = side.blocks(rank)
    assert len(blocks) > 1
    assert torch.cat([which for which, _ in blocks]).sort().values.tolist() == list(range(40))
    change, _ = inner("exact").change(side, basis(60, rank), torch.zeros(40, rank).double(), side.values)
    assert np.allclose(change.numpy(), regressions(basis(60, rank).numpy(), seen), atol=1e-10)


def test_auto_sends_short_columns_to_the_exact_solver() -> None:
    k = 20
    seen = sampled(low_rank(300, 30, k), 0.6)
    seen[2 * k + 5 :, :4] = np.nan
    seen[:, :4] = np.where(np.arange(300)[:, None] < k + 3, low_rank(300, 30, k)[:, :4], np.nan)
    side, U = columns(seen), basis(300, k, 5)
    V = torch.zeros(30, k, dtype=torch.float64)
    change, steps = inner("auto", most=1).change(side, U, V, side.values)
    reference = regressions(U.numpy(), seen)
    assert np.allclose(change[:4].numpy(), reference[:4], atol=1e-8)
    assert not np.allclose(change[4:].numpy(), reference[4:], atol=1e-3)  # one step only
    assert steps == 1.0


def test_rank_one_is_the_closed_form_and_one_step_of_conjugate_gradients() -> None:
    seen = sampled(low_rank(30, 20, 1), 0.5)
    side, u = columns(seen), basis(30, 1, 4)
    V = torch.zeros(20, 1, dtype=torch.float64)
    known = ~np.isnan(seen)
    expected = np.nansum(u.numpy() * seen, 0) / (u.numpy() ** 2 * known).sum(0)
    for how in (inner("exact"), inner("pcg", tol=0.0, most=1)):
        change, _ = how.change(side, u, V, side.values)
        assert np.allclose(change[:, 0].numpy(), expected, rtol=1e-12, atol=0)


def test_columns_with_nothing_to_do_stay_and_do_not_divide_by_zero() -> None:
    M = low_rank(40, 20, 2)
    M[:, 3] = 0.0
    seen = sampled(M, 0.7)
    for solver in ("pcg", "sketch", "exact"):
        model = MatrixCompletion(2, solver=solver, tol=0, max_iter=5).fit(seen)
        assert np.isfinite(model.complete()).all()
        assert not model.V_[3].any()


def test_inner_steps_obey_tolerance_and_bounds() -> None:
    seen = sampled(low_rank(200, 150, 20), 0.5)
    side, U, V = columns(seen), basis(200, 20, 5), torch.zeros(150, 20, dtype=torch.float64)
    for tol, most, low, high in ((0.999, 9, 1, 1), (0.1, 9, 2, 5), (1e-9, 3, 3, 3)):
        _, steps = inner("pcg", tol=tol, most=most).change(side, U, V, side.values)
        assert low <= steps <= high


def test_single_precision_directions_do_not_cap_the_accuracy() -> None:
    M = low_rank(200, 150, 16)
    model = MatrixCompletion(16, solver="pcg", tol=1e-13, max_iter=60).fit(sampled(M, 0.5))
    assert error(model, M) < 1e-12
    tiny = MatrixCompletion(16, solver="pcg", tol=1e-13, max_iter=60).fit(sampled(1e-30 * M, 0.5))
    assert error(tiny, 1e-30 * M) < 1e-12


# --- sketches -------------------------------------------------------------------------------------------------


def test_hadamard_equals_its_matrix() -> None:
    H = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(3):
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    x = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(hadamard(x), H @ x)


def coherent(n: int, k: int, seed: int) -> Tensor:
    A = 1e-5 * torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    A[:k] += torch.eye(k)
    return A


@pytest.mark.parametrize("seed", range(5))
def test_sixteen_k_rows_precondition_random_and_coherent_matrices(seed: int) -> None:
    k, n = 20, 1024
    A = torch.stack([basis(n, k, seed) * torch.logspace(0, 3, k), coherent(n, k, seed)])
    R = sketch_preconditioner(A, 16 * k, torch.Generator().manual_seed(seed))
    for one, own in zip(A, R, strict=True):
        assert torch.linalg.cond(torch.linalg.solve_triangular(own, one, upper=True, left=False)) < 2


def test_count_sketch_of_as_many_rows_fails_on_coherent_matrices() -> None:
    k, n, rows = 20, 1024, 80
    g = torch.Generator().manual_seed(0)
    worst = 0.0
    for seed in range(5):
        A = coherent(n, k, seed)
        signs = torch.randint(2, (n, 1), generator=g) * 2.0 - 1
        SA = torch.zeros(rows, k, dtype=torch.float64)
        SA.index_add_(0, torch.randint(rows, (n,), generator=g), signs * A)
        R = torch.linalg.qr(SA).R
        worst = max(
            worst, float(torch.linalg.cond(torch.linalg.solve_triangular(R, A, upper=True, left=False)))
        )
    assert worst > 500


def test_a_sketch_of_few_rows_still_converges() -> None:
    """At 4 k rows the paper's unit step diverges; conjugate gradients do not depend on it."""
    seen = sampled(low_rank(500, 12, 4), 0.8)
    side, U, V = columns(seen), basis(500, 4, 5), torch.zeros(12, 4, dtype=torch.float64)
    change, _ = inner("sketch", tol=1e-10, most=60, sketch_rows=4).change(side, U, V, side.values)
    assert np.allclose(change.numpy(), regressions(U.numpy(), seen), atol=1e-8)


def test_sketching_is_kept_for_long_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    kept = sketch_preconditioner
    monkeypatch.setattr(
        "gradmatch.solve._regressions.sketch_preconditioner",
        lambda A, *rest: calls.append(A.shape[1]) or kept(A, *rest),
    )
    seen = sampled(low_rank(100, 10, 3), 0.999)
    seen[60:, :5] = np.nan  # 60 entries, below 32 * 3
    MatrixCompletion(3, solver="sketch", max_iter=1).fit(seen)
    assert calls
    assert min(calls) > 60


# --- the whole method -----------------------------------------------------------------------------------------


def test_a_tight_inner_tolerance_gives_the_exact_solvers_result() -> None:
    seen = sampled(low_rank(80, 60, 4, kappa=3), 0.4)
    a = MatrixCompletion(4, solver="exact", tol=0, max_iter=8).fit(seen).complete()
    b = MatrixCompletion(4, solver="pcg", tol=0, max_iter=8, inner_tol=0, inner_max=12).fit(seen).complete()
    assert np.abs(a - b).max() < 1e-8


def test_full_observation_is_the_truncated_svd_after_one_sweep() -> None:
    M = np.random.default_rng(0).standard_normal((40, 30))
    for solver in ("exact", "pcg"):
        model = MatrixCompletion(5, solver=solver, clip=False, max_iter=1).fit(M)
        u, s, v = np.linalg.svd(M)
        assert np.abs(model.complete() - u[:, :5] * s[:5] @ v[:5]).max() < 1e-6
        assert model.history_[0].misfit == pytest.approx(np.sqrt((s[5:] ** 2).sum() / (s**2).sum()), rel=1e-9)


def misfits(model: MatrixCompletion) -> list[float]:
    return [x for sweep in model.history_ for x in (sweep.middle, sweep.misfit)]


@pytest.mark.parametrize("solver", ["exact", "pcg", "sketch"])
@pytest.mark.parametrize(("m", "n", "k", "share"), [(120, 90, 5, 0.25), (400, 20, 3, 0.7)])
def test_the_misfit_never_rises(solver: str, m: int, n: int, k: int, share: float) -> None:
    seen = sampled(low_rank(m, n, k, kappa=5) + 0.02 * low_rank(m, n, n, 9), share)
    found = misfits(MatrixCompletion(k, solver=solver, inner_max=1, tol=0, max_iter=25).fit(seen))
    assert all(b <= a * (1 + 1e-7) for a, b in itertools.pairwise(found))


def test_without_the_carry_inexact_updates_do_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    M = low_rank(400, 300, 5)
    seen, options = sampled(M, 0.1), {"solver": "pcg", "inner_max": 2, "tol": 0, "max_iter": 30}
    assert error(MatrixCompletion(5, **options).fit(seen), M) < 1e-6
    monkeypatch.setattr(
        matrix_completion, "orthonormal", lambda fixed, free: (torch.linalg.qr(fixed).Q, free)
    )
    broken = MatrixCompletion(5, **options).fit(seen)
    assert error(broken, M) > 0.02
    found = misfits(broken)
    assert any(b > a * 1.001 for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("solver", ["exact", "pcg"])
def test_a_rotated_start_gives_the_same_matrix(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = sampled(low_rank(50, 40, 3, kappa=4), 0.5)
    options = {"solver": solver, "max_iter": 6, "tol": 0, "inner_tol": 1e-5}  # directions in double precision
    plain = MatrixCompletion(3, **options).fit(seen).complete()
    turn = basis(3, 3, 8)
    start = MatrixCompletion._start
    monkeypatch.setattr(MatrixCompletion, "_start", lambda self, *rest: start(self, *rest) @ turn)
    assert np.allclose(MatrixCompletion(3, **options).fit(seen).complete(), plain, atol=1e-7)


def test_carrying_r_leaves_the_product_and_mends_unbalanced_factors() -> None:
    U, V = basis(30, 3) @ torch.diag(torch.tensor([1e6, 1.0, 1e-6]).double()), basis(20, 3)
    Q, W = orthonormal(U, V)
    assert torch.allclose(Q @ W.T, U @ V.T, rtol=1e-10)
    assert torch.allclose(Q.T @ Q, torch.eye(3).double(), atol=1e-12)


def test_transposing_swaps_the_factors() -> None:
    M = low_rank(60, 45, 3)
    seen = sampled(M, 0.5)
    a, b = MatrixCompletion(3, tol=1e-12).fit(seen), MatrixCompletion(3, tol=1e-12).fit(seen.T)
    assert np.allclose(a.complete(), b.complete().T, atol=1e-9)
    assert subspace_distance(torch.from_numpy(a.U_), torch.from_numpy(b.V_)) < 1e-6
    by_column = as_entries(seen, None, None, None, torch.float64).sides()[0]
    by_row = as_entries(seen.T, None, None, None, torch.float64).sides()[1]
    assert torch.equal(by_column.index, by_row.index)
    assert torch.equal(by_column.values, by_row.values)


@pytest.mark.parametrize(
    ("options", "most"),
    [({"solver": "exact"}, 1e-6), ({"inner_max": 2, "solver": "pcg"}, 1e-6), ({"inner_max": 1, "solver": "pcg"}, 1e-3)],
)  # fmt: skip
def test_recovers_at_ten_percent_as_the_pilot_did(options: dict, most: float) -> None:
    M = low_rank(400, 300, 5)
    assert error(MatrixCompletion(5, tol=0, max_iter=30, **options).fit(sampled(M, 0.1)), M) < most


def test_a_rank_set_too_high_is_survived() -> None:
    M = low_rank(60, 50, 2)
    for solver in ("exact", "pcg"):
        model = MatrixCompletion(6, solver=solver, max_iter=60).fit(sampled(M, 0.6))
        assert model.history_[-1].misfit < 1e-3
        assert error(model, M) < 0.3


def test_both_halves_descend_one_objective_with_a_ridge() -> None:
    """|P(X - M)|^2 + ridge |X|^2, since the fixed factor is orthonormal."""
    seen = sampled(low_rank(60, 50, 4) + 0.3 * low_rank(60, 50, 50, 3), 0.5)
    scale = np.nansum(seen**2)
    values = []
    for sweeps in range(1, 8):
        model = MatrixCompletion(4, solver="exact", ridge=0.2, tol=0, max_iter=sweeps).fit(seen)
        X = model.complete()
        values.append(np.nansum((X - seen) ** 2) + 0.2 * (X**2).sum())
        assert model.history_[-1].misfit ** 2 * scale == pytest.approx(np.nansum((X - seen) ** 2), rel=1e-9)
    assert all(b <= a for a, b in itertools.pairwise(values))


def test_a_ridge_allows_rows_without_entries() -> None:
    seen = sampled(low_rank(30, 20, 2), 0.6)
    seen[4] = np.nan
    for solver in ("exact", "pcg"):
        model = MatrixCompletion(2, ridge=0.01, solver=solver).fit(seen)
        assert np.allclose(model.complete()[4], 0.0)


def test_growing_the_rank_recovers_what_is_badly_conditioned() -> None:
    M = low_rank(120, 100, 4, kappa=30)
    model = MatrixCompletion(4, rank_schedule=(1, 2), tol=1e-10, max_iter=200).fit(sampled(M, 0.5))
    assert error(model, M) < 1e-6
    assert [s.rank for s in model.history_] == sorted(s.rank for s in model.history_)
    assert {s.rank for s in model.history_} == {1, 2, 4}


def test_a_split_uses_fresh_entries_in_every_half() -> None:
    M = low_rank(300, 250, 2)
    model = MatrixCompletion(2, split=True, max_iter=4, tol=0).fit(sampled(M, 0.9))
    assert error(model, M) < 1e-2
    parts = model._parts(as_entries(M, None, None, None, torch.float64), torch.Generator().manual_seed(0))
    assert len(parts) == 9
    keys = torch.cat([p.rows * 250 + p.cols for p in parts])
    assert keys.sort().values.tolist() == list(range(300 * 250))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# --- start ----------------------------------------------------------------------------------------------------


def test_incoherence_of_random_and_of_identity_columns() -> None:
    U = basis(2000, 10)
    assert float(U.norm(dim=1).mean()) * (2000 / 10) ** 0.5 == pytest.approx(1, abs=0.05)
    assert 1 < incoherence(U) < 3
    assert incoherence(torch.eye(50)[:, :2]) == pytest.approx(5)


def test_clipping_leaves_an_incoherent_basis_and_cuts_a_spike() -> None:
    U = basis(200, 5)
    assert torch.equal(clipped(U), U)
    spiky = torch.linalg.qr(torch.cat([50 * basis(5, 5, 1), basis(195, 5, 2)])).Q
    assert incoherence(clipped(spiky)) < 0.5 * incoherence(spiky)


def test_a_wrong_mu_takes_a_tenth_at_most_and_empties_no_column() -> None:
    U = basis(100, 4)
    cut = U.clone()
    cut[U.abs() > U.abs().flatten().kthvalue(360).values] = 0
    assert subspace_distance(clipped(U, 1e-9), cut) < 1e-12
    alone = torch.eye(50, 3).double()
    assert torch.equal(clipped(alone, 1e-9).abs(), alone)


def test_leading_vectors_of_large_sparse_matrices_are_the_dense_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    side = as_entries(sampled(low_rank(90, 70, 3), 0.5), None, None, None, torch.float64).sides()[1]
    dense = leading_vectors(side, side.values, 3, torch.Generator())
    monkeypatch.setattr("gradmatch.solve._spectral.DENSE", 0)
    assert (
        subspace_distance(leading_vectors(side, side.values, 3, torch.Generator().manual_seed(0)), dense)
        < 1e-6
    )


def test_angles_between_subspaces() -> None:
    e = torch.eye(4).double()
    turned = torch.stack([e[0], np.cos(0.3) * e[1] + np.sin(0.3) * e[2]], 1)
    assert subspace_distance(e[:, :2] * 3, turned) == pytest.approx(np.sin(0.3))


# --- what users have ------------------------------------------------------------------------------------------


def test_all_kinds_of_input_give_one_result() -> None:
    seen = sampled(low_rank(30, 25, 2), 0.6)
    rows, cols = (~np.isnan(seen)).nonzero()
    order = np.random.default_rng(0).permutation(len(rows))
    values = seen[rows, cols]
    expected = MatrixCompletion(2).fit(seen).complete()
    coo = sp.coo_matrix((values, (rows, cols)), shape=seen.shape)
    tensors = torch.sparse_coo_tensor(np.stack([rows, cols]), values, seen.shape)
    kinds = [
        (torch.from_numpy(seen),),
        (coo,),
        (coo.tocsr(),),
        (coo.tocsc(),),
        (tensors,),
        (tensors.coalesce().to_sparse_csr(),),
        (rows[order], cols[order], values[order], seen.shape),
        (torch.from_numpy(rows), torch.from_numpy(cols), torch.from_numpy(values), seen.shape),
    ]
    for given in kinds:
        model = MatrixCompletion(2).fit(*given)
        found = model.complete()
        assert isinstance(found, Tensor) == isinstance(given[-1] if len(given) == 1 else given[2], Tensor)
        assert np.allclose(np.asarray(found), expected, atol=1e-9)
        assert type(model.U_) is type(found)


def test_masked_arrays_keep_their_mask() -> None:
    M = low_rank(20, 15, 2)
    there = np.random.default_rng(0).random(M.shape) < 0.7
    expected = MatrixCompletion(2).fit(np.where(there, M, np.nan)).complete()
    spoilt = np.where(there, M, 7.0)  # what lies under a mask must not be read
    np.testing.assert_array_equal(
        MatrixCompletion(2).fit(np.ma.masked_array(spoilt, ~there)).complete(), expected
    )
    whole = np.ma.masked_array(np.arange(12).reshape(3, 4), np.eye(3, 4, dtype=bool))
    assert len(as_entries(whole, None, None, None, torch.float64)) == 9
    frozen = M.copy()
    frozen.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MatrixCompletion(2).fit(frozen)


def test_stored_zeros_are_observed() -> None:
    values = np.zeros((4, 3))
    values[:, 0] = 1
    stored = sp.coo_matrix((values.ravel(), np.indices((4, 3)).reshape(2, -1)), shape=(4, 3))
    assert np.allclose(MatrixCompletion(1).fit(stored).complete(), values, atol=1e-8)


def test_predicts_completes_and_fills_in_new_rows() -> None:
    M = low_rank(80, 40, 3)
    seen = sampled(M, 0.6)
    model = MatrixCompletion(3, tol=1e-12).fit(seen[:60])
    assert np.allclose(model.predict([0, 5], [3, 7]), model.complete()[[0, 5], [3, 7]])
    filled = model.transform(seen[60:])
    assert np.abs(filled - M[60:]).max() < 1e-4
    known = ~np.isnan(seen[60:])
    assert np.array_equal(filled[known], seen[60:][known])
    assert np.allclose(model.fit_transform(seen[:60]), M[:60], atol=1e-4)


def test_offsets_are_taken_away_and_put_back() -> None:
    rng = np.random.default_rng(0)
    additive = 3 + rng.standard_normal((40, 1)) + rng.standard_normal(30)
    seen = sampled(additive, 0.5)
    assert np.allclose(
        MatrixCompletion(1, bias="additive", ridge=0.1).fit(seen).complete(), additive, atol=1e-3
    )
    new = MatrixCompletion(1, bias="additive", ridge=0.1).fit(seen[:30]).transform(seen[30:])
    assert np.allclose(new, additive[30:], atol=0.02)
    flat = sampled(np.full((20, 10), 7.0), 0.5)
    model = MatrixCompletion(1, bias="mean", ridge=0.1).fit(flat)
    assert np.allclose(model.complete(), 7.0)
    assert float(model.offsets_.mean) == 7.0


def test_history_tells_the_held_out_misfit() -> None:
    M = low_rank(60, 50, 2)
    seen = sampled(M, 0.4)
    hidden = np.isnan(seen).nonzero()
    model = MatrixCompletion(2).fit(seen, held_out=(*hidden, M[hidden]))
    last = model.history_[-1]
    found = model.predict(*hidden)
    assert last.held_out == pytest.approx(
        np.linalg.norm(found - M[hidden]) / np.linalg.norm(M[hidden]), abs=1e-9
    )
    assert model.n_iter_ == len(model.history_) < 100
    assert model.history_[0].held_out > 10 * last.held_out
    assert [s.seconds for s in model.history_] == sorted(s.seconds for s in model.history_)
    assert all(s.incoherence >= 1 and s.inner_steps == 1 for s in model.history_)
    assert MatrixCompletion(2).fit(seen).history_[0].held_out is None


def test_same_seed_same_result_and_the_global_generator_is_left() -> None:
    seen = sampled(low_rank(500, 60, 2), 0.5)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    options = {"init": "random", "solver": "sketch", "max_iter": 3}
    a, b, c = (MatrixCompletion(2, seed=s, **options).fit(seen).U_ for s in (1, 1, 2))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)
    assert torch.equal(torch.get_rng_state(), before)


def test_single_precision_throughout() -> None:
    M = low_rank(60, 50, 2)
    model = MatrixCompletion(2, dtype="float32").fit(torch.from_numpy(sampled(M, 0.5)))
    assert model.U_.dtype == torch.float32
    assert error(model, M.astype(np.float32)) < 1e-4


def test_works_with_scikit_learn() -> None:
    from sklearn.base import clone
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer

    M = low_rank(60, 30, 2)
    seen = sampled(M, 0.6)
    model = clone(MatrixCompletion(2, ridge=1e-9, rank_schedule=(1,)))
    assert model.get_params()["ridge"] == 1e-9
    assert model.set_params(ridge=0.0) is model
    filled = make_pipeline(FunctionTransformer(lambda x: 2 * x), model).fit_transform(seen)
    assert np.allclose(filled, 2 * M, atol=1e-3)
    with pytest.raises(InputError, match="parameter is 'rnk'"):
        model.set_params(rnk=3)


# --- refusals -------------------------------------------------------------------------------------------------

FULL = np.random.default_rng(0).standard_normal((6, 5))


def with_entry(value: float) -> np.ndarray:
    changed = FULL.copy()
    changed[2, 3] = value
    return changed


def without(row: int, kept: int) -> np.ndarray:
    changed = FULL.copy()
    changed[row, kept:] = np.nan
    return changed


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MatrixCompletion(1).fit([0, 1], [0, 1], [1.0, 1.0], 5), r"shape is 5; it must be \(rows, columns\)"),
        (lambda: MatrixCompletion(1).fit(FULL).predict([0.6], [1]), r"rows is torch.float32 of shape \(1,\)"),
        (lambda: MatrixCompletion(1).fit(FULL).predict(0, 1), r"rows is torch.int64 of shape \(\)"),
        (lambda: MatrixCompletion(6).fit(FULL), r"rank is 6; it must be at most min\(6, 5\) = 5"),
        (lambda: MatrixCompletion(3).fit(without(2, 2)), r"1 rows have fewer than rank 3 .*\(row 2 has 2\)"),
        (lambda: MatrixCompletion(3).fit(without(2, 2).T), r"1 columns have fewer than rank 3 .*column 2 has 2"),
        (lambda: MatrixCompletion(1).fit([0, 0], [1, 1], [1.0, 1.0], (1, 2)), r"1 entries at .* first at \(0, 1\)"),
        (
            lambda: MatrixCompletion(1).fit(sp.coo_matrix(([1.0, 1.0], ([0, 0], [1, 1])), shape=(2, 2))),
            "each may come once",
        ),
        (
            lambda: MatrixCompletion(1).fit(torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 1.0], (2, 2))),
            "each may come once",
        ),
        (lambda: MatrixCompletion(1).fit(with_entry(np.inf)), "values has 1 NaN or infinite"),
        (lambda: MatrixCompletion(1).fit([0], [0], [np.nan], (1, 1)), "values has 1 NaN"),
        (lambda: MatrixCompletion(1).fit([0, 7], [0, 0], [1.0, 1.0], (3, 3)), r"rows runs from 0 to 7; .* 0\.\.2"),
        (lambda: MatrixCompletion(1).fit([0], [0, 1], [1.0]), "rows has 1 entries and cols has 2"),
        (lambda: MatrixCompletion(1).fit([0], [0]), "cols and values go together"),
        (lambda: MatrixCompletion(1).fit([0.5], [0], [1.0]), "rows is .* whole numbers"),
        (lambda: MatrixCompletion(1).fit(np.full((3, 3), np.nan)), "no observed entry"),
        (lambda: MatrixCompletion(1).fit(np.ones(3)), "must be a matrix of floats"),
        (lambda: MatrixCompletion(1).fit(FULL, shape=(6, 5)), "shape is given with a matrix"),
        (lambda: MatrixCompletion(0), "rank is 0"),
        (lambda: MatrixCompletion(2, solver="svd"), "solver is 'svd'"),
        (lambda: MatrixCompletion(2, inner_tol=2), "inner_tol is 2"),
        (lambda: MatrixCompletion(2, inner_max=0), "inner_max is 0"),
        (lambda: MatrixCompletion(2, init="zeros"), "init is 'zeros'"),
        (lambda: MatrixCompletion(2, mu=-1), "mu is -1"),
        (lambda: MatrixCompletion(2, ridge=-1), "ridge is -1"),
        (lambda: MatrixCompletion(2, bias="rows"), "bias is 'rows'"),
        (lambda: MatrixCompletion(2, dtype="int8"), "dtype is 'int8'"),
        (lambda: MatrixCompletion(2, rank_schedule=(2,)), r"rank_schedule is \(2,\); it must rise"),
        (lambda: MatrixCompletion(2, rank_schedule=(1,), split=True), "exclude each other"),
        (lambda: MatrixCompletion(3, split=True, max_iter=9).fit(FULL), r"of a part \(split\) have fewer"),
        (lambda: MatrixCompletion(1).complete(), "not fitted yet"),
        (lambda: MatrixCompletion(1).fit(FULL).predict([9], [0]), r"rows must lie in 0\.\.5"),
        (lambda: MatrixCompletion(1).fit(FULL).transform(np.ones((2, 4))), "X has 4 columns; this model"),
    ],
)  # fmt: skip
def test_refuses(call, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()


def test_warns_of_fewer_entries_than_degrees_of_freedom() -> None:
    seen = np.full((8, 8), np.nan)
    for i in range(8):
        seen[i, [i, (i + 1) % 8]] = 1.0
    with pytest.warns(UserWarning, match="16 observed entries are fewer than the 28 degrees of freedom"):
        MatrixCompletion(2, max_iter=1).fit(seen)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MatrixCompletion(1, max_iter=1).fit(FULL)
