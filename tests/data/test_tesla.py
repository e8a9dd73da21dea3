"""Gradients of a trajectory in every mode against loops written out, and TESLA's soft labels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from gradmatch.core.checks import InputError
from gradmatch.data import TESLA, train_experts
from gradmatch.data._match_state import teacher_labels
from gradmatch.data.tesla import PRESETS, lr_img_from_official, trajectory_grad

F64 = torch.float64


def _net(drop: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Tanh(), nn.Dropout(drop), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(12, 3)).double()


def _problem(steps: int = 5, soft: bool = True):
    """Start, target and batches of unequal sizes, cut with repeats from seven images."""
    g = torch.Generator().manual_seed(1)
    net = _net()
    theta0 = nn.utils.parameters_to_vector(net.parameters()).detach()
    target = theta0 + 0.05 * torch.randn(len(theta0), generator=g, dtype=F64)
    images = torch.randn(7, 1, 4, 4, generator=g, dtype=F64)
    labels = torch.randn(7, 3, generator=g, dtype=F64).softmax(1)
    cuts = [[0, 1, 2], [3, 4, 5], [6], [0, 0, 3], [1, 5]]
    index = [torch.tensor(cuts[i % 5]) for i in range(steps)]
    hard = torch.arange(7) % 3
    return net, theta0, target, images, labels if soft else hard, index


def _by_hand(steps: int, lr: float, detach: bool = False):
    """Loss, and gradients in images, labels and rate, by autograd through the whole loop."""
    net, theta0, target, images, labels, index = _problem(steps)
    names = [k for k, _ in net.named_parameters()]
    sizes = [p.numel() for p in net.parameters()]
    shapes = [p.shape for p in net.parameters()]
    xs = [images[i].clone().requires_grad_() for i in index]
    ys = [labels[i].clone().requires_grad_() for i in index]
    rate = torch.tensor(lr, dtype=F64, requires_grad=True)
    theta = theta0.clone().requires_grad_()
    for x, y in zip(xs, ys, strict=True):
        at = theta.detach().requires_grad_() if detach else theta
        cut = {k: v.view(s) for k, v, s in zip(names, torch.split(at, sizes), shapes, strict=True)}
        loss = F.cross_entropy(torch.func.functional_call(net, cut, (x,)), y)
        theta = theta - rate * torch.autograd.grad(loss, at, create_graph=True)[0]
    loss = (theta - target).square().sum() / (theta0 - target).square().sum()
    return loss.detach(), torch.autograd.grad(loss, [*xs, *ys, rate])


def _run(steps: int, lr: float | Tensor, mode: str, **options):
    net, theta0, target, images, labels, index = _problem(steps)
    batches = [(images[i], labels[i]) for i in index]
    return trajectory_grad(net, theta0, target, batches, lr, mode, labels=True, **options)


def _close(got, want, tolerance: float = 1e-8) -> bool:
    mine = [*got.grad_x, *got.grad_y, got.grad_lr]
    return all(
        float((a - b).norm()) <= tolerance * max(float(b.norm()), 1e-12)
        for a, b in zip(mine, want, strict=True)
    )


@pytest.mark.parametrize("mode", ["exact", "full", "checkpoint"])
def test_exact_modes_equal_autograd_through_the_loop(mode: str) -> None:
    loss, want = _by_hand(5, 0.3)
    got = _run(5, 0.3, mode)
    assert float(got.loss) == pytest.approx(float(loss), rel=1e-12)
    assert _close(got, want)


def test_tesla_equals_the_loop_with_constant_parameters_and_is_biased() -> None:
    loss, want = _by_hand(5, 0.3, detach=True)
    got = _run(5, 0.3, "tesla")
    assert float(got.loss) == pytest.approx(float(loss), rel=1e-12)
    assert _close(got, want)
    assert not _close(got, _by_hand(5, 0.3)[1], 1e-3)


def test_one_step_is_the_same_in_all_modes() -> None:
    _, want = _by_hand(1, 0.3)
    for mode in ("exact", "tesla", "full", "checkpoint"):
        assert _close(_run(1, 0.3, mode), want)


@pytest.mark.parametrize("steps", [1, 5])
def test_gradients_equal_finite_differences(steps: int) -> None:
    net, theta0, target, images, labels, index = _problem(steps)

    def loss(rate: float, shift: Tensor | None = None) -> float:
        x = images if shift is None else images + shift
        batches = [(x[i], labels[i]) for i in index]
        return float(trajectory_grad(net, theta0, target, batches, rate).loss)

    exact, tesla = _run(steps, 0.3, "exact"), _run(steps, 0.3, "tesla")
    slope = (loss(0.3 + 1e-5) - loss(0.3 - 1e-5)) / 2e-5
    assert float(exact.grad_lr) == pytest.approx(slope, rel=1e-6)
    assert (abs(float(tesla.grad_lr) - slope) < 1e-6 * abs(slope)) == (steps == 1)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(2), dtype=F64)
    slope = (loss(0.3, 1e-5 * direction) - loss(0.3, -1e-5 * direction)) / 2e-5
    mine = sum(float((g * direction[i]).sum()) for g, i in zip(exact.grad_x, index, strict=True))
    assert mine == pytest.approx(slope, rel=1e-6)


def test_a_student_that_stands_still_has_loss_one_and_a_perfect_one_zero() -> None:
    net, theta0, target, images, _, _ = _problem()
    labels = torch.arange(7) % 3
    still = trajectory_grad(net, theta0, target, [(images, labels)] * 3, 0.0).loss
    assert float(still) == pytest.approx(1.0, abs=1e-12)
    expert = _net()
    sgd = torch.optim.SGD(expert.parameters(), lr=0.2)
    for _ in range(4):
        sgd.zero_grad()
        F.cross_entropy(expert(images), labels).backward()
        sgd.step()
    end = nn.utils.parameters_to_vector(expert.parameters()).detach()
    assert float(trajectory_grad(net, theta0, end, [(images, labels)] * 4, 0.2).loss) < 1e-20
    assert float(trajectory_grad(net, theta0, end, [(images, labels)] * 3, 0.2).loss) > 1e-3


def test_quadratic_inner_loss_in_closed_form() -> None:
    g = torch.Generator().manual_seed(0)
    start, end = torch.randn(4, generator=g, dtype=F64), torch.randn(4, generator=g, dtype=F64)
    xs = [torch.randn(4, generator=g, dtype=F64) for _ in range(3)]
    b, steps = 0.4, 3
    got = trajectory_grad(
        lambda params, x: params["w"] - x,
        {"w": start},
        {"w": end},
        [(x, torch.zeros(4, dtype=F64)) for x in xs],
        b,
        loss=lambda out, y: 0.5 * (out - y).square().sum(),
    )
    last = (1 - b) ** steps * start + sum(b * (1 - b) ** (steps - 1 - i) * x for i, x in enumerate(xs))
    r, gap = last - end, (start - end).square().sum()
    assert torch.allclose(got.theta["w"], last)
    assert float(got.loss) == pytest.approx(float(r.square().sum() / gap))
    for i, grad in enumerate(got.grad_x):
        assert torch.allclose(grad, 2 * r / gap * b * (1 - b) ** (steps - 1 - i))


def test_memory_of_the_graph_does_not_grow_with_the_steps() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    _, _, _, images, labels, _ = _problem()
    theta0 = nn.utils.parameters_to_vector(net.parameters()).detach()

    def peak(mode: str, steps: int) -> int:
        live = worst = 0

        class Box:
            def __init__(self, t: Tensor) -> None:
                nonlocal live, worst
                self.t, self.size = t, t.numel() * t.element_size()
                live += self.size
                worst = max(worst, live)

            def __del__(self) -> None:
                nonlocal live
                live -= self.size

        with saved_tensors_hooks(Box, lambda box: box.t):
            trajectory_grad(net, theta0, theta0 + 0.1, [(images, labels)] * steps, 0.1, mode)
        return worst

    for mode in ("exact", "tesla"):
        assert peak(mode, 20) <= 1.05 * peak(mode, 5)
    assert peak("full", 20) > 3 * peak("full", 5)


@pytest.mark.parametrize("mode", ["exact", "tesla"])
def test_recomputed_states_give_the_same_bits(mode: str) -> None:
    a, b = (_run(7, 0.3, mode, state_store=store) for store in ("memory", "recompute"))
    assert all(torch.equal(x, y) for x, y in zip(a.grad_x, b.grad_x, strict=True))
    assert torch.equal(a.grad_lr, b.grad_lr)


def test_replayed_draws_reach_every_pass_alike() -> None:
    net, theta0, target, images, labels, index = _problem()
    batches = [(images[i], labels[i]) for i in index]

    def shake(x: Tensor, g: torch.Generator) -> Tensor:
        return x * (1 + 0.3 * torch.randn(x.shape, generator=g, dtype=x.dtype))

    for student, options in ((net, {"augment": shake}), (_net(drop=0.4), {})):
        results = [
            trajectory_grad(
                *(student, theta0, target, batches, 0.3, mode),
                generator=torch.Generator().manual_seed(4),
                **options,
            )
            for mode in ("exact", "full", "checkpoint")
        ]
        for other in results[1:]:
            assert all(
                torch.allclose(a, b, rtol=1e-9) for a, b in zip(results[0].grad_x, other.grad_x, strict=True)
            )
        plain = trajectory_grad(net, theta0, target, batches, 0.3)
        assert abs(float(plain.loss - results[0].loss)) > 1e-6


def test_twice_the_released_pixel_gradient_and_the_rate_that_makes_up_for_it() -> None:
    """``2 * torch.autograd.grad(...)`` repeats a tuple; the released gradient is half of the formula's."""
    net, theta0, target, images, labels, index = _problem(1)
    lr, x = 0.3, images[index[0]].clone().requires_grad_()
    w = theta0.clone().requires_grad_()
    sizes = [p.numel() for p in net.parameters()]
    cut = {
        k: v.view(p.shape) for (k, p), v in zip(net.named_parameters(), torch.split(w, sizes), strict=True)
    }
    loss = F.cross_entropy(torch.func.functional_call(net, cut, (x,)), labels[index[0]])
    g = torch.autograd.grad(loss, w, create_graph=True)[0]
    residual = lr * (target - theta0) + lr**2 * g.detach()
    released = 2 * torch.autograd.grad(residual @ g / (theta0 - target).square().sum(), x)
    got = _run(1, lr, "tesla")
    assert torch.allclose(got.grad_x[0], 2 * released[0])
    assert torch.allclose(lr_img_from_official(1000) * got.grad_x[0], 1000 * released[0])
    assert PRESETS["cifar10-1"]["lr_img"] == 500


