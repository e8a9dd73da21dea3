"""Simplex paths against autograd, explicit sums, simulation and the closed form for two classes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradmatch.core.checks import InputError
from gradmatch.core.path import Prediction
from gradmatch.core.simplex import GumbelPath, LinearSimplexPath, dirichlet_noise, gumbel_noise, on_simplex

K = 5
PATHS = {"published": GumbelPath(), "consistent": GumbelPath(signal=4.0), "linear": LinearSimplexPath()}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(n: int = 7, k: int = K, seed: int = 0) -> Tensor:
    x = dirichlet_noise(n, 3, k, generator=seeded(seed)).double()
    return x / x.sum(-1, keepdim=True)


def said(p: Tensor) -> Prediction:
    return Prediction("posterior", p)


@pytest.mark.parametrize("name", PATHS)
def test_points_are_distributions_and_move_towards_the_token(name):
    path, g = PATHS[name], seeded()
    tokens = torch.arange(2000)[:, None] % K
    noise = (dirichlet_noise if name == "linear" else gumbel_noise)(2000, 1, K, generator=g)
    hot = F.one_hot(tokens, K).float()
    at = []
    for t in (0.0, 0.25, 0.5, 1.0):
        x = path.sample(hot, noise, torch.full((2000,), t))
        torch.testing.assert_close(x.sum(-1), torch.ones(2000, 1))
        assert float(x.min()) >= 0
        at.append(float((x * hot).sum(-1).mean()))
    assert at == sorted(at)
    assert at[-1] > 0.98 if name != "published" else 0.4 < at[-1] < 0.9


def test_gumbel_noise_is_finite_and_standard_and_the_start_is_nearly_uniform():
    g = gumbel_noise(200000, generator=seeded())
    assert torch.isfinite(g).all()
    assert float(g.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(g.var()) == pytest.approx(torch.pi**2 / 6, abs=0.02)
    x = GumbelPath().prior(gumbel_noise(1000, 1, K, generator=seeded()))
    assert float((x - 1 / K).abs().max()) < 0.25
    torch.testing.assert_close(
        x, GumbelPath().sample(torch.zeros_like(x), gumbel_noise(1000, 1, K, generator=seeded()), 0.0)
    )


def test_the_raw_one_hot_goes_into_the_softmax():
    """Its logarithm would multiply the signal by 18 or more."""
    x = GumbelPath().sample(F.one_hot(torch.tensor([[0]]), 3).float(), torch.zeros(1, 1, 3), 1.0)
    tau = 10 * torch.exp(torch.tensor(-3.0))
    assert float(x[0, 0, 0] / x[0, 0, 1]) == pytest.approx(float(torch.exp(1 / tau)), rel=1e-5)


def test_the_conditional_velocity_is_the_time_derivative():
    for name, t in (("published", 0.3), ("published", 0.9), ("consistent", 0.4)):
        path = PATHS[name]
        hot = F.one_hot(torch.tensor([[1]]), K).double()

        def at(s: Tensor, path=path, hot=hot) -> Tensor:
            return path.sample(hot, torch.zeros_like(hot), s)

        found = torch.func.jacfwd(at)(torch.tensor(t, dtype=torch.float64))
        x = at(torch.tensor(t, dtype=torch.float64))
        torch.testing.assert_close(path.velocity(x, said(hot), t), found, rtol=1e-6, atol=1e-8)


def test_the_marginal_velocity_is_the_sum_over_tokens_and_stays_on_faces():
    path, x, p = GumbelPath(), points(), points(seed=1)
    t = 0.4
    rate = 3.0 / float(path.tau(t))
    total = torch.zeros_like(x)
    for k in range(K):
        total += p[..., k : k + 1] * rate * x[..., k : k + 1] * (F.one_hot(torch.tensor(k), K) - x)
    found = path.velocity(x, said(p), t)
    torch.testing.assert_close(found, total)
    torch.testing.assert_close(found.sum(-1), torch.zeros(7, 3).double(), rtol=0, atol=1e-12)
    edge = x.clone()
    edge[..., 0] = 0
    edge /= edge.sum(-1, keepdim=True)
    assert torch.equal(path.velocity(edge, said(p), t)[..., 0], torch.zeros(7, 3).double())


@pytest.mark.parametrize("name", PATHS)
def test_the_exact_step_is_euler_to_first_order_and_composes(name):
    path, x, p, t = PATHS[name], points(), points(seed=1), 0.3
    slack = 1e-7 if name == "linear" else 0.0  # there Euler is exact, and times are in float32
    errors = []
    for h in (1e-2, 1e-3):
        euler = x + h * path.velocity(x, said(p), t)
        errors.append(float((path.step(x, said(p), t, t + h) - euler).abs().max()))
    assert errors[1] < 0.02 * errors[0] + slack
    whole = path.step(x, said(p), 0.2, 0.8)
    parts = x
    for k in range(6):
        parts = path.step(parts, said(p), 0.2 + 0.1 * k, 0.3 + 0.1 * k)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(path.inverse_step(whole, said(p), 0.2, 0.8), x)
    assert float(path.step(x, said(p), 0.0, 1.0).min()) >= 0  # at any step size


def test_times_of_each_example_are_taken():
    path, x, p = GumbelPath(), points(2), points(2, seed=1)
    both = path.step(x, said(p), torch.tensor([0.1, 0.5]), torch.tensor([0.2, 0.9]))
    torch.testing.assert_close(both[1], path.step(x, said(p), 0.5, 0.9)[1])


@pytest.mark.parametrize("name", ["published", "consistent"])
@pytest.mark.parametrize("k", [2, 4, 20])
def test_the_closed_form_posterior_is_calibrated(name, k):
    path, g, n, t = PATHS[name], seeded(), 40000, 0.35
    prior = dirichlet_noise(k, generator=seeded(3)).double()
    tokens = torch.multinomial(prior, n, replacement=True, generator=g)
    x = path.sample(F.one_hot(tokens, k)[:, None].float(), gumbel_noise(n, 1, k, generator=g), t).double()
    p = path.posterior(x, t, prior)[:, 0]
    own = p[:, 0]
    order = own.argsort()
    for part in order.chunk(8):
        expected, found = float(own[part].mean()), float((tokens[part] == 0).double().mean())
        assert abs(expected - found) < 5 * (max(expected * (1 - expected), 1e-3) / len(part)) ** 0.5


def test_the_published_posterior_is_the_same_at_all_times():
    """The path is one draw rescaled; the argmax is right as often at the end as at the beginning."""
    path, g = GumbelPath(), seeded()
    tokens = torch.arange(4000) % 4
    hot, noise = F.one_hot(tokens, 4)[:, None].double(), gumbel_noise(4000, 1, 4, generator=g).double()
    prior = dirichlet_noise(4, generator=seeded(3)).double()
    first, last = (path.posterior(path.sample(hot, noise, t), t, prior) for t in (0.0, 1.0))
    torch.testing.assert_close(first, last, rtol=1e-6, atol=1e-9)
    right = float((path.sample(hot, noise, 1.0)[:, 0].argmax(-1) == tokens).double().mean())
    assert right == pytest.approx(
        float(torch.exp(torch.tensor(2.0)) / (torch.exp(torch.tensor(2.0)) + 3)), abs=0.03
    )


def test_for_two_classes_the_path_is_logistic():
    path, t = GumbelPath(), 0.7
    g = gumbel_noise(9, 1, 2, generator=seeded()).double()
    x = path.sample(F.one_hot(torch.zeros(9, 1, dtype=torch.long), 2).double(), g, t)
    expected = torch.sigmoid((1 + (g[..., 0] - g[..., 1]) / 2) / path.tau(t))
    torch.testing.assert_close(x[..., 0], expected.double(), rtol=1e-6, atol=1e-9)
    p = torch.tensor([[[0.8, 0.2]]]).double().expand_as(x)
    after = path.step(x, said(p), 0.7, 0.9)
    logit = torch.logit(x[..., 0]) + (1 / path.tau(0.9) - 1 / path.tau(0.7)) * 0.6
    torch.testing.assert_close(after[..., 0], torch.sigmoid(logit), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["published", "consistent"])
def test_the_score_is_the_gradient_of_the_log_density(name):
    """ExpConcrete: const + sum_j (l_j - s y_j) - K logsumexp(l - s y), with l = beta a e_k, s = beta tau."""
    path, t, k = PATHS[name], 0.45, 1
    y = points(1)[0, :1].log()[None]
    logits = path.beta * path.amount(torch.tensor(t)) * F.one_hot(torch.tensor(k), K).double()
    s = path.beta * path.tau(t)

    def density(y: Tensor) -> Tensor:
        return (logits - s * y).sum() - K * torch.logsumexp(logits - s * y, -1).sum()

    expected = torch.func.grad(density)(y)
    found = path.score(path.weights(logits, y.exp(), t), t)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_refusals():
    x = points()
    with pytest.raises(InputError, match="x lies off the simplex"):
        on_simplex("x", 1.01 * x)
    with pytest.raises(InputError, match="x lies off the simplex"):
        on_simplex("x", x - torch.eye(K)[0] * 2 + torch.eye(K)[1] * 2)
    with pytest.raises(InputError, match='predicts "x0"'):
        GumbelPath().step(x, Prediction("x0", x), 0.0, 1.0)
    with pytest.raises(InputError, match="cannot be taken back"):
        LinearSimplexPath().inverse_step(x, said(x), 0.5, 1.0)
    for bad in ({"tau_max": 0}, {"decay": -1}, {"beta": 0}, {"signal": 0}):
        with pytest.raises(InputError, match="above 0"):
            GumbelPath(**bad)
