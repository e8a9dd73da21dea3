"""The arithmetic of verdicts, the result file, parallel runs and the named preprocessings."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from gradmatch import catalog
from gradmatch.core.checks import InputError
from gradmatch.core.examples import Examples
from gradmatch.evidence import _common as common
from gradmatch.evidence._common import Result, Row, Settings, beats, gain, verdict_of, write_result

PNG = b"\x89PNG\r\n\x1a\n"


def result(*rows: Row, **changes: object) -> Result:
    given = {
        "slug": "toy",
        "title": "Toy",
        "claim": "A beats B.",
        "rule": "Holds if A - B exceeds two standard errors.",
        "verdict": "holds",
        "reason": "A - B +1.",
        "metric": "accuracy (%)",
        "rows": rows or (Row("A", (1.0, 3.0)), Row("B", (0.0, 1.0))),
    }
    return Result(**(given | changes))  # type: ignore[arg-type]


def settings(out: Path, **changes: object) -> Settings:
    return Settings(**({"out": out, "runs": out / "runs", "quiet": True} | changes))  # type: ignore[arg-type]


def test_row_moments_are_the_sample_ones():
    row = Row("A", (1.0, 2.0, 6.0))
    assert row.mean == pytest.approx(3.0)
    assert row.std == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert Row("A", (5.0,)).std == 0


@pytest.mark.parametrize("values", [(), (1.0, float("nan")), (float("inf"),)])
def test_row_refuses_no_or_non_finite_values(values):
    with pytest.raises(InputError):
        Row("A", values)


def test_gain_is_paired_by_seed():
    a, b = Row("A", (10.0, 20.0, 30.0)), Row("B", (9.0, 18.0, 29.0))
    found = gain(a, b)
    assert found.mean == pytest.approx(4 / 3)
    assert found.error == pytest.approx(np.std([1, 2, 1], ddof=1) / math.sqrt(3))
    assert beats(a, b)  # unpaired, the spread of 10 over the seeds would drown it
    assert not beats(b, a)
    assert not beats(a, b, margin=1.0)
    assert found.above(0.5)
    assert gain(b, a).below(-0.5)


def test_one_seed_beats_nothing_and_says_so(tmp_path):
    a, b = Row("A", (90.0,)), Row("B", (10.0,))
    assert not beats(a, b)
    assert not gain(a, b).below(1000.0)
    assert "one seed" in str(gain(a, b))
    file = write_result(result(a, b), settings(tmp_path), 1.0)
    assert json.loads(file.read_text())["reason"].startswith("One seed")


def test_gain_of_other_lengths_is_refused():
    with pytest.raises(InputError, match="equally many"):
        gain((1.0, 2.0), (1.0,))


@pytest.mark.parametrize(
    ("conditions", "needed", "verdict"),
    [
        ([True, True], [], "holds"),
        ([True, False], [], "holds in part"),
        ([False, False], [], "does not hold"),
        ([True, True], [False], "does not hold"),
        ([False], [True], "holds in part"),
    ],
)
def test_verdict_of(conditions, needed, verdict):
    assert verdict_of(conditions, needed=needed) == verdict


def test_result_file_has_exactly_the_fields_of_the_design(tmp_path):
    file = write_result(result(), settings(tmp_path, seeds=2, budget="full"), 12.345)
    found = json.loads(file.read_text())
    assert file == tmp_path / "toy.json"
    assert " ".join(found) == (
        "slug title claim rule verdict reason metric higher_is_better rows budget seeds wall_seconds command "
        "versions pictures links"
    )
    assert found["rows"][0] == {
        "method": "A",
        "mean": 2.0,
        "std": pytest.approx(2**0.5),
        "values": [1, 3],
        "cost": "",
    }
    assert found["command"] == "gradmatch evidence toy --seeds 2 --budget full"
    assert found["versions"]["torch"] == torch.__version__
    assert (found["seeds"], found["budget"], found["wall_seconds"]) == (2, "full", 12.3)
    assert (tmp_path / found["pictures"][0]).read_bytes().startswith(PNG)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["toy.json", "toy.png"]


def test_result_refuses_unknown_verdicts_and_rows_of_one_name():
    with pytest.raises(InputError, match="verdict"):
        result(verdict="mostly")
    with pytest.raises(InputError, match="two rows"):
        result(Row("A", (1.0,)), Row("A", (2.0,)))
    with pytest.raises(InputError, match="no row 'C'"):
        result().row("C")


_SQUARE = "lambda k, torch=__import__('torch'): (k * k, torch.get_num_threads())"


@pytest.mark.parametrize("workers", [1, 2])
def test_parallel_keeps_the_order_and_one_thread(workers, tmp_path):
    before = torch.get_num_threads()
    # a function that every process finds: this package's name may be another's on the path of a worker
    tasks = [(f"({_SQUARE})({k})",) for k in (5, 1, 4)]
    try:
        found = common.parallel(eval, tasks, settings(tmp_path, workers=workers))
    finally:
        torch.set_num_threads(before)
    assert found == [(25, 1), (1, 1), (16, 1)]


@pytest.mark.parametrize(
    ("met", "said"),
    [
        ([True, False, True, False], "Conditions met: 2 of 4 (not 2, 4)."),
        ({1: True, "b": False}, "Conditions met: 1 of 2 (not b)."),
        ([True, True], "Conditions met: 2 of 2."),
    ],
)
def test_conditions_are_counted_and_the_missed_ones_named(met, said):
    assert common.tally(met) == said


def test_parts_of_an_earlier_run_count_with_what_they_took(tmp_path, monkeypatch):
    where = settings(tmp_path, workers=2)
    clock = iter([0.0, 30.0, 100.0, 107.0])
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(common.time, "time", lambda: 1000.0)
    common.kept(where, "toy", "a", {}, lambda: 1)
    common.kept(where, "toy", "b", {}, lambda: 1)
    for name in "ab":
        os.utime(where.runs / "toy" / f"{name}.json", (1000, 1000))
    assert common.spared(where, "toy", 2000.0) == 0  # read by nobody
    common.kept(where, "toy", "a", {}, lambda: pytest.fail("made again"))
    assert common.spared(where, "toy", 2000.0) == 30
    assert common.spared(where, "toy", 500.0) == 0  # made in this run, so in its own time


def test_finished_parts_are_read_again_only_under_equal_settings(tmp_path):
    calls: list[int] = []

    def make() -> int:
        calls.append(1)
        return len(calls)

    where = settings(tmp_path)
    assert common.kept(where, "toy", "part", {"lr": 1}, make) == 1
    assert common.kept(where, "toy", "part", {"lr": 1}, make) == 1
    assert common.kept(where, "toy", "part", {"lr": 2}, make) == 2


def examples(n: int = 40, classes: int = 4) -> Examples:
    x = 3 + 2 * torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    return Examples(x, torch.arange(n) % classes, classes)


def test_preprocessings_fit_the_training_set_and_move_the_test_set_alike():
    train, test = examples(), examples(8)
    a, b = common.PREPROCESSINGS["standardised"](train, test)
    torch.testing.assert_close(a.x.mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(a.x.std((0, 2, 3)), torch.ones(2), atol=1e-5, rtol=0)
    scale = (train.x[0] - train.x[1]) / (a.x[0] - a.x[1])
    torch.testing.assert_close((test.x[0] - test.x[1]) / (b.x[0] - b.x[1]), scale, rtol=1e-3, atol=1e-3)
    c, d = common.PREPROCESSINGS["centred"](train, test)
    torch.testing.assert_close(c.x.mean(0), torch.zeros(2, 4, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(test.x - d.x, train.x.mean(0).expand(8, -1, -1, -1))
    assert common.PREPROCESSINGS["raw"](train, test)[1] is test


def test_hold_out_parts_the_set_by_class_and_by_seed():
    train = examples()
    rest, held = common.hold_out(train, 3, seed=1)
    assert torch.bincount(held.y).tolist() == [3] * 4
    both = torch.cat([rest.x, held.x]).flatten(1)
    assert torch.equal(both.sum(1).sort().values, train.x.flatten(1).sum(1).sort().values)
    assert not torch.equal(held.x, common.hold_out(train, 3, seed=2)[1].x)
    with pytest.raises(InputError, match="class 0 has 10"):
        common.hold_out(train, 10, seed=0)


def test_relabelled_keeps_only_the_named_classes_in_that_order():
    train = examples()
    found = common.relabelled(train, [2, 0])
    assert found.classes == 2
    assert torch.equal(found.x[found.y == 0], train.x[train.y == 2])
    assert torch.equal(found.x[found.y == 1], train.x[train.y == 0])


def test_every_built_experiment_has_its_claim_and_rule():
    for slug in common.experiments():
        module = common.experiment(slug)
        assert module.CLAIM.strip()
        assert module.RULE.strip()
        assert callable(module.run)


def test_an_experiment_that_is_not_built_is_refused_in_one_sentence():
    waiting = next(entry for entry in catalog.SYSTEMS if not entry.built)
    with pytest.raises(InputError, match=f"'{waiting.slug}' is not built yet"):
        common.experiment(waiting.slug)
