"""Coherence against its definition, the facts the paper states, and the averages that suppress disagreement."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradmatch.analysis import (
    Coherence,
    CoherenceTracker,
    RobustGradient,
    coherence,
    coherence_from_microbatches,
    cross_coherence,
    example_scores,
    microbatch_coherence,
    relative_gap_bound,
)
from gradmatch.analysis._robust_gradient import median, winsorised_mean
from gradmatch.core.checks import InputError
from gradmatch.core.gradients import GradStats, gradient_norms, gradient_sums, per_example_gradients
from gradmatch.core.problem import ParamSpace, Problem


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def linear(gradients: torch.Tensor) -> Problem:
    """A problem whose per-example gradients are the rows given: the loss of example i is <w, g_i>."""
    model = nn.Linear(gradients.shape[1], 1, bias=False).to(gradients.dtype)
    return Problem(model, lambda z, _: z[:, 0], (gradients, torch.zeros(len(gradients))))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def data(m=40):
    return torch.randn(m, 6).double(), torch.arange(m) % 3


def alpha_of(rows: torch.Tensor) -> float:
    return float(rows.mean(0).square().sum() / rows.square().sum(1).mean())


def unbiased_of(rows: torch.Tensor) -> float:
    products = rows @ rows.T
    m = len(rows)
    apart = (products.sum() - products.trace()) / (m * (m - 1))
    return float(apart / products.diagonal().mean())


# --- the definition -----------------------------------------------------------------------------------------


def test_identical_orthogonal_and_cancelling_gradients():
    row = torch.randn(5).double()
    assert coherence(linear(row.expand(7, -1).clone())).alpha == pytest.approx(1, abs=1e-12)
    found = coherence(linear(3 * torch.eye(6).double()))
    assert found.alpha == pytest.approx(1 / 6)
    assert found.m_coherence == pytest.approx(1)
    assert coherence(linear(torch.stack([row, -row]))).alpha == pytest.approx(0, abs=1e-12)
    assert coherence(linear(torch.stack([row, -row])), estimator="unbiased").alpha == pytest.approx(-1)
    assert coherence(linear(torch.eye(6).double()), estimator="unbiased").alpha == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("estimator", "naive"), [("sample", alpha_of), ("unbiased", unbiased_of)])
def test_of_a_network_against_the_gradients_themselves(estimator, naive):
    problem = Problem(mlp(), "cross_entropy", data())
    rows = per_example_gradients(problem)
    found = coherence(problem.module, "cross_entropy", data_of(problem), estimator=estimator)
    assert found.alpha == pytest.approx(naive(rows), rel=1e-10)
    torch.testing.assert_close(found.norms, rows.norm(dim=1))
    some = torch.tensor([0, 3, 5, 11])
    for subset in (some, some.tolist(), torch.isin(torch.arange(40), some)):
        part = coherence(problem, subset=subset, estimator=estimator)
        assert part.alpha == pytest.approx(naive(rows[some]), rel=1e-10)
        assert part.count == 4


def data_of(problem: Problem):
    batches = list(problem.data)
    return torch.cat([b.inputs for b in batches]), torch.cat([b.target for b in batches])


def test_any_split_into_batches_and_workers_is_one_pass():
    model, (x, y) = mlp(), data()
    whole = coherence(model, "cross_entropy", (x, y))
    batches = [(x[:7], y[:7]), (x[7:8], y[7:8]), (x[8:], y[8:])]
    for split in (
        coherence(model, "cross_entropy", batches),
        coherence(model, "cross_entropy", (x, y), chunk=3),
    ):
        assert split.alpha == pytest.approx(whole.alpha, abs=1e-10)
        torch.testing.assert_close(split.alphas, whole.alphas, rtol=0, atol=1e-10)
    shares = [gradient_sums(Problem(model, "cross_entropy", part)) for part in batches]
    merged = shares[0].stats.merge(shares[1].stats).merge(shares[2].stats)
    found = Coherence.of(merged, torch.cat([s.norms for s in shares]))
    assert found.alpha == pytest.approx(whole.alpha, abs=1e-10)


@pytest.mark.parametrize("estimator", ["sample", "unbiased"])
@pytest.mark.parametrize("groups", ["layer", "parameter"])
def test_layers_sum_to_the_whole(groups, estimator):
    found = coherence(mlp(), "cross_entropy", data(), groups=groups, estimator=estimator)
    assert (
        found.groups
        == {"layer": ("0", "2"), "parameter": ("0.weight", "0.bias", "2.weight", "2.bias")}[groups]
    )
    assert float(found.shares.sum()) == pytest.approx(1, abs=1e-12)
    assert float((found.shares * found.alphas).sum()) == pytest.approx(found.alpha, abs=1e-12)
    assert [share for _, _, share in found.table()] == sorted(found.shares.tolist(), reverse=True)
    assert coherence(mlp(), "cross_entropy", data(), groups=None).per_group == {}


def test_scaling_the_loss_changes_nothing_and_norms_only():
    model, xy = mlp(), data()
    one = coherence(model, "cross_entropy", xy)
    scaled = coherence(model, lambda z, y: 7 * F.cross_entropy(z, y, reduction="none"), xy)
    assert scaled.alpha == pytest.approx(one.alpha, rel=1e-12)
    torch.testing.assert_close(scaled.norms, 7 * one.norms)


def test_zero_gradients_scale_alpha_by_the_share_of_others():
    rows = torch.randn(30, 5).double() + 1
    whole, diluted = (
        coherence(linear(rows)),
        coherence(linear(torch.cat([rows, torch.zeros(20, 5).double()]))),
    )
    assert diluted.alpha == pytest.approx(0.6 * whole.alpha, rel=1e-12)
    assert (whole.dead, diluted.dead) == (0, 0.4)


def test_all_zero_is_undefined_and_said_so():
    with pytest.warns(UserWarning, match="all gradients are zero"):
        found = coherence(linear(torch.zeros(4, 3)))
    assert math.isnan(found.alpha)
    assert found.dead == 1


def test_one_dead_layer_is_nan_and_the_rest_still_sums():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        model[0].bias.fill_(-100)
    found = coherence(model, "cross_entropy", data())
    assert math.isnan(found.per_group["0"])
    assert found.per_group["2"] == pytest.approx(found.alpha)


# --- facts of the population --------------------------------------------------------------------------------


def gaussians(m: int, mean: torch.Tensor, seed: int) -> torch.Tensor:
    return mean + torch.randn(m, len(mean), generator=torch.Generator().manual_seed(seed)).double()


def test_unbiased_form_has_the_mean_of_the_population_and_the_sample_form_has_not():
    """A ratio of two unbiased means; with 200 dimensions its denominator hardly varies."""
    mean = torch.full((200,), 0.25).double()
    alpha = float(mean @ mean / (mean @ mean + 200))
    draws = [gaussians(10, mean, s) for s in range(400)]
    for estimator, off in (("unbiased", 0.0), ("sample", (1 - alpha) / 10)):
        values = torch.tensor([coherence(linear(d), estimator=estimator).alpha for d in draws])
        error = float(values.std()) / 20
        assert abs(float(values.mean()) - alpha - off) < 4 * error
    assert (1 - alpha) / 10 > 20 * error


def test_mean_of_k_gradients_and_its_inverse():
    mean = torch.full((50,), 0.3).double()
    alpha = float(mean @ mean / (mean @ mean + 50))
    k, found, direct = 5, [], []
    for seed in range(60):
        rows = gaussians(400, mean, seed)
        means = rows.view(-1, k, 50).mean(1)
        found.append(coherence_from_microbatches(means, k))
        direct.append(coherence(linear(means), estimator="unbiased").alpha)
    for values, truth in ((found, alpha), (direct, microbatch_coherence(alpha, k))):
        values = torch.tensor(values)
        assert abs(float(values.mean()) - truth) < 3 * float(values.std()) / 60**0.5
    grads = [[row[:20].view(4, 5), row[20:]] for row in means]
    assert coherence_from_microbatches(grads, k) == pytest.approx(found[-1])
    a = microbatch_coherence(0.3, 7)
    assert a / (7 - 6 * a) == pytest.approx(0.3)


def test_orthogonal_mixture_and_distance_bounds():
    """alpha <= p alpha_U + (1 - p) alpha_V; and E |v - v'| <= sqrt(2 (1 - alpha) E |v|^2)."""
    u = torch.cat([torch.randn(30, 4).double() + 1, torch.zeros(30, 4).double()], 1)
    v = torch.cat([torch.zeros(50, 4).double(), 2 * torch.randn(50, 4).double() + 1], 1)
    both = torch.cat([u, v])
    assert alpha_of(both) <= 3 / 8 * alpha_of(u) + 5 / 8 * alpha_of(v)
    found = coherence(linear(both))
    distance = torch.cdist(both, both).mean()
    assert float(distance) <= math.sqrt(2 * (1 - found.alpha) * float(both.square().sum(1).mean()))


