"""The experiment's arms at a tiny size, the arithmetic of its rule, and the bound's closed forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gradmatch.core.examples import Examples
from gradmatch.evidence._common import Row, Settings
from gradmatch.evidence.generate import _fashion, _lfm_bound, lfm

pytest.importorskip("diffusers")


def rows(**changed: float) -> list[Row]:
    level: dict[str, float] = {}
    for calls in lfm.CALLS:
        level[f"latent flow, Euler, {calls} calls"] = 1.0
        level[f"latent DDPM, DDIM, {calls} calls"] = 2.0
    for calls in lfm.PIXEL_CALLS:
        level[f"pixel flow, Euler, {calls} calls"] = 3.0
    for tol in lfm.TOLERANCES:
        level[f"dopri5 calls at {tol:g}, latent flow"] = 50.0
        level[f"dopri5 calls at {tol:g}, pixel flow"] = 90.0
    level |= {
        "judge agrees with the label, guidance 1": 0.85,
        "judge agrees with the label, guidance 1.5": 0.95,
        "squared error in the hole, flow": 0.1,
        "squared error in the hole, training mean": 0.2,
        "hole filled by flow": 0.3,
        "hole filled by regression": 0.6,
        "share of Gaussian cases within the bound by the triangle": 1.0,
        "share of Gaussian cases within the bound as printed": 0.6,
    }
    level |= changed
    return [Row(name, (v, v, v)) for name, v in level.items()]


def test_the_rule_reads_every_condition() -> None:
    assert lfm.judged(rows()).verdict == "holds"
    broken = {
        "1": {"pixel flow, Euler, 3 calls": 0.9},
        "4": {"dopri5 calls at 0.0001, pixel flow": 40.0},
        "7": {"latent DDPM, DDIM, 10 calls": 1.0},
        "9": {"judge agrees with the label, guidance 1.5": 0.89},
        "10": {"squared error in the hole, training mean": 0.1},
        "11": {"hole filled by regression": 0.3},
        "12": {"share of Gaussian cases within the bound as printed": 1.0},
    }
    for number, changed in broken.items():
        result = lfm.judged(rows(**changed))
        assert result.verdict == "holds in part", changed
        assert f"Conditions met: 11 of 12 (not {number})." in result.reason
    worst = {r.method: 9.0 for r in rows() if r.method.startswith("latent flow")}
    assert "not 1, 2, 3, 5, 6, 7, 8" in lfm.judged(rows(**worst)).reason


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Settings:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(40, 1, 28, 28, generator=g) * 2 - 1
    parts = tuple(Examples(x, torch.arange(40) % 10, 10) for _ in range(3))
    monkeypatch.setattr(lfm, "fashion", lambda: parts)
    monkeypatch.setattr(_fashion, "fashion", lambda: parts)
    monkeypatch.setattr(_fashion, "VAE", _fashion.VAE | {"steps": 1, "batch": 4})
    monkeypatch.setattr(lfm, "BATCH", 4)
    monkeypatch.setattr(lfm, "TOLERANCES", (1e-3,))
    monkeypatch.setattr(lfm, "judge", lambda: Stub())
    return Settings(runs=tmp_path, quiet=True, workers=1)


class Stub:
    real = torch.zeros(40, 2)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :2]

    def labels(self, images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(images), dtype=torch.long)

    def frechet(self, images: torch.Tensor) -> float:
        assert images.shape[1:] == (1, 28, 28)
        assert 0 <= float(images.min()) <= float(images.max()) <= 1
        return float(images.mean())


def test_arms_run_and_are_kept(tiny: Settings) -> None:
    first = lfm._unconditional(tiny, "latent flow", 0, 1e-3, 0.01, 4)
    assert set(first["frechet"]) == {"3", "5", "10", "50", "10 heun", "50 heun"}
    assert first["dopri5"]["0.001"] > 5
    assert lfm._unconditional(tiny, "latent flow", 0, 1e-3, 0.01, 4) == first
    other = lfm._unconditional(tiny, "latent DDPM", 0, 1e-3, 0.01, 4)
    assert "dopri5" not in other
    labelled = lfm._labelled(tiny, 0, 1e-3, 0.01, 10)
    assert labelled["agreement"] == {"1": 0.1, "1.5": 0.1}
    filled = lfm._filled(tiny, 0, 1e-3, 0.01, 4)
    assert set(filled) == {"flow", "regression", "training mean"}
    names = {r.method for r in lfm._condition_rows([labelled], [filled])}
    assert "hole filled by regression" in names


def test_wasserstein_distance_and_bound_of_gaussians() -> None:
    eye = torch.eye(2).double()
    far = torch.tensor([3.0, 4.0]).double()
    assert _lfm_bound.w2(far * 0, eye, far, 4 * eye) == pytest.approx((25 + 2) ** 0.5)
    # the case of the page: data N(0, 1), a shift of 1; a perfect field leaves the shift alone
    made, triangle, printed = _lfm_bound.case(eye, torch.ones(2).double(), 0.0, 1.0)
    assert made == pytest.approx(1.0, abs=1e-3)
    assert triangle == pytest.approx(1.0)
    assert printed == pytest.approx(1.0)
    made, triangle, printed = _lfm_bound.case(eye, torch.ones(2).double(), 0.03, 1.0)
    assert printed < made < triangle
