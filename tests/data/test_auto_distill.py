"""The recipe behind ``--method auto``: its losses against naive versions, resuming, and learning on small data."""

import numpy as np
import pytest
import torch
from torch import nn

from gradmatch.core.checks import InputError
from gradmatch.core.examples import Examples
from gradmatch.data._common import evaluate, random_subset
from gradmatch.data.auto_distill import PRESETS, AutoDistill, best_scale, centroids, narrow_convnet

SMALL = {"per_class": 1, "steps": 3, "refine_steps": 2, "pool": 2, "age": 4, "window": 2, "batch_size": 8}


def blobs(n=60, classes=3, size=8, channels=1, seed=0):
    """Images of noise around one random pattern a class."""
    g = torch.Generator().manual_seed(seed)
    patterns = torch.randn(classes, channels, size, size, generator=torch.Generator().manual_seed(99))
    y = torch.arange(n) % classes
    return Examples(patterns[y] + 0.8 * torch.randn(n, channels, size, size, generator=g), y, classes)


def tiny(classes=3, size=8):
    return narrow_convnet(1, size, classes, width=4)


def test_ridge_loss_is_that_of_the_primal_regression():
    method, g = AutoDistill(per_class=2, ridge=0.3), torch.Generator().manual_seed(0)
    job = method.job(blobs(), tiny())
    features, real = (torch.randn(n, 4, dtype=torch.float64, generator=g) for n in (6, 9))
    y = torch.arange(9) % 3
    kernel_mean = (features @ features.T).diagonal().mean()
    targets = nn.functional.one_hot(job.labels, 3).double() - 1 / 3
    gram = features.T @ features + 0.3 * kernel_mean * torch.eye(4, dtype=torch.float64)
    weights = torch.linalg.solve(gram, features.T @ targets)
    naive = (real @ weights - (nn.functional.one_hot(y, 3).double() - 1 / 3)).square().mean()
    assert torch.allclose(method._ridge_loss(job, features, real, y), naive, rtol=1e-10)


def test_pool_step_is_sgd_on_the_synthetic_set():
    method = AutoDistill(**SMALL)
    job = method.job(blobs(), tiny())
    state, net = method.start(job), method._nets_of(job)[0]
    module = tiny()()
    module.load_state_dict({k[5:]: v for k, v in state.items() if k.startswith("net0:")})
    weights, speeds = list(module.parameters()), [0.0] * len(list(module.parameters()))
    for k in range(2):
        loss = nn.functional.cross_entropy(module(state["images"]), job.labels)
        grads = torch.autograd.grad(loss, weights)
        speeds = [0.9 * s + g + 5e-4 * w.detach() for s, g, w in zip(speeds, grads, weights, strict=True)]
        with torch.no_grad():
            for w, s in zip(weights, speeds, strict=True):
                w -= net.rate * s
        if k == 0:
            method._train(job, net, state, 0, 1)
        else:  # the ridge step trains with the forward pass that it shares
            method._regress(job, net, state, 0, job.real)
    for name, value in module.named_parameters():
        torch.testing.assert_close(state[f"net0:{name}"], value.detach())
    assert state["ages"].tolist() == [2, 2]


def test_ridge_step_leaves_the_gradient_of_its_loss():
    method = AutoDistill(**SMALL)
    job = method.job(blobs(), tiny())
    state = method.start(job)
    module = nn.Sequential(*list(tiny()().children())[:-1])
    module.load_state_dict(
        {k[5:]: v for k, v in state.items() if k.startswith("net1:")}, strict=False
    )  # without the last layer
    images = state["images"].clone().requires_grad_()
    loss = method._ridge_loss(job, module(images), module(job.real.x).detach(), job.real.y)
    wanted = torch.autograd.grad(loss, images)[0]
    _, found = method._regress(job, method._nets_of(job)[0], state, 1, job.real)
    torch.testing.assert_close(found["images"], wanted)


def test_refinement_gradient_is_that_of_autograd_through_sgd():
    method = AutoDistill(**SMALL | {"labels": "learned"})
    job = method.job(blobs(), tiny())
    state = method.start(job)
    net = method._nets_of(job)[0]
    weights = net.parameters(state, 1)
    speeds = net.parameters(state, 1, "speed")
    images, logits = (state[k].clone().requires_grad_() for k in ("images", "logits"))
    weights = {k: v.clone().requires_grad_() for k, v in weights.items()}
    for _ in range(2):
        inner = nn.functional.cross_entropy(net(weights, images)[0], logits.softmax(1))
        grads = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
        speeds = {k: 0.9 * speeds[k] + g + 5e-4 * weights[k] for k, g in zip(weights, grads, strict=True)}
        weights = {k: weights[k] - net.rate * speeds[k] for k in weights}
    out = net(weights, job.real.x)[0]
    outer = nn.functional.cross_entropy(out * best_scale(out.detach(), job.real.y), job.real.y)
    wanted = torch.autograd.grad(outer, [images, logits])
    _, found = method._refine(job, net, state, 1, job.real)
    torch.testing.assert_close(found["images"], wanted[0], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found["logits"], wanted[1], rtol=1e-3, atol=1e-6)
    assert int(state["ages"][1]) == 4