def test_relative_bound_against_the_sum_as_written():
    alphas, rates, beta = [0.9, 0.5, 0.1], [0.1, 0.2, 0.3], 2.0
    expected = sum(
        rates[t] * math.prod(1 + rates[s] * beta for s in range(t + 1, 3)) * math.sqrt(2 * (1 - alphas[t]))
        for t in range(3)
    )
    assert relative_gap_bound(alphas, rates, beta, 50) == pytest.approx(expected / 50)
    assert relative_gap_bound([1.0] * 4, 0.1, 2.0, 50) == 0
    assert relative_gap_bound([0.2] * 4, 0.1, 2.0, 50) > relative_gap_bound([0.8] * 4, 0.1, 2.0, 50)
    with pytest.raises(InputError, match=r"alphas is -0\.1"):
        relative_gap_bound([-0.1], 0.1, 1.0, 5)
    with pytest.raises(InputError, match="equally many"):
        relative_gap_bound([0.1], [0.1, 0.2], 1.0, 5)


# --- norms by products (the paper's cheap route) ------------------------------------------------------------


class Shared(nn.Module):
    """Conv2d, LayerNorm, Embedding, and one layer used twice: squaring before summing would be wrong."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(9, 16), nn.LayerNorm(16)
        self.conv, self.twice, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(16, 16), nn.Linear(64, 3)

    def forward(self, ids):
        x = self.norm(self.embed(ids).sum(1))
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return self.head(torch.tanh(self.conv(x.view(-1, 1, 4, 4))).flatten(1))


def test_norms_equal_batched_gradients_for_every_kind_of_layer():
    problem = Problem(
        Shared().double(), "cross_entropy", (torch.randint(0, 9, (12, 5)), torch.arange(12) % 3)
    )
    found = coherence(problem, groups="parameter")
    rows = per_example_gradients(problem, tier="vmap")
    torch.testing.assert_close(found.norms, rows.norm(dim=1), rtol=1e-6, atol=1e-9)
    assert found.alpha == pytest.approx(alpha_of(rows), rel=1e-6)
    assert gradient_norms(problem, return_tier=True).tier == "layerwise"


def test_memory_does_not_grow_with_the_examples():
    """The largest tensor made is one batch's, never [m, P]: here 2,000 x 30,000."""
    model = nn.Sequential(nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 100))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for t in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(t, torch.Tensor) and t.is_floating_point():
                    largest = max(largest, t.numel())
            return result

    problem = Problem(
        model, "cross_entropy", (torch.randn(2000, 100), torch.arange(2000) % 100), batch_size=50
    )
    with Watch():
        coherence(problem, chunk=50)
    assert largest <= 31_000


