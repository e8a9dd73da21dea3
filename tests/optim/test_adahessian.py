"""Every check, refusal and named fault of AdaHessian."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_contract import Net, OptimizerContract, data, losses
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.core.checks import InputError
from gradmatch.core.hutchinson import hessian_diagonals, signs_like
from gradmatch.optim import AdaHessian, optimizer_state_bytes
from gradmatch.optim import adahessian as module
from gradmatch.optim.adahessian import averaged


class TestAdaHessian(OptimizerContract):
    def make(self, params, **options):
        return AdaHessian(params, lr=1e-2, **options)


class TestInClosures(TestAdaHessian):
    """The same, each step with a closure."""

    def drive(self, optimizer, net, x, y, sign=1.0):
        optimizer.zero_grad()
        return optimizer.step(lambda: sign * losses(net(x), y).mean())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def loss_of(net: nn.Module, k: int) -> Callable[[], Tensor]:
    x, y = data(k, next(net.parameters()).dtype)
    return lambda: losses(net(x), y).mean()


def quadratic(h: Tensor, w: Tensor) -> Callable[[], Tensor]:
    return lambda: (0.5 * h * w**2).sum()


# --- the estimate ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_diagonal_hessian_is_exact_for_any_signs(seed: int) -> None:
    w = randn(20).requires_grad_()
    (slope,) = torch.autograd.grad((w**4).sum(), w, create_graph=True)
    (found,) = hessian_diagonals([slope], [w], seeded(seed))
    torch.testing.assert_close(found, 12 * w.detach() ** 2)


def test_the_mean_of_many_samples_is_the_diagonal() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1, bias=False)).double()
    params = list(net.parameters())
    with torch.no_grad():
        for i, p in enumerate(params):
            p.copy_(randn(*p.shape, seed=i))
    x = randn(16, 2, seed=9)
    flat = torch.cat([p.detach().flatten() for p in params])

    def loss(v: Tensor) -> Tensor:
        parts = v.split([p.numel() for p in params])
        w = {n: part.view(p.shape) for (n, p), part in zip(net.named_parameters(), parts, strict=True)}
        return torch.func.functional_call(net, w, (x,)).square().mean()

    hessian = torch.autograd.functional.hessian(loss, flat)
    slopes = torch.autograd.grad(net(x).square().mean(), params, create_graph=True)
    z = (2 * torch.randint(0, 2, (20_000, len(flat)), generator=seeded()) - 1).double()
    theory = (z * (z @ hessian)).mean(0)  # what the estimate computes, many at once
    error = (hessian.square().sum(1) - hessian.diag().square()).sqrt() / 20_000**0.5
    assert bool(((theory - hessian.diag()).abs() <= 3 * error + 1e-12).all())
    found = torch.cat([d.flatten() for d in hessian_diagonals(slopes, params, seeded(), 400)])
    wide = error * (20_000 / 400) ** 0.5
    assert bool(((found - hessian.diag()).abs() <= 4 * wide + 1e-12).all())
    assert float((found - hessian.diag()).abs().max()) > 1e-6  # it is an estimate here


def test_signs_are_signs_and_do_not_depend_on_how_tensors_are_grouped() -> None:
    a, b = torch.zeros(300, 7), torch.zeros(5, dtype=torch.float64)
    joint = signs_like([a, b], seeded(3))
    generator = seeded(3)
    apart = [*signs_like([a], generator), *signs_like([b], generator)]
    for one, two, like in zip(joint, apart, (a, b), strict=True):
        assert torch.equal(one, two)
        assert one.dtype is like.dtype
    assert set(joint[0].flatten().tolist()) == {-1.0, 1.0}
    assert abs(float(joint[0].mean())) < 3 / 2100**0.5


# --- the step -------------------------------------------------------------------------------------------------


def test_the_first_step_on_a_separable_loss_is_a_damped_newton_step() -> None:
    h, start = torch.rand(10, generator=seeded(), dtype=torch.float64) + 0.1, randn(10)
    w = nn.Parameter(start.clone())
    AdaHessian([w], lr=0.3, eps=0.0).step(quadratic(h, w))
    torch.testing.assert_close(w.detach(), start - 0.3 * start)  # g / h = w


def by_hand(
    net: nn.Module, steps: int, *, lr: float, betas: tuple[float, float], eps: float, wd: float, k: float
) -> list[Tensor]:
    """The paper's algorithm, one tensor after another, |D| averaged over kernel windows."""
    params = [p for p in net.parameters() if p is not net.unused]
    generator, m, v = seeded(), [0.0] * len(params), [0.0] * len(params)
    for t in range(1, steps + 1):
        x, y = data(t - 1, torch.float64)
        slopes = torch.autograd.grad(losses(net(x), y).mean(), params, create_graph=True)
        z = signs_like(params, generator)
        products = torch.autograd.grad(slopes, params, z)
        for i, (p, g, sign, hz) in enumerate(zip(params, slopes, z, products, strict=True)):
            d = (sign * hz).abs()
            if d.ndim == 4:
                d = d.mean((2, 3), keepdim=True).expand_as(d)
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g.detach()
            v[i] = betas[1] * v[i] + (1 - betas[1]) * d * d
            denominator = (v[i].sqrt() / (1 - betas[1] ** t) ** 0.5) ** k + eps
            p.data -= lr * (m[i] / (1 - betas[0] ** t) / denominator + wd * p.data)
    return [p.detach() for p in params]


