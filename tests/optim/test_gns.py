"""GNS against closed forms: quadratics, changes of variables, curvature by torch.func; and the optimizer contract."""

from __future__ import annotations

import warnings
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from optimizer_contract import OptimizerContract
from torch import Tensor, nn

from gradmatch.core.checks import InputError
from gradmatch.core.curvature import Curvature
from gradmatch.core.problem import Problem
from gradmatch.core.shifted import LowRank
from gradmatch.optim import GradNormSmooth
from gradmatch.optim._newton_rules import CubicNewton, GradientDescent, SuperUniversal
from gradmatch.optim._regularised import Result, minimize
from gradmatch.optim.gns import minimize_gns

P = 8


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spd(seed: int, size: int = P) -> Tensor:
    a = draw(size, size, seed=seed)
    return a @ a.T + 0.1 * torch.eye(size, dtype=torch.float64)


def quadratic(h: Tensor, c: Tensor):
    return lambda x: (0.5 * x @ h @ x - c @ x, h @ x - c)


class TestContract(OptimizerContract):
    def make(self, params, **options):
        return GradNormSmooth(params, **options)


class TestContractOfOutputs(OptimizerContract):
    def make(self, params, **options):
        return GradNormSmooth(params, curvature="ggn", **options)


# --- the method --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [None, spd(1)])
def test_on_a_quadratic_every_first_trial_is_accepted(metric):
    h, c = spd(2), draw(P, seed=3)
    result = minimize_gns(quadratic(h, c), draw(P, seed=4), hess=lambda x: h, metric=metric, tol_grad=1e-5)
    assert result.status == "converged"
    assert result.trials_each.tolist() == [1] * result.iterations
    assert result.scales.tolist() == [2.0**k for k in range(result.iterations)]
    torch.testing.assert_close(result.x, torch.linalg.solve(h, c), rtol=1e-3, atol=1e-4)
    b = torch.eye(P, dtype=torch.float64) if metric is None else metric
    one = minimize_gns(quadratic(h, c), draw(P, seed=4), hess=lambda x: h, metric=metric, max_iter=1)
    g, lam = h @ draw(P, seed=4) - c, float(one.dampings[0])
    torch.testing.assert_close(
        h @ one.x - c, lam * b @ torch.linalg.solve(h + lam * b, g), rtol=1e-10, atol=1e-10
    )


def test_without_curvature_a_step_has_length_gamma_and_lambda_of_at_least_l_is_accepted():
    h, c, x0 = spd(2), draw(P, seed=3), draw(P, seed=4)
    f, smooth = quadratic(h, c), float(torch.linalg.eigvalsh(h)[-1])
    for gamma in (1e-3, 0.02):
        one = minimize_gns(f, x0, hess=None, gamma0=gamma, max_iter=1)
        taken = gamma * 0.5 ** (int(one.trials_each[0]) - 1)
        assert float((one.x - x0).norm()) == pytest.approx(taken, rel=1e-12)
    result = minimize_gns(f, x0, hess=None, max_iter=200)
    assert (result.dampings < 2 * smooth).any()
    for trials, damping in zip(result.trials_each.tolist(), result.dampings.tolist(), strict=True):
        assert trials == 1 or damping < 2 * smooth  # the trial before, at half of it, was under L


def test_steps_are_never_longer_than_gamma():
    generator = torch.Generator().manual_seed(0)
    for k in range(1000):
        size = 1 + k % 5
        a = torch.randn(size, max(1, size - k % 2), generator=generator, dtype=torch.float64)
        b = torch.randn(size, size, generator=generator, dtype=torch.float64)
        b, h = b @ b.T + 0.1 * torch.eye(size, dtype=torch.float64), a @ a.T
        g = torch.randn(size, generator=generator, dtype=torch.float64)
        gamma = float(10 ** (4 * torch.rand((), generator=generator) - 2))
        found = minimize_gns(
            lambda x, g=g: (-1e9 * x.norm() + g @ x, g), torch.zeros_like(g), hess=lambda x, h=h: h, metric=b,
            gamma0=gamma, max_iter=1,
        )  # fmt: skip
        assert found.iterations == 1
        assert float(found.x @ b @ found.x) ** 0.5 <= gamma * (1 + 1e-9)