# --- subsets and scores -------------------------------------------------------------------------------------


def test_cross_coherence_of_two_sets():
    problem = Problem(mlp(), "cross_entropy", data())
    rows = per_example_gradients(problem)
    a, b = torch.arange(10), torch.arange(10, 40)
    expected = (rows[a].mean(0) @ rows[b].mean(0)) / (
        rows[a].square().sum(1).mean() * rows[b].square().sum(1).mean()
    ).sqrt()
    assert cross_coherence(problem, a=a, b=b) == pytest.approx(float(expected))
    assert cross_coherence(problem, a=a, b=a) == pytest.approx(coherence(problem, subset=a).alpha)


def test_scores_are_products_with_the_mean_gradient():
    problem = Problem(mlp(), "cross_entropy", data())
    rows, y = per_example_gradients(problem), data_of(problem)[1]
    torch.testing.assert_close(example_scores(problem, by="crowd"), rows @ rows.mean(0))
    own = torch.stack([g @ rows[y == c].mean(0) / g.norm() for g, c in zip(rows, y, strict=True)])
    torch.testing.assert_close(example_scores(problem), own)


def test_scores_of_a_part_of_the_classes():
    x = data(12)[0]
    names = torch.tensor([0, 2])[torch.arange(12) % 2]  # nobody of class 1
    model = mlp()
    found = example_scores(model, "cross_entropy", (x, names))
    rows = per_example_gradients(Problem(model, "cross_entropy", (x, names)))
    own = torch.stack([g @ rows[names == c].mean(0) / g.norm() for g, c in zip(rows, names, strict=True)])
    torch.testing.assert_close(found, own)


