"""Weight matching against brute force and a plain sweep; what a permutation may and may not change."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from gradmatch.core.assign import Permutation, PermutationSpec, apply_matrices, linear_assignment, singular
from gradmatch.core.checks import InputError
from gradmatch.core.problem import Problem
from gradmatch.weights import (
    activation_match,
    analyze_merge,
    barrier,
    energy_share,
    merge,
    repair,
    reset_statistics,
    ste_match,
    weight_match,
)
from gradmatch.weights._ascent import Ascent
from gradmatch.weights._merge_analysis import agreement, taylor_barrier
from gradmatch.weights.weight_matching import matched_tensors
from gradmatch.zoo import convnet, mlp


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Stream(nn.Module):
    """Residual blocks between a narrow entrance and exit: the stream's order has little to hold on to."""

    def __init__(self, width: int = 30, inner: int = 50, blocks: int = 2) -> None:
        super().__init__()
        self.enter, self.exit = nn.Linear(1, width, bias=False), nn.Linear(width, 1, bias=False)
        self.up = nn.ModuleList([nn.Linear(width, inner, bias=False) for _ in range(blocks)])
        self.down = nn.ModuleList([nn.Linear(inner, width, bias=False) for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).relu())
        return self.exit(x)


class Square(nn.Module):
    """One group on both axes of a weight: x + Wx."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.mix, self.exit = nn.Linear(4, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.exit((x + self.mix(x)).relu())


def grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.Conv2d(6, 12, 3, groups=2), nn.Conv2d(12, 2, 3))


def two(make, example: Tensor) -> tuple[PermutationSpec, nn.Module, nn.Module]:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    a, b = make().eval(), make().eval()
    return PermutationSpec.from_module(a, example), a, b


def inner(spec: PermutationSpec, a: dict[str, Tensor], b: dict[str, Tensor], keys: list[str]) -> Tensor:
    return torch.stack([(a[k].double() * b[k].double()).sum() for k in keys]).sum()


def recovered(found: Permutation, hidden: Permutation) -> bool:
    return all(torch.equal(found.order[k], o) for k, o in hidden.inverse().order.items())


# --- the ascent -----------------------------------------------------------------------------------------------


def plain_sweeps(
    spec: PermutationSpec, a: dict[str, Tensor], b: dict[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """The ascent as written down: C is the gradient of sum <A, P(B)> in P, one exact assignment at a time."""
    keys = matched_tensors(spec, a)
    orders = {g: torch.arange(n) for g, n in spec.sizes.items()}
    generator = torch.Generator().manual_seed(seed)
    moved = True
    while moved:
        moved = False
        for k in torch.randperm(len(orders), generator=generator).tolist():
            group = list(orders)[k]
            matrices = {g: torch.eye(len(o)).double()[o].requires_grad_() for g, o in orders.items()}
            doubled = {n: t.double() if t.is_floating_point() else t for n, t in b.items()}
            value = inner(spec, a, apply_matrices(spec, doubled, matrices), keys)
            scores = torch.autograd.grad(value, matrices[group])[0]
            new = linear_assignment(scores)
            old, rows = orders[group], torch.arange(len(new))
            if float((scores[rows, new] - scores[rows, old]).sum()) > 1e-9 * abs(float(value.detach())):
                orders[group], moved = new, True
    return orders


@pytest.mark.parametrize(
    ("make", "example"),
    [
        (lambda: mlp(6, (20, 15, 10), 4), randn(1, 6)),
        (lambda: convnet(width=8, depth=3, size=16, norm="batch"), randn(1, 1, 16, 16)),
        (grouped, randn(1, 2, 9, 9)),
        (lambda: nn.TransformerEncoderLayer(12, 3, 16, batch_first=True), randn(1, 3, 12)),
    ],
    ids=["mlp", "convnet", "grouped", "attention"],
)  # fmt: skip
def test_the_ascent_is_that_of_plain_sweeps(make, example: Tensor) -> None:
    spec, a, b = two(make, example)
    wanted = plain_sweeps(spec, a.state_dict(), b.state_dict(), seed=3)
    found = weight_match(spec, a, b, seed=3)
    assert all(torch.equal(found.order[g], o) for g, o in wanted.items())


@pytest.mark.parametrize(
    "make", [lambda: mlp(6, (20, 15), 4), Square, lambda: Stream()], ids=["mlp", "square", "stream"]
)
def test_the_sum_never_falls_and_the_distance_never_grows(make) -> None:
    spec, a, b = two(
        make, randn(1, 1) if make().__class__ is Stream else randn(1, 4 if make().__class__ is Square else 6)
    )
    seen: list[float] = []
    found = weight_match(spec, a, b, progress=lambda _, value: seen.append(value))
    keys = matched_tensors(spec, a.state_dict())
    assert all(y >= x for x, y in itertools.pairwise(seen))
    assert seen[0] > float(inner(spec, a.state_dict(), b.state_dict(), keys))
    assert seen[-1] == pytest.approx(float(inner(spec, a.state_dict(), found.apply(b), keys)), rel=1e-6)
    report = analyze_merge(a, b, found)
    assert 0 < report.distance_matched < report.distance
    assert report.reduction == pytest.approx(100 * (1 - report.distance_matched / report.distance))


def test_one_hidden_layer_takes_one_sweep_and_is_the_best_there_is() -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        a, b = mlp(3, (6,), 2), mlp(3, (6,), 2)
        spec = PermutationSpec.from_module(a, randn(1, 3))
        sweeps: list[int] = []
        found = weight_match(spec, a, b, progress=lambda k, _, own=sweeps: own.append(k))
        assert len(sweeps) == 2  # the second only confirms
        keys = matched_tensors(spec, a.state_dict())
        values = {
            p: float(inner(spec, a.state_dict(), Permutation(spec, {"1": torch.tensor(p)}).apply(b), keys))
            for p in itertools.permutations(range(6))
        }
        assert tuple(found.order["1"].tolist()) == max(values, key=values.__getitem__)


def test_a_hidden_permutation_is_found_in_all_plain_networks() -> None:
    g = torch.Generator().manual_seed(0)
    for seed in range(20):
        torch.manual_seed(seed)
        widths = torch.randint(30, 65, (1 + seed % 3,), generator=g).tolist()
        net = (
            mlp(20, widths, 5)
            if seed % 2
            else convnet(width=widths[0], depth=1 + seed % 2, size=8, norm="batch")
        )
        example = randn(1, 20) if seed % 2 else randn(1, 1, 8, 8)
        spec = PermutationSpec.from_module(net, example)
        hidden = Permutation.random(spec, seed)
        assert recovered(weight_match(spec, net, hidden.apply(net), seed=seed), hidden), seed


def test_residual_streams_need_a_start_by_activations() -> None:
    """From a plain start about six of ten such networks are solved; a shared order is a hard local search."""
    x = randn(256, 1)
    plain = started = 0
    for seed in range(20):
        torch.manual_seed(seed)
        net = Stream()
        spec = PermutationSpec.from_module(net, x[:1], verify=False)
        hidden = Permutation.random(spec, seed + 1)
        moved = hidden.apply(net)
        plain += recovered(weight_match(spec, net, moved), hidden)
        init = activation_match(spec, net, moved, (x, x), model=net, score="correlation")
        started += recovered(weight_match(spec, net, moved, init=init), hidden)
    assert started >= 19
    assert plain < started


def test_restarts_keep_the_best_and_seeds_decide() -> None:
    spec, a, b = two(lambda: Stream(), randn(1, 1))
    keys = matched_tensors(spec, a.state_dict())
    state = torch.random.get_rng_state()
    one, many, again = (weight_match(spec, a, b, restarts=r, seed=4) for r in (1, 6, 6))
    values = [float(inner(spec, a.state_dict(), p.apply(b), keys)) for p in (one, many)]
    assert values[1] >= values[0]
    assert all(torch.equal(o, again.order[g]) for g, o in many.order.items())
    assert torch.equal(state, torch.random.get_rng_state())


def test_equal_networks_in_single_precision_end_at_once() -> None:
    """An absolute tolerance of 1e-12 on float32 sums goes round in circles."""
    torch.manual_seed(0)
    net = mlp(50, (64, 64), 10)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1e3)
    spec = PermutationSpec.from_module(net, randn(1, 50))
    sweeps: list[int] = []
    found = weight_match(spec, net, net, progress=lambda k, _: sweeps.append(k))
    assert sweeps == [1]
    assert max(found.moved().values()) == 0


def test_late_sweeps_update_scores_by_what_changed() -> None:
    spec, a, b = two(lambda: mlp(6, (40, 30), 4), randn(1, 6))
    states = a.state_dict(), b.state_dict()
    ascent = Ascent(spec, *states, matched_tensors(spec, states[0]), Permutation.identity(spec).order)
    ascent.run(100, lambda n: list(range(n)))
    fresh = Ascent(spec, *states, matched_tensors(spec, states[0]), ascent.orders)
    assert ascent.value == pytest.approx(fresh.value, rel=1e-7)
    for g in spec.sizes:
        assert torch.allclose(ascent.scores(g), fresh.scores(g), atol=1e-5)


def test_what_counts_can_be_chosen() -> None:
    spec, a, b = two(lambda: convnet(width=8, depth=2, size=8, norm="batch"), randn(1, 1, 8, 8))
    state = a.state_dict()
    assert not any("running" in k or "num_batches" in k for k in matched_tensors(spec, state))
    assert matched_tensors(spec, state, biases=False) == [
        "features.0.weight",
        "features.4.weight",
        "classifier.weight",
    ]
    assert matched_tensors(spec, state, layers="features.4") == ["features.4.weight", "features.4.bias"]
    assert matched_tensors(spec, state, layers=lambda k: k.startswith("cl")) == ["classifier.weight"]
    first = weight_match(spec, a, b, layers=r"^features\.0\.weight")
    assert first.moved()["features.4"] == 0
    with pytest.raises(InputError, match="leave no tensor with units to match"):
        weight_match(spec, a, b, layers="nothing")


def test_other_architectures_and_starts_are_refused() -> None:
    spec, a, b = two(lambda: mlp(6, (5,), 3), randn(1, 6))
    for other, message in (
        (mlp(6, (7,), 3), r"b\['1.weight'\] has the shape \(7, 6\); the specification has \(5, 6\)"),
        (mlp(6, (5, 5), 3), r"b has 5\.weight"),
        (nn.Linear(6, 3), r"b has no 1\.weight"),
    ):
        with pytest.raises(InputError, match=message):
            weight_match(spec, a, other)
    with pytest.raises(InputError, match="init is a permutation of another specification"):
        weight_match(
            spec, a, b, init=Permutation.identity(PermutationSpec.from_module(mlp(6, (7,), 3), randn(1, 6)))
        )
    for options in ({"max_sweeps": 0}, {"restarts": 0}, {"seed": -1}):
        with pytest.raises(InputError):
            weight_match(spec, a, b, **options)


# --- activations and straight through -------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["product", "correlation"])
def test_activations_find_what_was_hidden(score: str) -> None:
    torch.manual_seed(1)
    head = nn.Flatten(), nn.Linear(9 * 36, 12), nn.Tanh(), nn.Linear(12, 3)
    net = nn.Sequential(nn.Conv2d(1, 9, 3), nn.BatchNorm2d(9), nn.ReLU(), *head).train()
    x = randn(64, 1, 8, 8)
    spec = PermutationSpec.from_module(net, x[:1])
    assert [r.module for own in spec.readings.values() for r in own] == ["4", "6"]  # after the nonlinearities
    hidden = Permutation.random(spec, 2)
    state = hidden.apply(net)
    kept = {k: t.clone() for k, t in net.state_dict().items()}
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, torch.zeros(64)), batch_size=10, shuffle=True
    )
    assert recovered(activation_match(spec, net, state, loader, score=score), hidden)
    assert net.training
    assert all(torch.equal(t, kept[k]) for k, t in net.state_dict().items())


def test_activation_scores_equal_plain_products_and_correlations() -> None:
    spec, a, b = two(lambda: mlp(6, (9,), 3), randn(1, 6))
    x = randn(40, 6)
    za, zb = (torch.relu(net[1](x)).detach().double() for net in (a, b))
    products = linear_assignment(za.T @ zb)
    rows = torch.cat([za, zb], 1).T
    correlations = linear_assignment(torch.corrcoef(rows).nan_to_num()[:9, 9:])
    for score, wanted in (("product", products), ("correlation", correlations)):
        found = activation_match(spec, a, b, (x, torch.zeros(40)), score=score, batch_size=7)
        assert torch.equal(found.order["1"], wanted)


def test_activations_need_to_know_where_to_look() -> None:
    spec, a, b = two(lambda: mlp(6, (5,), 3), randn(1, 6))
    data = (randn(4, 6), torch.zeros(4))
    axes = {"1.weight": ("P", None), "1.bias": ("P",), "3.weight": (None, "P"), "3.bias": (None,)}
    with pytest.raises(InputError, match="made by from_module"):
        activation_match(PermutationSpec.from_axes(axes, a), a, b, data)
    with pytest.raises(InputError, match="give the network they belong to as model="):
        activation_match(spec, a.state_dict(), b.state_dict(), data)
    with pytest.raises(InputError, match="score is 'cka'"):
        activation_match(spec, a, b, data, score="cka")


@pytest.fixture(scope="module")
def pair() -> tuple[PermutationSpec, nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    """Two small classifiers trained from different seeds on the same points."""
    x = randn(400, 8)
    y = (x[:, 0] * x[:, 1] > 0).long() + 2 * (x[:, 2] > 0).long()
    nets = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        net = mlp(8, (48, 48), 4)
        optimizer = torch.optim.SGD(net.parameters(), 0.2, momentum=0.9, weight_decay=2e-3)
        for step in range(200):
            at = torch.arange(step * 64, step * 64 + 64) % 400
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[at]), y[at]).backward()
            optimizer.step()
        net.zero_grad()
        nets.append(net.eval())
    return PermutationSpec.from_module(nets[0], x[:1]), *nets, (x, y)


@pytest.mark.parametrize("ste", ["sinkhorn", "reference"])
def test_straight_through_lowers_the_loss_in_the_middle(pair, ste: str) -> None:
    spec, a, b, data = pair
    problem = Problem(a, "cross_entropy", data)
    naive = barrier(problem, a, b, points=3).midpoint_gap
    before = [p.clone() for p in a.parameters()]
    state = torch.random.get_rng_state()
    steps = {"sinkhorn": 60, "reference": 8}[ste]
    found = [ste_match(spec, a, b, data, ste=ste, steps=steps, every=4, seed=1) for _ in range(2)]
    assert barrier(problem, a, found[0].apply(b), points=3).midpoint_gap < 0.6 * naive
    assert all(torch.equal(o, found[1].order[g]) for g, o in found[0].order.items())
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(a.parameters(), before, strict=True))
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_reference_form_starts_as_weight_matching(pair) -> None:
    spec, a, b, data = pair
    found = ste_match(spec, a, b, data, ste="reference", steps=1, lr=1e-9)
    assert all(torch.equal(o, found.order[g]) for g, o in weight_match(spec, a, b).order.items())


def test_straight_through_takes_loaders_and_refuses_nonsense(pair) -> None:
    spec, a, b, (x, y) = pair
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=50)
    seen: list[int] = []
    ste_match(spec, a, b, loader, steps=3, progress=lambda k, _: seen.append(k))
    assert seen == [1, 2, 3]
    for options in ({"ste": "x"}, {"steps": 0}, {"lr": 0.0}, {"every": 0}, {"tau": 0.0}):
        with pytest.raises(InputError):
            ste_match(spec, a, b, (x, y), **options)
    with pytest.raises(InputError, match="finite"):
        ste_match(spec, a, b, (x, y), loss=lambda z, t: z.sum(1) / 0, steps=1)


# --- why it works ---------------------------------------------------------------------------------------------


def test_matching_removes_most_of_a_barrier_and_says_so(pair, tmp_path) -> None:
    spec, a, b, data = pair
    found = weight_match(spec, a, b)
    report = analyze_merge(a, b, found, problem=Problem(a, "cross_entropy", data), points=5, split="train")
    assert report.naive is not None
    assert report.matched is not None
    assert report.matched.barrier < 0.5 * report.naive.barrier
    assert report.agreement_matched > report.agreement + 0.1
    assert report.merged[1] > report.merged[0]
    facts = report.facts()
    assert facts["matched"]["split"] == "train"
    assert facts["naive"]["midpoint_gap"] == pytest.approx(report.naive.midpoint_gap)
    assert report.save(tmp_path / "report.json").is_file()
    bare = analyze_merge(a, b, found)
    assert bare.naive is None
    assert "naive" not in bare.facts()


def test_distances_follow_from_singular_vectors_and_biases(pair) -> None:
    """Wrong if right singular vectors were read as columns of Vh."""
    spec, a, b, _ = pair
    found = weight_match(spec, a, b)
    x, y = a.state_dict(), found.apply(b)
    total = 0.0
    for k in x:
        if x[k].ndim > 1:
            p, q = singular(x[k]), singular(y[k])
            cross = p.s[:, None] * q.s * (p.u.T @ q.u) * (p.vh @ q.vh.T)
            total += float(p.s.square().sum() + q.s.square().sum() - 2 * cross.sum())
        else:
            total += float((x[k] - y[k]).double().square().sum())
    assert math.sqrt(total) == pytest.approx(analyze_merge(a, b, found).distance_matched, rel=1e-6)


def test_singular_values_do_not_move_and_directions_move_as_units_do(pair) -> None:
    spec, _, b, _ = pair
    moved = Permutation.random(spec, 3)
    for k, t in moved.apply(b).items():
        if t.ndim > 1:
            before, after = (torch.linalg.svdvals(w) for w in (b.state_dict()[k], t))
            assert torch.allclose(before, after, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_agreement_is_one_for_equal_networks_and_bounded(pair, gamma: float) -> None:
    spec, a, b, _ = pair
    same = analyze_merge(a, a, Permutation.identity(spec), gamma)
    assert same.agreement == pytest.approx(1)
    assert all(before == pytest.approx(1) for before, _ in same.layers.values())
    other = analyze_merge(a, b, weight_match(spec, a, b), gamma)
    assert all(abs(r) <= 1 + 1e-12 for pair_ in other.layers.values() for r in pair_)


def test_agreement_sums_all_pairs_so_ties_do_not_matter() -> None:
    q = torch.linalg.qr(randn(4, 4).double())[0]
    turned = q @ torch.diag(torch.tensor([2.0, 2.0, 1.0, 1.0]).double()) @ q.T
    again = singular(turned)
    assert agreement({"w": again}, {"w": again}) == pytest.approx(1)
    spun = q.clone()
    spun[:, :2] = q[:, :2] @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]]).double()  # another basis of the tie
    other = type(again)(spun, again.s, spun.T)
    assert agreement({"w": again}, {"w": other}) == pytest.approx(1)


def test_taylor_is_exact_for_a_quadratic_loss() -> None:
    x, y = randn(30, 5).double(), randn(30, 2, seed=1).double()
    a, b = nn.Linear(5, 2).double(), nn.Linear(5, 2).double()
    problem = Problem(a, "mse", (x, y))
    path = barrier(problem, a, b, points=3)
    assert path.midpoint_gap < 0
    assert taylor_barrier(problem, a, b) == pytest.approx(path.midpoint_gap, rel=1e-6)
    with pytest.raises(InputError, match="problem is a Linear; it must be a Problem"):
        barrier(a, b, problem)


def test_energy_shares_lie_between_none_and_all(pair) -> None:
    spec, a, _, data = pair
    shares = energy_share(spec, a, a, data, 0.0)
    assert shares["3"][0] == pytest.approx(1, abs=1e-5)  # all directions of a square weight hold all energy
    few = energy_share(spec, a, a, data, 0.3)
    assert all(0 < e <= 1 and 0 < n <= 1 for e, n in few.values())
    direct = torch.relu(a[1](data[0])).detach().double() @ singular(a[3].weight, 0.3).vh.T
    whole = torch.relu(a[1](data[0])).detach().double().square().sum()
    assert few["3"][0] == pytest.approx(float(direct.square().sum() / whole), rel=1e-6)


def test_merging_with_all_the_weight_on_one_returns_it(pair) -> None:
    spec, a, b, _ = pair
    moved = weight_match(spec, a, b).apply(b)
    found = merge([a.state_dict(), moved], None, [1.0, 0.0])
    assert all(torch.equal(t, a.state_dict()[k]) for k, t in found.items())


# --- batch-norm and repair ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnets() -> tuple[PermutationSpec, nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    """Two transformers ResNets with batch-norm, briefly trained."""
    from transformers import ResNetConfig, ResNetForImageClassification

    x = randn(96, 1, 12, 12)
    y = (x[:, 0, :, :6].mean((1, 2)) > 0).long()
    nets = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = ResNetConfig(
            num_channels=1,
            embedding_size=8,
            hidden_sizes=[8, 12],
            depths=[1, 1],
            layer_type="basic",
            num_labels=2,
        )
        net = ResNetForImageClassification(config)
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
        for _ in range(12):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x).logits, y).backward()
            optimizer.step()
        nets.append(net.eval())
    return PermutationSpec.from_module(nets[0], x[:1]), *nets, (x, y)


def test_a_user_resnet_is_matched_with_its_statistics(resnets) -> None:
    spec, a, b, (x, y) = resnets
    hidden = Permutation.random(spec, 1)
    init = activation_match(spec, a, hidden.apply(a), (x, y), model=a, score="correlation")
    found = weight_match(spec, a, hidden.apply(a), init=init)
    with torch.no_grad():
        before = a(x).logits
    moved = found.apply(hidden.apply(a))
    assert all(torch.equal(t, a.state_dict()[k]) for k, t in moved.items())  # running statistics too
    permuted = hidden.apply(b)
    c = type(b)(b.config).eval()
    c.load_state_dict(permuted)
    with torch.no_grad():
        assert torch.allclose(c(x).logits, b(x).logits, atol=1e-5 * float(before.abs().max() + 1))


def test_straight_through_measures_batch_norm_anew(resnets) -> None:
    """Averaged statistics belong to neither end; nothing is written into the networks'."""
    spec, a, b, (x, y) = resnets
    kept = {k: t.clone() for k, t in a.state_dict().items()}
    ste_match(spec, a, b, (x, y), steps=2, batch_size=48)
    assert all(torch.equal(t, kept[k]) for k, t in a.state_dict().items())
    assert not any(m.training for m in a.modules())


