import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm

from gradmatch.core.checks import InputError
from gradmatch.core.gradients import (
    GradStats,
    class_gradients,
    diagonal_moments,
    gradient,
    gradient_norms,
    gradient_products,
    gradient_stats,
    gradient_sums,
    group_gradients,
    iter_per_example_gradients,
    per_example_gradients,
)
from gradmatch.core.problem import ParamSpace, Problem


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def naive(problem: Problem) -> torch.Tensor:
    """One ordinary backward for each example, on a copy of the model."""
    model = copy.deepcopy(problem.module)
    rows = []
    for batch in problem.batches():
        for i in range(batch.size):
            one = batch.take(slice(i, i + 1))
            model.zero_grad()
            x = one.inputs
            out = model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)
            problem.loss(getattr(out, "logits", out), one.target).sum().backward()
            named = dict(model.named_parameters())
            blocks = [named[k] for k in problem.space.names]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in blocks]
            rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


class Residual(nn.Module):
    """A small residual network with batch norm, in-place activations, strides and a bottleneck."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        )
        self.down = nn.Conv2d(channels, 2 * channels, 1, stride=2, bias=False)
        self.conv1 = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * channels)
        self.conv2 = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * channels)
        self.head = nn.Linear(2 * channels, 3)

    def forward(self, x):
        x = self.stem(x)
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += self.down(x)
        return self.head(F.relu(y, inplace=True).mean((2, 3)))


class Tokens(nn.Module):
    """Embedding, position-wise norms, linear layers on sequences, 1-d convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6, padding_idx=0)
        self.norm = nn.LayerNorm(6)
        self.wide, self.narrow = nn.Linear(6, 40), nn.Linear(40, 6, bias=False)
        self.rms = nn.RMSNorm(6)
        self.conv = nn.Conv1d(6, 4, 3, padding="same", padding_mode="circular", dilation=2)
        self.group = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, ids):
        x = self.embed(ids)
        x = self.rms(x + self.narrow(torch.tanh(self.wide(self.norm(x)))))
        return self.head(self.group(self.conv(x.mT)).mean(2))


