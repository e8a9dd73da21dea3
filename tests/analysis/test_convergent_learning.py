"""Unit matching, sparse prediction and clusters on networks and data whose answers are known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gradmatch.analysis import cocluster, collect, match_units, rotated, sparse_predict, unit_report
from gradmatch.analysis._activations import Activations, Moments
from gradmatch.analysis._information import mutual_information
from gradmatch.analysis._lasso import lasso_path, violation
from gradmatch.analysis.convergent_learning import layer_report, match_all
from gradmatch.core.assign import Permutation, PermutationSpec
from gradmatch.core.checks import InputError
from gradmatch.core.distance import linear_cka
from gradmatch.weights import activation_match
from gradmatch.zoo import mlp


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def given(*nets: Tensor, samples: bool = False) -> Activations:
    """Activations of a layer "l" as if networks had given them."""
    rows = torch.cat([n.double() for n in nets], 1)
    halves = Moments.of(rows[::2]), Moments.of(rows[1::2])
    units = {"l": tuple(n.shape[1] for n in nets)}
    return Activations(("l",), units, {"l": halves}, {"l": rows} if samples else {})


def correlated(n: int = 400, d: int = 12, seed: int = 0) -> Tensor:
    """Units with common causes and spread variances."""
    z = randn(n, d, seed=seed)
    return (z @ randn(d, d, seed=seed + 1) * torch.linspace(0.5, 2, d)).double()


# --- moments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_streaming_moments_equal_numpy_for_any_split_and_order(offset: float) -> None:
    """E[x^2] - mu^2 in single precision would have nothing left of these correlations."""
    x = (correlated(301, 7) + offset).float()
    wanted = np.corrcoef(x.numpy().astype(float).T)
    for cuts in ([], [1, 2, 300], [50, 120, 121]):
        parts = [Moments.of(p) for p in torch.tensor_split(x, cuts)]
        for order in itertools.islice(itertools.permutations(parts), 6):
            total = Moments(7)
            for part in order:
                total = total.merge(part)
            found = total.products / torch.outer(total.deviation, total.deviation) / total.count
            assert np.abs(found.numpy() - wanted).max() < 1e-6
            assert total.count == 301


def test_collected_moments_are_those_of_the_outputs() -> None:
    torch.manual_seed(0)
    nets = [
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval() for _ in range(3)
    ]
    x = randn(30, 1, 8, 8)
    seen = collect(nets, DataLoader(TensorDataset(x, torch.zeros(30)), batch_size=7))
    assert seen.layers == ("1",)
    assert seen.networks == 3
    rows = [net[1](net[0](x)).detach().permute(0, 2, 3, 1).reshape(-1, 4) for net in nets]
    wanted = np.corrcoef(torch.cat(rows, 1).numpy().T)
    assert np.allclose(seen.correlation("1", 0, 2).numpy(), wanted[:4, 8:], atol=1e-6)
    assert seen.moments("1").count == 30 * 36
    assert seen.moments("1", 0).count == seen.moments("1", 1).count == 15 * 36
    whole = collect(nets, (x, torch.zeros(30)))
    assert torch.allclose(seen.moments("1").products, whole.moments("1").products, atol=1e-4)
    few = collect(nets, (x, torch.zeros(30)), positions=5, samples=40, post_activation=False)
    assert few.layers == ("0",)
    assert few.moments("0").count == 150
    assert few.samples["0"].shape == (40, 12)
    named = collect(nets, (x, torch.zeros(30)), layers=["3", "0"])
    assert named.units == {"3": (5, 5, 5), "0": (4, 4, 4)}
    assert not any(m._forward_hooks for net in nets for m in net.modules())


def test_tokens_and_transformers_models() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
    config = ViTConfig(**sizes, image_size=8, patch_size=4)
    nets = [ViTForImageClassification(config).eval() for _ in range(2)]
    layer = "vit.layers.0.mlp.fc1"
    seen = collect(nets, {"pixel_values": randn(20, 3, 8, 8)}, layers=[layer])
    assert seen.units[layer] == (12, 12)
    assert seen.moments(layer).count == 20 * 5
    assert len(match_units(seen, layer).a) == 12


def test_what_cannot_be_collected_is_refused() -> None:
    net, x = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU()), randn(6, 1, 8, 8)
    data = (x, torch.zeros(6))
    with pytest.raises(InputError, match=r"models\[1\] has 1 in train mode"):
        collect([net.eval(), nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU())], data)
    assert collect([net.train()], data, allow_train=True).units == {"2": (3,)}
    assert net.training
    with pytest.raises(InputError, match="has no module 'x'"):
        collect([net.eval()], data, layers=["x"])
    other = nn.Sequential(nn.Conv2d(1, 3, 5), nn.Identity(), nn.ReLU())
    with pytest.raises(InputError, match=r"layer '2' has \[16, 36\] positions"):
        collect([net, other], data)
    with pytest.raises(InputError, match="NaN"):
        collect([nn.Sequential(nn.Conv2d(1, 3, 3), nn.Sigmoid(), _Nan(), nn.ReLU())], data)
    with pytest.raises(InputError, match="no layer to read"):
        collect([nn.Sequential(nn.Linear(8, 2))], data)
    with pytest.raises(InputError, match="models is empty"):
        collect([], data)


class _Nan(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.nan


# --- one to one -----------------------------------------------------------------------------------------------


def test_a_permuted_copy_is_recovered_whatever_its_scales_and_shifts() -> None:
    torch.manual_seed(0)
    net = mlp(5, (24, 16), 3).eval()
    x = randn(200, 5)
    spec = PermutationSpec.from_module(net, x[:1])
    hidden = Permutation.random(spec, 3)
    other = mlp(5, (24, 16), 3).eval()
    other.load_state_dict(hidden.apply(net))
    with torch.no_grad():
        scale = torch.linspace(0.2, 5, 24)
        other[1].weight *= scale[:, None]
        other[1].bias *= scale
    seen = collect([net, other], (x, torch.zeros(200)), layers=["2"])
    found, back = match_units(seen, "2", 0, 1), match_units(seen, "2", 1, 0)
    living = found.a
    assert torch.equal(found.b, hidden.inverse().order["1"][living])
    assert torch.allclose(found.scores, torch.ones(len(living)).double(), atol=1e-6)
    order = found.permutation(spec, "1").order["1"]
    assert torch.equal(order[living], found.b)
    assert torch.equal(back.b, torch.tensor([int(living[found.b == u]) for u in back.a]))  # the inverse
    moved = found.permutation(spec, "1").apply(other)  # and it is the matching of weights' own object
    wanted = net.state_dict()["1.weight"][living] * scale[order[living]][:, None]
    assert torch.allclose(moved["1.weight"][living], wanted, atol=1e-5)


def test_matching_is_activation_matching() -> None:
    torch.manual_seed(1)
    a, b = mlp(5, (14,), 3).eval(), mlp(5, (14,), 3).eval()
    data = (randn(300, 5), torch.zeros(300))
    spec = PermutationSpec.from_module(a, data[0][:1])
    seen = collect([a, b], data)
    wanted = activation_match(spec, a, b, data, score="correlation").order["1"]
    assert torch.equal(match_units(seen, "2").b, wanted[match_units(seen, "2").a])


def test_matched_beats_greedy_and_semi_beats_matched() -> None:
    for seed in range(5):
        x, y = correlated(seed=seed), correlated(seed=seed + 50)
        y[:, :6] += 2 * x[:, :6]
        seen = given(x, y)
        table = seen.correlation("l", 0, 1)
        left, greedy = table.clone(), 0.0
        for _ in range(12):
            at = int(left.argmax())
            greedy += float(left.flatten()[at])
            left[at // 12], left[:, at % 12] = -torch.inf, -torch.inf
        one, semi = match_units(seen, "l"), match_units(seen, "l", how="semi")
        assert float(one.scores.sum()) >= greedy - 1e-12
        assert semi.mean >= one.mean
        assert torch.equal(semi.b, table.argmax(1))
        assert one.above(-2) == 1
        assert one.below(0.3) == float((one.scores < 0.3).double().mean())


def test_many_networks_at_once_equal_pair_by_pair() -> None:
    seen = given(*(correlated(seed=k) + correlated(seed=99) for k in range(4)))
    every = match_all(seen, "l")
    assert len(every) == 6
    for found, (a, b) in zip(every, itertools.combinations(range(4), 2), strict=True):
        alone = match_units(seen, "l", a, b)
        assert torch.equal(found.b, alone.b)
        assert torch.equal(found.scores, alone.scores)


def test_dead_units_are_listed_and_left_out() -> None:
    x = correlated()
    y = x.flip(1).clone()
    x[:, 3] = 7.0
    y[:, 0] = 0.0
    seen = given(x, y)
    found = match_units(seen, "l")
    assert found.dead_a.tolist() == [3]
    assert found.dead_b.tolist() == [0]
    assert 3 not in found.a.tolist()
    assert 0 not in found.b.tolist()
    assert not torch.isnan(seen.correlation("l", 0, 1)).any()
    assert torch.isfinite(sparse_predict(seen, "l", lambdas=(0.1,)).losses).all()
    assert sorted(found.permutation().order["l"].tolist()) == list(range(12))
    with pytest.raises(InputError, match="all units of layer 'l' of network 1 are dead"):
        match_units(given(x, torch.zeros(400, 3)), "l")


def test_widths_may_differ_and_opposites_count_if_asked() -> None:
    x = correlated()
    seen = given(x, x[:, [4, 2, 9]] * torch.tensor([1, -1, 1]))
    wide = match_units(seen, "l", absolute=True)
    assert int((wide.b >= 0).sum()) == 3
    assert wide.b[2] == 1
    assert wide.scores[wide.b < 0].tolist() == [0] * 9
    narrow = match_units(seen, "l", 1, 0, absolute=True)
    assert narrow.b.tolist() == [4, 2, 9]
    assert match_units(seen, "l", 1, 0).b.tolist() != [4, 2, 9]
    with pytest.raises(InputError, match="is no permutation"):
        narrow.permutation()
    with pytest.raises(InputError, match="is no permutation"):
        match_units(given(x, x), "l", how="semi").permutation()


def test_unknown_names_are_refused() -> None:
    seen = given(correlated(), correlated(seed=5))
    for call, message in (
        (lambda: match_units(seen, "m"), "layer is 'm'"),
        (lambda: match_units(seen, "l", 0, 2), "network is 2"),
        (lambda: match_units(seen, "l", how="best"), "how is 'best'"),
        (lambda: match_units(seen, "l", score="cka"), "score is 'cka'"),
        (lambda: match_units(seen, "l", score="mi"), "no activations were kept"),
    ):
        with pytest.raises(InputError, match=message):
            call()


# --- mutual information ---------------------------------------------------------------------------------------


def test_information_of_gaussian_units_follows_their_correlation() -> None:
    n = 20_000
    z = randn(n, 4)
    x = torch.stack([z[:, 0], z[:, 1]], 1)
    y = torch.stack([0.8 * z[:, 0] + 0.6 * z[:, 2], -0.5 * z[:, 1] + 0.75**0.5 * z[:, 3]], 1)
    found = mutual_information(x, y, 16)
    wanted = [-0.5 * np.log(1 - 0.8**2), -0.5 * np.log(1 - 0.5**2)]
    assert found.diagonal().tolist() == pytest.approx(wanted, rel=0.08)
    assert abs(float(found[0, 1])) < 2e-3  # less its bias of (16 - 1)^2 / 2n
    zeros = x.clamp_min(0)  # a ReLU's ties stay in one bin
    assert abs(float(mutual_information(zeros, randn(n, 1, seed=9), 16)[0, 0])) < 3e-3


def test_semi_matching_by_information_is_that_of_absolute_correlation() -> None:
    mix = randn(5, 5, seed=3)
    z = randn(8000, 5)
    seen = given(z, z @ mix * torch.tensor([1.0, -1, 1, -1, 1]), samples=True)
    by_mi = match_units(seen, "l", how="semi", score="mi")
    table = seen.correlation("l", 0, 1).abs()
    picked = table[torch.arange(5), by_mi.b]
    assert bool((picked > table.max(1).values - 0.03).all())
    copy = given(z, z[:, [3, 1, 4, 0, 2]], samples=True)
    assert torch.equal(match_units(copy, "l", score="mi").b, match_units(copy, "l").b)


# --- few to one -----------------------------------------------------------------------------------------------


def test_the_lasso_equals_sklearn_and_its_ends() -> None:
    from sklearn.linear_model import Lasso

    z = randn(300, 4).double()
    a = (z @ randn(4, 30, seed=1).double() + 0.2 * randn(300, 30, seed=2)).relu()  # ill conditioned
    b = (z @ randn(4, 5, seed=3).double()).relu()
    a, b = ((m - m.mean(0)) / m.std(0, correction=0) for m in (a, b))
    gram, cross = a.T @ a / 300, a.T @ b / 300
    lambdas = (0.3, 0.03, 0.003, 0.0)
    path = lasso_path(gram, cross, lambdas)
    for value, weights in zip(lambdas[:-1], path, strict=False):
        assert float(violation(gram, cross, weights, value / 2).max()) < 1e-7
        for t in range(5):
            model = Lasso(alpha=value / 2, fit_intercept=False, tol=1e-12, max_iter=200_000)
            assert np.allclose(weights[:, t].numpy(), model.fit(a.numpy(), b[:, t].numpy()).coef_, atol=1e-5)
    assert torch.allclose(path[-1], torch.linalg.lstsq(a, b).solution, atol=1e-6)
    largest = 2 * float(cross.abs().max())
    assert not lasso_path(gram, cross, [largest]).any()
    assert lasso_path(gram, cross, [0.99 * largest]).any()
    with pytest.raises(InputError, match="lambdas is -1"):
        lasso_path(gram, cross, [-1.0])


@pytest.mark.parametrize(("n", "repeated"), [(200, True), (20, False)])
def test_the_lasso_settles_where_units_repeat_or_outnumber_samples(n: int, repeated: bool) -> None:
    x = (randn(n, 6) @ randn(6, 30, seed=1) + 0.05 * randn(n, 30, seed=2)).double()
    if repeated:
        x[:, 5] = x[:, 6] = x[:, 3]
    y = x[:, :4] + 0.3 * randn(n, 4, seed=3)
    x, y = ((m - m.mean(0)) / m.std(0, correction=0) for m in (x.relu(), y))
    gram, cross = x.T @ x / n, x.T @ y / n
    lambdas = (0.3, 0.01, 1e-3)
    for value, weights in zip(lambdas, lasso_path(gram, cross, lambdas), strict=True):
        assert float(violation(gram, cross, weights, value / 2).max()) < 1e-7


def test_a_permuted_copy_needs_one_unit_with_a_shrunken_weight() -> None:
    x = correlated(600, 10)
    order = [4, 2, 9, 0, 1, 3, 8, 7, 5, 6]
    found = sparse_predict(given(x, x[:, order]), "l", lambdas=(0.2, 3.0, 0.0))
    assert found.nonzero[0].tolist() == [1] * 10
    assert found.weights[0].T.argmax(1).tolist() == order
    assert torch.allclose(
        found.weights[0].amax(0), torch.full((10,), 0.9).double(), atol=1e-6
    )  # 1 - lambda / 2
    assert torch.allclose(found.fit_losses[0], torch.full((10,), 0.01).double(), atol=1e-6)
    assert not found.weights[1].any()
    assert torch.allclose(found.losses[1], torch.ones(10).double())
    assert torch.allclose(found.fit_losses[2], torch.zeros(10).double(), atol=1e-9)
    assert torch.allclose(found.single, torch.zeros(10).double(), atol=1e-3)
    assert float(found.shuffled[2].mean()) > 1


def test_losses_are_those_of_the_held_out_half() -> None:
    x, y = correlated(200, 6), correlated(200, 4, seed=9)
    y[:, :2] += 3 * x[:, :2]
    found = sparse_predict(given(x, y), "l", lambdas=(0.1,))
    fit, test = (slice(h, None, 2) for h in (0, 1))

    def standard(m: Tensor, rows: slice) -> Tensor:
        return (m[rows] - m[fit].mean(0)) / m[fit].std(0, correction=0)

    residual = standard(y, test) - standard(x, test) @ found.weights[0]
    assert torch.allclose(found.losses[0], residual.square().mean(0) / standard(y, test).square().mean(0))
    c = standard(x, fit).T @ standard(y, fit) / 100
    best = c.abs().argmax(0)
    single = standard(y, test) - standard(x, test)[:, best] * c[best, torch.arange(4)]
    assert torch.allclose(found.single, single.square().mean(0) / standard(y, test).square().mean(0))


def test_fewer_samples_than_units_take_a_ridge_and_say_so() -> None:
    seen = given(randn(30, 40), randn(30, 5, seed=1))
    with pytest.warns(UserWarning, match="15 samples for 40 units; lambda 0 becomes the ridge"):
        found = sparse_predict(seen, "l", lambdas=(0.0,), ridge=0.5)
    assert torch.allclose(found.losses[0], found.ridge)
    with pytest.raises(InputError, match="lambdas is empty"):
        sparse_predict(seen, "l", lambdas=())
    with pytest.raises(InputError, match="fewer than two examples"):
        sparse_predict(given(randn(2, 3), randn(2, 3)), "l")


# --- rotations ------------------------------------------------------------------------------------------------


def test_rotation_keeps_the_covariance_and_breaks_the_match() -> None:
    local = randn(4000, 30).relu().double()  # independent units: as local as it gets
    x = local + 0.1 * randn(4000, 30, seed=2)
    seen = given(local, x)
    plain, turned = match_units(seen, "l"), rotated(seen, "l")
    assert plain.mean > 0.9
    assert turned.mean < 0.6
    # a rotated copy: every unit is a linear map of A's, yet none matches
    gram = (local - local.mean(0)).T @ (local - local.mean(0)) / 4000
    values, vectors = torch.linalg.eigh(gram)
    q = torch.linalg.qr(randn(30, 30, seed=4).double())[0]
    mixed = (local - local.mean(0)) @ (vectors / values.sqrt()) @ q @ (vectors * values.sqrt()).T
    assert torch.allclose(mixed.T @ mixed / 4000, gram, atol=1e-6)
    copy = given(local, mixed)
    assert match_units(copy, "l").mean < 0.6
    assert float(sparse_predict(copy, "l", lambdas=(1.0,), ridge=1e-9).ridge.max()) < 1e-6


def test_rotating_without_whitening_keeps_the_strong_directions() -> None:
    common = 2 * (randn(3000, 6) @ randn(6, 40, seed=7)).double()
    x, y = (common + randn(3000, 40, seed=s).double() for s in (1, 2))
    seen = given(x, y)
    assert rotated(seen, "l", whiten=False).mean > rotated(seen, "l").mean
    again = rotated(seen, "l", seed=5)
    assert torch.equal(again.b, rotated(seen, "l", seed=5).b)


# --- clusters -------------------------------------------------------------------------------------------------


def blocks(sizes: list[tuple[int, int]], n: int = 3000, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Units of two networks in groups with a common cause each."""
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for k, counts in enumerate(sizes):
        cause = randn(n, 1, seed=100 + k)
        for s, count in enumerate(counts):
            sides[s].append(cause + noise * randn(n, count, seed=200 + 2 * k + s))
    return torch.cat(sides[0], 1), torch.cat(sides[1], 1)


