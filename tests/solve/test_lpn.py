"""Every check, refusal and pitfall of learned proximal networks, proximal matching and plug-and-play reconstruction."""

from __future__ import annotations

import copy
import math
import warnings
from itertools import pairwise

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from gradmatch.core.checks import InputError
from gradmatch.core.store import RunFolder
from gradmatch.solve import (
    ConvexNet,
    LearnedProx,
    Patches,
    ProximalMatching,
    Stage,
    pnp,
    proximal_matching_loss,
)
from gradmatch.solve._pnp import norm_of

SMALL = (1, 8, 8)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(size: int = 3, alpha: float = 0.1, **options) -> LearnedProx:
    """A convex network with weights of some size, in double precision."""
    net = ConvexNet.dense(size, hidden=(7, 6, 5), **options)
    with torch.no_grad():
        for k, p in enumerate(net.parameters()):
            p.copy_(rand(*p.shape, seed=k).float() * 0.7)
    net.project_()
    return LearnedProx(net, alpha).double().eval()


def conv(alpha: float = 0.1) -> LearnedProx:
    net = ConvexNet.conv(SMALL, 4, last=6)
    with torch.no_grad():
        for k, p in enumerate(net.parameters()):
            p.copy_(rand(*p.shape, seed=k).float() * 0.3)
    net.project_()
    return LearnedProx(net, alpha).double().eval()


def trained(prox: LearnedProx, steps: int = 15) -> LearnedProx:
    """Pulled about by an optimiser with a large rate."""
    x = rand(40, *prox.icnn.shape).float()
    ProximalMatching(prox.float(), 0.3, schedule=[Stage("l1", steps, 0.05)]).fit(x, 16)
    return prox.double().eval()