@pytest.mark.parametrize("power", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("foreach", [False, None])
def test_equals_the_paper_line_by_line(power: float, foreach: bool | None) -> None:
    numbers = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 0.01}
    expected = by_hand(Net(torch.float64), 6, **numbers, wd=0.1, k=power)
    net = Net(torch.float64)
    optimizer = AdaHessian(
        net.parameters(), **numbers, weight_decay=0.1, hessian_power=power, foreach=foreach
    )
    for k in range(6):
        loss = optimizer.step(loss_of(net, k))
        assert not loss.requires_grad
    found = [p.detach() for p in net.parameters() if p is not net.unused]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_power_zero_is_descent_along_the_corrected_average() -> None:
    h, w = torch.tensor([5.0, 0.1], dtype=torch.float64), nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = AdaHessian([w], lr=0.1, eps=1e-4, hessian_power=0.0)
    own, m = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for t in range(1, 6):
        m = 0.9 * m + 0.1 * h * own
        own = own - 0.1 / (1 + 1e-4) * m / (1 - 0.9**t)
        optimizer.step(quadratic(h, w))
    torch.testing.assert_close(w.detach(), own)


def test_negative_curvature_keeps_the_sign_of_the_average() -> None:
    w = nn.Parameter(torch.tensor([0.5, -0.5], dtype=torch.float64))
    AdaHessian([w], lr=0.1, eps=0.0).step(lambda: (-2.0 * w**2).sum())
    assert w.tolist() == pytest.approx([0.55, -0.55])  # away from the top, by lr |g / h|


@pytest.mark.parametrize("n_samples", [1, 3])
def test_a_graph_and_a_closure_give_the_same(n_samples: int) -> None:
    ends = []
    for closed in (False, True):
        net = Net(torch.float64)
        optimizer = AdaHessian(
            net.parameters(), lr=0.05, n_samples=n_samples, generator=seeded(5), weight_decay=0.1
        )
        for k in range(5):
            loss = loss_of(net, k)
            if closed:
                optimizer.step(loss)
            else:
                optimizer.zero_grad()
                loss().backward(create_graph=True)
                optimizer.step()
            assert all(p.grad is None or p.grad.grad_fn is None for p in net.parameters())
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


def test_groups_are_optimizers_of_their_own_that_share_signs() -> None:
    """The public guide version looks a trace up by its place within the group: wrong from the second group on."""
    h = [randn(4, 3, seed=1), randn(6, seed=2)]
    starts = [randn(4, 3, seed=3), randn(6, seed=4)]

    def loss(ws: list[nn.Parameter]) -> Tensor:
        return sum((k * w.exp() + w**2).sum() for k, w in zip(h, ws, strict=True))

    together = [nn.Parameter(s.clone()) for s in starts]
    generator = seeded(1)
    optimizer = AdaHessian(
        [{"params": [together[0]], "lr": 0.1}, {"params": [together[1]], "lr": 0.02}], generator=generator
    )
    apart = [nn.Parameter(s.clone()) for s in starts]
    shared = seeded(1)
    each = [AdaHessian([w], lr=lr, generator=shared) for w, lr in zip(apart, (0.1, 0.02), strict=True)]
    for _ in range(4):
        optimizer.step(lambda: loss(together))
        for k, own in enumerate(each):
            others = [w if i == k else w.detach() for i, w in enumerate(apart)]
            own.step(lambda others=others: loss(others))
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=1e-12)