def test_batch_norm_without_a_loader_is_warned_about(resnets) -> None:
    spec, a, b, (x, y) = resnets
    problem = Problem(a, "cross_entropy", (x, y))
    found = weight_match(spec, a, b)
    with pytest.warns(UserWarning, match="batch-norm, and its statistics are averaged"):
        averaged = analyze_merge(a, b, found, problem=problem, points=3, taylor=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh = analyze_merge(a, b, found, problem=problem, points=3, taylor=False, statistics=(x, y))
    assert averaged.matched is not None
    assert fresh.matched is not None
    assert averaged.matched.losses[0] == fresh.matched.losses[0]  # the ends keep their own
    assert averaged.matched.losses[1] != fresh.matched.losses[1]


def test_statistics_are_those_of_one_pass(resnets) -> None:
    _, a, _, (x, y) = resnets
    before = {k: t.clone() for k, t in a.state_dict().items()}
    state = reset_statistics(a, a.state_dict(), (x, y), batch_size=96)
    assert all(torch.equal(t, before[k]) for k, t in a.state_dict().items())
    first = a.resnet.embedder.embedder.convolution(x).detach()
    key = "resnet.embedder.embedder.normalization"
    assert torch.allclose(state[f"{key}.running_mean"], first.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(state[f"{key}.running_var"], first.var((0, 2, 3)), atol=1e-4)
    with pytest.raises(InputError, match="nothing to reset"):
        reset_statistics(nn.Linear(2, 2), nn.Linear(2, 2).state_dict(), (randn(3, 2), torch.zeros(3)))


def test_repair_gives_units_the_ends_statistics(pair) -> None:
    spec, a, b, (x, y) = pair
    ends = [a, weight_match(spec, a, b).apply(b)]
    merged = merge([a.state_dict(), ends[1]], None, [0.5, 0.5])
    state = repair(spec, a, ends, merged, (x, y), batch_size=400)
    clone = mlp(8, (48, 48), 4)

    def spread(weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        clone.load_state_dict(weights)
        with torch.no_grad():
            z = clone[3](torch.relu(clone[1](x)))
        return z.mean(0), z.std(0, correction=0)

    both = [spread(e if isinstance(e, dict) else e.state_dict()) for e in ends]
    goals = [torch.stack(v).mean(0) for v in zip(*both, strict=True)]
    for got, wanted, plain in zip(spread(state), goals, spread(merged), strict=True):
        assert torch.allclose(got, wanted, atol=1e-4)
        assert not torch.allclose(plain, wanted, atol=1e-2)
    assert torch.equal(state["5.weight"], merged["5.weight"])  # the logits' layer stays


def test_repair_is_for_networks_without_batch_norm(resnets) -> None:
    spec, a, b, data = resnets
    with pytest.raises(InputError, match="reset_statistics"):
        repair(spec, a, [a, b], a.state_dict(), data)
    bare = Stream()
    own = PermutationSpec.from_module(bare, randn(1, 1))
    with pytest.raises(InputError, match="no bias in"):
        repair(own, bare, [bare, bare], bare.state_dict(), (randn(4, 1), randn(4, 1)))


def test_hidden_units_of_a_language_model_are_found_again() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    net = GPT2LMHeadModel(
        GPT2Config(
            n_layer=1, n_embd=16, n_head=4, vocab_size=30, n_positions=8, bos_token_id=0, eos_token_id=0
        )
    ).eval()
    spec = PermutationSpec.from_module(net, {"input_ids": torch.arange(8)[None]})
    hidden = Permutation.random(spec, 5)
    assert recovered(weight_match(spec, net, hidden.apply(net)), hidden)
