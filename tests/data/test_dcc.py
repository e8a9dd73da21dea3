"""DCC against loops written out, closed forms and finite differences."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from gradmatch.core.augment import SiameseAugment
from gradmatch.core.checks import InputError
from gradmatch.core.distance import gradient_distance
from gradmatch.core.examples import Examples
from gradmatch.core.networks import build
from gradmatch.core.ntk import empirical_ntk
from gradmatch.data._gradient_matching import Learner
from gradmatch.data.dcc import DCC, condense, kernel_velocity, loops

C = 3


def _data(n: int = 30, dtype: torch.dtype = torch.float32, size: int = 6) -> Examples:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % C
    x = torch.randn(n, 1, size, size, generator=g, dtype=dtype) + y[:, None, None, None]
    return Examples(x, y, C)


def _smooth(outputs: int = C) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, outputs)
    )


def _small() -> nn.Sequential:
    return _smooth().double()


def _batch_norm() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, C)
    )


def _held(network, distance: str = "filter_cosine", seed: int = 3):
    module = build(network, seed)
    params = {k: p.detach() for k, p in module.named_parameters()}
    return Learner.of(module, distance), params, dict(module.named_buffers())


def _classes(data: Examples) -> list[Tensor]:
    return [data.x[data.of_class(c)] for c in range(data.classes)]


def _run(data: Examples | None = None, network=_smooth, **options):
    settings = {"per_class": 2, "steps": 5, "inner_loop": 3, "net_epochs": 2, "batch_real": 4} | options
    return DCC(**settings).distill(_data() if data is None else data, network)


# --- the gradient in the images ------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["filter_cosine", "cosine", "mse"])
@pytest.mark.parametrize("strategy", [None, "scale_rotate_color"])
@pytest.mark.parametrize("contrastive", [True, False])
def test_image_gradient_equals_finite_differences(contrastive: bool, strategy, distance: str) -> None:
    learner, params, buffers = _held(_small, distance)
    data = _data(dtype=torch.float64)
    images = [x[:2].clone() for x in _classes(data)]
    views = None
    if strategy:
        g = torch.Generator().manual_seed(1)
        views = [SiameseAugment(strategy).draw((6, 6), g) for _ in range(C)]

    def loss(s: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return learner.image_gradients(params, buffers, _classes(data), s, contrastive, views=views)

    direction = [
        torch.randn(s.shape, generator=torch.Generator().manual_seed(c), dtype=torch.float64)
        for c, s in enumerate(images)
    ]
    slope = sum(float((g * d).sum()) for g, d in zip(loss(images)[1], direction, strict=True))
    h = 1e-5
    ends = [float(loss([s + k * d for s, d in zip(images, direction, strict=True)])[0]) for k in (h, -h)]
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6)
    assert abs(slope) > 1e-4 or distance == "mse"


def _naive_loss(module: nn.Module, real: list[Tensor], synthetic: list[Tensor], contrastive: bool) -> Tensor:
    """Both losses as the paper writes them: a real and a synthetic gradient of every class, then D."""
    params = list(module.parameters())

    def gradient(x: Tensor, c: int, graph: bool):
        loss = F.cross_entropy(module(x), torch.full((len(x),), c))
        return torch.autograd.grad(loss, params, create_graph=graph)

    g_real = [gradient(x, c, False) for c, x in enumerate(real)]
    g_syn = [gradient(x, c, True) for c, x in enumerate(synthetic)]
    if not contrastive:
        return sum(gradient_distance(a, b) for a, b in zip(g_syn, g_real, strict=True))
    mean = [[sum(gs) / len(gs) for gs in zip(*side, strict=True)] for side in (g_syn, g_real)]
    return gradient_distance(*mean)


@pytest.mark.parametrize("contrastive", [True, False])
def test_losses_equal_the_written_out_ones_also_for_unequal_batches(contrastive: bool) -> None:
    learner, params, buffers = _held(_small)
    real = [x[: 4 + 3 * c] for c, x in enumerate(_classes(_data(60, torch.float64)))]
    images = [x[-2:].clone() for x in real]
    got, grads = learner.image_gradients(params, buffers, real, images, contrastive)
    leaves = [s.clone().requires_grad_() for s in images]
    expected = _naive_loss(build(_small, 3), real, leaves, contrastive)
    torch.testing.assert_close(got, expected.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(grads, list(torch.autograd.grad(expected, leaves)), rtol=1e-8, atol=1e-12)


def test_passes_over_the_real_side_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, params, buffers = _held(_small)
    real = [x[: 3 + 2 * c] for c, x in enumerate(_classes(_data(60, torch.float64)))]
    whole = learner.real_gradient(params, buffers, real, range(C))
    monkeypatch.setattr("gradmatch.data._gradient_matching.CHUNK", 4)
    torch.testing.assert_close(
        learner.real_gradient(params, buffers, real, range(C)), whole, rtol=1e-10, atol=1e-14
    )


def test_with_a_single_class_the_two_losses_are_one() -> None:
    learner, params, buffers = _held(lambda: _smooth(5).double())
    data = _data(dtype=torch.float64)
    real, images = [_classes(data)[1]], [_classes(data)[2][:2]]
    con, cls = (learner.image_gradients(params, buffers, real, images, k, classes=[1]) for k in (True, False))
    assert torch.equal(con[0], cls[0])
    assert torch.equal(con[1][0], cls[1][0])
    assert float(con[0]) > 0.1


def test_mean_gradient_of_all_images_is_the_mean_over_classes() -> None:
    learner, params, buffers = _held(_small, "mse")
    classes = [x[:4] for x in _classes(_data(dtype=torch.float64))]
    y = torch.arange(C).repeat_interleave(4)
    whole = learner.gradient(params, buffers, torch.cat(classes), y)
    apart = [learner.gradient(params, buffers, x, torch.full((4,), c)) for c, x in enumerate(classes)]
    for got, parts in zip(whole, zip(*apart, strict=True), strict=True):
        torch.testing.assert_close(got, sum(parts) / C, rtol=0, atol=1e-12)


def test_a_shared_part_leaves_the_contrastive_gradient_and_stays_in_each_class() -> None:
    """Linear softmax at W = 0: gradient of class c is (p - e_c) mu_c^T with p = 1/C, mu_c = b + s_c."""
    g = torch.Generator().manual_seed(0)
    s, b = (
        torch.randn(C, 5, generator=g, dtype=torch.float64),
        torch.randn(5, generator=g, dtype=torch.float64),
    )
    network = nn.Linear(5, C, bias=False).double()
    learner = Learner.of(network, "mse")
    zero = {"weight": torch.zeros(C, 5, dtype=torch.float64)}
    p = torch.full((C,), 1 / C, dtype=torch.float64)
    means: list[Tensor] = []
    for strength in (0.0, 100.0):
        mu = strength * b + s
        batches = [mu[c].expand(4, 5) for c in range(C)]
        closed = [torch.outer(p - F.one_hot(torch.tensor(c), C), mu[c]) for c in range(C)]
        for c in range(C):
            got = learner.real_gradient(zero, {}, [batches[c]], [c])[0]
            torch.testing.assert_close(got, closed[c], rtol=1e-10, atol=1e-12)
            assert (float((got - torch.outer(p - F.one_hot(torch.tensor(c), C), s[c])).norm()) > 1) == (
                strength > 0
            )
        means += learner.real_gradient(zero, {}, batches, range(C))
        torch.testing.assert_close(means[-1], sum(closed) / C, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(means[0], means[1], rtol=0, atol=1e-6)


def test_dead_filters_cost_one_each_and_give_finite_gradients() -> None:
    learner, params, buffers = _held(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.ReLU(), nn.Linear(4, C))
    )
    params = params | {"1.bias": torch.tensor([-1e3, -1e3, 5.0, 5.0])}
    real = _classes(_data())
    loss, grads = learner.image_gradients(params, buffers, real, [x.clone() for x in real], True)
    assert float(loss) == pytest.approx(2, abs=0.05)  # equal sets: only the two dead rows cost
    assert all(bool(torch.isfinite(g).all()) for g in grads)


# --- the schedule --------------------------------------------------------------------------------------------


def test_warm_up_truth_table() -> None:
    published = DCC()
    assert (published.outer_loop, published.inner_loop, published.steps) == (1000, 10, 10_000)
    assert (published.outer_warmup, published.inner_warmup) == (250, 10)
    dcc = DCC(per_class=20)
    table = {(0, 0): False, (0, 9): False, (0, 10): True, (249, 9): False, (249, 10): True, (250, 0): True}
    assert {k: dcc.contrastive_at(*k) for k in table} == table
    assert DCC(per_class=20, outer_warmup=0).contrastive_at(0, 0)
    assert DCC(per_class=20, inner_warmup=0).contrastive_at(0, 0)
    assert not any(DCC(per_class=20, method="dc").contrastive_at(o, i) for o in (0, 999) for i in (0, 19))


def test_full_warm_up_is_plain_dc_bit_for_bit_and_none_is_not() -> None:
    dc = _run(method="dc").images
    assert torch.equal(dc, _run(outer_warmup=2, inner_warmup=3).images)
    pure, part = _run(outer_warmup=0).images, _run(outer_warmup=1, inner_warmup=1).images
    assert not torch.equal(dc, pure)
    assert not torch.equal(part, pure)
    assert torch.equal(pure, _run(inner_warmup=0).images)


@pytest.mark.parametrize("method", ["dc", "dcc"])
def test_a_whole_run_equals_the_loop_written_out(method: str) -> None:
    """Fresh network, image update by SGD with momentum, training on S but after the last update of a network."""
    data, inner, epochs = _data(dtype=torch.float64), 3, 2
    names: list[int] = []

    def network() -> nn.Module:  # network k of the run has weights of its own, whatever the seed
        names.append(len(names))
        return build(_small, sum(1 for n in names if n > 1))

    options = {
        "inner_loop": inner,
        "net_epochs": epochs,
        "outer_warmup": 0,
        "init": "mean",
        "standardise": False,
    }
    got = DCC(per_class=2, method=method, steps=5, batch_real=99, lr_img=2.0, lr_net=0.1, **options)
    job = got.job(data, network)
    state = got.start(job)
    got._prepare(job)
    built = len(names)
    images = torch.stack([x.mean(0) for x in _classes(data)]).repeat_interleave(2, 0).requires_grad_()
    optimizer = torch.optim.SGD([images], lr=2.0, momentum=0.5)
    for k in range(5):
        if k % inner == 0:
            seed = built - 1 + k // inner if built > 1 else 0
            module = build(_small, seed)
            trainer = torch.optim.SGD(module.parameters(), lr=0.1)
        optimizer.zero_grad()
        loss = _naive_loss(module, _classes(data), list(images.split(2)), method == "dcc")
        loss.backward()
        optimizer.step()
        figures = got.step(job, state, k)
        assert figures["loss"] == pytest.approx(loss.item(), rel=1e-9)
        torch.testing.assert_close(state["images"], images.detach(), rtol=1e-9, atol=1e-12)
        if k % inner < inner - 1 and k < 4:
            for _ in range(epochs):
                trainer.zero_grad()
                F.cross_entropy(module(images.detach()), torch.arange(C).repeat_interleave(2)).backward()
                trainer.step()
    assert len(names) == built + 2  # two networks, also though training has loops inside the inner loop


def test_counts_of_loops() -> None:
    assert [tuple(loops(k)) for k in (1, 10, 20, 30, 40, 50)] == [
        (10, 5),
        (10, 50),
        (20, 25),
        (30, 20),
        (40, 15),
        (50, 10),
    ]
    assert tuple(loops(100)) == (50, 10)
    assert tuple(loops(15)) == (15, 37)
    assert DCC(per_class=1, steps=25).outer_loop == 3
    assert DCC(per_class=1, outer_loop=4).steps == 40
    assert DCC(per_class=1, steps=25).outer_warmup == 0


def test_batches_of_training_cover_every_image_once_an_epoch() -> None:
    dcc = DCC(per_class=4, steps=2, inner_loop=2, net_epochs=3, batch_train=5)
    job = dcc.job(_data(), _smooth)
    job.images.copy_(torch.arange(12.0)[:, None, None, None].expand(12, 1, 6, 6))
    state = dcc.start(job)
    batches = [(x[:, 0, 0, 0].long(), y) for x, y in dcc._training(job, state)]
    assert [len(x) for x, _ in batches] == [5, 5, 2] * 3
    assert all(torch.equal(y, job.labels[x]) for x, y in batches)
    epochs = [torch.cat([x for x, _ in batches[3 * e : 3 * e + 3]]) for e in range(3)]
    assert all(torch.equal(e.sort().values, torch.arange(12)) for e in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_real_batches_are_drawn_by_class_without_replacement() -> None:
    dcc = DCC(per_class=1, steps=1, batch_real=7, standardise=False)
    job = dcc.job(_data(), _smooth)
    state = dcc.start(job)
    for size, expected in ((7, 7), (64, 10)):
        for c, x in enumerate(dcc._real(job, state, size)):
            assert len(x) == expected
            rows = {tuple(r) for r in x.flatten(1).tolist()}
            assert len(rows) == expected
            assert rows <= {tuple(r) for r in job.real.x[job.real.of_class(c)].flatten(1).tolist()}


# --- augmentation --------------------------------------------------------------------------------------------


def test_without_a_strategy_dsac_is_dcc_and_dsa_is_dc() -> None:
    for siamese, plain in (("dsac", "dcc"), ("dsa", "dc")):
        assert torch.equal(_run(method=siamese, augment="none").images, _run(method=plain).images)
        assert not torch.equal(_run(method=siamese).images, _run(method=plain).images)


def test_one_augmentation_a_class_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[tuple[float, ...], int]] = []
    original = SiameseAugment.draw

    def draw(self, size, generator, count=None):
        drawn = original(self, size, generator, count)
        if count is not None:
            return drawn

        def spy(x: Tensor) -> Tensor:
            calls.append(((len(calls) * 0.0, *drawn.values.flatten().tolist()), len(x)))
            return drawn(x)

        return spy

    monkeypatch.setattr(SiameseAugment, "draw", draw)
    _run(method="dsac", augment="color", steps=1, outer_warmup=0)
    assert sorted(n for _, n in calls) == [2] * C + [4] * C
    by_values = {values: [n for v, n in calls if v == values] for values, _ in calls}
    assert len(by_values) == C  # classes differ
    assert all(sorted(sizes) == [2, 4] for sizes in by_values.values())  # both sides of a class do not


# --- networks with statistics or randomness of their own ----------------------------------------------------


def test_running_statistics_change_only_when_they_are_frozen() -> None:
    """Training on S in train mode must not write them; before an update they are those of the real batch."""
    dcc = DCC(per_class=2, steps=3, inner_loop=3, net_epochs=4, lr_net=0.1)
    job = dcc.job(_data(90), _batch_norm)
    state = dcc.start(job)
    learner = dcc._prepare(job)[1]
    seen: list[Tensor] = []
    freeze = Learner.freeze_statistics

    def spy(self, params, buffers, x):
        freeze(self, params, buffers, x)
        seen.append(buffers["1.running_mean"].clone())
        z = F.conv2d(x, params["0.weight"], params["0.bias"])
        torch.testing.assert_close(buffers["1.running_mean"], z.mean((0, 2, 3)))
        torch.testing.assert_close(buffers["1.running_var"], z.var((0, 2, 3)))
        assert len(x) == 16 * C

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "freeze_statistics", spy)
        for k in range(3):
            before = len(seen)
            dcc.step(job, state, k)
            assert len(seen) == before + 1
            assert torch.equal(state["buffer:1.running_mean"], seen[-1])
    assert not torch.equal(seen[0], seen[1])
    assert learner.module[1].momentum == 0.1


def test_dropout_follows_the_seed_and_the_global_generator_is_left_as_found() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, C))

    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = _run(network=network).images
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(first, _run(network=network).images)
    assert not torch.equal(first, _run(network=network, seed=1).images)


class _Residual(nn.Module):
    """A user's own network: shortcut, in-place ReLU, batch norm, a module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.act = nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.pool, self.head = nn.AdaptiveAvgPool2d(2), nn.Linear(24, C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = self.act(self.norm(self.conv(x)) + x)
        return self.head(self.pool(x).flatten(1))


