"""The comparison of optimizers, its measurements, and the two optimizers that come with it."""

from __future__ import annotations

import copy
import json
import math
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradmatch.analysis import (
    Shampoo,
    SolutionReport,
    Stream,
    class_stream,
    compare_optimizers,
    describe_solution,
    permuted_stream,
)
from gradmatch.analysis._solution import calibration_error, class_cosines, effective_rank, hoyer, stable_rank
from gradmatch.analysis._solution_report import Paired
from gradmatch.analysis._solution_runs import Setup, _Run
from gradmatch.analysis._streams import memory_figures
from gradmatch.core.checks import InputError
from gradmatch.core.curvature import Curvature
from gradmatch.core.examples import Examples
from gradmatch.core.problem import Problem
from gradmatch.zoo import mlp


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def clusters(m: int = 120, classes: int = 4, dim: int = 6, seed: int = 0) -> Examples:
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(m) % classes
    centres = 2 * torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    return Examples(centres[y] + torch.randn(m, dim, generator=g), y, classes)


DATA = (clusters(), clusters(80, seed=1))


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))


def train(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(DATA[0].x), DATA[0].y).backward()
        optimizer.step()


# --- measurements ------------------------------------------------------------------------------------------


def test_ranks_of_known_matrices():
    eye, one = torch.eye(7), torch.outer(torch.randn(5), torch.randn(4))
    assert effective_rank(eye) == pytest.approx(7)
    assert stable_rank(eye) == pytest.approx(7)
    assert effective_rank(one) == pytest.approx(1, abs=1e-4)
    assert stable_rank(one) == pytest.approx(1)
    assert effective_rank(torch.zeros(3, 3)) == stable_rank(torch.zeros(3, 3)) == 0


def test_hoyer_of_a_spike_and_of_a_constant():
    spike = torch.zeros(100)
    spike[3] = -2.0
    assert hoyer(spike) == pytest.approx(1)
    assert hoyer(torch.full((100,), 3.0)) == pytest.approx(0)


def test_calibration_error_against_bins_by_hand():
    logits = torch.log(torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]))
    y = torch.tensor([0, 1, 0, 1])
    expected = 2 / 4 * abs(0.5 - 0.9) + 1 / 4 * abs(1 - 0.6) + 1 / 4 * abs(1 - 0.8)
    assert calibration_error(logits, y) == pytest.approx(expected, abs=1e-6)
    assert calibration_error(torch.tensor([[100.0, 0.0]]), torch.tensor([0])) == pytest.approx(0)


def test_class_cosines_are_symmetric_with_unit_diagonal_and_flag_zero_means():
    hidden, y = torch.randn(30, 5), torch.arange(30) % 3
    hidden[y == 1] = 0
    cosines = class_cosines(hidden, y, 4)
    assert torch.equal(torch.isnan(cosines).any(0), torch.tensor([True] * 4))
    live = cosines[[0, 2]][:, [0, 2]]
    torch.testing.assert_close(live, live.T)
    torch.testing.assert_close(live.diagonal(), torch.ones(2).double())
    assert bool(torch.isnan(cosines[1]).all())
    assert bool(torch.isnan(cosines[3]).all())
    means = torch.stack([hidden[y == c].mean(0) for c in (0, 2)]).double()
    assert float(live[0, 1]) == pytest.approx(float(F.cosine_similarity(means[0], means[1], dim=0)))


