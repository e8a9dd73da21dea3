"""The experiment's rule, and a tiny run of each of its parts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gradmatch.evidence._common import Settings
from gradmatch.evidence.optim import _adahessian_picture, adahessian
from gradmatch.evidence.optim._training import train
from gradmatch.evidence.optim.adahessian import ADAM, ADAMW, CELLS, OURS, SGD, STARTS
from gradmatch.optim import AdaHessian

LEVEL = {SGD: 90.0, ADAM: 90.0, ADAMW: 90.0, OURS: 92.0, "b2 0": 50.0} | dict.fromkeys(
    ("b2 0.9", "no blocks", "signed", "every 5 steps"), 91.8
)
STEPS = {(OURS, start): {0.15: 60.0} for start in STARTS} | {(ADAM, start): {1.0: 90.0} for start in STARTS}
EVEN = {1e2: 60.0, 1e4: 60.0, 1e6: 80.0}
TIMES = {SGD: 1.0, ADAM: 1.1, OURS: 3.0, "every 5 steps": 1.6}


def found(**changed: float) -> adahessian.Found:
    """Scores at every rate; a change is named METHOD or METHOD_DATA_EPOCHS."""
    table = {}
    for data, epochs in CELLS:
        for method in adahessian._methods(data):
            level = changed.get(f"{method}_{data}_{epochs}", changed.get(method, LEVEL[method]))
            table[data, epochs, method] = {
                rate: [(level, level + 0.01 * s) for s in range(3)] for rate in adahessian._grid(method)
            }
    return table


def judged(table=None, steps=STEPS, even=EVEN, times=TIMES):
    return adahessian._judged(table or found(), steps, even, times)


def test_the_rule_reads_every_condition() -> None:
    assert judged().verdict == "holds"
    slow = {OURS: {0.15: 100.0}, ADAM: {1.0: 90.0}}
    cases = (
        ({1}, judged(steps=STEPS | {(m, STARTS[0]): slow[m] for m in slow})),
        ({2}, judged(steps=STEPS | {(m, STARTS[1]): slow[m] for m in slow})),
        ({3}, judged(even=EVEN | {1e6: 91.0})),
        ({4, 5, 7}, judged(found(**{f"{ADAM}_Fashion-MNIST_30": 93.0}))),
        ({5}, judged(found(**{ADAMW: 92.0}))),
        ({6, 7}, judged(found(**{f"{ADAM}_digits_8": 93.0}))),
        ({8}, judged(found(**{"b2 0_digits_8": 83.0}))),
        ({9}, judged(found(**{"no blocks": 92.0}))),
        ({10}, judged(found(**{"every 5 steps_digits_8": 91.0}))),
        ({11}, judged(times=TIMES | {OURS: 3.3})),
    )
    for failed, result in cases:
        met = ", ".join(str(i) for i in range(1, 12) if i not in failed)
        assert result.reason.startswith(f"{11 - len(failed)} of 11 conditions met ({met})."), failed
        assert result.verdict == "holds in part"
    worse = found(**{OURS: 80.0, "b2 0": 80.0, "every 5 steps": 70.0, "no blocks": 80.0})
    lost = {(m, s): slow[m] for m in slow for s in STARTS}
    nothing = judged(worse, lost, EVEN | {1e6: 200.0}, TIMES | {OURS: 4.0})
    assert nothing.verdict == "does not hold"


def test_the_worst_of_three_rates_lies_around_the_best() -> None:
    by_rate = {0.1: [(1.0, 10.0)], 0.3: [(2.0, 30.0)], 1.0: [(3.0, 40.0)], 3.0: [(0.0, 20.0)]}
    assert adahessian.around_best(by_rate) == [20.0]
    assert adahessian.around_best({**by_rate, 0.1: [(9.0, 10.0)]}) == [10.0]


def test_steps_on_a_quadratic_are_those_of_the_first_fall() -> None:
    assert adahessian.steps_needed(OURS, 0.15, STARTS[1], 1e2) == 63
    assert math.isinf(adahessian.steps_needed(ADAM, 0.01, STARTS[0], 1e4, most=20))


def test_a_tiny_run_trains_and_measures(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(runs=tmp_path, quiet=True, workers=1)
    for method in (OURS, "every 5 steps", SGD):
        held, test = adahessian._one(settings, "digits", 1, method, 0.05, 0)
        assert 10 < held <= 100
        assert 10 < test <= 100
    times = adahessian._step_times(rounds=2)
    assert times[OURS] > times[SGD] > 0
    quadratics, even = {k: dict.fromkeys(adahessian.QUADRATIC[k[0]], 5.0) for k in STEPS}, EVEN
    table = found()
    result = adahessian._judged(table, quadratics, even, times)
    monkeypatch.setattr(_adahessian_picture, "descend", lambda make, f, start, steps: [(1.0, start)] * 2)
    assert _adahessian_picture.picture(result, table).startswith(b"\x89PNG")


def test_a_closure_reaches_optimizers_that_take_one() -> None:
    from gradmatch.core.examples import Examples

    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    data = Examples(x, (x[:, 0] > 0).long(), 2)
    net = nn.Linear(3, 2)
    with torch.no_grad():
        net.weight.zero_()
        net.bias.zero_()
    optimizer = AdaHessian(net.parameters(), 0.1)
    seen = []
    train(net, optimizer, data, 3, 10, 0, lambda k, own: seen.append((k, own is optimizer)))
    assert seen == [(k, True) for k in range(1, 7)]
    assert optimizer.state[net.weight]["step"] == 6
    assert float(((net(x).argmax(1)) == data.y).float().mean()) > 0.8
