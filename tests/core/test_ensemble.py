"""Every program against a training loop written out by hand with torch.optim."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmatch.core import _vmapped, _workers
from gradmatch.core._members import Recipe, forward_flops, fresh_member
from gradmatch.core.checks import InputError
from gradmatch.core.cpu import threads
from gradmatch.core.ensemble import Ensemble, member_seeds, train_ensemble
from gradmatch.core.networks import build
from gradmatch.core.pooling import ProductPool

EPOCHS, N = 4, 3
OPTIONS = {"epochs": EPOCHS, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "batch_size": 8, "seed": 5}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def noisy() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3))


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def _data(soft: bool = False, images: bool = False) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(20, 4, generator=g, dtype=torch.float64)
    if images:
        x = torch.randn(20, 1, 4, 4, generator=g, dtype=torch.float64)
    y = torch.arange(20) % 3
    return x, torch.randn(20, 3, generator=g, dtype=torch.float64).softmax(1) if soft else y


def shift(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + 0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype)


def sharpness_aware(params, grad_fn, state, lr):
    """A two-gradient step with a norm over all parameters and a momentum buffer of its own."""
    grads = grad_fn(params)
    norm = torch.sqrt(sum(g.square().sum() for g in grads.values()))
    ahead = grad_fn({k: p + 0.05 * grads[k] / (norm + 1e-12) for k, p in params.items()})
    speed = {k: 0.5 * state[k] + ahead[k] for k in params} if state else ahead
    return {k: p - lr * speed[k] for k, p in params.items()}, speed


def _by_hand(factory, x, y, member, *, augment=None, update=None, milestone=EPOCHS // 2 + 1):
    seeds = member_seeds(OPTIONS["seed"], member)
    net = build(factory, seeds.init).to(x.dtype)
    order = torch.Generator().manual_seed(seeds.order)
    draws = torch.Generator().manual_seed(seeds.augment)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    path, losses, state = [_flat(net)], [], {}
    with torch.random.fork_rng():
        torch.manual_seed(seeds.layers)
        for epoch in range(EPOCHS):
            lr = 0.1 if epoch < milestone else 0.01
            sgd.param_groups[0]["lr"] = lr
            total = 0.0
            for index in torch.randperm(len(x), generator=order).split(8):
                xb = x[index] if augment is None else augment(x[index], draws)
                if update is None:
                    sgd.zero_grad()
                    loss = F.cross_entropy(net(xb), y[index])
                    loss.backward()
                    sgd.step()
                else:
                    loss, state = _hand_update(net, xb, y[index], state, lr, update)
                total += loss.item() * len(index) / len(x)
            losses.append(total)
            path.append(_flat(net))
    return net.eval(), torch.tensor(losses, dtype=torch.float64), torch.stack(path)


def _hand_update(net, x, y, state, lr, update):
    first = []

    def grad_fn(params):
        leaves = {k: p.detach().requires_grad_() for k, p in params.items()}
        loss = F.cross_entropy(torch.func.functional_call(net, leaves, (x,)), y)
        first.append(loss.detach())
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    new, state = update({k: p.detach() for k, p in net.named_parameters()}, grad_fn, state, lr)
    for k, p in net.named_parameters():
        p.data.copy_(new[k])
    return first[0], state


def _flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()]).float()


def _same(got: Ensemble, factory, x, y, tol=1e-10, **options) -> None:
    test = _data(images=x.ndim == 4)[0]
    logits = got.predict(test)
    for k in range(len(got)):
        net, losses, path = _by_hand(factory, x, y, k, **options)
        for name, p in net.named_parameters():
            torch.testing.assert_close(got.params[name][k], p.detach(), rtol=tol, atol=tol)
        for name, b in net.named_buffers():
            torch.testing.assert_close(got.buffers[name][k], b, rtol=tol, atol=tol)
        torch.testing.assert_close(got.losses[k], losses, rtol=tol, atol=tol)
        torch.testing.assert_close(got.trajectories[k], path, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(logits[k], net(test).detach(), rtol=tol, atol=tol)


@pytest.mark.parametrize("program", ["loop", "vmap"])
@pytest.mark.parametrize(
    ("factory", "options"),
    [
        (mlp, {}),
        (mlp, {"augment": shift}),
        (mlp, {"update": sharpness_aware}),
        (mlp, {"update": sharpness_aware, "augment": shift}),
        (conv, {}),
    ],
)
@pytest.mark.parametrize("soft", [False, True])
def test_programs_equal_separate_loops(program, factory, options, soft):
    x, y = _data(soft, images=factory is conv)
    got = train_ensemble(factory, (x, y), N, program=program, record="epochs", **options, **OPTIONS)
    assert got.program == program
    _same(got, factory, x, y, **options)


def test_members_may_be_batched_in_groups():
    x, y = _data()
    got = train_ensemble(mlp, (x, y), N, program="vmap", together=2, record="epochs", **OPTIONS)
    _same(got, mlp, x, y)
    with pytest.raises(InputError, match="loss of member 0"):
        train_ensemble(mlp, (x, y), N, program="vmap", together=1, **{**OPTIONS, "lr": 1e200})


@pytest.mark.parametrize("factory", [normed, noisy])
@pytest.mark.parametrize("program", ["loop", "auto"])
def test_running_statistics_and_dropout_are_each_members_own(factory, program):
    x, y = _data()
    got = train_ensemble(factory, (x, y), N, program=program, record="epochs", **OPTIONS)
    assert got.program == "loop"
    _same(got, factory, x, y)
    with pytest.raises(InputError, match="program is 'vmap', but the network"):
        train_ensemble(factory, (x, y), N, program="vmap", **OPTIONS)


def test_second_gradients_do_not_move_running_statistics():
    x, y = _data()

    def twice(params, grad_fn, state, lr):
        grad_fn(params)
        grads = grad_fn(params)
        return {k: p - lr * grads[k] for k, p in params.items()}, {}

    def once(params, grad_fn, state, lr):
        grads = grad_fn(params)
        return {k: p - lr * grads[k] for k, p in params.items()}, {}

    two, one = (train_ensemble(normed, (x, y), 2, program="loop", update=u, **OPTIONS) for u in (twice, once))
    for name in one.buffers:
        assert torch.equal(one.buffers[name], two.buffers[name])


def test_worker_processes_equal_the_loop():
    pickling = pytest.importorskip("joblib.externals.cloudpickle")
    pickling.register_pickle_by_value(sys.modules[__name__])  # some packages install a "tests" of their own
    x, y = _data(soft=True)
    options = {"record": (0, 2, EPOCHS), "augment": lambda x, g: shift(x, g), "test": _data(), **OPTIONS}
    ticks = []
    got = train_ensemble(
        normed, (x, y), N, program="processes", workers=2, progress=lambda *p: ticks.append(p), **options
    )
    want = train_ensemble(normed, (x, y), N, program="loop", **options)
    assert (got.program, got.reason) == ("processes", "asked for")
    assert ticks[-1] == (N * EPOCHS, N * EPOCHS)
    for name in want.params:
        torch.testing.assert_close(got.params[name], want.params[name], rtol=1e-12, atol=1e-12)
    for name in want.buffers:
        torch.testing.assert_close(got.buffers[name], want.buffers[name], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.losses, want.losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.trajectories, want.trajectories)
    assert torch.equal(got.test_accuracy, want.test_accuracy)
    with pytest.raises(InputError, match="loss of member 0"):
        train_ensemble(mlp, _data(), N, program="processes", workers=2, **{**OPTIONS, "lr": 1e200})


@pytest.mark.parametrize("factory", [mlp, normed, conv])
def test_threads_equal_the_loop(factory):
    x, y = _data(images=factory is conv)
    options = {"record": (0, 2, EPOCHS), "augment": shift, "test": (x, y), **OPTIONS}
    ticks, state = [], torch.random.get_rng_state()
    want = train_ensemble(factory, (x, y), N, program="loop", **options)
    with threads(2):
        got = train_ensemble(
            factory, (x, y), N, program="threads", progress=lambda *p: ticks.append(p), **options
        )
        assert torch.get_num_threads() == 2
    assert (got.program, got.reason) == ("threads", "asked for")
    assert ticks[-1] == (N * EPOCHS, N * EPOCHS)
    assert torch.equal(state, torch.random.get_rng_state())
    for ours, theirs in ((got.params, want.params), (got.buffers, want.buffers)):
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.losses, want.losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.trajectories, want.trajectories)
    assert torch.equal(got.test_accuracy, want.test_accuracy)


def test_threads_refuse_divergence_and_random_layers_go_to_the_loop():
    x, y = _data()
    with threads(2):
        with pytest.raises(InputError, match="loss of member 0"):
            train_ensemble(mlp, (x, y), N, program="threads", **{**OPTIONS, "lr": 1e200})
        got = train_ensemble(noisy, (x, y), N, program="threads", record="epochs", **OPTIONS)
    assert got.program == "loop"
    assert "draws random numbers" in got.reason
    _same(got, noisy, x, y)
    with threads(1):
        assert train_ensemble(mlp, (x, y), N, program="threads", **OPTIONS).program == "loop"


def test_what_cannot_be_pickled_falls_to_the_loop_and_says_so():
    pytest.importorskip("joblib")
    import threading

    lock = threading.Lock()

    def locked() -> nn.Module:
        with lock:
            return mlp()

    got = train_ensemble(locked, _data(), N, program="processes", workers=2, **OPTIONS)
    assert got.program == "loop"
    assert "cannot be pickled" in got.reason


def test_auto_chooses_by_network_and_work():
    x, y = _data()
    assert train_ensemble(mlp, (x, y), 8, **OPTIONS).program == "vmap"
    assert train_ensemble(mlp, (x, y), N, **OPTIONS).program == "loop"
    assert train_ensemble(mlp, (x, y), 1, **OPTIONS).program == "loop"
    wide = nn.Sequential(nn.Linear(4, 9000), nn.ReLU(), nn.Linear(9000, 3)).double()
    assert not _vmapped.pays_on_cpu(wide, x, 32, 256)
    assert not _vmapped.pays_on_cpu(normed().double(), x, 32, 256)
    images, y = _data(images=True)
    few = train_ensemble(conv, (images, y), N, workers=2, **OPTIONS)
    assert few.program == "loop"
    assert "would not repay" in few.reason
    many, y = torch.randn(600, 1, 12, 12, dtype=torch.float64), torch.arange(600) % 3
    wide = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3200, 3))
    with threads(2):
        long = train_ensemble(wide, (many, y), 2, **{**OPTIONS, "epochs": 1, "batch_size": 600})
    assert (long.program, long.reason) == ("threads", "steps long enough for 2 threads")


def test_operations_are_counted_by_layer():
    # 4 filters of 9 weights at 4 places, then 16 to 3: two operations a weight and place
    assert forward_flops(conv().double(), _data(images=True)[0][:1]) == 2 * (4 * 9 * 4 + 16 * 3)


def test_enough_work_is_worth_workers():
    x = torch.zeros(100, 1, 4, 4)
    recipe = Recipe(300, 0.1, 0.9, 0.0, 256, (), 0.1, None, None, (), 0)
    assert _workers.too_little(conv(), x, recipe, 4, 2, 0) is not None
    long = Recipe(100_000, 0.1, 0.9, 0.0, 256, (), 0.1, None, None, (), 0)
    assert _workers.too_little(conv(), x, long, 4, 2, 0) is None


@pytest.mark.parametrize("program", ["loop", "vmap"])
def test_trajectories_are_snapshots_and_not_views(program):
    x, y = _data()
    got = train_ensemble(mlp, (x, y), N, program=program, record="epochs", **OPTIONS)
    assert got.recorded == tuple(range(EPOCHS + 1))
    assert got.trajectories.dtype == torch.float32
    for k in range(N):
        start = build(mlp, member_seeds(OPTIONS["seed"], k).init)
        assert torch.equal(got.trajectories[k, 0], _flat(start))
        steps = got.trajectories[k].diff(dim=0).norm(dim=1)
        assert (steps > 0).all()
    assert not torch.equal(got.trajectories[0, 0], got.trajectories[1, 0])
    named = got.unflatten(got.trajectories[:, -1])
    for name, p in got.params.items():
        torch.testing.assert_close(named[name], p.float())
    some = train_ensemble(mlp, (x, y), N, program=program, record=(EPOCHS, 1), **OPTIONS)
    assert torch.equal(some.trajectories, got.trajectories[:, [1, EPOCHS]])


@pytest.mark.parametrize("program", ["loop", "vmap"])
def test_a_batch_of_everything_keeps_its_order(program):
    x, y = _data()
    options = {**OPTIONS, "batch_size": 20}
    got = train_ensemble(mlp, (x, y), N, program=program, **options)
    net = build(mlp, member_seeds(5, 1).init).double()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for epoch in range(EPOCHS):
        sgd.param_groups[0]["lr"] = 0.1 if epoch < EPOCHS // 2 + 1 else 0.01
        sgd.zero_grad()
        F.cross_entropy(net(x), y).backward()
        sgd.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(got.params[name][1], p.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("program", ["loop", "vmap"])
def test_accuracy_modules_and_saving(program, tmp_path):
    x, y = _data()
    got = train_ensemble(mlp, (x, y), N, program=program, test=(x, y), record=(0,), **OPTIONS)
    right = torch.stack([(net(x).argmax(1) == y).double().mean() for net in got.modules()])
    torch.testing.assert_close(got.accuracy(x, y, batch=7), right)
    torch.testing.assert_close(got.test_accuracy, right)
    back = Ensemble.load(got.save(tmp_path), mlp)
    assert torch.equal(back.predict(x), got.predict(x))
    assert torch.equal(back.trajectories, got.trajectories)
    assert (back.program, back.recorded) == (program, (0,))
    with pytest.raises(InputError, match="other parameters"):
        Ensemble.load(tmp_path, conv)


@pytest.mark.parametrize("program", ["loop", "vmap"])
def test_same_seed_same_result_and_the_global_generator_is_left(program):
    x, y = _data()
    state = torch.random.get_rng_state()
    one, two = (
        train_ensemble(noisy if program == "loop" else mlp, (x, y), N, program=program, **OPTIONS)
        for _ in "ab"
    )
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(one.params[k], two.params[k]) for k in one.params)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"program": "fibres"}, "program is 'fibres'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"lr": float("inf")}, "lr is inf"),
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"record": "steps"}, "record is 'steps'"),
        ({"record": (9,)}, "record is 9"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_refused_options(options, words):
    with pytest.raises(InputError, match=words):
        train_ensemble(mlp, _data(), N, **{**OPTIONS, **options})


def test_refused_data():
    x, y = _data()
    with pytest.raises(InputError, match="NaN"):
        train_ensemble(mlp, (x / 0, y), N)
    with pytest.raises(InputError, match="equally many"):
        train_ensemble(mlp, (x, y[:5]), N)
    with pytest.raises(InputError, match="must be floating"):
        train_ensemble(mlp, (x.long(), y), N)
    with pytest.raises(InputError, match="data labels are"):
        train_ensemble(mlp, (x, y[:, None]), N)


@pytest.mark.parametrize("program", ["loop", "vmap"])
def test_divergence_names_member_and_epoch(program):
    with pytest.raises(InputError, match=r"loss of member 0 is .* in epoch"):
        train_ensemble(mlp, _data(), N, program=program, **{**OPTIONS, "lr": 1e200})


@pytest.mark.parametrize("program", ["loop", "vmap"])
def test_update_must_ask_for_a_gradient(program):
    with pytest.raises(InputError, match="never called grad_fn"):
        train_ensemble(mlp, _data(), N, program=program, update=lambda p, g, s, lr: (p, {}), **OPTIONS)


def _pooled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 3)
    )


def test_members_pool_by_products_and_come_back_as_the_network_given():
    x, y = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    recipe = Recipe(3, 0.1, 0.9, 0.0, 256, (), 0.1, None, None, (), 0)
    assert any(isinstance(m, ProductPool) for m in fresh_member(_pooled, x, recipe, 0).modules())
    options = {"epochs": 3, "lr": 0.1, "weight_decay": 0.0, "milestones": (), "program": "loop"}
    module = train_ensemble(_pooled, (x, y), 2, **options).module(1)
    assert [type(m) for m in module.modules()] == [type(m) for m in _pooled().modules()]
    plain = build(_pooled, member_seeds(0, 1).init)
    sgd = torch.optim.SGD(plain.parameters(), 0.1, 0.9)
    for _ in range(3):
        sgd.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        sgd.step()
    for mine, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
