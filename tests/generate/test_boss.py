"""Every check, refusal and named fault of Bellman steps and straightening."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmatch.core.bridge import from_diffusers
from gradmatch.core.checks import InputError
from gradmatch.core.path import EDM, LinearPath, Prediction, VariancePreserving
from gradmatch.core.sampler import Network, Solver
from gradmatch.core.schedule import jump_cost
from gradmatch.generate.boss import Straightened, bellman_steps, sample, straighten, to_scheduler
from gradmatch.zoo import MixtureOracle, mlp_velocity, unet


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def bent(x: Tensor, t: Tensor) -> Tensor:
    """Noise at 0 to data at 1, with most of the bend early."""
    return torch.cos(8 * torch.exp(-3 * t))[:, None] * torch.sin(x) + 1


def fine(x: Tensor, steps: int = 100, velocity: Any = bent) -> Tensor:
    return sample(velocity, x, torch.linspace(0, 1, steps + 1, dtype=torch.float64))


# --- steps ------------------------------------------------------------------------------------------------------


def test_times_run_from_end_to_end_and_rise() -> None:
    x = randn(20, 3)
    assert bellman_steps(bent, x, 1).tolist() == [0.0, 1.0]
    assert torch.equal(bellman_steps(bent, x, 12, k_max=12), torch.linspace(0, 1, 13, dtype=torch.float64))
    for nfe in (2, 3, 7):
        times = bellman_steps(bent, x, nfe, k_max=40)
        assert times.dtype == torch.float64
        assert (float(times[0]), float(times[-1]), len(times)) == (0.0, 1.0, nfe + 1)
        assert bool((times.diff() > 0).all())


def test_cost_and_calls_are_those_of_the_fine_trajectory_alone() -> None:
    calls = []

    def counted(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        return bent(x, t)

    x = randn(10, 3, dtype=torch.float64)
    times, cost = bellman_steps(counted, x, 3, k_max=20, return_cost=True)
    assert calls == [10] * 20
    states, slopes = [x], []
    grid = torch.linspace(0, 1, 21, dtype=torch.float64)
    for i in range(20):
        slopes.append(bent(states[-1], grid[i].expand(10)))
        states.append(states[-1] + (grid[i + 1] - grid[i]) * slopes[-1])
    wanted = jump_cost(torch.stack(states), torch.stack(slopes), grid)
    upper = torch.ones(21, 21, dtype=torch.bool).triu(2)
    assert torch.allclose(cost[upper], wanted[upper], rtol=1e-9, atol=1e-12)
    assert cost.diagonal(1).tolist() == [0.0] * 20  # exactly, by construction
    assert bool(torch.isinf(cost[~torch.ones(21, 21, dtype=torch.bool).triu(1)]).all())
    parts, again = bellman_steps(bent, x, 3, k_max=20, chunk=3, return_cost=True)
    assert torch.equal(parts, times)
    assert torch.allclose(again[upper], cost[upper])


def test_a_constant_field_costs_nothing() -> None:
    direction, x = randn(1, 3, seed=1), randn(30, 3)

    def constant(x: Tensor, t: Tensor) -> Tensor:
        return direction.expand_as(x)

    _, cost = bellman_steps(constant, x.double(), 4, return_cost=True)
    size = float(x.square().sum(1).mean())
    assert float(cost[torch.isfinite(cost)].max()) < 1e-11 * size
    one = sample(constant, x, bellman_steps(constant, x, 1))
    assert torch.allclose(one, fine(x, velocity=constant), atol=1e-5)


def test_more_calls_never_cost_more_and_uniform_is_never_better() -> None:
    x, before = randn(40, 3), math.inf
    _, cost = bellman_steps(bent, x, 1, k_max=24, return_cost=True)

    def total(nodes: Any) -> float:
        return float(sum(cost[a, b] for a, b in itertools.pairwise(nodes)))

    for nfe in (1, 2, 3, 4, 6, 8, 12, 24):
        times = bellman_steps(bent, x, nfe, k_max=24)
        mine = total((times * 24).round().long().tolist())
        assert mine <= before + 1e-12
        assert mine <= total(range(0, 25, 24 // nfe)) + 1e-12
        before = mine


def test_bellman_times_follow_the_fine_solution_better_than_uniform_ones() -> None:
    x, held = randn(100, 3), randn(300, 3, seed=1)
    for nfe in (3, 4, 6):
        errors = [
            float((sample(bent, held, times) - fine(held)).square().sum(1).mean())
            for times in (bellman_steps(bent, x, nfe), torch.linspace(0, 1, nfe + 1))
        ]
        assert errors[0] < errors[1]


def test_a_reversed_grid_gives_the_mirrored_schedule() -> None:
    x, nfe = randn(30, 3), 4
    there = bellman_steps(bent, x, nfe, k_max=30)
    mirrored = bellman_steps(
        lambda x, t: -bent(x, 1 - t), x, nfe, grid=torch.linspace(1, 0, 31, dtype=torch.float64)
    )
    assert torch.allclose(mirrored, 1 - there, atol=1e-12)
    same = bellman_steps(
        Network(lambda x, t: -bent(x, 1 - t), "velocity"), x, nfe, k_max=30, path=LinearPath()
    )
    assert torch.allclose(same, mirrored)


def test_data_may_drive_the_grid_backwards() -> None:
    x = randn(30, 3)
    back = bellman_steps(bent, fine(x), 4, grid=torch.linspace(1, 0, 31))
    assert (float(back[0]), float(back[-1])) == (1.0, 0.0)


def test_any_grid_and_the_sigmas_of_edm() -> None:
    ramp = torch.linspace(0, 1, 31, dtype=torch.float64)
    rho = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    oracle = MixtureOracle(randn(8, 2), 0.3, path=EDM(), kind="x0")
    times, cost = bellman_steps(oracle, 80 * randn(40, 2, seed=1), 5, grid=rho, path=EDM(), return_cost=True)
    assert (float(times[0]), float(times[-1])) == (float(rho[0]), float(rho[-1]))
    assert bool(torch.isin(times, rho).all())
    assert torch.isfinite(cost).sum() == 31 * 30 // 2
    slanted = bellman_steps(bent, randn(9, 2), 3, grid=ramp**2)
    assert bool(torch.isin(slanted, ramp**2).all())


def test_a_distance_of_decoded_points_decides_when_asked() -> None:
    x = randn(30, 2)

    def first_only(a: Tensor, b: Tensor) -> Tensor:
        return (a[:, 0] - b[:, 0]).square()

    def straight_in_second(x: Tensor, t: Tensor) -> Tensor:
        wild = torch.cos(20 * t) * 5
        return torch.stack([bent(x[:, :1], t)[:, 0], wild], 1)

    alone = bellman_steps(bent, x[:, :1], 4, k_max=30)
    assert torch.equal(bellman_steps(straight_in_second, x, 4, k_max=30, cost=first_only), alone)
    assert not torch.equal(bellman_steps(straight_in_second, x, 4, k_max=30), alone)


# --- straightening ------------------------------------------------------------------------------------------------


def noises(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 2, generator=generator)


class Bent(nn.Module):
    """A network that is exactly ``bent`` plus a learned correction that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.more = mlp_velocity(2, (32, 32))
        for p in list(self.more.parameters())[-2:]:
            nn.init.zeros_(p)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return bent(x, t) + self.more(x, t)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return Bent()


