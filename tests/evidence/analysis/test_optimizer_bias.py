"""The rule's arithmetic, and one small run of every comparison."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from gradmatch.core.examples import Examples
from gradmatch.evidence._common import Row, Settings
from gradmatch.evidence.analysis import optimizer_bias as evidence
from gradmatch.zoo import mlp

MET = {
    "pairs, Shampoo: final_acc": 0.5,
    "pairs, Adam: final_acc": 0.3,
    "pairs, SGD: final_acc": 0.25,
    "pairs, Adagrad: final_acc": 0.4,
    "stopped, SGD, one epoch: final_acc": 0.26,
    "raw, Shampoo: final_acc": 0.4,
    "raw, Adam: final_acc": 0.2,
    "permuted, Shampoo: final_acc": 0.75,
    "permuted, Adam: final_acc": 0.7,
    "permuted, SGD: final_acc": 0.65,
    "pairs, Shampoo, averaged 0.995: final_acc": 0.4,
    "pairs, Shampoo, averaged 0.95: final_acc": 0.35,
    "pairs, Shampoo: class_cosine": 0.6,
    "pairs, Adam: class_cosine": 0.8,
    "pairs, Shampoo: activation_class_rank": 5.0,
    "pairs, Adam: activation_class_rank": 8.0,
    "pairs, Shampoo: weight_effective_rank": 90.0,
    "pairs, Adam: weight_effective_rank": 100.0,
    "sparsity, SGD: acc_pruned_90": 0.5,
    "sparsity, SGD, alpha 2: acc_pruned_90": 0.6,
    "one rate, Adam: acc_pruned_90": 0.4,
    "one rate, Adam, alpha 2 on the step: acc_pruned_90": 0.5,
    "sparsity, Adam: acc_pruned_90": 0.4,
    "sparsity, Adam, alpha 2 on the step: acc_pruned_90": 0.5,
    "sparsity, Adam, alpha 2 on the gradient: acc_pruned_90": 0.4,
}


def judged(**changed: float):
    rows = [Row(k, (v - 0.001, v, v + 0.001)) for k, v in (MET | changed).items()]
    return evidence._judged(rows, b"")


def test_all_met_holds():
    assert judged().verdict == "holds"
    assert "Conditions met: 16 of 16" in judged().reason


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pairs, SGD: final_acc", 0.51),
        ("stopped, SGD, one epoch: final_acc", 0.51),
        ("pairs, Adagrad: final_acc", 0.5),
        ("raw, Adam: final_acc", 0.41),
        ("permuted, Adam: final_acc", 0.76),
        ("permuted, SGD: final_acc", 0.76),
        ("pairs, Shampoo, averaged 0.995: final_acc", 0.29),
        ("pairs, Shampoo, averaged 0.95: final_acc", 0.3),
        ("pairs, Shampoo: class_cosine", 0.81),
        ("pairs, Shampoo: activation_class_rank", 8.1),
        ("pairs, Shampoo: weight_effective_rank", 101.0),
        ("sparsity, SGD, alpha 2: acc_pruned_90", 0.54),
        ("one rate, Adam, alpha 2 on the step: acc_pruned_90", 0.44),
        ("sparsity, Adam, alpha 2 on the step: acc_pruned_90", 0.44),
        ("sparsity, Adam, alpha 2 on the gradient: acc_pruned_90", 0.46),
    ],
)
def test_every_condition_counts(name, value):
    result = judged(**{name: value})
    assert result.verdict == "holds in part"
    assert "Conditions met: 15 of 16" in result.reason


def test_a_tiny_run_of_every_comparison(tmp_path, monkeypatch):
    """Easy images in place of Fashion-MNIST, small networks, one rate each, one seed, loose matching."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 10
    x = torch.rand(400, 1, 14, 14, generator=g) * 0.2
    for c in range(10):
        x[y == c, :, c : c + 4, c : c + 4] += 1
    data = Examples(x, y, 10)
    monkeypatch.setattr(evidence, "_images", lambda: (data, data))
    monkeypatch.setattr(evidence, "PER_CLASS", 40)
    monkeypatch.setattr(evidence, "EPOCHS", 1)
    for table in ("ON_PAIRS", "STOPPED", "ON_RAW", "ON_PERMUTED", "ON_ALL", "AT_ONE_RATE"):
        entries = {k: (f, r[-1:]) for k, (f, r) in getattr(evidence, table).items()}
        monkeypatch.setattr(evidence, table, entries)
    for name in ("network", "network_without_biases"):
        monkeypatch.setattr(evidence, name, partial(mlp, 196, (16,), 10))
    plain = evidence.compare_optimizers
    monkeypatch.setattr(
        evidence, "compare_optimizers", lambda *a, **o: plain(*a, **(o | {"tolerance": 1.0, "epochs": 1}))
    )
    with pytest.warns(UserWarning, match="seeds is 1"):
        result = evidence.run(Settings(seeds=1, runs=tmp_path, workers=1, quiet=True))
    assert result.verdict in ("holds in part", "does not hold")
    assert len(result.pictures[0][1]) > 30_000
    assert len({r.method for r in result.rows}) == len(result.rows) > 80
