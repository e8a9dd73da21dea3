"""The evidence of FTD: its rule, and one tiny run of an arm."""

from __future__ import annotations

import pytest
import torch

from gradmatch.core.examples import Examples
from gradmatch.evidence._common import Row
from gradmatch.evidence.data import ftd
from gradmatch.evidence.data._rates import best_rate

LOWER = ("accumulated error", "loss gap")
NAMES = [
    *("top Hessian eigenvalue", "loss rise, random 5 %"),
    *(f"ipc {c}, {name}" for c in (1, 5) for name in (*LOWER, "accuracy")),
]


def _rows(better: set[tuple[str, str]]) -> list[Row]:
    rows = []
    for name in NAMES:
        sign = 1 if name.endswith("accuracy") else -1
        for arm in ftd.ARMS:
            gain = 0.1 * sign if (name, arm) in better else 0.0
            noise = (0.0, 0.0, 0.0) if arm == ftd.MTT else (0.01, -0.01, 0.0)
            values = tuple(v + gain + e for v, e in zip((0.5, 0.6, 0.7), noise, strict=True))
            rows.append(Row(f"{name}: {arm}", values))
    return rows


def test_the_rule_counts_every_arm_and_size() -> None:
    every = {(name, arm) for name in NAMES for arm in ftd.FLAT}
    assert len(every) == 24
    assert ftd.judge(_rows(every), ftd.SMALL, [])[0] == "holds"
    for missing in every:
        assert ftd.judge(_rows(every - {missing}), ftd.SMALL, [])[0] == "holds in part"
    assert ftd.judge(_rows(set()), ftd.SMALL, [])[0] == "does not hold"
    reason = ftd.judge(_rows(every), ftd.SMALL, ["MTT ipc 1"])[1]
    assert "24 of 24" in reason
    assert "edge of its widened grid: MTT ipc 1" in reason


def test_arms_differ_in_nothing_but_the_optimiser_of_the_experts() -> None:
    assert {k for arm in ftd.ARMS.values() for k in arm} == {"optimizer", "rho", "alpha", "adaptive"}
    assert ftd.ARMS["FTD adaptive rho 0.01"]["adaptive"] is True


def test_the_best_rate_and_a_grid_that_grows() -> None:
    tried = []

    def score(rate: float) -> float:
        tried.append(rate)
        return -abs(rate - best)

    best = 10.0
    assert best_rate(score, (3.0, 10.0, 30.0)) == (10.0, False)
    best = 90.0
    rate, edge = best_rate(score, (3.0, 10.0, 30.0))
    assert (rate, edge) == (pytest.approx(100.0), False)
    best = 0.01
    rate, edge = best_rate(score, (3.0, 10.0, 30.0))
    assert (rate, edge) == (pytest.approx(0.27), True)
    assert len(tried) == 3 + 5 + 5


@pytest.fixture
def tiny(monkeypatch):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 10
    x = torch.rand(10, 1, 14, 14, generator=g)[y] + 0.1 * torch.rand(120, 1, 14, 14, generator=g)
    monkeypatch.setattr(ftd, "_clothes", lambda: (Examples(x, y, 10), Examples(x[:40], y[:40], 10)))
    return ftd.Budget(2, (1,), 8, 2, 1, 10, 8, 2, 0.5, "mlp", 3)


def test_one_arm_measures_every_figure(tiny) -> None:
    found = ftd.measure("FTD plain rho 0.2", {1: 3.0}, 0, tiny)
    named = {name for name in NAMES if not name.startswith("ipc 5")}
    assert named <= set(found)
    assert all(v == v for v in found.values())
    assert found == ftd.measure("FTD plain rho 0.2", {1: 3.0}, 0, tiny)
    assert all(0 <= v <= 1 for v in ftd.real(1, [0, 1], tiny))


def test_the_rate_is_the_best_mean_over_the_tuning_seeds(tiny, monkeypatch) -> None:
    trained, tried = [], []
    monkeypatch.setattr(ftd, "experts", lambda train, arm, seed, budget: trained.append(seed) or seed)

    class Found:
        def __init__(self, lr, seed):
            self.lr, self.seed = lr, seed
            tried.append((lr, seed))

        def distill(self, train, net, buffer):
            assert buffer == self.seed
            return self

    class Score:
        def __init__(self, mean):
            self.mean = mean

    # three seeds agree on 30; the fourth prefers 300 by less than they lose there
    def accuracy(found, net, held, epochs):
        liked = 300.0 if found.seed == ftd.TUNING_SEEDS[-1] else 30.0
        return Score(float(found.lr == liked))

    monkeypatch.setattr(ftd, "matcher", lambda count, lr, seed, budget: Found(lr, seed))
    monkeypatch.setattr(ftd, "evaluate", accuracy)
    assert ftd.tune(ftd.MTT, tiny) == {1: (30.0, False)}
    assert trained == list(ftd.TUNING_SEEDS)
    assert len(tried) == len(ftd.GRID) * len(ftd.TUNING_SEEDS)
