"""The experiment's parts at a tiny size and the arithmetic of its rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradmatch.evidence._common import Row, Settings
from gradmatch.evidence.generate import _difiisr_arms as arms
from gradmatch.evidence.generate import difiisr
from gradmatch.generate.difiisr import PerceptualLoss

pytest.importorskip("skimage")


def rows(**changed: float) -> list[Row]:
    level: dict[str, float] = {}
    base = {"psnr": 20.0, "high": 1.0, "features": 1.0, "accuracy": 0.8, "consistency": 0.02}
    better = {
        "bicubic": {"psnr": 18.0},
        "regression": {"psnr": 21.0, "high": 1.5},
        "student, visual": {"high": 0.7, "psnr": 19.9},
        "student, perceptual": {"features": 0.8, "accuracy": 0.83},
        "student, both": {"high": 0.8, "features": 0.9},
        "15 steps, guided by 0.01": {"consistency": 0.01},
        "15 steps, guided by 0.1": {"consistency": 0.05},
    }
    for data in difiisr.SETS:
        for name in ("the truth", "15 steps", "student, plain", *better):
            for figure, value in (base | better.get(name, {})).items():
                level[f"{data}: {difiisr.NAMES[figure]}, {name}"] = value
    level |= changed
    return [Row(name, (v, v, v)) for name, v in level.items()]


def test_the_rule_reads_every_condition() -> None:
    assert difiisr.judged(rows()).verdict == "holds"
    broken = {
        "1": {"garments: log-spectrum error, high band, student, visual": 0.95},
        "2": {"photographs: PSNR in dB, student, visual": 19.6},
        "3": {"garments: judge's accuracy, student, perceptual": 0.805},
        "4": {"photographs: distance in the judge's features, student, perceptual": 1.0},
        "6": {"photographs: log-spectrum error, high band, student, both": 1.1},
        "7": {"garments: PSNR in dB, regression": 19.0},
        "8": {"photographs: log-spectrum error, high band, regression": 0.9},
        "9": {"garments: PSNR in dB, student, plain": 19.6, "garments: PSNR in dB, student, visual": 19.6},
        "12": {"photographs: PSNR in dB, bicubic": 20.5},
        "13": {"garments: mean difference from the small image, 15 steps, guided by 0.1": 0.01},
    }
    for number, changed in broken.items():
        result = difiisr.judged(rows(**changed))
        assert result.verdict == "holds in part"
        assert f"Conditions met: 13 of 14 (not {number})." in result.reason, changed


class Stub:
    class net:
        @staticmethod
        def head(seen: torch.Tensor) -> torch.Tensor:
            return seen

    def features(self, images: torch.Tensor) -> torch.Tensor:
        assert 0 <= float(images.min()) <= float(images.max()) <= 1
        return images.flatten(1)[:, :10]


def test_every_part_runs_and_is_kept(tmp_path: Path, monkeypatch: Any) -> None:
    g = torch.Generator().manual_seed(0)
    parts = {k: torch.rand(n, 1, 28, 28, generator=g) for k, n in (("train", 40), ("held", 8), ("test", 12))}
    parts["labels"] = torch.arange(12) % 10
    monkeypatch.setattr(arms, "images", lambda name: parts)
    monkeypatch.setattr(arms, "judge", Stub)
    monkeypatch.setattr(arms, "WIDTH", 8)
    monkeypatch.setattr(arms, "BATCH", 4)
    body = nn.Conv2d(1, 2, 3).eval().requires_grad_(False)
    monkeypatch.setattr(arms, "extractors", lambda folder, steps: PerceptualLoss([body]))
    monkeypatch.setattr(difiisr, "GRID", [0.01, 0.1])
    settings, sizes = (
        Settings(runs=tmp_path, quiet=True, workers=1),
        {"steps": 2, "extractor": 1, "pairs": 6, "student": 2},
    )
    for kind in ("teacher", "regression", "extractors"):
        difiisr._teacher(settings, arms.GARMENTS, kind, 0, sizes)
    chosen = difiisr._chosen(settings, arms.GARMENTS, sizes)
    assert set(chosen) == {"visual", "perceptual"}
    assert set(chosen.values()) <= {0.01, 0.1}
    found = difiisr._one(settings, arms.GARMENTS, 0, sizes, chosen)
    assert found["the truth"]["high"] == 0
    assert found["the truth"]["psnr"] == pytest.approx(100)
    assert 0 < found["the truth"]["consistency"] < 0.03  # the noise of the small image
    assert difiisr._one(settings, arms.GARMENTS, 0, sizes, chosen) == found
    done = {(d, 0): found for d in difiisr.SETS}
    names = {r.method for r in difiisr._rows(done, [0], dict.fromkeys(difiisr.SETS, chosen))}
    assert "photographs: SSIM, student, both at 0.001" in names


def test_photographs_are_cut_from_separate_columns() -> None:
    parts = arms.images(arms.PHOTOS)
    assert all(x.shape[1:] == (1, 32, 32) for x in parts.values())
    assert len(parts["test"]) > 100
    flat = {k: {tuple(c.flatten()[:64].tolist()) for c in x} for k, x in parts.items()}
    assert len(flat["test"] & flat["train"]) <= 1  # black margins at most


def test_degraded_images_are_averages_with_noise() -> None:
    x = torch.full((200, 1, 28, 28), 0.4)
    small = arms.degraded(x, torch.Generator().manual_seed(0))
    assert small.shape == (200, 1, 7, 7)
    assert float(small.mean()) == pytest.approx(0.4, abs=1e-3)
    assert float(small.std()) == pytest.approx(arms.NOISE, rel=0.05)