def test_a_users_residual_network_and_loader() -> None:
    data = _data(60)
    loader = DataLoader(TensorDataset(data.x, data.y), batch_size=7)
    for network in (_Residual, _Residual()):
        images = condense(loader, 2, network, steps=4, batch_real=8, inner_loop=2, net_epochs=2, lr_img=1.0)
        assert images.images.shape == (2 * C, 1, 6, 6)
        assert images.images.dtype == torch.float32
        assert images.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert images.meta["method"] == "dcc"


class _Partly(nn.Module):
    """A frozen first layer, and one that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.spare = nn.Conv2d(1, 4, 3).requires_grad_(False), nn.Linear(2, 2)
        self.head = nn.Linear(64, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)).flatten(1))


def test_frozen_layers_are_neither_matched_nor_trained_and_spare_ones_do_no_harm() -> None:
    learner, params, buffers = _held(_Partly)
    data = _data()
    assert learner.matched == ("spare.weight", "head.weight")
    spare, head = learner.gradient(params, buffers, data.x, data.y)
    assert not spare.any()
    assert head.any()
    after = learner.train(params, buffers, iter([(data.x, data.y)]), 0.1, 0)
    moved = [k for k in params if not torch.equal(after[k], params[k])]
    assert moved == ["head.weight", "head.bias"]
    condense(data, 1, _Partly, steps=3, inner_loop=2, net_epochs=1)


# --- runs ----------------------------------------------------------------------------------------------------


def test_images_learn_to_match() -> None:
    losses: list[float] = []
    options = {"per_class": 2, "inner_loop": 1, "outer_warmup": 0, "init": "noise", "batch_real": 20}
    DCC(steps=60, lr_img=2.0, **options).distill(
        _data(60), _smooth, progress=lambda done, steps, figures: losses.append(figures["loss"])
    )
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])


@pytest.mark.parametrize("method", ["dcc", "dsac"])
@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_broken_run_goes_on_to_the_same_bits(tmp_path, stop: int, method: str) -> None:
    options = {
        "per_class": 4,
        "steps": 7,
        "inner_loop": 3,
        "net_epochs": 2,
        "batch_real": 4,
        "batch_train": 5,
    }
    options |= {"outer_warmup": 1, "inner_warmup": 2, "method": method}

    def broken(done: int, steps: int, figures) -> None:
        if done > stop:
            raise KeyboardInterrupt

    whole = DCC(**options).distill(_data(), _batch_norm)
    run = DCC(**options)
    run.checkpoint_seconds = 0.0
    with pytest.raises(KeyboardInterrupt):
        run.distill(_data(), _batch_norm, out=tmp_path, progress=broken)
    after: list[int] = []
    resumed = DCC(**options).distill(
        _data(), _batch_norm, out=tmp_path, resume=True, progress=lambda done, *_: after.append(done)
    )
    assert after == list(range(stop + 1, 8))  # the step that broke is made again
    assert torch.equal(resumed.images, whole.images)


def test_same_seed_same_bits_and_another_seed_other_ones() -> None:
    for method in ("dc", "dcc", "dsa", "dsac"):
        assert torch.equal(_run(method=method).images, _run(method=method).images)
        assert not torch.equal(_run(method=method).images, _run(method=method, seed=1).images)


# --- kernel velocity -----------------------------------------------------------------------------------------


def test_kernel_velocity_is_zero_for_a_linear_network_and_the_kernels_turn_otherwise() -> None:
    data = _data()
    synthetic = _run(data, steps=0)
    linear = kernel_velocity(
        synthetic, lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, C)), data.x[:5], epochs=3
    )
    torch.testing.assert_close(linear, torch.zeros(3), rtol=0, atol=1e-6)
    got = kernel_velocity(synthetic, _smooth, data.x[:5], epochs=3, lr=0.5, seed=2)
    module, kernels = build(_smooth, 2), []
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    probe = (data.x[:5] - synthetic.mean[0]) / synthetic.std[0]
    for _ in range(4):
        kernels.append(empirical_ntk(module, probe).flatten())
        optimizer.zero_grad()
        F.cross_entropy(module(synthetic.standardised()), synthetic.labels).backward()
        optimizer.step()
    turned = [1 - F.cosine_similarity(a, b, dim=0) for a, b in pairwise(kernels)]
    torch.testing.assert_close(got, torch.stack(turned), rtol=1e-3, atol=1e-6)
    assert float(got[0]) > 1e-3


# --- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_class": 0}, "per_class is 0"),
        ({"method": "dm"}, "method is 'dm'"),
        ({"outer_loop": 10, "outer_warmup": 11}, "outer_warmup is 11; it must be at most outer_loop, 10"),
        ({"steps": 20, "per_class": 1, "outer_warmup": 3}, "it must be at most outer_loop, 2"),
        ({"inner_loop": 5, "inner_warmup": 6}, "inner_warmup is 6; it must be at most inner_loop, 5"),
        ({"inner_loop": 0}, "inner_loop is 0"),
        ({"outer_loop": 10, "steps": 20}, "give one of them"),
        ({"distance": "l1"}, "distance is 'l1'"),
        ({"augment": "crop"}, "augment is 'crop' with method 'dcc'"),
        ({"method": "dsac", "augment": "zoom"}, "augment names 'zoom'"),
        ({"lr_img": 0}, "lr_img is 0"),
        ({"lr_net": float("nan")}, "lr_net is nan"),
        ({"momentum": 1}, "momentum is 1"),
        ({"batch_real": 0}, "batch_real is 0"),
        ({"batch_train": 0}, "batch_train is 0"),
        ({"net_epochs": -1}, "net_epochs is -1"),
        ({"init": "zeros"}, "init is 'zeros'"),
    ],
)
def test_options_are_refused(options, message: str) -> None:
    with pytest.raises(InputError, match=message):
        DCC(**options)


def _with(data: Examples, x: Tensor | None = None, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return (data.x if x is None else x), (data.y if y is None else y)


@pytest.mark.parametrize(
    ("data", "network", "options", "message"),
    [
        (_with(_data(), y=_data().y * 2), _smooth, {}, "no sample of class 1, 3"),
        (_with(_data(), y=_data().y - 1), _smooth, {}, "runs from -1 to 1"),
        (_with(_data(), x=_data().x / 0), _smooth, {}, "NaN or infinite"),
        (_data(), lambda: _smooth(4), {}, "network has 4 outputs"),
        (_data(), _smooth, {"per_class": 11}, "class 0 has 10 samples"),
        (
            _with(_data(), x=_data().x.flatten(1)),
            nn.Linear(36, C),
            {"method": "dsac"},
            "augment needs images",
        ),
        (
            _data(),
            lambda: nn.Sequential(nn.Flatten(), nn.AvgPool1d(12), _Shift()),
            {},
            "no parameter that the distance",
        ),
        (
            _data(),
            lambda: nn.Sequential(
                nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(36, C)
            ),
            {},
            "without running statistics at 0",
        ),
        (_data(), lambda: _Exploding(), {"lr_img": 1e30, "distance": "mse"}, "finite"),
    ],
)
def test_data_and_networks_are_refused(data, network, options, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _run(data, network, **options)


class _Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(C))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class _Exploding(nn.Linear):
    def __init__(self) -> None:
        super().__init__(36, C)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1) ** 3)


class _Jittered(Dataset):
    def __init__(self, noise: float) -> None:
        self.data, self.noise, self.g = _data(), noise, torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int):
        x = self.data.x[i]
        return x + self.noise * torch.randn(x.shape, generator=self.g), int(self.data.y[i])


def test_data_with_random_transforms_is_taken_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="another image each time"):
        _run(_Jittered(0.1), steps=1)


def test_fixed_data_is_taken_without_one(recwarn: pytest.WarningsRecorder) -> None:
    _run(_Jittered(0.0), steps=1)
    assert not recwarn


def test_a_run_that_diverges_names_its_step() -> None:
    linear = lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, C))  # noqa: E731
    with pytest.raises(InputError, match=r"step 1: the filter_cosine distance .* must be finite"):
        DCC(per_class=1, steps=3, net_epochs=1, lr_img=1e38).distill(_data(), linear)
