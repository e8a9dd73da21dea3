"""gradmatch optimizers bench: every task and protocol, resumed runs, refusals."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from gradmatch.cli import _bench_tasks as work
from gradmatch.cli import app
from gradmatch.optim import GradNormSmooth, TargetSurrogate


def call(*words: str):
    return CliRunner().invoke(app, ["optimizers", "bench", *words])


def test_it_tunes_runs_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "RATES", (1e-3, 1e-1))
    words = ("--optimizers", "sgd,torch.optim:Adam", "--tasks", "quadratics,digits-mlp")
    words += ("--seeds", "2", "--steps", "5", "--out", str(tmp_path / "o"))
    first = call(*words)
    assert first.exit_code == 0, first.output
    assert first.output.count("end of the") == 4  # with two rates each is one
    rows = json.loads((tmp_path / "o" / "bench.json").read_text())["rows"]
    assert len(rows) == 4
    assert all(r["rate"] in (1e-3, 1e-1) and r["ms"] > 0 for r in rows)
    assert (tmp_path / "o" / "bench.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(work, "train", lambda *a: pytest.fail("done again"))
    assert call(*words).exit_code == 0


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, GradNormSmooth, TargetSurrogate])
def test_every_protocol_is_stepped(kind):
    found = work.train("quadratics", kind, 0.1, 0, False, 3)
    assert found["loss"] < work.make("quadratics", 0, False).score()
    assert work.rate_name(kind) == {"GradNormSmooth": None, "TargetSurrogate": "eta"}.get(kind.__name__, "lr")


def test_the_transformer_learns_text():
    before = work.make("char-transformer", 0, False).score()
    assert work.train("char-transformer", torch.optim.Adam, 1e-2, 0, False, 8)["loss"] < before


def test_unknown_names_are_refused(tmp_path):
    assert call("--optimizers", "sgdd", "--out", str(tmp_path / "a")).exit_code != 0
    assert call("--optimizers", "torch.optim:Nothing", "--out", str(tmp_path / "b")).exit_code != 0
    assert call("--tasks", "mnist", "--out", str(tmp_path / "c")).exit_code != 0
