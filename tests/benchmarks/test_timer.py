"""The shared timer: alternation, ratio, comparison of results, missing peers, exit code."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "_timer.py"


@pytest.fixture
def timer():
    spec = importlib.util.spec_from_file_location("_timer_under_test", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def same(a, b):
    assert a == b


def test_runs_alternate_after_a_warm_up_of_each(timer):
    order = []
    timer.race("r", lambda: order.append("a"), lambda: order.append("b"), rounds=3)
    assert "".join(order) == "ab" + "ababab"


def test_the_ratio_is_theirs_over_ours(timer, monkeypatch, capsys):
    seconds = iter([(1.0, 0), (2.0, 0), (1.0, 0), (4.0, 0), (2.0, 0), (6.0, 0)])
    monkeypatch.setattr(timer, "_timed", lambda work: next(seconds))
    found = timer.race("r", int, int, rounds=3, check=same, target=2, peer="them", unit="s")
    assert (found["ratio"], found["spread"]) == (3.0, [2.0, 4.0])
    assert (found["ours_ms"], found["theirs_ms"]) == (1000.0, 4000.0)
    out = capsys.readouterr().out
    assert "ratio 3.00x (2.00..4.00), target 2x met" in out
    assert "ours 1 s, them 4 s" in out


def test_different_results_fail_the_race(timer, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["race", "--json", str(tmp_path / "r.json")])
    with pytest.raises(SystemExit) as stop:
        timer.main(lambda: timer.race("r", lambda: 1, lambda: 2, rounds=1, check=same))
    assert stop.value.code == 1
    assert "DIFFERENT" in capsys.readouterr().out


def test_a_missing_peer_is_said_and_kept_and_does_not_fail(timer, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["race", "--json", str(tmp_path / "r.json")])
    with pytest.raises(SystemExit) as stop:
        timer.main(lambda: timer.missing("apricot", "not installed"))
    assert stop.value.code == 0
    assert "apricot: MISSING (not installed)" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())[0]["missing"] == "not installed"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells")
def test_peak_memory_sees_what_was_freed_again(timer):
    small, large = timer.peak_mib(lambda: None), timer.peak_mib(lambda: len(bytearray(b"1" * 2**26)))
    assert small < 16
    assert large > 60
