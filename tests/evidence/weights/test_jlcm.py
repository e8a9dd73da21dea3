"""The experiment on a few images, and the arithmetic of its rule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gradmatch.core.examples import Examples
from gradmatch.evidence._common import Settings
from gradmatch.evidence.weights import jlcm


def figures(**changed: dict[str, float]) -> dict[str, list[dict]]:
    level = {
        "uniform, min-max": (0.5, 1.0),
        "uniform, MSE-optimal": (0.7, 0.5),
        "k-means": (0.7, 0.4),
        "codes learned": (0.75, 0.1),
        "joint, default gradient": (0.8, 0.05),
        "joint, sign alone": (0.84, 0.004),
        "joint, default, distance start": (0.84, 0.005),
    }
    made = {}
    for net in jlcm.NETS:
        made[net] = []
        for seed in range(3):
            arms = {}
            for arm in jlcm.ARMS:
                accuracy, error = level.get(arm, (0.85, 0.002))
                own = {"accuracy": accuracy + 0.001 * seed, "error": error, "bytes": 1000, "reload": 0.0}
                own |= {"predicted": 1000, "jump": 0.1, "moved": 0.02} if "uniform" not in arm else {}
                own |= changed.get(arm, {})
                arms |= {f"{arm}, {bits} bits": own for bits in jlcm.BITS}
            made[net].append({"float": 0.85 + 0.001 * seed, "arms": arms})
    return made


def test_the_rule_reads_every_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jlcm, "picture", lambda found: b"")
    assert jlcm.judged(figures()).verdict == "holds"
    broken = {
        "2": {"k-means, 4 groups": {"error": 0.5}},
        "5": {"joint, default gradient": {"error": 0.005, "accuracy": 0.8}},
        "8": {"joint, sign alone": {"error": 0.001}},
        "9": {"joint, default, distance start": {"error": 0.001}},
        "11": {"k-means": {"bytes": 1011}},
    }
    for number, changed in broken.items():
        result = jlcm.judged(figures(**changed))
        assert result.verdict == "holds in part"
        assert f"(all but {number})" in result.reason
    assert (
        "(all but 11)"
        in jlcm.judged(figures(**{"uniform, min-max": {"accuracy": 0.5, "reload": 0.01}})).reason
    )


def test_uniform_codes_are_evenly_spread_and_the_better_ones_have_less_error() -> None:
    net = jlcm.build(jlcm.mlp, 0)
    errors = []
    for optimal in (False, True):
        small = jlcm.uniform(net, 2, optimal)
        coded = small.coded["1"].coded
        gaps = coded.codes.float().diff()
        assert torch.allclose(gaps, gaps[0, 0].expand_as(gaps), rtol=1e-2)
        errors.append(float((small.coded["1"].weight - net[1].weight.detach()).square().sum()))
    assert errors[1] < errors[0]


def test_a_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(600) % 10
    whole = {"MLP": 28, "ConvNet": 14}
    data = {n: Examples(torch.rand(600, 1, s, s, generator=g), y, 10) for n, s in whole.items()}
    monkeypatch.setattr(jlcm, "_data", lambda net: (data[net], data[net]))
    monkeypatch.setattr(jlcm, "BITS", (2,))
    kept = ("uniform, min-max", "k-means", "joint, proximal")
    monkeypatch.setattr(jlcm, "ARMS", {k: jlcm.ARMS[k] for k in kept})
    settings = Settings(seeds=1, out=tmp_path, runs=tmp_path, workers=1, quiet=True)
    for net in jlcm.NETS:
        found = jlcm._one(settings, net, 0, True)
        assert set(found["arms"]) == {f"{k}, 2 bits" for k in kept}
        for arm in found["arms"].values():
            assert arm["reload"] < 1e-5
            assert arm["bytes"] == arm.get("predicted", arm["bytes"])
    assert len(jlcm._one(settings, "MLP", 0, True)["neurons k-means"][0]) == jlcm.SHOWN
