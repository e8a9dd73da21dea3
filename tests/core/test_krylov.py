"""Krylov methods against dense linear algebra."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradmatch.core.checks import InputError
from gradmatch.core.krylov import (
    Deflation,
    Estimate,
    FunctionOperator,
    as_operator,
    asymmetry,
    cg,
    dense,
    eigenpairs,
    hutchinson,
    hutchinson_diagonal,
    hutchpp,
    jacobi,
    lanczos,
    probe_vectors,
    smoothed,
    spectral_density,
)


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=draw(seed), dtype=torch.float64)


def with_spectrum(values, seed=0):
    """A symmetric matrix of these eigenvalues, and its eigenvectors."""
    values = torch.as_tensor(values, dtype=torch.float64)
    q = torch.linalg.qr(normal(len(values), len(values), seed=seed))[0]
    a = (q * values) @ q.T
    return (a + a.T) / 2, q


def poisson(n):
    line = sp.diags_array([-np.ones(n - 1), 2 * np.ones(n), -np.ones(n - 1)], offsets=[-1, 0, 1])
    eye = sp.eye_array(n)
    return (sp.kron(line, eye) + sp.kron(eye, line)).tocsr()


# --- operators ---------------------------------------------------------------------------------------------


def test_every_form_of_a_matrix_is_the_same_operator():
    a = poisson(5)
    whole = torch.from_numpy(a.toarray())
    v = normal(25, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's note on CSR must not reach users
        forms = [
            as_operator(a),
            as_operator(a.tocoo()),
            as_operator(sp.csc_matrix(a)),
            as_operator(whole),
            as_operator(a.toarray()),
            as_operator(whole.to_sparse()),
            as_operator(lambda x: whole @ x, 25),
            as_operator(scipy.sparse.linalg.aslinearoperator(a)),
        ]
    forms.append(as_operator(whole.to_sparse_csr()))
    for op in forms:
        assert op.shape == (25, 25)
        assert op.symmetric
        torch.testing.assert_close(op.matvec(v), whole @ v)
        torch.testing.assert_close(op.matvec(v[:, :1]), whole @ v[:, :1])
        torch.testing.assert_close(op.matvec(v[:, 0]), whole @ v[:, 0])
        torch.testing.assert_close(dense(op, chunk=7), whole)
        assert as_operator(op) is op


def test_duplicates_in_coordinates_add_up():
    coo = sp.coo_array(([1.0, 2.0, 5.0], ([0, 0, 1], [0, 0, 1])), shape=(2, 2))
    torch.testing.assert_close(dense(coo), torch.diag(torch.tensor([3.0, 5.0], dtype=torch.float64)))
    indices = torch.tensor([[0, 0, 1], [0, 0, 1]])
    own = torch.sparse_coo_tensor(indices, torch.tensor([1.0, 2.0, 5.0]), (2, 2))
    torch.testing.assert_close(dense(own), torch.diag(torch.tensor([3.0, 5.0])))


def test_symmetry_is_looked_up_or_declared():
    a = normal(6, 6)
    sparse = torch.where(a > 0.5, a, 0).to_sparse()
    for form in (a, a.numpy(), sparse, sp.csr_array(a.numpy()), normal(4, 6)):
        assert not as_operator(form).symmetric
    for form in (a + a.T, sp.csr_array((a + a.T).numpy()), torch.zeros(3, 3).to_sparse()):
        assert as_operator(form).symmetric
    assert as_operator(a, symmetric=True).symmetric
    assert not as_operator(lambda x: x, 3, symmetric=False).symmetric
    assert asymmetry(a + a.T, draw()) < 1e-12
    assert asymmetry(a, draw()) > 1e-2
    assert asymmetry(lambda v: a @ v, draw(), size=6) > 1e-2


def test_types_and_places():
    assert as_operator(np.eye(3, dtype=np.int64)).dtype == torch.float64
    assert as_operator(np.eye(3, dtype=np.float32)).dtype == torch.float32
    assert as_operator(np.eye(3), dtype=torch.float32).matvec(torch.ones(3)).dtype == torch.float32
    assert as_operator(lambda v: v, 3, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: as_operator("matrix"), "A is str"),
        (lambda: as_operator(lambda v: v), "size is None"),
        (lambda: as_operator(torch.ones(3)), "must be a matrix"),
        (lambda: as_operator(torch.eye(2) * float("nan")), "4 NaN|2 NaN"),
        (lambda: as_operator(sp.csr_array(np.array([[np.inf]]))), "infinite"),
        (lambda: as_operator(torch.eye(2, dtype=torch.complex64)), "complex"),
        (lambda: as_operator(lambda v: v[:1], 3).matvec(torch.ones(3)), "gave"),
        (lambda: cg(torch.ones(2, 3), torch.ones(3)), "square"),
        (lambda: cg(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.ones(2)), "not symmetric"),
        (lambda: cg(torch.eye(2), torch.ones(3)), "b has shape"),
        (lambda: cg(torch.eye(2), torch.ones(2), torch.ones(2, 2)), "x0 has 2"),
        (lambda: cg(torch.eye(2), torch.tensor([1.0, float("nan")])), "b has 1 NaN"),
        (lambda: cg(torch.eye(2), torch.ones(2), relative_to="x"), "relative_to"),
        (lambda: cg(lambda v: v * float("nan"), torch.ones(2)), "residual"),
        (lambda: jacobi(torch.diag(torch.tensor([1.0, 0.0]))), "above 0"),
        (
            lambda: jacobi(FunctionOperator(lambda v: v, (2, 2), torch.float32, torch.device("cpu"))),
            "products",
        ),
        (lambda: Deflation(torch.eye(3), torch.ones(3, 2)), "dependent"),
        (lambda: Deflation(torch.eye(2), torch.eye(2)), "fewer than"),
        (lambda: Deflation(-torch.eye(3), torch.eye(3)[:, :1]), "positive definite"),
        (lambda: lanczos(torch.eye(2), torch.zeros(2), 2), "length 0"),
        (lambda: lanczos(lambda v: v / 0, torch.ones(2), 2), "product with A"),
        (lambda: lanczos(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.ones(2), 2), "not symmetric"),
        (lambda: eigenpairs(torch.eye(2), 2, 1, generator=draw()), "largest"),
        (lambda: eigenpairs(torch.eye(2), 0, 0, generator=draw()), "largest"),
        (lambda: hutchpp(torch.eye(2), 2, generator=draw()), "products"),
        (lambda: hutchinson(torch.eye(2), kind="normal", generator=draw()), "kind"),
        (lambda: hutchinson(lambda v: v / 0, 2, size=3, generator=draw()), "samples"),
        (lambda: hutchinson(torch.ones(2, 3), generator=draw()), "square"),
    ],
)
def test_refusals(call, word):
    with pytest.raises(InputError, match=word):
        call()


# --- conjugate gradients -----------------------------------------------------------------------------------


def textbook_cg(a, b, tol, most=1000):
    """The iterates of CG from 0, one right-hand side."""
    x, r = torch.zeros_like(b), b.clone()
    p, found = r.clone(), []
    while r.norm() > tol * b.norm() and len(found) < most:
        alpha = (r @ r) / (p @ a @ p)
        x, new = x + alpha * p, r - alpha * (a @ p)
        p = new + (new @ new) / (r @ r) * p
        r = new
        found.append(x)
    return found


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 10**6))
def test_cg_solves_and_needs_no_more_than_p_steps(p, b, seed):
    a, _ = with_spectrum(torch.linspace(1, 5, p), seed)
    rhs = normal(p, b, seed=seed + 1)
    found = cg(a, rhs, tol=1e-10)
    torch.testing.assert_close(found.x, torch.linalg.solve(a, rhs), rtol=1e-8, atol=1e-9)
    assert bool(found.converged.all())
    assert not bool(found.indefinite.any())
    assert int(found.iterations.max()) <= p + 1


def test_cg_is_textbook_cg_for_every_column_alone():
    a = torch.from_numpy(poisson(8).toarray())
    values = torch.linalg.eigh(a)
    # an eigenvector (1 step), a mix of three (3 steps), noise, and 0
    rhs = torch.stack(
        [values[1][:, 3], values[1][:, [0, 20, 60]].sum(1), normal(64), torch.zeros(64, dtype=torch.float64)],
        1,
    )
    found = cg(poisson(8), rhs, tol=1e-9)
    for j in range(3):
        steps = textbook_cg(a, rhs[:, j], 1e-9)
        assert int(found.iterations[j]) == len(steps)
        torch.testing.assert_close(found.x[:, j], steps[-1], rtol=1e-9, atol=1e-11)
        alone = cg(a, rhs[:, j], tol=1e-9)
        assert alone.x.shape == (64,)
        torch.testing.assert_close(alone.x, found.x[:, j], rtol=1e-9, atol=1e-11)
        assert torch.equal(alone.iterations, found.iterations[j : j + 1])
        k = len(steps)
        torch.testing.assert_close(found.history[: k + 1, j], alone.history[:, 0], rtol=1e-6, atol=1e-12)
        assert bool((found.history[k:, j] == found.history[k, j]).all())
    assert found.iterations[:2].tolist() == [1, 3]
    assert int(found.iterations[3]) == 0
    assert float(found.x[:, 3].abs().max()) == 0
    assert bool(found.converged.all())


def test_columns_that_ended_leave_the_products():
    a = torch.diag(torch.arange(1.0, 41.0, dtype=torch.float64))
    widths = []

    def product(v):
        widths.append(v.shape[1])
        return a @ v

    rhs = torch.cat([torch.eye(40, dtype=torch.float64)[:, :6], normal(40, 2)], 1)
    found = cg(product, rhs, tol=1e-10)
    assert widths[0] == 8
    assert widths[1] == 2
    torch.testing.assert_close(found.x, rhs / a.diagonal()[:, None], rtol=1e-7, atol=1e-9)
    assert found.iterations[:6].tolist() == [1] * 6


def test_an_operator_for_every_column():
    matrices = torch.stack([with_spectrum(torch.linspace(1, 2 + j, 6), j)[0] for j in range(5)])
    rhs = normal(6, 5)
    rhs[:, 2] = 0

    def product(v):
        return torch.einsum("jkl,lj->kj", matrices, v)

    found = cg(product, rhs, tol=1e-11, shared=False)
    exact = torch.stack([torch.linalg.solve(m, r) for m, r in zip(matrices, rhs.T, strict=True)], 1)
    torch.testing.assert_close(found.x, exact, rtol=1e-8, atol=1e-9)
    assert int(found.iterations[2]) == 0
    assert bool(torch.isfinite(found.x).all())


def test_start_limits_and_what_tol_is_relative_to():
    a, _ = with_spectrum(torch.logspace(0, 3, 30))
    rhs = normal(30, 2)
    exact = torch.linalg.solve(a, rhs)
    near = exact + 1e-3 * normal(30, 2, seed=5)
    loose = cg(a, rhs, near, tol=1e-2)
    strict = cg(a, rhs, near, tol=1e-2, relative_to="start")
    assert bool((strict.iterations > loose.iterations).all())
    torch.testing.assert_close(strict.history[0], torch.ones(2, dtype=torch.float64))
    start = (rhs - a @ near).norm(dim=0)
    torch.testing.assert_close(strict.residuals * start, (rhs - a @ strict.x).norm(dim=0))
    cut = cg(a, rhs, tol=1e-12, max_iter=4)
    assert cut.iterations.tolist() == [4, 4]
    assert not bool(cut.converged.any())
    assert cut.history.shape == (5, 2)
    torch.testing.assert_close(cut.x[:, 0], textbook_cg(a, rhs[:, 0], 0, 4)[-1])
    assert torch.equal(cg(a, rhs, near, max_iter=0).x, near)
    assert cg(a, rhs, exact, tol=1e-6).iterations.tolist() == [0, 0]


def test_preconditioners():
    scales = torch.logspace(0, 4, 40, dtype=torch.float64)
    inner, _ = with_spectrum(torch.linspace(1, 3, 40))
    a = scales[:, None].sqrt() * inner * scales.sqrt()
    rhs = normal(40, 3)
    exact = torch.linalg.solve(a, rhs)
    plain = cg(a, rhs, tol=1e-10)
    inverse = torch.linalg.inv(a)
    for form in (jacobi(a), jacobi(torch.diagonal(a)), jacobi(a.to_sparse())):
        found = cg(a, rhs, tol=1e-10, precondition=form)
        torch.testing.assert_close(found.x, exact, rtol=1e-6, atol=1e-8)
        assert int(found.iterations.max()) * 2 < int(plain.iterations.min())
    for form in (lambda r: inverse @ r, as_operator(inverse, symmetric=True)):
        assert cg(a, rhs, tol=1e-8, precondition=form).iterations.tolist() == [1, 1, 1]
    # a preconditioner that is a multiple of I leaves the iterates as they are
    torch.testing.assert_close(
        cg(a, rhs, max_iter=7, precondition=lambda r: 3 * r).x,
        cg(a, rhs, max_iter=7).x,
        rtol=1e-9,
        atol=1e-12,
    )


def test_deflation_takes_the_small_eigenvalues_out():
    a, q = with_spectrum(torch.cat([torch.tensor([1e-5, 1e-4, 1e-3]), torch.linspace(1, 2, 57)]))
    rhs = normal(60, 2)
    exact = torch.linalg.solve(a, rhs)
    space = Deflation(a, q[:, :3] @ normal(3, 3))
    found = cg(a, rhs, tol=1e-9, deflation=space)
    # relative to b: the deflated start has already taken what is large out
    torch.testing.assert_close(found.x, exact, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(a @ found.x, rhs, rtol=1e-6, atol=1e-7)
    assert int(found.iterations.max()) <= 18
    assert int(cg(a, rhs, tol=1e-9).iterations.min()) > 24
    both = cg(a, rhs, tol=1e-9, deflation=space, precondition=jacobi(a))
    torch.testing.assert_close(a @ both.x, rhs, rtol=1e-6, atol=1e-7)
    z = space.clean(normal(60, 4, seed=3))
    assert float((q[:, :3].T @ a @ z).abs().max()) < 1e-12
    # with a start given, too
    again = cg(a, rhs, normal(60, 2, seed=9), tol=1e-9, deflation=space)
    torch.testing.assert_close(a @ again.x, rhs, rtol=1e-6, atol=1e-7)


def test_negative_curvature_is_told_by_column():
    a = torch.diag(torch.tensor([3.0, 2.0, 1.0, -1.0], dtype=torch.float64))
    rhs = torch.eye(4, dtype=torch.float64)[:, [0, 3]]
    rhs[2, 0] = 1
    found = cg(a, rhs, tol=1e-10)
    assert found.indefinite.tolist() == [False, True]
    assert found.converged.tolist() == [True, False]
    torch.testing.assert_close(found.x[:, 0], rhs[:, 0] / a.diagonal())
    assert float(found.x[:, 1].abs().max()) == 0


def test_scaling_by_a_power_of_two_is_bitwise():
    a, rhs = poisson(6), normal(36)
    one, four = cg(a, rhs, tol=1e-8), cg(a, 4 * rhs, tol=1e-8)
    assert torch.equal(4 * one.x, four.x)
    assert torch.equal(one.history, four.history)


def test_arguments_are_not_changed():
    a, rhs, start = poisson(4), normal(16, 2), normal(16, 2, seed=1)
    copies = rhs.clone(), start.clone()
    state = torch.get_rng_state()
    cg(a, rhs, start)
    cg(a, rhs, start, deflation=Deflation(a, normal(16, 2, seed=4)))
    assert torch.equal(rhs, copies[0])
    assert torch.equal(start, copies[1])
    spectral_density(a, 4, 2, generator=draw())
    assert torch.equal(state, torch.get_rng_state())


# --- Lanczos -----------------------------------------------------------------------------------------------


def test_lanczos_relation_and_orthonormal_basis():
    a, _ = with_spectrum(torch.cat([torch.tensor([100.0, 99.0]), torch.rand(48, generator=draw())]))
    starts = normal(50, 3)
    run = lanczos(a, starts, 30)
    for k in range(3):
        q, t = run.basis[k], run.tridiagonal(k)
        torch.testing.assert_close(q @ q.T, torch.eye(30, dtype=torch.float64), atol=1e-13, rtol=0)
        torch.testing.assert_close(q @ a @ q.T, t, atol=1e-11, rtol=0)
        rest = a @ q.T - q.T @ t
        assert float(rest[:, :-1].abs().max()) < 1e-11
        torch.testing.assert_close(rest[:, -1].norm(), run.off[k, -1])
        torch.testing.assert_close(q[0], starts[:, k] / starts[:, k].norm())
        alone = lanczos(a, starts[:, k], 30)
        torch.testing.assert_close(alone.diagonal[0], run.diagonal[k])
        values, vectors, residuals = run.ritz(k)
        torch.testing.assert_close(
            (a @ vectors - vectors * values).norm(dim=0), residuals, atol=1e-11, rtol=1e-8
        )


def test_no_ghost_copies_of_outliers():
    """Without reorthogonalisation these values come back as copies after a few dozen steps."""
    spectrum = torch.cat([torch.tensor([1e3, 500.0, 200.0]), torch.linspace(0, 1, 297)])
    a, _ = with_spectrum(spectrum)
    values = lanczos(a, normal(300), 150).ritz()[0]
    assert int((values > 100).sum()) == 3
    single = lanczos(a.float(), normal(300).float(), 150)
    assert int((single.ritz()[0] > 100).sum()) == 3
    q = single.basis[0]
    assert float((q @ q.T - torch.eye(150)).abs().max()) < 1e-5


def test_lanczos_ends_at_invariant_subspaces_column_by_column():
    a = torch.diag(torch.tensor([1.0, 2.0, 2.0, 3.0, 5.0], dtype=torch.float64))
    starts = torch.tensor([[0, 0, 0, 1.0, 0], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]], dtype=torch.float64).T
    run = lanczos(a, starts, 5)
    assert run.steps.tolist() == [1, 2, 4]
    assert run.ritz(0)[0].tolist() == [3.0]
    for k, expected in ((1, [1.0, 5.0]), (2, [1.0, 2.0, 3.0, 5.0])):
        torch.testing.assert_close(run.ritz(k)[0], torch.tensor(expected, dtype=torch.float64))
        assert float(run.ritz(k)[2].max()) < 1e-12
    assert lanczos(torch.zeros(3, 3), torch.ones(3), 3).ritz()[0].tolist() == [0.0]
    coordinates = lanczos(a[[0, 1, 3, 4]][:, [0, 1, 3, 4]], torch.ones(4).double(), 4).ritz()[1].abs()
    torch.testing.assert_close(coordinates, torch.eye(4, dtype=torch.float64), atol=1e-8, rtol=0)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 14), st.integers(0, 10**6))
def test_as_many_steps_as_dimensions_give_the_spectrum(p, seed):
    values = torch.linspace(-1, 2, p, dtype=torch.float64)
    a, _ = with_spectrum(values, seed)
    torch.testing.assert_close(lanczos(a, normal(p, seed=seed), p + 3).ritz()[0], values, atol=1e-9, rtol=0)


# --- extreme eigenpairs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("largest", "smallest"), [(1, 0), (0, 2), (5, 3)])
@pytest.mark.parametrize("block", [1, 4])
def test_extreme_eigenpairs(largest, smallest, block):
    spectrum = torch.cat(
        [
            torch.tensor([-3.0, -2.5, -0.7]),
            torch.rand(292, generator=draw()) * 0.1,
            torch.tensor([1.0, 2, 4, 8, 16]),
        ]
    )
    a, _ = with_spectrum(spectrum)
    exact = torch.linalg.eigvalsh(a).flip(0)
    found = eigenpairs(a, largest, smallest, generator=draw(), block=block, tol=1e-9)
    wanted = torch.cat([exact[:largest], exact[len(exact) - smallest :]])
    torch.testing.assert_close(found.values, wanted, atol=1e-8, rtol=0)
    errors = (a @ found.vectors - found.vectors * found.values).norm(dim=0)
    torch.testing.assert_close(errors, found.residuals, atol=1e-10, rtol=1e-3)
    assert float(errors.max()) < 1e-9 * 16 * 1.01
    gram = found.vectors.T @ found.vectors
    torch.testing.assert_close(gram, torch.eye(largest + smallest, dtype=torch.float64), atol=1e-10, rtol=0)
    assert found.converged
    assert found.products < 300


def test_eigenpairs_after_many_restarts_and_at_the_limit():
    spectrum = torch.cat([torch.linspace(0, 1, 398), torch.tensor([1.002, 1.004])])
    a, _ = with_spectrum(spectrum)
    found = eigenpairs(a, 2, 0, generator=draw(), tol=1e-8)
    torch.testing.assert_close(found.values, torch.linalg.eigvalsh(a)[[-1, -2]], atol=1e-8, rtol=0)
    assert found.converged
    assert found.products > 100  # more than the room of the basis
    cut = eigenpairs(a, 2, 0, generator=draw(), tol=1e-8, max_products=20)
    assert not cut.converged
    assert cut.products <= 22


def test_eigenpairs_of_repeated_and_of_all_values():
    repeated = torch.tensor([7.0, 7.0, 7.0, 2.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    a, _ = with_spectrum(repeated)
    for block in (1, 2, 3):
        found = eigenpairs(a, 7, 0, generator=draw(), block=block)
        torch.testing.assert_close(found.values, repeated, atol=1e-9, rtol=0)
        torch.testing.assert_close((found.vectors * found.values) @ found.vectors.T, a, atol=1e-9, rtol=0)
    assert eigenpairs(torch.eye(5), 2, generator=draw()).values.tolist() == pytest.approx([1, 1], abs=1e-6)
    assert eigenpairs(torch.zeros(5, 5), 2, generator=draw()).values.tolist() == [0, 0]
    big, _ = with_spectrum(torch.cat([torch.full((3,), 9.0), torch.rand(197, generator=draw())]))
    found = eigenpairs(big, 3, 0, generator=draw(), block=3)
    assert found.values.tolist() == pytest.approx([9, 9, 9], abs=1e-6)


# --- estimators --------------------------------------------------------------------------------------------


def test_probes_have_unit_second_moments():
    op = as_operator(torch.eye(3, dtype=torch.float64))
    for kind, scale in (("rademacher", 1.0), ("gaussian", 1.0), ("sphere", 1 / 3)):
        z = probe_vectors(op, 40000, draw(), kind)
        torch.testing.assert_close(
            z @ z.T / 40000, scale * torch.eye(3, dtype=torch.float64), atol=0.02, rtol=0
        )
    assert set(probe_vectors(op, 50, draw()).unique().tolist()) == {-1.0, 1.0}
    same = as_operator(torch.eye(3))
    assert torch.equal(probe_vectors(op, 4, draw()).float(), probe_vectors(same, 4, draw()))


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "sphere"])
def test_hutchinson_lies_within_its_error(kind):
    a, _ = with_spectrum(torch.linspace(-1, 4, 30))
    estimates = [hutchinson(a, 40, generator=draw(s), kind=kind, chunk=7) for s in range(60)]
    gaps = torch.tensor([(e.value - float(a.trace())) / e.error for e in estimates])
    assert 0.75 < float(gaps.std()) < 1.35  # the error is the right size
    assert abs(float(gaps.mean())) < 3.5 / math.sqrt(60)
    assert estimates[0].samples.shape == (40,)


def test_hutchinson_variance_and_exact_cases():
    a = normal(12, 12)
    a = a + a.T
    many = hutchinson(a, 20000, generator=draw(), chunk=5000)
    off = a - torch.diag(a.diagonal())
    expected = 2 * float(off.square().sum())
    assert float(many.samples.var()) == pytest.approx(expected, rel=0.05)
    diagonal = torch.diag(torch.arange(5.0))
    one = hutchinson(diagonal, 1, generator=draw())
    assert (one.value, one.error) == (10.0, math.inf)
    b = normal(9, 9)  # not symmetric
    est = hutchinson(b, 3000, generator=draw())
    assert abs(est.value - float(b.trace())) < 4 * est.error


def test_chunks_do_not_matter():
    a, _ = with_spectrum(torch.linspace(-1, 4, 30))
    # chunks draw in turn, so equal chunks of one size are compared with the sum of their parts
    whole = hutchinson(a, 12, generator=draw(), chunk=4)
    g = draw()
    parts = torch.cat([hutchinson(a, 4, generator=g).samples for _ in range(3)])
    torch.testing.assert_close(whole.samples, parts)


def test_float32_operators_are_summed_in_float64():
    """2^24 + 1 is no float32: the trace of ones with one large entry loses all the ones otherwise."""
    d = torch.ones(3000)
    d[0] = 2.0**25
    op = FunctionOperator(lambda v: d[:, None] * v, (3000, 3000), torch.float32, torch.device("cpu"))
    assert hutchinson(op, 2, generator=draw()).value == 2.0**25 + 2999


def test_hutchinson_diagonal():
    a = normal(15, 15)
    mean, error = hutchinson_diagonal(a, 4000, generator=draw(), chunk=64)
    gaps = (mean - a.diagonal()) / error
    assert float(gaps.abs().max()) < 4.5
    assert 0.5 < float(gaps.std()) < 1.6
    z = torch.cat([probe_vectors(as_operator(a), w, g) for g in [draw(3)] for w in (4, 4, 2)], 1)
    samples = z * (a @ z)
    mean, error = hutchinson_diagonal(a, 10, generator=draw(3), chunk=4)
    torch.testing.assert_close(mean, samples.mean(1))
    torch.testing.assert_close(error, samples.std(1) / math.sqrt(10))
    assert bool(hutchinson_diagonal(a, 1, generator=draw())[1].isinf().all())


def test_hutchpp_beats_hutchinson_on_falling_spectra_and_is_unbiased():
    a, _ = with_spectrum(1.0 / torch.arange(1, 101) ** 2)
    truth = float(a.trace())
    plus = torch.tensor([hutchpp(a, 30, generator=draw(s)).value for s in range(40)]) - truth
    plain = torch.tensor([hutchinson(a, 30, generator=draw(s)).value for s in range(40)]) - truth
    assert float(plus.square().mean().sqrt()) < 0.2 * float(plain.square().mean().sqrt())
    assert abs(float(plus.mean())) < 3.5 * float(plus.std()) / math.sqrt(40)
    flat, _ = with_spectrum(torch.linspace(-1, 4, 30))
    gaps = torch.tensor(
        [
            (e.value - float(flat.trace())) / e.error
            for e in (hutchpp(flat, 45, generator=draw(s)) for s in range(60))
        ]
    )
    assert 0.7 < float(gaps.std()) < 1.5


def test_hutchpp_exact_cases():
    low = normal(40, 3)
    a = low @ low.T
    est = hutchpp(a, 15, generator=draw(), chunk=2)
    assert est.value == pytest.approx(float(a.trace()), rel=1e-10)
    assert est.error < 1e-8
    b = normal(5, 5)
    est = hutchpp(b, 15, generator=draw())
    assert est.value == pytest.approx(float(b.trace()), rel=1e-10)
    assert est.error == 0


# --- spectral density --------------------------------------------------------------------------------------


def test_density_weights_nodes_and_traces():
    values = torch.linspace(-1, 2, 25, dtype=torch.float64)
    a, _ = with_spectrum(values)
    found = spectral_density(a, 25, 3, generator=draw())
    torch.testing.assert_close(found.weights.sum(1), torch.ones(3, dtype=torch.float64))
    for row in found.nodes:
        torch.testing.assert_close(row, values, atol=1e-9, rtol=0)
    short = spectral_density(a, 8, 600, generator=draw(), chunk=100)
    # m steps are exact for polynomials up to degree 2 m - 1, so these means carry sampling noise only
    for function, truth in (
        (None, values.sum()),
        (torch.square, values.square().sum()),
        (lambda x: x**7, (values**7).sum()),
    ):
        est = short.trace(function)
        assert abs(est.value - float(truth)) < 3 * est.error
        assert est.error < 0.1 * float(truth)
    definite, _ = with_spectrum(values + 1.5)
    est = spectral_density(definite, 20, 50, generator=draw()).trace(torch.log)
    assert abs(est.value - float((values + 1.5).log().sum())) < 3 * est.error


def test_density_of_rademacher_probes_and_of_a_diagonal():
    d = torch.arange(6.0, dtype=torch.float64)
    found = spectral_density(torch.diag(d), 6, 2, generator=draw(), kind="rademacher")
    torch.testing.assert_close(found.weights, torch.full((2, 6), 1 / 6, dtype=torch.float64))
    assert found.trace().value == pytest.approx(15)
    assert found.trace(torch.exp).value == pytest.approx(float(d.exp().sum()))


def test_density_that_ends_early_keeps_its_mass():
    found = spectral_density(torch.diag(torch.tensor([2.0, 2.0, 4.0])), 3, 2, generator=draw())
    torch.testing.assert_close(found.weights.sum(1), torch.ones(2, dtype=torch.float64))
    assert found.range() == pytest.approx((2.0, 4.0))
    assert found.trace(torch.reciprocal).value < 3 / 2 + 1e-6  # the filling at 0 is no pole
    assert not math.isnan(found.trace(torch.log).value)


def test_smoothed_density_against_the_exact_spectrum():
    values = torch.cat(
        [torch.randn(300, generator=draw(), dtype=torch.float64) * 0.1, torch.tensor([3.0, 4.0])]
    )
    a, _ = with_spectrum(values)
    found = spectral_density(a, 60, 10, generator=draw())
    width = found.width()
    grid = found.grid(4000)
    density, error = found.evaluate(grid)
    truth = smoothed(grid, values, width=width)
    step = float(grid[1] - grid[0])
    assert float(density.sum() * step) == pytest.approx(1, abs=1e-3)
    assert float(truth.sum() * step) == pytest.approx(1, abs=1e-3)
    assert float((density - truth).abs().sum() * step) < 0.05
    assert bool((error >= 0).all())
    # the rule: kappa-fold fall half-way between 60 evenly spread nodes of the padded range
    low, high = found.range()
    assert width == pytest.approx((high - low) / 2 * 1.1 * 2 / (59 * math.sqrt(8 * math.log(3))))
    direct = sum(
        torch.exp(-0.5 * ((grid - x) / width) ** 2) / (width * math.sqrt(2 * math.pi)) for x in values
    ) / len(values)
    torch.testing.assert_close(truth, direct)


def test_progress_counts_products():
    seen = []
    spectral_density(
        torch.eye(4) * torch.arange(4.0), 3, 2, generator=draw(), progress=lambda *a: seen.append(a)
    )
    assert seen[-1][1] == 6
    assert [s[0] for s in seen] == sorted(s[0] for s in seen)
    blocks = []
    eigenpairs(torch.diag(torch.arange(9.0)), 2, generator=draw(), progress=lambda k, r: blocks.append(k))
    assert blocks == sorted(blocks)
    assert blocks[0] == 2


def test_estimate():
    est = Estimate.of(torch.tensor([1.0, 2.0, 3.0]), 10.0)
    assert est.value == 12
    assert est.error == pytest.approx(1 / math.sqrt(3))
    assert str(est) == "12 +- 0.58"
