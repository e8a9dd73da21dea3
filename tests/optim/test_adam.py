"""The Adam kernel against torch's, and its three hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimizer_contract import Net, OptimizerContract, data, losses
from torch import Tensor, nn

from gradmatch.core.checks import InputError
from gradmatch.optim import _adam
from gradmatch.optim._adam import AdamFamily


def adam(params: Any, **options: Any) -> AdamFamily:
    defaults = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    return AdamFamily(params, {**defaults, **options})


class TestAdamFamily(OptimizerContract):
    def make(self, params, **options):
        return adam(params, **options)

    def has(self, option: str) -> bool:
        return option in ("foreach", "flat", "lr", "maximize", "weight_decay")


def trained(make, steps: int = 100) -> list[Tensor]:
    net = Net(torch.float64)
    optimizer = make(net.parameters())
    for k in range(steps):
        x, y = data(k, torch.float64)
        optimizer.zero_grad()
        losses(net(x), y).mean().backward()
        optimizer.step()
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("decoupled", [True, False])
def test_equals_torch(decay: float, decoupled: bool) -> None:
    theirs = torch.optim.AdamW if decoupled else torch.optim.Adam
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": decay}
    expected = trained(lambda p: theirs(p, **options))
    for a, b in zip(
        trained(lambda p: adam(p, weight_decay=decay, decoupled=decoupled)), expected, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled": False},
        {"lr": 0.0, "weight_decay": 0.1},
        {"eps": 1e-2, "eps_mode": "uncorrected", "maximize": True},
        {"betas": (0.0, 0.0)},
    ],
)
def test_the_fused_kernel_takes_the_formulas_step(
    options: dict[str, Any], dtype: torch.dtype, flat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    step = _adam._fused_step
    monkeypatch.setattr(_adam, "_fused_step", lambda *own: calls.append(step(*own)))
    ends = []
    for own in ({"flat": flat}, {"foreach": False}):
        g = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in ((), (0, 2), (37,), (5, 6))]
        params.append(nn.Parameter(torch.randn(7, 5, generator=g).to(dtype).T))  # memory in another order
        optimizer = adam(params, **options, **own)
        for k in range(12):
            for p in params:
                p.grad = torch.randn(p.shape, generator=g).to(dtype)
                if k == 5:
                    p.grad.zero_()
            kept = [p.grad.clone() for p in params]
            optimizer.step()
            assert all(torch.equal(p.grad, x) for p, x in zip(params, kept, strict=True))
        state = [optimizer.state[p][name] for p in params for name in optimizer.buffers]
        ends.append([*(p.detach() for p in params), *state])
        assert bool(calls) == (own != {"foreach": False})
        calls.clear()
    for a, b in zip(*ends, strict=True):
        near = 1e-2 if a.dtype is torch.bfloat16 else 1e-6 if a.dtype is torch.float32 else 1e-14
        torch.testing.assert_close(a, b, rtol=near, atol=near)


def test_uncorrected_eps_stands_beside_the_uncorrected_root() -> None:
    w, g, lr, (b1, b2), eps = 1.0, 0.3, 0.1, (0.9, 0.99), 0.05
    p = nn.Parameter(torch.tensor([w], dtype=torch.float64))
    optimizer = adam([p], lr=lr, eps=eps, eps_mode="uncorrected")
    m = v = 0.0
    for t in range(1, 4):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        w -= lr * (1 - b2**t) ** 0.5 / (1 - b1**t) * m / (v**0.5 + eps)
        p.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
        assert p.item() == pytest.approx(w, abs=1e-14)


def test_bias_correction_counts_the_updates_of_a_parameter() -> None:
    late, early = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = adam([early, late])
    for k in range(3):
        early.grad = torch.full((2,), 0.5)
        late.grad = torch.full((2,), 0.5) if k == 2 else None
        optimizer.step()
    torch.testing.assert_close(late.detach(), torch.full((2,), 0.99))  # a first step is of length lr
    assert (optimizer.state[early]["step"], optimizer.state[late]["step"]) == (3, 1)


class Turned:
    """A projector onto two rows of an orthonormal basis (all of it: an exact change of variables)."""

    def __init__(self, basis: Tensor) -> None:
        self.basis = basis

    def down(self, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        state["seen"] = state.get("seen", 0) + 1
        return gradient @ self.basis

    def up(self, update: Tensor, state: dict[str, Any]) -> Tensor:
        return update @ self.basis.T


class Projected(AdamFamily):
    def projector(self, p: Tensor, group: dict[str, Any]) -> Turned | None:
        return Turned(group["basis"]) if p.ndim == 2 else None


@pytest.mark.parametrize("flat", [False, True])
def test_projector_hook_is_adam_in_the_turned_space(flat: bool) -> None:
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64))[0]
    start = torch.randn(4, 3, generator=g, dtype=torch.float64)
    w, turned = nn.Parameter(start.clone()), nn.Parameter(start @ basis)
    bias = nn.Parameter(torch.ones(3, dtype=torch.float64))
    settings = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = Projected([w, bias], {**settings, "basis": basis, "flat": flat})
    reference = torch.optim.AdamW([turned], **settings)
    for _ in range(5):
        gradient = torch.randn(4, 3, generator=g, dtype=torch.float64)
        w.grad, turned.grad, bias.grad = gradient, gradient @ basis, torch.ones(3, dtype=torch.float64)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(w.detach() @ basis, turned.detach(), rtol=0, atol=1e-12)
    assert optimizer.state[w]["seen"] == 5  # what a projector keeps in the state stays there
    assert bias[0].item() < 1


class Halved(AdamFamily):
    def numerator_factor(self, a, s, c):
        return a.mul(0.0).add_(0.5)


def test_numerator_factor_halves_the_step_and_not_the_average() -> None:
    plain, halved = (nn.Parameter(torch.ones(3)) for _ in range(2))
    one = adam([plain])
    other = Halved([halved], one.defaults)
    for _ in range(4):
        plain.grad = halved.grad = torch.tensor([0.1, -2.0, 3.0])
        one.step()
        other.step()
    torch.testing.assert_close(1 - halved.detach(), (1 - plain.detach()) / 2)
    assert torch.equal(one.state[plain]["exp_avg"], other.state[halved]["exp_avg"])


class Given(AdamFamily):
    """A denominator from a tensor of the step, and a counter of its own."""

    counters = ("step", "seen")

    def _prepare(self, p, s, group):
        if s["step"] % 2:
            s["seen"] += 1
            return {"given": torch.full_like(p, float(s["seen"]))}
        return {}

    def denominator(self, a, s, c):
        v = s["exp_avg_sq"]
        if "given" in s:
            v.copy_(s["given"])
        return v.sqrt().add_(c["eps"])


@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"flat": True}])
def test_denominator_sees_tensors_of_the_step(options: dict[str, Any]) -> None:
    params = [nn.Parameter(torch.ones(n)) for n in (3, 5)]
    optimizer = Given(params, {**adam([torch.zeros(1)]).defaults, **options})
    for k in range(4):
        params[0].grad = torch.ones(3)
        params[1].grad = torch.ones(5) if k > 0 else None
        optimizer.step()
    assert [optimizer.state[p]["seen"] for p in params] == [2, 2]
    assert torch.equal(optimizer.state[params[0]]["exp_avg_sq"], torch.full((3,), 2.0))


def test_settings_out_of_range_are_refused() -> None:
    p = [nn.Parameter(torch.ones(1))]
    for options, words in (
        ({"lr": -1.0}, "lr is -1.0; it must be at least 0"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] is 1.0; it must lie in \[0, 1\)"),
        ({"betas": 0.9}, "betas is 0.9; it must be 2 numbers"),
        ({"weight_decay": float("nan")}, "weight_decay is nan"),
        ({"eps_mode": "inside"}, "eps_mode is 'inside'"),
        ({"compile": True}, "pass flat=True too"),
    ):
        with pytest.raises(InputError, match=words):
            adam(p, **options)
