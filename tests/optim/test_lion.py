"""Every check, refusal and named fault of Lion; the program search is in test_program*.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimizer_contract import Net, OptimizerContract, data, losses, weights
from torch import Tensor, nn

from gradmatch.core.checks import InputError
from gradmatch.optim import Lion, optimizer_state_bytes


class TestLion(OptimizerContract):
    def make(self, params, **options):
        return Lion(params, lr=1e-2, **options)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stepped(gradients: list[Tensor], start: Tensor, **options: Any) -> tuple[Tensor, Any]:
    """The weights after steps with these gradients, and the optimizer."""
    w = nn.Parameter(start.clone())
    optimizer = Lion([w], **options)
    for g in gradients:
        w.grad = g.clone()
        optimizer.step()
    return w.detach(), optimizer


def by_hand(gradients: list[Tensor], w: Tensor, lr: float, betas: tuple[float, float], wd: float) -> Tensor:
    """Algorithm 2, one weight and one line at a time."""
    values = []
    for i in range(len(w)):
        x, m = float(w[i]), 0.0
        for g in gradients:
            c = betas[0] * m + (1 - betas[0]) * float(g[i])
            x = x * (1 - lr * wd)
            x = x - lr * ((c > 0) - (c < 0))
            m = betas[1] * m + (1 - betas[1]) * float(g[i])
        values.append(x)
    return torch.tensor(values, dtype=torch.float64)


# --- the method -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreach", [False, None])
@pytest.mark.parametrize("wd", [0.0, 0.3])
def test_equals_the_algorithm_line_by_line(foreach: bool | None, wd: float) -> None:
    """Catches swapped betas, m moved before the step, and decay folded into the gradient."""
    gradients, start = [randn(40, seed=k) for k in range(1, 31)], randn(40)
    found, _ = stepped(gradients, start, lr=0.03, betas=(0.6, 0.95), weight_decay=wd, foreach=foreach)
    expected = by_hand(gradients, start, 0.03, (0.6, 0.95), wd)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_without_memory_it_is_sign_descent() -> None:
    gradients, start = [randn(9, seed=k) for k in range(1, 6)], randn(9)
    found, _ = stepped(gradients, start, lr=0.1, betas=(0.0, 0.0))
    expected = start.clone()
    for g in gradients:
        expected -= 0.1 * g.sign()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_weights_move_by_lr_or_not_at_all() -> None:
    g = torch.tensor([1e-30, -3.0, 0.0, 5e20, -0.0], dtype=torch.float64)
    found, _ = stepped([g], torch.zeros(5, dtype=torch.float64), lr=0.25)
    assert found.tolist() == [-0.25, 0.25, 0.0, -0.25, 0.0]
    gradients, start = [randn(50, seed=k) for k in range(1, 4)], torch.zeros(50, dtype=torch.float64)
    moved = stepped(gradients[:1], start, lr=0.25)[0]
    assert set(moved.abs().tolist()) == {0.25}


def test_nothing_moves_without_gradient_and_memory() -> None:
    start = randn(7)
    assert torch.equal(stepped([torch.zeros(7, dtype=torch.float64)] * 3, start, lr=1.0)[0], start)


@pytest.mark.parametrize("beta2", [0.99, 0.5, 0.0])
def test_the_buffer_after_equal_gradients(beta2: float) -> None:
    g = randn(6)
    for k in (1, 2, 10):
        _, optimizer = stepped([g] * k, torch.zeros(6, dtype=torch.float64), betas=(0.9, beta2))
        (state,) = optimizer.state.values()
        torch.testing.assert_close(state["exp_avg"], (1 - beta2**k) * g, rtol=0, atol=1e-12)
        assert state["step"] == k


@pytest.mark.parametrize(
    ("scale", "dtype"), [(2.0**-9, torch.float32), (2.0**20, torch.float32), (0.37, torch.float64)]
)
def test_the_scale_of_the_loss_does_not_matter(scale: float, dtype: torch.dtype) -> None:
    ends = []
    for factor in (1.0, scale):
        net = Net(dtype)
        optimizer = Lion(net.parameters(), lr=1e-2, weight_decay=0.1)
        for k in range(20):
            x, y = data(k, dtype)
            optimizer.zero_grad()
            (factor * losses(net(x), y).mean()).backward()
            optimizer.step()
        ends.append(weights(net))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_decay_is_decoupled_and_follows_the_schedule() -> None:
    start, zero = randn(5), torch.zeros(5, dtype=torch.float64)
    found, optimizer = stepped([zero], start, lr=0.1, weight_decay=0.5)
    assert torch.equal(found, start * (1 - 0.1 * 0.5))
    optimizer.param_groups[0]["lr"] = 0.01
    optimizer.step()
    assert torch.equal(optimizer.param_groups[0]["params"][0].detach(), start * (1 - 0.05) * (1 - 0.01 * 0.5))


def test_decay_does_not_turn_the_step() -> None:
    """With decay inside the sign, a large weight would be pulled against its gradient."""
    found, _ = stepped([torch.tensor([-1e-3])], torch.tensor([100.0]), lr=1e-3, weight_decay=1.0)
    assert float(found) == pytest.approx(100 * (1 - 1e-3) + 1e-3, rel=1e-6)


def test_half_precision_keeps_small_increments_of_the_buffer() -> None:
    g = torch.full((4,), 1e-3, dtype=torch.bfloat16)
    w = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = Lion([w], lr=1e-2, betas=(0.9, 0.999))
    for _ in range(300):
        w.grad = g.clone()
        optimizer.step()
    m = optimizer.state[w]["exp_avg"]
    assert m.dtype is torch.float32
    torch.testing.assert_close(m, (1 - 0.999**300) * g.float(), rtol=1e-4, atol=0)
    in_bf16 = torch.zeros(4, dtype=torch.bfloat16)
    for _ in range(300):
        in_bf16 = 0.999 * in_bf16 + 0.001 * g
    assert abs(float(in_bf16[0]) / float(m[0]) - 1) > 0.2  # what is avoided


def test_state_is_half_of_adamw() -> None:
    net = Net()
    held = []
    for optimizer in (Lion(net.parameters()), torch.optim.AdamW(net.parameters())):
        losses(net(data(0)[0]), data(0)[1]).mean().backward()
        optimizer.step()
        steps = [s["step"] for s in optimizer.state.values() if isinstance(s["step"], Tensor)]
        held.append(optimizer_state_bytes(optimizer) - 4 * len(steps))
    assert 2 * held[0] == held[1]


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1e-4}, "lr is -0.0001; it must be at least 0"),
        ({"lr": float("nan")}, "lr is nan; it must be finite"),
        ({"betas": (1.0, 0.99)}, r"betas\[0\] is 1.0; it must lie in \[0, 1\)"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] is -0.1"),
        ({"betas": (0.9,)}, "betas is .0.9,.; it must be 2 numbers"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0; it must be at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Lion([nn.Parameter(torch.ones(2))], **options)


# --- a real model ---------------------------------------------------------------------------------------------


def test_a_hugging_face_model_learns_and_keeps_its_tied_weights() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    g = torch.Generator().manual_seed(0)
    ids = torch.randint(17, (8, 12), generator=g)
    ends = []
    for options in ({}, {"flat": True}):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = GPT2LMHeadModel(GPT2Config(vocab_size=17, n_positions=12, n_embd=16, n_layer=1, n_head=2))
        model.eval()
        optimizer = Lion(model.parameters(), lr=1e-2, weight_decay=0.01, **options)
        found = []
        for _ in range(12):
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
        assert found[-1] < 0.75 * found[0]
        assert model.lm_head.weight is model.transformer.wte.weight
        ends.append(found)
    assert ends[0] == pytest.approx(ends[1], abs=1e-5)