def test_description_against_the_definitions():
    model = net()
    start = copy.deepcopy(model)
    train(model, 30)
    model.train()
    found = describe_solution(model, DATA, start=start, sample=120)
    assert model.training
    logits = model(DATA[1].x).detach()
    assert found["test_acc"] == pytest.approx(float((logits.argmax(1) == DATA[1].y).double().mean()))
    assert found["train_loss"] == pytest.approx(
        float(F.cross_entropy(model(DATA[0].x), DATA[0].y).detach()), rel=1e-5
    )
    hessian = Curvature(Problem(model, "cross_entropy", (DATA[0].x, DATA[0].y))).dense()
    assert found["hessian_max"] == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-2)
    assert found["hessian_trace"] == pytest.approx(float(hessian.trace()), rel=0.3)
    hidden = F.relu(model[0](DATA[1].x)).detach()
    assert found["activation_sparsity"] == pytest.approx(float((hidden == 0).double().mean()))
    flat = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).detach()
    assert found["hoyer"] == pytest.approx(hoyer(flat))
    pruned, limit = copy.deepcopy(model), flat.abs().sort().values[round(0.9 * len(flat))]
    with torch.no_grad():
        for layer in (pruned[0], pruned[2]):
            layer.weight[layer.weight.abs() < limit] = 0
    assert found["acc_pruned_90"] == pytest.approx(
        float((pruned(DATA[1].x).argmax(1) == DATA[1].y).double().mean())
    )
    moved = torch.cat(
        [(a - b).flatten() for a, b in zip(model.parameters(), start.parameters(), strict=True)]
    )
    assert found["distance"] == pytest.approx(float(moved.detach().norm()), rel=1e-5)
    assert found["change_stable_rank"] <= found["change_effective_rank"]
    x = DATA[0].x.clone().requires_grad_()
    loss_gradient = torch.autograd.grad(F.cross_entropy(model(x), DATA[0].y, reduction="sum"), x)[0]
    assert found["input_gradient"] == pytest.approx(float(loss_gradient.norm(dim=1).mean()), rel=1e-4)


def test_margin_of_a_linear_classifier_is_the_distance_to_its_plane():
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 0.0], [-3.0, 0.0]]))
    x, y = torch.tensor([[1.0, 5.0], [2.0, 1.0], [-4.0, 0.0]]), torch.tensor([0, 0, 1])
    found = describe_solution(model, ((x, y), (x, y)), metrics=["margin"])
    assert found["margin"] == pytest.approx(2.0)


def test_memory_figures_of_a_matrix_and_of_a_frozen_model():
    a = [[0.9, 0.0, 0.1], [0.5, 0.8, 0.0], [0.3, 0.6, 0.7]]
    found = memory_figures(a)
    assert found["new_task_acc"] == pytest.approx(0.8)
    assert found["final_acc"] == pytest.approx(1.6 / 3)
    assert found["backward_transfer"] == pytest.approx((-0.6 - 0.2) / 2)
    assert found["forgetting"] == pytest.approx((0.6 + 0.2) / 2)
    frozen = lambda params, lr: torch.optim.SGD(params, lr=1e-30)  # noqa: E731
    report = compare_optimizers(
        net,
        {"none": frozen},
        class_stream(*DATA),
        match_on=None,
        rates=[1.0],
        seeds=2,
        epochs=1,
        metrics=["fit"],
    )
    for detail in report.details.values():
        rows = detail["accuracies"]
        assert rows[0] == rows[1]
        assert memory_figures(rows)["forgetting"] == 0


# --- streams -----------------------------------------------------------------------------------------------


def test_streams_of_classes_and_permutations():
    stream = class_stream(*DATA)
    assert stream.names == ("0+1", "2+3")
    assert [sorted(set(t.y.tolist())) for t in stream.train] == [[0, 1], [2, 3]]
    assert stream.classes == 4  # one head for all: nothing is masked
    permuted = permuted_stream(*DATA, tasks=3, seed=5)
    assert torch.equal(permuted.train[0].x, DATA[0].x)
    for k in (1, 2):
        order = [int((DATA[0].x == permuted.train[k].x[:, j : j + 1]).all(0).nonzero()) for j in range(6)]
        assert sorted(order) == list(range(6))
        assert torch.equal(permuted.test[k].x, DATA[1].x[:, order])
    for bad, says in ((3, "per_task is 3"), (4, "at least 2 tasks")):
        with pytest.raises(InputError, match=says):
            class_stream(*DATA, per_task=bad)


# --- the comparison ----------------------------------------------------------------------------------------

PAIR = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
GRID = {"sgd": [0.1, 0.3], "adam": [0.01, 0.03]}
QUICK = {"rates": GRID, "seeds": 3, "epochs": 6, "batch_size": 16, "metrics": ["fit", "rank"]}