QUICK: dict[str, Any] = {
    "n_pairs": 400,
    "steps": 400,
    "batch": 64,
    "lr": 5e-3,
    "schedule": "cosine",
    "k_max": 20,
    "warmup": 5,
}


@pytest.mark.parametrize("times", [[0.0, 0.3, 0.6, 1.0], [0.0, 1.0]])
def test_straightened_networks_jump_to_the_fine_end_points(network: nn.Module, times: list[float]) -> None:
    before = {k: v.clone() for k, v in network.state_dict().items()}
    student = straighten(network, times, noises, **QUICK, ema=0.98)
    x = randn(200, 2, seed=9)
    target = fine(x, 20)
    error, plain = (float((sample(v, x, times) - target).square().mean()) for v in (student, network))
    assert error < 0.02 * plain
    assert student.held_out is not None
    assert student.held_out < 0.02
    for name, value in network.state_dict().items():  # the teacher is not touched
        assert torch.equal(value, before[name])


def test_pairs_come_from_one_fine_trajectory_not_from_coarse_steps(network: nn.Module) -> None:
    """A table that returns the target at each (X_k, t_k) reproduces the fine end point."""
    seen: dict[str, Tensor] = {}

    def watch(said: Tensor, target: Tensor) -> Tensor:
        seen["target"] = target
        return (said - target).square().mean()

    times = [0.0, 0.4, 1.0]
    x, store = randn(7, 2), []

    def fixed(n: int, generator: torch.Generator) -> Tensor:
        return x[:n].double()

    network = network.double()
    try:
        straighten(network, times, fixed, n_pairs=7, steps=1, loss=watch, k_max=20, held_out=0.2)
        grid = torch.linspace(0, 1, 21, dtype=torch.float64)
        y = x.double()
        states = [y]
        for a, b in itertools.pairwise(grid.tolist()):
            y = y + (b - a) * network(y, torch.full((7,), a, dtype=torch.float64)).detach()
            states.append(y)
        first, second = (states[8] - states[0]) / 0.4, (states[20] - states[8]) / 0.6
        store = torch.cat([first, second])
        gaps = torch.cdist(seen["target"], store).min(1).values
        assert float(gaps.max()) < 1e-9
        reached = states[0] + 0.4 * first + 0.6 * second
        assert torch.allclose(reached, states[20], atol=1e-6)
    finally:
        network.float()