@pytest.mark.parametrize("mode", ["exact", "full", "tesla"])
def test_the_student_leaves_frozen_layers_alone_as_the_experts_did(mode: str) -> None:
    net, theta0, target, images, labels, index = _problem(3)
    net[0].requires_grad_(False)
    batches = [(images[i], labels[i]) for i in index]
    found = trajectory_grad(net, theta0, target, batches, 0.5, mode)
    start = dict(zip(dict(net.named_parameters()), net.parameters(), strict=True))
    unmoved = [k for k, p in start.items() if torch.equal(found.theta[k], p)]
    assert unmoved == ["0.weight", "0.bias"]


def test_refusals() -> None:
    net, theta0, target, images, labels, _ = _problem()
    batches = [(images, labels)]
    with pytest.raises(InputError, match="start equals its target"):
        trajectory_grad(net, theta0, theta0, batches, 0.1)
    with pytest.raises(InputError, match="active dropout"):
        trajectory_grad(_net(drop=0.1), theta0, target, batches, 0.1)
    with pytest.raises(InputError, match="batch norm"):
        trajectory_grad(nn.Sequential(nn.BatchNorm2d(1), nn.Flatten()).double(), theta0, target, batches, 0.1)
    with pytest.raises(InputError, match="unroll is 'sometimes'"):
        trajectory_grad(net, theta0, target, batches, 0.1, "sometimes")
    with pytest.raises(InputError, match="finite"):
        trajectory_grad(net, theta0, target, [(images * 1e308, labels)] * 2, 1e308)
    with pytest.raises(InputError, match="augment needs a generator"):
        trajectory_grad(net, theta0, target, batches, 0.1, augment=lambda x, g: x)
    with pytest.raises(InputError, match="batches is empty"):
        trajectory_grad(net, theta0, target, [], 0.1)
    with pytest.raises(InputError, match="name is 'mnist'"):
        TESLA.preset("mnist")


