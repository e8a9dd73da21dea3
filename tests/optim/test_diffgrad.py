"""Every check, refusal and named fault of diffGrad."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_contract import Net, OptimizerContract, data, losses
from torch import Tensor, nn

from gradmatch.core.checks import InputError
from gradmatch.evidence.optim.diffgrad import FUNCTIONS, descend
from gradmatch.optim import DiffGrad, optimizer_state_bytes
from gradmatch.optim._adam import AdamFamily


class TestDiffGrad(OptimizerContract):
    def make(self, params, **options):
        return DiffGrad(params, lr=1e-2, **options)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moves(make: Callable[[list[nn.Parameter]], Any], gradients: list[Tensor]) -> list[Tensor]:
    """The change of the weights at each step with these gradients."""
    w = nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer, found = make([w]), []
    for g in gradients:
        before = w.detach().clone()
        w.grad = g.clone()
        optimizer.step()
        found.append(w.detach() - before)
    return found


def adam(params: Any, lr: float = 1e-3, eps_mode: str = "uncorrected", **options: Any) -> AdamFamily:
    settings = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "decoupled": False}
    return AdamFamily(params, {**settings, "eps_mode": eps_mode, **options})


def by_hand(gradients: list[Tensor], lr: float, betas: tuple[float, float], eps: float, mode: str) -> Tensor:
    """The update of the paper, one weight and one line at a time."""
    import math

    ends = []
    for i in range(gradients[0].numel()):
        w = m = v = p = 0.0
        for t, g in enumerate((float(x.flatten()[i]) for x in gradients), 1):
            m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
            xi = 1 / (1 + math.exp(-abs(p - g)))
            p = g
            if mode == "uncorrected":
                w -= lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) * xi * m / (math.sqrt(v) + eps)
            else:
                w -= lr * xi * (m / (1 - betas[0] ** t)) / (math.sqrt(v / (1 - betas[1] ** t)) + eps)
        ends.append(w)
    return torch.tensor(ends, dtype=torch.float64)


# --- the method -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["uncorrected", "corrected"])
@pytest.mark.parametrize("foreach", [False, None])
def test_equals_the_paper_line_by_line(mode: str, foreach: bool | None) -> None:
    """Catches exchanged bias corrections and eps in the wrong place (it is large here)."""
    gradients = [randn(30, seed=k) for k in range(1, 21)]
    options = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 0.03, "eps_mode": mode, "foreach": foreach}
    found = sum(moves(lambda p: DiffGrad(p, **options), gradients))
    torch.testing.assert_close(found, by_hand(gradients, 0.02, (0.8, 0.95), 0.03, mode), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["uncorrected", "corrected"])
def test_with_equal_gradients_it_is_adam_at_half_the_rate_from_the_second_step(mode: str) -> None:
    gradients = [torch.tensor([0.3, -2.0, 40.0], dtype=torch.float64)] * 6
    ours = moves(lambda p: DiffGrad(p, lr=1e-3, eps_mode=mode), gradients)
    full, half = (moves(lambda p, lr=lr: adam(p, lr, mode), gradients) for lr in (1e-3, 5e-4))
    torch.testing.assert_close(ours[0], full[0] * torch.sigmoid(gradients[0].abs()), rtol=1e-12, atol=0)
    for a, b in zip(ours[1:], half[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_the_first_step_is_scaled_by_the_gradient_itself() -> None:
    g = torch.tensor([0.0, 1.0, -3.0], dtype=torch.float64)
    (step,) = moves(lambda p: DiffGrad(p, lr=0.1, eps=0.0 if bool(g.all()) else 1e-8), [g])
    expected = -0.1 * torch.sigmoid(g.abs()) * g.sign()
    torch.testing.assert_close(step, expected, rtol=1e-6, atol=0)
    assert float(step[0]) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_large_changes_make_it_adam_without_overflow(dtype: torch.dtype) -> None:
    gradients = [torch.full((3,), 1e3 * (-1) ** k, dtype=dtype) for k in range(5)]
    ours, theirs = moves(lambda p: DiffGrad(p), gradients), moves(adam, gradients)
    for a, b in zip(ours, theirs, strict=True):
        assert bool(torch.isfinite(a).all())
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_steps_lie_between_half_of_adams_and_adams() -> None:
    gradients = [3 * randn(200, seed=k) for k in range(8)]
    seen = []

    class Watched(DiffGrad):
        def numerator_factor(self, a, s, c):
            found = super().numerator_factor(a, s, c)
            seen.extend(t.clone() for t in found)
            return found

    ours, theirs = moves(Watched, gradients), moves(adam, gradients)
    for a, b, xi in zip(ours, theirs, seen, strict=True):
        ratio = a / b
        assert float(ratio.min()) >= 0.5 - 1e-9
        assert float(ratio.max()) <= 1 + 1e-9
        torch.testing.assert_close(ratio, xi, rtol=1e-6, atol=0)


def test_the_friction_of_a_change_of_seventeen_is_one_in_single_precision() -> None:
    for change, expected in ((0.0, 0.5), (17.0, 1.0)):
        steps = [
            moves(make, [torch.tensor([2.0]), torch.tensor([2.0 + change])])[1] for make in (DiffGrad, adam)
        ]
        assert float(steps[0] / steps[1]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("mode", ["uncorrected", "corrected"])
@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"flat": True}])
def test_friction_one_is_the_adam_kernel_bitwise(
    mode: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AdamFamily, "_unhooked", False)  # its formula, which a fused kernel may stand in for
    gradients = [randn(17, seed=k).float() for k in range(30)]
    one = {"friction": torch.ones_like, "eps_mode": mode, **options}
    ours = moves(lambda p: DiffGrad(p, **one), gradients)
    for a, b in zip(ours, moves(lambda p: adam(p, eps_mode=mode, **options), gradients), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("decoupled", [False, True])
def test_friction_one_corrected_is_torch_adam(decoupled: bool) -> None:
    options = {"lr": 1e-2, "weight_decay": 0.1}
    theirs = torch.optim.AdamW if decoupled else torch.optim.Adam
    ends = []
    for make in (
        lambda p: DiffGrad(
            p, friction=torch.ones_like, eps_mode="corrected", decoupled=decoupled, foreach=False, **options
        ),
        lambda p: theirs(p, **options),
    ):
        net = Net(torch.float64)
        optimizer = make(net.parameters())
        for k in range(100):
            x, y = data(k, torch.float64)
            optimizer.zero_grad()
            losses(net(x), y).mean().backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-7)


def test_coupled_decay_is_part_of_the_remembered_gradient_and_not_of_grad() -> None:
    w = nn.Parameter(torch.tensor([2.0, -4.0]))
    optimizer = DiffGrad([w], lr=0.0, weight_decay=0.5)
    w.grad = torch.tensor([1.0, 1.0])
    optimizer.step()
    assert w.grad.tolist() == [1.0, 1.0]
    assert optimizer.state[w]["previous_grad"].tolist() == [2.0, -1.0]


def test_frictions_of_ports() -> None:
    gradients = [randn(5, seed=k) for k in range(3)]
    plain = moves(adam, gradients)
    changes = [gradients[0] * 0 - gradients[0], gradients[0] - gradients[1], gradients[1] - gradients[2]]
    for friction in (
        torch.sigmoid,
        lambda d: 9 * torch.sigmoid(0.5 * d.abs()) - 4,
        lambda d: d.abs_().sigmoid_(),
    ):
        ours = moves(lambda p, f=friction: DiffGrad(p, friction=f), gradients)
        for a, b, change in zip(ours, plain, changes, strict=True):
            torch.testing.assert_close(a, b * friction(change.clone()), rtol=1e-9, atol=0)


def test_a_constant_that_a_friction_returns_is_not_changed() -> None:
    constant = torch.full((3,), 0.7)
    moves(lambda p: DiffGrad(p, friction=lambda d: constant), [torch.ones(3)] * 3)
    assert constant.tolist() == pytest.approx([0.7] * 3)


# --- faults of published code ---------------------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_the_previous_gradient_is_a_copy(set_to_none: bool, flat: bool) -> None:
    """The first public code kept the gradient tensor itself: friction 0.5 ever after, where buffers are reused."""
    w = nn.Parameter(torch.zeros(2))
    optimizer = DiffGrad([w], lr=0.1, flat=flat)
    sizes, seen = [1.0, 5.0, -3.0], []
    for size in sizes:
        optimizer.zero_grad(set_to_none=set_to_none)
        (size * w).sum().backward()
        optimizer.step()
        kept = optimizer.state[w]["previous_grad"]
        assert kept.data_ptr() != w.grad.data_ptr()
        assert kept.tolist() == [size, size]
        w.grad.add_(100.0)  # accumulation in place must not reach it
        assert kept.tolist() == [size, size]
        seen.append(w.detach().clone())
    (expected,) = {
        tuple(by_hand([torch.tensor([s]) for s in sizes], 0.1, (0.9, 0.999), 1e-8, "uncorrected").tolist())
    }
    assert seen[-1].tolist() == pytest.approx([expected[0]] * 2, rel=1e-5)


def test_a_parameter_without_gradient_keeps_what_it_remembers() -> None:
    w, other = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = DiffGrad([w, other], lr=0.1)
    for g in (4.0, None, None, 4.0):
        w.grad = None if g is None else torch.tensor([g])
        other.grad = torch.ones(1)
        before = w.detach().clone()
        optimizer.step()
    assert optimizer.state[w]["previous_grad"].tolist() == [4.0]
    assert optimizer.state[w]["step"] == 2
    assert float(w.detach() - before) == pytest.approx(-0.05, rel=1e-5)  # no change since: friction 0.5


def test_friction_depends_on_the_scale_of_the_loss() -> None:
    gradients = [randn(50, seed=k) for k in range(5)]
    for scale, share in ((1000.0, 1.0), (0.001, 0.5)):
        scaled = [scale * g for g in gradients]
        ratio = moves(DiffGrad, scaled)[4] / moves(adam, scaled)[4]
        assert float((ratio - share).abs().median()) < 1e-3


@pytest.mark.parametrize("mode", ["uncorrected", "corrected"])
def test_the_analytic_functions_end_where_they_should(mode: str) -> None:
    """With the notebook's x cos 8x for the slope of F2, nobody leaves the local minimum."""
    ends = {
        ("F1", "diffgrad", 0.1): -0.3,
        ("F2", "diffgrad", 0.1): -0.643,
        ("F1", "adam", 0.1): 0.2,
        ("F2", "adam", 0.1): 0.0,
        ("F1", "adam", 0.05): -0.3,
        ("F2", "adam", 0.05): -0.643,
        ("F1", "diffgrad", 0.2): 0.2,
        ("F2", "diffgrad", 0.2): 0.0,
    }
    for (name, kind, lr), expected in list(ends.items())[: 8 if mode == "uncorrected" else 2]:
        found = descend(name, kind, lr, eps_mode=mode)[-1]
        assert float(found[0]) == pytest.approx(expected, abs=1e-3), (name, kind, lr)


