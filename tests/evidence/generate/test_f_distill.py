"""The experiment's arms at a tiny size and the arithmetic of its rule."""

from __future__ import annotations

import pytest
import torch

from gradmatch.core.divergence import DIVERGENCES
from gradmatch.evidence._common import Row, Settings
from gradmatch.evidence.generate import _f_arms as arms
from gradmatch.evidence.generate import f_distill


def rows(**changed: float) -> list[Row]:
    level: dict[str, float] = {}
    for name in DIVERGENCES:
        for clip in ("", ", clipped"):
            level[f"exact: mass at the smaller mode, {name}{clip}"] = (
                0.01 if name in f_distill.SEEKING else 0.38
            )
    for kind in arms.WEIGHTS:
        for calls in (1, 2, 50):
            for words in f_distill.METRICS.values():
                level[f"{kind}: {words}, teacher, {calls} calls"] = 5.0
        for k, name in enumerate(("kl", "js", "rkl")):
            for words in f_distill.METRICS.values():
                level[f"{kind}: {words}, {name} student"] = 1.0 + k
            level[f"{kind}: effective share of the batch, {name} student"] = 0.5 + 0.1 * k
    level |= changed
    return [Row(name, (v, v, v)) for name, v in level.items()]


def test_the_rule_reads_every_condition() -> None:
    assert f_distill.judged(rows()).verdict == "holds"
    histogram = "equal modes: KL of the mode histogram"
    broken = {
        "1": {"exact: mass at the smaller mode, sf, clipped": 0.06},
        "2": {"exact: mass at the smaller mode, jf": 0.7},
        "3": {f"{histogram}, teacher, 2 calls": 2.5},
        "4": {"falling modes: Frechet distance, rkl student": 1.9},
        "5": {f"{histogram}, rkl student": 2.0},
        "6": {f"{histogram}, kl student": 3.0},
        "7": {"falling modes: effective share of the batch, kl student": 0.9},
    }
    for number, changed in broken.items():
        result = f_distill.judged(rows(**changed))
        assert f"(not {number})" in result.reason, result.reason
        assert result.verdict == ("does not hold" if number in "123" else "holds in part")


def test_the_exact_gradient_separates_the_divergences_early() -> None:
    found = arms.exact(1, 400, batch=128, lr=0.03)
    assert set(found) == {n + c for n in DIVERGENCES for c in ("", ", clipped")}
    share = {n: arms.share_below(v) for n, v in found.items()}
    assert float(share["rkl"].max()) < 0.05
    assert float(share["kl"].min()) > 0.2


def test_figures_of_the_truth_and_of_one_mode() -> None:
    target = arms.grid(0.85)
    good = arms.figures(target.sample(4000, torch.Generator().manual_seed(1)), 0.85, 0)
    assert good["histogram"] < 0.05
    assert good["near"] > 0.98
    assert good["frechet"] < 0.02
    one = arms.figures(target.means[:1].repeat(4000, 1), 0.85, 0)
    assert one["covered"] == 1
    assert one["histogram"] > 3


def test_every_part_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f_distill, "SMALL", {"exact": 3, "teacher": 3, "updates": 2})
    monkeypatch.setattr(f_distill, "RATES", (1e-3,))
    monkeypatch.setattr(arms, "SAMPLES", 200)
    monkeypatch.setattr(arms, "noise", lambda seed: torch.randn(200, 2))
    result = f_distill.run(Settings(seeds=2, quiet=True, workers=1))
    names = {r.method for r in result.rows}
    assert "falling modes: effective share of the batch, kl student" in names
    assert "equal modes: share near a mode, teacher, 50 calls" in names
    assert result.pictures[0][1][:4] == b"\x89PNG"
