"""The experiment's trainings at a tiny size, and the arithmetic of its rule."""

from __future__ import annotations

import copy

import pytest
import torch

from gradmatch.core.examples import Examples
from gradmatch.evidence.analysis import _spectrum_runs as runs
from gradmatch.evidence.analysis import hessian_spectrum as evidence

DESCEND = runs.descend


def quick(net, x, y, steps, *, every=0, **options):
    """Three steps of what takes thousands."""
    return DESCEND(net, x, y, min(steps, 3), every=min(every, 1), **options)


def ideal(cell: tuple) -> dict:
    """What a run would give if the claim held."""
    name = cell[0]
    if name == "classes":
        c = cell[2]
        curve = [[0.0, 1.0], [1.0, 0.5]]
        return {"gap": c - 1, "ratio": 5.0, "loss": 0.3, "top": [4.0 / k for k in range(1, 25)], "low": [-0.2, -0.01],
                "residual": [0.4, 0.1], "energy": 0.7, "curves": [curve, curve]}  # fmt: skip
    if name == "blobs":
        return {"gap": cell[1], "ratio": 2.0, "count": 2 * cell[1], "top": [1.0]}
    if name == "widths":
        return {"share": 0.7 + cell[1] / 1000, "top": 5.0, "count": 9, "loss": 0.6, "values": [1.0, 0.1]}
    if name == "overlap":
        return {"top": 1 / cell[1], "count": 20 - cell[1], "loss": 0.1, "values": [1.0, 0.5]}
    if name == "quadrature":
        return {"kappa": 0.01, "pyhessian": 0.02, "curves": [[0.0, 1.0], [1.0, 1.0], [1.0, 0.9]]}
    one = {"barrier": 0.0, "midpoint": -0.01, "distance": 3.0, "losses": [0.4, 0.3, 0.3], "path": [0.5, 0.3]}
    return {"64": dict(one), "16": dict(one)} | (
        {"independent": {"barrier": 0.4, "losses": [0.4, 0.8, 0.4]}} if cell[1] else {}
    )


def everything() -> evidence.Found:
    found = {cell: [copy.deepcopy(ideal(cell)) for _ in range(3)] for cell in evidence.cells()}
    for cell, values in found.items():
        for key in ("share", "top", "count"):
            for k, v in enumerate(values):
                if cell[0] in ("blobs", "widths", "overlap") and key in v and not isinstance(v[key], list):
                    v[key] += 1e-4 * k  # some noise between the seeds
    return found


def test_the_rule_reads_every_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "picture", lambda found: b"")
    result = evidence.judged(everything())
    assert (result.verdict, result.reason) == ("holds", "25 of 25 conditions met.")
    changes = [(("classes", s, c, p), "gap", c) for (s, p), cs in evidence.COUNTS.items() for c in cs]
    changes += [(("blobs", k), "gap", k + 1) for k in (2, 3, 5)]
    changes += [(("blobs", 3), "count", 4), (("widths", 40), "share", 0.1), (("widths", 60), "count", 12)]
    changes += [(("overlap", 2.0), "top", 0.1), (("overlap", 4.0), "count", 1)]
    five = ("classes", "fashion", 5, "raw")
    changes += [(five, "residual", [0.1, 0.4]), (five, "low", [-0.01, -0.2])]
    for cell, key, value in changes:
        broken = everything()
        for v in broken[cell]:
            v[key] = value
        result = evidence.judged(broken)
        assert result.verdict == "holds in part"
        assert result.reason.startswith("24 of 25"), (cell, key, result.reason)
    for momentum, steps in evidence.BASINS.items():
        for batch in ("64", "16"):
            broken = everything()
            broken["basins", momentum, steps][1][batch]["barrier"] = 0.02  # one seed is enough
            assert evidence.judged(broken).reason.startswith("24 of 25")


def test_the_picture_is_drawn() -> None:
    assert evidence.picture(everything())[:4] == b"\x89PNG"


def test_every_run_gives_what_the_rule_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(700) % 10
    x = torch.rand(700, 1, 28, 28, generator=generator) * 0.2
    x[torch.arange(700), 0, y * 2, :] = 1.0
    monkeypatch.setattr(runs, "_fashion", lambda: Examples(x, y, 10))
    monkeypatch.setattr(runs, "IMAGES", 60)
    monkeypatch.setattr(runs, "BASIN_IMAGES", 200)
    monkeypatch.setattr(runs, "STOPS", {2: 0.5, 10: 2.2})
    monkeypatch.setattr(runs, "descend", quick)
    for cell in [
        ("classes", "fashion", 2, "raw"),
        ("blobs", 2),
        ("widths", 4),
        ("overlap", 4.0),
        ("quadrature",),
    ]:
        found = runs.RUNS[cell[0]](0, *cell[1:])
        assert ideal(cell).keys() <= found.keys(), cell
    found = runs.basins(0, 0.9, 2)
    assert ideal(("basins", 0.9, 150)).keys() == found.keys()
    assert len(found["64"]["path"]) >= 1


def test_training_stops_at_the_loss_and_walks_all_data() -> None:
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)).double()
    y = (x[:, 0] > 0).long()
    net = runs.tanh_net(4, 6, 2, 0)
    assert abs(net[0].weight.std().item() - 0.5) < 0.15
    assert net[0].bias.abs().max().item() == 0
    runs.descend(net, x, y, 5000, lr=0.1, momentum=0.9, stop=0.3)
    loss = float(torch.nn.functional.cross_entropy(net(x), y).detach())
    assert 0.25 < loss <= 0.3
    path = runs.descend(net, x, y, 20, lr=0.1, batch=8, every=5)
    assert len(path) == 4
    again = runs.tanh_net(4, 6, 2, 0)
    assert torch.equal(again[0].weight, runs.tanh_net(4, 6, 2, 0)[0].weight)
