"""The experiment end to end on a few small images, and the arithmetic of its rule."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from gradmatch.core.examples import Examples
from gradmatch.evidence._common import Settings
from gradmatch.evidence.analysis import convergent_learning as evidence

LAYER: dict[str, Any] = {
    "one2one": 0.75, "semi": 0.8, "chance": 0.02, "common": 0.9, "unique": 0.06, "ridge": 0.1, "single": 0.3,
    "cka": 0.9, "mixed": 0.15, "turned": 0.6, "dead": 2, "losses": [0.2, 0.15, 0.12, 0.1],
    "nonzero": [6.0, 13.0, 30.0, 58.0], "shuffled": [1.0, 1.5, 2.0, 3.0], "units": 256.0, "clusters": 2, "shared": 1.0,
}  # fmt: skip


def kind(name: str, k: float) -> dict[str, Any]:
    """One pair by which every condition is met."""
    layers = [copy.deepcopy(LAYER) for _ in range(3)]
    for depth, layer in enumerate(layers):
        layer["one2one"] += k
        if "untrained" in name:
            layer |= {"one2one": 0.4 + k, "ridge": 0.5, "single": 0.75}
        if name == "ConvNet":
            layer["one2one"] = (0.8, 0.6, 0.7)[depth] + k
            layer["nonzero"] = [v + 2 * depth for v in layer["nonzero"]]
        if name.startswith("MLP"):
            layer |= {"mi share": 0.98, "mi same": 0.9}
    found: dict[str, Any] = {"accuracy": [0.8, 0.8], "layers": layers}
    if name == evidence.KINDS[0]:
        weights = [[0.1 * i for i in range(9)]] * 4
        found |= {"weights": {"scores": [0.9, 0.7, 0.4, 0.1], "a": weights, "b": weights}}
    return found


def runs() -> dict[str, list[dict[str, Any]]]:
    return {name: [kind(name, k) for k in (0.0, 0.01)] for name in evidence.KINDS}


@pytest.mark.parametrize(
    ("where", "layer", "change", "condition"),
    [
        ("MLP, decay 5e-4", 1, {"one2one": 0.39}, "above untrained"),
        ("MLP, decay 3e-3", 2, {"unique": 0.0}, "most match, some do not"),
        ("MLP, decay 3e-3", 2, {"common": 0.45}, "most match, some do not"),
        ("MLP, decay 5e-4", 0, {"losses": [0.4] * 4}, "few units beat one"),
        ("MLP, decay 5e-4", 0, {"nonzero": [30.0] * 4}, "few units beat one"),
        ("MLP, untrained", 1, {"ridge": 0.2}, "subspaces are shared"),
        ("MLP, decay 3e-3", 0, {"mixed": 0.8}, "mixing breaks the match"),
        ("MLP, decay 3e-3", 1, {"mi share": 0.9}, "information agrees"),
        ("ConvNet", 1, {"one2one": 0.75}, "first and last convolution match best"),
        ("ConvNet", 2, {"nonzero": [14.0] * 4}, "deeper convolutions need more units"),
    ],
)
def test_the_rule_reads_every_condition(
    where: str, layer: int, change: dict[str, Any], condition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "picture", lambda *_: b"")
    assert evidence._judged(runs()).verdict == "holds"
    changed = runs()
    for pair in changed[where]:
        pair["layers"][layer] |= change
    result = evidence._judged(changed)
    assert result.verdict == "holds in part"
    assert f"met: 7 of 8; not met: {condition}." in result.reason


def test_the_whole_experiment_on_a_few_images(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    x = torch.rand(300, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    y = torch.arange(300) % 10
    x[torch.arange(300), 0, y] += 1
    examples = Examples(x, y, 10)
    monkeypatch.setattr(evidence, "data", lambda: (examples, examples))
    for name in ("EPOCHS", "CONV_EPOCHS"):
        monkeypatch.setattr(evidence, name, 1)
    monkeypatch.setattr(evidence, "WIDTH", 24)
    result = evidence.run(Settings(seeds=1, workers=1, quiet=True, out=tmp_path, runs=tmp_path))
    assert result.verdict in ("does not hold", "holds in part")  # one seed proves nothing
    assert len(result.rows) == 4 * 3 * 7 + 2 * 3 * 6
    assert result.pictures[0][1].startswith(b"\x89PNG")