@pytest.mark.parametrize("n_clusters", [4, "eigengap"])
@pytest.mark.parametrize("affinity", ["absolute", "positive"])
def test_block_correlations_are_recovered_exactly(n_clusters: int | str, affinity: str) -> None:
    sizes = [(3, 2), (4, 4), (2, 5), (6, 3)]
    a, b = blocks(sizes)
    seen = given(a, b)
    found = cocluster(seen, "l", n_clusters=n_clusters, affinity=affinity, hierarchy=True)
    wanted, at = set(), [0, 0]
    for counts in sizes:
        wanted.add((tuple(range(at[0], at[0] + counts[0])), tuple(range(at[1], at[1] + counts[1]))))
        at = [at[0] + counts[0], at[1] + counts[1]]
    assert {(tuple(c.a.tolist()), tuple(c.b.tolist())) for c in found.clusters} == wanted
    assert [c.mean for c in found.clusters] == sorted((c.mean for c in found.clusters), reverse=True)
    assert all(0.8 < c.mean < 1 for c in found.clusters)
    assert all(float(c.angles[0]) < 0.4 for c in found.clusters)  # one shared direction each
    assert found.shared() == 1
    assert found.tree is not None
    assert found.tree.shape == (3, 4)


def test_a_permuted_copy_pairs_up_and_opposite_units_need_the_absolute_value() -> None:
    x = randn(2000, 6)
    seen = given(x, x[:, [2, 0, 1, 5, 3, 4]])
    found = cocluster(seen, "l", n_clusters=6, within=False)
    assert {(int(c.a), int(c.b)) for c in found.clusters} == {(2, 0), (0, 1), (1, 2), (5, 3), (3, 4), (4, 5)}
    assert all(float(c.angles.max()) < 1e-3 for c in found.clusters)
    a, b = blocks([(3, 3), (3, 3)])
    b[:, 3:] *= -1
    signed = given(a, b)
    assert cocluster(signed, "l", n_clusters=2).shared() == 1
    alone = cocluster(signed, "l", n_clusters=3, affinity="positive")
    assert alone.shared() == pytest.approx(0.5)


