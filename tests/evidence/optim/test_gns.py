"""Derivatives of the experiment's problems against autograd, the arithmetic of its rule, and a small run."""

from __future__ import annotations

import pytest
import torch

from gradmatch.core.shifted import LowRank
from gradmatch.evidence._common import Row, Settings
from gradmatch.evidence.optim import _gns_problems as problems
from gradmatch.evidence.optim import gns

TINY = gns.Budget(2, 12, 6, 5, 4, 2, 10, 2)


def dense(h):
    if isinstance(h, LowRank):
        return h.rows.T @ h.rows
    return torch.diag(h) if h.ndim == 1 else h


@pytest.mark.parametrize("name", [*gns.LSE, *gns.CANCER, gns.DIGITS, *gns.NORMS])
def test_gradients_and_hessians_equal_autograd(name, monkeypatch):
    few = lambda name, seed: (torch.rand(9, 3, generator=torch.Generator().manual_seed(1)).double(), torch.arange(9) % (2 if "cancer" in name else 10))  # noqa: E731, E501  # fmt: skip
    monkeypatch.setattr(gns, "real", few)
    own = gns.problem(name, 0, TINY)
    g = torch.Generator().manual_seed(2)
    x = 0.5 * torch.randn(len(own.start), generator=g, dtype=torch.float64)
    value = lambda t: own.value(t)[0]  # noqa: E731
    torch.testing.assert_close(own.value(x)[1], torch.func.grad(value)(x), rtol=1e-8, atol=1e-8)
    exact = torch.func.hessian(value)(x)
    torch.testing.assert_close(dense(own.matrices["exact"](x)), exact, rtol=1e-8, atol=1e-8)
    if name in gns.LSE:
        rest = dense(own.matrices[gns.WEIGHTED](x)) - exact
        spectrum = torch.linalg.eigvalsh(rest)
        assert float(spectrum[-2].abs()) < 1e-9 * float(spectrum[-1])  # q q^T / mu: rank one
        assert float(spectrum[0]) > -1e-9
        assert float(own.value(torch.zeros_like(x))[1].norm()) < 1e-12  # the minimum is at 0
    if "diagonal" in own.matrices:
        torch.testing.assert_close(own.matrices["diagonal"](x), exact.diagonal(), rtol=1e-8, atol=1e-8)
    if gns.FISHER in own.matrices:
        parts = dense(own.matrices[gns.GN](x)) + dense(own.matrices[gns.FISHER](x))
        torch.testing.assert_close(parts, dense(own.matrices[gns.FULL](x)))


def test_the_fisher_term_is_finite_where_u_is_zero():
    own = problems.power_of_norm(problems.rosenbrock(), 3.0, torch.zeros(2).double())
    for x in (torch.ones(2).double(), torch.ones(2).double() * (1 + 1e-14)):
        assert torch.isfinite(own.matrices[gns.FISHER](x).rows).all()


def test_the_empirical_fisher_is_of_the_losses_gradients(monkeypatch):
    x, y = torch.rand(9, 3, generator=torch.Generator().manual_seed(1)).double(), torch.arange(9) % 3
    own = problems.softmax_regression(x, y, 3, 0.1)
    w = torch.rand(12, generator=torch.Generator().manual_seed(2)).double()
    rows = torch.stack(
        [problems.softmax_regression(x[i : i + 1], y[i : i + 1], 3, 0.0).value(w)[1] for i in range(9)]
    )
    expected = rows.T @ rows / 9 + 0.1 * torch.eye(12).double()
    torch.testing.assert_close(own.matrices["empirical Fisher"](w), expected)


def rows(**changed: float) -> list[Row]:
    level = {
        "exact": 10.0,
        gns.WEIGHTED: 20.0,
        gns.FULL: 11.0,
        "Gauss-Newton": 10.0,
        "empirical Fisher": 30.0,
    }
    level |= {"diagonal": 40.0, gns.FISHER: 40.0, "super-universal Newton": 10.0, "cubic Newton": 10.0}
    found = []
    for p, m in gns.arms():
        name = f"{p}: {m}"
        at = changed.get(name, level.get(m, 50.0))
        found.append(Row(name, (at, 1.01 * at)))
    return found


def test_the_rule_counts_every_condition():
    assert gns.judge(rows())[0] == "holds"
    assert "32 of 32" in gns.judge(rows())[1]
    worse = {
        "LogSumExp mu 1: exact": (99.0, 2),
        "digits l2 0.001: diagonal": (99.0, 1),
        "linear p 4: L-BFGS": (5.0, 1),
    }
    for name, (value, lost) in worse.items():
        verdict, reason = gns.judge(rows(**{name: value}))
        assert verdict == "holds in part"
        assert f"{32 - lost} of 32" in reason, name


def test_it_runs_from_end_to_end(monkeypatch, tmp_path):
    shown = (
        ("Rosenbrock p 2", "exact"),
        ("linear p 4", gns.LBFGS),
        ("LogSumExp mu 1", "exact"),
        (gns.MLP, "Gauss-Newton"),
    )
    monkeypatch.setattr(gns, "arms", lambda: list(shown))
    monkeypatch.setattr(gns, "judge", lambda rows: ("holds", "so far"))
    result = gns.experiment(Settings(seeds=2, out=tmp_path, workers=1, quiet=True), TINY)
    assert [r.method for r in result.rows] == [f"{p}: {m}" for p, m in shown]
    assert result.row("Rosenbrock p 2: exact").values == (4.0, 4.0)
    assert "2 of 2 not there" in result.row("Rosenbrock p 2: exact").cost
    assert result.pictures[0][1].startswith(b"\x89PNG")
