"""The search over programs: aging, cache, baselines, resuming, funnel and simplification, and its proxy tasks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradmatch.core.checks import InputError
from gradmatch.optim import Program, ProgramSearch, SearchResult, programs
from gradmatch.optim._program_functions import Layout
from gradmatch.optim._program_run import Machine
from gradmatch.optim._program_tasks import MLPTask, ModelTask, _slopes, cosine, tuned
from gradmatch.optim.program_search import TOP, funnel, simplify


class Counting:
    """A cheap task: how far ten steps go on a stretched bowl; counts its calls."""

    seed = 0

    def __init__(self, lr: float = 0.02) -> None:
        self.lr, self.calls = lr, 0

    def __call__(self, program: Program) -> float:
        self.calls += 1
        scales = torch.logspace(0, -2, 8)
        w = torch.ones(8)
        step = Machine(program, Layout([5, 3]))
        states = [torch.zeros(8) for _ in step.states]
        for _ in range(10):
            update, states = step(w, scales * w, self.lr, states)
            w = w - update
        loss = float((scales * w * w).sum())
        return loss if math.isfinite(loss) else math.inf

    def describe(self) -> dict[str, Any]:
        return {"lr": self.lr, "seed": self.seed}


class Distance:
    """How far a program's updates are from another's, over random gradients."""

    seed = 0

    def __init__(self, target: Program) -> None:
        self.target = target

    def __call__(self, program: Program) -> float:
        layout, g = Layout([5, 3]), torch.Generator().manual_seed(0)
        machines = [Machine(p, layout) for p in (program, self.target)]
        states = [[torch.zeros(8) for _ in m.states] for m in machines]
        found = 0.0
        for _ in range(6):
            w, slope = torch.randn(8, generator=g), torch.randn(8, generator=g)
            updates = []
            for i, machine in enumerate(machines):
                update, states[i] = machine(w, slope, 0.1, states[i])
                updates.append(update)
            found = max(found, float((updates[0] - updates[1]).abs().max()))
        return found


def search(task: Any = None, **options: Any) -> ProgramSearch:
    return ProgramSearch(
        programs.adamw(), tasks=task or Counting(), **{"population": 20, "tournament": 5, **options}
    )


def rows(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = torch.randn(n, 5, generator=g)
    x[:, :3] += 2 * F.one_hot(y, 3)
    return x, y


# --- evolution ------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_history() -> None:
    first, second, other = (search(seed=s).run(150) for s in (3, 3, 4))
    assert first == second
    assert first.history != other.history
    state = torch.get_rng_state()
    search().run(5)
    assert torch.equal(state, torch.get_rng_state())


def test_it_finds_better_programs_than_it_started_with() -> None:
    found = search(Counting(), population=30, tournament=8).run(500)
    assert found.fitness < 0.9 * found.initial
    assert Counting()(found.best) == found.fitness
    assert found.best_so_far()[-1] == found.fitness
    assert len(found.history) == 500
    assert found.best_so_far() == sorted(found.best_so_far(), reverse=True)


def test_members_age_out_of_the_population() -> None:
    own = search(population=12, tournament=3)
    state = own._begin()
    initial = state.population[0]
    for _ in range(12):
        assert initial in state.population
        own._cycle(state)
    assert not any(member is initial for member in state.population)
    assert len(state.population) == 12


def test_the_fittest_of_the_tournament_is_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradmatch.optim import program_search

    parents = []
    monkeypatch.setattr(program_search, "mutate", lambda p, *_: (parents.append(p), p)[1])
    own = search(population=5, tournament=5)
    state = own._begin()
    kinds = [programs.adamw(0.1 * k) for k in range(5)]
    state.population.clear()
    state.population.extend((p, x) for p, x in zip(kinds, [3.0, 2.0, 0.5, math.inf, 1.0], strict=True))
    own._cycle(state)
    assert parents == [kinds[2]]


def test_programs_that_compute_the_same_are_run_once() -> None:
    cached, plain = Counting(), Counting()
    with_cache, without = search(cached).run(300), search(plain, cache=False).run(300)
    assert with_cache.history == without.history
    assert cached.calls == 301 - with_cache.hits
    assert with_cache.hit_rate > 0.3
    assert (plain.calls, without.hits) == (301, 0)


def test_random_baselines_mutate_the_program_at_the_start() -> None:
    for strategy, most in (("random", 1), ("chains", 8)):
        seen: list[Program] = []

        def task(program: Program, seen: list[Program] = seen) -> float:
            seen.append(program)
            return float(len(program))

        task.seed = 0  # type: ignore[attr-defined]
        search(task, strategy=strategy, cache=False).run(80)
        lengths = {len(p) - len(programs.adamw()) for p in seen}
        assert max(lengths) <= most
        assert min(lengths) >= -most
        assert (max(lengths) > 1) == (strategy == "chains")


def test_a_stalled_search_starts_again_from_its_best() -> None:
    own = search(restart=15, population=10, tournament=2)
    state = own._begin()
    state.best = (-1.0, programs.lion())  # nothing is better than this
    for _ in range(14):
        own._cycle(state)
    assert not all(p == programs.lion() for p, _ in state.population)
    own._cycle(state)
    assert all(p == programs.lion() for p, _ in state.population)


def test_constants_alone_can_be_tuned() -> None:
    found = search(constants_only=True).run(200)
    shape = [(s.target, s.function) for s in programs.adamw().body]
    assert all([(s.target, s.function) for s in p.body] == shape for p, _ in found.top)
    assert found.fitness < found.initial


def test_several_tasks_are_averaged_and_failures_are_infinite() -> None:
    one, two = Counting(0.02), Counting(0.05)
    own = search([one, two])
    assert own.score(programs.sgd()) == (one(programs.sgd()) + two(programs.sgd())) / 2
    diverging = Program.parse(
        "def train(w, g, lr):\n    update = log(lr)\n    update = mul(w, 1e+30)\n    return update"
    )
    assert own.score(diverging) == math.inf
    assert len(search().run(200).top) <= TOP


# --- stopped and resumed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["evolution", "chains"])
def test_a_stopped_search_goes_on_to_the_same_result(tmp_path, strategy: str) -> None:
    options = {"strategy": strategy, "restart": 30}
    whole = search(**options).run(120)

    class Killed(Exception):
        pass

    def kill(done: int, _: int, figures: dict[str, float]) -> None:
        if done in (50, 80):
            raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            search(**options).run(120, out=tmp_path / "run", resume=True, save_every=0.0, progress=kill)
    task = Counting()
    resumed = search(task, **options).run(120, out=tmp_path / "run", resume=True)
    assert resumed == whole
    assert task.calls < 60
    assert search(**options).run(120, out=tmp_path / "run", resume=True) == whole  # a finished one is read
    source = (tmp_path / "run" / "best.py").read_text()
    assert Program.parse(source) == whole.best
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["best.py", "result.json", "run.json"]


def test_a_folder_of_another_search_is_refused(tmp_path) -> None:
    search().run(3, out=tmp_path)
    with pytest.raises(InputError, match="already holds a run"):
        search().run(3, out=tmp_path)
    with pytest.raises(InputError, match="seed=0, and this one has seed=1"):
        search(seed=1).run(3, out=tmp_path, resume=True)
    with pytest.raises(InputError, match="tasks="):
        search(Counting(0.3)).run(3, out=tmp_path, resume=True)


def test_results_are_saved_with_their_failures(tmp_path) -> None:
    found = search().run(120)
    assert math.inf in found.history
    assert SearchResult.load(found.save(tmp_path / "result.json")) == found


# --- refusals -------------------------------------------------------------------------------------------------


def test_what_cannot_be_searched_is_refused() -> None:
    class Unseeded:
        seed = None

        def __call__(self, program: Program) -> float:
            return 0.0

    nan = Program.parse(
        "def train(w, g, lr):\n    z = mul(w, 0.0)\n    update = div(z, z)\n    return update"
    )
    for options, words in (
        ({"tasks": Unseeded()}, r"tasks\[0\] has no seed; give it one"),
        ({"tasks": [Counting(), lambda p: 0.0]}, r"tasks\[1\] has no seed"),
        ({"tasks": [3]}, r"tasks\[0\] is a int"),
        ({"tasks": []}, "tasks is empty"),
        ({"functions": ("sign", "maul")}, "functions is 'maul'"),
        ({"population": 0}, "population is 0"),
        ({"population": 10, "tournament": 11}, "tournament is 11; it must be between 1 and 10"),
        ({"max_len": 3}, "max_len is 3; it must be at least 9"),
        ({"strategy": "annealing"}, "strategy is 'annealing'"),
        ({"restart": 0}, "restart is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"init": "def train(w, g, lr):\n    update = mul(g, q)\n    return update"}, "reads 'q'"),
    ):
        with pytest.raises(InputError, match=words):
            ProgramSearch(**{"tasks": Counting(), **options})
    with pytest.raises(InputError, match="init scores inf on the tasks"):
        ProgramSearch(nan, tasks=Counting()).run(1)
    with pytest.raises(InputError, match="n_evaluations is -1"):
        search().run(-1)


# --- simplification and funnel --------------------------------------------------------------------------------


def test_simplification_drops_what_does_not_help() -> None:
    cluttered = Program.parse(
        """
