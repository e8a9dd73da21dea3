"""Target-based surrogates against closed forms: majorisation, exact target steps, counts of calls; the contract."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from optimizer_contract import OptimizerContract
from torch import Tensor, nn

from gradmatch.core.checks import InputError
from gradmatch.optim import TargetSurrogate
from gradmatch.optim._surrogate import DIVERGENCES, Surrogate, TargetStep
from gradmatch.optim.sso import expensive

N, D = 12, 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestContract(OptimizerContract):
    def make(self, params, **options):
        return TargetSurrogate(params, inner_steps=3, **options)


class TestContractAdagrad(OptimizerContract):
    def make(self, params, **options):
        return TargetSurrogate(
            params, inner_steps=2, eta_schedule="adagrad", inner=partial(torch.optim.Adam, lr=0.01)
        )


def mlp(outputs: int = 1) -> nn.Module:
    net = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, outputs)).double()
    for k, p in enumerate(net.parameters()):
        p.data.copy_(0.5 * draw(*p.shape, seed=10 + k))
    return net


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


X, Y = draw(N, D, seed=1), draw(N, 1, seed=2)
LABELS = (draw(N, seed=3) > 0).double()


def squared(z: Tensor) -> Tensor:
    return 0.5 * (z - Y).square().sum(1)


def logistic(z: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z[:, 0], LABELS, reduction="none")


class Counted:
    def __init__(self, call) -> None:
        self.call, self.count, self.seen = call, 0, []

    def __call__(self, *args):
        self.count += 1
        self.seen += args
        return self.call(*args)


# --- the surrogate -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["l2", "logistic"])
def test_value_and_gradient_at_the_start_are_the_losses_own(divergence):
    net = mlp()
    at = expensive(logistic, net(X))
    assert not at.z.requires_grad
    assert not at.g.requires_grad
    q = Surrogate(at, 4.0, DIVERGENCES[divergence])(net(X))
    loss = logistic(net(X)).mean()
    assert float(q.detach()) == pytest.approx(float(loss.detach()), rel=1e-12)
    for a, b in zip(
        torch.autograd.grad(q, net.parameters()), torch.autograd.grad(loss, net.parameters()), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_one_plain_step_is_sgd():
    """In the per-example form the scale is that of the mean loss, whatever the batch."""
    ours, theirs = mlp(), mlp()
    optimizer = TargetSurrogate(
        ours.parameters(), eta=4.0, inner_steps=1, inner=partial(torch.optim.SGD, lr=0.3)
    )
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.3)
    for _ in range(5):
        optimizer.step(lambda: ours(X), logistic)
        sgd.zero_grad()
        logistic(theirs(X)).mean().backward()
        sgd.step()
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-10, atol=1e-12)


def test_it_lies_above_the_loss_at_the_known_step_and_not_at_ten_times_it():
    net = mlp()
    at = expensive(logistic, net(X))
    below = {4.0: 0, 40.0: 0}
    for k in range(1000):
        with torch.no_grad():
            for j, p in enumerate(net.parameters()):
                p.copy_((0.2 + 0.002 * k) * draw(*p.shape, seed=1000 + 7 * k + j))
            z = net(X)
            loss = float(logistic(z).mean())
        for eta in below:
            below[eta] += float(Surrogate(at, eta, DIVERGENCES["l2"])(z)) < loss - 1e-12
    assert below[4.0] == 0
    assert below[40.0] > 0


@pytest.mark.parametrize(("loss", "eta"), [(squared, 1.0), (logistic, 4.0)])
def test_the_full_batch_loss_falls_at_every_step_of_a_nonlinear_model(loss, eta):
    net = mlp()
    optimizer = TargetSurrogate(net.parameters(), eta=eta, inner_steps=5, verify=True)
    seen = []
    for _ in range(200):
        seen.append(float(optimizer.step(lambda: net(X), loss)))
        assert optimizer.stats.violated is False
        assert optimizer.stats.after <= optimizer.stats.before
    assert all(b <= a + 1e-12 for a, b in pairwise(seen))
    assert seen[-1] < 0.7 * seen[0]


def test_a_violated_majorisation_is_noticed():
    net = mlp()
    optimizer = TargetSurrogate(net.parameters(), eta=4000.0, inner_steps=200, verify=True)
    violated = []
    for _ in range(5):
        optimizer.step(lambda: net(X), logistic)
        violated.append(optimizer.stats.violated)
    assert any(violated)


def test_for_the_identity_many_inner_steps_are_one_exact_target_step():
    theta = nn.Parameter(draw(N, 2, seed=5))
    target = draw(N, 2, seed=6)
    before = theta.detach().clone()
    loss = lambda z: (z - target).pow(4).sum(1)  # noqa: E731
    g = torch.func.grad(lambda z: loss(z).sum())(before)
    TargetSurrogate([theta], eta=0.05, inner_steps=500, tol=1e-12).step(lambda: theta, loss)
    torch.testing.assert_close(theta.detach(), before - 0.05 * g, rtol=1e-6, atol=1e-8)


def test_for_a_linear_model_and_squared_loss_one_step_reaches_the_optimum():
    model = nn.Linear(D, 1).double()
    inner = partial(
        torch.optim.LBFGS,
        max_iter=200,
        tolerance_grad=1e-14,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )
    TargetSurrogate(model.parameters(), eta=1.0, inner=inner, inner_steps=1).step(lambda: model(X), squared)
    rows = torch.cat([X, torch.ones(N, 1).double()], 1)
    expected = torch.linalg.lstsq(rows, Y).solution[:, 0]
    torch.testing.assert_close(flat(model), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("power", [1, 3])
def test_a_duplicated_batch_takes_the_same_step(power):
    """With the mean loss's gradient in place of each example's own, eta would be divided by the batch."""
    ends = []
    for copies in (1, power):
        net, x, y = mlp(), X.repeat(copies, 1), Y.repeat(copies, 1)
        optimizer = TargetSurrogate(net.parameters(), eta=0.5, inner_steps=7)
        for _ in range(3):
            optimizer.step(lambda net=net, x=x: net(x), lambda z, y=y: 0.5 * (z - y).square().sum(1))
        ends.append(flat(net))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-8)


def test_gradients_given_by_the_user_and_means_take_the_same_step():
    def given(z: Tensor):
        assert torch.is_tensor(z)
        with torch.no_grad():
            return squared(z).detach(), z.detach() - Y

    def mean(z: Tensor) -> Tensor:
        return squared(z).mean()

    ends = []
    for loss, options in ((squared, {}), (given, {}), (mean, {"batch_size": N})):
        net = mlp()
        optimizer = TargetSurrogate(net.parameters(), inner_steps=4)
        for _ in range(3):
            optimizer.step(lambda net=net: net(X), loss, **options)
        ends.append(flat(net))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ends[0], ends[2], rtol=1e-10, atol=1e-12)


# --- what it costs -----------------------------------------------------------------------------------------


def test_the_target_loss_is_called_once_a_step_and_the_model_once_a_trial():
    net = mlp()
    forward, loss = Counted(lambda: net(X)), Counted(squared)
    optimizer = TargetSurrogate(net.parameters(), inner_steps=6)
    for k in range(1, 4):
        optimizer.step(forward, loss)
        assert loss.count == k
        assert optimizer.stats.calls == k
        assert optimizer.stats.forwards == forward.count
        assert optimizer.stats.inner_steps == 6
    assert not any(z.grad_fn for z in loss.seen)
    plain = Counted(lambda: net(X))
    adam = TargetSurrogate(net.parameters(), inner_steps=6, inner=partial(torch.optim.Adam, lr=1e-3))
    adam.step(plain, squared)
    assert plain.count == adam.stats.forwards == 1 + 5 + 1


def test_the_inner_step_length_is_kept_so_that_backtracks_are_few():
    """Set back to 10 at every step, as in the released code, it costs tens of them."""
    net = mlp()
    optimizer = TargetSurrogate(net.parameters(), inner_steps=10)
    for _ in range(10):
        optimizer.step(lambda: net(X), squared)
    before = optimizer.stats.forwards
    for _ in range(10):
        optimizer.step(lambda: net(X), squared)
    assert optimizer.stats.forwards - before < 3 * 100


def test_a_loss_of_zero_is_no_special_case():
    """The released code tests the last loss by its truth value."""
    net = mlp()
    zero = lambda z: torch.relu(-(z - z.detach()) - 1).sum(1)  # noqa: E731
    optimizer = TargetSurrogate(net.parameters())
    before = flat(net)
    for _ in range(2):
        assert float(optimizer.step(lambda: net(X), zero)) == 0
    assert torch.equal(flat(net), before)
    assert optimizer.stats.inner_steps == 0


def test_gradients_are_left_as_found():
    net = mlp()
    for p in net.parameters():
        p.grad = torch.full_like(p, 7.0)
    for inner in ("armijo_gd", partial(torch.optim.SGD, lr=0.01)):
        TargetSurrogate(net.parameters(), inner=inner, inner_steps=2).step(lambda: net(X), squared)
        assert all(bool((p.grad == 7).all()) for p in net.parameters())


# --- step sizes and divergences ----------------------------------------------------------------------------


def etas(schedule: str, steps: int = 4, loss=squared, eta: float = 2.0, **options) -> list[float]:
    net = mlp()
    optimizer = TargetSurrogate(net.parameters(), eta=eta, eta_schedule=schedule, inner_steps=2, **options)
    found = []
    for _ in range(steps):
        optimizer.step(lambda: net(X), loss, **({"index": torch.arange(N)} if "diagonal" in schedule else {}))
        found.append(optimizer.stats.eta)
    return found


def test_schedules():
    assert etas("sqrt") == pytest.approx([2 / t**0.5 for t in (1, 2, 3, 4)])
    assert etas("exp", total_steps=10) == pytest.approx([2 * 0.1 ** (t / 10) for t in (1, 2, 3, 4)])
    falling = etas("adagrad")
    assert all(b < a for a, b in pairwise(falling))
    g = expensive(squared, mlp()(X)).g
    assert falling[0] == pytest.approx(2 / float(g.square().sum(1).mean()) ** 0.5)
    diagonal = etas("adagrad_diagonal")
    assert all(b < a for a, b in pairwise(diagonal))
    assert diagonal[0] == pytest.approx(float((2 / g.abs()).mean()))


def test_a_torch_scheduler_moves_eta():
    net = mlp()
    optimizer = TargetSurrogate(net.parameters(), eta=2.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for expected in (2.0, 1.0, 0.5):
        optimizer.step(lambda: net(X), squared)
        assert optimizer.stats.eta == expected
        schedule.step()


def test_armijo_holds_where_it_stops_and_counts_its_calls():
    step = TargetStep("armijo", c=0.5)
    at = expensive(logistic, 3 * draw(N, 1, seed=8))
    for start, memory in ((50.0, {"step": 1}), (1.0, {"step": 2, "eta": 30.0})):
        eta = step.eta(start, at, memory, lambda z: float(logistic(z).mean()), None)
        bound = float(at.losses.mean()) - 0.5 * eta * float(at.g.square().sum(1).mean())
        assert float(logistic(at.z - eta * at.g).mean()) <= bound
        assert memory["eta"] == eta
    net, loss = mlp(), Counted(logistic)
    optimizer = TargetSurrogate(net.parameters(), eta=100.0, eta_schedule="armijo")
    optimizer.step(lambda: net(X), loss)
    assert optimizer.stats.calls == loss.count > 2


def test_kl_is_mirror_descent_on_the_simplex():
    """Solved exactly, the step is f_t exp(-eta g), normalised."""
    logits = nn.Parameter(draw(N, 3, seed=9))
    before = torch.softmax(logits.detach(), 1)
    price = draw(N, 3, seed=10)
    optimizer = TargetSurrogate([logits], eta=0.7, divergence="kl", inner_steps=600, tol=1e-8)
    optimizer.step(lambda: torch.softmax(logits, 1), lambda z: (z * price).sum(1))
    expected = before * torch.exp(-0.7 * price)
    torch.testing.assert_close(
        torch.softmax(logits.detach(), 1), expected / expected.sum(1, keepdim=True), rtol=1e-4, atol=1e-5
    )


def test_the_logistic_weight_is_newtons():
    z = draw(N, 1, seed=11)
    at = expensive(logistic, z.clone().requires_grad_())
    new = z + 1e-3 * draw(N, 1, seed=12)
    p = torch.sigmoid(z)
    expected = (at.losses + (at.g * (new - z) + (p * (1 - p) + 1e-5) * (new - z).square() / 2)[:, 0]).mean()
    assert float(Surrogate(at, 1.0, DIVERGENCES["logistic"])(new)) == pytest.approx(
        float(expected), rel=1e-12
    )
    assert float(expected) == pytest.approx(float(logistic(new).mean()), abs=1e-8)


def test_a_hugging_face_classifier_in_the_closure_form():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config).eval()
    ids, y = torch.arange(48).reshape(6, 8) % 30, torch.arange(6) % 3
    optimizer = TargetSurrogate(model.parameters(), eta=2.0, inner_steps=5, check_forward=True)
    closure = lambda: (model(ids).logits, lambda z: F.cross_entropy(z, y, reduction="none"))  # noqa: E731
    first = float(optimizer.step(closure))
    for _ in range(4):
        last = float(optimizer.step(closure))
    assert last < first


# --- refusals ----------------------------------------------------------------------------------------------


def test_wrong_uses_are_refused():
    net = mlp()

    def optimizer(**options):
        return TargetSurrogate(net.parameters(), **options)

    for forward in (lambda: net(X).detach(), lambda: draw(N, 1).requires_grad_() * 1):
        with pytest.raises(InputError, match="outputs without a graph to the parameters"):
            optimizer().step(forward, squared)
    with pytest.raises(InputError, match=r"outputs of shape \(0, 1\); a batch needs an example"):
        optimizer().step(lambda: net(X[:0]), squared)
    with pytest.raises(InputError, match="gave one number for 12 examples"):
        optimizer().step(lambda: net(X), lambda z: squared(z).mean())
    with pytest.raises(InputError, match=r"losses of shape \(12, 1\)"):
        optimizer().step(lambda: net(X), lambda z: squared(z)[:, None])
    with pytest.raises(
        InputError, match=r"gradient of shape \(12,\); it must be shaped as the outputs, \(12, 1\)"
    ):
        optimizer().step(lambda: net(X), lambda z: (squared(z), z[:, 0]))
    with pytest.raises(InputError, match="losses without a graph and no gradient"):
        optimizer().step(lambda: net(X), lambda z: squared(z).detach())
    with pytest.raises(InputError, match="eta is 0"):
        optimizer(eta=0)
    with pytest.raises(InputError, match="inner_steps is 0"):
        optimizer(inner_steps=0)
    with pytest.raises(InputError, match="eta_schedule is 'cosine'"):
        optimizer(eta_schedule="cosine")
    with pytest.raises(InputError, match="total_steps is None"):
        optimizer(eta_schedule="exp")
    with pytest.raises(InputError, match="divergence is 'js'"):
        optimizer(divergence="js")
    with pytest.raises(InputError, match="inner is 'newton'"):
        optimizer(inner="newton")
    with pytest.raises(InputError, match="pass index="):
        optimizer(eta_schedule="adagrad_diagonal").step(lambda: net(X), squared)
    with pytest.raises(InputError, match="new outputs lie off the simplex"):
        optimizer(divergence="kl").step(lambda: net(X), squared)
    with pytest.raises(InputError, match="losses has 12 NaN"):
        optimizer().step(lambda: net(X), lambda z: (squared(z) * float("nan"), z))
    before = flat(net)
    with pytest.raises(InputError, match="inner optimizer diverged"):
        optimizer(inner=partial(torch.optim.SGD, lr=1e200), inner_steps=3).step(lambda: net(X), squared)
    assert torch.equal(flat(net), before)


def test_a_forward_that_changes_is_refused_on_request():
    noisy = nn.Sequential(nn.Dropout(0.5), mlp())
    state = torch.get_rng_state()
    with pytest.raises(InputError, match="other outputs at the same parameters"):
        TargetSurrogate(noisy.parameters(), check_forward=True).step(lambda: noisy(X), squared)
    torch.set_rng_state(state)
    TargetSurrogate(noisy.eval().parameters(), check_forward=True).step(lambda: noisy(X), squared)