@pytest.fixture(scope="module")
def report() -> SolutionReport:
    with torch.random.fork_rng(devices=[]):
        return compare_optimizers(net, PAIR, DATA, **QUICK)


def test_solutions_are_matched_in_training_loss(report):
    assert report.matched_on == "train_loss"
    assert len(report.rows) == 2 * 2 * 3
    for row in report.rows:
        if row["at"] == "matched":
            assert abs(row["train_loss"] / report.target - 1) <= 0.05
    best = report.values("train_loss", "adam", "best")
    assert max(best) < report.target
    assert len(report.curve) == 4
    assert {"barrier", "midpoint_gap", "unit_similarity"} <= report.pairs[0].keys()
    assert len(report.pairs) == 2 * 3
    assert report.states.keys() == {
        f"{n}/{at}/{s}" for n in PAIR for at in ("matched", "best") for s in range(3)
    } | {f"start/{s}" for s in range(3)}


def test_runs_of_one_seed_share_start_and_first_batch():
    setup = Setup(
        net, PAIR, Stream((DATA[0],), (DATA[1],), ("task",)), (DATA[1],), 1, 16, None, 0.0, False, "cpu"
    )
    one, other = (_Run(setup, name, 0.01, 7) for name in PAIR)
    assert all(torch.equal(a, b) for a, b in zip(one.state().values(), other.state().values(), strict=True))
    assert one.step() == other.step()
    apart = _Run(setup, "sgd", 0.01, 8)
    assert apart.step() != one.step()


def test_a_run_comes_back_to_a_marked_moment():
    setup = Setup(
        net, PAIR, Stream((DATA[0],), (DATA[1],), ("task",)), (DATA[1],), 2, 16, "cosine", 0.0, False, "cpu"
    )
    job = _Run(setup, "adam", 0.01, 0)
    for _ in range(5):
        job.step()
    mark = job.mark()
    first = [job.step() for _ in range(6)]
    job.back(mark)
    assert [job.step() for _ in range(6)] == first


def test_paired_differences_and_their_tables(report):
    found = report.paired("weight_stable_rank", "sgd", "adam")
    left, right = (report.values("weight_stable_rank", n) for n in PAIR)
    assert found.values == tuple(a - b for a, b in zip(left, right, strict=True))
    from scipy.stats import ttest_rel

    truth = ttest_rel(left, right)
    assert found.p_value == pytest.approx(float(truth.pvalue))
    interval = truth.confidence_interval()
    assert found.interval == pytest.approx((float(interval.low), float(interval.high)))
    rows = {r["metric"]: r for r in report.table()}
    assert rows["weight_stable_rank"]["sgd"][0] == pytest.approx(sum(left) / 3)
    assert list(report.to_pandas()["optimizer"].unique()) == ["sgd", "adam"]
    with pytest.raises(InputError, match="there is no 'speed'"):
        report.values("speed", "sgd")


def test_differences_are_sure_and_large_enough():
    def made(metric: str, a: list[float], b: list[float]) -> SolutionReport:
        rows = [
            {"optimizer": n, "at": "best", "seed": s, "rate": 1.0, metric: v}
            for n, values in (("a", a), ("b", b))
            for s, v in enumerate(values)
        ]
        return SolutionReport(tuple(rows), (), (), None, None)

    sure = made("rank", [2.0, 2.1, 2.2, 2.0], [1.0, 1.1, 1.3, 1.0])
    assert [str(p).split(" =")[0] for p in sure.differences()] == ["rank: a - b"]
    assert "rank: a - b = +0.975" in sure.summary()
    for other in (
        made("rank", [2.0, 2.1, 2.2, 2.0], [1.98, 2.08, 2.18, 1.98]),  # sure, but one per cent
        made("rank", [2.0, 0.1, 2.2, 0.0], [1.0, 1.1, 0.3, 1.0]),  # large, but noise
        made("test_acc", [0.011, 0.012, 0.011], [0.004, 0.005, 0.004]),  # a share: less than a point
        made("rank", [2.0], [1.0]),
    ):
        assert other.differences() == []
        assert other.summary().startswith("no qualitative difference")
    assert math.isinf(Paired("rank", "a", "b", (1.0,), 1.0).error)