def test_principal_angles_equal_scipy() -> None:
    from scipy.linalg import subspace_angles

    x, y = correlated(500, 4), correlated(500, 3, seed=8)
    y[:, 0] += x[:, 1]
    found = cocluster(given(x, y), "l", n_clusters=1).clusters[0]
    wanted = subspace_angles(*((m - m.mean(0)).numpy() for m in (x, y)))
    assert np.allclose(np.sort(found.angles.numpy()), np.sort(wanted), atol=1e-6)


def test_clusters_that_cannot_be_are_refused() -> None:
    seen = given(correlated(), correlated(seed=3))
    with pytest.raises(InputError, match="n_clusters is 25"):
        cocluster(seen, "l", n_clusters=25)
    with pytest.raises(InputError, match="affinity is 'signed'"):
        cocluster(seen, "l", affinity="signed")


# --- the report -----------------------------------------------------------------------------------------------


def test_the_report_holds_what_its_parts_say() -> None:
    torch.manual_seed(0)
    nets = [mlp(6, (20, 16), 3).eval() for _ in range(3)]
    data = (randn(400, 6), torch.zeros(400))
    found = unit_report(nets, data)
    assert [(r.layer, r.networks) for r in found] == [
        (n, p) for n in ("2", "4") for p in ((0, 1), (0, 2), (1, 2))
    ]
    seen = collect(nets, data)
    line = layer_report(seen, "2", 0, 2)
    assert line == found[1]
    assert line.semi >= line.one2one > line.chance
    assert line.ridge < line.single
    with torch.no_grad():
        features = [torch.relu(net[1](data[0])) for net in nets]
    assert line.cka == pytest.approx(float(linear_cka(features[0], features[2])), abs=1e-5)
    with pytest.raises(InputError, match="at least two"):
        unit_report(nets[:1], data)