def test_a_parameter_without_gradient_does_not_shift_the_curvature_of_the_next() -> None:
    first, second = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    optimizer = AdaHessian([first, second], lr=0.1, eps=0.0)
    optimizer.step(lambda: (0.5 * torch.tensor([1.0, 10.0, 100.0]) * second**2).sum())
    assert second.tolist() == pytest.approx([0.9] * 3)
    assert first.grad is None
    assert first not in optimizer.state


def test_gradients_without_curvature_count_as_flat() -> None:
    w = nn.Parameter(torch.ones(2, dtype=torch.float64))
    q = nn.Parameter(torch.ones(2, dtype=torch.float64))
    AdaHessian([w, q], lr=0.1, eps=0.5).step(lambda: w.sum() + (q**2).sum())
    assert w.tolist() == pytest.approx([1 - 0.1 / 0.5] * 2)
    assert q.tolist() == pytest.approx([1 - 0.2 / 2.5] * 2)


def test_frozen_parameters_stay() -> None:
    w, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = AdaHessian([w, frozen])
    optimizer.step(lambda: (w * frozen).square().sum())
    assert frozen.tolist() == [1, 1]
    assert w[0].item() < 1


# --- blocks ---------------------------------------------------------------------------------------------------


def test_blocks_hold_their_mean() -> None:
    d = randn(8, 3, 3, 3).abs()
    window = averaged(d, "conv")
    assert window.shape == d.shape
    torch.testing.assert_close(window, d.mean((2, 3), keepdim=True).expand_as(d))
    for block, shape in ((1, (5, 7)), (None, (5, 7)), ("conv", (5, 7)), ("conv", (5,)), ("row", (5,))):
        own = randn(*shape)
        assert torch.equal(averaged(own, block), own)
    matrix = randn(5, 7)
    torch.testing.assert_close(averaged(matrix, "row"), matrix.mean(1, keepdim=True).expand(5, 7))
    for block, d in (("conv", randn(2, 3, 5)), ("row", randn(2, 3, 5)), ("conv", randn(2, 3, 2, 2, 2))):
        dims = tuple(range(2, d.ndim))  # the public code took the tensor before for 3-d and 5-d weights
        torch.testing.assert_close(averaged(d, block), d.mean(dims, keepdim=True).expand_as(d))


@pytest.mark.parametrize("block", [1, 2, 4, 5, 35, 50])
def test_stretches_of_weights_with_a_shorter_last_one(block: int) -> None:
    d = randn(5, 7)
    expected = torch.cat([p.mean().expand(len(p)) for p in d.flatten().split(block)]).view(5, 7)
    torch.testing.assert_close(averaged(d, block), expected)


def test_absolute_values_are_averaged_or_signed_ones() -> None:
    h = torch.tensor([[2.0, -4.0]], dtype=torch.float64)
    for average, expected in (("abs", 3.0), ("signed", -1.0)):
        w = nn.Parameter(torch.ones(1, 2, dtype=torch.float64))
        optimizer = AdaHessian([w], block="row", average=average)
        optimizer.step(quadratic(h, w))
        v = optimizer.state[w]["exp_hessian_diag_sq"]
        torch.testing.assert_close(v / 1e-3, torch.full_like(v, expected**2))


# --- delayed curvature ----------------------------------------------------------------------------------------