def test_best_scale_is_the_minimum():
    g = torch.Generator().manual_seed(1)
    logits, y = torch.randn(50, 4, generator=g), torch.arange(50) % 4
    logits[torch.arange(50), y] += 1.0
    loss = lambda s: float(nn.functional.cross_entropy(logits * s, y))  # noqa: E731
    best = float(best_scale(logits * 7, y)) * 7
    grid = [float(x) for x in np.linspace(0.05, 5, 400)]
    assert loss(best) <= min(map(loss, grid)) + 1e-6


def test_centroids_are_cluster_means():
    x = torch.cat([torch.zeros(5, 1, 2, 2), torch.full((7, 1, 2, 2), 3.0)])
    found = centroids(x, 2, torch.Generator().manual_seed(0)).flatten(1)[:, 0].sort().values
    assert found.tolist() == [0.0, 3.0]
    assert torch.allclose(centroids(x, 1, torch.Generator())[0], x.mean(0))


@pytest.mark.parametrize("labels", ["hard", "smooth", "learned"])
def test_resumed_run_gives_the_same_bits(tmp_path, labels):
    options = SMALL | {"labels": labels}
    whole = AutoDistill(**options).distill(blobs(), tiny())

    class Stop(Exception):
        pass

    def stop_after(done, total, figures):
        if done == 4:
            raise Stop

    broken = AutoDistill(**options)
    broken.checkpoint_seconds = 0.0
    with pytest.raises(Stop):
        broken.distill(blobs(), tiny(), out=tmp_path, progress=stop_after)
    resumed = AutoDistill(**options).distill(blobs(), tiny(), out=tmp_path, resume=True)
    assert torch.equal(resumed.images, whole.images)
    assert torch.equal(resumed.labels, whole.labels)
    assert resumed.soft == (labels != "hard")


def test_same_seed_same_result_and_the_global_generator_is_left():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    runs = [AutoDistill(**SMALL, seed=s).distill(blobs(), tiny()).images for s in (0, 0, 1)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_smooth_labels_and_learned_labels_are_probabilities():
    soft = AutoDistill(**SMALL | {"labels": "smooth", "smoothing": 0.3}).distill(blobs(), tiny()).labels
    assert torch.allclose(soft, 0.7 * torch.eye(3) + 0.1)
    learned = AutoDistill(**SMALL | {"labels": "learned"}).distill(blobs(), tiny()).labels
    start = 0.5 * torch.eye(3) + 0.5 / 3
    assert torch.allclose(learned.sum(1), torch.ones(3))
    assert not torch.allclose(learned, start, atol=1e-5)


def test_default_network_follows_the_images():
    made = AutoDistill(**SMALL).distill(blobs(size=9, channels=2, classes=4, n=40))
    assert made.images.shape == (4, 2, 9, 9)
    assert made.classes == 4
    assert narrow_convnet(1, 28, 10)()(torch.zeros(1, 1, 28, 28)).shape == (1, 10)


def test_learns_better_images_than_real_ones():
    def noisy(seed):
        clean = blobs(300, seed=seed)
        noise = torch.randn(clean.x.shape, generator=torch.Generator().manual_seed(seed + 5))
        return Examples(clean.x + 1.5 * noise, clean.y, 3)

    network = narrow_convnet(1, 8, 3, width=8)
    train, held = noisy(0), noisy(1)
    method = AutoDistill(
        per_class=1, steps=100, refine_steps=4, pool=4, age=20, window=3, init="real", image_lr=0.15
    )
    learned = method.distill(train, network)

    def score(synthetic):
        return evaluate(synthetic, network, held, networks=2, epochs=40, lr=0.05, workers=1).mean

    assert score(learned) > score(random_subset(train, 1)) + 0.05


def test_bad_input_is_refused():
    for options in (
        {"preset": "long"},
        {"smoothing": 1.0},
        {"labels": "soft"},
        {"window": 41},
        {"ridge": 0.0},
    ):
        with pytest.raises(InputError):
            AutoDistill(**options)
    flat = Examples(torch.randn(6, 5), torch.arange(6) % 3, 3)
    with pytest.raises(InputError, match="square"):
        AutoDistill(**SMALL).distill(flat)
    with pytest.raises(InputError, match="Linear"):
        AutoDistill(**SMALL).distill(blobs(), lambda: nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten()))
    with pytest.raises(InputError, match="dropout"):
        AutoDistill(**SMALL).distill(
            blobs(), lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3))
        )


def test_presets_set_the_steps():
    one, more = AutoDistill(per_class=1, preset="full"), AutoDistill(per_class=10, preset="full")
    assert (one.ridge_steps, one.refine_steps) == PRESETS["full"].one
    assert more.steps == sum(PRESETS["full"].more)