class Shared(nn.Module):
    """A layer called twice, a weight used outside its layer, and a free parameter; the stem alone is plain."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.outside = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.idle = nn.Linear(2, 2)

    def forward(self, x):
        x = torch.tanh(self.twice(torch.tanh(self.twice(torch.tanh(self.stem(x))))))
        return self.outside(x * self.scale) + x @ self.outside.weight


def conv_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
        nn.InstanceNorm2d(8, affine=True),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 8, 3, groups=4, stride=(2, 1), padding=(2, 1), dilation=(2, 1)),
        nn.GroupNorm(8, 8),
        nn.SiLU(),
        nn.Conv2d(8, 16, 1),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


def images(n=7):
    return torch.randn(n, 3, 8, 8).double(), torch.arange(n) % 3


def vectors(n=7, d=5, c=3):
    return torch.randn(n, d).double(), torch.arange(n) % c


def problem_of(kind: str) -> Problem:
    if kind == "mlp":
        model, data = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), vectors()
    elif kind == "conv":
        model, data = conv_net(), images()
        model(data[0].float())
    elif kind == "residual":
        model, data = Residual(), images()
        model(data[0].float())  # running statistics away from 0 and 1
        model.eval()
    elif kind == "tokens":
        model, data = Tokens(), (torch.randint(0, 9, (7, 11)), torch.arange(7) % 3)
    elif kind == "shared":
        model, data = Shared(), vectors(c=4)
    elif kind == "weight_norm":
        model, data = nn.Sequential(weight_norm(nn.Linear(5, 4)), nn.ReLU(), nn.Linear(4, 3)), vectors()
    elif kind == "attention":
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        model = nn.Sequential(nn.Unflatten(1, (5, 8)), layer, nn.Flatten(), nn.Linear(40, 3))
        data = vectors(d=40)
    else:
        raise AssertionError(kind)
    return Problem(model.double(), "cross_entropy", data, batch_size=4)


KINDS = ["mlp", "conv", "residual", "tokens", "shared", "weight_norm", "attention"]


@pytest.mark.filterwarnings("error:There is a performance drop")
@pytest.mark.parametrize("kind", KINDS)
def test_every_tier_equals_a_backward_for_each_example(kind):
    problem = problem_of(kind)
    truth = naive(problem)
    for tier in ("auto", "vmap", "loop"):
        rows = per_example_gradients(problem, tier=tier, chunk=3 if tier == "vmap" else None)
        torch.testing.assert_close(rows, truth, rtol=1e-9, atol=1e-11)
        norms = gradient_norms(problem, tier=tier, return_tier=True)
        torch.testing.assert_close(norms.norms, truth.norm(dim=1), rtol=1e-9, atol=1e-11)
        blocks = torch.stack([p.square().sum(1) for p in truth.split(list(problem.space.numels), 1)], 1)
        torch.testing.assert_close(norms.squares, blocks, rtol=1e-9, atol=1e-11)


class Recurrent(nn.Module):
    """The kernel of an LSTM fails under vmap in words of its own."""

    def __init__(self):
        super().__init__()
        self.cells, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.cells(x)[0][:, -1])


def test_recurrent_kernels_fall_back_to_single_passes():
    torch.manual_seed(0)
    x = torch.randn(5, 2, 3).double()
    problem = Problem(Recurrent().double(), "cross_entropy", (x, torch.arange(5) % 3), batch_size=4)
    truth = naive(problem)
    torch.testing.assert_close(per_example_gradients(problem), truth)
    torch.testing.assert_close(gradient_norms(problem), truth.norm(dim=1))


@pytest.mark.parametrize(
    ("kind", "tier", "direct"),
    [
        ("mlp", "layerwise", set()),
        ("conv", "layerwise", set()),
        ("residual", "layerwise", set()),
        ("tokens", "layerwise", set()),
        ("shared", "layerwise+vmap", {"outside.weight", "scale"}),
        (
            "weight_norm",
            "layerwise+vmap",
            {"0.bias", "0.parametrizations.weight.original0", "0.parametrizations.weight.original1"},
        ),
    ],
)
def test_tier_reported_is_the_tier_used(kind, tier, direct):
    result = gradient_norms(problem_of(kind), return_tier=True)
    assert result.tier == tier
    assert set(result.direct) == direct


def test_layerwise_by_name_is_refused_where_it_cannot_read():
    with pytest.raises(InputError, match=r"outside\.weight"):
        gradient_norms(problem_of("shared"), tier="layerwise")


def test_time_first_layers_as_long_as_the_batch_are_found_out():
    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):  # [m, T, 3]
            return self.head(torch.tanh(self.inner(x.transpose(0, 1))).transpose(0, 1).mean(1))

    problem = Problem(
        TimeFirst().double(), "cross_entropy", (torch.randn(4, 4, 3).double(), torch.arange(4) % 3)
    )
    result = gradient_norms(problem, return_tier=True)
    torch.testing.assert_close(result.norms, naive(problem).norm(dim=1))
    assert result.tier == "vmap"


@pytest.mark.parametrize(
    ("kind", "tier"), [("add", "layerwise"), ("scaled", "layerwise+vmap"), ("times", "layerwise+vmap")]
)
def test_positions_embedded_once_for_all_examples(kind, tier):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions, self.head = nn.Embedding(9, 4), nn.Embedding(6, 4), nn.Linear(4, 3)

        def forward(self, ids):
            x, at = self.tokens(ids), self.positions(torch.arange(ids.shape[1])[None])
            x = {"add": x + at, "scaled": torch.add(x, at, alpha=2), "times": x * at}[kind]
            return self.head(torch.tanh(x).mean(1))

    problem = Problem(
        Positions().double(), "cross_entropy", (torch.randint(0, 9, (7, 5)), torch.arange(7) % 3)
    )
    result = gradient_norms(problem, return_tier=True)
    torch.testing.assert_close(result.norms, naive(problem).norm(dim=1), rtol=1e-9, atol=1e-12)
    assert result.tier == tier


@pytest.mark.parametrize("positions", [1, 3, 40])
def test_long_and_short_sequences_take_either_product(positions):
    """Below and above the length where the Gram product is the cheaper one, with and without a bias."""
    model = nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3, bias=False), nn.Flatten(), nn.Linear(3 * positions, 3)
    )
    problem = Problem(
        model.double(), "cross_entropy", (torch.randn(5, positions, 6).double(), torch.arange(5) % 3)
    )
    result = gradient_norms(problem, return_tier=True)
    torch.testing.assert_close(result.norms, naive(problem).norm(dim=1), rtol=1e-9, atol=1e-12)
    assert result.tier == "layerwise"


def test_memory_budget_does_not_change_the_result(monkeypatch):
    problem = problem_of("conv")
    whole = gradient_norms(problem), per_example_gradients(problem)
    monkeypatch.setattr("gradmatch.core._reading._BUDGET", 1)
    monkeypatch.setattr("gradmatch.core.gradients._BUDGET", 1)
    monkeypatch.setattr("gradmatch.core._per_example._BUDGET", 1)
    parts = gradient_norms(problem), per_example_gradients(problem)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_input_written_over_after_the_layer_read_it_is_not_read_silently():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.wide = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x):
            x = x.clone()
            y = self.embed(x)
            x.mul_(2.0)
            return self.wide(torch.tanh(y))

    problem = Problem(Overwrites().double(), "cross_entropy", vectors())
    with pytest.raises(RuntimeError, match="inplace"):
        naive(problem)
    with pytest.raises(RuntimeError, match="inplace"):
        gradient_norms(problem)


def test_gradient_is_the_mean_over_examples_for_unequal_batches():
    x, y = vectors(10)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    problem = Problem(model, "cross_entropy", [(x[:7], y[:7]), (x[7:8], y[7:8]), (x[8:], y[8:])])
    flat = problem.space.flatten(gradient(problem))
    torch.testing.assert_close(flat, naive(problem).mean(0), rtol=1e-10, atol=1e-12)
    F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(flat, torch.cat([p.grad.flatten() for p in model.parameters()]))


def test_linear_softmax_closed_form():
    x, y = vectors(6)
    model = nn.Linear(5, 3).double()
    residual = torch.softmax(model(x), 1) - F.one_hot(y, 3)
    problem = Problem(model, "cross_entropy", (x, y))
    expected = torch.cat([(residual[:, :, None] * x[:, None]).flatten(1), residual], 1).detach()
    torch.testing.assert_close(per_example_gradients(problem), expected)
    torch.testing.assert_close(
        gradient_norms(problem), residual.norm(dim=1).detach() * (x.square().sum(1) + 1).sqrt()
    )


def test_differentiable_gradient_reaches_inputs_and_parameters():
    x, y = vectors(4)
    x.requires_grad_()
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    problem = Problem(model, "cross_entropy", (x, y), batch_size=3)

    def penalty(x):
        p = Problem(model, "cross_entropy", (x, y), batch_size=3)
        return sum(g.square().sum() for g in gradient(p, differentiable=True))

    assert torch.autograd.gradcheck(penalty, (x,))
    assert all(p.grad is None for p in model.parameters())
    grads = torch.autograd.grad(penalty(x), list(model.parameters()))
    step = 1e-6
    with torch.no_grad():
        model[0].bias[1] += step
        high = float(penalty(x))
        model[0].bias[1] -= 2 * step
        low = float(penalty(x))
        model[0].bias[1] += step
    assert float(grads[1][1]) == pytest.approx((high - low) / (2 * step), rel=1e-5)
    rows = per_example_gradients(problem, differentiable=True)
    mean = problem.space.flatten(gradient(problem, differentiable=True))
    torch.testing.assert_close(rows.mean(0), mean)
    for leaf in (x, model[0].weight):
        a, b = (
            torch.autograd.grad(v.square().sum(), leaf, retain_graph=True)[0] for v in (rows.mean(0), mean)
        )
        torch.testing.assert_close(a, b)
        assert float(a.abs().max()) > 0


def test_gradient_at_given_parameters_of_every_form():
    problem = problem_of("mlp")
    vector = torch.randn(problem.space.size).double()
    blocks = problem.space.unflatten(vector)
    other = copy.deepcopy(problem.module)
    other.load_state_dict(blocks)
    truth = naive(
        Problem(
            other, "cross_entropy", (torch.cat([b.inputs for b in problem.batches()]), torch.arange(7) % 3)
        )
    )
    for form in (vector, blocks, list(blocks.values())):
        torch.testing.assert_close(per_example_gradients(problem, form), truth)
        torch.testing.assert_close(gradient_norms(problem, form), truth.norm(dim=1))
        torch.testing.assert_close(problem.space.flatten(gradient(problem, form)), truth.mean(0))


def test_selected_blocks_only():
    problem = problem_of("conv")
    part = Problem(problem.module, "cross_entropy", problem.data._whole, select=r"^4\.")
    truth = naive(part)
    assert part.space.names == ("4.weight", "4.bias")
    torch.testing.assert_close(per_example_gradients(part), truth)
    torch.testing.assert_close(gradient_norms(part), truth.norm(dim=1))


def test_functional_model():
    x, y = vectors(6)
    params = {"w": torch.randn(5, 3).double(), "b": torch.zeros(3).double()}
    problem = Problem(lambda p, x: x @ p["w"] + p["b"], "cross_entropy", (x, y), params=params)
    residual = torch.softmax(x @ params["w"], 1) - F.one_hot(y, 3)
    expected = torch.cat([(x[:, :, None] * residual[:, None]).flatten(1), residual], 1)
    torch.testing.assert_close(per_example_gradients(problem), expected)
    result = gradient_norms(problem, return_tier=True)
    torch.testing.assert_close(result.norms, expected.norm(dim=1))
    assert (result.tier, result.direct) == ("vmap", ("w", "b"))


def test_nothing_of_the_model_changes():
    problem = problem_of("residual")
    model = problem.module
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    gradient(problem)
    gradient_norms(problem)
    per_example_gradients(problem)
    class_gradients(problem)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert all(p.grad is None for k, p in model.named_parameters() if k != "head.weight")
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_batch_norm_in_train_mode_if_allowed_keeps_running_statistics():
    problem = problem_of("residual")
    model = problem.module.train()
    with pytest.raises(InputError, match="batchnorm"):
        gradient(problem)
    x, y = images()
    allowed = Problem(model, "cross_entropy", (x, y), allow="batchnorm")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flat = allowed.space.flatten(gradient(allowed))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    F.cross_entropy(copy.deepcopy(model)(x), y)
    twin = copy.deepcopy(model)
    F.cross_entropy(twin(x), y).backward()
    torch.testing.assert_close(flat, torch.cat([p.grad.flatten() for p in twin.parameters()]))
    for function in (per_example_gradients, gradient_norms):
        with pytest.raises(InputError, match="eval"):
            function(allowed)


def test_dropout_if_allowed_gives_each_example_its_own_mask():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(50, 1, bias=False)).double()
    x = torch.ones(6, 50).double()
    problem = Problem(model, lambda z, _: z[:, 0], (x, torch.zeros(6)), allow="dropout")
    for tier in ("auto", "vmap"):
        rows = per_example_gradients(problem, tier=tier)
        assert set(rows.unique().tolist()) == {0.0, 2.0}
        assert len({tuple(r) for r in rows.tolist()}) == 6


def test_non_finite_gradients_are_refused():
    problem = Problem(
        nn.Linear(2, 1), lambda z, y: (z[:, 0] - z[:, 0]).sqrt() + y, (torch.ones(3, 2), torch.ones(3))
    )
    for function in (gradient, per_example_gradients, gradient_norms):
        with pytest.raises(InputError, match="NaN"):
            function(problem)


# --- language models ---------------------------------------------------------------------------------------


def gpt2(tied: bool):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=20, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    config.tie_word_embeddings = tied
    return transformers.GPT2LMHeadModel(config).double().eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.filterwarnings("error:There is a performance drop")
def test_gpt2_of_transformers(tied, masked):
    batch = {"input_ids": torch.randint(0, 20, (5, 6))}
    if masked:
        batch["attention_mask"] = torch.ones(5, 6, dtype=torch.long)
        batch["attention_mask"][2, 4:] = 0
    problem = Problem(gpt2(tied), "next_token", batch, batch_size=3)
    truth = naive(problem)
    torch.testing.assert_close(per_example_gradients(problem), truth, rtol=1e-8, atol=1e-11)
    result = gradient_norms(problem, return_tier=True)
    torch.testing.assert_close(result.norms, truth.norm(dim=1), rtol=1e-8, atol=1e-11)
    assert result.tier == "layerwise"  # tied embeddings and positions added to all examples included


def test_fused_attention_has_second_and_forward_derivatives_here():
    problem = Problem(gpt2(tied=True), "next_token", {"input_ids": torch.randint(0, 20, (4, 5))})
    flat, direction = (
        problem.space.flatten(problem.resolve()).detach(),
        torch.randn(problem.space.size).double(),
    )
    step = 1e-6 * direction
    plus, minus = (problem.space.flatten(gradient(problem, flat + s)) for s in (step, -step))
    blocks = problem.space.unflatten(flat.requires_grad_())
    slope = problem.space.flatten(gradient(problem, blocks, differentiable=True))
    (product,) = torch.autograd.grad(slope @ direction, flat)
    torch.testing.assert_close(product, (plus - minus) / 2e-6, rtol=1e-5, atol=1e-7)
    batch = next(problem.batches())
    pushed = problem.jvp(direction, batch)[1]
    pull = problem.vjp(batch)[1]
    torch.testing.assert_close((pushed * pushed).sum(), pull(pushed) @ direction)


# --- groups and moments ------------------------------------------------------------------------------------


def test_class_gradients_are_gradients_of_class_means():
    problem = problem_of("conv")
    truth, y = naive(problem), torch.arange(7) % 3
    expected = torch.stack([truth[y == c].mean(0) for c in range(3)])
    torch.testing.assert_close(class_gradients(problem), expected, rtol=1e-9, atol=1e-12)
    ids = torch.tensor([1, 0, 0, 1, 1, 0, 1])
    expected = torch.stack([truth[ids == c].mean(0) for c in range(2)])
    torch.testing.assert_close(group_gradients(problem, ids), expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(InputError, match="groups"):
        group_gradients(problem)
    with pytest.raises(InputError, match="class 1"):
        group_gradients(problem, ids * 2)


def test_class_gradients_differentiable_in_the_inputs():
    x, y = vectors(5)
    x.requires_grad_()
    model = nn.Linear(5, 3).double()
    target = torch.randn(3, 18).double()

    def f(x):
        return (class_gradients(Problem(model, "cross_entropy", (x, y)), differentiable=True) * target).sum()

    assert torch.autograd.gradcheck(f, (x,))


def test_moments_and_stats_equal_explicit_sums():
    base = problem_of("mlp")
    problem = Problem(base.module, "cross_entropy", base.data._whole, groups="class", batch_size=4)
    truth, y = naive(problem), torch.arange(7) % 3
    moments = diagonal_moments(problem, chunk=2)
    assert moments.count == 7
    torch.testing.assert_close(moments.total, truth.sum(0))
    torch.testing.assert_close(moments.square, truth.square().sum(0))
    stats = gradient_stats(problem, second=True, chunk=2)
    assert stats.count.tolist() == [3, 2, 2]
    torch.testing.assert_close(stats.mean, truth.mean(0))
    torch.testing.assert_close(stats.norm2_mean, truth.square().sum(1).mean())
    per_class = [truth[y == c] for c in range(3)]
    torch.testing.assert_close(stats.group_mean, torch.stack([t.mean(0) for t in per_class]))
    torch.testing.assert_close(stats.variance, torch.stack([t.var(0, correction=0) for t in per_class]))
    layers = [[b.square().sum(1).mean() for b in t.split(list(problem.space.numels), 1)] for t in per_class]
    torch.testing.assert_close(stats.group_norm2_mean, torch.tensor(layers).double())


def test_chunks_never_exceed_what_is_asked_and_keep_their_place():
    problem = problem_of("mlp")
    parts = list(iter_per_example_gradients(problem, chunk=3))
    assert [p.start for p, _ in parts] == [0, 3, 4]
    assert [len(r) for _, r in parts] == [3, 1, 3]


SPACE = ParamSpace.of({"a": torch.zeros(2, 2), "b": torch.zeros(3)})


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(0, 6), min_size=3, max_size=3), st.floats(-6, 6))
def test_merging_is_associative_and_equals_one_pass(seed, sizes, exponent):
    generator = torch.Generator().manual_seed(seed)
    blocks = [torch.randn(m, 7, generator=generator) * 10**exponent for m in (s + 1 for s in sizes)]
    groups = [torch.randint(0, 2, (len(b),), generator=generator) for b in blocks]
    a, b, c = (GradStats(SPACE, 2, True).update(x, g) for x, g in zip(blocks, groups, strict=True))
    whole = GradStats(SPACE, 2, True).update(torch.cat(blocks), torch.cat(groups))
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)):
        for key, value in merged.state_dict().items():
            reference = whole.state_dict()[key]
            torch.testing.assert_close(
                value, reference, rtol=1e-12, atol=1e-12 * float(reference.abs().max() + 1e-300)
            )


def test_stats_round_trip_and_sums():
    rows = torch.randn(5, 7)
    stats = GradStats(SPACE).update(rows[:2]).update(SPACE.unflatten(rows[2:]))
    again = GradStats.from_state_dict(SPACE, stats.state_dict())
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in stats.state_dict().items())
    again.update(rows)
    assert int(stats.count) == 5  # a copy, not a view
    layers = torch.stack([rows[:, :4].square().sum(), rows[:, 4:].square().sum()])
    summed = GradStats(SPACE).update_sums(5, rows.sum(0), layers)
    torch.testing.assert_close(summed.total, stats.total, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(summed.norm2, stats.norm2, rtol=1e-5, atol=1e-6)


def test_stats_refuse_what_does_not_fit():
    stats = GradStats(SPACE)
    for call, word in [
        (lambda: stats.update(torch.zeros(2, 6)), "gradients"),
        (lambda: stats.update(torch.full((1, 7), torch.nan)), "NaN"),
        (lambda: GradStats(SPACE, 2).update(torch.zeros(2, 7)), "groups"),
        (lambda: GradStats(SPACE, 2).update(torch.zeros(2, 7), torch.tensor([0, 2])), "groups"),
        (lambda: stats.merge(GradStats(SPACE, 2)), "groups"),
        (lambda: stats.merge(GradStats(ParamSpace.of({"a": torch.zeros(7)}))), "parameters"),
        (lambda: stats.mean, "update"),
        (lambda: stats.variance, "second"),
        (lambda: GradStats.from_state_dict(SPACE, {"count": torch.zeros(1)}), "state"),
    ]:
        with pytest.raises(InputError, match=word):
            call()


def test_functional_call_agrees_after_training_step():
    """Blocks given explicitly win over the module's own."""
    problem = problem_of("mlp")
    moved = {k: p.detach() + 1 for k, p in problem.module.named_parameters()}
    x, y = problem.data._whole
    expected = F.cross_entropy(functional_call(problem.module, moved, (x,)), y, reduction="none")
    torch.testing.assert_close(problem.example_losses(moved), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_one_pass_are_those_of_the_rows(kind, monkeypatch):
    problem = problem_of(kind)
    truth = naive(problem)
    subset = torch.arange(7) % 3 != 1
    for chosen, rows in ((None, truth), (subset, truth[subset])):
        for budget in (2**25, 1):
            monkeypatch.setattr("gradmatch.core._per_example._BUDGET", budget)
            found = gradient_sums(problem, subset=chosen)
            torch.testing.assert_close(found.norms, rows.norm(dim=1), rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(found.stats.mean, rows.mean(0), rtol=1e-9, atol=1e-11)
            blocks = [b.square().sum() for b in rows.split(list(problem.space.numels), 1)]
            torch.testing.assert_close(found.stats.norm2[0], torch.stack(blocks), rtol=1e-9, atol=1e-11)
            assert int(found.stats.count) == len(rows)
    assert found.tier == gradient_norms(problem, return_tier=True).tier


def test_sums_take_a_mask_of_the_examples_only():
    problem = problem_of("mlp")
    for bad in (torch.arange(3), torch.zeros(7, dtype=torch.bool), torch.ones(6, dtype=torch.bool)):
        with pytest.raises(InputError, match="subset"):
            gradient_sums(problem, subset=bad)


@pytest.mark.parametrize("kind", [*KINDS, "no forward"])
def test_products_with_vectors_are_those_of_the_rows(kind):
    if kind == "no forward":

        class Twice(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return 2 * x

            @staticmethod
            def backward(ctx, g):
                return 2 * g

        class Own(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

            def forward(self, x):
                return self.b(Twice.apply(torch.tanh(self.a(x))))

        problem = Problem(Own().double(), "cross_entropy", vectors(), batch_size=4)
    else:
        problem = problem_of(kind)
    truth, ids = naive(problem), torch.arange(7) % 3
    directions = torch.randn(3, problem.space.size).double()
    one = gradient_products(problem, directions[0])
    torch.testing.assert_close(one, truth @ directions[0], rtol=1e-9, atol=1e-11)
    each = gradient_products(problem, directions, ids)
    torch.testing.assert_close(each, (truth * directions[ids]).sum(1), rtol=1e-9, atol=1e-11)
    with pytest.raises(InputError, match="vectors"):
        gradient_products(problem, directions)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(8, 16, 3), (8, 4, 4)),
        (nn.Conv2d(8, 16, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2), groups=2), (8, 4, 5)),
        (nn.Conv1d(8, 16, 4, padding="same", padding_mode="circular"), (8, 5)),
        (nn.Linear(40, 30), (2, 40)),
    ],
    ids=["conv", "grouped", "circular", "linear"],
)
def test_sums_where_norms_come_from_gram_matrices(layer, shape):
    """Few positions of wide layers: no example's gradient is formed, so the sum is a product of its own."""
    g = torch.Generator().manual_seed(0)
    layer = copy.deepcopy(layer).double()
    data = torch.randn(6, *shape, generator=g, dtype=torch.double), torch.zeros(6)
    problem = Problem(layer, lambda z, _: z.pow(3).flatten(1).sum(1), data, batch_size=4)
    truth, found = per_example_gradients(problem, tier="vmap"), gradient_sums(problem)
    assert found.tier == "layerwise"
    torch.testing.assert_close(found.stats.mean, truth.mean(0), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.norms, truth.norm(dim=1), rtol=1e-10, atol=1e-10)
