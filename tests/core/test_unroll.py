"""Unrolled gradients against autograd through a hand-written loop, closed forms and finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradmatch.core.checks import InputError
from gradmatch.core.unroll import MODES, UnrolledGradient, unrolled_gradient

N = 5
SIZES = [(16, 6), (16,), (3, 16), (3,)]


def _problem(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    theta = {f"p{k}": 0.5 * draw(*s) for k, s in enumerate(SIZES)}
    inputs = {"images": draw(7, 6), "labels": draw(7, 3).softmax(1)}
    target = torch.cat([0.5 * draw(*s).flatten() for s in SIZES])
    # batches of three do not divide seven images; the last batch holds one image twice
    batches = [torch.tensor(b) for b in ([0, 1, 2], [3, 4, 5], [6, 0, 3], [1, 2, 4], [5, 5, 6])]
    return theta, inputs, target, batches


def _losses(target: Tensor, batches: list[Tensor]):
    def step_loss(theta, i, inputs):
        w1, b1, w2, b2 = theta.values()
        index = batches[i % len(batches)]
        hidden = torch.tanh(inputs["images"][index] @ w1.T + b1)
        return F.cross_entropy(hidden @ w2.T + b2, inputs["labels"][index])

    def outer(theta):
        return (torch.cat([t.flatten() for t in theta.values()]) - target).square().sum() / 40

    return step_loss, outer


def _by_hand(lr: Tensor, momentum: float, decay: float, detach: bool, steps: int = N, velocity0=None):
    """Autograd through torch's own SGD recursion, written out; optionally theta constant inside g_i."""
    theta, inputs, target, batches = _problem()
    step_loss, outer = _losses(target, batches)
    inputs = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    lr = lr.clone().requires_grad_()
    start = {k: t.clone().requires_grad_() for k, t in theta.items()}
    now, speed = start, velocity0
    for i in range(steps):
        at = {k: t.detach().requires_grad_() for k, t in now.items()} if detach else now
        grads = torch.autograd.grad(step_loss(at, i, inputs), list(at.values()), create_graph=True)
        d = {k: g + decay * now[k] for k, g in zip(now, grads, strict=True)}
        speed = d if speed is None else {k: momentum * speed[k] + d[k] for k in d}
        rate = lr[i] if lr.ndim else lr
        now = {k: now[k] - rate * speed[k] for k in now}
    loss = outer(now)
    wanted = [inputs["images"], inputs["labels"], lr, *start.values()]
    return loss.detach(), torch.autograd.grad(loss, wanted, allow_unused=True)


def _run(mode: str, lr, steps: int = N, **options) -> UnrolledGradient:
    theta, inputs, target, batches = _problem()
    step_loss, outer = _losses(target, batches)
    return unrolled_gradient(step_loss, theta, outer, inputs, lr, steps, mode, theta0_grad=True, **options)


def _close(got: UnrolledGradient, loss: Tensor, grads, tol: float = 1e-10) -> None:
    assert abs(float(got.loss - loss)) <= tol * float(loss)
    mine = [got.grads["images"], got.grads["labels"], got.lr_grad, *got.theta0_grad.values()]
    for a, b in zip(mine, grads, strict=True):
        assert a.shape == b.shape
        assert float((a - b).norm()) <= tol * float(b.norm())


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.1), (0.9, 0.05)])
@pytest.mark.parametrize("mode", ["exact", "full", "checkpoint"])
def test_gradient_equals_autograd_through_the_loop(mode, momentum, decay, per_step):
    lr = (
        torch.linspace(0.3, 0.6, N, dtype=torch.float64)
        if per_step
        else torch.tensor(0.4, dtype=torch.float64)
    )
    loss, grads = _by_hand(lr, momentum, decay, detach=False)
    _close(_run(mode, lr, momentum=momentum, weight_decay=decay), loss, grads)


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.05)])
def test_tesla_equals_the_loop_with_constant_states(momentum, decay):
    lr = torch.tensor(0.4, dtype=torch.float64)
    loss, grads = _by_hand(lr, momentum, decay, detach=True)
    got = _run("tesla", lr, momentum=momentum, weight_decay=decay)
    _close(got, loss, grads)
    exact = _run("exact", lr, momentum=momentum, weight_decay=decay)
    gap = (got.grads["images"] - exact.grads["images"]).norm() / exact.grads["images"].norm()
    assert gap > 1e-3  # the dropped terms are not nothing


