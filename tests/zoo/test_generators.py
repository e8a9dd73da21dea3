"""Networks of (x, t, label), the small autoencoder, and the exact models of Gaussian mixtures."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gradmatch.core.checks import InputError
from gradmatch.core.path import EDM, KINDS, LinearPath, VariancePreserving
from gradmatch.core.sampler import Solver
from gradmatch.zoo import MixtureOracle, autoencoder, dit, fit_autoencoder, mlp_velocity, unet

pytest.importorskip("diffusers")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda c: unet(1, 10, 8, levels=2, classes=c), (1, 10, 10)),
        (lambda c: unet(4, 7, 8, levels=1, classes=c, attention=True), (4, 7, 7)),
        (lambda c: unet(2, 9, 8, levels=3, blocks=2, classes=c), (2, 9, 9)),
        (lambda c: dit(2, 7, 8, depth=1, heads=2, patch=2, classes=c), (2, 7, 7)),
        (lambda c: mlp_velocity(6, (8, 8), classes=c), (2, 3)),
    ],
)
@pytest.mark.parametrize("classes", [None, 5])
def test_networks_keep_shapes_and_hear_time_and_label(make, shape, classes) -> None:
    torch.manual_seed(0)
    net = make(classes).eval()
    for p in net.parameters():  # adaptive normalisation starts at zero; let everything speak
        torch.nn.init.normal_(p, std=0.2)
    x, t = randn(3, *shape), torch.tensor([0.1, 0.5, 0.9])
    out = net(x, t)
    assert out.shape == x.shape
    assert not torch.equal(out, net(x, t.flip(0)))
    if classes is not None:
        label = torch.tensor([0, 1, 2])
        assert not torch.equal(out, net(x, t, label))
        assert torch.equal(out, net(x, t, torch.full((3,), 5)))  # no label is the null label, not class 0
    net.train()
    assert torch.equal(net(x, t), net(x, t))  # nothing random inside


def test_more_channels_may_come_in_than_go_out() -> None:
    assert unet(4, 7, 8, levels=1, in_channels=9)(randn(2, 9, 7, 7), torch.zeros(2)).shape == (2, 4, 7, 7)
    net = dit(4, 8, 8, depth=1, heads=2, in_channels=9)
    assert net(randn(2, 9, 8, 8), torch.zeros(2)).shape == (2, 4, 8, 8)


def test_autoencoder_learns_to_reconstruct() -> None:
    torch.manual_seed(0)
    vae = autoencoder(1, 2, (8, 8))
    images = randn(64, 1, 1, 1).sigmoid().expand(64, 1, 8, 8).contiguous()
    with torch.no_grad():
        before = (vae(images).sample - images).square().mean()
    found = fit_autoencoder(vae, images, 60, batch=16)
    with torch.no_grad():
        after = (vae(images).sample - images).square().mean()
    assert float(after) < 0.2 * float(before)
    assert len(found.losses) == 60


# --- oracles ----------------------------------------------------------------------------------------------------

PATHS = [LinearPath(), LinearPath(1e-5), EDM(), VariancePreserving.from_betas(1e-4, 0.02)]


@pytest.mark.parametrize("path", PATHS, ids=["linear", "linear-eps", "edm", "preserving"])
def test_the_oracle_is_the_gradient_of_its_own_density_and_bayes_rule(path) -> None:
    means, std = randn(5, 3).double(), torch.tensor([0.5, 1.0, 0.2, 0.7, 0.1]).double()
    weights = torch.tensor([1.0, 2.0, 3.0, 0.5, 1.5])
    t = 400.0 if isinstance(path, VariancePreserving) else 0.4
    x = randn(7, 3, seed=1).double().requires_grad_()
    oracle = MixtureOracle(means, std, weights, path=path, kind="score")
    density = oracle.log_density(x, t)
    (gradient,) = torch.autograd.grad(density.sum(), x)
    x = x.detach()
    assert torch.allclose(oracle(x, t).tensor, gradient, atol=1e-10)
    alpha, sigma = (float(v) for v in path.levels(torch.tensor(t).double())[:2])
    w = (weights / weights.sum()).double()
    terms = []
    for i in range(5):
        v = sigma**2 + alpha**2 * float(std[i]) ** 2
        terms.append(
            w[i] * torch.exp(-((x - alpha * means[i]) ** 2).sum(1) / (2 * v)) / (2 * math.pi * v) ** 1.5
        )
    assert torch.allclose(density.detach(), torch.stack(terms).sum(0).log(), atol=1e-10)
    x0 = sum(
        (term / sum(terms))[:, None]
        * (means[i] + alpha * std[i] ** 2 / (sigma**2 + alpha**2 * std[i] ** 2) * (x - alpha * means[i]))
        for i, term in enumerate(terms)
    )
    for kind in KINDS:
        said = MixtureOracle(means, std, weights, path=path, kind=kind)(x, t)
        assert said.kind == kind
        assert torch.allclose(path.convert(said, "x0", x, t).tensor, x0, atol=1e-8), kind


def test_a_finite_data_set_is_reached_and_no_time_gives_nan() -> None:
    points = randn(20, 1, 4, 4)
    oracle = MixtureOracle(points, 0.0)
    found = Solver(torch.linspace(1, 0, 201)).run(oracle, LinearPath(), randn(6, 1, 4, 4, seed=1))
    nearest = torch.cdist(found.x.flatten(1), points.flatten(1)).min(1).values
    assert float(nearest.max()) < 0.05
    for kind in KINDS:
        for t in (0.0, 1.0):
            assert bool(torch.isfinite(MixtureOracle(points, 0.1, kind=kind)(points, t).tensor).all())


def test_large_sets_are_worked_off_in_parts(monkeypatch) -> None:
    from gradmatch.zoo import oracles

    oracle, x, t = MixtureOracle(randn(30, 2), 0.1), randn(11, 2, seed=1), torch.rand(11)
    whole = oracle(x, t).tensor
    monkeypatch.setattr(oracles, "_BLOCK", 90)
    assert torch.allclose(oracle(x, t).tensor, whole, atol=1e-6)


def test_samples_have_the_mixtures_weights_and_spread() -> None:
    oracle = MixtureOracle(torch.tensor([[-4.0], [4.0]]), 0.5, torch.tensor([0.25, 0.75]))
    x = oracle.sample(20_000, torch.Generator().manual_seed(0))
    assert float((x < 0).double().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(x[x > 0].std()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MixtureOracle(torch.zeros(3), 0.1), "means is of shape"),
        (lambda: MixtureOracle(torch.zeros(3, 1), -0.1), "std is -0.1"),
        (lambda: MixtureOracle(torch.zeros(3, 1), 0.1, torch.zeros(3)), "weights must be"),
        (lambda: MixtureOracle(torch.zeros(3, 1), 0.1, torch.ones(2)), "weights has 2"),
        (lambda: unet(width=12), "width is 12"),
        (lambda: dit(width=10, heads=4), "width is 10"),
        (lambda: autoencoder(widths=(12,)), "multiple of 8"),
        (lambda: mlp_velocity(2, ()), "hidden is empty"),
        (
            lambda: fit_autoencoder(autoencoder(widths=(8,)), torch.full((2, 1, 8, 8), torch.nan), 1),
            "images has",
        ),
    ],
)
def test_refusals(make, says) -> None:
    with pytest.raises(InputError, match=says):
        make()
