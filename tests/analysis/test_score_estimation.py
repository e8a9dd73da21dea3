"""Score estimation as regression: Tweedie's form, the kernel's path, the rule that stops it, and the three errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from gradmatch.analysis import (
    DenoisingRegression,
    EmpiricalKernel,
    KernelPath,
    ReLUKernel,
    TweedieScore,
    TwoLayerReLU,
    error_split,
    stopping_time,
    train_score,
)
from gradmatch.analysis._kernel_path import descent_coefficients, step_grid
from gradmatch.core.checks import InputError
from gradmatch.core.path import OrnsteinUhlenbeck, VariancePreserving
from gradmatch.core.sampler import Solver
from gradmatch.zoo.oracles import MixtureOracle

PATH = OrnsteinUhlenbeck()
MEANS = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
MIXTURE = MixtureOracle(MEANS, 0.05, path=PATH, kind="x0")


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def truth(x: Tensor, t: Tensor) -> Tensor:
    return MIXTURE(x.double(), t.double()).tensor.to(x)


def points(n: int, seed: int = 0) -> Tensor:
    return MIXTURE.sample(n, torch.Generator().manual_seed(seed))


def task(count: int = 40, seed: int = 0, **options) -> DenoisingRegression:
    return DenoisingRegression(
        points(count, seed), PATH, **{"t_min": 0.2, "t_max": 2.0, "seed": seed, **options}
    )


def kernel_path(n: int = 40, **options) -> tuple[KernelPath, DenoisingRegression]:
    own = task(n)
    return KernelPath(ReLUKernel(0.2), (own.inputs, own.t), own.labels, **options), own


class Smooth(nn.Module):
    """Any network of x and t."""

    def __init__(self, dim: int = 2, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(dim + 1, width), nn.Tanh(), nn.Dropout(0.5), nn.Linear(width, dim)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.body(torch.cat([x, t[:, None].to(x)], 1))


def smooth(dim: int = 2) -> Smooth:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Smooth(dim)


# --- the regression ------------------------------------------------------------------------------------------


def test_tweedie_form_of_one_gaussian_is_its_score():
    """f exact gives -x / (a^2 s^2 + h); score -> x0 -> score is the same."""
    s, x, t = 0.7, torch.randn(5, 3).double(), torch.rand(5).double() + 0.1
    a, h = (v[:, None] for v in (torch.exp(-t / 2), 1 - torch.exp(-t)))
    f = TweedieScore(lambda x, t: a * s**2 / (a**2 * s**2 + h) * x, PATH)
    score = f.score(x, t)
    torch.testing.assert_close(score, -x / (a**2 * s**2 + h))
    torch.testing.assert_close(score, a / h * f(x, t).tensor - x / h)
    back = PATH.convert(PATH.convert(f(x, t), "score", x, t), "x0", x, t)
    torch.testing.assert_close(back.tensor, f(x, t).tensor)


def test_truth_of_a_mixture_is_the_gradient_of_its_density():
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    t = torch.linspace(0.2, 2, 6, dtype=torch.float64)
    expected = torch.autograd.grad(MIXTURE.log_density(x, t).sum(), x)[0]
    torch.testing.assert_close(TweedieScore(truth, PATH).score(x.detach(), t), expected)


def test_weighted_score_error_is_the_error_of_f():
    x, t = torch.randn(50, 2).double(), torch.rand(50).double() + 0.2
    net = TwoLayerReLU(2, 32).double()
    with torch.no_grad():
        net.weight.add_(1)
    weight = (1 - torch.exp(-t)) / torch.exp(-t / 2)
    apart = TweedieScore(net, PATH).score(x, t) - TweedieScore(truth, PATH).score(x, t)
    torch.testing.assert_close(
        (weight[:, None] * apart).square().sum().detach(), (net(x, t) - truth(x, t)).square().sum().detach()
    )


def test_noisy_and_clean_losses_differ_by_a_constant():
    """In expectation, for any network: here over 40,000 draws."""
    own, gaps = task(4000, draws=10), []
    for seed in (0, 1):
        net = TwoLayerReLU(2, 64, seed=seed).double()
        with torch.no_grad():
            net.weight.add_(
                0.5 * torch.randn(net.weight.shape, generator=torch.Generator().manual_seed(seed))
            )
            f, true = net(own.inputs, own.t), truth(own.inputs, own.t)
            gaps.append((f - own.labels).square().sum(1) - (f - true).square().sum(1))
    difference = gaps[0] - gaps[1]
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / 200
    assert float(gaps[0].mean()) > 0.1


def test_triples_are_of_the_forward_process():
    own = task(3, n=20_000)
    a = torch.exp(-own.t / 2)[:, None]
    noise = (own.inputs - a * own.labels) / (1 - a**2).sqrt()
    assert abs(float(noise.mean())) < 0.03
    assert float(noise.var()) == pytest.approx(1, abs=0.03)
    assert abs(float(torch.corrcoef(torch.stack([own.t, noise[:, 0]]))[0, 1])) < 0.03
    assert (own.t.min() > 0.2) & (own.t.max() < 2)
    assert float(own.t.mean()) == pytest.approx(1.1, abs=0.02)
    assert len({tuple(r) for r in own.labels.tolist()}) == 3
    every = task(5, draws=4)
    assert torch.equal(every.labels, every.data.repeat_interleave(4, 0))
    score = task(5, target="score")
    h = 1 - torch.exp(-score.t)
    torch.testing.assert_close(score.labels, -score.noise / h.sqrt()[:, None])


def test_data_drawn_under_the_same_seed_does_not_decide_the_times():
    """One stream of numbers for data and noise would tell the network the answer."""
    for seed in range(3):
        own = task(2000, seed=seed)
        for column in (own.data[:, 0], own.data[:, 1]):
            assert abs(float(torch.corrcoef(torch.stack([column, own.t]))[0, 1])) < 0.08
            assert abs(float(torch.corrcoef(torch.stack([column, own.noise[:, 0]]))[0, 1])) < 0.08


def test_clipping_resampling_and_splitting():
    own = task(200, clip=1.2)
    assert float(own.inputs.norm(dim=1).max()) <= 1.2 + 1e-9
    free = task(200)
    assert own.clipped == pytest.approx(float((free.inputs.norm(dim=1) > 1.2).double().mean()))
    fixed, fresh = task(8), task(8, resample=True)
    assert torch.equal(fixed.epoch()[0], fixed.epoch()[0])
    assert not torch.equal(fresh.epoch()[0].clone(), fresh.epoch()[0])
    train, out = task(50).split(0.2, draws=7)
    assert (len(train), len(out)) == (40, 70)
    rows = [{tuple(r) for r in part.data.tolist()} for part in (train, out)]
    assert not rows[0] & rows[1]
    assert torch.equal(task(50).split(0.2)[1].inputs, task(50).split(0.2)[1].inputs)


def test_projection_never_raises_the_error():
    x, t = 3 * torch.randn(200, 2).double(), torch.rand(200).double() + 0.2
    wild = lambda x, t: 3 * x  # noqa: E731
    radius = float(points(500).norm(dim=1).max())
    plain, held = (TweedieScore(wild, PATH, r)(x, t).tensor for r in (None, radius))
    assert bool((held.norm(dim=1) <= radius + 1e-9).all())
    errors = [(f - truth(x, t)).norm(dim=1) for f in (plain, held)]
    assert bool((errors[1] <= errors[0] + 1e-12).all())
    assert float(errors[1].mean()) < float(errors[0].mean())


# --- network and kernels -------------------------------------------------------------------------------------


def test_network_starts_at_zero_and_its_outer_weights_stay():
    net = TwoLayerReLU(3, 32, seed=4)
    assert float(net(torch.randn(7, 3), torch.rand(7)).detach().abs().max()) == 0
    assert [k for k, _ in net.named_parameters()] == ["weight"]
    assert set(net.signs.unique().tolist()) == {-1.0, 1.0}
    x, t = torch.randn(4, 3), torch.rand(4)
    with torch.no_grad():
        net.weight.add_(torch.randn(net.weight.shape))
    phi = torch.cat([x, (t - 0.05)[:, None], torch.ones(4, 1)], 1)
    by_hand = sum(
        (phi @ net.weight[r]).relu()[:, None] * net.signs[r]
        - (phi @ net.start[r]).relu()[:, None] * net.signs[r]
        for r in range(32)
    ) / math.sqrt(32)
    torch.testing.assert_close(net(x, t), by_hand)


def test_slopes_without_autograd_are_the_gradient():
    own, net = task(15), TwoLayerReLU(2, 16, t_min=0.2).double()
    with torch.no_grad():
        net.weight.add_(torch.randn(net.weight.shape, generator=torch.Generator().manual_seed(0)))
    loss, ((parameter, gradient),) = net.slopes(own.inputs, own.t, own.labels)()
    expected = (net(own.inputs, own.t) - own.labels).square().sum(1).mean()
    assert parameter is net.weight
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, net.weight)[0])


def test_kernel_is_positive_and_the_limit_of_the_network_s_own():
    own = task(12)
    x, t = own.inputs, own.t
    limit = ReLUKernel(0.2)(x, t, x, t)
    torch.testing.assert_close(limit, limit.T)
    assert float(torch.linalg.eigvalsh(limit)[0]) > -1e-12
    phi = torch.cat([x, (t - 0.2)[:, None], torch.ones(12, 1).double()], 1)
    torch.testing.assert_close(limit.diagonal(), phi.square().sum(1) / 2, rtol=1e-6, atol=1e-6)
    errors = []
    for m in (50, 5000):
        own_kernel = EmpiricalKernel(TwoLayerReLU(2, m, t_min=0.2, seed=1))(x, t, x, t)
        cube = own_kernel.reshape(12, 2, 12, 2)
        errors.append(float((cube[:, 0, :, 0] - limit).norm() / limit.norm()))
        errors.append(float(cube[:, 0, :, 1].norm() / limit.norm()))
    assert errors[2] < 0.3 * errors[0]  # a tenth is expected of 1 / sqrt(m)
    assert errors[3] < 0.3 * errors[1]


def test_empirical_kernel_against_its_formula():
    net = TwoLayerReLU(2, 30, t_min=0.2, seed=2).double()
    own = task(5)
    phi = torch.cat([own.inputs, (own.t - 0.2)[:, None], torch.ones(5, 1).double()], 1)
    live = (phi @ net.weight.T > 0).double().detach()
    signs = net.signs
    expected = (
        torch.einsum("ab,ri,rj,ar,br->aibj", phi @ phi.T, signs, signs, live, live).reshape(10, 10) / 30
    )
    found = EmpiricalKernel(net)(own.inputs, own.t, own.inputs, own.t)
    torch.testing.assert_close(found, expected)
    other = smooth()
    other.train()
    first = EmpiricalKernel(other)(own.inputs, own.t, own.inputs, own.t)
    assert torch.equal(
        first, EmpiricalKernel(other)(own.inputs, own.t, own.inputs, own.t)
    )  # no dropout in it
    assert other.training


def test_one_step_of_the_network_is_a_step_with_its_own_kernel():
    own, gaps = task(10), []
    for eta in (0.02, 0.01):
        net = TwoLayerReLU(2, 4000, t_min=0.2).double()
        path = KernelPath(EmpiricalKernel(net), (own.inputs, own.t), own.labels, eta=eta)
        probe = torch.randn(6, 2, generator=torch.Generator().manual_seed(1)).double(), torch.ones(6).double()
        fit = train_score(net, own, lr=eta, steps=1, stop=None)
        gaps.append(float((fit.net(*probe) - path.predict(*probe, 1)).detach().norm()))
        size = float(path.predict(*probe, 1).norm())
    assert gaps[1] < 1e-2 * size
    assert gaps[1] < 0.6 * gaps[0]


# --- the path of kernel descent ------------------------------------------------------------------------------


def test_closed_form_is_the_loop_at_training_and_other_points():
    path, own = kernel_path()
    k = ReLUKernel(0.2)(own.inputs, own.t, own.inputs, own.t)
    probe = torch.randn(9, 2).double(), torch.rand(9).double() + 0.3
    across = ReLUKernel(0.2)(*probe, own.inputs, own.t)
    fit, coefficients = torch.zeros_like(own.labels), torch.zeros_like(own.labels)
    fits, others = [fit], [across @ coefficients]
    for _ in range(50):
        coefficients = coefficients - path.eta / 40 * (fit - own.labels)
        fit = fit - path.eta / 40 * k @ (fit - own.labels)
        fits.append(fit)
        others.append(across @ coefficients)
    steps = list(range(51))
    torch.testing.assert_close(path.fit_at(steps), torch.stack(fits), atol=1e-10, rtol=0)
    torch.testing.assert_close(path.predict(*probe, steps), torch.stack(others), atol=1e-10, rtol=0)
    torch.testing.assert_close(path.fit_at(7), fits[7], atol=1e-10, rtol=0)
    torch.testing.assert_close(path.fit_at(10**13), own.labels, atol=1e-5, rtol=0)  # interpolates
    errors = path.loss(*probe, truth(*probe), [3, 9])
    expected = [(others[i] - truth(*probe)).square().sum(1).mean() for i in (3, 9)]
    torch.testing.assert_close(errors, torch.stack(expected))


def test_coefficients_and_their_limit_at_zero():
    values = torch.tensor([0.0, 1e-18, 0.1, 0.9, 1.7], dtype=torch.float64)
    steps = torch.tensor([0, 1, 2, 1000])
    found = descent_coefficients(values, 1.0, steps)
    expected = torch.stack([(1 - (1 - values) ** k) / values for k in steps])
    torch.testing.assert_close(found[:, 2:], expected[:, 2:])
    torch.testing.assert_close(found[:, 0], steps.double())
    torch.testing.assert_close(found[:, 1], steps.double())


def test_a_kernel_of_low_rank_and_large_steps():
    """Exact zeros among the eigenvalues move nothing; eta up to 2 / the largest oscillates and still converges."""
    x, t = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)).double(), torch.ones(8).double()
    y = x @ torch.tensor([[1.0], [2.0]]).double()
    linear = lambda a, s, b, u: a @ b.T  # noqa: E731
    path = KernelPath(linear, (x, t), y)
    assert len(path.eigenvalues) == 2
    new = torch.randn(3, 2).double()
    torch.testing.assert_close(path.predict(new, t[:3], 100_000), new @ torch.tensor([[1.0], [2.0]]).double())
    fast = KernelPath(linear, (x, t), y, eta=1.9 / float(path.eigenvalues[-1]))
    torch.testing.assert_close(fast.fit_at(100_000), y)
    with pytest.raises(InputError, match="gradient descent diverges"):
        KernelPath(linear, (x, t), y, eta=2.1 / float(path.eigenvalues[-1]))


def test_landmarks_approximate_and_all_of_them_are_exact():
    path, own = kernel_path()
    probe = torch.randn(9, 2).double(), torch.rand(9).double() + 0.3
    whole, _ = kernel_path(landmarks=40)
    torch.testing.assert_close(whole.eigenvalues[-30:], path.eigenvalues[-30:], rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(whole.predict(*probe, 30), path.predict(*probe, 30), rtol=1e-5, atol=1e-8)
    assert whole.norm_of_fit(30) == pytest.approx(path.norm_of_fit(30), rel=1e-5)
    some, _ = kernel_path(landmarks=20)
    assert len(some.eigenvalues) <= 20
    gap = (some.predict(*probe, 30) - path.predict(*probe, 30)).norm() / path.predict(*probe, 30).norm()
    assert 0 < float(gap) < 0.15
    rule = some.rule(own.inputs, own.t, own.labels, sigma=0.5, norm=1.0)
    assert rule.step == stopping_time(some.eigenvalues, some.eta, 0.5, 1.0, n=40)


def test_a_kernel_with_all_outputs_is_the_joint_problem():
    own = task(10)
    net = TwoLayerReLU(2, 20, t_min=0.2).double()
    path = KernelPath(EmpiricalKernel(net), (own.inputs, own.t), own.labels, eta=0.3)
    k, fit = EmpiricalKernel(net)(own.inputs, own.t, own.inputs, own.t), torch.zeros(20).double()
    for _ in range(30):
        fit = fit - 0.3 / 10 * k @ (fit - own.labels.flatten())
    torch.testing.assert_close(path.fit_at(30), fit.reshape(10, 2), atol=1e-9, rtol=0)
    other = path.with_labels(2 * own.labels)
    torch.testing.assert_close(other.fit_at(30), 2 * path.fit_at(30))


def test_norm_of_a_fit_is_its_quadratic_form():
    path, own = kernel_path()
    k = ReLUKernel(0.2)(own.inputs, own.t, own.inputs, own.t)
    ridge = 1e-3 * torch.linalg.eigvalsh(k)[-1] * torch.eye(40).double()
    fit = path.fit_at(20)
    expected = (fit * torch.linalg.solve(k + ridge, fit)).sum(0).max().sqrt()
    assert path.norm_of_fit(20) == pytest.approx(float(expected), rel=1e-8)
    assert path.norm_of_fit(20, ridge=1e-2) < path.norm_of_fit(20)


# --- the rule ------------------------------------------------------------------------------------------------


def keeps(values: Tensor, eta: float, sigma: float, norm: float, k: int) -> bool:
    time = eta * k
    complexity = math.sqrt(float(values.clamp(max=1 / time).mean()))
    return complexity <= norm / (2 * math.e * sigma * time)


def test_stopping_time_is_the_last_step_that_keeps_the_inequality():
    path, _ = kernel_path()
    values = path.eigenvalues
    n, eta = len(values), path.eta
    for sigma, norm in ((0.3, 1.0), (0.8, 2.0), (0.05, 5.0)):
        k = stopping_time(values, eta, sigma, norm)
        assert keeps(values, eta, sigma, norm, k)
        assert not keeps(values, eta, sigma, norm, k + 1)
    found = [stopping_time(values, eta, s, b) for s, b in ((0.5, 1.0), (0.5, 2.0), (0.5, 4.0))]
    assert found == sorted(found)
    assert found[0] < found[-1]
    found = [stopping_time(values, eta, s, 2.0) for s in (0.2, 0.4, 0.8)]
    assert found == sorted(found, reverse=True)
    padded = torch.cat([values, torch.zeros(n, dtype=torch.float64)])
    assert stopping_time(padded, eta, 0.4, 2.0) > stopping_time(values, eta, 0.4, 2.0)
    assert stopping_time(padded, eta, 0.4, 2.0) == stopping_time(values, eta, 0.4, 2.0, n=2 * n)
    assert stopping_time(values, eta, 0.0, 1.0) is None
    assert stopping_time(values, eta, 100.0, 1.0) == 0
    assert stopping_time(values, eta, 0.4, 0.0) == 0
    # K in place of K / N would stop elsewhere
    assert stopping_time(n * values, eta / n, 0.4, 2.0) != stopping_time(values, eta, 0.4, 2.0)


def test_rule_estimates_noise_and_norm_where_the_hold_out_stops():
    path, _ = kernel_path(100)
    out = task(30, seed=5, draws=10)
    rule = path.rule(out.inputs, out.t, out.labels, most=5000)
    grid = step_grid(5000)
    losses = path.loss(out.inputs, out.t, out.labels, grid)
    assert rule.pilot == int(grid[losses.argmin()])
    assert rule.sigma == pytest.approx(math.sqrt(float(losses.min()) / 2))
    assert rule.norm == pytest.approx(path.norm_of_fit(rule.pilot))
    assert rule.ridge == 1e-3
    assert rule.step == stopping_time(path.eigenvalues, path.eta, rule.sigma, rule.norm)
    assert path.rule(out.inputs, out.t, out.labels, sigma=0.0).step is None


def test_steps_of_the_grid():
    grid = step_grid(10_000)
    assert (int(grid[0]), int(grid[-1])) == (1, 10_000)
    assert grid[:15].tolist() == list(range(1, 16))
    assert bool((grid[1:] <= (1.06 * grid[:-1] + 1)).all())
    assert step_grid(1).tolist() == [1]


# --- training ------------------------------------------------------------------------------------------------


def test_training_stops_where_held_out_points_say():
    own, net = task(60), TwoLayerReLU(2, 128, t_min=0.2)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    fit = train_score(net, own, steps=1500)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in state.items())
    assert net.weight.grad is None
    assert fit.step == fit.looks[fit.held.index(min(fit.held))]
    assert 0 < fit.step < 1500
    assert fit.losses[-1] < fit.losses[fit.looks.index(fit.step)]  # the training loss falls for ever
    train, out = own.split()
    loss = (fit.net(out.inputs, out.t) - out.labels).square().sum(1).mean()
    assert float(loss.detach()) == pytest.approx(min(fit.held), rel=1e-6)
    k = ReLUKernel(0.2)(train.inputs, train.t, train.inputs, train.t)
    assert fit.largest == pytest.approx(float(torch.linalg.eigvalsh(k / len(train))[-1]))
    assert fit.eta == pytest.approx(1 / fit.largest)
    again = train_score(net, own, steps=1500)
    assert again.held == fit.held


def test_training_by_the_rule_and_to_the_end():
    own, net = task(60), TwoLayerReLU(2, 128, t_min=0.2)
    fit = train_score(net, own, stop="rule", steps=500)
    assert fit.rule is not None
    assert fit.step == fit.looks[-1] == min(500, fit.rule.step)
    seen = []
    end = train_score(net, own, stop=None, steps=20, progress=lambda *at: seen.append(at))
    assert (end.step, end.held, end.rule) == (20, (), None)
    assert seen[-1] == (20, 20)


def test_any_network_is_trained_with_fixed_and_with_fresh_noise():
    """A network whose own kernel gives the step size; fresh noise every step takes the overfitting away."""
    net = smooth().eval()
    rises = []
    for resample in (False, True):
        own = task(20, resample=resample)
        fit = train_score(net, own, steps=400)
        train = own.split()[0]
        kernel = EmpiricalKernel(net)(*(v for _ in (0, 1) for v in (train.inputs, train.t)))
        assert fit.largest == pytest.approx(float(torch.linalg.eigvalsh(kernel)[-1]) / len(train), rel=1e-3)
        rises.append(fit.losses[0] - fit.losses[-1])
    assert min(rises) > 0


def test_three_errors_along_one_training():
    own, net = task(60), TwoLayerReLU(2, 512, t_min=0.2)
    probe_task = task(300, seed=9)
    probe = probe_task.inputs, probe_task.t
    found = error_split(net, own, truth, [0, 5, 60, 2000], probe)
    path = KernelPath(ReLUKernel(0.2), (own.inputs, own.t), own.labels)
    assert found.kernel == pytest.approx(path.loss(*probe, truth(*probe), [0, 5, 60, 2000]).tolist())
    assert found.coupling[0] == found.mismatch[0] == 0
    assert (
        found.approximation[0]
        == found.network[0]
        == pytest.approx(float(truth(*probe).square().sum(1).mean()))
    )
    assert list(found.mismatch) == sorted(found.mismatch)  # noise is fitted more and more
    assert list(found.approximation) == sorted(found.approximation, reverse=True)
    assert found.coupling[1] < 0.02 * found.kernel[1]
    assert found.kernel[3] > found.kernel[2]
    narrow = error_split(TwoLayerReLU(2, 32, t_min=0.2), own, truth, [5], probe)
    assert narrow.coupling[0] > found.coupling[1]


def test_samples_of_the_exact_score_are_the_mixture():
    exact = TweedieScore(truth, PATH, radius=2.0)
    for step in ("ddim", "sde"):
        x = exact.sample(400, 2, t_min=0.02, steps=80, step=step)
        near = torch.cdist(x.double(), MEANS)
        assert float(near.min(1).values.mean()) < 0.12  # components have a deviation of 0.05
        noisy = exact.sample(400, 2, t_min=0.02, steps=80, step=step, denoise=False)
        assert 0.12 < float(torch.cdist(noisy.double(), MEANS).min(1).values.mean()) < 0.35
        assert float(torch.bincount(near.argmin(1), minlength=4).min()) > 60
    assert torch.equal(exact.sample(5, 2, seed=3), exact.sample(5, 2, seed=3))


def test_with_a_scheduler_of_diffusers_and_the_common_solver():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=1000)
    path = VariancePreserving(scheduler.alphas_cumprod)
    own = DenoisingRegression(points(30).float(), path, t_min=10, t_max=900)
    fit = train_score(smooth().eval(), own, lr=1e-7, steps=3)
    score = TweedieScore(fit.net, path, own.radius)
    found = Solver([900.0, 500.0, 100.0, 10.0], "ddim").run(score, path, torch.randn(6, 2))
    assert found.calls.tolist() == [3] * 6
    with pytest.raises(InputError, match="needs an OrnsteinUhlenbeck"):
        score.sample(2, 2, step="sde")


# --- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"t_min": 0.0}, r"t_min is 0\.0; it must be above 0"),
        ({"t_min": math.nan}, "t_min is nan"),
        ({"t_max": math.inf}, "t_max is inf"),
        ({"t_max": 0.1}, "must be above t_min"),
        ({"radius": 1.0}, "it must hold all data"),
        ({"clip": 0.0}, "clip is 0"),
        ({"n": 0}, "n is 0"),
        ({"draws": 0}, "draws is 0"),
        ({"target": "noise"}, "target is 'noise'"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_refusals_of_the_task(options, says):
    with pytest.raises(InputError, match=says):
        task(5, **options)


def test_other_refusals():
    path, own = kernel_path(10)
    net = TwoLayerReLU(2, 16)
    bad = own.data.clone()
    bad[0, 0] = math.nan
    x, t, y = own.inputs, own.t, own.labels
    for call, says in (
        (lambda: DenoisingRegression(bad), "NaN"),
        (lambda: DenoisingRegression(torch.zeros(5)), r"floats \(points, d\)"),
        (lambda: DenoisingRegression(own.data[:1]).split(), "one point"),
        (lambda: train_score(net, own, lr=1e3), "gradient descent diverges"),
        (lambda: train_score(net, own, stop="patience"), "stop is 'patience'"),
        (lambda: train_score(net, task(8, resample=True), stop="rule"), "its noise is never fitted"),
        (lambda: train_score(net, own, steps=0), "steps is 0"),
        (lambda: KernelPath(ReLUKernel(), (x, t), y, memory=1e-9), r"give landmarks \(Nystrom\)"),
        (lambda: KernelPath(ReLUKernel(), (x, t[:3]), y), "they must be"),
        (lambda: KernelPath(ReLUKernel(), (x, t * math.nan), y), "NaN"),
        (lambda: KernelPath(lambda a, s, b, u: torch.zeros(len(a), len(b)), (x, t), y), "zero on all inputs"),
        (lambda: path.predict(x, t, -1), "a number of steps"),
        (lambda: path.fit_at(torch.tensor([1.5])), "a number of steps"),
        (lambda: path.with_labels(y[:3]), r"it must be \(10, 2\)"),
        (lambda: stopping_time(torch.ones(3), 0.0, 1.0, 1.0), "eta is 0"),
        (lambda: stopping_time(torch.ones(3), 1.0, -1.0, 1.0), "sigma is -1"),
        (lambda: stopping_time(torch.ones(0), 1.0, 1.0, 1.0), "eigenvalues is empty"),
        (lambda: error_split(net, task(8, resample=True), truth, [1], (x, t)), "must regress X_0 on fixed"),
        (lambda: error_split(net, own, truth, [3, 1], (x, t)), "it must rise"),
        (lambda: TwoLayerReLU(2, 0), "width is 0"),
        (lambda: TweedieScore(net, PATH, radius=-1), "radius is -1"),
    ):
        with pytest.raises(InputError, match=says):
            call()