def rosenbrock(x: Tensor) -> Tensor:
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def test_f_falls_at_every_step_and_gamma_doubles_or_halves():
    x0 = torch.tensor([-2.0, 2.0], dtype=torch.float64)
    result = minimize_gns(rosenbrock, x0, f_star=0.0, tol=1e-12)
    assert result.status == "converged"
    assert all(b < a for a, b in pairwise(result.values.tolist()))
    for (a, b), trials in zip(pairwise(result.scales.tolist()), result.trials_each.tolist(), strict=False):
        assert b == 2 * a * 0.5 ** (trials - 1)
    assert (result.trials_each > 1).any()
    assert result.trials == int(result.trials_each.sum())


def test_a_change_of_variables_changes_nothing():
    t = draw(2, 2, seed=5)
    x0 = torch.tensor([-1.0, 1.5], dtype=torch.float64)
    for hess in ("exact", None):
        one = minimize_gns(rosenbrock, x0, hess=hess, max_iter=15)
        two = minimize_gns(
            lambda y: rosenbrock(t @ y), torch.linalg.solve(t, x0), hess=hess, metric=t.T @ t, max_iter=15
        )
        torch.testing.assert_close(t @ two.x, one.x, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(one.values, two.values, rtol=1e-8, atol=1e-8)


def test_an_indefinite_hessian_is_a_rejected_trial():
    """The released code leaves the search there and applies the step before, or one that does not exist."""
    x0 = torch.tensor([0.0, 0.3], dtype=torch.float64)

    def saddle(x: Tensor) -> Tensor:
        return x[0] ** 2 - x[1] ** 2 + x[1] ** 4

    one = minimize_gns(saddle, x0, gamma0=100.0, max_iter=1)
    assert int(one.trials_each[0]) > 3
    assert one.value < float(saddle(x0))
    result = minimize_gns(saddle, x0, f_star=-0.25, tol=1e-10)
    assert result.status == "converged"


def test_when_every_trial_fails_nothing_moves():
    x0 = torch.ones(2, dtype=torch.float64)
    uphill = lambda x: (x.sum(), -torch.ones_like(x))  # noqa: E731  a gradient of the wrong sign
    result = minimize_gns(uphill, x0, hess=None)
    assert (result.status, result.iterations, result.trials) == ("stalled", 0, 40)
    assert torch.equal(result.x, x0)


def test_other_methods_of_the_loop_find_the_minimum():
    h, c, x0 = spd(2), draw(P, seed=3), draw(P, seed=4)
    f, expected = quadratic(h, c), torch.linalg.solve(h, c)
    for rule, hess in (
        (SuperUniversal(), lambda x: h),
        (CubicNewton(), lambda x: h),
        (GradientDescent(), None),
    ):
        result = minimize(f, x0, rule, 1.0, hess=hess, tol_grad=1e-6, max_iter=5000)
        assert result.status == "converged"
        torch.testing.assert_close(result.x, expected, rtol=1e-4, atol=1e-4)
    one = minimize(f, x0, CubicNewton(), 2.0, hess=lambda x: h, max_iter=1)
    step, g = one.x - x0, h @ x0 - c  # (H + (M/2)|s| I) s = -g
    torch.testing.assert_close(h @ step + float(step.norm()) * step, -g, rtol=1e-6, atol=1e-6)


def test_a_result_is_saved_and_loaded(tmp_path):
    result = minimize_gns(rosenbrock, torch.zeros(2, dtype=torch.float64), f_star=0.0)
    again = Result.load(result.save(tmp_path / "r.safetensors"))
    assert again.status == result.status
    assert torch.equal(again.x, result.x)
    assert torch.equal(again.dampings, result.dampings)


def test_bad_functions_are_refused():
    x0 = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(InputError, match="f is inf at x0"):
        minimize_gns(lambda x: (x.sum() + float("inf"), x), x0)
    with pytest.raises(InputError, match="differs from its transpose"):
        minimize_gns(
            rosenbrock, x0, hess=lambda x: torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
        )
    with pytest.raises(InputError, match="metric is not positive definite"):
        minimize_gns(rosenbrock, x0, metric=-torch.eye(2, dtype=torch.float64))
    with pytest.raises(InputError, match="gamma0 is 0"):
        minimize_gns(rosenbrock, x0, gamma0=0)
    with pytest.raises(InputError, match="hess is 'newton'"):
        minimize_gns(rosenbrock, x0, hess="newton")
    with pytest.raises(InputError, match="f returned"):
        minimize_gns(lambda x: x, x0)


# --- the optimizer -----------------------------------------------------------------------------------------


def logistic(n: int = 40, classes: int = 3) -> tuple[nn.Linear, Tensor, Tensor]:
    model = nn.Linear(4, classes).double()
    with torch.no_grad():
        model.weight.copy_(0.3 * draw(classes, 4, seed=1))
        model.bias.zero_()
    x = draw(n, 4, seed=2)
    return model, x, torch.arange(n) % classes


def ce(y: Tensor):
    return lambda z: F.cross_entropy(z, y, reduction="none")


def closure_of(kind: str, model: nn.Module, x: Tensor, y: Tensor):
    """The closure of a mean cross-entropy that a curvature asks for."""
    if kind in ("hessian", "none"):
        return lambda: F.cross_entropy(model(x), y)
    return lambda: (model(x), ce(y))


def watched(optimizer: GradNormSmooth) -> list:
    """The matrices that the optimizer will make."""
    seen, original = [], optimizer._matrix
    optimizer._matrix = lambda *args: seen.append(original(*args)) or seen[-1]
    return seen


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
def test_the_optimizer_equals_the_function_on_logistic_regression(curvature):
    model, x, y = logistic()
    sizes = [p.numel() for p in model.parameters()]

    def f(w: Tensor) -> Tensor:
        weight, bias = w.split(sizes)
        return F.cross_entropy(x @ weight.reshape(3, 4).T + bias, y) + 0.05 * w @ w

    w0 = torch.cat([p.detach().flatten() for p in model.parameters()])
    expected = minimize_gns(f, w0, max_iter=4)
    optimizer = GradNormSmooth(model.parameters(), curvature=curvature, weight_decay=0.1)
    seen = []
    for _ in range(4):
        seen.append(float(optimizer.step(closure_of(curvature, model, x, y))))
    w = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(w, expected.x, rtol=1e-8, atol=1e-8)
    assert seen == pytest.approx(expected.values[:4].tolist(), rel=1e-10)
    assert optimizer.info.gamma == pytest.approx(2 * float(expected.scales[-1]))
    assert optimizer.info.status == "stepped"
    assert optimizer.info.trials == 1


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        for k, p in enumerate(self.net.parameters()):
            p.data.copy_(0.5 * draw(*p.shape, seed=k))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("n", [6, 60])  # fewer, and more, rows than parameters
@pytest.mark.parametrize("kind", ["hessian", "ggn", "empirical_fisher", "diagonal"])
def test_matrices_equal_those_of_the_curvature_engine(kind, n):
    model, x, y = Small(), draw(n, 4, seed=9), torch.arange(n) % 3
    optimizer = GradNormSmooth(model.parameters(), curvature=kind)
    seen = watched(optimizer)
    closure = closure_of(kind, model, x, y)
    engine = Curvature(Problem(model, "cross_entropy", (x, y)), "ggn" if kind == "diagonal" else kind)
    expected = engine.diag() if kind == "diagonal" else engine.dense()
    optimizer.step(closure)
    found = seen[0].rows.T @ seen[0].rows if isinstance(seen[0], LowRank) else seen[0]
    assert isinstance(seen[0], LowRank) == (n == 6 and kind in ("ggn", "empirical_fisher"))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_conjugate_gradients_take_the_same_steps(kind):
    ends = []
    for solver in ("auto", "cg"):
        model, x, y = logistic()
        optimizer = GradNormSmooth(model.parameters(), curvature=kind, solver=solver, weight_decay=0.01)
        for _ in range(4):
            optimizer.step(closure_of(kind, model, x, y))
        ends.append(model.weight.detach().clone())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("power", [3.0, 4.0, 5.0])
def test_rank_one_is_the_fisher_term_of_a_power_of_a_norm(power):
    a, x = draw(3, 4, seed=7), nn.Parameter(draw(4, seed=8))
    optimizer = GradNormSmooth([x], curvature="rank_one", power=power)
    seen, u = watched(optimizer), (a @ x).detach()
    optimizer.step(lambda: (a @ x).norm() ** power / power)
    expected = (power - 2) * u.norm() ** (power - 4) * torch.outer(a.T @ u, a.T @ u)
    torch.testing.assert_close(seen[0].rows.T @ seen[0].rows, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-60, 0.0])
