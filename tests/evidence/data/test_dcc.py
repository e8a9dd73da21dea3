"""The evidence of DCC: how it chooses rates and judges, and one tiny run."""

from __future__ import annotations

import pytest
import torch

from gradmatch.core.examples import Examples
from gradmatch.datasets import Split
from gradmatch.evidence._common import Row, Settings
from gradmatch.evidence.data import dcc


def test_rates_are_the_best_and_grids_grow_past_their_edges() -> None:
    best = {"low": 0.01, "inside": 10.0, "high": 1e9}
    tried: list[float] = []

    def score_all(todo):
        tried.extend(lr for cell, lr in todo if cell == "low")
        return [{cell: -abs(lr - best[cell])} for cell, lr in todo]

    tuned = dcc.tune(list(best), list(best), (1.0, 10.0, 100.0), score_all)
    assert tuned.rates["inside"] == 10
    assert tuned.rates["low"] == pytest.approx(0.01)
    assert len(tried) == len(set(tried)) == 3 + dcc.WIDENINGS
    assert tuned.on_edge == ["high"]


def test_cells_may_share_runs() -> None:
    def score_all(todo):
        return [{"a": -abs(lr - 1.0), "b": -abs(lr - 1e3)} for _, lr in todo]

    tuned = dcc.tune(["a", "b"], ["run", "run"], (1.0, 10.0, 100.0), score_all)
    assert tuned.rates == {"a": 1.0, "b": 1e3}
    assert tuned.on_edge == []


def _rows(better: set[str]) -> list[Row]:
    names = [f"linear, ratio {r}, {c}" for r in (10, 30) for c in dcc.CLASSIFIERS]
    names += [f"clothes, {c}, 1 per class" for c in dcc.CONDITIONS]
    rows = []
    for name in names:
        gain = 0.1 if name in better else 0.0
        ours = "DCC warm-up" if name.startswith("clothes") else "DCC"
        rows += [
            Row(f"{name}: DC", (0.5, 0.6, 0.7)),
            Row(f"{name}: {ours}", (0.5 + gain, 0.61 + gain, 0.69 + gain)),
        ]
    return rows


def test_the_rule_needs_all_seven_conditions() -> None:
    every = {r.method.split(":")[0] for r in _rows(set())}
    assert len(every) == 7
    assert dcc.judge(_rows(every), [])[0] == "holds"
    for missing in every:
        assert dcc.judge(_rows(every - {missing}), [])[0] == "holds in part"
    assert dcc.judge(_rows(set()), [])[0] == "does not hold"
    assert "edge of its widened grid: here" in dcc.judge(_rows(set()), ["here"])[1]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch):
    """Images of the clothes' shape and counts, without reading Fashion-MNIST."""
    g = torch.Generator().manual_seed(0)

    def part(count: int) -> Examples:
        return Examples(torch.rand(5 * count, 1, 14, 14, generator=g), torch.arange(5 * count) % 5, 5)

    split = Split(part(650), part(501), ("a", "b", "c", "d", "e"), "stand-in")
    monkeypatch.setattr(dcc, "small_clothes", lambda: split)
    dcc.clothes_under.cache_clear()
    yield
    dcc.clothes_under.cache_clear()


def test_held_out_images_are_neither_trained_on_nor_the_test_set(stand_in: None) -> None:
    train, held = dcc.clothes_under("clean", True)
    same, test = dcc.clothes_under("clean", False)
    assert train.x.equal(same.x)
    assert (len(train), len(held), len(test)) == (2000, 1000, 2500)
    rows = [{tuple(r) for r in e.x.flatten(1).tolist()} for e in (train, held, test)]
    assert not rows[0] & rows[1]
    assert not rows[1] & rows[2]


def test_a_tiny_run_reports_every_row(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = dcc.SMALL._replace(
        linear_seeds=1, linear_tuning=1, linear_steps=2, image_seeds=1, image_tuning=1, networks=1, width=2
    )
    monkeypatch.setattr(
        dcc, "SMALL", tiny._replace(methods={k: dcc.METHODS[k] for k in ("DC", "DCC warm-up")})
    )
    monkeypatch.setattr(dcc, "WIDENINGS", 0)
    monkeypatch.setattr(dcc, "LINEAR_GRID", (1.0,))
    monkeypatch.setattr(dcc, "RATIOS", dcc.COUNTED_RATIOS)
    monkeypatch.setattr(dcc, "IMAGE_GRID", (1.0,))
    original = dcc.evaluate
    monkeypatch.setattr(dcc, "evaluate", lambda *a, **k: original(*a, **k | {"epochs": 2, "networks": 1}))
    result = dcc.run(Settings(workers=1, quiet=True))
    assert len(result.rows) == 2 * 2 * 3 + 3 * 3
    assert all(0 <= v <= 1 for r in result.rows for v in r.values)
    assert result.verdict == "does not hold"  # one seed: no noise is known, nothing beats anything
