"""The experiment's rule, without its training runs."""

from __future__ import annotations

import itertools

import pytest
import torch

from gradmatch.evidence._common import Settings
from gradmatch.evidence.optim import diffgrad

CELLS = [(data, batch) for data in diffgrad.DATA for batch in diffgrad.BATCHES]
FRICTION = [{str(k): [0.51, 0.52, *[1.0] * 60] for k in diffgrad.FRICTION_STEPS}] * 3
WON = dict.fromkeys(diffgrad.MAKE, 0.8) | {diffgrad.OURS: 0.9}


def found(level: dict[str, float]) -> diffgrad.Found:
    return {
        (*cell, method): {
            rate: [(level[method], level[method] + 0.001 * s) for s in range(3)]
            for rate in diffgrad._grid(method)
        }
        for cell in CELLS
        for method in diffgrad.MAKE
    }


def ends(**values: float) -> dict[tuple[str, str], list[float]]:
    at = {"Adam 0.1": 0.5, "diffGrad 0.1": 0.0, "Adam 0.05": 0.5} | values
    return {
        key: [0.0, at.get(key[1], 0.0)] for key in itertools.product(diffgrad.FUNCTIONS, diffgrad.COLUMNS)
    }


def judged(level: dict[str, float], where: dict[tuple[str, str], list[float]]):
    return diffgrad._judged(found(level), where, FRICTION, CELLS)


def test_the_rule_reads_every_condition() -> None:
    assert judged(WON, ends()).verdict == "holds"
    for level, where in (
        (WON, ends(**{"diffGrad 0.1": 0.5})),
        (WON, ends(**{"Adam 0.05": 0.0})),
        (WON | {diffgrad.HALF: 0.9}, ends()),
        (WON | {"RMSProp": 0.9}, ends()),
    ):
        result = judged(level, where)
        assert result.verdict == "holds in part"
        assert "met: 5 of 6" in result.reason
    assert "met: 3 of 6" in judged(WON | {diffgrad.ADAM: 0.9}, ends()).reason  # 3, 5 and 6 fall with Adam
    nothing = dict.fromkeys(diffgrad.MAKE, 0.9) | {diffgrad.OURS: 0.8}
    assert judged(nothing, ends(**{"Adam 0.05": 0.0, "Adam 0.1": 0.0})).verdict == "does not hold"


def test_the_best_rate_is_chosen_on_the_held_out_rows() -> None:
    own = found(WON)
    key = ("digits", 32, diffgrad.OURS)
    own[key] = {rate: [(0.5, 0.99)] * 3 for rate in diffgrad.RATES} | {1e-2: [(0.6, 0.7)] * 3}
    result = diffgrad._judged(own, ends(), FRICTION, CELLS)
    row = result.row("diffGrad, digits, batch 32, best rate")
    assert row.values == (0.7, 0.7, 0.7)
    assert row.cost == "rate 0.01"
    assert "an end of the grid" in result.row("diffGrad, digits, batch 128, best rate").cost


def test_a_tiny_run_trains_and_measures(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(diffgrad.EPOCHS, "digits", 1)
    settings = Settings(runs=tmp_path, quiet=True, workers=1)
    held, test = diffgrad._one(settings, "digits", 128, diffgrad.OURS, 1e-2, 0)
    assert 0.1 < held <= 1
    assert 0.1 < test <= 1
    assert diffgrad._one(settings, "digits", 128, diffgrad.OURS, 1e-2, 0) == (held, test)
    own, kept, tested = diffgrad._data("digits", False)
    assert (len(own.x), len(kept.x)) == (800, 200)
    assert len(tested.x) == 797


def test_friction_is_measured_with_the_step_before() -> None:
    found_ = diffgrad._friction(Settings(quiet=True), 0)
    median, high, *counts = found_["11"]
    assert 0.5 < median < high < 0.6
    network_size = 16 * 9 + 16 * 9 * 16 + 2 * 16 + 2 * 2 * 16 + 16 * 16 * 10 + 10
    assert 0.9 * network_size < sum(counts) <= network_size


def test_half_of_the_rate_is_what_it_says() -> None:
    p = [torch.nn.Parameter(torch.ones(1))]
    rates = [diffgrad.MAKE[m](p, 1e-2).param_groups[0]["lr"] for m in (diffgrad.ADAM, diffgrad.HALF)]
    assert rates == [1e-2, 5e-3]
