"""Jump costs against the double loop, shortest paths against all subsets."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from gradmatch.core.checks import InputError
from gradmatch.core.path import EDM, Prediction, VariancePreserving
from gradmatch.core.sampler import Network, Solver
from gradmatch.core.schedule import jump_cost, shortest_path, straight_frame


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def double_loop(states: Tensor, slopes: Tensor, times: Tensor, scale: Tensor | None = None) -> Tensor:
    last = len(slopes)
    cost = torch.full((last + 1, last + 1), torch.inf, dtype=torch.float64)
    for i in range(last):
        for j in range(i + 1, last + 1):
            gap = states[i] + (times[j] - times[i]) * slopes[i] - states[j]
            factor = 1.0 if scale is None else float(scale[j])
            cost[i, j] = (factor * gap).flatten(1).square().sum(1).mean()
    return cost


@pytest.mark.parametrize("falling", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_products_equal_the_double_loop(falling: bool, weighted: bool, monkeypatch) -> None:
    from gradmatch.core import schedule

    monkeypatch.setattr(schedule, "_BLOCK", 13)  # several blocks, the last not whole
    states, slopes = randn(13, 5, 2, 3), randn(12, 5, 2, 3, seed=1)
    times = torch.rand(13, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sort(
        descending=falling
    )[0]
    scale = torch.rand(13, dtype=torch.float64) if weighted else None
    wanted = double_loop(states, slopes, times, scale)
    got = jump_cost(states, slopes, times, scale=scale)
    finite = torch.isfinite(wanted)
    assert torch.equal(finite, torch.isfinite(got))
    assert not finite.tril().any()  # the unused triangle is infinite, not zero
    assert float((got - wanted)[finite].abs().max()) < 1e-10 * float(wanted[finite].max())
    slow = jump_cost(
        states, slopes, times, scale=scale, distance=lambda a, b: (a - b).flatten(1).square().sum(1)
    )
    assert torch.allclose(slow[finite], wanted[finite], rtol=1e-12)


def test_float32_keeps_the_small_costs_of_near_times() -> None:
    """Inner products of the states themselves cancel in float32 where the times are near; those of the steps do not."""
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    way = randn(1, 20, 50, seed=1)
    states = 10 + torch.sin(t)[:, None, None] * way
    slopes = torch.cos(t[:-1])[:, None, None] * way
    wanted = jump_cost(states, slopes, t)
    got = jump_cost(states.float(), slopes.float(), t)
    for i, j in ((50, 55), (50, 60), (20, 80)):
        x, v, y = (f.float().flatten() for f in (states[i], slopes[i], states[j]))
        h = float(t[j] - t[i])
        naive = (x @ x + h * h * (v @ v) + y @ y + 2 * h * (x @ v) - 2 * (x @ y) - 2 * h * (v @ y)) / 20
        assert float(got[i, j]) == pytest.approx(float(wanted[i, j]), rel=0.02)
        if j - i < 20:
            assert float(naive) != pytest.approx(float(wanted[i, j]), rel=0.5)


def test_an_euler_trajectory_needs_one_matrix_and_gives_the_same(monkeypatch) -> None:
    from gradmatch.core import schedule

    times = torch.rand(13, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sort()[0]
    slopes = randn(12, 5, 4, seed=1)
    steps = times.diff()[:, None, None] * slopes
    states = torch.cat([randn(1, 5, 4), randn(1, 5, 4) + steps.cumsum(0)])
    made: list[int] = []
    plain = schedule._products
    monkeypatch.setattr(schedule, "_products", lambda a, b: made.append(1) or plain(a, b))
    got, wanted = jump_cost(states, slopes, times, exact=True), double_loop(states, slopes, times)
    assert made == [1]
    assert got.diagonal(1).tolist() == [0.0] * 12
    upper = torch.ones(13, 13, dtype=torch.bool).triu(2)
    assert float((got - wanted)[upper].abs().max()) < 1e-12 * float(wanted[upper].max())


def test_a_distance_sees_every_pair_once() -> None:
    seen: list[int] = []

    def distance(a: Tensor, b: Tensor) -> Tensor:
        seen.append(len(a))
        return (a - b).abs().flatten(1).amax(1)

    states, slopes = randn(4, 5, 2), randn(3, 5, 2, seed=1)
    cost = jump_cost(states, slopes, torch.arange(4.0), distance=distance)
    assert seen == [15, 10, 5]
    assert float(cost[1, 3]) == pytest.approx(
        float((states[1] + 2 * slopes[1] - states[3]).abs().amax(1).mean())
    )


@pytest.mark.parametrize("nodes", [2, 5, 11])
def test_the_path_is_the_best_of_all_subsets(nodes: int) -> None:
    for seed in range(5):
        cost = torch.rand(nodes, nodes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for edges in range(1, min(4, nodes - 1) + 1):
            best = min(
                (
                    sum(float(cost[a, b]) for a, b in itertools.pairwise((0, *inner, nodes - 1))),
                    (0, *inner, nodes - 1),
                )
                for inner in itertools.combinations(range(1, nodes - 1), edges - 1)
            )
            found, value = shortest_path(cost, edges)
            assert tuple(found) == best[1]
            assert value == pytest.approx(best[0])
    assert shortest_path(cost, nodes - 1)[0] == list(range(nodes))


def test_back_pointers_hold_where_equality_of_sums_would_not() -> None:
    """Costs whose sums round: searching for the step with cost + rest == best may find none and stop short."""
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        cost = torch.rand(40, 40, generator=g, dtype=torch.float64) * torch.tensor(10.0).double() ** (
            16 * torch.rand(40, 40, generator=g, dtype=torch.float64)
        )
        for edges in (3, 17, 38):
            found, value = shortest_path(cost, edges)
            assert len(found) == edges + 1
            assert found[0] == 0
            assert found[-1] == 39
            assert all(a < b for a, b in itertools.pairwise(found))
            assert sum(float(cost[a, b]) for a, b in itertools.pairwise(found)) == pytest.approx(value)


def test_ties_take_the_earlier_nodes() -> None:
    assert shortest_path(torch.zeros(6, 6), 3)[0] == [0, 1, 2, 5]


@pytest.mark.parametrize("kind", ["x0", "noise", "velocity"])
def test_in_the_straight_frame_a_jump_is_the_paths_own_step(kind: str) -> None:
    """The cost along a diffusion path is the squared error of ``path.step`` from i to j, measured in x."""
    for path, times in (
        (VariancePreserving.from_betas(1e-4, 0.02), torch.tensor([999.0, 600.0, 300.0, 100.0, -1.0])),
        (EDM(), torch.tensor([80.0, 20.0, 5.0, 1.0, 0.0])),
    ):
        model = Network(lambda x, t: torch.tanh(x) * 0.5, kind)
        run = Solver(times, "ddim").run(model, path, randn(6, 3) * 2, record=True)
        z, slopes, w, scale = straight_frame(path, times, run.states, run.predictions)
        cost = jump_cost(z, slopes, w, scale=scale)
        for i in range(4):
            for j in range(i + 1, 5):
                said = Prediction(kind, run.predictions[i].tensor)
                jumped = path.step(run.states[i], said, float(times[i]), float(times[j]))
                wanted = (jumped - run.states[j]).square().sum(1).mean()
                assert float(cost[i, j]) == pytest.approx(
                    float(wanted), rel=1e-6, abs=1e-9 * float(scale.max()) ** 2
                )


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: jump_cost(randn(3, 2, 1), randn(3, 2, 1), torch.arange(3.0)), "do not belong together"),
        (lambda: jump_cost(randn(3, 2, 1), randn(2, 2, 1), torch.arange(4.0)), "do not belong together"),
        (
            lambda: jump_cost(
                randn(3, 2, 1), randn(2, 2, 1), torch.arange(3.0), distance=lambda a, b: a.sum()
            ),
            "one number for each pair",
        ),
        (lambda: shortest_path(torch.zeros(3, 2), 1), "must be square"),
        (lambda: shortest_path(torch.zeros(3, 3), 3), "edges is 3"),
        (lambda: shortest_path(torch.full((3, 3), torch.nan), 2), "cost has NaN"),
        (lambda: shortest_path(torch.full((3, 3), torch.inf), 2), "no path of 2 edges"),
    ],
)
def test_refusals(make, says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()
