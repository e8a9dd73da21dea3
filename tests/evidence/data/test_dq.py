"""The experiment's data and the arithmetic of its rule, without the data set."""

from __future__ import annotations

import pytest
import torch

from gradmatch.core.examples import Examples
from gradmatch.evidence._common import Row
from gradmatch.evidence.data import dq

CELLS = [(data, ratio, model) for data in dq.DATA for ratio in dq.RATIOS for model in dq.MODELS]
LEVEL = {
    "random": 0.7,
    "graph cut one-shot": 0.6,
    "facility location one-shot": 0.7,
    "herding": 0.75,
    "DQ": 0.8,
}


def rows(**changed: float) -> list[Row]:
    level = {**LEVEL, "DQ on PCA-50": 0.7, **{k.replace("_", " "): v for k, v in changed.items()}}
    found = [
        Row(f"{m}, {d} {r:.0%}, {k}", (level[m], level[m] + 0.01, level[m] - 0.01))
        for d, r, k in CELLS
        for m in dq.METHODS
    ]
    for by, value in (("GradCAM", level.get("GradCAM", 0.9)), ("random", 0.8)):
        found += [Row(f"patches dropped by {by}, {fill} fill, ConvNet", (value,) * 3) for fill in dq.FILLS]
    return found


def test_the_rule_reads_every_condition() -> None:
    assert dq._judged(rows(), CELLS).verdict == "holds"
    broken = {"random": 0.81}, {"herding": 0.8}, {"GradCAM": 0.8}, {"facility location one-shot": 0.8}
    for changed in (*broken, {"random": 0.59}):
        result = dq._judged(rows(**changed), CELLS)
        assert result.verdict == "holds in part", changed
        assert "met: 5 of 6" in result.reason
    one_cell = rows()
    at = next(i for i, r in enumerate(one_cell) if r.method == "DQ, redundant 2%, MLP")
    one_cell[at] = Row(one_cell[at].method, (0.5, 0.5, 0.5))
    assert "11 of 12 cells" in dq._judged(one_cell, CELLS).reason
    assert dq._judged(one_cell, CELLS).verdict == "holds in part"
    worst = dq._judged(rows(DQ=0.1, random=0.5, GradCAM=0.1), CELLS)
    assert worst.verdict == "does not hold"


def test_near_duplicates_fill_half_of_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dq, "PER_CLASS", 9)
    x = torch.rand(90, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    found = dq._with_duplicates(Examples(x, torch.arange(90) % 10, 10), 0)
    assert torch.bincount(found.y).tolist() == [9] * 5 + [3] * 5
    originals, copies = found.x[:30], found.x[30:]
    shifts = [torch.roll(originals, s, (2, 3)) for s in ((0, 1), (1, 0), (0, -1), (-1, 0))]
    nearest = torch.stack([torch.cdist(copies.flatten(1), s.flatten(1)) for s in shifts]).amin((0, 2))
    assert bool((nearest / 6 < 0.03).all())  # noise of 0.02 a pixel, 36 pixels
    assert float(copies.min()) >= 0 and float(copies.max()) <= 1  # noqa: PT018


def test_coverage_is_the_distance_to_the_nearest_kept_of_the_class() -> None:
    rows_ = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]]), dim=1
    )
    y = torch.tensor([0, 0, 0, 1])
    assert dq._coverage(rows_, y, torch.tensor([0, 3])) == pytest.approx((0 + 1 + 1 - 0.5**0.5 + 0) / 4)


def test_models_train_with_equal_updates() -> None:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(100) % 10
    x = (torch.rand(100, 1, 28, 28, generator=g) * 0.1).flatten(1)
    x[torch.arange(100), y * 10] = 1.0
    x = x.reshape(100, 1, 28, 28)
    for model, setting in (("MLP", 0.1), ("logistic regression", 1.0)):
        assert dq._trained(model, x, y, Examples(x, y, 10), setting, 0) > 0.9
