"""Every check, refusal and named fault of low-rank AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimizer_contract import OptimizerContract
from torch import Tensor, nn

from gradmatch.core.bases import KINDS, basis
from gradmatch.core.checks import InputError
from gradmatch.optim import LowRankAdamW, optimizer_state_bytes
from gradmatch.optim._projectors import Columns, Fixed, Singular, moved, top_columns

RESIDUALS = ("none", "error_feedback", "sign", "scaled")


class TestLowRankAdamW(OptimizerContract):
    def make(self, params, **options):
        return LowRankAdamW(params, **{"lr": 1e-2, "rank": 0.5, "flatten_conv": True, **options})


class TestErrorFeedback(TestLowRankAdamW):
    def make(self, params, **options):
        return super().make(params, residual="error_feedback", update_gap=3, **options)


class TestScaledSingular(TestLowRankAdamW):
    def make(self, params, **options):
        return super().make(params, residual="scaled", projector="svd", update_gap=2, **options)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(start: Tensor, gradients: list[Tensor], **options: Any) -> tuple[Tensor, LowRankAdamW]:
    w = nn.Parameter(start.clone())
    optimizer = LowRankAdamW([w], **{"lr": 0.01, "rank": 4, **options})
    for g in gradients:
        w.grad = g.clone()
        optimizer.step()
        assert torch.equal(w.grad, g)  # the public code adds its buffer and its update into it
    return w.detach(), optimizer


def adamw(start: Tensor, gradients: list[Tensor], **options: Any) -> Tensor:
    w = nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([w], **{"lr": 0.01, "weight_decay": 0.0, **options})
    for g in gradients:
        w.grad = g.clone()
        optimizer.step()
    return w.detach()


GRADIENTS = [randn(20, 12, seed=k) for k in range(1, 16)]


# --- the projection -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dct2", "dct3", "random", "identity"])
def test_the_error_of_the_projection_keeps_the_bound_and_is_what_was_left_out(kind: str) -> None:
    for seed in range(5):
        g = randn(30, 16, seed=seed)
        for rank in (1, 4, 15):
            projector, state = Columns(rank, 16, 1, kind), {"step": 1}
            a = projector.down(g, state)
            error = float((g - projector.up(a, state)).square().sum())
            assert error <= (1 - rank / 16) * float(g.square().sum()) + 1e-12
            left_out = (g @ basis(kind, 16, torch.float64)).square().sum(0).sort().values[: 16 - rank]
            assert error == pytest.approx(float(left_out.sum()))


def test_the_columns_are_those_of_a_naive_loop_and_ties_go_to_the_lower() -> None:
    for seed in range(20):
        scores = torch.randint(0, 6, (17,), generator=torch.Generator().manual_seed(seed)).double()
        left, picked = scores.tolist(), []
        for _ in range(5):
            best = max(range(17), key=lambda j: (left[j], -j))
            picked.append(best)
            left[best] = -1.0
        found = top_columns(scores, 5)
        assert found.tolist() == sorted(picked)
        assert found.dtype is torch.int32


def test_scores_are_of_the_norm_asked_for() -> None:
    g = torch.tensor([[3.0, 2.0, 0.0], [0.0, 2.0, 0.0]], dtype=torch.float64)
    for norm, expected in ((1, [1]), (2, [0])):
        state = {"step": 1}
        Columns(1, 3, 1, "identity", norm).down(g, state)
        assert state["indices"].tolist() == expected


def test_moving_columns_equals_the_products() -> None:
    q = basis("dct2", 12, torch.float64)
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        old, new = (torch.randperm(12, generator=generator)[:5].sort().values.int() for _ in range(2))
        x = randn(7, 5, seed=seed)
        expected = x @ (q[:, old].T @ q[:, new])
        torch.testing.assert_close(moved(x, old, new), expected, rtol=0, atol=1e-12)
        assert bool((moved(x.square(), old, new) >= 0).all())


# --- the step -------------------------------------------------------------------------------------------------


def by_hand(gradients: list[Tensor], rank: int, gap: int, rotate: bool, feedback: bool, norm: int) -> Tensor:
    """The paper's step with products and no shortcuts, right side, from zero; decay 0.1."""
    lr, b1, b2, eps, q = 0.01, 0.9, 0.999, 1e-8, basis("dct2", 12, torch.float64)
    w, error, old, m, v = torch.ones(20, 12).double(), 0.0, None, 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        full = g + error
        if t == 1 or t % gap == 0:
            s = full @ q
            scores = s.abs().pow(norm).sum(0)
            idx = sorted(sorted(range(12), key=lambda j, s=scores: (-float(s[j]), j))[:rank])
            if rotate and old is not None:
                turn = q[:, old].T @ q[:, idx]
                m, v = m @ turn, (v @ turn).abs()
            old = idx
        a = full @ q[:, old]
        if feedback:
            error = full - a @ q[:, old].T
        m, v = b1 * m + (1 - b1) * a, b2 * v + (1 - b2) * a * a
        u = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + eps)
        w = w * (1 - lr * 0.1) - lr * u @ q[:, old].T
    return w


