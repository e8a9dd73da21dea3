"""The experiment end to end on a few small images, and the arithmetic of its rule."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from gradmatch.core.examples import Examples
from gradmatch.evidence._common import Settings
from gradmatch.evidence.weights import weight_matching as wm
from gradmatch.weights import _ste

PATH = {"barrier": 1.0, "gap": 1.0, "losses": [0.1, 1.0, 0.1], "accuracies": []}


def path(barrier: float) -> dict[str, Any]:
    return PATH | {"barrier": barrier, "gap": barrier}


R = dict(zip(wm.METHODS, (0.0, 0.0, 0.2, 0.15, 0.08), strict=True))
BARRIERS = dict(zip(wm.METHODS, (1.5, 1.5, 0.08, 0.07, 0.09), strict=True))
THIRD = dict(zip(wm.METHODS, (1.5, 1.5, 0.19, 0.12, 0.27), strict=True))


def triple(k: float) -> dict[str, Any]:
    return {
        m: {
            "path": path(BARRIERS[m] + k),
            "third": THIRD[m] + k,
            "test": [0.4, 0.8],
            "reduction": 16.0,
            "R": R[m] + k,
            "R0": R[m] / 2,
            "merged": [0.66 + k, 0.70 + k],
            "taylor": 3 * BARRIERS[m],
            "overlaps": [[0.1, 0.2], [0.3, 0.4]],
        }
        for m in wm.METHODS
    }


def pair(k: float, aligned: float) -> dict[str, Any]:
    report = {"reduction": 40.0, "R": aligned + k, "R before": 0.0, "R0": 0.05, "merged": [0.7, 0.9]}
    return {
        "naive": {"path": path(1.4 + k), "test": [1.0, 0.5]},
        "weight matching": report | {"path": path(0.05 + k), "test": [0.4, 0.8]},
        "energy": [[0.5, 0.1]] * 4,
    }


def parts() -> wm.Parts:
    """Two seeds in which every condition is met."""
    seeds = (0.0, 0.01)
    found = {
        name: [pair(k, r) for k in seeds] for name, r in (("none", 0.15), ("3e-3", 0.6), ("control", 0.1))
    }
    convs = [{name: path(0.5 if name == "naive" else 0.05 + k) for name in wm.CONVS} for k in seeds]
    return found | {"triple": [triple(k) for k in seeds], "convs": convs}


def judged(found: wm.Parts) -> Any:
    return wm._judged(wm._rows(found), found)


@pytest.mark.parametrize(
    ("where", "value", "condition"),
    [
        (("3e-3", "weight matching", "path", "barrier"), 0.2, "barrier under a tenth"),
        (("triple", "weight matching", "reduction"), 60.0, "distance falls by less than half"),
        (("triple", "naive", "taylor"), 1.5, "second order misses"),
        (("triple", "weight matching", "R0"), 0.3, "leading directions align"),
        (("triple", "weight matching", "merged", 1), 0.5, "the matched average is nearer in direction"),
        (("triple", "straight-through", "R"), 0.18, "straight-through aligns less"),
        (("triple", "straight-through", "third"), 0.1, "straight-through fails for three"),
        (("none", "weight matching", "R"), 0.3, "decay aligns"),
        (("convs", "weight matching", "barrier"), 0.4, "ConvNets"),
    ],
)
def test_the_rule_reads_every_condition(
    where: tuple[Any, ...], value: float, condition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wm, "_picture", lambda _: b"")
    assert judged(parts()).verdict == "holds"
    changed = copy.deepcopy(parts())
    for run in changed[where[0]]:
        for key in where[1:-1]:
            run = run[key]
        run[where[-1]] = value
    result = judged(changed)
    assert result.verdict == "holds in part"
    assert f"met: 8 of 9; not met: {condition}." in result.reason


def test_the_whole_experiment_on_a_few_images(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    x = torch.rand(256, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    y = torch.arange(256) % 10
    x[torch.arange(256), 0, y] += 1
    examples = Examples(x, y, 10)
    monkeypatch.setattr(wm, "data", lambda: (examples, examples))
    for name, value in (
        ("EPOCHS", 2),
        ("CONV_EPOCHS", 1),
        ("CONV_WIDTH", 4),
        ("WIDTH", 12),
        ("POINTS", 3),
        ("FEW", 3),
    ):
        monkeypatch.setattr(wm, name, value)
    monkeypatch.setitem(_ste.DEFAULTS, "sinkhorn", _ste._Defaults(0.1, 64, 1))
    result = wm.run(Settings(seeds=1, workers=1, quiet=True, out=tmp_path, runs=tmp_path))
    assert result.verdict in ("does not hold", "holds in part")  # one seed proves nothing
    assert len(result.rows) > 30
    assert result.row("barrier, MLP, decay 5e-4, naive").mean >= 0
    assert result.pictures[0][1].startswith(b"\x89PNG")
