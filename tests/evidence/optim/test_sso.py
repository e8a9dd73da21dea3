"""The experiment's expert and optimum, the arithmetic of its rule, and a run of the smallest size."""

from __future__ import annotations

import pytest
import torch

from gradmatch.evidence._common import Row, Settings
from gradmatch.evidence.optim import _sso_problems as problems
from gradmatch.evidence.optim import sso

TINY = sso.Budget(2, 40, (1, 2, 3), (1, 2), 2)


def rows(**changed: float) -> list[Row]:
    names = [
        sso.loss_name(("logistic", "", None, m), k) for m in sso.LOGISTIC for k in sso.SMALL.logistic_calls
    ]
    names += [
        sso.loss_name(("digits", *cell, m), k)
        for cell in sso.CELLS
        for m in sso.RATES
        for k in sso.SMALL.calls
    ]
    names += [
        f"{sso.cell_name(*c)}, time of 20 Adam calls at {f}: {sso.OURS}"
        for c in sso.CELLS
        for f in sso.FACTORS
    ]
    names += [f"imitation: {m}" for m in sso.IMITATION]
    names.append("logistic: share of runs that fall at every call")
    found = []
    for name in names:
        at = changed.get(name, 0.5 if "SSO" in name else 1.0)
        found.append(Row(name, (at, at)))
    return found


def test_the_rule_counts_every_condition():
    verdict, reason = sso.judge(rows(), sso.SMALL)
    assert verdict == "holds"
    assert "24 of 24" in reason
    worse = {
        "logistic, 50 calls: SSO m 10": (2.0, 1),
        "logistic, 10 calls: Adam": (0.1, 1),
        "logistic: share of runs that fall at every call": (0.9, 1),
        "softmax, batch 64, 100 calls: Armijo": (0.1, 1),
        "squared, full batch, 20 calls: SSO m 20": (2.0, 2),
        "squared, full batch, time of 20 Adam calls at 100: SSO m 20": (2.0, 1),
        "softmax, full batch, 20 calls: momentum": (0.1, 0),
        "imitation: Adagrad": (0.1, 1),
    }
    for name, (value, lost) in worse.items():
        verdict, reason = sso.judge(rows(**{name: value}), sso.SMALL)
        assert f"{24 - lost} of 24" in reason, name


def test_the_optimum_of_the_logistic_problem_is_one():
    task = problems.logistic_task(0)
    assert task.value() > 0.1
    condition = torch.linalg.cond(task.x.T @ task.x)
    assert 1e3 < float(condition) < 1e5
    with torch.no_grad():
        task.model.weight.add_(0.5)
    assert task.value() > 0


def test_the_expert_balances_and_a_still_hand_does_not():
    expert = problems.Expert.cart_pole()
    start = torch.full((3, 4), 0.1)
    best = expert.roll(expert.act, start, 150)[1]
    still = expert.roll(lambda x: torch.zeros(len(x), 1), start, 150)[1]
    assert best < 0.05 * still
    assert expert.roll(lambda x: 1.2 * expert.act(x), start, 150)[1] > best


@pytest.mark.parametrize("method", [*problems.BASELINES, "SSO m 2"])
def test_every_method_lowers_the_loss(method):
    losses, passes = problems.losses_by_call(problems.digits_task("squared", None, 0, 50), method, 0.01, 5)
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert passes >= 3


def test_a_run_that_diverges_has_a_large_loss_and_no_nan():
    losses, _ = problems.losses_by_call(problems.digits_task("squared", 8, 0, 50), "SGD", 1e6, 8)
    assert max(losses) == 1e6
    assert all(v == v for v in losses)


def test_it_runs_from_end_to_end(monkeypatch, tmp_path):
    monkeypatch.setattr(sso, "ETAS", (1.0,))
    monkeypatch.setattr(sso, "LOGISTIC", {m: r[:2] for m, r in sso.LOGISTIC.items()})
    monkeypatch.setattr(sso, "RATES", {m: r[:2] for m, r in sso.RATES.items()})
    result = sso.experiment(Settings(seeds=2, out=tmp_path, workers=1, quiet=True), TINY)
    assert result.verdict in ("holds", "holds in part", "does not hold")
    assert result.row("logistic: share of runs that fall at every call").values == (1.0, 1.0)
    assert result.pictures[0][1].startswith(b"\x89PNG")