def test_flipped_labels_score_low():
    """Two far clusters; after some training, examples with the other's label stand against their class."""
    x = torch.randn(200, 4)
    y = torch.arange(200) % 2
    x[:, 0] += 4 * (2 * y - 1)
    flipped = torch.arange(200) < 30
    given = torch.where(flipped, 1 - y, y)
    model = nn.Linear(4, 2)
    torch.nn.init.zeros_(model.weight)
    scores = example_scores(model, "cross_entropy", (x, given))
    assert float(scores[flipped].max()) < float(scores[~flipped].min())


def test_a_zero_gradient_scores_zero():
    model = nn.Linear(2, 2, bias=False)
    scores = example_scores(
        model, "cross_entropy", (torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, 1.0]]), torch.tensor([0, 0, 1]))
    )
    assert float(scores[0]) == 0
    assert bool(torch.isfinite(scores).all())


# --- robust averages ----------------------------------------------------------------------------------------


def winsorised_by_sorting(rows: torch.Tensor, c: int) -> torch.Tensor:
    order = rows.sort(0).values
    return rows.clamp(order[c], order[len(rows) - 1 - c]).mean(0)


@pytest.mark.parametrize("c", [0, 1, 2, 3])
def test_winsorised_mean_against_sorting(c, monkeypatch):
    monkeypatch.setattr("gradmatch.analysis._robust_gradient._COLUMNS", 7)
    rows = torch.randn(9, 33).double()
    rows[:, 3] = 1.0  # ties
    rows[4, 5] = 1e30  # an outlier that must not cancel away
    found = winsorised_mean(rows, c)
    torch.testing.assert_close(found, winsorised_by_sorting(rows, c))
    if c == 0:
        torch.testing.assert_close(found, rows.mean(0))
    else:
        assert float(found[5].abs()) < 10


@pytest.mark.parametrize("k", [3, 5])
def test_median_of_micro_batches(k):
    rows = torch.randn(k, 20)
    torch.testing.assert_close(median(rows), rows.sort(0).values[k // 2])
    assert torch.equal(median(rows), median(rows[torch.randperm(k)]))
    torch.testing.assert_close(median(rows[:1].expand(k, -1)), rows[0])


def stepped(method, source, model, **options):
    robust = RobustGradient(torch.optim.SGD(model.parameters(), 0.1), method, **options)
    loss = robust.step(source(model))
    return torch.cat([p.detach().flatten() for p in model.parameters()]), loss


def test_steps_of_each_method_are_those_of_the_combined_gradient():
    x, y = data(15)
    start = mlp()
    before = torch.cat([p.detach().flatten() for p in start.parameters()])
    rows = per_example_gradients(Problem(start, "cross_entropy", (x, y)))
    thirds = rows.view(3, 5, -1).mean(1)
    for method, options, expected in (
        ("winsor", {"c": 2}, winsorised_by_sorting(rows, 2)),
        ("winsor", {"c": 0}, rows.mean(0)),
        ("median", {}, thirds.sort(0).values[1]),
        ("median", {"groups": 5}, rows.view(5, 3, -1).mean(1).sort(0).values[2]),
        ("rm3", {}, rows.mean(0)),
    ):
        after, _ = stepped(
            method, lambda m: Problem(m, "cross_entropy", (x, y)), copy.deepcopy(start), **options
        )
        torch.testing.assert_close((before - after) / 0.1, expected, rtol=1e-8, atol=1e-10)

    def closure(model):
        return lambda i: F.cross_entropy(model(x[5 * i : 5 * i + 5]), y[5 * i : 5 * i + 5])

    after, loss = stepped("median", closure, copy.deepcopy(start))
    torch.testing.assert_close((before - after) / 0.1, thirds.sort(0).values[1], rtol=1e-8, atol=1e-10)
    assert loss == pytest.approx(float(F.cross_entropy(start(x), y)))


def test_equal_micro_batches_give_the_mean_and_plain_sgd():
    x, y = data(5)
    start = mlp()
    after, _ = stepped(
        "median", lambda m: Problem(m, "cross_entropy", (x.repeat(3, 1), y.repeat(3))), copy.deepcopy(start)
    )
    plain = copy.deepcopy(start)
    F.cross_entropy(plain(x), y).backward()
    torch.optim.SGD(plain.parameters(), 0.1).step()
    torch.testing.assert_close(after, torch.cat([p.detach().flatten() for p in plain.parameters()]))


def test_rolling_median_remembers_two_batches_also_after_a_restart():
    x, y = data(40)
    batches = [(x[8 * k : 8 * k + 8], y[8 * k : 8 * k + 8]) for k in range(5)]

    def train(model, robust, some):
        for xb, yb in some:
            robust.step(Problem(model, "cross_entropy", (xb, yb)))

    model = mlp()
    restarted = copy.deepcopy(model)
    robust = RobustGradient(torch.optim.SGD(model.parameters(), 0.5, momentum=0.9), "rm3")
    grads = []
    for xb, yb in batches:
        grads.append(per_example_gradients(Problem(model, "cross_entropy", (xb, yb))).mean(0))
        robust.step(Problem(model, "cross_entropy", (xb, yb)))
        now = torch.cat([p.grad.flatten() for p in model.parameters()])
        expected = grads[-1] if len(grads) < 3 else torch.stack(grads[-3:]).sort(0).values[1]
        torch.testing.assert_close(now, expected)
    first = RobustGradient(torch.optim.SGD(restarted.parameters(), 0.5, momentum=0.9), "rm3")
    train(restarted, first, batches[:3])
    second = RobustGradient(torch.optim.SGD(restarted.parameters(), 0.5, momentum=0.9), "rm3")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(restarted, second, batches[3:])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), restarted.parameters(), strict=True))


