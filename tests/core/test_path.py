"""Conversions, steps and inverse steps of every path against formulas written out in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from gradmatch.core.checks import InputError
from gradmatch.core.path import (
    EDM,
    KINDS,
    AffinePath,
    LinearPath,
    OrnsteinUhlenbeck,
    Prediction,
    ResidualPath,
    VariancePreserving,
)

T = 15
ROOTS = torch.tensor([0.02 * (0.99 / 0.02) ** ((t / (T - 1)) ** 0.3) for t in range(T)], dtype=torch.float64)
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
BARS = torch.cumprod(1 - BETAS, 0)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Y = randn(6, 3, 4, seed=9)


def linear(t: float) -> tuple[float, float, float]:
    return 1 - t, 1e-5 + (1 - 1e-5) * t, 0.0


def preserving(t: float) -> tuple[float, float, float]:
    bar = 1.0 if t < 0 else float(BARS[int(t)])
    return math.sqrt(bar), math.sqrt(1 - bar), 0.0


def residual(t: float) -> tuple[float, float, float]:
    eta = 0.0 if t < 0 else float(ROOTS[int(t)]) ** 2
    return 1 - eta, 2.0 * math.sqrt(eta), eta


PATHS = {
    "linear": (LinearPath(1e-5), linear, (0.9, 0.5, 0.02)),
    "preserving": (VariancePreserving(BARS), preserving, (981, 501, 1)),
    "edm": (EDM(), lambda t: (1.0, t, 0.0), (80.0, 2.0, 0.01)),
    "residual": (ResidualPath(ROOTS, 2.0, Y), residual, (13, 7, 1)),
}
each = pytest.mark.parametrize("name", PATHS)


def reference(kind: str, name: str, x0: Tensor, noise: Tensor, t: float) -> Tensor:
    """The five kinds as the head of the module defines them, the velocity by central differences."""
    path, level, _ = PATHS[name]
    alpha, sigma, _ = level(t)
    if kind == "velocity":
        h = 1e-6 * max(1.0, abs(t))
        if name in ("preserving", "residual"):  # the slope to the right of a knot
            return (
                -3 * path.sample(x0, noise, t)
                + 4 * path.sample(x0, noise, t + h)
                - path.sample(x0, noise, t + 2 * h)
            ) / (2 * h)
        return (path.sample(x0, noise, t + h) - path.sample(x0, noise, t - h)) / (2 * h)
    return {
        "x0": x0,
        "noise": noise,
        "v": (alpha * noise - sigma * x0) / math.sqrt(alpha**2 + sigma**2),
        "score": -noise / sigma,
    }[kind]


@each
def test_sample_is_the_written_out_sum(name: str) -> None:
    path, level, times = PATHS[name]
    x0, noise = randn(6, 3, 4), randn(6, 3, 4, seed=1)
    for t in times:
        alpha, sigma, third = level(t)
        assert torch.allclose(path.sample(x0, noise, t), alpha * x0 + sigma * noise + third * Y, atol=1e-14)


@each
@pytest.mark.parametrize("kind", KINDS)
def test_targets_and_every_conversion_agree_with_the_reference(name: str, kind: str) -> None:
    path, _, times = PATHS[name]
    x0, noise = randn(6, 3, 4), randn(6, 3, 4, seed=1)
    for t in times:
        x = path.sample(x0, noise, t)
        target = path.target(kind, x0, noise, t)
        both = path.pair(kind, x0, noise, t)
        assert torch.equal(both[0], x)
        assert torch.equal(both[1], target)
        slack = 1e-6 if kind == "velocity" else 1e-12
        assert torch.allclose(target, reference(kind, name, x0, noise, t), rtol=slack, atol=slack)
        for other in KINDS:
            got = path.convert(Prediction(kind, target), other, x, t)
            assert got.kind == other
            wanted = path.target(other, x0, noise, t)
            assert torch.allclose(got.tensor, wanted, rtol=1e-8, atol=1e-8), (t, other)


@each
@pytest.mark.parametrize("kind", KINDS)
def test_steps_stay_on_the_path_and_their_inverse_brings_them_back(name: str, kind: str) -> None:
    path, _, (high, middle, low) = PATHS[name]
    x0, noise = randn(6, 3, 4), randn(6, 3, 4, seed=1)
    for t, t_next in ((high, middle), (middle, low), (low, middle), (middle, high)):
        x = path.sample(x0, noise, t)
        p = Prediction(kind, path.target(kind, x0, noise, t))
        y = path.step(x, p, t, t_next)
        assert torch.allclose(y, path.sample(x0, noise, t_next), rtol=1e-8, atol=1e-8)
        # the inverse holds for any prediction, not only a true one
        wrong = Prediction(kind, p.tensor + randn(6, 3, 4, seed=2))
        z = randn(6, 3, 4, seed=3)
        assert torch.allclose(
            path.inverse_step(path.step(z, wrong, t, t_next), wrong, t, t_next), z, atol=1e-7
        )


@each
@pytest.mark.parametrize("kind", KINDS)
def test_aiming_at_a_point_reaches_it(name: str, kind: str) -> None:
    path, _, (high, middle, low) = PATHS[name]
    x, y = randn(6, 3, 4), randn(6, 3, 4, seed=1)
    for t, t_next in ((high, middle), (middle, low), (low, middle)):
        p = path.aim(kind, x, y, t, t_next)
        assert p.kind == kind
        assert torch.allclose(path.step(x, p, t, t_next), y, rtol=1e-7, atol=1e-7)
    each_time = path.aim(kind, x, y, torch.full((6,), float(high)), torch.full((6,), float(middle)))
    assert torch.allclose(each_time.tensor, path.aim(kind, x, y, high, middle).tensor)


@each
@pytest.mark.parametrize("kind", KINDS)
def test_float32_agrees_with_float64(name: str, kind: str) -> None:
    path, _, (high, middle, _) = PATHS[name]
    x0, noise, p = randn(6, 3, 4), randn(6, 3, 4, seed=1), randn(6, 3, 4, seed=2)
    single = path if name != "residual" else path.towards(Y.float())
    x = path.sample(x0, noise, middle)
    if name == "edm" and kind == "score":
        p = p / middle
    for other in KINDS:
        exact = path.convert(Prediction(kind, p), other, x, middle).tensor
        got = single.convert(Prediction(kind, p.float()), other, x.float(), middle).tensor
        assert got.dtype == torch.float32
        assert float((got - exact).abs().max()) < 3e-6 * float(exact.abs().max()), other
    for t, t_next in ((middle, high), (high, middle)):
        exact = path.step(x, Prediction(kind, p), t, t_next)
        got = single.step(x.float(), Prediction(kind, p.float()), t, t_next)
        assert float((got - exact).abs().max()) < 3e-6 * float(exact.abs().max())
        back = single.inverse_step(x.float(), Prediction(kind, p.float()), t, t_next)
        exact = path.inverse_step(x, Prediction(kind, p), t, t_next)
        assert float((back - exact).abs().max()) < 3e-6 * float(exact.abs().max())


@each
def test_one_time_for_each_example_is_the_same_as_one_after_the_other(name: str) -> None:
    path, _, times = PATHS[name]
    t, t_next = torch.tensor(times * 2), torch.tensor(times * 2).flip(0) * 0.5
    x, p = randn(6, 3, 4), randn(6, 3, 4, seed=1)
    for kind in KINDS:
        together = path.step(x, Prediction(kind, p), t, t_next)
        noise = path.convert(Prediction(kind, p), "noise", x, t).tensor
        for i in range(6):
            one = path if name != "residual" else path.towards(Y[i : i + 1])
            a, b = float(t[i]), float(t_next[i])
            alone = one.step(x[i : i + 1], Prediction(kind, p[i : i + 1]), a, b)
            assert torch.allclose(together[i], alone[0], rtol=1e-12, atol=1e-12)
            said = one.convert(Prediction(kind, p[i : i + 1]), "noise", x[i : i + 1], a).tensor
            assert torch.allclose(noise[i], said[0], rtol=1e-12, atol=1e-12)


@each
@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_are_held_not_nan(name: str, kind: str) -> None:
    path = PATHS[name][0]
    ends = {"linear": (0.0, 1.0), "preserving": (-1.0, 999.0), "edm": (0.0, 80.0), "residual": (-1.0, 14.0)}
    if name == "linear":
        path = LinearPath()
    for t in ends[name]:
        for other in KINDS:
            found = path.convert(Prediction(kind, randn(6, 3, 4)), other, randn(6, 3, 4), t).tensor
            assert bool(torch.isfinite(found).all()), (t, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conversions_of_the_straight_path_round_trip(dtype: torch.dtype) -> None:
    path = LinearPath(1e-5)
    t = torch.logspace(-3, math.log10(0.999), 40, dtype=torch.float64)
    x0, noise = randn(40, 5).to(dtype), randn(40, 5, seed=1).to(dtype)
    x = path.sample(x0, noise, t)
    u = Prediction("velocity", path.target("velocity", x0, noise, t))
    for kind in ("x0", "noise", "v"):
        back = path.convert(path.convert(u, kind, x, t), "velocity", x, t).tensor
        slack = (
            1e-6 if dtype == torch.float64 or kind == "v" else 1e-6 / 1e-3
        )  # x / sigma at t = 1e-3 in float32
        assert float((back - u.tensor).abs().max()) < slack
    assert float((path.convert(u, "x0", x, t).tensor - x0).abs().max()) < 1e-6


def test_straight_path_at_its_ends() -> None:
    path, x0, noise = LinearPath(1e-5), randn(6, 2).float(), randn(6, 2, seed=1).float()
    assert torch.allclose(path.sample(x0, noise, 0.0), x0 + 1e-5 * noise, atol=1e-7)
    assert torch.equal(path.sample(x0, noise, 1.0), noise)
    u = path.target("velocity", x0, noise, 0.4)
    assert torch.allclose(u, (1 - 1e-5) * noise - x0)


def test_euler_on_a_straight_path_is_the_exact_step() -> None:
    path, x, u = LinearPath(1e-5), randn(6, 2), randn(6, 2, seed=1)
    assert torch.allclose(path.step(x, Prediction("velocity", u), 0.7, 0.2), x - 0.5 * u, atol=1e-14)


def test_ddim_step_is_the_published_formula() -> None:
    path, x, e = VariancePreserving(BARS), randn(6, 2), randn(6, 2, seed=1)
    a, b = float(BARS[981]), float(BARS[961])
    wanted = math.sqrt(b) * (x - math.sqrt(1 - a) * e) / math.sqrt(a) + math.sqrt(1 - b) * e
    assert torch.allclose(path.step(x, Prediction("noise", e), 981, 961), wanted, atol=1e-12)
    # with the noise held fixed, stepping back is the step itself, the other way
    assert torch.allclose(path.step(wanted, Prediction("noise", e), 961, 981), x, atol=1e-12)
    assert torch.allclose(path.inverse_step(wanted, Prediction("noise", e), 981, 961), x, atol=1e-12)


def test_residual_step_has_the_published_weights() -> None:
    path, x, x0 = ResidualPath(ROOTS, 2.0, Y), randn(6, 3, 4), randn(6, 3, 4, seed=1)
    for t in range(T):
        eta, before = float(ROOTS[t]) ** 2, float(ROOTS[t - 1]) ** 2 if t else 0.0
        m = math.sqrt(before / eta)
        j = before - math.sqrt(before * eta)
        k = 1 - before + math.sqrt(before * eta) - m
        got = path.step(x, Prediction("x0", x0), t, t - 1)
        assert torch.allclose(got, k * x0 + m * x + j * Y, atol=1e-12)
    with pytest.raises(InputError, match="forgets where it came from"):
        path.inverse_step(x0, Prediction("x0", x0), 0, -1)
    assert torch.allclose(path.prior(x, 14), Y + 2 * 0.99 * x, atol=1e-12)


def test_velocity_between_entries_of_a_table_is_the_derivative() -> None:
    x0, noise = randn(6, 3, 4), randn(6, 3, 4, seed=1)
    for name, t in (("preserving", 500.25), ("preserving", -0.5), ("residual", 6.5), ("residual", -0.25)):
        path = PATHS[name][0]
        slope = (path.sample(x0, noise, t + 1e-5) - path.sample(x0, noise, t - 1e-5)) / 2e-5
        assert torch.allclose(path.target("velocity", x0, noise, t), slope, atol=1e-6)


def test_the_clean_end_is_data_or_what_final_says() -> None:
    assert float(VariancePreserving(BARS).levels(torch.tensor(-1.0).double()).alpha) == 1
    held = VariancePreserving(BARS, final=float(BARS[0]))
    assert float(held.levels(torch.tensor(-1.0).double()).alpha) == pytest.approx(float(BARS[0].sqrt()))
    linear = VariancePreserving.from_betas(1e-4, 0.02)
    bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    assert torch.allclose(linear.angles[1:].cos(), bars.sqrt())
    scaled = VariancePreserving.from_betas(0.00085, 0.012, scaled=True)
    assert torch.allclose(scaled.angles[1:].cos(), BARS.sqrt())


def test_numbers_are_remembered_and_forgotten_before_they_fill_memory() -> None:
    path, x = LinearPath(), randn(2, 2)
    first = path.step(x, Prediction("noise", x), 0.5, 0.25)
    assert torch.equal(path.step(x, Prediction("noise", x), 0.5, 0.25), first)
    assert len(path._known) == 1
    for i in range(5000):
        path._known[("step", "noise", float(i), 0.0)] = (1.0, 0.0)
    path.step(x, Prediction("noise", x), 0.5, 0.125)
    assert len(path._known) == 1
    assert torch.equal(copy.deepcopy(path).step(x, Prediction("noise", x), 0.5, 0.25), first)


def test_a_new_path_needs_only_its_levels() -> None:
    class Decay(AffinePath):
        def levels(self, t: Tensor) -> Tensor:
            from gradmatch.core.path import Levels

            a = torch.exp(-t / 2)
            h = (1 - a.square()).sqrt()
            return Levels(a, h, -a / 2, a.square() / (2 * h))

    path, x0, noise = Decay(), randn(6, 2), randn(6, 2, seed=1)
    x = path.sample(x0, noise, 0.7)
    score = path.convert(Prediction("x0", x0), "score", x, 0.7).tensor
    a = math.exp(-0.35)
    assert torch.allclose(score, (a * x0 - x) / (1 - a**2), atol=1e-12)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LinearPath(1.0), "eps is 1.0"),
        (lambda: VariancePreserving(BARS.flip(0)), "must fall"),
        (lambda: VariancePreserving(BARS[:1]), "must fall"),
        (lambda: VariancePreserving(BARS, final=0.5), "must fall from final = 0.5"),
        (lambda: VariancePreserving(torch.full((5,), torch.nan)), "NaN"),
        (lambda: ResidualPath(ROOTS.flip(0), 2.0), "must rise"),
        (lambda: ResidualPath(ROOTS, 0.0), "kappa is 0.0"),
        (lambda: ResidualPath(ROOTS, 2.0).sample(Y, Y, 3), "third end point is not set"),
        (lambda: ResidualPath(ROOTS, 2.0).towards(Y * torch.nan), "y has 72 NaN"),
        (lambda: LinearPath().convert(Prediction("noise", Y), "epsilon", Y, 0.5), "kind is 'epsilon'"),
        (
            lambda: LinearPath().convert(Prediction("epsilon", Y), "x0", Y, 0.5),
            "prediction kind is 'epsilon'",
        ),
        (lambda: EDM().inverse_step(Y, Prediction("x0", Y), 1.0, 0.0), "has no inverse"),
    ],
)
def test_refusals(make, says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()


def test_ornstein_uhlenbeck_levels_and_slopes():
    """Constant rates in closed form, given ones by quadrature; slopes by finite differences."""
    t = torch.linspace(0.05, 3, 9, dtype=torch.float64)
    plain = OrnsteinUhlenbeck(2.0)
    torch.testing.assert_close(plain.levels(t).alpha, torch.exp(-t))
    torch.testing.assert_close(plain.levels(t).sigma, torch.sqrt(1 - torch.exp(-2 * t)))
    rising = OrnsteinUhlenbeck(lambda t: 0.1 + t)
    torch.testing.assert_close(rising.levels(t).alpha, torch.exp(-(0.1 * t + t**2 / 2) / 2))
    for path in (plain, rising, OrnsteinUhlenbeck(lambda t: torch.full_like(t, 2.0))):
        a, b = path.levels(t - 1e-6), path.levels(t + 1e-6)
        torch.testing.assert_close((b.alpha - a.alpha) / 2e-6, path.levels(t).d_alpha, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close((b.sigma - a.sigma) / 2e-6, path.levels(t).d_sigma, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(
            path.levels(t).alpha ** 2 + path.levels(t).sigma ** 2, torch.ones(9).double()
        )
    x0, noise = torch.randn(9, 2).double(), torch.randn(9, 2).double()
    x = plain.sample(x0, noise, t)
    step = plain.step(x, Prediction("x0", x0), t, t / 2)
    torch.testing.assert_close(step, plain.sample(x0, noise, t / 2))
    assert plain.levels(torch.zeros(1).double()).sigma.item() == 0
    with pytest.raises(InputError, match="g is 0"):
        OrnsteinUhlenbeck(0)


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.1])
def test_the_straight_pair_is_the_general_one_bit_for_bit(eps: float) -> None:
    path = LinearPath(eps)
    g = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(50, 3, 2, generator=g) for _ in range(2))
    for t in (torch.rand(50, generator=g), 0.3):
        for got, wanted in zip(
            path.pair("velocity", x0, noise, t), AffinePath.pair(path, "velocity", x0, noise, t), strict=True
        ):
            assert torch.equal(got, wanted)
