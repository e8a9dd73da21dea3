"""The experiment's rule, and a tiny run of each of its parts."""

from __future__ import annotations

import pytest
import torch

from gradmatch.evidence._common import Settings
from gradmatch.evidence.optim import _dct_lowrank_picture, dct_lowrank
from gradmatch.evidence.optim.dct_lowrank import (
    ADAMW,
    DCT,
    FEEDBACK,
    FIXED,
    GRADIENTS,
    IMAGES,
    KINDS,
    METHODS,
    RANDOM,
    RATES,
    SLOW,
    STILL,
    SVD,
    TEXT,
)

LOSS = {ADAMW: 2.29, SVD: 2.3, SLOW: 2.31, DCT: 2.3, FEEDBACK: 2.29, STILL: 2.33, RANDOM: 2.35, FIXED: 2.36}
ERROR = {SVD: 0.1, DCT: 0.12, RANDOM: 0.5, FIXED: 0.8}
N, D, R = 1024, 784, 98
BYTES = {
    ADAMW: 8 * N * D,
    SVD: 8 * N * R + 4 * D * R,
    DCT: 8 * N * R + 4 * R,
    FEEDBACK: 8 * N * R + 4 * R + 4 * N * D,
}
TIMES = {
    "SVD": {512: 40.0, 1024: 300.0},
    "DCT by products": {512: 3.0, 1024: 20.0},
    "DCT by FFT": {512: 1.0, 1024: 9.0},
}


def found(**changed: float) -> dct_lowrank.Found:
    """Losses at every rate; a change is named METHOD_TASK."""
    table = {}
    for task in RATES:
        for method in dct_lowrank._methods(task):
            level = changed.get(f"{method}_{task}", LOSS[method])
            table[task, method] = {
                rate: [(level, level + 0.001 * s) for s in range(3)] for rate in RATES[task]
            }
    return table


def errors(**changed: dict[str, float]) -> list[dict[str, dict[str, float]]]:
    return [{name: ERROR | changed.get(name, {}) for name in (*KINDS, *GRADIENTS)}] * 3


def judged(table=None, shares=None, held=BYTES, times=TIMES):
    return dct_lowrank._judged(table or found(), shares or errors(), held, times)


def test_the_rule_reads_every_condition() -> None:
    assert judged().verdict == "holds"
    cases = (
        ({1}, judged(shares=errors(**{KINDS[1]: {DCT: 0.16}}))),
        ({2}, judged(shares=errors(**{KINDS[2]: {DCT: 0.16}}))),
        ({3}, judged(shares=errors(**{GRADIENTS[0]: {RANDOM: 0.12}}))),
        ({4}, judged(shares=errors(**{GRADIENTS[2]: {RANDOM: 0.12}}))),
        ({5}, judged(found(**{f"{DCT}_{TEXT}": 2.325}))),
        ({6, 8, 10}, judged(found(**{f"{FEEDBACK}_{TEXT}": 2.33}))),
        ({7}, judged(found(**{f"{RANDOM}_{TEXT}": 2.3}))),
        ({7}, judged(found(**{f"{FIXED}_{TEXT}": 2.3}))),
        ({8}, judged(found(**{f"{FEEDBACK}_{TEXT}": 2.3}))),
        ({9}, judged(found(**{f"{STILL}_{TEXT}": 2.3}))),
        ({10}, judged(found(**{f"{ADAMW}_{TEXT}": 2.2}))),
        ({11}, judged(found(**{f"{SLOW}_{IMAGES}": 2.29}))),
        ({12}, judged(found(**{f"{FIXED}_{IMAGES}": 2.3}))),
        ({13}, judged(held=BYTES | {DCT: 8 * N * R + 8 * R})),
        ({14}, judged(times=TIMES | {"SVD": {512: 0.5, 1024: 300.0}})),
    )
    for failed, result in cases:
        met = ", ".join(str(i) for i in range(1, 15) if i not in failed)
        assert result.reason.startswith(f"{14 - len(failed)} of 14 conditions met ({met})."), failed
        assert result.verdict == "holds in part"
    assert not result.higher_is_better


def test_rates_are_chosen_on_held_out_data() -> None:
    table = found()
    table[TEXT, DCT] = {3e-3: [(2.0, 9.0)] * 3, 1e-2: [(1.9, 5.0)] * 3, 3e-2: [(2.1, 1.0)] * 3}
    row = judged(table).row(f"{DCT}, {TEXT}")
    assert row.values == (5.0, 5.0, 5.0)
    assert row.cost == "rate 0.01"


def test_matrices_are_what_they_are_called() -> None:
    smooth = dct_lowrank.matrix(KINDS[1], 0, n=4000)
    correlation = torch.corrcoef(smooth.T)
    assert float(correlation[5, 6]) == pytest.approx(0.905, abs=0.02)
    values = torch.linalg.svdvals(dct_lowrank.matrix(KINDS[2], 0))
    assert float(values[3] / values[4]) > 3
    for name in dct_lowrank.PROJECTORS:
        assert 0 < dct_lowrank.error(name, smooth[:64], 16) < 1
    assert dct_lowrank.error(DCT, smooth, 16) < 0.1


def test_low_rank_is_where_it_should_be() -> None:
    net = dct_lowrank.Characters()
    optimizer = dct_lowrank.optimizer_of(TEXT, DCT, net, 1e-2)
    low, rest = (group["params"] for group in optimizer.param_groups)
    assert len(low) == 8
    assert sum(p.numel() for p in (*low, *rest)) == sum(p.numel() for p in net.parameters())
    images = dct_lowrank.optimizer_of(IMAGES, SLOW, dct_lowrank.mlp((784, 1024, 256, 10)), 1e-2)
    assert [tuple(p.shape) for p in images.param_groups[0]["params"]] == [(1024, 784), (256, 1024)]
    assert images.param_groups[0]["update_gap"] == 40


def test_the_transformer_sees_the_past_alone() -> None:
    net = dct_lowrank.Characters().eval()
    ids = torch.randint(97, (1, 64), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, 40:] = (other[0, 40:] + 1) % 97
    with torch.no_grad():
        a, b = net(ids), net(other)
    torch.testing.assert_close(a[:, :40], b[:, :40])
    assert not torch.allclose(a[:, 40:], b[:, 40:])


def test_a_tiny_run_of_each_part(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dct_lowrank, "_text", lambda: tuple(torch.arange(400) % 97 for _ in range(3)))
    monkeypatch.setattr(dct_lowrank, "STEPS", {TEXT: 22, IMAGES: 22})
    settings = Settings(runs=tmp_path, quiet=True, workers=1)
    held, test = dct_lowrank._one(settings, TEXT, FEEDBACK, 1e-2, 0)
    assert held == pytest.approx(test)
    assert 0 < test < 4.5
    measured = dct_lowrank._bytes()
    assert measured == BYTES
    times = dct_lowrank._times(rounds=1, sizes=(64,))
    assert all(t[64] > 0 for t in times.values())
    slopes = {name: torch.randn(20, 16) for name in GRADIENTS}
    monkeypatch.setattr(_dct_lowrank_picture, "gradients", lambda seed: slopes)
    table = found()
    assert _dct_lowrank_picture.picture(judged(table), table).startswith(b"\x89PNG")
    assert set(METHODS) == set(LOSS)