def test_parameters_of_the_optimizer_that_are_not_differentiated_keep_still():
    model = mlp()
    problem = Problem(model, "cross_entropy", data(6), select="2")
    before = model[0].weight.detach().clone()
    RobustGradient(torch.optim.SGD(model.parameters(), 0.1), "winsor").step(problem)
    assert torch.equal(model[0].weight, before)
    assert float(model[2].weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("method", ["median", "rm3", "winsor"])
@pytest.mark.parametrize("of", ["problem", "function"])
def test_frozen_parameters_are_left_alone_even_by_weight_decay(method, of):
    model, (x, y) = mlp(), data(6)
    model[0].weight.requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]
    robust = RobustGradient(torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.5), method)

    def loss(k):
        return F.cross_entropy(model(x[2 * k : 2 * k + 2]), y[2 * k : 2 * k + 2])

    robust.step(Problem(model, "cross_entropy", (x, y)) if of == "problem" else loss)
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [p.requires_grad for p in model.parameters()]
    assert model[0].weight.grad is None


# --- the paper's toy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("learnable", [True, False])
def test_gradient_descent_prefers_what_examples_share(learnable):
    """Four examples with a private coordinate each; in the learnable set all also share the fifth, which tells y."""
    y = torch.tensor([1.0, -1.0, 1.0, -1.0]).double()
    x = torch.zeros(4, 6).double()
    x[torch.arange(4), torch.arange(4)] = y
    x[:, 4] = y if learnable else 0.0
    x[:, 5] = 0 if learnable else torch.tensor([1.0, 1.0, -1.0, -1.0]).double()
    model = nn.Linear(6, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    start = coherence(model, lambda z, t: (z[:, 0] - t).square(), (x, y))
    for _ in range(500):
        with torch.no_grad():
            residual = model(x)[:, 0] - y
            model.weight -= 0.1 * (residual[:, None] * x).mean(0)
    w = model.weight.detach()[0].abs()
    assert (int(w.argmax()) == 4) == learnable
    assert (start.m_coherence > 2) == learnable


# --- following training -------------------------------------------------------------------------------------


def test_tracker_measures_on_its_own_data_in_eval_mode(tmp_path):
    net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    probe = data(20)
    tracker = CoherenceTracker("cross_entropy", probe, every=2, groups=None)
    net.train()
    found = [tracker(net) for _ in range(5)]
    assert [k for k, _ in tracker.history] == [0, 2, 4]
    assert [f is None for f in found] == [False, True, False, True, False]
    assert all(m.training for m in net.modules())
    net.eval()
    assert found[0].alpha == coherence(net, "cross_entropy", probe).alpha
    rows = json.loads(tracker.save(tmp_path / "history.json").read_text())
    assert [r["at"] for r in rows] == [0, 2, 4]
    assert rows[0]["alpha"] == found[0].alpha


def test_tracker_as_a_callback_of_a_hugging_face_trainer_of_gpt2(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=30, n_positions=12, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(0, 30, (8, 10))
    tracker = CoherenceTracker("next_token", {"input_ids": ids})
    args = transformers.TrainingArguments(
        str(tmp_path),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    transformers.Trainer(model, args, train_dataset=rows, callbacks=[tracker.callback()]).train()
    assert [k for k, _ in tracker.history] == [0, 1, 2]
    assert all(0 < c.alpha < 1 and len(c.norms) == 8 for _, c in tracker.history)
    assert "transformer.wte" in tracker.history[0][1].groups


def test_saved_and_loaded(tmp_path):
    found = coherence(mlp(), "cross_entropy", data())
    back = Coherence.load(found.save(tmp_path / "c.safetensors"))
    assert back.per_group == found.per_group
    assert (back.alpha, back.count, back.estimator) == (found.alpha, found.count, found.estimator)
    assert torch.equal(back.norms, found.norms)


def test_function_and_module_of_one_name():
    """``gradmatch.analysis.coherence`` is the function, whichever was imported first."""
    import importlib

    import gradmatch.analysis

    module = importlib.import_module("gradmatch.analysis.coherence")
    assert callable(gradmatch.analysis.coherence)
    assert module.coherence is gradmatch.analysis.coherence


# --- refusals -----------------------------------------------------------------------------------------------


def test_refusals_of_the_measurement():
    x, y = data(6)
    normed = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    with pytest.raises(InputError, match="batchnorm"):
        coherence(normed, "cross_entropy", (x, y))
    with pytest.raises(InputError, match="batch norm in train mode"):
        coherence(Problem(normed, "cross_entropy", (x, y), allow="batchnorm"))
    with pytest.raises(InputError, match="dropout"):
        coherence(nn.Sequential(nn.Dropout(), mlp()), "cross_entropy", (x, y))
    with pytest.raises(InputError, match="one loss for each example"):
        coherence(mlp(), F.cross_entropy, (x, y))
    for few in ((x[:1], y[:1]), (x, y)):
        with pytest.raises(InputError, match="at least 2"):
            coherence(mlp(), "cross_entropy", few, subset=[0])
    with pytest.raises(InputError, match="subset"):
        coherence(mlp(), "cross_entropy", (x, y), subset=[7])
    with pytest.raises(InputError, match="estimator is 'best'"):
        coherence(mlp(), "cross_entropy", (x, y), estimator="best")
    with pytest.raises(InputError, match="groups is 'block'"):
        coherence(mlp(), "cross_entropy", (x, y), groups="block")
    with pytest.raises(InputError, match="data is None"):
        coherence(mlp(), "cross_entropy")
    with pytest.raises(InputError, match="every is 0"):
        CoherenceTracker("cross_entropy", (x, y), every=0)
    with pytest.raises(InputError, match="at least 2"):
        coherence_from_microbatches(torch.randn(1, 5), 3)
    with pytest.raises(InputError, match="k is 0"):
        coherence_from_microbatches(torch.randn(3, 5), 0)
    stats = GradStats(ParamSpace.of({"w": torch.zeros(2)})).update(torch.ones(1, 2))
    with pytest.raises(InputError, match="at least 2"):
        Coherence.of(stats, torch.ones(1))


def test_refusals_of_robust_gradients():
    model, (x, y) = mlp(), data(10)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    problem = Problem(model, "cross_entropy", (x, y))
    with pytest.raises(InputError, match=r"c is 5 for 10 gradients"):
        RobustGradient(sgd, "winsor", c=5).step(problem)
    with pytest.raises(InputError, match=r"c is 2 for 3 gradients"):
        RobustGradient(sgd, "winsor", c=2, groups=3).step(lambda i: F.cross_entropy(model(x), y))
    with pytest.raises(InputError, match="does not divide the batch of 10"):
        RobustGradient(sgd, "median").step(problem)
    for groups in (2, 4, 1):
        with pytest.raises(InputError, match="odd number"):
            RobustGradient(sgd, "median", groups=groups)
    with pytest.raises(InputError, match="method is 'mean'"):
        RobustGradient(sgd, "mean")
    for bad in (
        lambda i: F.cross_entropy(model(x), y, reduction="none"),
        lambda i: torch.ones(()),
        lambda i: 1.0,
    ):
        with pytest.raises(InputError, match="the mean loss of one micro-batch"):
            RobustGradient(sgd, "median").step(bad)
    with pytest.raises(InputError, match="lacks 4 of the optimizer's"):
        RobustGradient(torch.optim.SGD(mlp().parameters(), 0.1), "winsor").step(problem)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(InputError, match="NaN or infinite"):
        RobustGradient(sgd, "rm3").step(lambda i: (1e308 * model(1e10 * x)).sum())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
