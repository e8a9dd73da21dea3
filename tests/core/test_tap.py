"""Taps read what flowed and leave no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradmatch.core.checks import InputError
from gradmatch.core.tap import capture, evaluating, inject, last_of, submodule


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 2))


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_capture_reads_inputs_and_outputs_with_their_graph() -> None:
    module, x = net().eval(), torch.randn(5, 3)
    with capture(module, "0", "3") as outs, capture(module, "3", side="input") as ins:
        y = module(x)
    assert torch.equal(outs["3"], y)
    assert torch.equal(ins["3"], outs["0"].relu())
    assert outs["0"].requires_grad
    assert hooks(module) == 0


def test_hooks_go_after_an_exception_and_after_an_unknown_name() -> None:
    module = net()
    with pytest.raises(ZeroDivisionError), capture(module, "0"):
        1 / 0  # noqa: B018
    with pytest.raises(InputError, match=r"no module 'x'; it has 0, 1"), capture(module, "0", "x"):
        pass
    assert hooks(module) == 0


def test_evaluating_restores_each_part() -> None:
    module = net().train()
    module[2].eval()
    with evaluating(module):
        assert not any(m.training for m in module.modules())
    with pytest.raises(ZeroDivisionError), evaluating(module):
        1 / 0  # noqa: B018
    assert [m.training for m in module.modules()] == [True, True, True, False, True]


def test_names() -> None:
    assert last_of(net(), nn.Linear) == "3"
    assert submodule(net(), "1").__class__ is nn.ReLU
    with pytest.raises(InputError, match="no Conv1d or Conv2d"):
        last_of(net(), (nn.Conv1d, nn.Conv2d))
    with pytest.raises(InputError, match="side is 'both'"), capture(net(), "0", side="both"):
        pass
    lstm = nn.Sequential(nn.LSTM(3, 2))
    with pytest.raises(InputError, match="is a tuple"), capture(lstm, "0"):
        lstm(torch.zeros(1, 1, 3))


def test_inject_replaces_outputs_and_inputs_with_their_graph() -> None:
    module, x = net().eval(), torch.randn(5, 3)
    theta = torch.randn(5, 4, requires_grad=True)
    with inject(module, {"1": theta}):
        y = module(x)
    assert torch.equal(y, module[3](theta))
    y.sum().backward()
    assert theta.grad is not None
    with inject(module, {"3": lambda h: h + 1}, side="input"), capture(module, "3", side="input") as seen:
        module(x)
    assert torch.equal(seen["3"], module[:3](x) + 1)
    assert torch.equal(module(x), nn.Sequential(*module)(x))
    assert hooks(module) == 0


def test_injections_go_after_an_exception_and_refuse_what_they_cannot_replace() -> None:
    module = net()
    with pytest.raises(ZeroDivisionError), inject(module, {"0": lambda h: h * (1 // 0)}):
        module(torch.zeros(1, 3))
    with (
        pytest.raises(InputError, match="no module 'x'"),
        inject(module, {"0": torch.zeros(1), "x": torch.zeros(1)}),
    ):
        pass
    assert hooks(module) == 0
    lstm = nn.Sequential(nn.LSTM(3, 2))
    with pytest.raises(InputError, match="is a tuple"), inject(lstm, {"0": torch.zeros(1)}):
        lstm(torch.zeros(1, 1, 3))
