"""The experiment's parts at a tiny size and the arithmetic of its rule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gradmatch.core.path import LinearPath
from gradmatch.core.sampler import Network
from gradmatch.evidence._common import Row, Settings
from gradmatch.evidence.generate import _boss_arms as arms
from gradmatch.evidence.generate import boss


def rows(**changed: float) -> list[Row]:
    level: dict[str, float] = {}

    def put(part: str, metric: str, method: str, calls: tuple[int, ...], value: float) -> None:
        level.update({f"{part}: {boss.NAMES[metric]}, {method}, {k} calls": value for k in calls})

    for metric in ("rmse", "frechet"):
        put(boss.EXACT, metric, "Bellman", boss.CALLS, 0.7)
        put(boss.EXACT, metric, "uniform", boss.CALLS, 1.0)
    put(boss.RING, "rmse", "Bellman", boss.RING_CALLS, 0.8)
    put(boss.RING, "rmse", "uniform", boss.RING_CALLS, 1.0)
    order = (
        "BOSS",
        "straightened at uniform times",
        "reflow, t in {k/K}",
        "reflow, t uniform",
        "Bellman",
        "uniform",
    )
    for value, method in enumerate(order):
        put(boss.NETWORK, "frechet", method, boss.TUNED_CALLS, 1.0 + value)
    level |= changed
    return [Row(name, (v, v, v)) for name, v in level.items()]


def test_the_rule_reads_every_condition() -> None:
    assert boss.judged(rows()).verdict == "holds"
    exact, net = "images, exact field: Frechet distance", "trained network: Frechet distance"
    broken = {
        "1": {"images, exact field: end-point error, Bellman, 8 calls": 1.0},
        "2": {f"{exact}, Bellman, 2 calls": 0.95},
        "3": {f"{exact}, Bellman, 6 calls": 1.0},
        "4": {f"{net}, uniform, 4 calls": 5.0},
        "5": {f"{net}, reflow, t uniform, 1 calls": 1.0},
        "6": {f"{net}, reflow, t in {{k/K}}, 2 calls": 1.0},
        "7": {f"{net}, straightened at uniform times, 6 calls": 1.0},
        "9": {"ring: end-point error, Bellman, 3 calls": 1.1},
    }
    for number, changed in broken.items():
        result = boss.judged(rows(**changed))
        assert result.verdict == "holds in part"
        assert f"Conditions met: 8 of 9 (not {number})." in result.reason, changed


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Settings:
    class Space:
        def __init__(self) -> None:
            self.train = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
            self.goals = {"test": self.train, "held out": self.train}

        def figures(self, z: torch.Tensor, fine: torch.Tensor) -> dict[str, float]:
            return {"frechet": 1.0, "judge": 1.0, "rmse": arms.rmse(z, fine)}

    points = torch.rand(60, 196, generator=torch.Generator().manual_seed(0)) * 2 - 1
    monkeypatch.setattr(arms, "latents", Space)
    monkeypatch.setattr(arms, "images14", lambda: (points, points))
    monkeypatch.setattr(arms, "FINE", 20)
    monkeypatch.setattr(arms, "COST_SAMPLES", 8)
    return Settings(runs=tmp_path, quiet=True, workers=1)


SIZES = {"tests": 40, "pairs": 60, "pretrain": 3, "tune": 2}


def test_every_part_runs_and_is_kept(tiny: Settings) -> None:
    rates = dict.fromkeys(arms.TUNED, 1e-3)
    done = {(p, 0): boss._one(tiny, p, 0, SIZES, rates) for p in (boss.EXACT, boss.RING, boss.NETWORK)}
    assert boss._one(tiny, boss.RING, 0, SIZES, rates) == done[boss.RING, 0]
    found = boss._rows(done, [0], rates)
    names = {r.method for r in found}
    assert "trained network: Frechet distance, BOSS, 6 calls" in names
    assert "ring: MMD, Bellman, 8 calls" in names
    times = done[boss.EXACT, 0]["Bellman 4"]["times"]
    assert (times[0], times[-1], len(times)) == (1.0, 0.0, 5)
    assert len(boss._tuned(tiny, "BOSS", SIZES)) == len(boss.RATES)


def test_reflow_at_one_call_is_straightening_over_the_whole_way(tiny: Settings) -> None:
    parts = arms.Tuning(tiny.runs, 0, SIZES | {"tune": 30, "pairs": 200}, (1,))
    x = arms.noise((16,), 50, 3)
    one, two = (parts.tuned(m, 1, 1e-3)[0] for m in ("reflow, t in {k/K}", "BOSS"))
    ends = [arms.ends(Network(s, "velocity"), x, arms.uniform(1)) for s in (one, two)]
    moved = arms.rmse(ends[0], arms.ends(parts.model, x, arms.uniform(1)))
    assert arms.rmse(*ends) < 0.5 * moved  # other draws of the same pairs, the same targets


def test_figures() -> None:
    a = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    assert arms.mmd(a, a) == 0
    assert arms.mmd(a, a + 5) > 0.5
    assert arms.rmse(a, a + 3) == pytest.approx(18**0.5, rel=1e-5)
    assert arms.path_loss(
        lambda x, t: x * 0 + 1, LinearPath(), a, a + 1, torch.rand(300)
    ).item() == pytest.approx(0)