def test_one_step_makes_all_modes_agree():
    loss, grads = _by_hand(torch.tensor(0.4, dtype=torch.float64), 0.0, 0.0, detach=False, steps=1)
    for mode in MODES:
        got = _run(mode, 0.4, steps=1)
        start = got.theta0_grad.values() if mode == "tesla" else grads[3:]
        _close(got, loss, [*grads[:3], *start])


def test_loss_and_states_are_the_same_bits_in_all_modes():
    runs = [_run(mode, 0.4, momentum=0.9, weight_decay=0.05) for mode in MODES]
    for run in runs[1:]:
        assert torch.equal(run.loss, runs[0].loss)
        assert torch.equal(run.step_losses, runs[0].step_losses)
        assert all(torch.equal(run.theta[k], runs[0].theta[k]) for k in run.theta)
        assert all(torch.equal(run.velocity[k], runs[0].velocity[k]) for k in run.velocity)


@pytest.mark.parametrize("steps", [1, 2, 5, 10])
@pytest.mark.parametrize("store", ["cpu", "recompute"])
@pytest.mark.parametrize("mode", ["exact", "tesla"])
def test_stores_give_the_same_bits(store, mode, steps):
    options = {"momentum": 0.9, "weight_decay": 0.05, "steps": steps}
    kept, other = _run(mode, 0.4, **options), _run(mode, 0.4, state_store=store, **options)
    assert torch.equal(kept.lr_grad, other.lr_grad)
    assert all(torch.equal(kept.grads[k], other.grads[k]) for k in kept.grads)
    assert all(torch.equal(kept.theta0_grad[k], other.theta0_grad[k]) for k in kept.theta0_grad)


def test_each_store_rolls_out_as_often_as_it_must():
    theta, inputs, target, batches = _problem()
    step_loss, outer = _losses(target, batches)
    calls = []

    def counted(theta, i, inputs):
        calls.append(i)
        return step_loss(theta, i, inputs)

    counts = {}
    for store in ("memory", "cpu", "recompute"):
        calls.clear()
        unrolled_gradient(counted, theta, outer, inputs, 0.1, 9, state_store=store)
        counts[store] = len(calls)
    # nine steps forward and nine back; three of nine states kept means six rolled out again
    assert counts == {"memory": 18, "cpu": 18, "recompute": 24}


