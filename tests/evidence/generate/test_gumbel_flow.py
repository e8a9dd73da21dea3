"""The experiment's measures, the arithmetic of its rule, and a run of the smallest size."""

from __future__ import annotations

import pytest
import torch

from gradmatch.evidence._common import Row, Settings
from gradmatch.evidence.generate import _gumbel_parts as parts
from gradmatch.evidence.generate import gumbel_flow as gumbel

TINY = gumbel.Budget(2, (3, 5), 200, 3, 16, 8, 60, 3, 2, 8, 60)


@pytest.fixture
def result(tmp_path):
    return gumbel.experiment(Settings(seeds=2, out=tmp_path, workers=1, quiet=True), TINY)


def test_it_runs_from_end_to_end_and_the_rule_counts_every_condition(result):
    assert result.verdict in ("holds", "holds in part", "does not hold")
    assert result.pictures[0][1].startswith(b"\x89PNG")
    rows = {r.method: r for r in result.rows}

    def at(name: str) -> float:
        if "vowels" in name:
            levels = {"scale 0": 4.0, "scale 1": 5.0, "scale 3": 6.0, "scale 10": 7.0, "random": 4.0}
            return next((v for k, v in levels.items() if name.endswith(k)), 1.0)
        return 0.1 if "published" in name and "argmax" not in name else 1.0

    def judged(**changed: float):
        found = [Row(n, (changed.get(n, at(n)),) * 2) for n in rows]
        return gumbel.judge(found, TINY)

    assert judged()[0] == "holds"
    assert "14 of 14" in judged()[1]
    worse = {
        "K 3: published, argmax_x": 0.01,
        "K 3: linear, posterior": 0.05,
        "K 5: published, ten steps": 0.2,
        "near-uniform K 5: uniform": 0.15,
        "text 2-gram: linear": 0.05,
        "guidance, vowels: random": 9.0,
    }
    for name, value in worse.items():
        assert "13 of 14" in judged(**{name: value})[1], name


def test_measures():
    p, tokens = parts.toy(4, 2, True, 100_000, 0)
    assert parts.position_kl(p, tokens) < 1e-3
    uniform = torch.randint(4, tokens.shape, generator=torch.Generator().manual_seed(0))
    assert parts.position_kl(p, uniform) == pytest.approx(parts.uniform_kl(p), rel=0.05)
    held = torch.tensor([[0, 1, 0, 1]] * 500)
    assert parts.gram_kl(held, held, 2, k=2) < 0.01
    assert parts.gram_kl(held, held.flip(1) * 0, 2, k=2) > 1
    text = torch.tensor([[parts.LETTERS.index(c) for c in "a bee"]])
    assert parts.vowels(text).tolist() == [3.0]
    train, test = parts.windows(16, 100)
    assert train.shape == (100, 16)
    assert int(test.max()) < 27