# ---------------------------------------------------------------- soft labels


def _mlp(classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, classes))


def _data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(30) % 3
    return 2 * torch.randn(3, 1, 4, 4, generator=g)[y] + 0.3 * torch.randn(30, 1, 4, 4, generator=g), y


SMALL = {"per_class": 1, "syn_steps": 3, "max_start_epoch": 3, "lr_img": 3.0, "lr_syn": 0.1}


@pytest.fixture(scope="module")
def buffer():
    return train_experts(_data(), _mlp, 2, 4, optimizer="sgd", lr=0.1, batch_size=10)


def _started(buffer, **changes):
    matcher = TESLA(**SMALL, **changes)
    matcher._buffer = buffer
    job = matcher.job(_data(), _mlp)
    return matcher, job, matcher.start(job)


def test_labels_are_assigned_anew_by_the_target_of_each_iteration(buffer) -> None:
    matcher, job, state = _started(buffer, soft_labels="teacher")
    seen = []
    for k in range(3):
        target = buffer.draw(state["generator"].clone_state(), 3, 2)[3]
        before = state["images"].clone()
        matcher.step(job, state, k)
        net = _mlp()
        nn.utils.vector_to_parameters(target, net.parameters())
        want = net.eval()(before).softmax(dim=1)
        assert torch.allclose(state["labels"], want, atol=1e-6)
        assert torch.allclose(state["labels"].sum(1), torch.ones(3))
        seen.append(state["labels"].clone())
    assert not torch.allclose(seen[0], seen[1])
    result = TESLA(**SMALL, steps=3, soft_labels="teacher").distill(_data(), _mlp, buffer=buffer)
    assert result.soft
    assert torch.allclose(result.labels, seen[-1])