def test_saved_and_loaded(report, tmp_path):
    back = SolutionReport.load(report.save(tmp_path / "report"))
    assert back.rows == report.rows
    assert back.target == report.target
    assert back.table() == report.table()
    assert all(torch.equal(t, report.states[k][n]) for k, s in back.states.items() for n, t in s.items())
    assert json.loads((tmp_path / "report" / "solutions.json").read_text())["matched_on"] == "train_loss"


def test_workers_and_a_second_call_give_the_same(tmp_path, monkeypatch):
    from gradmatch.analysis import _solution_jobs

    pytest.importorskip("joblib")
    seen = []
    make, once = partial(mlp, 6, (12,), 4), {**QUICK, "epochs": 4}
    alone = compare_optimizers(make, PAIR, DATA, **once)
    options = {**once, "out": tmp_path / "out"}
    again = compare_optimizers(make, PAIR, DATA, **options, workers=2, progress=lambda *at: seen.append(at))
    assert again.rows == alone.rows
    assert again.pairs == alone.pairs
    assert ("rates", 4, 4) in seen

    def never(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(_solution_jobs, "run", never)
    assert compare_optimizers(make, PAIR, DATA, **options).rows == alone.rows
    with pytest.raises(InputError, match="epochs=4, and this one has epochs=7"):
        compare_optimizers(make, PAIR, DATA, **{**options, "epochs": 7})


def test_on_a_convex_problem_there_is_no_difference():
    """Logistic regression with a ridge: all optimizers come to the same solution, and the report says so."""
    makers = {
        "sgd": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
        "adam": torch.optim.Adam,
        "shampoo": Shampoo,
    }
    found = compare_optimizers(
        lambda: nn.Linear(6, 4),
        makers,
        DATA,
        match_on=None,
        l2=0.05,
        epochs=60,
        batch_size=120,
        schedule="cosine",
        rates={"sgd": [0.3], "adam": [0.05], "shampoo": [0.3]},
        seeds=3,
    )
    assert found.summary().startswith("no qualitative difference"), found.summary()
    assert max(p["barrier"] for p in found.pairs) < 1e-3


def test_a_stream_is_matched_in_new_task_accuracy():
    found = compare_optimizers(
        net,
        PAIR,
        class_stream(*DATA),
        rates={"sgd": [0.03, 0.3], "adam": [0.003, 0.03]},
        seeds=2,
        epochs=4,
        batch_size=16,
        metrics=["codes"],
        tolerance=0.1,
    )
    assert found.matched_on == "new_task_acc"
    learned = {(c["optimizer"], c["rate"]): 0.0 for c in found.curve}
    for c in found.curve:
        learned[c["optimizer"], c["rate"]] += c["held_new_task_acc"] / 2
    for row in found.rows:
        if row["at"] == "matched":
            assert abs(learned[row["optimizer"], row["rate"]] - found.target) <= 0.1
    assert {"final_acc", "forgetting", "class_cosine"} <= found.rows[0].keys()
    lower = [c["final_acc"] for c in found.curve]
    assert len(lower) == 8


def test_declared_protocols_are_followed():
    """An optimizer that needs the graph, and one that evaluates the loss itself."""

    class Graph(torch.optim.SGD):
        protocols = ("graph",)

        def step(self, closure=None):
            assert all(p.grad.requires_grad for g in self.param_groups for p in g["params"])
            with torch.no_grad():
                for g in self.param_groups:
                    for p in g["params"]:
                        p.sub_(g["lr"] * p.grad)

    class Closure(torch.optim.SGD):
        protocols = ("loss closure",)

        def step(self, closure):
            params = [p for g in self.param_groups for p in g["params"]]
            loss = closure()
            for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
                p.grad = g
            super().step()
            return loss.detach()

    class Outputs(Closure):
        protocols = ("output closure",)

        def step(self, closure):
            z, loss_of = closure()
            return super().step(lambda: loss_of(z))

    makers = {"plain": torch.optim.SGD, "graph": Graph, "closure": Closure, "outputs": Outputs}
    found = compare_optimizers(
        net, makers, DATA, match_on=None, rates=[0.1], seeds=2, epochs=1, metrics=["fit"]
    )
    losses = [found.values("train_loss", name) for name in makers]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-6)


