"""The experiment's parts at a tiny size and the arithmetic of its rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gradmatch.evidence._common import Row, Settings
from gradmatch.evidence.generate import _w2sd_arms as arms
from gradmatch.evidence.generate import w2sd

CHOSEN = {b: {"W2SD": "T 50, lambda 25", "extrapolation": "by 1, T 50"} for b in w2sd.BAGS}
NETWORKS = ["strong, T 100", *w2sd.SWAPS, "weak, T 50", w2sd.PLAIN, w2sd.MANY, w2sd.FULL, w2sd.HALF, w2sd.SHORT,
            "W2SD, T 50, lambda 25", "extrapolation, by 1, T 50"]  # fmt: skip


def rows(**changed: float) -> list[Row]:
    level: dict[str, float] = {}

    def put(bags: int, figure: str, name: str, value: float) -> None:
        level[f"{w2sd.title(bags)}: {w2sd.NAMES[figure]}, {name}"] = value

    exact = {
        w2sd.PLAIN: 0.3, w2sd.FULL: 0.46, w2sd.HALF: 0.44, "W2SD, T 50, lambda 10": 0.4, w2sd.SHORT: 0.44,
        w2sd.SWAPS[0]: 0.01, w2sd.SWAPS[1]: 0.1, "W2SD, weak is the ideal": 0.2, "W2SD, weak is strong": 0.3,
        "W2SD, weak of weight 0.2": 0.35, "W2SD, weak of weight 0.1": 0.42, "W2SD, weak of weight 0.02": 0.48,
        "extrapolation by 1, T 25": 0.43, "extrapolation by 1, T 74": 0.45,
    }  # fmt: skip
    for name, share in exact.items():
        put(0, "share", name, share)
        put(0, "gap", name, abs(share - 0.5))
        put(0, "std", name, 0.5)
    for bags in w2sd.BAGS:
        for name in NETWORKS:
            better = name.startswith("W2SD")
            share = {"S2WD": 0.0, "swap": 0.1}.get(name.split()[0].strip(","), 0.48 if better else 0.3)
            put(bags, "share", name, share)
            put(bags, "gap", name, abs(share - 0.5))
            put(bags, "frechet", name, 1.0 if better else 2.0)
    level |= changed
    return [Row(name, (v, v, v)) for name, v in level.items()]


def test_the_rule_reads_every_condition() -> None:
    assert w2sd.judged(rows(), CHOSEN).verdict == "holds"
    broken = {
        "1": {"mixture: gap to one half, W2SD, T 50, lambda 10": 0.2},
        "4": {"mixture: share of the minority, W2SD, weak is strong": 0.33},
        "5": {"mixture: gap to one half, W2SD, weak of weight 0.1": 0.3},
        "6": {f"mixture: deviation within modes, {w2sd.FULL}": 0.4},
        "7": {"mixture: gap to one half, extrapolation by 1, T 25": 0.01},
        "8": {"mixture: gap to one half, extrapolation by 1, T 74": 0.01},
        "9": {f"weak of 500 bags: Frechet distance, {w2sd.FULL}": 2.5},
        "12": {f"weak of 250 bags: gap to one half, {w2sd.SHORT}": 0.4},
        "13": {f"weak of 500 bags: gap to one half, {w2sd.SWAPS[1]}": 0.1},
        "16": {"weak of 250 bags: Frechet distance, extrapolation, by 1, T 50": 0.5},
    }
    for number, changed in broken.items():
        result = w2sd.judged(rows(**changed), CHOSEN)
        assert result.verdict == "holds in part"
        assert f"Conditions met: 15 of 16 (not {number})." in result.reason, changed


def test_the_exact_mixture_costs_the_calls_it_says() -> None:
    found = arms.exact(0, 300)
    calls = {name: found[name]["calls"] for name in found}
    assert calls["strong, T 50"] == 50
    assert calls["W2SD, T 50, lambda 49"] == 148
    assert calls["W2SD, T 25, lambda 12"] == 49
    assert calls["extrapolation by 1, T 74"] == 148
    assert found["W2SD, T 50, lambda 49"]["share"] > found["strong, T 50"]["share"] + 0.08
    for settings in arms.TUNED.values():
        for draw in settings.values():
            assert draw(arms.STABLE, arms.mixture(0.25), arms.mixture(0.05), torch.zeros(2, 1))[1] == 100


def test_networks_are_trained_once_and_drawn_by_every_method(tmp_path: Path, monkeypatch: Any) -> None:
    g = torch.Generator().manual_seed(0)
    x = [torch.rand(60, 196, generator=g) * 2 - 1 for _ in range(2)]
    goal = torch.randn(50, 64, generator=g)
    monkeypatch.setattr(arms, "garments", lambda: {"train": x, "goals": {"test": goal, "held out": goal}})
    monkeypatch.setattr(
        arms, "features", lambda x: torch.randn(len(x), 64, generator=torch.Generator().manual_seed(1))
    )
    monkeypatch.setattr(arms, "minority", lambda seen: 0.5)
    monkeypatch.setattr(arms, "WIDTH", 16)
    quick = {k: d for k, d in arms.METHODS.items() if k in (w2sd.PLAIN, w2sd.SHORT)}
    monkeypatch.setattr(arms, "METHODS", quick)
    monkeypatch.setattr(arms, "TUNED", {k: dict(list(v.items())[:1]) for k, v in arms.TUNED.items()})
    settings = Settings(runs=tmp_path, quiet=True, workers=1)
    sizes = {"exact": 10, "steps": 2, "samples": 8}
    w2sd._networks(settings, 0, 2500, sizes)
    before = (tmp_path / "w2sd/network-2500-0.safetensors").stat().st_mtime_ns
    chosen = w2sd._chosen(settings, 500, sizes)
    assert chosen == {"W2SD": "T 50, lambda 25", "extrapolation": "by 0.5, T 50"}
    found = w2sd._one(settings, 500, 0, sizes, chosen)
    assert set(found) == {w2sd.PLAIN, w2sd.SHORT, "W2SD, T 50, lambda 25", "extrapolation, by 0.5, T 50"}
    assert w2sd._one(settings, 500, 0, sizes, chosen) == found
    assert (tmp_path / "w2sd/network-2500-0.safetensors").stat().st_mtime_ns == before
    part = {name: figures | {"std": 0.5} for name, figures in found.items()}
    names = {r.method for r in w2sd._rows({(b, 0): part for b in (0, *w2sd.BAGS)}, [0])}
    assert "weak of 250 bags: Frechet distance, W2SD, T 25, lambda 12" in names
    assert set(arms.floors(20)) == {"share", "frechet"}