def test_steps_are_those_of_torch_sgd():
    theta, inputs, target, batches = _problem()
    step_loss, _ = _losses(target, batches)
    params = {k: t.clone().requires_grad_() for k, t in theta.items()}
    optimizer = torch.optim.SGD(params.values(), lr=0.3, momentum=0.9, weight_decay=0.05)
    for i in range(N):
        optimizer.zero_grad()
        step_loss(params, i, inputs).backward()
        optimizer.step()
    got = _run("exact", 0.3, momentum=0.9, weight_decay=0.05)
    for k, p in params.items():
        torch.testing.assert_close(got.theta[k], p.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", ["exact", "full", "tesla"])
def test_a_window_starts_inside_a_trajectory(mode):
    theta, inputs, target, batches = _problem()
    step_loss, outer = _losses(target, batches)
    options = {"momentum": 0.9, "mode": mode}
    whole = unrolled_gradient(step_loss, theta, outer, inputs, 0.3, N, **options)
    head = unrolled_gradient(step_loss, theta, outer, inputs, 0.3, 2, **options)

    def later(theta, i, inputs):
        return step_loss(theta, i + 2, inputs)

    tail = unrolled_gradient(
        later, head.theta, outer, inputs, 0.3, N - 2, velocity0=head.velocity, theta0_grad=True, **options
    )
    assert torch.equal(tail.loss, whole.loss)
    if mode != "tesla":  # the gradient at the cut, by finite differences of the tail
        ends = [
            unrolled_gradient(
                later,
                {k: t + h for k, t in head.theta.items()},
                outer,
                inputs,
                0.3,
                N - 2,
                velocity0=head.velocity,
                **options,
            ).loss
            for h in (1e-5, -1e-5)
        ]
        slope = sum(g.sum() for g in tail.theta0_grad.values())
        torch.testing.assert_close((ends[0] - ends[1]) / 2e-5, slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("steps", [1, N])
def test_gradients_equal_finite_differences(steps):
    theta, inputs, target, batches = _problem()
    step_loss, outer = _losses(target, batches)
    lr = torch.tensor(0.4, dtype=torch.float64)
    way = {
        k: torch.randn(v.shape, generator=torch.Generator().manual_seed(3)).double()
        for k, v in inputs.items()
    }

    def value(s: float, b: float) -> Tensor:
        moved = {k: v + s * way[k] for k, v in inputs.items()}
        return unrolled_gradient(step_loss, theta, outer, moved, lr + b, steps, momentum=0.5).loss

    got = unrolled_gradient(step_loss, theta, outer, inputs, lr, steps, momentum=0.5)
    h = 1e-5
    along = sum((got.grads[k] * way[k]).sum() for k in way)
    torch.testing.assert_close((value(h, 0) - value(-h, 0)) / (2 * h), along, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close((value(0, h) - value(0, -h)) / (2 * h), got.lr_grad, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_quadratic_closed_form(mode):
    # l_i = 1/2 |theta - x|^2: theta_N = q^N theta_0 + (1 - q^N) x with q = 1 - lr
    x, theta = torch.tensor([1.0, -2.0]).double(), torch.tensor([3.0, 0.5]).double()
    lr, steps, q = 0.3, 4, 0.7
    got = unrolled_gradient(
        lambda t, i, x: 0.5 * (t - x).square().sum(), theta, lambda t: t.square().sum(), x, lr, steps, mode
    )
    end = q**steps * theta + (1 - q**steps) * x
    torch.testing.assert_close(got.theta, end)
    share = steps * lr if mode == "tesla" else 1 - q**steps
    torch.testing.assert_close(got.grads, 2 * end * share)
    if mode != "tesla":
        torch.testing.assert_close(got.lr_grad, (2 * end * steps * q ** (steps - 1) * (x - theta)).sum())


def test_zero_rate_leaves_the_student_where_it_is():
    got = _run("exact", 0.0)
    theta, _, target, batches = _problem()
    assert torch.equal(got.loss, _losses(target, batches)[1](theta))
    assert not got.grads["images"].any()


def test_stacked_members_get_their_own_gradients():
    members = [_problem(seed) for seed in range(3)]
    step_loss, outer = _losses(members[0][2], members[0][3])
    stack = {k: torch.stack([m[0][k] for m in members]) for k in members[0][0]}
    inputs = {k: torch.stack([m[1][k] for m in members]) for k in members[0][1]}

    def all_steps(theta, i, inputs):
        return torch.func.vmap(lambda t, x: step_loss(t, i, x))(theta, inputs).sum()

    together = unrolled_gradient(
        all_steps, stack, lambda t: torch.func.vmap(outer)(t).sum(), inputs, 0.3, N, momentum=0.9
    )
    for k, (theta, own, _, _) in enumerate(members):
        alone = unrolled_gradient(step_loss, theta, outer, own, 0.3, N, momentum=0.9)
        for name in own:
            torch.testing.assert_close(together.grads[name][k], alone.grads[name], rtol=1e-9, atol=1e-14)


def test_structures_and_the_choice_of_inputs():
    theta, inputs, target, batches = _problem()
    step_loss, outer = _losses(target, batches)
    flat = torch.cat([t.flatten() for t in theta.values()])

    def named(flat):
        parts = flat.split([t.numel() for t in theta.values()])
        return {k: p.view(theta[k].shape) for k, p in zip(theta, parts, strict=True)}

    want = unrolled_gradient(step_loss, theta, outer, inputs, 0.4, N)
    images = inputs["images"].clone().requires_grad_()
    index = torch.stack(batches)

    def flat_loss(theta, i, inputs):
        x, y, order = inputs
        hot = {"images": x[order[i]], "labels": y[order[i]]}
        w1, b1, w2, b2 = named(theta).values()
        return F.cross_entropy(torch.tanh(hot["images"] @ w1.T + b1) @ w2.T + b2, hot["labels"])

    loss, grads = unrolled_gradient(
        flat_loss, flat, lambda t: outer(named(t)), [images, inputs["labels"], index], 0.4, N
    )
    torch.testing.assert_close(loss, want.loss)
    torch.testing.assert_close(grads[0], want.grads["images"])
    assert grads[1] is None
    assert grads[2] is None
    assert images.grad is None


def test_unused_parameters_and_inputs_have_zero_gradients():
    theta = {"used": torch.ones(2).double(), "idle": torch.ones(3).double()}
    inputs = {"x": torch.ones(2).double(), "spare": torch.ones(4).double()}
    for mode in MODES:
        got = unrolled_gradient(
            lambda t, i, x: (t["used"] * x["x"]).sum(), theta, lambda t: t["used"].sum(), inputs, 0.5, 3, mode
        )
        torch.testing.assert_close(got.grads["x"], torch.full((2,), -1.5).double())
        assert not got.grads["spare"].any()


def _saved_bytes(mode: str, steps: int) -> int:
    """The most bytes held for backward at any time."""
    alive, peak = 0, 0

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal alive, peak
            self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
            alive += self.size
            peak = max(peak, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        _run(mode, 0.1, steps=steps)
    return peak


def test_graph_does_not_grow_with_the_steps():
    short, long = _saved_bytes("exact", 4), _saved_bytes("exact", 40)
    assert long <= 1.05 * short
    assert _saved_bytes("full", 40) > 5 * long


@pytest.mark.parametrize("mode", MODES)
def test_global_generator_and_arguments_are_left_alone(mode):
    theta, inputs, target, batches = _problem()
    step_loss, outer = _losses(target, batches)
    state = torch.random.get_rng_state()
    unrolled_gradient(step_loss, theta, outer, inputs, 0.4, N, mode, momentum=0.9)
    assert torch.equal(state, torch.random.get_rng_state())
    fresh = _problem()
    for mine, untouched in zip((theta, inputs), fresh[:2], strict=True):
        assert all(torch.equal(mine[k], untouched[k]) and not mine[k].requires_grad for k in mine)
        assert all(t.grad is None for t in mine.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "fast"}, "mode is 'fast'"),
        ({"mode": "exact", "state_store": "disk"}, "state_store is 'disk'"),
        ({"mode": "exact", "steps": 0}, "steps is 0"),
        ({"mode": "exact", "momentum": 1.0}, "momentum is 1.0"),
        ({"mode": "exact", "lr": torch.ones(4)}, "vector of 5 rates"),
        ({"mode": "exact", "lr": float("nan")}, "lr is nan"),
        ({"mode": "exact", "momentum": 0.9, "velocity0": [torch.ones(3)]}, "velocity0 has other shapes"),
        ({"mode": "exact", "velocity0": [torch.ones(3)]}, "velocity0 is given with momentum 0"),
    ],
)
def test_refusals(options, words):
    options = {"lr": 0.4, **options}
    with pytest.raises(InputError, match=words):
        _run(**options)


def test_inputs_that_cannot_be_differentiated_are_refused():
    with pytest.raises(InputError, match="no floating tensor"):
        unrolled_gradient(lambda t, i, x: t.sum(), torch.ones(2), torch.sum, torch.arange(3), 0.1, 1)


@pytest.mark.parametrize("mode", MODES)
def test_losses_that_ignore_the_parameters_are_refused(mode):
    theta, x = torch.ones(2), torch.ones(2)
    with pytest.raises(InputError, match="step_loss does not depend on theta"):
        unrolled_gradient(lambda t, i, x: t.detach().sum(), theta, torch.sum, x, 0.1, 1, mode)
    with pytest.raises(InputError, match="outer_loss does not depend on theta"):
        unrolled_gradient(lambda t, i, x: (t * x).sum(), theta, lambda t: t.detach().sum(), x, 0.1, 1, mode)
    with pytest.raises(InputError, match="theta0 holds whole numbers"):
        unrolled_gradient(lambda t, i, x: (t * x).sum(), theta.long(), torch.sum, x, 0.1, 1, mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_that_is_not_finite_names_its_step(mode):
    def step_loss(theta, i, x):
        return (theta * x).sum() * (float("inf") if i == 2 else 1.0)

    with pytest.raises(InputError, match="inner step 2 of 4"):
        unrolled_gradient(step_loss, torch.ones(2), torch.sum, torch.ones(2), 0.1, 4, mode)
    with pytest.raises(InputError, match="outer_loss is nan"):
        unrolled_gradient(
            lambda t, i, x: (t * x).sum(),
            torch.ones(2),
            lambda t: t.sum() * torch.nan,
            torch.ones(2),
            0.1,
            4,
            mode,
        )
