"""Solvers on fields with closed-form solutions, their hooks, and the exact count of calls."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gradmatch.core.checks import InputError
from gradmatch.core.path import EDM, LinearPath, Path, Prediction, ResidualPath, VariancePreserving
from gradmatch.core.sampler import Hook, Model, Network, Solver, State

MEAN, STD = 1.5, 0.4


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian(x: Tensor, t: Tensor) -> Tensor:
    """dx/dt of the straight path from N(MEAN, STD^2) to N(0, 1): x_t is normal, so the flow is affine."""
    t = t.reshape(-1, 1)
    variance = (1 - t) ** 2 * STD**2 + t**2
    return -MEAN + (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN)


def exact(noise: Tensor) -> Tensor:
    return MEAN + STD * noise


class Counting:
    """A model that knows itself how many rows it has seen of each example (marked by its last entry)."""

    def __init__(self, forward: Any, kind: str = "velocity") -> None:
        self.forward, self.kind = forward, kind
        self.rows, self.calls = 0, 0

    def __call__(self, x: Tensor, t: Tensor, cond: Any = None) -> Prediction:
        self.calls += 1
        self.rows += len(x)
        assert t.shape == (len(x),)
        return Prediction(self.kind, self.forward(x, t))


def uniform(steps: int) -> list[float]:
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()


@pytest.mark.parametrize(("step", "order", "calls"), [("euler", 1, 1), ("heun", 2, 2), ("ddim", 1, 1)])
def test_error_falls_with_the_order_of_the_step(step: str, order: int, calls: int) -> None:
    noise, errors = randn(200, 2), []
    for steps in (20, 40, 80):
        model = Counting(gaussian)
        found = Solver(uniform(steps), step).run(model, LinearPath(), noise)
        errors.append(float((found.x - exact(noise)).square().mean().sqrt()))
        assert found.calls.tolist() == [steps * calls] * 200
        assert model.calls == steps * calls
    for worse, better in itertools.pairwise(errors):
        assert worse / better == pytest.approx(2**order, rel=0.12)
    assert errors[0] < {"euler": 0.04, "heun": 0.001, "ddim": 0.04}[step]


def test_samples_have_the_right_mean_and_deviation() -> None:
    found = Solver(uniform(80), "heun").run(Network(gaussian, "velocity"), LinearPath(), randn(40_000, 1))
    assert float(found.x.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(found.x.std()) == pytest.approx(STD, abs=0.01)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-8])
def test_dopri5_keeps_its_tolerance_and_counts_exactly(tolerance: float) -> None:
    noise, model = randn(50, 3), Counting(gaussian)
    found = Solver([1.0, 0.0], "dopri5", rtol=tolerance, atol=tolerance).run(model, LinearPath(), noise)
    assert float((found.x - exact(noise)).abs().max()) < 20 * tolerance
    assert int(found.calls.sum()) == model.rows
    thousand = Solver(uniform(1000)).run(Network(gaussian, "velocity"), LinearPath(), noise)
    assert float((found.x - thousand.x).abs().max()) < 20 * tolerance + 3e-3


def test_dopri5_calls_of_each_example_do_not_depend_on_the_batch() -> None:
    x = torch.cat([randn(4, 2), 100 * randn(4, 2, seed=1)])  # the wild ones need more steps

    def bent(x: Tensor, t: Tensor) -> Tensor:
        return torch.cos(x * 3) * 2 + t[:, None]

    solver = Solver([1.0, 0.0], "dopri5")
    together = solver.run(Network(bent, "velocity"), LinearPath(), x)
    assert len(together.calls.unique()) > 1
    for i in range(8):
        model = Counting(bent)
        alone = solver.run(model, LinearPath(), x[i : i + 1])
        assert alone.calls.tolist() == [int(together.calls[i])] == [model.rows]
        assert torch.allclose(alone.x[0], together.x[i], rtol=1e-9, atol=1e-9)


def test_dopri5_in_float32_does_not_stall_below_rounding() -> None:
    noise = randn(5, 2).float()
    found = Solver([1.0, 0.0], "dopri5", rtol=1e-7, atol=1e-7).run(
        Network(gaussian, "velocity"), LinearPath(), noise
    )
    assert found.x.dtype == torch.float32
    assert float((found.x - exact(noise)).abs().max()) < 3e-6


def test_dopri5_stops_at_every_time_and_goes_on_without_asking_again() -> None:
    noise, times = randn(6, 2), [1.0, 0.7, 0.2, 0.0]
    whole, parts = Counting(gaussian), Counting(gaussian)
    Solver([1.0, 0.0], "dopri5").run(whole, LinearPath(), noise)
    found = Solver(times, "dopri5").run(parts, LinearPath(), noise, record=True)
    assert found.states.shape == (4, 6, 2)
    for state, t in zip(found.states, times, strict=True):
        variance = (1 - t) ** 2 * STD**2 + t**2
        assert torch.allclose(state, (1 - t) * MEAN + math.sqrt(variance) * noise, atol=5e-4)
    assert parts.rows <= whole.rows + 6 * 6 * 3
    assert torch.allclose(found.states[-1], found.x)


def test_dopri5_runs_both_ways_and_refuses_what_is_too_rough() -> None:
    noise = randn(6, 2)
    there = Solver([1.0, 0.0], "dopri5", rtol=1e-8, atol=1e-8)
    back = Solver([0.0, 1.0], "dopri5", rtol=1e-8, atol=1e-8)
    data = there.run(Network(gaussian, "velocity"), LinearPath(), noise).x
    assert torch.allclose(back.run(Network(gaussian, "velocity"), LinearPath(), data).x, noise, atol=1e-6)
    wild = Network(lambda x, t: x * torch.nan, "velocity")
    with pytest.raises(InputError, match="stalls near t = 1"):
        there.run(wild, LinearPath(), noise)
    path = ResidualPath(torch.tensor([0.2, 0.9]), 1.0, noise)
    with pytest.raises(InputError, match="a residual path"):
        there.run(Network(gaussian, "velocity"), path, noise)


def test_dopri5_gives_each_example_its_own_condition() -> None:
    shift = randn(6, 2, seed=3)
    model = Network(lambda x, t, c: -c["by"] * (1 + x[:, :1] * 0), "velocity")
    x = torch.cat([randn(3, 2), 50 * randn(3, 2)])
    found = Solver([1.0, 0.0], "dopri5").run(model, LinearPath(), x, cond={"by": shift, "scale": 2.0})
    assert torch.allclose(found.x, x + shift, atol=1e-9)


def test_heun_leaves_out_the_call_at_sigma_zero_unless_velocity_is_predicted() -> None:
    def denoise(x: Tensor, t: Tensor) -> Tensor:
        assert bool((t > 0).all()), "a denoiser was asked at sigma = 0"
        t = t[:, None]
        return MEAN + STD**2 / (STD**2 + t**2) * (x - MEAN)

    times = [(10 ** (1 / 7) + k / 40 * (0.002 ** (1 / 7) - 10 ** (1 / 7))) ** 7 for k in range(41)] + [0.0]
    found = Solver(times, "heun").run(Counting(denoise, "x0"), EDM(), 10 * randn(50, 2))
    assert found.calls.tolist() == [2 * 41 - 1] * 50
    wanted = MEAN + 10 * randn(50, 2) * STD / math.sqrt(100 + STD**2) - MEAN * STD / math.sqrt(100 + STD**2)
    assert torch.allclose(found.x, wanted, atol=1e-2)


def test_ddim_is_exact_on_one_data_point_whatever_the_steps() -> None:
    point, path = randn(1, 4), VariancePreserving.from_betas(1e-4, 0.02)
    model = Network(lambda x, t: point.expand_as(x), "x0")
    x = path.sample(point.expand(5, 4), randn(5, 4, seed=1), 999)
    found = Solver([999, 400, -1], "ddim").run(model, path, x, record=True)
    assert torch.allclose(found.x, point.expand(5, 4), atol=1e-12)
    assert [p.kind for p in found.predictions] == ["x0", "x0"]
    assert torch.allclose(
        found.states[1], path.sample(point.expand(5, 4), randn(5, 4, seed=1), 400), atol=1e-12
    )
    assert torch.equal(Solver([999, 400, -1], "exponential").run(model, path, x).x, found.x)


class Watching(Hook):
    def __init__(self) -> None:
        self.seen: list[tuple[str, int, float, float]] = []

    def before_step(self, state: State) -> None:
        self.seen.append(("before", state.index, state.t, state.t_next))

    def on_prediction(self, prediction: Prediction, x: Tensor, t: Any, state: State) -> Prediction:
        self.seen.append(("said", state.index, t, float(x.mean())))
        return Prediction("velocity", 2 * prediction.tensor)

    def after_step(self, state: State) -> None:
        self.seen.append(("after", state.index, state.t, state.t_next))
        if state.index == 0:
            state.x = state.x + 10


def test_hooks_run_in_order_and_change_what_they_return() -> None:
    hook = Watching()
    model = Network(lambda x, t: torch.ones_like(x), "velocity")
    found = Solver([1.0, 0.5, 0.0]).run(model, LinearPath(), torch.zeros(2, 1), hooks=[hook], record=True)
    assert [s[0] for s in hook.seen] == ["before", "said", "after"] * 2
    assert hook.seen[0] == ("before", 0, 1.0, 0.5)
    assert hook.seen[4] == ("said", 1, 0.5, 9.0)
    assert found.states[:, 0, 0].tolist() == [0.0, 9.0, 8.0]
    assert float(found.predictions[0].tensor[0]) == 2.0


def test_wrapped_models_and_other_networks_are_counted() -> None:
    class Second(Hook):
        def wrap(self, model: Model, path: Path) -> Model:
            def twice(x: Tensor, t: Any, cond: Any = None) -> Prediction:
                both = model(torch.cat([x, x]), t, cond)
                return Prediction(both.kind, both.tensor.chunk(2)[0])

            return twice

        def before_step(self, state: State) -> None:
            other = state.counted(Network(lambda x, t: x, "x0"))
            if state.index < 2:
                other(state.x, state.t)

    model = Counting(gaussian)
    found = Solver(uniform(4)).run(model, LinearPath(), randn(3, 2), hooks=[Second()])
    assert found.calls.tolist() == [4 * 2 + 2] * 3
    assert model.rows == 4 * 2 * 3


def test_no_hook_no_difference_and_nothing_left_behind() -> None:
    weight = torch.nn.Linear(2, 2).double()
    model = Network(lambda x, t: weight(x), "velocity")
    before = torch.random.get_rng_state()
    plain = Solver(uniform(5)).run(model, LinearPath(), randn(3, 2))
    hooked = Solver(uniform(5)).run(model, LinearPath(), randn(3, 2), hooks=[Hook()])
    assert torch.equal(plain.x, hooked.x)
    assert not plain.x.requires_grad
    assert all(p.grad is None for p in weight.parameters())
    assert torch.equal(before, torch.random.get_rng_state())


def test_half_precision_gets_its_time_in_float32() -> None:
    kinds = []

    def model(x: Tensor, t: Tensor, cond: Any = None) -> Prediction:
        kinds.append(t.dtype)
        return Prediction("velocity", x)

    Solver([1.0, 0.0]).run(model, LinearPath(), torch.ones(2, 2, dtype=torch.bfloat16))
    assert kinds == [torch.float32]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Solver([1.0]), "times has 1 entries"),
        (lambda: Solver([1.0, 0.5, 0.5]), "strictly"),
        (lambda: Solver([1.0, 0.5, 0.7]), "strictly"),
        (lambda: Solver([1.0, math.nan]), "times has 1 NaN"),
        (lambda: Solver([1.0, 0.0], "rk4"), "step is 'rk4'"),
        (lambda: Solver([1.0, 0.0], rtol=0), "rtol is 0"),
        (lambda: run(lambda x, t, c: x), "it must give a Prediction"),
        (lambda: run(Network(lambda x, t: x[:, :1], "velocity")), "it must give that of x"),
        (lambda: run(Network(lambda x, t: x / 0, "velocity")), "the sample has"),
        (lambda: run(Network(gaussian, "velocity"), randn(3, 2) * math.inf), "x has"),
        (lambda: run(Network(gaussian, "velocity"), randn(0, 2)), "x is empty"),
        (lambda: run(Network(gaussian, "speed")), "prediction kind is 'speed'"),
    ],
)
def test_refusals(make: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()


def run(model: Any, x: Tensor | None = None) -> None:
    Solver([1.0, 0.0]).run(model, LinearPath(), randn(3, 2) if x is None else x)