def test_delayed_curvature_moves_at_its_steps_and_is_corrected_by_their_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Corrected by the number of steps, v would be a quarter of h^2 after 12 steps."""
    calls = []
    original = module.hessian_diagonals
    monkeypatch.setattr(module, "hessian_diagonals", lambda *a: calls.append(1) or original(*a))
    h = torch.tensor([3.0, 0.2], dtype=torch.float64)
    w = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = AdaHessian([w], lr=0.01, hessian_every=3, eps=0.25)
    moved = []
    for t in range(1, 13):
        before = optimizer.state[w].get("exp_hessian_diag_sq", torch.zeros(2)).clone() if t > 1 else None
        start, m = w.detach().clone(), optimizer.state.get(w, {}).get("exp_avg", torch.zeros(2)).clone()
        optimizer.step(quadratic(h, w))
        s = optimizer.state[w]
        if before is None or not torch.equal(before, s["exp_hessian_diag_sq"]):
            moved.append(t)
        m = (0.9 * m + 0.1 * h * start) / (1 - 0.9**t)
        torch.testing.assert_close(start - w.detach(), 0.01 * m / (h + 0.25))
        corrected = s["exp_hessian_diag_sq"] / (1 - 0.999 ** s["hessian_step"])
        torch.testing.assert_close(corrected, h**2)
    assert moved == [1, 4, 7, 10]
    assert len(calls) == 4
    assert (s["step"], s["hessian_step"]) == (12, 4)


def test_between_refreshes_a_closure_needs_no_graph_of_gradients() -> None:
    w = nn.Parameter(torch.ones(3))
    optimizer = AdaHessian([w], hessian_every=2)
    seen = []

    def loss() -> Tensor:
        value = w * 1.0
        value.register_hook(lambda g: seen.append(g.requires_grad))
        return (value**3).sum()

    for _ in range(4):
        optimizer.step(loss)
        seen.append("|")
    assert seen == [True, False, "|", False, "|"] * 2  # a refresh has a second pass


# --- memory and state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", [False, True])
def test_memory_is_flat(closed: bool) -> None:
    net, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), torch.ones(3, 4)
    optimizer = AdaHessian(net.parameters(), lr=0.01)

    def step() -> None:
        if closed:
            optimizer.step(lambda: net(x).square().mean())
        else:
            optimizer.zero_grad()
            net(x).square().mean().backward(create_graph=True)
            optimizer.step()

    def alive() -> int:
        return sum(isinstance(o, Tensor) for o in gc.get_objects())

    gc.collect()
    gc.disable()  # a cycle of a parameter and its gradient would stay
    try:
        counts = []
        for k in range(50):
            step()
            if k in (4, 49):
                counts.append(alive())
    finally:
        gc.enable()
    assert counts[0] == counts[1]


def test_the_graphs_own_gradient_is_not_detached_in_place() -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = AdaHessian([w])
    (w**3).sum().backward(create_graph=True)
    held = w.grad
    optimizer.step()
    assert held.requires_grad
    assert not w.grad.requires_grad
    assert torch.equal(held.detach(), w.grad)


def test_the_generator_travels_with_the_state() -> None:
    runs = []
    for resumed in (False, True):
        net = Net()
        optimizer = AdaHessian(net.parameters(), generator=seeded(7), hessian_every=2)
        for k in range(6):
            if resumed and k == 3:
                kept = optimizer.state_dict()
                optimizer = AdaHessian(net.parameters(), generator=seeded(99), hessian_every=2)
                optimizer.load_state_dict(kept)
            optimizer.step(loss_of(net, k))
        runs.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.equal(*runs)


def test_state_is_two_tensors() -> None:
    w = nn.Parameter(torch.ones(10))
    optimizer = AdaHessian([w])
    optimizer.step(lambda: (w**2).sum())
    assert optimizer_state_bytes(optimizer) == 80


def test_sync_averages_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    h, start = torch.tensor([1.0, 3.0], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    reduced = []

    def all_reduce(t: Tensor) -> None:
        t.mul_(1 + 3)  # the other rank's loss is three times this one's
        reduced.append(t)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    for sync, factor, calls in ((False, 1, 0), (True, 2, 2)):
        w = nn.Parameter(start.clone())
        optimizer = AdaHessian([w], lr=0.1, eps=0.0, sync=sync)
        optimizer.step(quadratic(h, w))
        assert len(reduced) == calls
        torch.testing.assert_close(w.grad, factor * h)
        torch.testing.assert_close(optimizer.state[w]["exp_hessian_diag_sq"], 1e-3 * (factor * h) ** 2)


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr is -1.0; it must be at least 0"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] is 1.0"),
        ({"hessian_power": 1.1}, "hessian_power is 1.1; it must lie in"),
        ({"hessian_power": -0.1}, "hessian_power is -0.1; it must lie in"),
        ({"block": 0}, "block is 0; it must be at least 1"),
        ({"block": "column"}, "block is 'column'; it must be one of 'conv', 'row', None"),
        ({"average": "mean"}, "average is 'mean'; it must be one of 'abs', 'signed'"),
        ({"n_samples": 0}, "n_samples is 0"),
        ({"hessian_every": 0}, "hessian_every is 0"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        AdaHessian([nn.Parameter(torch.ones(2))], **options)


def test_gradients_without_graph_are_refused() -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = AdaHessian([w])
    (w**3).sum().backward()
    with pytest.raises(InputError, match=r"without a graph; call loss.backward\(create_graph=True\)"):
        optimizer.step()
    optimizer.zero_grad()
    (w**3).sum().backward(create_graph=True)
    w.grad = w.grad.detach().clamp(-1, 1)  # as some clip
    with pytest.raises(InputError, match="without a graph"):
        optimizer.step()


def test_a_scaled_loss_is_refused() -> None:
    for enabled in (True, False):
        w = nn.Parameter(torch.ones(2))
        optimizer = AdaHessian([w])
        scaler = torch.amp.GradScaler("cpu", enabled=enabled)
        scaler.scale((w**3).sum()).backward(create_graph=True)
        if enabled:
            with pytest.raises(InputError, match="the curvature too; train in bfloat16"):
                scaler.step(optimizer)
        else:
            scaler.step(optimizer)
            assert w[0].item() < 1


@pytest.mark.parametrize("closed", [False, True])
def test_sparse_gradients_are_refused_in_both_ways(closed: bool) -> None:
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = AdaHessian(table.parameters())

    def loss() -> Tensor:
        return table(torch.tensor([1, 2])).square().sum()

    if not closed:
        loss().backward(create_graph=True)
    with pytest.raises(InputError, match="SparseAdam"):
        optimizer.step(loss if closed else None)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        return slope * 3 * ctx.saved_tensors[0] ** 2


class Cube(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)


def test_a_module_without_second_derivative_is_named() -> None:
    first, x = nn.Linear(3, 3), torch.ones(2, 3)
    lengths = torch.tensor([2]), torch.tensor([1])
    cube, ctc = Cube(), nn.CTCLoss()
    cases = {
        r"Cube\(\)": lambda: cube(first(x)).square().sum(),
        r"CTCLoss\(\)": lambda: ctc(first(x)[:, None].log_softmax(-1), torch.tensor([[1]]), *lengths),
    }
    for words, loss in cases.items():
        with pytest.raises(InputError, match=f"a model with {words}, which cannot be differentiated twice"):
            AdaHessian(first.parameters()).step(loss)
    with pytest.raises(InputError, match="a loss that cannot be differentiated twice"):
        AdaHessian(first.parameters()).step(lambda: Once.apply(first(x)).square().sum())


@pytest.mark.parametrize("closed", [False, True])
def test_fused_attention_is_replaced_in_closures_and_named_elsewhere(closed: bool) -> None:
    w = nn.Parameter(randn(3, 1, 2, 4, 8).float())
    optimizer = AdaHessian([w])
    before = w.detach().clone()

    def loss() -> Tensor:
        return F.scaled_dot_product_attention(*w).square().sum()

    if closed:
        optimizer.step(loss)
        assert not torch.equal(w, before)
        return
    loss().backward(create_graph=True)
    with pytest.raises(InputError, match=r"sdpa_kernel\(SDPBackend.MATH\), as step\(closure\) sets"):
        optimizer.step()


# --- a real model ---------------------------------------------------------------------------------------------


def test_a_hugging_face_language_model_learns() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=17, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    ids = torch.arange(32).view(4, 8) % 17
    optimizer = AdaHessian(model.named_parameters(), lr=0.5, betas=(0.9, 0.9), block=32)
    seen = [float(optimizer.step(lambda: model(input_ids=ids, labels=ids).loss)) for _ in range(15)]
    assert seen[-1] < 0.5 * seen[0]


def test_what_is_due_is_found_once_a_step_not_once_a_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, due = [], AdaHessian._due
    monkeypatch.setattr(AdaHessian, "_due", lambda self: calls.append(1) or due(self))
    params = [nn.Parameter(torch.ones(2)) for _ in range(20)]
    AdaHessian(params).step(lambda: sum((p**2).sum() for p in params))
    assert len(calls) <= 2