def test_labels_assigned_once_stay(buffer) -> None:
    matcher, job, state = _started(buffer, soft_labels="teacher-init")
    first = state["labels"].clone()
    target = buffer.draw(state["generator"].clone_state(), 3, 2)[3]
    assert torch.allclose(first, teacher_labels(job, job.images, target))
    for k in range(3):
        matcher.step(job, state, k)
    assert torch.equal(matcher.labels_of(job, state), first)


def test_a_saturated_teacher_is_training_on_one_hot_labels(buffer) -> None:
    sure = buffer.tensor.clone()
    ends = torch.tensor([16 * 8, 8, 8 * 3, 3]).cumsum(0)
    sure[:, :, ends[1] :] *= 1e4  # the head decides; logits so far apart that the softmax is one-hot
    saturated = type(buffer)((sure,), buffer.names, buffer.shapes, buffer.meta)
    _, job, state = _started(saturated, soft_labels="teacher-init")
    top = state["labels"].argmax(1)
    assert torch.equal(state["labels"], F.one_hot(top, 3).float())
    soft, job, state = _started(buffer, soft_labels=False)
    hard = soft.gradient(job, state | {"generator": torch.Generator().manual_seed(0)})
    given = state | {
        "labels": F.one_hot(job.labels, 3).float(),
        "generator": torch.Generator().manual_seed(0),
    }
    assert torch.allclose(soft.gradient(job, given).grads["images"], hard.grads["images"], atol=1e-7)


def test_learned_labels_follow_their_gradient_and_stay_probabilities(buffer) -> None:
    matcher, job, state = _started(buffer, lr_label=1.0)
    before = state["logits"].clone()
    want = matcher.gradient(job, state | {"generator": state["generator"].clone_state()}).grads["logits"]
    matcher.step(job, state, 0)
    assert torch.allclose(state["logits"], before - want, atol=1e-6)
    labels = matcher.labels_of(job, state)
    assert torch.allclose(labels.sum(1), torch.ones(3))
    assert float((labels - before.softmax(1)).abs().max()) > 1e-4


def test_a_teacher_of_another_class_count_is_refused(buffer) -> None:
    x, y = _data()
    with pytest.raises(InputError, match="network has 5 outputs"):
        TESLA(**SMALL, soft_labels="teacher").distill((x, y), lambda: _mlp(5), buffer=buffer)
    five = train_experts((x, torch.arange(30) % 5), lambda: _mlp(5), 1, 4, optimizer="sgd", batch_size=10)
    with pytest.raises(InputError, match="other parameters"):
        TESLA(**SMALL, soft_labels="teacher").distill((x, y), _mlp, buffer=five)