def test_rank_one_stays_finite_where_the_outputs_are_nearly_zero(scale):
    """|u|^(p-4) does not, for p = 3."""
    a, x = draw(3, 4, seed=7), nn.Parameter(scale * draw(4, seed=8))
    optimizer = GradNormSmooth([x], curvature="rank_one", power=3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no decrease can be seen there
        optimizer.step(lambda: (a @ x).square().sum() ** 1.5 / 3)
    assert torch.isfinite(x).all()
    assert float((a @ x).detach().norm()) <= 10 * scale


def test_a_gauss_newton_matrix_of_one_number_takes_products():
    a, x = draw(3, 4, seed=7), nn.Parameter(draw(4, seed=8))
    optimizer = GradNormSmooth([x], curvature="ggn")
    for _ in range(30):
        optimizer.step(lambda: (a @ x, lambda u: u.norm() ** 4 / 4))
    assert float((a @ x).detach().norm()) < 1e-3


def test_a_curvature_of_ones_own():
    model, x, y = logistic()
    problem = Problem(model, "cross_entropy", (x, y))
    own = GradNormSmooth(model.parameters(), curvature=lambda w: Curvature(problem, "ggn", w).dense())
    other, _, _ = logistic()
    ggn = GradNormSmooth(other.parameters(), curvature="ggn")
    for _ in range(3):
        own.step(lambda: F.cross_entropy(model(x), y))
        ggn.step(lambda: (other(x), ce(y)))
    torch.testing.assert_close(model.weight, other.weight, rtol=1e-9, atol=1e-9)


def test_when_every_trial_fails_parameters_are_restored_with_a_warning():
    model, x, y = logistic()
    before = model.weight.detach().clone()
    optimizer = GradNormSmooth(model.parameters(), curvature="none", max_trials=3, gamma0=1e6)
    with pytest.warns(UserWarning, match="accepted none of 3 trials"):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert torch.equal(model.weight, before)
    assert optimizer.info.status == "stalled"


def test_a_small_gradient_ends_without_a_step():
    model, x, y = logistic()
    optimizer = GradNormSmooth(model.parameters(), tol_grad=1e6)
    before = model.weight.detach().clone()
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert optimizer.info.status == "converged"
    assert torch.equal(model.weight, before)


def test_a_scheduler_scales_and_ends_the_steps():
    model, x, y = logistic()
    optimizer = GradNormSmooth(model.parameters(), curvature="none", gamma0=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5 if k == 0 else 0.0)
    before = model.weight.detach().clone(), model.bias.detach().clone()
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    moved = torch.cat([(p.detach() - q).flatten() for p, q in zip(model.parameters(), before, strict=True)])
    assert float(moved.norm()) == pytest.approx(0.5 * 0.1)
    schedule.step()
    at = model.weight.detach().clone()
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert torch.equal(model.weight, at)
    assert optimizer.info.status == "still"


def test_wrong_closures_and_models_are_refused():
    model, x, y = logistic()
    noisy = nn.Sequential(nn.Dropout(0.5), model)
    with pytest.raises(InputError, match=r"closure gave .* at the same parameters"):
        GradNormSmooth(model.parameters()).step(lambda: F.cross_entropy(noisy(x), y))
    with pytest.raises(InputError, match=r"loss has 1 NaN"):
        GradNormSmooth(model.parameters()).step(lambda: F.cross_entropy(model(x), y) * float("nan"))
    with pytest.raises(InputError, match="got no closure; call step"):
        GradNormSmooth(model.parameters()).step()
    with pytest.raises(InputError, match="empirical_fisher needs one loss for each example"):
        GradNormSmooth(model.parameters(), curvature="empirical_fisher").step(
            lambda: (model(x), lambda z: F.cross_entropy(z, y))
        )
    large = nn.Linear(80, 80)
    with pytest.raises(InputError, match="6480 parameters"):
        GradNormSmooth(large.parameters()).step(lambda: large(torch.ones(2, 80)).square().mean())
    with pytest.raises(InputError, match="metric is of size 3; there are 15"):
        GradNormSmooth(model.parameters(), metric=torch.ones(3)).step(lambda: F.cross_entropy(model(x), y))
    with pytest.raises(InputError, match="curvature is 'newton'"):
        GradNormSmooth(model.parameters(), curvature="newton")
    with pytest.raises(InputError, match="moves all parameters together"):
        GradNormSmooth([{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.1}])
    with pytest.raises(InputError, match="maximize is True"):
        GradNormSmooth([{"params": [model.weight], "maximize": True}])
    with pytest.raises(InputError, match="gamma_min is 0"):
        GradNormSmooth(model.parameters(), gamma_min=0)


def test_a_large_model_takes_few_rows_or_products():
    large = nn.Linear(80, 80).double()
    x = draw(3, 80)
    for options in ({"curvature": "empirical_fisher"}, {"curvature": "ggn", "solver": "cg"}):
        optimizer = GradNormSmooth(large.parameters(), tol_grad=1e-7, **options)
        first = float(optimizer.step(lambda: (large(x), lambda z: (z - 1).square().mean(1))))
        for _ in range(8):
            last = float(optimizer.step(lambda: (large(x), lambda z: (z - 1).square().mean(1))))
        assert last < 0.2 * first
