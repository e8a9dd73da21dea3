"""The ground under every optimizer: protocols and their refusals, flat storage with state, compiled rules."""

from __future__ import annotations

import copy
import warnings
from typing import Any, ClassVar

import pytest
import torch
from optimizer_contract import Net, data, losses, saved, weights
from torch import nn

from gradmatch.core.checks import InputError
from gradmatch.optim import _protocol, optimizer_state_bytes
from gradmatch.optim._base import OptimizerBase, scale_


class Momentum(OptimizerBase):
    """w <- w - lr m, m <- m / 2 + g."""

    buffers = ("m",)

    def __init__(self, params: Any, lr: float = 0.1, **options: Any) -> None:
        super().__init__(params, {"lr": lr, **options})

    def _numbers(self, group, counts):
        return {"lr": float(group["lr"])}

    def _rule(self, p, g, s, c):
        s["m"].mul_(0.5).add_(g)
        p.add_(s["m"], alpha=-c["lr"])


class Loss(Momentum):
    protocols: ClassVar[tuple[_protocol.Protocol, ...]] = ("graph", "loss closure")

    def _gradients(self, closure):
        params = self._all_params()
        if closure is None:
            return _protocol.require_graph(self._name, params, self.protocols)
        return _protocol.loss_with_graph(self._name, params, closure, self.protocols)


class Outputs(Momentum):
    protocols: ClassVar[tuple[_protocol.Protocol, ...]] = ("output closure",)

    def _gradients(self, closure):
        _protocol.require_closure(self._name, closure, self.protocols)
        z, loss_of = _protocol.outputs_and_loss(self._name, self._all_params(), closure, self.protocols)
        return loss_of(z)


def train(net: nn.Module, optimizer: Any, first: int, count: int) -> list[torch.Tensor]:
    for k in range(first, first + count):
        optimizer.zero_grad()
        x, y = data(k)
        losses(net(x), y).mean().backward()
        optimizer.step()
    return weights(net)


def close(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.allclose(x, y, rtol=0, atol=1e-7) for x, y in zip(a, b, strict=True))


# --- protocols ------------------------------------------------------------------------------------------------


def closures(net: nn.Module, optimizer: Any) -> dict[str, Any]:
    x, y = data(0)

    def ordinary() -> torch.Tensor:
        optimizer.zero_grad()
        loss = losses(net(x), y).mean()
        loss.backward()
        return loss

    return {
        "ordinary": ordinary,
        "loss": lambda: losses(net(x), y).mean(),
        "outputs": lambda: (net(x), lambda z: losses(z, y)),
        "number": lambda: float(losses(net(x), y).mean().detach()),
        "cut": lambda: losses(net(x), y).mean().detach(),
        "losses": lambda: losses(net(x), y),
        "cut outputs": lambda: (net(x).detach(), lambda z: losses(z, y)),
        "nan": lambda: losses(net(x), y).mean() * float("nan"),
        "nan outputs": lambda: (net(x) * float("nan"), lambda z: losses(z, y)),
    }


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        (Momentum, "loss", "did not call backward; call loss.backward.. and then step"),
        (Momentum, "outputs", "returns tuple; call loss.backward"),
        (Loss, "ordinary", "calls backward; call loss.backward.create_graph=True. and then step.., or"),
        (Loss, "number", "returns float; call"),
        (Loss, "cut", "a loss without a graph; call"),
        (Loss, "losses", "a tensor of shape .8,.; call"),
        (Loss, "nan", "loss has 1 NaN"),
        (Outputs, "ordinary", "calls backward; call step.closure. with a closure that returns .outputs"),
        (Outputs, "loss", "returns a loss; call"),
        (Outputs, "number", "returns float; call"),
        (Outputs, "cut outputs", "outputs without a graph to the parameters"),
        (Outputs, "nan outputs", "outputs has 16 NaN"),
    ],
)  # fmt: skip
def test_a_wrong_use_is_refused_with_what_to_write(kind: type, name: str, words: str) -> None:
    net = Net()
    optimizer = kind(net.parameters())
    before = weights(net)
    with pytest.raises(InputError, match=words):
        optimizer.step(closures(net, optimizer)[name])
    assert all(torch.equal(a, b) for a, b in zip(before, weights(net), strict=True))