class Quadratic(nn.Module):
    """c |y|^2 / 2."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c = c

    def forward(self, y: Tensor) -> Tensor:
        return self.c * y.flatten(1).square().sum(1) / 2


# --- psi and f ------------------------------------------------------------------------------------------------


def test_the_layers_written_out() -> None:
    prox = dense(alpha=0.0)
    net, y = prox.icnn, rand(5, 3)
    H, W, w = net.first[1].weight, [c.weight for c in net.cores], net.out.weight
    z = F.softplus(y @ H.T, beta=10)
    for core, skip in zip(W, net.skips, strict=True):
        z = F.softplus(z @ core.T + y @ skip.weight.T + skip.bias, beta=10)
    by_hand = (z @ w.T + y @ net.direct.weight.T + net.direct.bias)[:, 0]
    assert torch.allclose(prox.potential(y), by_hand, atol=1e-8)


def test_the_convolutional_layers_written_out() -> None:
    prox = conv(alpha=0.2)
    net, y = prox.icnn, rand(2, *SMALL)
    z = F.softplus(F.conv2d(y, net.first.weight, padding=1), 10)
    for core, skip, side, stride in zip(net.cores[:3], net.skips[:3], (8, 4, 4), (2, 1, 2), strict=True):
        small = F.interpolate(y, (side, side), mode="bilinear")
        z = F.softplus(
            F.conv2d(z, core.weight, stride=stride, padding=1)
            + F.conv2d(small, skip.weight, skip.bias, stride=stride, padding=1),
            10,
        )
    small = F.interpolate(y, (2, 2), mode="bilinear").flatten(1)
    z = F.softplus(z.flatten(1) @ net.cores[3].weight.T + net.skips[3](small), 10)
    by_hand = (z @ net.out.weight.T)[:, 0] + 0.2 * y.flatten(1).square().sum(1)  # alpha |y|^2, as released
    assert torch.allclose(prox.potential(y), by_hand, atol=1e-8)


def test_released_layouts_have_the_released_parameters() -> None:
    digits = ConvexNet.conv((1, 28, 28))
    n = 9 * 64 + 3 * 9 * 64 * 64 + 64 * 49 * 64 + 64 + 3 * (9 * 64 + 64) + 49 * 64 + 64
    assert sum(p.numel() for p in digits.parameters()) == n
    faces = ConvexNet.conv((3, 128, 128), 8, (1, 2, 1, 2, 1, 2), beta=100)
    assert faces.cores[-1].weight.shape == (64, 8 * 16 * 16)  # the last convolution covers 16 x 16
    line = ConvexNet.dense(1)
    assert [c.weight.shape for c in line.cores] == [(50, 50)] * 4


@pytest.mark.parametrize("make", [dense, conv])
def test_psi_is_convex_and_f_monotone_after_training(make) -> None:
    prox = trained(make())
    a, b = (3 * rand(60, *prox.icnn.shape, seed=s) for s in (1, 2))
    psi = prox.potential
    assert bool((psi((a + b) / 2) <= (psi(a) + psi(b)) / 2 + 1e-9).all())
    inner = ((prox(a) - prox(b)) * (a - b)).flatten(1).sum(1)
    assert bool((inner >= 2 * prox.alpha * (a - b).flatten(1).square().sum(1) - 1e-9).all())


@pytest.mark.parametrize("make", [dense, conv])
def test_the_jacobian_is_symmetric_with_eigenvalues_of_two_alpha_at_least(make) -> None:
    prox = trained(make(alpha=0.05))
    for y in rand(3, *prox.icnn.shape, seed=3):
        J = torch.autograd.functional.jacobian(lambda v: prox(v[None])[0], y).reshape(y.numel(), -1)
        assert torch.allclose(J, J.T, atol=1e-10)
        assert float(torch.linalg.eigvalsh(J).min()) >= 2 * 0.05 - 1e-6


def test_f_is_the_gradient_of_psi_and_can_be_differentiated_twice() -> None:
    prox, y = dense(), rand(2, 3).requires_grad_()
    (slope,) = torch.autograd.grad(prox.potential(y).sum(), y)
    assert torch.equal(prox(y), slope)
    assert torch.autograd.gradcheck(prox, (y,))
    assert torch.autograd.gradgradcheck(prox, (y,))
    loss = prox(y.detach()).square().sum()
    grads = torch.autograd.grad(loss, list(prox.parameters()), allow_unused=True)
    assert sum(g is not None and bool(g.abs().sum() > 0) for g in grads) >= 7


def test_without_gradients_f_is_the_same_and_nothing_of_the_callers_is_changed() -> None:
    prox, y = dense(), rand(4, 3)
    with torch.no_grad():
        silent = prox(y)
    assert not silent.requires_grad
    assert not y.requires_grad
    assert y.grad is None
    assert torch.equal(silent, prox(y).detach())
    with torch.inference_mode():
        assert torch.equal(prox(y + 0), silent)
    assert all(p.grad is None for p in prox.parameters())


@pytest.mark.parametrize("positivity", ["clamp", "softplus"])
def test_only_constrained_weights_are_kept_above_zero(positivity: str) -> None:
    net = ConvexNet.dense(2, hidden=(4, 4), positivity=positivity)
    start = [w.detach().clone() for w in net.constrained()]
    assert all(float(w.min()) > 0 and float(w.max()) < 1e-3 for w in start)  # exp(N(-10, 0.1))
    prox = trained(LearnedProx(net), 30)
    assert all(float(w.detach().min()) >= 0 for w in prox.icnn.constrained())
    assert len(list(net.constrained())) == 2
    if positivity == "clamp":
        with torch.no_grad():
            for p in net.parameters():
                p.fill_(-1.0)
        net.project_()
        free = [net.first[1].weight, net.skips[0].weight, net.skips[0].bias, net.direct.weight]
        assert all(float(p.detach().max()) == -1 for p in free)
        assert all(float(w.detach().min()) == 0 for w in net.constrained())


def test_networks_are_seeded_and_the_global_generator_is_left() -> None:
    state = torch.random.get_rng_state()
    one, two, other = (ConvexNet.conv(SMALL, 4, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    for a, b, c in zip(one.parameters(), two.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


# --- R --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [dense, conv])
def test_the_prior_inverts_f_in_double_precision(make) -> None:
    prox = trained(make())
    y = 2 * rand(50, *prox.icnn.shape, seed=5)
    with torch.no_grad():
        x = prox(y)
    found = prox.prior(x, tol=1e-8)
    assert bool(found.converged.all())
    assert float(found.residual.max()) <= 1e-8
    assert torch.allclose(found.y, y, atol=1e-6)
    assert torch.allclose(found.value, prox.prox_and_prior(y)[1], atol=1e-6)
    assert found.value.dtype == torch.float64


def test_each_image_alone_gives_the_same_and_so_does_scipy() -> None:
    prox = dense()
    x = rand(4, 3, seed=6)
    whole = prox.prior(x, tol=1e-9)
    for k in range(4):
        alone = prox.prior(x[k : k + 1], tol=1e-9)
        assert torch.allclose(whole.value[k], alone.value[0], atol=1e-9)

        def conjugate(y, k: int = k) -> float:
            return float(prox.potential(torch.from_numpy(y)[None]).detach()) - float(
                torch.from_numpy(y) @ x[k]
            )

        peer = minimize(conjugate, x[k].numpy(), method="BFGS")
        R = -peer.fun - float(x[k].square().sum()) / 2
        assert math.isclose(R, float(whole.value[k]), abs_tol=1e-6)


def test_a_model_in_single_precision_is_inverted_in_double() -> None:
    prox = dense().float()
    with torch.no_grad():
        x = prox(rand(5, 3).float())
    found = prox.prior(x)
    assert bool(found.converged.all())
    assert all(p.dtype == torch.float32 for p in prox.parameters())


def test_f_is_the_proximal_operator_of_r() -> None:
    prox = trained(dense())
    y, w = 2 * rand(40, 3, seed=7), 3 * rand(40, 3, seed=8)
    (u, R_u), (x, R_x) = prox.prox_and_prior(w), prox.prox_and_prior(y)
    other = (u - y).square().sum(1) / 2 + R_u
    best = (x - y).square().sum(1) / 2 + R_x
    assert bool((other >= best - 1e-9).all())
    with torch.no_grad():
        near = x + 0.05 * rand(40, 3, seed=9)
    assert bool(((near - y).square().sum(1) / 2 + prox.prior(near).value >= best - 1e-9).all())


@pytest.mark.parametrize("c", [1.0, 0.5, 2.0])
def test_quadratic_potentials_have_quadratic_priors(c: float) -> None:
    prox = LearnedProx(Quadratic(c)).eval()
    x = rand(6, 4)
    assert torch.allclose(prox(x), c * x)
    assert torch.allclose(prox.prior(x).value, (1 / c - 1) * x.square().sum(1) / 2, atol=1e-8)


@pytest.mark.parametrize("method", ["convex", "least-squares"])
def test_both_inversions_agree(method: str) -> None:
    prox = dense()
    with torch.no_grad():
        x = prox(rand(5, 3, seed=4))
    found = prox.prior(x, method=method)  # to the default tolerance
    assert bool(found.converged.all())
    assert torch.allclose(found.y, rand(5, 3, seed=4), atol=1e-3)


def test_one_number_is_inverted_by_bisection_to_rounding() -> None:
    prox = dense(1, alpha=0.0)
    with torch.no_grad():
        x = prox(5 * rand(50, 1))
    found = prox.prior(x, tol=1e-13)
    assert bool(found.converged.all())


def test_what_is_not_in_the_range_is_flagged_not_silent() -> None:
    prox = dense(1, alpha=0.0)
    with torch.no_grad():
        x = torch.cat([prox(rand(1, 1)), prox(torch.full((1, 1), 1e4).double()) + 1])
    with pytest.warns(UserWarning, match="1 of 2 images .* not in the range"):
        found = prox.prior(x)
    assert found.converged.tolist() == [True, False]
    with pytest.warns(UserWarning, match="3 of 3 images"):
        assert not bool(LearnedProx(ConvexNet.dense(2)).prior(rand(3, 2), max_iter=20).converged.any())


# --- patches --------------------------------------------------------------------------------------------------


def test_patches_of_a_pointwise_prox_are_the_prox_of_the_whole() -> None:
    image = rand(2, 1, 13, 17)
    assert torch.allclose(Patches(lambda y: 0.5 * y, 8, 3)(image), 0.5 * image)
    prox = conv()
    with torch.no_grad():
        whole = Patches(prox, 8)(rand(2, *SMALL))
        assert torch.allclose(whole, prox(rand(2, *SMALL)))
        pair = Patches(prox, 8, 8)(torch.cat([rand(2, *SMALL), rand(2, *SMALL, seed=1)], 3))
        assert torch.allclose(pair[..., 8:], prox(rand(2, *SMALL, seed=1)))
        assert Patches(prox, 8, 5, batch=3)(rand(1, 1, 20, 11)).shape == (1, 1, 20, 11)


def test_overlaps_are_averaged() -> None:
    steps = iter([1.0, 3.0])
    found = Patches(lambda y: torch.full_like(y, next(steps)), 4, 2, batch=1)(torch.zeros(1, 1, 4, 6))
    assert found[0, 0, 0].tolist() == [1, 1, 2, 2, 3, 3]


# --- proximal matching ----------------------------------------------------------------------------------------


def test_the_loss_is_of_whole_samples_between_zero_and_one() -> None:
    a, b = rand(6, 1, 4, 4), rand(6, 1, 4, 4, seed=1)
    distance = (a - b).flatten(1).norm(dim=1)
    assert torch.allclose(proximal_matching_loss(a, b, 3.0), (1 - torch.exp(-((distance / 3) ** 2))).mean())
    pixelwise = (1 - torch.exp(-(((a - b) / 3) ** 2))).mean()
    assert float(proximal_matching_loss(a, b, 3.0)) > 2 * float(pixelwise)
    assert float(proximal_matching_loss(a, a, 1e-3)) == 0
    assert float(proximal_matching_loss(a, b, 1e-3)) == 1


def test_a_large_gamma_pulls_as_the_mean_of_squares_does() -> None:
    a = rand(5, 7).requires_grad_()
    b = rand(5, 7, seed=1)
    (one,) = torch.autograd.grad(proximal_matching_loss(a, b, 1e4) * 1e8, a)
    (two,) = torch.autograd.grad((a - b).square().sum(1).mean(), a)
    assert torch.allclose(one, two, rtol=1e-5)


def test_the_published_plan() -> None:
    plan = ProximalMatching(dense(), 0.1).plan(784)
    assert [s.loss for s in plan] == ["l1"] + ["proximal"] * 4
    assert [s.steps for s in plan] == [20_000] + [5000] * 4
    assert [s.lr for s in plan] == [1e-3] + [1e-4] * 4
    assert [s.gamma for s in plan[1:]] == pytest.approx([0.08 * 28 * k for k in (8, 4, 2, 1)])


def test_training_is_the_plain_loop_with_the_clamp_after_every_step() -> None:
    from gradmatch.core.training import seed_of

    x = rand(12, 2).float()
    one, two = (LearnedProx(ConvexNet.dense(2, hidden=(4, 4))) for _ in range(2))
    stages = [Stage("l1", 3, 0.1), Stage("l2", 2, 0.05), Stage("proximal", 2, 0.02, 2.0)]
    found = ProximalMatching(one, 0.3, schedule=stages).fit(x, 5, seed=4)
    adam, losses = torch.optim.Adam(two.parameters()), []
    for step, stage in enumerate([s for s in stages for _ in range(s.steps)]):
        g = torch.Generator().manual_seed(seed_of(4, step))
        clean = x[torch.randint(12, (5,), generator=g)]
        output = two(clean + 0.3 * torch.randn(5, 2, generator=g))
        gap = output - clean
        loss = gap.abs().mean() if stage.loss == "l1" else gap.square().mean()
        if stage.gamma:
            loss = (1 - torch.exp(-gap.square().sum(1) / stage.gamma**2)).mean()
        adam.param_groups[0]["lr"] = stage.lr
        adam.zero_grad()
        loss.backward()
        adam.step()
        two.project_()
        losses.append(loss.item())
    assert found.losses.tolist() == pytest.approx(losses, rel=1e-5)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert min(float(w.detach().min()) for w in two.icnn.constrained()) == 0  # the clamp has had work


def test_killed_and_resumed_ends_with_the_same_bits(tmp_path) -> None:
    x = rand(20, 2).float()
    stages = [Stage("l1", 4, 0.1), Stage("proximal", 4, 0.05, 2.0)]

    class Stop(Exception):
        pass

    def stop(done: int, steps: int, info) -> None:
        if done == 5:
            raise Stop

    def make() -> LearnedProx:
        return LearnedProx(ConvexNet.dense(2, hidden=(4, 4)))

    whole, parts = make(), make()
    ProximalMatching(whole, 0.3, schedule=stages).fit(x, 5)
    matching = ProximalMatching(parts, 0.3, schedule=stages)
    with pytest.raises(Stop):
        matching.fit(x, 5, run=RunFolder(tmp_path / "run", {}), save_every=0, progress=stop)
    fresh = make()
    matching = ProximalMatching(fresh, 0.3, schedule=stages)
    matching.fit(x, 5, run=RunFolder(tmp_path / "run", {}, resume=True))
    for a, b in zip(whole.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


def test_takes_loaders_functions_and_tensors_and_leaves_what_it_should() -> None:
    x = rand(16, *SMALL).float()
    before, state = x.clone(), torch.random.get_rng_state()
    stages = [Stage("l1", 5, 1e-2)]
    sources = [
        x,
        lambda count, g: torch.rand(count, *SMALL, generator=g),
        DataLoader(TensorDataset(x, torch.zeros(16)), batch_size=4),
        DataLoader([{"pixel_values": image, "label": 0} for image in x], batch_size=4),
    ]
    for source in sources:
        prox = LearnedProx(ConvexNet.conv(SMALL, 2, last=4)).eval()
        found = ProximalMatching(prox, (0.05, 0.2), schedule=stages).fit(source, 4)
        assert len(found.losses) == 5
        assert not prox.training
        assert all(p.grad is None for p in prox.parameters())
    assert torch.equal(x, before)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_proximal_matching_comes_nearer_to_the_soft_threshold_than_squares() -> None:
    def laplace(count: int, g: torch.Generator) -> Tensor:
        side = 2 * torch.randint(2, (count, 1), generator=g) - 1
        return side * torch.empty(count, 1).exponential_(generator=g)

    errors = []
    y = torch.linspace(-3, 3, 61)[:, None]
    soft = y.sign() * (y.abs() - 1).clamp_min(0)
    first = Stage("l2", 150, 1e-2), Stage("l1", 150, 1e-2)
    later = Stage("l2", 100, 2e-3), Stage("proximal", 150, 2e-3, 0.5)
    for stages in zip(first, later, strict=True):
        prox = LearnedProx(ConvexNet.dense(1, hidden=(20, 20)))
        ProximalMatching(prox, 1.0, schedule=stages).fit(laplace, 400)
        errors.append(float((prox(y).detach() - soft).abs().max()))
    assert errors[1] < 0.42 < errors[0]


def test_a_gamma_too_small_is_said() -> None:
    x = 10 * rand(20, 4).float()
    prox = LearnedProx(ConvexNet.dense(4, hidden=(4, 4)))
    with pytest.warns(UserWarning, match=r"gamma 0\.01 begins with a loss of 1\.0"):
        ProximalMatching(prox, 0.1, schedule=[Stage("proximal", 2, 1e-3, 0.01)]).fit(x, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ProximalMatching(prox, 0.1, schedule=[Stage("proximal", 2, 1e-3, 100.0)]).fit(x, 4)


def test_any_denoiser_can_be_trained_so() -> None:
    net = nn.Conv2d(1, 1, 3, padding=1)
    before = copy.deepcopy(net.state_dict())
    ProximalMatching(net, 0.1, stages=2, gamma_min=10.0, pretrain=2, steps=2).fit(rand(8, *SMALL).float(), 4)
    assert not torch.equal(net.weight, before["weight"])


# --- reconstruction -------------------------------------------------------------------------------------------


def soft(t: float):
    return lambda v: v.sign() * (v.abs() - t).clamp_min(0)


def problem() -> tuple[Tensor, Tensor]:
    A = rand(5, 8) / 3
    return A, rand(3, 5, seed=1)


def test_gradient_steps_and_soft_thresholds_are_ista() -> None:
    A, y = problem()
    eta = 0.9 / float(torch.linalg.eigvalsh(A.T @ A).max())
    found = pnp(y, lambda x: x @ A.T, lambda r: r @ A, soft(0.1 * eta), eta=eta, iters=40)
    x = y @ A
    for _ in range(40):
        x = soft(0.1 * eta)(x - eta * (x @ A.T - y) @ A)
    assert torch.allclose(found.x, x, atol=1e-6)
    assert torch.allclose(found.misfit[-1], (x @ A.T - y).norm(dim=1))
    assert found.objective is None
    assert found.misfit.shape == found.change.shape == (40, 3)


@pytest.mark.parametrize("first", ["data", "prox"])
def test_admm_ends_at_the_minimum_that_ista_finds(first: str) -> None:
    A, y = problem()
    maps = (lambda x: x @ A.T), (lambda r: r @ A)
    size = float(torch.linalg.eigvalsh(A.T @ A).max())
    slow = pnp(y, *maps, soft(0.1 * 0.9 / size), eta=0.9 / size, iters=3000).x
    quick = pnp(y, *maps, soft(0.1 / 0.4), "admm", rho=0.4, iters=300, tol=1e-8, first=first)
    assert torch.allclose(quick.x, slow, atol=2e-3)
    assert float(quick.change[-1].max()) < 1e-5
    assert quick.weight == 0.4


def test_the_first_steps_of_admm_written_out() -> None:
    A, y = problem()
    f, rho = soft(0.2), 0.3
    found = pnp(y, lambda x: x @ A.T, lambda r: r @ A, f, "admm", rho=rho, iters=3, tol=1e-12)
    z, u = y @ A, torch.zeros(3, 8).double()
    normal = A.T @ A + rho * torch.eye(8).double()
    for _ in range(3):
        x = torch.linalg.solve(normal, (y @ A + rho * (z - u)).T).T
        z = f(x + u)
        u = u + x - z
    assert torch.allclose(found.x, z, atol=1e-8)


@pytest.mark.parametrize("make", [dense, conv])
def test_below_the_bound_the_objective_never_rises_and_the_end_is_stationary(make) -> None:
    prox = trained(make())
    shape = prox.icnn.shape
    mask = (rand(*shape, seed=2) > 0).double()
    y = mask * rand(4, *shape, seed=3)
    found = pnp(y, lambda x: x * mask, lambda x: x * mask, prox, iters=300)
    assert found.objective.shape == (300, 4)
    assert float(found.objective.diff(dim=0).max()) <= 1e-9
    assert float(found.change[-1].max()) < 1e-2 * float(found.change[0].max())
    eta = found.weight
    assert math.isclose(eta, 0.95, rel_tol=1e-6)
    with torch.no_grad():
        again = prox(found.x - eta * (found.x * mask - y))
    assert float((again - found.x).abs().max()) < 1e-2
    R = prox.prior(found.x).value  # along another way: by inverting f
    by_hand = (found.x * mask - y).flatten(1).square().sum(1) / 2 + R / eta
    assert torch.allclose(found.objective[-1], by_hand, atol=1e-4)


def test_starts_are_the_adjoint_zeros_or_given() -> None:
    A, y = problem()
    maps = (lambda x: x @ A.T), (lambda r: r @ A)
    given = rand(3, 8, seed=5)
    for x0, start in (("adjoint", y @ A), ("zeros", torch.zeros_like(given)), (given, given)):
        found = pnp(y, *maps, lambda v: v, eta=0.1, iters=1, x0=x0)
        assert torch.allclose(found.x, start - 0.1 * (start @ A.T - y) @ A)


def test_the_norm_is_the_largest_of_all_images() -> None:
    mask = torch.tensor([[1.0, 0.5], [3.0, 0.0]]).double()
    assert math.isclose(norm_of(lambda x: x * mask, lambda x: x * mask, mask), 9.0, rel_tol=1e-6)


def test_a_released_step_of_two_is_refused_unless_forced() -> None:
    y = rand(2, 4)
    same = lambda x: x  # noqa: E731
    with pytest.raises(InputError, match=r"eta is 2 and 1 / \|A\^T A\| is 1;"):
        pnp(y, same, same, same, eta=2.0)
    assert pnp(y, same, same, same, eta=2.0, force=True, iters=2).x.shape == y.shape
    half = lambda x: x / 2  # noqa: E731
    pnp(y, half, half, same, eta=2.0, iters=2)


def test_works_on_a_hugging_face_denoiser() -> None:
    from diffusers import UNet2DModel

    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4,
    ).eval()  # fmt: skip
    y = rand(2, *SMALL).float()
    same = lambda x: x  # noqa: E731
    found = pnp(y, same, same, lambda v: v - 0.1 * unet(v, 10).sample, iters=2)
    assert found.x.shape == y.shape


# --- refusals -------------------------------------------------------------------------------------------------


def negative() -> None:
    prox = dense()
    with torch.no_grad():
        prox.icnn.out.weight[0, 0] = -0.5
    prox(rand(1, 3))


SAME = staticmethod(lambda x: x)
REFUSED = {
    "weights": (negative, r"constrained weights down to -0\.5"),
    "concave": (lambda: ConvexNet.dense(2, activation=torch.tanh), "not convex and increasing"),
    "falling": (lambda: ConvexNet.dense(2, activation=lambda t: (-t).exp()), "not convex and increasing"),
    "beta": (lambda: ConvexNet.dense(2, beta=0.0), "beta is 0.0"),
    "hidden": (lambda: ConvexNet.dense(2, hidden=()), "hidden is empty"),
    "positivity": (lambda: ConvexNet.dense(2, positivity="abs"), "positivity is 'abs'"),
    "strides": (lambda: ConvexNet.conv(SMALL, strides=(2, 1)), "the first of them 1"),
    "sides": (lambda: ConvexNet.conv((1, 10, 8)), "need multiples of 4"),
    "alpha": (lambda: LearnedProx(Quadratic(1), -0.1), "alpha is -0.1"),
    "size": (lambda: conv()(rand(1, 1, 9, 9)), "use Patches for other sizes"),
    "precision": (lambda: dense()(rand(1, 3).float()), "y is torch.float32 and the network torch.float64"),
    "small": (lambda: Patches(conv(), 8)(rand(1, 1, 7, 9)), "must fit in"),
    "gaps": (lambda: Patches(conv(), 8, 9), "stride is 9"),
    "inversion": (lambda: dense().prior(rand(1, 3), method="newton"), "method is 'newton'"),
    "bisection": (lambda: dense().prior(rand(1, 3), method="bisection"), "one number a sample"),
    "prior of NaN": (lambda: dense().prior(torch.full((1, 3), torch.nan)), "x has 3 NaN"),
    "sigma": (lambda: ProximalMatching(dense(), 0.0), "sigma is 0.0"),
    "sigmas": (lambda: ProximalMatching(dense(), (0.2, 0.1)), r"it must be \(low, high\)"),
    "gamma": (lambda: ProximalMatching(dense(), 0.1, gamma_min=-1.0), "gamma_min is -1.0"),
    "no gamma": (lambda: Stage("proximal", 1, 0.1), "gamma is None"),
    "a gamma": (lambda: Stage("l1", 1, 0.1, 1.0), "gamma is 1.0"),
    "loss": (lambda: Stage("l3", 1, 0.1), "loss is 'l3'"),
    "schedule": (lambda: ProximalMatching(dense(), 0.1, schedule=[]), "schedule is empty"),
    "data": (lambda: ProximalMatching(dense(), 0.1).fit(3), "data is int"),
    "data of NaN": (
        lambda: ProximalMatching(dense(), 0.1).fit(torch.full((2, 3), torch.nan)),
        "data has 6 NaN",
    ),
    "data of bytes": (
        lambda: ProximalMatching(dense(), 0.1).fit(torch.ones(2, 3).byte()),
        "data is torch.uint8",
    ),
    "image of bytes": (lambda: dense()(torch.ones(2, 3).byte()), "y is torch.uint8"),
    "no image": (lambda: dense().prior(rand(0, 3)), "x is .* not empty"),
    "no measurement": (lambda: pnp(rand(0, 2), SAME, SAME, SAME), "y is .* not empty"),
    "measurements of bytes": (lambda: pnp(torch.ones(1, 2).byte(), SAME, SAME, SAME), "y is torch.uint8"),
    "no data": (lambda: ProximalMatching(dense(), 0.1).fit([]), "no batch"),
    "method": (lambda: pnp(rand(1, 2), SAME, SAME, SAME, "fista"), "method is 'fista'"),
    "eta": (lambda: pnp(rand(1, 2), SAME, SAME, SAME, eta=-1.0), "eta is -1.0"),
    "rho": (lambda: pnp(rand(1, 2), SAME, SAME, SAME, "admm", rho=0.0), "rho is 0.0"),
    "order": (lambda: pnp(rand(1, 2), SAME, SAME, SAME, first="dual"), "first is 'dual'"),
    "adjoint": (lambda: pnp(rand(1, 2), SAME, lambda x: 2 * x, SAME), "AT is not the adjoint"),
    "shape": (lambda: pnp(rand(1, 2), lambda x: x[:, :1], SAME, SAME), "A gives"),
    "x0": (lambda: pnp(rand(1, 2), SAME, SAME, SAME, x0=rand(1, 3)), "x0 has shape"),
    "start": (lambda: pnp(rand(1, 2), SAME, SAME, SAME, x0="ones"), "x0 is 'ones'"),
    "y": (lambda: pnp(torch.full((1, 2), torch.inf), SAME, SAME, SAME), "y has 2 NaN"),
    "nothing": (lambda: pnp(rand(1, 2), lambda x: 0 * x, lambda x: 0 * x, SAME), "maps everything to 0"),
    "result": (lambda: pnp(rand(1, 2), SAME, SAME, lambda v: v / 0), "the reconstruction has"),
}


@pytest.mark.parametrize(("call", "words"), REFUSED.values(), ids=REFUSED)
def test_refuses(call, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()


def test_bad_data_stop_training_with_the_step_named() -> None:
    batches = [torch.ones(2, 3), torch.ones(2, 3), torch.full((2, 3), torch.nan)]
    with pytest.raises(InputError, match="Step 2 of training stops: data has 6 NaN"):
        ProximalMatching(LearnedProx(ConvexNet.dense(3)), 0.1).fit(batches)


def test_gamma_falls_in_the_published_plan() -> None:
    gammas = [s.gamma for s in ProximalMatching(dense(), 0.1, stages=3, gamma_min=0.5).plan(3) if s.gamma]
    assert gammas == [2.0, 1.0, 0.5]
    assert all(a > b for a, b in pairwise(gammas))