@pytest.mark.parametrize("gap", [1, 4])
@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("feedback", [True, False])
def test_equals_the_paper_line_by_line(gap: int, rotate: bool, feedback: bool) -> None:
    residual = "error_feedback" if feedback else "none"
    for norm in (1, 2):
        found, _ = run(
            torch.ones(20, 12).double(), GRADIENTS, update_gap=gap, rotate=rotate, residual=residual,
            select_norm=norm, weight_decay=0.1,
        )  # fmt: skip
        expected = by_hand(GRADIENTS, 4, gap, rotate, feedback, norm)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)  # roots of squares that cancel


@pytest.mark.parametrize("kind", KINDS[:3])
def test_full_rank_is_adamw_in_the_turned_variables(kind: str) -> None:
    start, q = randn(20, 12), basis(kind, 12, torch.float64)
    found, _ = run(start, GRADIENTS, rank=12, basis=kind, weight_decay=0.1)
    expected = adamw(start @ q, [g @ q for g in GRADIENTS], weight_decay=0.1) @ q.T
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{"rank": 12, "basis": "identity"}, {"rank": 0}, {"max_dim": 20}])
def test_full_rank_in_its_own_coordinates_is_adamw(options: dict[str, Any]) -> None:
    start = randn(20, 12)
    found, _ = run(start, GRADIENTS, weight_decay=0.1, **options)
    torch.testing.assert_close(found, adamw(start, GRADIENTS, weight_decay=0.1), rtol=0, atol=1e-7)


@pytest.mark.parametrize("projector", ["columns", "svd", "random"])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_the_left_case_is_the_right_one_of_the_transpose_bitwise(projector: str, residual: str) -> None:
    options = {"projector": projector, "residual": residual, "update_gap": 2, "weight_decay": 0.1}
    start = randn(20, 12)
    right, _ = run(start, GRADIENTS, **options)
    left, _ = run(start.T.contiguous(), [g.T.contiguous() for g in GRADIENTS], **options)
    assert torch.equal(right, left.T)
    forced, _ = run(start, GRADIENTS, **options, side="right")
    assert torch.equal(right, forced)
    other, _ = run(start, GRADIENTS, **options, side="left")
    assert not torch.equal(right, other)


