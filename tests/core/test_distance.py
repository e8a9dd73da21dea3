import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradmatch.core.checks import InputError
from gradmatch.core.distance import DISTANCES, gradient_distance
from gradmatch.core.gradients import gradient
from gradmatch.core.problem import Problem

SHAPES = [(4, 3), (4,), (5, 2, 3, 3), (1, 7), ()]


def lists(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]


def by_hand(a, b, kind, eps):
    """The definitions, number by number in plain Python."""

    def one_minus_cosine(u, v):
        dot = sum(x * y for x, y in zip(u, v, strict=True))
        size = math.sqrt(sum(x * x for x in u)) * math.sqrt(sum(y * y for y in v))
        return 1 - dot / (size + eps)

    flat_a, flat_b = ([x for t in side for x in t.flatten().tolist()] for side in (a, b))
    if kind == "mse":
        return sum((x - y) ** 2 for x, y in zip(flat_a, flat_b, strict=True))
    if kind == "cosine":
        return one_minus_cosine(flat_a, flat_b)
    return sum(
        one_minus_cosine(row.flatten().tolist(), other.flatten().tolist())
        for s, t in zip(a, b, strict=True)
        if s.ndim >= 2
        for row, other in zip(s, t, strict=True)
    )


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from(DISTANCES), st.floats(-4, 2), st.sampled_from([1e-6, 1e-2, 0.0])
)
def test_equals_the_definition(seed, kind, exponent, eps):
    a, b = lists(seed, 10**exponent), lists(seed + 1, 10**exponent)
    value = gradient_distance(a, b, kind, eps)
    assert value.shape == ()
    assert float(value) == pytest.approx(by_hand(a, b, kind, eps), rel=1e-9, abs=1e-12)


def test_of_equal_lists_is_eps_times_rows():
    a = [t / t.flatten(1).norm(dim=1).view(-1, *[1] * (t.ndim - 1)) for t in lists(0) if t.ndim >= 2]
    rows = sum(len(t) for t in a)
    assert 0 < float(gradient_distance(a, a)) < 2e-6 * rows
    small = [1e-3 * t for t in a]  # products of norms of 1e-6: eps halves every cosine
    assert float(gradient_distance(small, small)) == pytest.approx(0.5 * rows, rel=1e-6)


def test_row_scaling_and_one_dimensional_tensors_do_not_matter():
    a, b = lists(1), lists(2)
    base = gradient_distance(a, b, eps=0.0)
    scaled = [
        t * torch.rand(len(t), *[1] * (t.ndim - 1)).double().add(0.1) if t.ndim >= 2 else 9 * t for t in a
    ]
    torch.testing.assert_close(gradient_distance(scaled, b, eps=0.0), base)
    assert float(gradient_distance([a[1], a[4]], [b[1], b[4]])) == 0.0
    assert float(gradient_distance(scaled, b, "mse")) != pytest.approx(float(gradient_distance(a, b, "mse")))


@pytest.mark.parametrize("kind", DISTANCES)
def test_derivatives_to_second_order(kind):
    b = [t.detach() for t in lists(3)[:3]]
    a = [t.requires_grad_() for t in lists(4)[:3]]

    def f(*a):
        return gradient_distance(a, b, kind)

    assert torch.autograd.gradcheck(f, tuple(a))
    assert torch.autograd.gradgradcheck(f, tuple(a))


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tiny", [0.0, 1e-44, 1e-30, 1e-18])
def test_zero_and_tiny_rows_have_finite_first_and_second_derivatives(kind, dtype, tiny):
    a = torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]], dtype=dtype)
    a[1, 0] = tiny
    b = torch.tensor([[2.0, 1.0], [1.0, -1.0], [0.0, 0.0]], dtype=dtype)
    for x, y in ((a, b), (b, a), (torch.zeros_like(a), b)):
        x = x.clone().requires_grad_()
        value = gradient_distance([x], [y], kind)
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        assert bool(torch.isfinite(first).all())
        assert bool(torch.isfinite(second).all())


def test_a_zero_row_costs_one_and_is_pulled_along_the_other():
    x = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    value = gradient_distance([x], [y], eps=1e-3)
    assert value.item() == 1.0
    (slope,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(slope, -y / 1e-3)  # the derivative of <x, y> / (|x| |y| + eps) at x = 0


def test_without_eps_a_zero_row_has_no_cosine():
    with pytest.raises(InputError, match="NaN"):
        gradient_distance([torch.zeros(1, 2)], [torch.ones(1, 2)], eps=0.0)


def test_images_are_moved_by_the_distance_of_gradients():
    """Descent through a double backward lowers the distance, dead filters included."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
        real, image = torch.randn(6, 1, 6, 6), torch.randn(2, 1, 6, 6, requires_grad=True)
    with torch.no_grad():
        model[0].bias[0] = -100.0  # a filter that never fires: its gradient row is exactly zero
    y = torch.tensor([0, 1])
    target = gradient(Problem(model, "cross_entropy", (real, y.repeat(3))))
    assert float(target[0][0].abs().max()) == 0.0
    values = []
    for _ in range(20):
        now = gradient(Problem(model, "cross_entropy", (image, y)), differentiable=True)
        value = gradient_distance(now, target)
        (slope,) = torch.autograd.grad(value, image)
        image = (image - 1.0 * slope).detach().requires_grad_()
        values.append(value.item())
    assert values[-1] < 0.8 * values[0]


@pytest.mark.parametrize(
    ("a", "b", "options", "word"),
    [
        ([torch.ones(2, 2)], [], {}, "equally many"),
        ([], [], {}, "empty"),
        ([torch.ones(2, 2)], [torch.ones(2, 3)], {}, "position 0"),
        ([torch.ones(2, 2)], [torch.ones(4)], {}, "position 0"),
        ([torch.ones(2, 2)], [torch.ones(2, 2)], {"kind": "filterwise"}, "filter_cosine"),
        ([torch.ones(2, 2)], [torch.ones(2, 2)], {"eps": -1.0}, "eps"),
        ([torch.full((2, 2), math.nan)], [torch.ones(2, 2)], {}, "NaN"),
        ([torch.full((2, 2), math.inf)], [torch.ones(2, 2)], {"kind": "cosine"}, "NaN"),
    ],
)
def test_refuses(a, b, options, word):
    with pytest.raises(InputError, match=word):
        gradient_distance(a, b, **options)