def test_gradients_without_a_graph_and_missing_closures_are_refused() -> None:
    net = Net()
    optimizer = Loss(net.parameters())
    losses(net(data(0)[0]), data(0)[1]).mean().backward()
    with pytest.raises(
        InputError, match=r"gradient of parameter 0 without a graph; call loss.backward\(create_graph"
    ):
        optimizer.step()
    with pytest.raises(InputError, match=r"Outputs.step got no closure; call step\(closure\)"):
        Outputs(net.parameters()).step()
    with pytest.raises(InputError, match="got a closure"):
        _protocol.require_no_closure("X", lambda: 0, ["grad"])


def test_right_uses_return_the_loss() -> None:
    net = Net()
    own = closures(net, Momentum(net.parameters()))
    expected = own["number"]()
    assert float(Momentum(net.parameters(), lr=0.0).step(own["ordinary"]).detach()) == pytest.approx(expected)
    net.zero_grad()
    assert float(Loss(net.parameters()).step(own["loss"]).detach()) == pytest.approx(expected)
    assert float(Outputs(net.parameters()).step(own["outputs"]).mean().detach()) == pytest.approx(expected)
    assert Momentum(net.parameters()).step(lambda: 1.5) == 1.5  # gradients by other means, a plain number


def test_closures_run_with_gradients_enabled() -> None:
    net = Net()
    optimizer = Loss(net.parameters())
    with torch.no_grad():
        assert optimizer.step(closures(net, optimizer)["loss"]).requires_grad


# --- flat storage ---------------------------------------------------------------------------------------------


def test_state_moves_between_flat_and_plain_optimizers() -> None:
    net = Net()
    plain = Momentum(net.parameters())
    train(net, plain, 0, 3)
    kept, at = saved(plain.state_dict()), saved(net.state_dict())
    expected = train(net, plain, 3, 3)
    for options in ({"flat": True}, {"foreach": False}):
        other = Net()
        other.load_state_dict(at)
        resumed = Momentum(other.parameters(), **options)
        train(other, resumed, 0, 1)  # state of its own, to be replaced
        other.load_state_dict(at)
        resumed.load_state_dict(kept)
        assert resumed.param_groups[0]["flat"] is options.get(
            "flat", False
        )  # how to run is not part of the state
        assert resumed.param_groups[0]["foreach"] is options.get("foreach")
        assert close(expected, train(other, resumed, 3, 3))


def test_loaded_state_is_a_copy() -> None:
    net = Net()
    optimizer = Momentum(net.parameters())
    train(net, optimizer, 0, 1)
    kept = optimizer.state_dict()
    before = kept["state"][0]["m"].clone()
    other = Momentum(Net().parameters())
    other.load_state_dict(kept)
    next(iter(other.state.values()))["m"].zero_()
    assert torch.equal(kept["state"][0]["m"], before)


def test_flat_copies_are_independent_and_continue_the_same() -> None:
    net = Net()
    optimizer = Momentum(net.parameters(), flat=True)
    train(net, optimizer, 0, 2)
    other, copied = copy.deepcopy((net, optimizer))
    copied.zero_grad()
    expected = train(net, optimizer, 2, 2)
    assert close(expected, train(other, copied, 2, 2))


def test_flat_gradients_stay_views_through_zero_grad_and_skip_what_has_none() -> None:
    net = Net()
    optimizer = Momentum(net.parameters(), flat=True)
    train(net, optimizer, 0, 1)
    view = net.kernel.grad
    optimizer.zero_grad()
    assert net.kernel.grad is view
    assert float(view.abs().sum()) == 0
    assert net.unused.grad is None
    before = weights(net)
    net.kernel.grad = None  # in the middle of the storage: what lies around it moves
    optimizer.step()
    assert torch.equal(before[0], net.kernel.detach())
    assert not torch.equal(before[1], net.head.detach())
    assert [optimizer.state[p]["step"] for p in (net.kernel, net.head)] == [1, 2]


