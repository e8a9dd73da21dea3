"""The experiment on a few digits, and the arithmetic of its rule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gradmatch.evidence._common import Settings
from gradmatch.evidence.weights import gm_nas


def searches(**noise: float) -> tuple[list[float], list[dict]]:
    """A truth, and scores that are it with more or less noise."""
    g = torch.Generator().manual_seed(0)
    truth = torch.linspace(0.5, 0.95, 219)
    level = {
        "one-shot": 0.3, "one-shot, twice the epochs": 0.3, "random split": 0.3, "all operations of a random edge": 0.3,
        gm_nas.GM: 0.01,
    } | noise  # fmt: skip
    found = [
        {m: (truth + s * torch.randn(219, generator=g)).tolist() for m, s in level.items()} for _ in range(8)
    ]
    return truth.tolist(), found


def test_the_rule_reads_every_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gm_nas, "picture", lambda *found: b"")
    truth, found = searches()
    assert gm_nas.judged(truth, found, True).verdict == "holds"
    assert "(all but 9)" in gm_nas.judged(truth, found, False).reason
    truth, found = searches(**{"one-shot, twice the epochs": 0.001})
    assert "(all but 4)" in gm_nas.judged(truth, found, True).reason
    truth, found = searches(**{"random split": 0.001})
    assert "(all but 2, 6, 8)" in gm_nas.judged(truth, found, True).reason
    truth, found = searches(**{gm_nas.GM: 3.0})
    assert gm_nas.judged(truth, found, False).verdict == "does not hold"


def test_a_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(400, 64, generator=g), torch.arange(400) % 10
    monkeypatch.setattr(gm_nas, "data", lambda: ((x[:80], y[:80]), (x, y), (x[:390], y[:390])))
    some = gm_nas.architectures()[::20]
    monkeypatch.setattr(gm_nas, "architectures", lambda: some)
    monkeypatch.setattr(gm_nas, "twins", lambda seed: [[[0, 1], [2, 3]]])
    settings = Settings(seeds=1, out=tmp_path, runs=tmp_path, workers=1, quiet=True)
    result = gm_nas.run(settings, fast=True)
    assert len(result.rows) == 2 * len(gm_nas.METHODS)
    assert result.pictures[0][1][:4] == b"\x89PNG"


def test_twins_end_in_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(1000, 64, generator=g), torch.arange(1000) % 10
    monkeypatch.setattr(gm_nas, "data", lambda: ((x, y), (x, y), (x, y)))
    monkeypatch.setattr(gm_nas, "REPEAT", 2)
    assert gm_nas.twins(0) == [[[0, 1], [2, 3]]] * 4


def test_epochs_are_equal() -> None:
    for method, options in gm_nas.METHODS.items():
        search = gm_nas.FewShotNAS(gm_nas.CellSpace(), **options)
        assert search._all_epochs() == (96 if "twice" in method else 48)
