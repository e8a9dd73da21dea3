"""The experiment on a few images, its parts, and the arithmetic of its rule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gradmatch.core.distance import linear_cka
from gradmatch.evidence._common import Settings
from gradmatch.evidence.adapt import _copy_task as copying
from gradmatch.evidence.adapt import _untrainable as images
from gradmatch.evidence.adapt import guidance as experiment

LEVEL = {
    "no guide": 0.3, "logit distillation": 0.35, "trained guide": 0.5, "untrained guide": 0.6,
    "trained guide, 50 steps": 0.4, "trained guide, shuffled": 0.45, "no guide, spread out": 0.45,
    "trained guide, debiased": 0.5, "untrained guide, debiased": 0.5, "trained guide, shuffled, debiased": 0.4,
    "16 blocks, no guide": 0.3, "16 blocks, untrained guide": 0.4, "16 blocks, trained guide": 0.5,
    "48 blocks, no guide": 0.1, "48 blocks, untrained guide": 0.2, "48 blocks, trained guide": 0.3,
    "wide, no guide": 0.7, "wide, untrained guide": 0.75,
    "copying, no guide": 0.3, "copying, untrained guide": 0.4, "copying, untrained guide, shuffled": 0.35,
    "copying, untrained guide, debiased": 0.4,
}  # fmt: skip


def found(**changed: float) -> dict[str, list[dict[str, float]]]:
    level = LEVEL | changed
    return {n: [{"test": v + 0.01 * s, "train": 0.9 + 0.01 * s} for s in range(3)] for n, v in level.items()}


def test_every_arm_has_a_level() -> None:
    assert set(LEVEL) == set(experiment.ARMS)


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
        "10": {"48 blocks, trained guide": 0.1},
        "11": {"16 blocks, untrained guide": 0.3},
        "12, 13": {"copying, untrained guide": 0.3},
        "13": {"copying, untrained guide, shuffled": 0.4},
    }
    for number, changed in broken.items():
        result = experiment.judged(found(**changed), rates)
        assert result.verdict == "holds in part"
        assert f"(all but {number})" in result.reason


def test_the_picture_is_drawn() -> None:
    assert experiment.picture(found())[:4] == b"\x89PNG"


def test_a_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(6100, 1, 14, 14, generator=g), torch.arange(6100) % 10
    monkeypatch.setattr(images, "data", lambda: (x, y, x[:100], y[:100]))
    monkeypatch.setitem(experiment.ARMS, "no guide, spread out", {"guide": "identity", "depth": 8})
    settings = Settings(seeds=1, out=tmp_path, runs=tmp_path, workers=1, quiet=True)
    images.guide.cache_clear()
    for name in (
        "no guide",
        "logit distillation",
        "trained guide, shuffled, debiased",
        "no guide, spread out",
        "copying, untrained guide, shuffled",
    ):
        scores = experiment._one(settings, name, 0, 1e-3, True)
        assert 0 <= scores["test"] <= 1
    assert experiment._rate(settings, "wide, untrained guide", True)["lr"] in experiment.RATES
    images.guide.cache_clear()


def test_copying_asks_for_every_symbol_in_its_order() -> None:
    x, y = copying.sequences()["held"]
    for row, answer in zip(x[:50], y[:50], strict=True):
        length = int((row == copying.AGAIN).nonzero())
        assert copying.SHORTEST <= length <= copying.LONGEST
        assert torch.equal(answer[answer >= 0], row[:length])
        assert torch.equal((answer >= 0).nonzero().flatten(), torch.arange(length, 2 * length))


def test_the_identity_guide_spreads_examples_out() -> None:
    rows = images.Identity()(torch.zeros(20, 3))
    assert torch.equal(rows, torch.eye(20))
    apart = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(0)))[0]
    alike = torch.ones(20, 20) + 0.1 * torch.randn(
        20, 20, generator=torch.Generator().manual_seed(1)
    ) * torch.arange(20)
    assert float(linear_cka(apart, rows)) > 0.999
    assert float(linear_cka(alike, rows)) < 0.9