@pytest.mark.parametrize("flat", [False, True])
def test_a_cleared_state_starts_anew(flat: bool) -> None:
    p = nn.Parameter(torch.zeros(3))
    optimizer = Momentum([p], flat=flat)
    for _ in range(3):
        p.grad = torch.ones(3)
        optimizer.step()
    optimizer.state.clear()
    optimizer.step()
    assert optimizer.state[p]["step"] == 1
    assert optimizer.state[p]["m"].tolist() == [1.0] * 3


def test_flat_groups_of_mixed_kinds_and_types() -> None:
    kinds = [torch.float32, torch.float64, torch.bfloat16]

    def make() -> list[nn.Parameter]:
        return [nn.Parameter(torch.ones(3, dtype=t)) for t in kinds]

    flat, plain = make(), make()
    optimizers = (
        Momentum([{"params": flat[:2], "lr": 0.2}, {"params": flat[2:], "flat": False}], flat=True),
        Momentum([{"params": plain[:2], "lr": 0.2}, {"params": plain[2:]}]),
    )
    for own, optimizer in zip((flat, plain), optimizers, strict=True):
        for k in range(3):
            optimizer.zero_grad()
            for p in own:
                (k * p.sum()).backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(flat, plain, strict=True))
    assert optimizers[0].state[flat[2]]["m"].dtype is torch.float32


def test_what_flat_storage_cannot_view_is_refused_at_construction() -> None:
    base = torch.zeros(4)
    with pytest.raises(InputError, match="shares its storage"):
        Momentum([nn.Parameter(base[:2])], flat=True)


# --- compiled rules -------------------------------------------------------------------------------------------


def test_a_compiled_rule_takes_new_numbers_without_new_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = [], torch.compile

    def compiled(function: Any, **options: Any) -> Any:
        made.append(function)
        return real(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", compiled)
    net, other = Net(), Net()
    optimizer, plain = Momentum(net.parameters(), flat=True, compile=True), Momentum(other.parameters())
    torch._dynamo.utils.counters.clear()
    for k in range(4):
        optimizer.param_groups[0]["lr"] = plain.param_groups[0]["lr"] = 0.1 / (k + 1)
        assert close(train(net, optimizer, k, 1), train(other, plain, k, 1))
    assert len(made) == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_without_a_compiler_the_rule_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any, **options: Any) -> Any:
        def fail(*call: Any) -> None:
            raise RuntimeError("no compiler")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    net, other = Net(), Net()
    optimizer = Momentum(net.parameters(), flat=True, compile=True)
    with pytest.warns(UserWarning, match="Momentum runs uncompiled: torch.compile failed with RuntimeError"):
        train(net, optimizer, 0, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        expected = train(net, optimizer, 1, 3)
    assert close(expected, train(other, Momentum(other.parameters()), 0, 4))


# --- small things ---------------------------------------------------------------------------------------------


def test_state_bytes_count_tensors() -> None:
    net = Net()
    optimizer = Momentum(net.parameters())
    assert optimizer_state_bytes(optimizer) == 0
    train(net, optimizer, 0, 1)
    used = sum(p.numel() for p in net.parameters()) - net.unused.numel()
    assert optimizer_state_bytes(optimizer) == 4 * used


def test_scaling_by_one_does_not_touch_memory() -> None:
    x = torch.ones(2)
    version = x._version
    assert scale_(x, 1.0) is x
    assert x._version == version
    assert scale_(x, 0.5).tolist() == [0.5, 0.5]
    assert scale_(x, torch.tensor(1.0, dtype=torch.float64)).tolist() == [0.5, 0.5]


def test_step_hooks_and_gradient_scaler_see_a_torch_optimizer() -> None:
    net = Net()
    optimizer, seen = Momentum(net.parameters()), []
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    other = Net()
    plain = Momentum(other.parameters())
    for k in range(2):
        x, y = data(k)
        optimizer.zero_grad()
        scaler.scale(losses(net(x), y).mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert seen == ["after"] * 2
    assert close(weights(net), train(other, plain, 0, 2))
