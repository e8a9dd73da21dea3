"""The experiment's arms at a tiny size and the arithmetic of its rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gradmatch.evidence._common import Row, Settings
from gradmatch.evidence.generate import _repa_arms as arms
from gradmatch.evidence.generate import u_repa

pytest.importorskip("diffusers")


def rows(**changed: float) -> list[Row]:
    level: dict[str, float] = {}
    order = ("U-REPA", "tokens, middle", "tokens, first block", "no alignment")
    for k, arm in enumerate(order):
        level[f"Frechet distance, {arm}"] = 1.0 + k
        level[f"mismatch of the middle's relations, {arm}"] = 0.1 + k
        level[f"probe of the middle, {arm}"] = 0.7 - 0.1 * k
    return [Row(name, (v, v, v)) for name, v in (level | changed).items()]


def test_the_rule_reads_every_condition() -> None:
    assert u_repa.judged(rows()).verdict == "holds"
    broken = {
        "1": {"mismatch of the middle's relations, U-REPA": 1.1},
        "2": {"mismatch of the middle's relations, tokens, first block": 1.0},
        "3": {"probe of the middle, no alignment": 0.8},
        "4, 5": {"Frechet distance, no alignment": 0.9},
        "6": {"Frechet distance, tokens, first block": 0.9},
        "7": {"Frechet distance, tokens, middle": 0.9},
    }
    for number, changed in broken.items():
        result = u_repa.judged(rows(**changed))
        assert f"(not {number})" in result.reason, result.reason
        assert result.verdict == ("does not hold" if number in ("1", "4, 5") else "holds in part")


def test_every_part_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(60, 1, 16, 16, generator=g) * 2 - 1, torch.arange(60) % 10
    table: dict[str, Any] = dict.fromkeys(("train", "held out", "test"), (x, y))
    monkeypatch.setattr(arms, "images", lambda: table)
    u_repa._encoder.cache_clear()
    monkeypatch.setattr(arms, "_judged", lambda v: v.flatten(1)[:, :3])
    monkeypatch.setattr(u_repa, "SMALL", {"images": 60, "encoder": 2, "steps": 2, "samples": 12})
    monkeypatch.setattr(u_repa, "RATES", (1e-3,))
    monkeypatch.setattr(arms, "ARMS", {k: v for k, v in arms.ARMS.items() if "before" not in k})
    result = u_repa.run(Settings(seeds=1, quiet=True, workers=1))
    names = {r.method for r in result.rows}
    assert "probe of the middle, relations alone, middle" in names
    assert {n for n in names if n.startswith("Frechet distance at ")} == {
        f"Frechet distance at 1 steps, {arm}" for arm in arms.ARMS
    }
    assert result.pictures[0][1][:4] == b"\x89PNG"