def test_dropout_takes_no_part_and_modes_come_back() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.net(x)

    velocity, x = Noisy().train(), randn(20, 2)
    one, two = (bellman_steps(velocity, x, 3, k_max=10, return_cost=True)[1] for _ in range(2))
    assert torch.equal(one, two)
    assert velocity.net[1].training
    before = torch.random.get_rng_state()
    straighten(velocity, [0.0, 1.0], noises, n_pairs=10, steps=2, k_max=5)
    assert torch.equal(before, torch.random.get_rng_state())
    assert velocity.net[1].training


def test_it_is_called_at_its_own_times_only(network: nn.Module, tmp_path) -> None:
    student = straighten(network, [0.0, 0.3, 1.0], noises, n_pairs=20, steps=2, k_max=10)
    assert student(randn(3, 2), torch.full((3,), 0.3)).shape == (3, 2)
    for t in (0.5, 1.0):  # never at the end, nor between
        with pytest.raises(InputError, match=rf"t is {t:g}; the network was straightened at 0, 0.3"):
            student(randn(3, 2), torch.full((3,), t))
    with pytest.raises(InputError, match=r"times is \[0.0, 0.5, 1.0\]; the network was straightened at"):
        sample(student, randn(3, 2), [0.0, 0.5, 1.0])
    student.save(tmp_path / "s.safetensors")
    back = Straightened.load(tmp_path / "s.safetensors", Bent())
    assert back.times.tolist() == [0.0, 0.3, 1.0]
    assert torch.equal(back.sample(randn(3, 2)), student.sample(randn(3, 2)))


def test_one_step_is_distillation_of_noise_and_end_points(network: nn.Module) -> None:
    x = randn(5, 2)

    def watch(said: Tensor, target: Tensor) -> Tensor:
        gaps = torch.cdist(target, fine(x, 10) - x, compute_mode="donot_use_mm_for_euclid_dist")
        assert float(gaps.min(1).values.max()) < 1e-5
        return (said - target).square().mean()

    straighten(
        network, [0.0, 1.0], lambda n, g: x[:n], n_pairs=5, steps=1, loss=watch, k_max=10, held_out=0.2
    )


def test_the_average_keeps_pace_with_short_runs(network: nn.Module) -> None:
    """The published 0.999999 returns the teacher after any short run."""
    x = randn(50, 2)
    frozen = straighten(network, [0.0, 1.0], noises, **{**QUICK, "steps": 40}, ema=0.999999)
    assert torch.allclose(frozen.sample(x), sample(network, x, [0.0, 1.0]), atol=1e-2)
    none = straighten(network, [0.0, 1.0], noises, **{**QUICK, "steps": 40}, ema=None)
    assert not torch.allclose(none.sample(x), frozen.sample(x), atol=0.1)
    assert inspect.signature(straighten).parameters["ema"].default == 0.999


def test_adapters_train_few_parameters_and_are_merged(network: nn.Module) -> None:
    pytest.importorskip("peft")
    trained = []

    def optimizer(parameters: Any, lr: float) -> torch.optim.Optimizer:
        trained.append(sum(p.numel() for p in parameters))
        return torch.optim.Adam(parameters, lr=lr)

    options = {**QUICK, "steps": 100}
    student = straighten(network, [0.0, 1.0], noises, **options, lora_rank=2, ema=0.9, optimizer=optimizer)
    whole = sum(p.numel() for p in network.parameters())
    assert trained[0] < 0.2 * whole
    assert {k: v.shape for k, v in student.network.state_dict().items()} == {
        k: v.shape for k, v in network.state_dict().items()
    }
    x = randn(200, 2, seed=9)
    error, plain = (
        float((sample(v, x, [0.0, 1.0]) - fine(x, 20)).square().mean()) for v in (student, network)
    )
    assert error < 0.8 * plain
    short = {**QUICK, "steps": 3, "n_pairs": 10, "lora_rank": 2}
    one, two = (straighten(network, [0.0, 1.0], noises, **short) for _ in range(2))
    assert torch.equal(one.sample(x), two.sample(x))


# --- real objects -------------------------------------------------------------------------------------------------


