"""The experiment's inputs, the arithmetic of its rule, and a run of the smallest size on made-up images."""

from __future__ import annotations

import pytest
import torch

from gradmatch.core.examples import Examples
from gradmatch.datasets import Split
from gradmatch.evidence._common import Row, Settings
from gradmatch.evidence.optim import tract
from gradmatch.optim import apply_tract
from gradmatch.optim.tract import TrActLayer

TINY = tract.Budget(2, 10, 5, {"mlp": (1, 2), "conv": (1,)}, 20)


def rows(budget: tract.Budget, **changed: float) -> list[Row]:
    """TrAct a point above plain everywhere, and half the steps."""

    def row(name: str, level: float) -> Row:
        return Row(name, tuple(level + 0.01 * k for k in range(3)))

    steps = {m: 100.0 if m == tract.PLAIN else 50.0 for m in tract.CONDITIONED}
    found = [row(f"steps, best rate: {m}", changed.get("steps", v)) for m, v in steps.items()]
    for arm in tract.arms(budget):
        level = 80.0 if arm.method == tract.PLAIN else 81.0
        found.append(row(str(arm), changed.get(str(arm), level)))
    return found


def test_the_rule_counts_every_condition():
    budget = tract.SMALL
    verdict, reason = tract.judge(rows(budget), budget)
    assert verdict == "holds"
    # 1 steps, 14 equal epochs (6 mlp, 6 conv, 2 vit), 9 at twice (4, 4, 1), 2 standardised, 2 whitened, 3 lambdas
    assert "31 of 31" in reason
    worse = {
        "steps": ({"steps": 100.0}, 1),
        "equal and twice": ({str(tract.Arm("mlp", "sgd", 2, tract.TRACT)): 79.0}, 3),
        "standardised": ({str(tract.Arm("mlp", "sgd", 2, tract.TRACT, "standardised images")): 80.0}, 1),
        "whitened": ({str(tract.Arm("mlp", "sgd", 2, tract.PLAIN, "ZCA whitened")): 82.0}, 1),
        "lambda": ({str(tract.Arm("mlp", "adam", 2, "TrAct 10")): 82.5}, 1),
    }
    for name, (changed, lost) in worse.items():
        verdict, reason = tract.judge(rows(budget, **changed), budget)
        assert verdict == "holds in part", name
        assert f"{31 - lost} of 31" in reason, name


def test_contrast_keeps_pixels_in_range_and_the_alternatives_undo_it():
    x = torch.rand(50, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    plain = Examples(x, torch.zeros(50, dtype=torch.long), 1)
    changed = tract.with_contrast(plain, torch.Generator().manual_seed(1))
    assert float(changed.x.min()) >= 0
    assert float(changed.x.max()) <= 1
    assert not torch.allclose(changed.x, x, atol=0.1)
    torch.testing.assert_close(tract.per_image(changed).x, tract.per_image(plain).x, rtol=1e-3, atol=1e-3)


def test_inputs_are_as_ill_conditioned_as_said():
    x, y = tract.ill_conditioned(0, 20000)
    spectrum = torch.linalg.eigvalsh(x.T @ x / len(x)).flip(0)
    torch.testing.assert_close(spectrum, torch.logspace(0, -3, 20), rtol=0.1, atol=0)
    assert y.shape == (20000, 3)


@pytest.mark.parametrize("net", tract.NETWORKS)
def test_every_network_takes_tract_in_its_first_layer(net):
    network = apply_tract(tract.NETWORKS[net]())
    assert network(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    assert isinstance(next(m for m in network.modules() if hasattr(m, "weight")), TrActLayer)


@pytest.fixture
def made_up(monkeypatch):
    g = torch.Generator().manual_seed(0)
    parts = [Examples(torch.rand(200, 1, 28, 28, generator=g), torch.arange(200) % 10, 10) for _ in range(2)]
    monkeypatch.setattr(tract, "fashion_mnist", lambda: Split(*parts, tuple("abcdefghij"), "made up"))
    tract.images.cache_clear()
    yield
    tract.images.cache_clear()


def test_it_runs_from_end_to_end(made_up, tmp_path):
    result = tract.experiment(Settings(seeds=2, out=tmp_path, workers=1, quiet=True), TINY)
    assert result.verdict in ("holds", "holds in part", "does not hold")
    assert len(result.rows) == len(tract.CONDITIONED) + len(tract.arms(TINY))
    assert result.row("steps, best rate: plain").values == (20.0, 20.0)
    assert result.pictures[0][1].startswith(b"\x89PNG")
