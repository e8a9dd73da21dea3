"""The rule's arithmetic, the AUC, and one small run of every part."""

from __future__ import annotations

import itertools

import pytest
import torch

from gradmatch.core.examples import Examples
from gradmatch.evidence._common import Row, Settings
from gradmatch.evidence.analysis import coherence as evidence


def rows(**changed: tuple[float, ...]) -> list[Row]:
    """Rows by which every condition is met, but for those named."""
    found = {}
    for scaling, epoch, (labels, level) in itertools.product(
        ("centred", "standardised"), evidence.EPOCHS, {"real": 9.0, "50% noise": 3.0, "random": 1.0}.items()
    ):
        level = 5.0 - level if epoch == 60 else level
        found[f"m-coherence, {labels}, epoch {epoch}, {scaling}"] = (level, level + 0.1)
    for epoch in evidence.SCORE_EPOCHS:
        found[f"AUC of wrong labels, class, epoch {epoch}, centred"] = (0.9, 0.91)
    for robust, plain in evidence.PAIRS:
        for rates in ("", ", own rate"):
            found[f"{robust}, 50% noise{rates}"] = (0.7, 0.71)
            found[f"{plain}, 50% noise{rates}"] = (0.6, 0.61)
        found[f"{robust}, clean"] = (0.81, 0.81)
        found[f"{plain}, clean"] = (0.82, 0.82)
        found[f"{plain}, 50% noise, stopped on held-out noisy labels"] = (0.75, 0.75)
    return [Row(k, v) for k, v in (found | changed).items()]


def judged(**changed: tuple[float, ...]):
    return evidence._judged(rows(**changed), {m: 0.1 for pair in evidence.PAIRS for m in pair}, b"")


def test_all_met_holds_and_says_that_the_order_turns_round():
    result = judged()
    assert result.verdict == "holds"
    assert "Conditions met: 8 of 8" in result.reason
    assert "has turned round" in result.reason


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("m-coherence, 50% noise, epoch 2, centred", (3.0, 0.5)),
        ("winsorised c=2, batch 50, 50% noise", (0.64, 0.65)),
        ("winsorised c=2, batch 50, 50% noise", (0.6, 0.9)),
        ("M3 of 3 x 5, 50% noise, own rate", (0.64, 0.65)),
        ("M3 of 3 x 5, clean", (0.79, 0.79)),
        ("AUC of wrong labels, class, epoch 10, centred", (0.79, 0.8)),
    ],
)
def test_every_condition_counts(name, values):
    result = judged(**{name: values})
    assert result.verdict == "holds in part"
    assert "Conditions met: 7 of 8" in result.reason


def test_what_is_shown_is_not_judged():
    assert judged(**{"m-coherence, real, epoch 1, standardised": (0.0, 0.0)}).verdict == "holds"


def test_auc_counts_pairs_with_ties_as_halves():
    wrong, scores = torch.tensor([True, False, True, False]), torch.tensor([3.0, 1.0, 1.0, 2.0])
    pairs = [(3, 1), (3, 2), (1, 1), (1, 2)]
    assert evidence.auc(wrong, scores) == sum((a > b) + 0.5 * (a == b) for a, b in pairs) / 4


def test_a_tiny_run_of_every_part(tmp_path, monkeypatch):
    """Random images in place of Fashion-MNIST, two epochs, one seed."""
    g = torch.Generator().manual_seed(0)
    data = Examples(torch.rand(300, 1, 28, 28, generator=g), torch.arange(300) % 10, 10)
    monkeypatch.setattr(evidence, "_all", lambda: (data, data))
    monkeypatch.setattr(evidence, "PER_CLASS", 9)
    monkeypatch.setattr(evidence, "HELD", 2)
    monkeypatch.setattr(evidence, "EPOCHS", (0, 1, 2, 5, 10, 60))
    monkeypatch.setattr(evidence, "RATES", (0.1,))
    short = {k: (m, b, 2, o) for k, (m, b, _, o) in evidence.METHODS.items()}
    monkeypatch.setattr(evidence, "METHODS", short)
    evidence._data.cache_clear()
    result = evidence.run(Settings(seeds=1, runs=tmp_path, workers=1, quiet=True))
    evidence._data.cache_clear()
    assert result.verdict in ("holds in part", "does not hold")
    assert len(result.pictures[0][1]) > 20_000
    assert len([r for r in result.rows if "own rate" in r.method]) == 4
