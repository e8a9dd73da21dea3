"""The evidence of TESLA: its rule, its table of gradients, and one tiny run."""

from __future__ import annotations

import pytest

from gradmatch.evidence._common import Row
from gradmatch.evidence.data import _unrolled, tesla


def _rows(accuracies: dict[tuple[str, str], float], exact: float, biased: float, growth: float) -> list[Row]:
    rows = [
        Row(f"{task}: {row}", tuple(accuracies.get((task, row), 0.5) + e for e in (0.0, 0.001, 0.002)))
        for task in (tesla.MANY, tesla.FEW)
        for row in (*tesla.ARMS, *tesla.REAL)
    ]
    rows += [
        Row("gradient error, 5 steps: exact", (exact,)),
        Row("gradient error, 5 steps: tesla", (biased,)),
    ]
    rows += [Row("gradient error, 5 steps: tesla, rate", (9.0,))]
    for mode, factor in (("full", 4.0), ("exact", growth), ("tesla", 1.0)):
        rows += [
            Row(f"graph MB at 5 steps: {mode}", (10.0,)),
            Row(f"graph MB at 20 steps: {mode}", (10 * factor,)),
        ]
    return rows


GOOD = {
    (task, row): 0.7 for task in (tesla.MANY, tesla.FEW) for row in (tesla.SOFT, tesla.ONCE, tesla.BIASED)
}


def test_the_rule_needs_all_nine_conditions() -> None:
    assert tesla.judge(_rows(GOOD, 1e-12, 1e-6, 1.0), [])[0] == "holds"
    spoilt = [
        (GOOD, 1e-6, 1e-6, 1.0),
        (GOOD, 1e-12, 0.1, 1.0),
        (GOOD, 1e-12, 1e-6, 1.2),
        (GOOD | {(tesla.MANY, tesla.BIASED): 0.6}, 1e-12, 1e-6, 1.0),
        (GOOD | {(tesla.MANY, tesla.ONCE): 0.5}, 1e-12, 1e-6, 1.0),
        (GOOD | {(tesla.FEW, tesla.SOFT): 0.2}, 1e-12, 1e-6, 1.0),
        (GOOD | {(tesla.FEW, tesla.ONCE): 0.2}, 1e-12, 1e-6, 1.0),
        (GOOD | {(tesla.MANY, tesla.REAL[1]): 0.8}, 1e-12, 1e-6, 1.0),
    ]
    for case in spoilt:
        verdict, reason = tesla.judge(_rows(*case), [])
        assert verdict == "holds in part"
        assert "8 of 9" in reason
    _, reason = tesla.judge(_rows(GOOD | {(tesla.MANY, tesla.HARD): 0.7}, 1e-12, 1e-6, 1.0), [])
    assert "7 of 9" in reason


def test_gradients_of_both_kinds_against_the_whole_loop(monkeypatch) -> None:
    monkeypatch.setattr(_unrolled, "STEPS", (1, 5))
    monkeypatch.setattr(_unrolled, "LRS", (0.5,))
    found = _unrolled.gradient_errors(0)
    assert found["1 steps at rate 0.5"]["tesla"] < 1e-12
    assert found["5 steps at rate 0.5"]["exact"] < 1e-12
    assert found["5 steps at rate 0.5"]["tesla"] > 0.01


def test_the_graph_grows_for_autograd_only() -> None:
    sizes = {m: [_unrolled.graph_megabytes(m, n, 4, 4) for n in (2, 6)] for m in ("full", "exact", "tesla")}
    assert sizes["full"][1] == pytest.approx(3 * sizes["full"][0], rel=0.05)
    assert sizes["exact"][1] < 1.05 * sizes["exact"][0]
    assert sizes["tesla"][1] < 1.05 * sizes["tesla"][0]


def test_every_row_is_measured() -> None:
    tiny = tesla.Budget(1, 300, 100, 1, 9, {tesla.MANY: 1, tesla.FEW: 1}, 2, 4, 4)
    rates = dict.fromkeys((*tesla.ARMS, *tesla.REAL), (1.0, 0.1))
    found = tesla.measure(tesla.FEW, rates, 0, tiny)
    assert set(found) == set(rates)
    assert all(0 <= v <= 1 for v in found.values())