def test_the_slopes_of_the_analytic_functions_are_those_of_their_branches() -> None:
    x = torch.linspace(-1.213, 1.2, 96, dtype=torch.float64, requires_grad=True)
    for function in FUNCTIONS.values():
        (slope,) = torch.autograd.grad(function(x).sum(), x)
        numeric = (function(x.detach() + 1e-6) - function(x.detach() - 1e-6)) / 2e-6
        smooth = numeric.abs() < 100  # away from the jump of F2, at -0.9
        torch.testing.assert_close(slope[smooth], numeric[smooth], rtol=0, atol=1e-2)
    assert float(FUNCTIONS["F2"](torch.tensor([-0.9], dtype=torch.float64))) == pytest.approx(0.85)


def test_state_is_three_tensors() -> None:
    w = nn.Parameter(torch.zeros(10))
    optimizer = DiffGrad([w])
    w.grad = torch.ones(10)
    optimizer.step()
    assert optimizer_state_bytes(optimizer) == 3 * 40


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr is -1.0; it must be at least 0"),
        ({"eps": -1e-8}, "eps is -1e-08; it must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] is 1.0"),
        ({"eps_mode": "inside"}, "eps_mode is 'inside'; it must be one of 'corrected', 'uncorrected'"),
        ({"friction": "square"}, "friction is 'square'; it must be one of 'abs'"),
        ({"friction": torch.sigmoid, "flat": True, "compile": True}, "compile=True with a friction function"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        DiffGrad([nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize("foreach", [False, None])
def test_frictions_that_return_nan_or_another_shape_are_refused(foreach: bool | None) -> None:
    for friction, words in (
        (lambda d: d * float("nan"), "friction returned NaN"),
        (
            lambda d: d.sum(),
            r"friction returned \(\); it must return a tensor shaped as its argument, here \(3,\)",
        ),
        (lambda d: 1.0, "friction returned float"),
    ):
        w = nn.Parameter(torch.ones(3))
        w.grad = torch.ones(3)
        with pytest.raises(InputError, match=words):
            DiffGrad([w], friction=friction, foreach=foreach).step()


# --- a real model ---------------------------------------------------------------------------------------------


def test_a_hugging_face_vision_transformer_learns() -> None:
    from transformers import ViTConfig, ViTForImageClassification, get_cosine_schedule_with_warmup

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViTForImageClassification(
            ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=2, **sizes)
        )
    g = torch.Generator().manual_seed(0)
    y = torch.arange(32) % 2
    x = torch.randn(32, 1, 8, 8, generator=g) + y[:, None, None, None]
    optimizer = DiffGrad(model.parameters(), lr=1e-2)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, 20)
    seen = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(pixel_values=x, labels=y).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        seen.append(float(loss.detach()))
    assert seen[-1] < 0.5 * seen[0]
