"""Shifted systems against dense solves, metrics against their definitions."""

from __future__ import annotations

import pytest
import torch

from gradmatch.core.checks import InputError
from gradmatch.core.krylov import as_operator
from gradmatch.core.shifted import LowRank, Metric, shifted

P = 12
SHIFTS = torch.logspace(-4, 4, 10).tolist()


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spd(seed: int) -> torch.Tensor:
    a = draw(P, P, seed=seed)
    return a @ a.T + 0.1 * torch.eye(P, dtype=torch.float64)


METRICS = {"identity": None, "diagonal": draw(P, seed=1).abs() + 0.1, "dense": spd(2)}
MATRICES = {
    "none": (None, torch.zeros(P, P, dtype=torch.float64)),
    "diagonal": (draw(P, seed=3).abs(), draw(P, seed=3).abs().diag()),
    "dense": (spd(4), spd(4)),
    "few rows": (LowRank(draw(2, P, seed=5)), draw(2, P, seed=5).T @ draw(2, P, seed=5)),
    "many rows": (LowRank(draw(9, P, seed=5)), draw(9, P, seed=5).T @ draw(9, P, seed=5)),
    "products": (as_operator(lambda v: spd(4) @ v, P), spd(4)),
}
SOLVERS = {
    "dense": ("auto", "cholesky", "eigen", "cg"),
    "few rows": ("auto", "woodbury", "cholesky", "eigen", "cg"),
}


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("b", METRICS)
@pytest.mark.parametrize("kind", MATRICES)
def test_every_solver_equals_a_dense_solve(kind, b, ridge):
    h, matrix = MATRICES[kind]
    metric, g = Metric(METRICS[b]), draw(P, seed=6)
    for solver in SOLVERS.get(kind, ("auto",)):
        if solver == "woodbury" and ridge and METRICS[b] is not None:
            continue
        system = shifted(h, metric, P, ridge=ridge, solver=solver)
        for shift in SHIFTS:
            whole = matrix + ridge * torch.eye(P, dtype=g.dtype) + shift * metric.dense(P, g)
            expected = torch.linalg.solve(whole, g)
            loose = 1e-6 if solver == "cg" or kind == "products" else 1e-10
            found = system.solve(shift, g)
            assert found is not None
            error = float((found - expected).norm() / expected.norm())
            # Woodbury subtracts: what it can keep is relative to the condition of the system
            slack = float(torch.linalg.cond(whole)) * 1e-15
            assert error < max(loose, slack), (solver, shift)


@pytest.mark.parametrize("solver", ["cholesky", "eigen", "cg"])
@pytest.mark.parametrize("b", METRICS)
def test_an_indefinite_system_has_no_solution(solver, b):
    h = spd(4) - 50 * torch.eye(P, dtype=torch.float64)
    metric, g = Metric(METRICS[b]), draw(P, seed=6)
    system = shifted(h, metric, P, solver=solver)
    assert system.solve(1e-3, g) is None
    assert system.solve(1e6, g) is not None


def test_a_metric_measures_as_defined():
    g = draw(P)
    for b in METRICS.values():
        metric = Metric(b)
        dense = metric.dense(P, g)
        assert metric.norm2(g) == pytest.approx(float(g @ dense @ g))
        assert metric.dual2(g) == pytest.approx(float(g @ torch.linalg.solve(dense, g)))


def test_bad_matrices_are_refused():
    plain, tilted = Metric(), spd(1).tril()
    with pytest.raises(InputError, match="the Hessian differs from its transpose"):
        shifted(tilted, plain, P)
    with pytest.raises(InputError, match="metric differs from its transpose"):
        Metric(tilted)
    with pytest.raises(InputError, match="metric is not positive definite"):
        Metric(-spd(1))
    with pytest.raises(InputError, match="metric has entries that are not above 0"):
        Metric(torch.zeros(P))
    with pytest.raises(InputError, match="metric is of size 12; there are 3"):
        shifted(None, Metric(spd(1)), 3)
    with pytest.raises(InputError, match=r"the Hessian has shape \(12, 12\); it must be \(3,\)"):
        shifted(spd(1), plain, 3)
    with pytest.raises(InputError, match=r"rows of the Hessian have shape \(2, 12\)"):
        shifted(LowRank(draw(2, P)), plain, 3)
    with pytest.raises(InputError, match="needs a Hessian given by its rows"):
        shifted(spd(1), plain, P, solver="woodbury")
    with pytest.raises(InputError, match="a Hessian known by products alone is solved by cg"):
        shifted(as_operator(lambda v: v, P), plain, P, solver="eigen")
    with pytest.raises(InputError, match="NaN"):
        shifted(torch.full((P,), float("nan")), plain, P)
    with pytest.raises(InputError, match="with weight decay and a metric"):
        shifted(LowRank(draw(2, P)), Metric(spd(1)), P, ridge=0.1, solver="woodbury")