def test_optimizers_of_another_library_and_without_rates():
    transformers = pytest.importorskip("transformers")
    makers = {
        "adafactor": lambda params: transformers.Adafactor(params),
        "sgd": lambda params: torch.optim.SGD(params, 0.1),
    }
    found = compare_optimizers(net, makers, DATA, match_on=None, rates=[], seeds=2, epochs=2, metrics=["fit"])
    assert {r["rate"] for r in found.rows} == {None}
    assert found.optimizers == ["adafactor", "sgd"]


def test_a_rate_that_diverges_is_left_out_and_said_so():
    with pytest.warns(UserWarning, match=r"sgd diverged at rate 1e\+20"):
        found = compare_optimizers(
            net,
            {"sgd": torch.optim.SGD},
            DATA,
            match_on=None,
            rates=[0.1, 1e20],
            seeds=2,
            epochs=1,
            metrics=["fit"],
        )
    assert {r["rate"] for r in found.rows} == {0.1}
    with pytest.raises(InputError, match="sgd diverged"):
        compare_optimizers(
            net, {"sgd": torch.optim.SGD}, DATA, match_on=None, rates=[1e20], seeds=2, epochs=1
        )


def test_a_match_that_is_not_reached_is_refused_with_the_closest_gap():
    options = {"rates": {"sgd": [1e-4], "adam": [0.03]}, "seeds": 2, "epochs": 2, "metrics": ["fit"]}
    with pytest.raises(InputError, match=r"sgd comes no closer than \d+\.\d% to a training loss of 0\.3"):
        compare_optimizers(net, PAIR, DATA, target=0.3, **options)
    with pytest.raises(InputError, match=r"sgd comes no closer than 0\.\d+ to a new-task accuracy of"):
        compare_optimizers(net, PAIR, class_stream(*DATA), target=0.99, **options)


def test_refusals():
    calls = iter(range(100))

    def changing():
        model = net()
        with torch.no_grad():
            model[0].bias.fill_(next(calls))
        return model

    with pytest.raises(InputError, match="model_fn makes different networks under one seed"):
        compare_optimizers(changing, PAIR, DATA)
    for options, says in (
        ({"match_on": "new_task_acc"}, "one task is matched on 'train_loss'"),
        ({"match_on": "loss"}, "match_on is 'loss'"),
        ({"rates": [0.0]}, "rates is 0"),
        ({"rates": {"lion": [0.1]}}, "rates has lion"),
        ({"seeds": 0}, "seeds is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"l2": -1}, "l2 is -1"),
        ({"metrics": ["speed"]}, "metrics is 'speed'"),
        ({"schedule": "linear"}, "schedule is 'linear'"),
        ({"held": 1.0}, "held is 1"),
        ({"target": 0}, "target is 0"),
        ({"workers": 0}, "workers is 0"),
    ):
        with pytest.raises(InputError, match=says):
            compare_optimizers(net, PAIR, DATA, **options)
    with pytest.raises(InputError, match="optimizers is empty"):
        compare_optimizers(net, {}, DATA)
    with pytest.raises(InputError, match="must be factory"):
        compare_optimizers(net, {"sgd": 0.1}, DATA)
    with pytest.raises(InputError, match="a stream of tasks is matched on 'new_task_acc'"):
        compare_optimizers(net, PAIR, class_stream(*DATA), match_on="train_loss")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="seeds is 1"):
            compare_optimizers(net, PAIR, DATA, seeds=1)
    broken = net()
    with torch.no_grad():
        broken[0].weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"parameter 0\.weight has 1 NaN"):
        describe_solution(broken, DATA)


def test_one_set_of_data_stands_for_training_and_test():
    torch.manual_seed(0)
    model, x, y = (
        nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)),
        torch.randn(9, 6),
        torch.arange(9) % 2,
    )
    wanted = describe_solution(model, ((x, y), (x, y)), metrics=["fit", "calibration"])
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    for data in ((x, y), [x, y], loader, TensorDataset(x, y)):
        assert describe_solution(model, data, metrics=["fit", "calibration"]) == wanted