def test_moments_of_more_units_than_a_panel_are_whole():
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(90, 600, generator=g, dtype=torch.float64).relu()
    halves = [Moments(600), Moments(600)]
    for k, part in enumerate(rows.split(20)):
        halves[k % 2].add(part)
    for found in (halves[0].merge(halves[1]), Moments.of(rows)):
        own = rows - rows.mean(0)
        torch.testing.assert_close(found.products, own.T @ own, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.deviation, rows.std(0, correction=0), rtol=1e-10, atol=0)


def test_arrays_of_double_precision_are_read_by_models_of_single() -> None:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval() for _ in range(2)]
    x = torch.randn(40, 4, dtype=torch.float64)
    found, wanted = (collect(nets, (v, np.zeros(40))) for v in (x.numpy(), x.float()))
    assert torch.equal(found.moments("1").products, wanted.moments("1").products)


def test_units_of_one_dimensional_maps_are_channels_and_of_sequences_features() -> None:
    torch.manual_seed(0)
    line = nn.Sequential(
        nn.Conv1d(2, 5, 3), nn.BatchNorm1d(5), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3)
    ).eval()
    x = torch.randn(20, 2, 6)
    found = collect([line, line], x)
    assert found.units["2"] == (5, 5)
    assert found.moments("2").count == 20 * 4
    rows = line[:3](x).transpose(1, 2).reshape(-1, 5).detach().double()
    torch.testing.assert_close(found.moments("2").mean[:5], rows.mean(0))
    tokens = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Conv1d(2, 5, 3), nn.ReLU()).eval()
    assert collect([tokens], x).units == {"1": (7,), "3": (5,)}


def test_inputs_need_no_targets() -> None:
    net, x = mlp(4, (6,), 3).eval(), randn(23, 4)
    name = next(iter(collect([net], x).units))
    wanted = collect([net], (x, torch.zeros(23))).moments(name)
    for data in (x, DataLoader(TensorDataset(x), 5), DataLoader(x, 5), list(x.split(5))):  # type: ignore[arg-type]
        torch.testing.assert_close(collect([net], data).moments(name).products, wanted.products)
