"""The experiment on a few images, its parts, and the arithmetic of its rule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gradmatch.core.distance import linear_cka
from gradmatch.evidence._common import Settings
from gradmatch.evidence.adapt import guidance as experiment

LEVEL = {
    "no guide": 0.3, "logit distillation": 0.35, "trained guide": 0.5, "untrained guide": 0.6,
    "trained guide, 50 steps": 0.4, "trained guide, shuffled": 0.45, "no guide, spread out": 0.45,
    "trained guide, debiased": 0.5, "untrained guide, debiased": 0.5, "trained guide, shuffled, debiased": 0.4,
    "wide, no guide": 0.7, "wide, untrained guide": 0.75,
}  # fmt: skip


def found(**changed: float) -> dict[str, list[dict[str, float]]]:
    level = LEVEL | changed
    return {n: [{"test": v + 0.01 * s, "train": 0.9 + 0.01 * s} for s in range(3)] for n, v in level.items()}


def test_the_rule_reads_every_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "picture", lambda found: b"")
    rates = dict.fromkeys(LEVEL, 1e-3)
    assert experiment.judged(found(), rates).verdict == "holds"
    broken = {
        "3": {"logit distillation": 0.5},
        "4": {"untrained guide": 0.5},
        "5": {"trained guide, 50 steps": 0.3},
        "6": {"trained guide, shuffled": 0.5},
        "7": {"trained guide, shuffled, debiased": 0.5},
        "8, 9": {"wide, untrained guide": 0.7},
    }
    for number, changed in broken.items():
        result = experiment.judged(found(**changed), rates)
        assert result.verdict == "holds in part"
        assert f"(all but {number})" in result.reason


def test_a_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2500, 1, 14, 14, generator=g), torch.arange(2500) % 10
    monkeypatch.setattr(experiment, "data", lambda: (x, y, x[:100], y[:100]))
    monkeypatch.setattr(experiment, "DEPTH", 4)
    settings = Settings(seeds=1, out=tmp_path, runs=tmp_path, workers=1, quiet=True)
    experiment._guide.cache_clear()
    for name in (
        "no guide",
        "logit distillation",
        "trained guide, shuffled, debiased",
        "no guide, spread out",
    ):
        scores = experiment._one(settings, name, 0, 1e-3, True)
        assert 0 <= scores["test"] <= 1
    assert experiment._rates(settings, "wide, untrained guide", True)["lr"] in experiment.RATES
    experiment._guide.cache_clear()


def test_the_identity_guide_spreads_examples_out() -> None:
    rows = experiment.Identity()(torch.zeros(20, 3))
    assert torch.equal(rows, torch.eye(20))
    apart = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(0)))[0]
    alike = torch.ones(20, 20) + 0.1 * torch.randn(
        20, 20, generator=torch.Generator().manual_seed(1)
    ) * torch.arange(20)
    assert float(linear_cka(apart, rows)) > 0.999
    assert float(linear_cka(alike, rows)) < 0.9
