"""The experiment of score estimation at toy size, and its rule on made-up figures."""

from __future__ import annotations

import copy

import pytest
import torch

from gradmatch.evidence._common import Settings
from gradmatch.evidence.analysis import score_estimation as experiment

SMALL = {
    "LONG": 40,
    "LONGER": 120,
    "MOST": 200,
    "HELD": 10,
    "PROBES": 40,
    "SAMPLES": 30,
    "TRAINED": 20,
    "DRAWN": 2,
    "OTHERS": 20,
    "COMPONENTS": 4,
    "WIDTHS": (16, 512, 600),
    "CELLS": (
        ("digits",),
        ("network", 200),
        ("form", "x0", 200),
        ("form", "score", 200),
        ("kernel", 800),
        ("kernel", 200),
    ),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Every figure of two seeds."""
    with pytest.MonkeyPatch.context() as m:
        for name, value in SMALL.items():
            m.setattr(experiment, name, value)
        settings = Settings(seeds=2, runs=tmp_path_factory.mktemp("runs"), workers=1, quiet=True)
        kept = {}
        m.setattr(experiment, "judged", kept.update)
        experiment.run(settings)
        return kept


def test_every_run_gives_what_the_rule_reads(found, monkeypatch):
    monkeypatch.setattr(experiment, "WIDTHS", SMALL["WIDTHS"])
    monkeypatch.setattr(
        experiment, "_conditions", lambda rows: {str(k): True for k in range(16)} if len(rows) > 30 else {}
    )
    result = experiment.judged(found)
    assert result.verdict == "holds"
    assert result.pictures[0][1][:4] == b"\x89PNG"
    assert len(result.rows[0].values) == 2
    first = found["kernel", 200][0]
    assert first["errors"]["least"] == pytest.approx(min(first["curve"]))
    assert first["errors"]["least"] <= min(first["errors"].values()) + 1e-12


def test_the_rule_judges_by_the_rows(found, monkeypatch):
    widths = experiment.WIDTHS
    made = copy.deepcopy(found)
    for run in made["network", 200]:
        run["coupling"] = {str(w): 1 / w for w in widths}
        run |= {"least": 0.1, "rule": 0.12, "long": 0.2}
    for count in (200, 800):
        for run in made["kernel", count]:
            values = (0.1, 0.1, 0.15, 0.3, 0.4, 0.5)
            run["errors"] = dict(zip(run["errors"], values, strict=True))
    for target, level in (("x0", 1.0), ("score", 2.0)):
        for run in made["form", target, 200]:
            run |= {"weighted": level, "plain": level}
    for run in made["digits",]:
        for name, (loss, mmd) in {"hold-out": (1, 0.3), "100,000 steps": (2, 0.1)}.items():
            run["at"][name] |= {"loss": loss, "mmd": mmd}
    for runs in made.values():  # no two seeds alike, so that differences have a noise
        for shift, run in enumerate(runs):
            if "errors" in run:
                run["errors"] = {k: v * (1 + 0.01 * shift) for k, v in run["errors"].items()}
    result = experiment.judged(made)
    assert result.verdict == "holds in part"
    assert "14 of 16" in result.reason
    assert "rule with norm 1 near the least" in result.reason
    assert "digits sampled as well at the stop" in result.reason


def test_mmd_is_zero_for_one_distribution_and_not_for_two():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(300, 3, generator=g) for _ in range(2))
    assert abs(experiment.mmd(a, b)) < 0.01
    assert experiment.mmd(a + 1, b) > 0.1