@pytest.mark.parametrize("projector", ["columns", "svd", "random"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("laid_out", [False, True])
def test_single_precision_moves_weights_in_place_to_the_same(
    projector: str, turned: bool, laid_out: bool
) -> None:
    options = {"projector": projector, "update_gap": 2, "weight_decay": 0.1}
    expected, _ = run(randn(20, 12), GRADIENTS, **options)
    start, gradients = randn(20, 12).float(), [g.float() for g in GRADIENTS]
    if turned:
        start, gradients = start.T, [g.T for g in gradients]
    if laid_out:
        start, gradients = start.contiguous(), [g.contiguous() for g in gradients]
    found, _ = run(start, gradients, **options)
    assert found.dtype is torch.float32
    torch.testing.assert_close((found.T if turned else found).double(), expected, rtol=0, atol=1e-4)


def test_products_and_fft_agree_and_large_sides_take_the_fft(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradmatch.optim import _projectors

    calls = []
    original = _projectors.dct2
    monkeypatch.setattr(_projectors, "dct2", lambda g: calls.append(1) or original(g))
    gradients = [randn(210, 200, seed=k) for k in range(3)]
    ends = [run(torch.zeros(210, 200).double(), gradients, transform=t)[0] for t in ("matmul", "fft", "auto")]
    assert len(calls) == 6
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-9)
    run(torch.zeros(20, 12).double(), GRADIENTS)
    assert len(calls) == 6


def test_gaps_count_the_updates_of_each_parameter() -> None:
    """Directions at a parameter's own steps 1, 3, 6: a late one does not wait for a counter of the optimizer."""
    late, early = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(6, 4))
    optimizer = LowRankAdamW([late, early], lr=0.1, rank=1, basis="identity", update_gap=3)
    chosen = []
    for t in range(1, 7):
        early.grad = torch.zeros(6, 4)
        early.grad[:, t % 4] = 1.0
        late.grad = early.grad.clone() if t > 1 else None
        optimizer.step()
        chosen.append(
            [int(optimizer.state[p]["indices"]) if p in optimizer.state else None for p in (late, early)]
        )
    assert [early for _, early in chosen] == [1, 1, 3, 3, 3, 2]
    assert [late for late, _ in chosen] == [None, 2, 2, 0, 0, 0]


def test_a_new_column_starts_without_averages() -> None:
    first, second = torch.zeros(4, 3).double(), torch.zeros(4, 3).double()
    first[:, 0], second[:, 2] = 1.0, 1.0
    for rotate, m, v in ((True, 0.1, 0.001), (False, 0.19, 0.001999)):
        w, _ = run(
            torch.zeros(4, 3).double(), [first, second], lr=1.0, rank=1, basis="identity", rotate=rotate
        )
        step = m / (1 - 0.9**2) / ((v / (1 - 0.999**2)) ** 0.5 + 1e-8)
        torch.testing.assert_close(-w[:, 2], torch.full((4,), step, dtype=torch.float64))


# --- residuals ------------------------------------------------------------------------------------------------


def test_error_feedback_loses_nothing_and_stays_bounded() -> None:
    g, w = randn(20, 16), nn.Parameter(torch.zeros(20, 16, dtype=torch.float64))
    optimizer = LowRankAdamW([w], lr=0.0, rank=4, residual="error_feedback")
    applied, error, worst = torch.zeros_like(g), torch.zeros_like(g), 0.0

    class Watched(Columns):
        def down(self, gradient, state):
            a = super().down(gradient, state)
            seen.append(super().up(a, state))
            return a

    optimizer._own, seen = Watched(4, 16), []
    for k in range(1, 401):
        w.grad = g.clone()
        optimizer.step()
        new = optimizer.state[w]["error"]
        torch.testing.assert_close(new + seen[-1], g + error, rtol=0, atol=1e-12)
        error = new.clone()
        applied += seen[-1]
        worst = max(worst, float(new.norm() / g.norm()))
        assert k > 3 or torch.equal(w.grad, g)
    torch.testing.assert_close(applied + error, 400 * g, rtol=0, atol=1e-9)
    assert worst < 3.0


def test_the_sign_of_the_rest_is_stepped_along() -> None:
    g = torch.tensor([[4.0, -1.0, 0.5]], dtype=torch.float64).repeat(3, 1)
    w, _ = run(torch.zeros(3, 3).double(), [g], lr=0.1, rank=1, basis="identity", residual="sign", eps=0.0)
    torch.testing.assert_close(w, -0.1 * g.sign())


def test_the_rest_is_scaled_as_adam_scaled_and_grows_slowly() -> None:
    g = torch.tensor([[4.0, -1.0, 0.5], [8.0, 2.0, 0.0], [2.0, 0.0, 0.0]], dtype=torch.float64)
    options = {"lr": 0.1, "rank": 1, "basis": "identity", "residual": "scaled", "eps": 0.0}
    w, optimizer = run(torch.zeros(3, 3).double(), [g], **options)
    rest = g * torch.tensor([0.0, 1.0, 1.0])
    scaled = rest / g[:, :1].abs()  # Adam's first step is a sign: |u| = 1
    expected = -0.1 * (torch.tensor([[1.0, 0, 0]] * 3) + scaled)
    torch.testing.assert_close(w, expected, rtol=1e-6, atol=0)
    norm = float(next(iter(optimizer.state.values()))["residual_norm"])
    jump = g * torch.tensor([1.0, 100.0, 100.0])  # still column 0? no: the column with the largest norm
    _, optimizer = run(torch.zeros(3, 3).double(), [g, jump, jump], **{**options, "update_gap": 50})
    grown = float(next(iter(optimizer.state.values()))["residual_norm"])
    assert grown == pytest.approx(1.01**2 * norm, rel=1e-5)


# --- projectors -----------------------------------------------------------------------------------------------


def test_singular_vectors_are_the_best_subspace() -> None:
    g, state = randn(20, 12), {"step": 1}
    projector = Singular(3)
    a = projector.down(g, state)
    error = (g - projector.up(a, state)).square().sum()
    torch.testing.assert_close(error, torch.linalg.svdvals(g)[3:].square().sum())


def test_averages_turn_with_singular_vectors() -> None:
    states = []
    for rotate in (True, False):
        _, optimizer = run(torch.zeros(20, 12).double(), GRADIENTS[:2], projector="svd", rotate=rotate)
        states.append(next(iter(optimizer.state.values())))
    first, second = (torch.linalg.svd(g, full_matrices=False).Vh[:4].T for g in GRADIENTS[:2])
    turn, a, b = first.T @ second, GRADIENTS[0] @ first, GRADIENTS[1] @ second
    for state, old in zip(states, (a @ turn, a), strict=True):
        torch.testing.assert_close(state["exp_avg"], 0.9 * 0.1 * old + 0.1 * b)
    torch.testing.assert_close(
        states[0]["exp_avg_sq"], 0.999 * 0.001 * (a.square() @ turn).abs() + 0.001 * b.square()
    )


def test_a_fixed_subspace_is_drawn_from_its_seed_and_kept_nowhere() -> None:
    one, optimizer = run(torch.zeros(20, 12).double(), GRADIENTS, projector="random")
    again, _ = run(torch.zeros(20, 12).double(), GRADIENTS, projector="random")
    other, _ = run(torch.zeros(20, 12).double(), GRADIENTS, projector="random", seed=1)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert set(next(iter(optimizer.state.values()))) == {"step", "exp_avg", "exp_avg_sq"}
    assert torch.linalg.matrix_rank(one) == 4
    torch.testing.assert_close(Fixed(4, 12).up(Fixed(4, 12).down(one, {}), {}), one)


def test_a_projector_of_ones_own() -> None:
    class First:
        def down(self, gradient, state):
            state["calls"] = state.get("calls", 0) + 1
            return gradient[:, :2]

        def up(self, update, state):
            return nn.functional.pad(update, (0, 10))

    start = randn(20, 12)
    found, optimizer = run(start, GRADIENTS, projector=First())
    assert torch.equal(found[:, 2:], start[:, 2:])
    torch.testing.assert_close(found[:, :2], adamw(start[:, :2], [g[:, :2] for g in GRADIENTS]))
    assert next(iter(optimizer.state.values()))["calls"] == len(GRADIENTS)


# --- many layers, state ---------------------------------------------------------------------------------------


def test_layers_of_different_sides_each_have_their_basis() -> None:
    """The public class keeps one matrix for the whole optimizer, sized by the first layer."""
    shapes = [(20, 12), (12, 20), (9, 7), (30, 12)]
    starts = [randn(*s, seed=k) for k, s in enumerate(shapes)]
    gradients = [[randn(*s, seed=10 * k + i) for k, s in enumerate(shapes)] for i in range(4)]
    ws = [nn.Parameter(s.clone()) for s in starts]
    optimizer = LowRankAdamW(ws, lr=0.01, rank=4)
    for own in gradients:
        for w, g in zip(ws, own, strict=True):
            w.grad = g.clone()
        optimizer.step()
    for k, w in enumerate(ws):
        alone, _ = run(starts[k], [own[k] for own in gradients])
        assert torch.equal(w.detach(), alone)


def test_state_bytes_are_those_of_the_formula() -> None:
    n, m, r = 40, 24, 3
    for options, expected in (
        ({}, 2 * n * r * 4 + r * 4),
        ({"projector": "svd"}, 2 * n * r * 4 + m * r * 4),
        ({"projector": "random"}, 2 * n * r * 4),
        ({"residual": "error_feedback"}, 2 * n * r * 4 + r * 4 + n * m * 4),
        ({"rank": 0}, 2 * n * m * 4),
    ):
        for shape in ((n, m), (m, n)):
            _, optimizer = run(torch.zeros(shape), [torch.ones(shape)], **{"rank": r, **options})
            assert optimizer_state_bytes(optimizer) == expected, options


def test_the_state_holds_whole_numbers_and_no_basis() -> None:
    _, optimizer = run(torch.zeros(300, 256), [torch.ones(300, 256)])
    (state,) = optimizer.state_dict()["state"].values()
    assert {k: (v.dtype, tuple(v.shape)) for k, v in state.items() if isinstance(v, Tensor)} == {
        "exp_avg": (torch.float32, (300, 4)),
        "exp_avg_sq": (torch.float32, (300, 4)),
        "indices": (torch.int32, (4,)),
    }


def test_groups_have_their_rank_and_shares_are_of_the_smaller_side() -> None:
    ws = [nn.Parameter(torch.ones(20, 12)) for _ in range(3)]
    groups = [{"params": [ws[0]]}, {"params": [ws[1]], "rank": 0.25}, {"params": [ws[2]], "rank": 0}]
    optimizer = LowRankAdamW(groups, lr=0.1, rank=5)
    for w in ws:
        w.grad = torch.ones(20, 12)
    optimizer.step()
    assert [optimizer.state[w]["exp_avg"].shape for w in ws] == [(20, 5), (20, 3), (20, 12)]


def test_half_precision_is_computed_in_single() -> None:
    _, optimizer = run(torch.zeros(300, 256).bfloat16(), [torch.ones(300, 256).bfloat16()], transform="fft")
    (state,) = optimizer.state.values()
    assert state["exp_avg"].dtype is torch.float32


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr is -1.0; it must be at least 0"),
        ({"rank": -1}, "rank is -1; it must be at least 0"),
        ({"rank": 2.5}, "rank is 2.5; it must be a whole number"),
        (
            {"rank": 13},
            r"rank is 13 and parameter 0 has shape \(20, 12\); it must be at most 12, or pass clamp_rank",
        ),
        ({"projector": "qr"}, "projector is 'qr'; it must be one of 'columns', 'svd', 'random'"),
        ({"basis": "hadamard"}, 'basis is "hadamard" for a side of 12; it must be a power of 2'),
        ({"basis": "sine"}, "basis is 'sine'"),
        ({"side": "both"}, "side is 'both'"),
        ({"update_gap": 0}, "update_gap is 0"),
        ({"select_norm": 3}, "select_norm is 3; it must be one of 1, 2"),
        ({"residual": "drop"}, "residual is 'drop'"),
        ({"transform": "fast"}, "transform is 'fast'"),
        ({"transform": "fft", "basis": "dct3"}, "transform is \"fft\" with basis 'dct3'"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] is 1.0"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        LowRankAdamW([nn.Parameter(torch.ones(20, 12))], **{"lr": 0.1, "rank": 4, **options})


def test_a_rank_above_the_side_can_be_clamped() -> None:
    _, optimizer = run(torch.zeros(20, 12), [torch.ones(20, 12)], rank=50, clamp_rank=True)
    assert next(iter(optimizer.state.values()))["exp_avg"].shape == (20, 12)


def test_weights_of_convolutions_need_to_be_asked_for() -> None:
    kernel = [nn.Parameter(torch.ones(8, 4, 3, 3))]
    with pytest.raises(InputError, match=r"parameter 0 has shape \(8, 4, 3, 3\); pass flatten_conv=True"):
        LowRankAdamW(kernel, lr=0.1, rank=2)
    start, g = randn(8, 4, 3, 3), randn(8, 4, 3, 3, seed=1)
    flat, _ = run(start.flatten(1), [g.flatten(1)], rank=2)
    found, _ = run(start, [g], rank=2, flatten_conv=True)
    assert torch.equal(found.flatten(1), flat)


def test_a_rank_changed_after_the_first_step_is_refused() -> None:
    w = nn.Parameter(torch.ones(20, 12))
    optimizer = LowRankAdamW([w], lr=0.1, rank=4)
    w.grad = torch.ones(20, 12)
    optimizer.step()
    optimizer.param_groups[0]["rank"] = 5
    with pytest.raises(InputError, match="rank is 5 for a weight whose state has 4; it cannot change"):
        optimizer.step()


# --- a real model ---------------------------------------------------------------------------------------------


def test_a_hugging_face_model_learns_with_low_rank_blocks() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=17, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    blocks = [p for n, p in model.named_parameters() if ".h." in n]
    rest = [p for n, p in model.named_parameters() if ".h." not in n]
    groups = [{"params": blocks}, {"params": rest, "rank": 0}]
    optimizer = LowRankAdamW(groups, lr=0.02, rank=0.25, residual="error_feedback")
    ids, seen = torch.arange(32).view(4, 8) % 17, []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    assert seen[-1] < 0.5 * seen[0]
    full = sum(2 * 4 * p.numel() for p in model.parameters())
    assert optimizer_state_bytes(optimizer) < full + 4 * sum(p.numel() for p in blocks)