def test_diffusers_networks_under_flow_and_diffusion_schedulers() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = unet(1, 8, 8, levels=1).network.eval()
    x = randn(4, 1, 8, 8)
    flow = from_diffusers(net, diffusers.FlowMatchEulerDiscreteScheduler())
    times = bellman_steps(flow, x, 3, k_max=10)
    assert (float(times[0]), float(times[-1])) == (1.0, 0.0)
    scheduler = to_scheduler(times)
    y = x
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            y = scheduler.step(net(y, timestep).sample, timestep, y).prev_sample
    assert torch.allclose(sample(flow, x, times), y, atol=1e-5)
    noisy = from_diffusers(net, diffusers.DDIMScheduler(clip_sample=False))
    steps = bellman_steps(noisy, x, 4, k_max=10)
    assert (float(steps[0]), float(steps[-1])) == (900.0, -1.0)
    assert bool(torch.isin(steps, noisy.times(10)).all())
    student = straighten(
        noisy, steps, lambda n, g: torch.randn(n, 1, 8, 8, generator=g), n_pairs=4, steps=2, k_max=10, batch=2
    )
    assert student.kind == "noise"
    assert student.sample(x).shape == x.shape
    assert next(net.parameters()).data_ptr() != next(student.network.parameters()).data_ptr()


def test_straightening_any_kind_of_prediction_aims_at_the_fine_trajectory() -> None:
    """The target is the prediction whose exact step goes where the fine trajectory went."""
    path = VariancePreserving.from_betas(1e-4, 0.02)
    oracle = MixtureOracle(randn(5, 2, dtype=torch.float64), 0.2, path=path, kind="noise")
    x = randn(6, 2, seed=2, dtype=torch.float64)
    times = [999.0, 400.0, -1.0]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return oracle(x, t).tensor + self.shift

    grid = sorted({*torch.linspace(999, -1, 51, dtype=torch.float64).tolist(), 400.0}, reverse=True)
    states = Solver(grid, "ddim").run(oracle, path, x, record=True).states
    middle, end = states[grid.index(400.0)], states[-1]
    wanted = torch.cat(
        [path.aim("noise", x, middle, 999, 400).tensor, path.aim("noise", middle, end, 400, -1).tensor]
    )

    def watch(said: Tensor, target: Tensor) -> Tensor:
        assert float(torch.cdist(target, wanted).min(1).values.max()) < 1e-6
        return (said - target).square().mean()

    student = straighten(
        Net(), times, lambda n, g: x[:n], n_pairs=6, steps=1, path=path, kind="noise", k_max=50, loss=watch,
    )  # fmt: skip
    assert student.kind == "noise"
    assert bool(torch.isfinite(student.sample(x)).all())

    class Wrong(Net):
        def forward(self, x: Tensor, t: Tensor) -> Any:
            return Prediction("noise", super().forward(x, t))

    with pytest.raises(InputError, match="must give a tensor"):
        straighten(Wrong(), times, lambda n, g: x[:n], n_pairs=6, steps=1, path=path, kind="noise", k_max=5)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: bellman_steps(bent, randn(3, 2), 0), "nfe is 0"),
        (lambda: bellman_steps(bent, randn(3, 2), 101), "nfe is 101"),
        (lambda: bellman_steps(bent, randn(3, 2), 2, k_max=0), "k_max is 0"),
        (lambda: bellman_steps(bent, randn(3, 2), 2, grid=[0.0, 0.6, 0.5, 1.0]), "strictly"),
        (lambda: bellman_steps(bent, randn(3, 2), 2, grid=[0.0, 0.5, 0.9]), "it must span the path"),
        (lambda: bellman_steps(bent, randn(3, 2), 2, path=EDM()), "EDM has no times of its own"),
        (lambda: bellman_steps(bent, randn(3, 2), 2, cost="l1"), "cost is 'l1'"),
        (lambda: bellman_steps(bent, randn(0, 2), 2), "x0 is empty"),
        (lambda: bellman_steps(bent, randn(3, 2), 2, chunk=-1), "chunk is -1"),
        (lambda: bellman_steps(lambda x, t: x[:, :1], randn(3, 2), 2), "must give that of x"),
        (lambda: bellman_steps(lambda x, t: x * torch.nan, randn(3, 2), 2), "NaN"),
        (lambda: bellman_steps("v", randn(3, 2), 2), "velocity is a str"),
        (lambda: straighten(Bent(), [0.0, 0.5], noises), "times runs from 0 to 0.5; it must span"),
        (
            lambda: straighten(bent, [0.0, 1.0], noises, n_pairs=2, k_max=2),
            "straightening trains an nn.Module",
        ),
        (lambda: straighten(Bent(), [0.0, 1.0], noises, loss="l1"), "loss is 'l1'"),
        (lambda: straighten(Bent(), [0.0, 1.0], noises, n_pairs=1), "n_pairs is 1"),
        (lambda: straighten(Bent(), [0.0, 1.0], noises, n_pairs=4, k_max=2, lora_rank=0), "lora_rank is 0"),
    ],
)
def test_refusals(make: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()
