"""Splits against brute force, gradients against autograd, encodings, inheritance, and whole searches."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from gradmatch.core.checks import InputError
from gradmatch.core.networks import build
from gradmatch.weights import CellSpace, FewShotNAS, GMSplitter, NASBench201Space, SearchSpace
from gradmatch.weights._partition import best_partition, searched
from gradmatch.weights._splitter import children, draw, full_encoding, softened
from gradmatch.weights._supernet_training import Recipe, Trainee

SPACE = CellSpace(inputs=12, width=6, classes=4)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batches(count: int = 3, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    return [(randn(size, 12, seed=k), torch.arange(size) % 4) for k in range(count)]


def data(n: int = 64) -> tuple[Tensor, Tensor]:
    y = torch.arange(n) % 4
    return randn(n, 12) + 2 * F.one_hot(y, 12), y


@pytest.fixture
def net() -> nn.Module:
    return build(SPACE.supernet, 0)


def by_hand(net: nn.Module, edge: int, rest: tuple[int, ...], x: Tensor, y: Tensor) -> Tensor:
    """Distances of one draw, op by op and pair by pair, on the parameters of all other edges."""
    own = set(net.edge_parameters(edge))
    shared = [p for n, p in net.named_parameters() if n not in own]
    rows = []
    for o in range(4):
        theta = F.one_hot(torch.tensor((*rest[:edge], o, *rest[edge + 1 :])), 4).float()
        grads = torch.autograd.grad(
            F.cross_entropy(net(x, theta), y), shared, allow_unused=True, materialize_grads=True
        )
        assert len(grads) == len(shared)
        rows.append(torch.cat([g.flatten() for g in grads]))
    found = torch.zeros(4, 4)
    for i, j in product(range(4), range(4)):
        if i != j:
            found[i, j] = 1 - rows[i] @ rows[j] / (rows[i].norm() * rows[j].norm() + 1e-6)
    return found


# --- distances -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorized", [True, False])
def test_distances_are_those_of_the_plain_loops(net, vectorized: bool) -> None:
    g = torch.Generator().manual_seed(0)
    rests = [draw(SPACE, full_encoding(SPACE), g) for _ in range(5)]
    loader = batches(2)
    splitter = GMSplitter(SPACE, repeat=5, vectorized=vectorized)
    split = splitter.choose(net, loader)
    for edge in range(4):
        wanted = sum(by_hand(net, edge, r, *loader[k % 2]) for k, r in enumerate(rests)) / 5
        assert torch.allclose(split.distances[edge], wanted, atol=1e-5)


def test_distances_are_symmetric_bounded_and_zero_on_the_diagonal(net) -> None:
    for edge in range(4):
        d = GMSplitter(SPACE, repeat=4).distances(net, edge, batches())
        assert torch.equal(d, d.T)
        assert torch.equal(d.diagonal(), torch.zeros(4))
        assert float(d.min()) >= 0
        assert float(d.max()) <= 2


def test_copies_of_an_operation_are_at_no_distance_and_zero_cuts_off(net) -> None:
    for edge in net.cell.values():
        edge.ops[3] = copy.deepcopy(edge.ops[2])
    steep = GMSplitter(SPACE, repeat=6, loss=lambda out, y: 1e3 * F.cross_entropy(out, y))
    d = steep.distances(net, 0, batches())
    assert float(d[2, 3]) < 1e-5  # 1e-6 / |g|^2 and rounding
    assert float(d[0, 2]) > 0.01
    alone = GMSplitter(SPACE, repeat=1).distances(net, 3, [(torch.zeros(4, 12), torch.arange(4))])
    assert torch.isfinite(alone).all()


def test_other_distances(net) -> None:
    from gradmatch.core.distance import gradient_distance

    rest = draw(SPACE, full_encoding(SPACE), torch.Generator().manual_seed(0))
    x, y = batches(1)[0]
    own = set(net.edge_parameters(1))
    lists = []
    for o in range(4):
        theta = F.one_hot(torch.tensor((rest[0], o, *rest[2:])), 4).float()
        loss = F.cross_entropy(net(x, theta), y)
        grads = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True, materialize_grads=True)
        lists.append([g * (n not in own) for (n, _), g in zip(net.named_parameters(), grads, strict=True)])
    for name, kind in (("mse", "mse"), ("filter", "filter_cosine")):
        d = GMSplitter(SPACE, repeat=1, distance=name).distances(net, 1, [(x, y)])
        for i, j in ((0, 1), (2, 3), (1, 3)):
            assert float(d[i, j]) == pytest.approx(
                float(gradient_distance(lists[i], lists[j], kind)), rel=1e-3, abs=1e-5
            )


def test_soft_gradients_weigh_operations(net) -> None:
    alpha = randn(4, 4)
    soft = GMSplitter(SPACE, repeat=1, hard=False, distance="mse")
    x, y = batches(1)[0]
    d = soft.distances(net, 0, [(x, y)], alpha=alpha)
    theta, own = torch.softmax(alpha, 1), set(net.edge_parameters(0))
    shared = [p for n, p in net.named_parameters() if n not in own]
    rows = []
    for o in (1, 2):
        one = theta.clone()
        one[0] = 0
        one[0, o] = theta[0, o]
        grads = torch.autograd.grad(
            F.cross_entropy(net(x, one), y), shared, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([g.flatten() for g in grads]))
    assert float(d[1, 2]) == pytest.approx(float((rows[0] - rows[1]).square().sum()), rel=1e-3)


def test_networks_are_left_as_found(net) -> None:
    space = NASBench201Space(channels=4, cells=1, inputs=1)

    class Tracked(NASBench201Space):
        def supernet(self) -> nn.Module:
            made = super().supernet()
            made.stem[1] = nn.BatchNorm2d(4)
            return made

    tracked = build(Tracked(channels=4, cells=1, inputs=1).supernet, 0).eval()
    state = {k: v.clone() for k, v in tracked.state_dict().items()}
    images = [(randn(6, 1, 8, 8), torch.arange(6))]
    before = torch.random.get_rng_state()
    GMSplitter(space, repeat=1).choose(tracked, images)
    assert all(torch.equal(v, state[k]) for k, v in tracked.state_dict().items())  # running statistics too
    assert tracked.stem[1].track_running_stats
    assert not tracked.training
    assert all(p.grad is None for p in tracked.parameters())
    GMSplitter(SPACE, repeat=2).choose(net, batches())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_more_draws_less_spread_and_seeds_repeat(net) -> None:
    def spread(repeat: int) -> float:
        found = [GMSplitter(SPACE, repeat=repeat, seed=s).distances(net, 1, batches()) for s in range(6)]
        return float(torch.stack(found).std(0).mean())

    assert spread(16) < 0.7 * spread(1)
    a, b = (GMSplitter(SPACE, repeat=3, seed=5).choose(net, batches()) for _ in range(2))
    assert torch.equal(a.distances, b.distances)


def test_confidence_stops_early_with_the_same_decision(net) -> None:
    net.head.weight.data *= 3
    whole = GMSplitter(SPACE, repeat=80).choose(net, batches())
    early = GMSplitter(SPACE, repeat=80, confidence=0.9).choose(net, batches())
    assert early.draws < 80
    assert early.edge == whole.edge


# --- partitions ----------------------------------------------------------------------------------------------


def symmetric(n: int, seed: int) -> Tensor:
    d = torch.rand(n, n, generator=torch.Generator().manual_seed(seed))
    d = d + d.T
    return d - torch.diag(d.diagonal())


@pytest.mark.parametrize("n", [5, 8])
@pytest.mark.parametrize("seed", range(4))
def test_partition_is_the_best_of_all(n: int, seed: int) -> None:
    d = symmetric(n, seed)
    best = min(
        sum(float(d[i, j]) for i in range(n) for j in range(i) if labels[i] == labels[j])
        for labels in product((0, 1), repeat=n)
        if 2 <= sum(labels) <= n - 2
    )
    groups, within = best_partition(d, 2)
    assert within == pytest.approx(best, abs=1e-6)
    assert within == pytest.approx(
        sum(float(d[i, j]) for g in groups for i in g for j in g if i < j), abs=1e-6
    )
    assert sorted(i for g in groups for i in g) == list(range(n))


def test_sizes_of_groups() -> None:
    assert {len(g) for g in best_partition(symmetric(5, 0), 2)[0]} == {2, 3}
    assert {len(g) for g in best_partition(symmetric(3, 0), 2)[0]} == {1, 2}
    far = torch.ones(4, 4) - torch.eye(4)
    far[3] = far[:, 3] = 9
    far[3, 3] = 0
    assert best_partition(far, 2, singletons=True)[0] == ((0, 1, 2), (3,))
    assert min(len(g) for g in best_partition(far, 2)[0]) == 2
    assert len(best_partition(symmetric(6, 1), 3)[0]) == 3


def test_many_operations_are_searched() -> None:
    d = symmetric(9, 3)
    labels = searched(d.double(), 3, 2)
    within = ((labels[:, :, None] == labels[:, None, :]) * d.double().triu(1)).sum((1, 2)).min()
    assert float(within) == pytest.approx(best_partition(d, 3)[1], abs=1e-6)
    clear = torch.full((12, 12), 5.0)
    clear[:6, :6] = clear[6:, 6:] = 0.1
    assert best_partition(clear, 2)[0] == (tuple(range(6)), tuple(range(6, 12)))


def test_scores_are_total_less_within_and_know_no_order(net) -> None:
    split = GMSplitter(SPACE, repeat=3).choose(net, batches())
    for e in range(4):
        d = split.distances[e]
        assert split.scores[e] == pytest.approx(float(d.triu(1).sum()) - best_partition(d, 2)[1], abs=1e-5)
        order = torch.randperm(4, generator=torch.Generator().manual_seed(e))
        assert best_partition(d[order][:, order], 2)[1] == pytest.approx(best_partition(d, 2)[1], abs=1e-5)
    assert split.scores[split.edge] == max(split.scores)
    other = GMSplitter(SPACE, repeat=3, edge_score="within").choose(net, batches())
    assert other.scores[other.edge] == max(other.scores)
    assert other.scores[0] == pytest.approx(-best_partition(split.distances[0], 2)[1], abs=1e-5)


def test_distances_that_are_all_zero_still_give_an_edge() -> None:
    splitter = GMSplitter(SPACE)
    assert splitter._decide(torch.zeros(4, 4, 4), [1, 2])[0] == 1


# --- encodings, sampling, training ---------------------------------------------------------------------------


def test_children_partition_the_space(net) -> None:
    splitter = GMSplitter(SPACE, repeat=2)
    full = full_encoding(SPACE)
    first = splitter.split(net, batches())
    leaves = [leaf for child in first for leaf in splitter.split(net, batches(), child)]
    edge = next(e for e in range(4) if not torch.equal(first[0][e], full[e]))
    assert not bool((first[0][edge] & first[1][edge]).any())
    assert torch.equal(first[0] | first[1], full)
    assert torch.equal(first[0][[e for e in range(4) if e != edge]], full[[e for e in range(4) if e != edge]])
    assert len(leaves) == 4
    for genotype in product(range(4), repeat=4):
        assert sum(all(bool(leaf[e, g]) for e, g in enumerate(genotype)) for leaf in leaves) == 1


def test_samples_respect_the_encoding_and_are_connected() -> None:
    encoding = full_encoding(SPACE)
    encoding[0] = torch.tensor([True, False, False, True])
    encoding[3] = torch.tensor([True, True, False, False])
    g = torch.Generator().manual_seed(0)
    seen = {draw(SPACE, encoding, g) for _ in range(300)}
    assert all(x[0] in (0, 3) and x[3] in (0, 1) and SPACE.connected(x) for x in seen)
    assert len(seen) > 30
    theta = softened(randn(4, 4), encoding)
    assert torch.allclose(theta.sum(1), torch.ones(4))
    assert not bool(theta[~encoding].any())


def test_219_of_256_cells_are_connected() -> None:
    every = list(product(range(4), repeat=4))
    assert sum(CellSpace().connected(x) for x in every) == 219
    x = randn(3, 12)
    net = build(SPACE.supernet, 0)
    one_hot = F.one_hot(torch.tensor((2, 1, 3, 0)), 4).float()
    assert torch.allclose(net(x, (2, 1, 3, 0)), net(x, one_hot), atol=1e-6)
    assert isinstance(SPACE, SearchSpace)


def test_children_inherit_everything_and_a_restart_nothing(net) -> None:
    recipe = Recipe(lr=0.1)
    parent = Trainee(SPACE, net, full_encoding(SPACE), recipe, 4)
    g = torch.Generator().manual_seed(0)
    parent.epoch(batches(), iter(batches()), False, 0.0, g)
    encoding = children(full_encoding(SPACE), 1, [(0, 1), (2, 3)])[0]
    child = parent.child(encoding)
    x = batches(1)[0][0]
    assert torch.equal(child.net(x, (1, 1, 2, 0)), parent.net(x, (1, 1, 2, 0)))
    momenta = [
        s["momentum_buffer"]
        for s in child.optimizer.state_dict()["state"].values()
        if s.get("momentum_buffer") is not None
    ]
    assert momenta
    assert any(bool(m.any()) for m in momenta)
    assert child.scheduler.get_last_lr() == parent.scheduler.get_last_lr()
    assert child.scheduler.get_last_lr()[0] < 0.1
    before = parent.net.head.weight.clone()
    child.epoch(batches(), iter(batches()), False, 0.0, g)
    assert torch.equal(parent.net.head.weight, before)
    search = {
        r: FewShotNAS(
            SPACE,
            [(1, 2)],
            final_epochs=1,
            restart=r,
            recipe=Recipe(lr=1e-9, lr_min=0, weight_decay=0),
            splitter={"repeat": 1},
        ).fit(data(), data())
        for r in ("final", "never")
    }
    root, leaf = (lambda t: (t.trainee.net.head.weight, t.leaves()[0].trainee.net.head.weight))(
        search["never"].tree
    )
    assert torch.allclose(root, leaf, atol=1e-6)
    root, leaf = (lambda t: (t.trainee.net.head.weight, t.leaves()[0].trainee.net.head.weight))(
        search["final"].tree
    )
    assert not torch.allclose(root, leaf, atol=1e-3)


@pytest.mark.parametrize("search", ["darts", "darts2", "snas"])
def test_alphas_wait_for_the_last_split(search: str) -> None:
    trainee = Trainee(SPACE, build(SPACE.supernet, 0), full_encoding(SPACE), Recipe(search=search), 2)
    g = torch.Generator().manual_seed(0)
    trainee.epoch(batches(), iter(batches()), False, 0.0, g)
    assert not bool(trainee.alpha.any())
    trainee.epoch(batches(), iter(batches()), True, 0.5, g)
    assert bool(trainee.alpha.any())
    assert len(trainee.candidates(9, g)) == 1


def test_second_order_darts_is_the_gradient_through_a_step() -> None:
    net = build(SPACE.supernet, 0).double()
    trainee = Trainee(
        SPACE, net, full_encoding(SPACE), Recipe(search="darts2", lr=0.05), 1, randn(4, 4).double()
    )
    (x, y), (vx, vy) = ((x.double(), y) for x, y in batches(2))
    params = dict(net.named_parameters())
    alpha = trainee.alpha.detach().clone().requires_grad_()
    theta = torch.softmax(alpha, 1)
    grads = torch.autograd.grad(F.cross_entropy(net(x, theta), y), list(params.values()), create_graph=True)
    ahead = {n: p - 0.05 * g for (n, p), g in zip(params.items(), grads, strict=True)}
    loss = F.cross_entropy(torch.func.functional_call(net, ahead, (vx, theta)), vy)
    (wanted,) = torch.autograd.grad(loss, alpha)
    trainee._learn_alpha((x, y), (vx, vy), True)
    assert torch.allclose(trainee.alpha.grad, wanted, atol=1e-4 * float(wanted.abs().max()) + 1e-7)


# --- searches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", ["rsps", "darts", "snas"])
def test_a_search_finds_an_architecture(search: str, tmp_path) -> None:
    seen = []
    nas = FewShotNAS(
        SPACE,
        [(1, 2), (2, 2)],
        final_epochs=2,
        search=search,
        splitter={"repeat": 2},
        select_samples=6,
        batch_size=16,
        progress=lambda d, t: seen.append((d, t)),
    )
    before = torch.random.get_rng_state()
    found = nas.fit(data(), data())
    assert torch.equal(before, torch.random.get_rng_state())
    assert found.epochs == 1 + 2 + 8
    assert seen[-1] == (11, 11)
    assert len(found.tree.leaves()) == 4
    assert found.scores[found.best_genotype] == max(found.scores.values())
    assert set(found.words()) == set(SPACE.edges)
    again = FewShotNAS(
        SPACE,
        [(1, 2), (2, 2)],
        final_epochs=2,
        search=search,
        splitter={"repeat": 2},
        select_samples=6,
        batch_size=16,
    ).fit(data(), data())
    assert again.scores == found.scores
    assert '"split"' in found.save(tmp_path / "found.json").read_text()
    child = SPACE.child(found.best_genotype)
    assert child(randn(2, 12)).shape == (2, 4)


def test_exhaustive_gives_one_net_for_each_operation_and_random_balanced_groups() -> None:
    few = FewShotNAS(SPACE, [(1, 4)], final_epochs=1, criterion="exhaustive", select_samples=2).fit(
        data(), data()
    )
    edge = few.tree.split.edge
    assert sorted(leaf.encoding[edge].nonzero().flatten().tolist() for leaf in few.tree.leaves()) == [
        [0],
        [1],
        [2],
        [3],
    ]
    some = FewShotNAS(SPACE, [(1, 2)], final_epochs=1, criterion="random", select_samples=2).fit(
        data(), data()
    )
    assert [len(g) for g in some.tree.split.groups] == [2, 2]


def test_loaders_are_walked_through_and_not_made_anew_for_each_batch() -> None:
    class Counted(TensorDataset):
        reads = 0

        def __getitem__(self, index):
            Counted.reads += 1
            return super().__getitem__(index)

    loader = DataLoader(Counted(*data()), batch_size=16)
    found = FewShotNAS(SPACE, [], final_epochs=3, select_samples=2).fit(loader, data())
    assert found.epochs == 3
    assert Counted.reads == 3 * 64


def test_nas_bench_201() -> None:
    space = NASBench201Space(channels=4, cells=1, inputs=1, classes=3)
    name = "|nor_conv_3x3~0|+|none~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_1x1~1|skip_connect~2|"
    genotype = space.parse(name)
    assert space.name(genotype) == name
    assert [space.ops[0][g] for g in genotype] == [
        "nor_conv_3x3",
        "none",
        "avg_pool_3x3",
        "skip_connect",
        "nor_conv_1x1",
        "skip_connect",
    ]
    with pytest.raises(InputError, match="as NAS-Bench-201 writes it"):
        space.parse("|conv~0|")
    net, x = build(space.supernet, 0), randn(4, 1, 8, 8)
    assert torch.allclose(net(x, genotype), net(x, F.one_hot(torch.tensor(genotype), 5).float()), atol=1e-5)
    assert build(lambda: space.child(genotype), 0)(x).shape == (4, 3)
    own = [set(net.edge_parameters(e)) for e in range(6)]
    assert all(not a & b for i, a in enumerate(own) for b in own[:i])
    assert all(
        len(o) == 3 * 2 for o in own
    )  # two convolutions in each of three cells, norms without parameters
    split = GMSplitter(space, repeat=1).choose(net, [(x, torch.arange(4) % 3)])
    assert {len(g) for g in split.groups} == {2, 3}
    assert not space.connected((0, 0, 1, 0, 1, 1))


def test_pooling_is_the_mean_of_the_pixels_there_are() -> None:
    pool = NASBench201Space().supernet().stacks[0][0]["1<-0"].ops[4]
    for shape in ((2, 3, 5, 7), (1, 2, 2, 1)):
        x = randn(*shape).double().requires_grad_()
        wanted = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        assert torch.allclose(pool(x), wanted, atol=1e-14)
        slopes = [torch.autograd.grad(y.square().sum(), x)[0] for y in (pool(x), wanted)]
        assert torch.allclose(*slopes, atol=1e-13)


@pytest.mark.parametrize("vectorized", [True, False])
def test_frozen_parameters_are_no_shared_ones(vectorized: bool) -> None:
    frozen = build(SPACE.supernet, 0)
    frozen.stem.requires_grad_(False)
    splitter = GMSplitter(SPACE, repeat=2, vectorized=vectorized)
    found = splitter.distances(frozen, 1, batches())

    class StemOnEdge(CellSpace):  # the same columns left out by another way
        def supernet(self) -> nn.Module:
            net = super().supernet()
            own = net.edge_parameters
            net.edge_parameters = lambda e: [*own(e), "stem.1.weight", "stem.1.bias"]
            return net

    space = StemOnEdge(SPACE.inputs, SPACE.width, SPACE.classes)
    wanted = GMSplitter(space, repeat=2, vectorized=vectorized).distances(
        build(space.supernet, 0), 1, batches()
    )
    assert torch.allclose(found, wanted, atol=1e-6)


class OtherCells(CellSpace):
    """With dropout, and an operation that branches on data, which vmap cannot batch."""

    def op(self, k: int) -> nn.Module:
        d = self.width
        return (
            nn.Sequential(nn.Linear(d, d), nn.Dropout(0.5)),
            nn.Identity(),
            Branching(d, d),
            nn.Linear(d, d),
        )[k]


class Branching(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x if bool((x > 1e9).any()) else super().forward(x)


def test_dropout_rests_and_layers_that_cannot_be_batched_run_one_by_one() -> None:
    space = OtherCells(SPACE.inputs, SPACE.width, SPACE.classes)
    net = build(space.supernet, 0).train()
    state = torch.get_rng_state()
    found, loops = (
        GMSplitter(space, repeat=2, vectorized=v).distances(net, 1, batches()) for v in (None, False)
    )
    assert torch.equal(found, loops)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in net.modules())


def test_a_search_named_beside_a_recipe_counts() -> None:
    recipe = Recipe(lr=0.1, search="snas")
    assert FewShotNAS(SPACE, [], search="darts", recipe=recipe).recipe == Recipe(lr=0.1, search="darts")
    assert FewShotNAS(SPACE, [], recipe=recipe).recipe == recipe
    assert FewShotNAS(SPACE, []).recipe.search == "rsps"
    for search, decay in (("rsps", 1e-4), ("darts", 5e-4), ("snas", 5e-4)):  # as published for NAS-Bench-201
        chosen = FewShotNAS(SPACE, [], search=search).recipe
        trainee = Trainee(SPACE, build(SPACE.supernet, 0), full_encoding(SPACE), chosen, 2)
        assert trainee.optimizer.param_groups[0]["weight_decay"] == decay
    assert Recipe(weight_decay=0.0).decay == 0
    with pytest.raises(InputError, match="weight_decay is -1"):
        Recipe(weight_decay=-1)


# --- refusals ------------------------------------------------------------------------------------------------


class OneEdge(CellSpace):
    def __init__(self) -> None:
        super().__init__()
        self.edges, self.ops = ("a",), (self.OPS,)


def done() -> Tensor:
    encoding = full_encoding(SPACE)
    encoding[:, 0] = False
    return encoding


def empty() -> Tensor:
    encoding = full_encoding(SPACE)
    encoding[2] = False
    return encoding


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda n: GMSplitter(SPACE, n_groups=5).choose(n, batches()),
            "n_groups is 5, but no edge left has more than 4",
        ),
        (lambda n: GMSplitter(SPACE).choose(n, batches(), done()), "every edge is split already"),
        (lambda n: GMSplitter(SPACE).choose(n, batches(), empty()), "allows no operation on edge 2"),
        (
            lambda n: GMSplitter(SPACE).choose(n, batches(), torch.ones(3, 4, dtype=torch.bool)),
            r"shape \(3, 4\)",
        ),
        (lambda n: GMSplitter(SPACE).choose(n, []), "loader is empty"),
        (
            lambda n: GMSplitter(SPACE, repeat=1).choose(
                n, [(torch.full((4, SPACE.inputs), torch.nan), torch.arange(4))]
            ),
            "gradients of the supernet",
        ),
        (lambda n: GMSplitter(OneEdge()), "without a second nothing is shared"),
        (lambda n: GMSplitter(nn.Linear(2, 2)), "must have edges, ops"),
        (lambda n: GMSplitter(SPACE, distance="l1"), "distance is 'l1'"),
        (lambda n: GMSplitter(SPACE, edge_score="sum"), "edge_score is 'sum'"),
        (lambda n: GMSplitter(SPACE, repeat=0), "repeat is 0"),
        (lambda n: FewShotNAS(SPACE, [(2, 2), (1, 2)]), "each must come after"),
        (lambda n: FewShotNAS(SPACE, [(1, 7)]), "splits groups is 7"),
        (lambda n: FewShotNAS(SPACE, criterion="best"), "criterion is 'best'"),
        (lambda n: FewShotNAS(SPACE, restart="all"), "restart is 'all'"),
        (lambda n: FewShotNAS(SPACE, search="ga"), "search is 'ga'"),
        (lambda n: best_partition(torch.zeros(3, 3), 4), "n_groups is 4"),
    ],
)
def test_refuses(net, call, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call(net)