def train(w, g, lr, m, z):
    z = add(z, w)
    c = interp(g, m, 0.9)
    m = interp(g, m, 0.99)
    c = negative(c)
    c = negative(c)
    c = arctan(c)
    s = sign(c)
    k = mul(s, 1.0)
    update = mul(k, lr)
    return update, m, z
"""
    )
    short = simplify(cluttered, Distance(programs.lion(weight_decay=0.0)))
    assert len(short) == 4
    assert short.states == ("m",)
    assert [s.function for s in short.body] == ["interp", "interp", "sign", "mul"]


def test_simplification_may_cost_what_it_is_allowed_in_all() -> None:
    def task(program: Program) -> float:
        return -float(len(program.trimmed()))  # every statement is worth one

    task.seed = 0  # type: ignore[attr-defined]
    own = programs.adamw()
    assert len(simplify(own, task)) == len(own)
    assert len(simplify(own, task, tol=2.0)) == len(own) - 2
    with pytest.raises(InputError, match="tol is -1"):
        simplify(own, task, tol=-1)


def test_a_funnel_keeps_fewer_on_each_task() -> None:
    candidates = [programs.sgd(), programs.momentum(), programs.adamw(), programs.lion()]
    tasks = [Counting(0.02), Counting(0.05)]
    first, second = funnel(candidates, tasks, [2, 1])
    assert len(first) == 4
    assert [x for _, x in first] == sorted(task_score for _, task_score in first)
    assert {p.fingerprint() for p, _ in second} == {p.fingerprint() for p, _ in first[:2]}
    with pytest.raises(InputError, match="tasks has 2 entries and keep has 1"):
        funnel(candidates, tasks, [2])
    with pytest.raises(InputError, match="candidates is empty"):
        funnel([], tasks, [2, 1])


# --- tasks ----------------------------------------------------------------------------------------------------


def mlp_task(**options: Any) -> MLPTask:
    return MLPTask(
        rows(60), rows(40, 1), **{"hidden": 6, "steps": 15, "batch_size": 16, "lr": 0.05, **options}
    )


def test_the_gradient_written_out_is_autograds() -> None:
    task = mlp_task(runs=3)
    w, g, parts, slopes, layout, batches = task._start(5, 3, 60)
    assert layout.count == 4
    x, y = rows(60)
    own = batches[0]
    _slopes(x[own], F.one_hot(y, 3)[own].float() / 16, parts, slopes, 16)
    for run in range(3):
        w1, b1, w2, b2 = (p[run].clone().requires_grad_() for p in parts)
        z = torch.relu(x[own[run]] @ w1 + b1) @ w2 + b2
        F.cross_entropy(z, y[own[run]]).backward()
        expected = torch.cat([t.grad.flatten() for t in (w1, b1, w2, b2)])
        torch.testing.assert_close(g[run], expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(parts[0].flatten(1), w[:, :30])


def test_the_mlp_task_is_a_plain_training_loop() -> None:
    task = mlp_task(runs=2)
    _, _, parts, _, _, batches = task._start(5, 3, 60)
    (x, y), (held, truth) = rows(60), rows(40, 1)
    found = []
    for run in range(2):
        net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
        values = [parts[0][run].T, parts[1][run, 0], parts[2][run].T, parts[3][run, 0]]
        for p, value in zip(net.parameters(), values, strict=True):
            p.data.copy_(value)
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9)
        for t, lr in enumerate(cosine(0.05, 15)):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            F.cross_entropy(net(x[batches[t, run]]), y[batches[t, run]]).backward()
            optimizer.step()
        found.append(float(F.cross_entropy(net(held), truth).detach()))
    assert task(programs.momentum()) == pytest.approx(sum(found) / 2, rel=1e-4)


def test_scores_repeat_and_depend_on_the_seed() -> None:
    assert mlp_task()(programs.adamw()) == mlp_task()(programs.adamw())
    assert mlp_task(seed=1)(programs.adamw()) != mlp_task()(programs.adamw())
    assert mlp_task().with_lr(0.1)(programs.adamw()) == mlp_task(lr=0.1)(programs.adamw())


def test_a_diverging_program_scores_infinity() -> None:
    wild = Program.parse(
        "def train(w, g, lr):\n    update = exp10(w)\n    update = mul(update, -1e+10)\n    return update"
    )
    assert mlp_task()(wild) == math.inf
    assert model_task()(wild) == math.inf


def model_task(**options: Any) -> ModelTask:
    def batches(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        x, y = rows(48, seed)
        return list(zip(x.split(16), y.split(16), strict=True))

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))

    settings = {"lr": 0.01, "steps": 7, "runs": 2, **options}
    return ModelTask(make, F.cross_entropy, batches(0), batches(1), **settings)


def test_models_of_ones_own_are_tasks_too() -> None:
    task = model_task()
    state = torch.get_rng_state()
    score = task(programs.adamw())
    assert torch.equal(state, torch.get_rng_state())
    assert score == task(programs.adamw())
    assert task.with_lr(0.001)(programs.adamw()) != score
    assert 0 < score < math.log(3) * 1.5
    found = ProgramSearch(programs.adamw(), tasks=task, population=4, tournament=2).run(5)
    assert len(found.history) == 5


def test_a_hugging_face_model_is_a_task() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=11,
                    n_positions=6,
                    n_embd=8,
                    n_layer=1,
                    n_head=2,
                    bos_token_id=0,
                    eos_token_id=0,
                )
            )

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids).logits.flatten(0, 1)

    ids = torch.randint(11, (8, 6), generator=torch.Generator().manual_seed(0))
    batches = [(ids, ids.flatten())]
    task = ModelTask(Causal, F.cross_entropy, batches, batches, lr=3e-3, steps=4)
    assert task(programs.lion()) < task.with_lr(0.0)(programs.lion())


def test_the_rate_is_tuned_on_a_grid() -> None:
    task = tuned(mlp_task(), programs.adamw(), [1e-6, 0.02, 1e4])
    assert task.lr == 0.02


def test_tasks_refuse_bad_data() -> None:
    x, y = rows(10)
    broken = x.clone()
    broken[3, 2] = float("nan")
    with pytest.raises(InputError, match="has 1 NaN"):
        MLPTask((broken, y), (x, y))
    with pytest.raises(InputError, match="steps is 0"):
        mlp_task(steps=0)
    with pytest.raises(InputError, match="lr is 0"):
        mlp_task(lr=0.0)
