"""The two optimizers that come with the comparison: Shampoo and Powerpropagation as a wrapper."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradmatch.analysis import PowerPropagated, Shampoo, reparametrize
from gradmatch.analysis._shampoo import inverse_roots
from gradmatch.core.checks import InputError


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


X, Y = torch.randn(120, 6, generator=torch.Generator().manual_seed(0)), torch.arange(120) % 4


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))


def power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**exponent) @ vectors.T


# --- Shampoo -----------------------------------------------------------------------------------------------


def stepped(optimizer_of, start: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    w = nn.Parameter(start.clone())
    optimizer = optimizer_of([w])
    for g in gradients:
        w.grad = g.clone()
        optimizer.step()
    return w.detach()


def test_shampoo_on_a_matrix_is_the_formula():
    start = torch.randn(4, 3).double()
    gradients = [torch.randn(4, 3).double() for _ in range(3)]
    left, right, momentum, w = 0.1 * torch.eye(4).double(), 0.1 * torch.eye(3).double(), 0.0, start.clone()
    for g in gradients:
        left, right, momentum = left + g @ g.T, right + g.T @ g, 0.9 * momentum + g
        w = w - 0.05 * power(left, -0.25) @ momentum @ power(right, -0.25)
    found = stepped(lambda p: Shampoo(p, 0.05, eps=0.1, root_every=1), start, gradients)
    torch.testing.assert_close(found, w, rtol=1e-6, atol=1e-9)


def test_shampoo_on_other_orders():
    """A vector is Adagrad started at eps; a tensor of three modes has exponent -1 / 6, one of them only diagonal."""
    v = stepped(
        lambda p: Shampoo(p, 0.1, eps=0.5, beta=0.0),
        torch.zeros(3).double(),
        [torch.tensor([1.0, 2.0, 0.0]).double()],
    )
    torch.testing.assert_close(v, -0.1 * torch.tensor([1 / 1.5**0.5, 2 / 4.5**0.5, 0.0]).double())
    g = torch.randn(2, 3, 5).double()
    found = stepped(lambda p: Shampoo(p, 1.0, eps=0.1, max_dim=4), torch.zeros_like(g), [g])
    factors = [
        0.1 * torch.eye(n).double() + torch.einsum(e, g, g)
        for n, e in ((2, "iab,jab->ij"), (3, "aib,ajb->ij"))
    ]
    last = (0.1 + torch.einsum("abi,abi->i", g, g)) ** (-1 / 6)
    expected = torch.einsum("xi,yj,ijk,k->xyk", power(factors[0], -1 / 6), power(factors[1], -1 / 6), g, last)
    torch.testing.assert_close(found, -expected)
    scalar = stepped(
        lambda p: Shampoo(p, 1.0, eps=1.0), torch.tensor(0.0).double(), [torch.tensor(3.0).double()]
    )
    assert float(scalar) == pytest.approx(-3 / 10**0.5)


def test_shampoo_on_a_multiple_of_the_identity_scales_it():
    found = stepped(
        lambda p: Shampoo(p, 1.0, eps=1e-9), torch.zeros(3, 3).double(), [2 * torch.eye(3).double()]
    )
    torch.testing.assert_close(found, -torch.eye(3).double(), rtol=1e-6, atol=1e-9)


def test_rotating_the_weights_rotates_the_step_of_shampoo_and_not_of_adam():
    q, r = (torch.linalg.qr(torch.randn(n, n).double())[0] for n in (4, 3))
    gradients = [torch.randn(4, 3).double() for _ in range(3)]
    turned = [q @ g @ r for g in gradients]
    zero = torch.zeros(4, 3).double()
    for make, same in (
        (lambda p: Shampoo(p, 0.1, root_every=1), True),
        (lambda p: torch.optim.Adam(p, 0.1), False),
    ):
        plain, rotated = (stepped(make, zero, g) for g in (gradients, turned))
        assert torch.allclose(q @ plain @ r, rotated, atol=1e-8) == same


def test_roots_are_taken_at_the_first_step_and_then_every_f():
    gradients = [torch.randn(3, 3).double() for _ in range(5)]
    left, right, momentum, w = (
        0.1 * torch.eye(3).double(),
        0.1 * torch.eye(3).double(),
        0.0,
        torch.zeros(3, 3).double(),
    )
    for k, g in enumerate(gradients):
        left, right, momentum = left + g @ g.T, right + g.T @ g, 0.9 * momentum + g
        if k % 3 == 0:
            roots = power(left, -0.25), power(right, -0.25)
        w = w - roots[0] @ momentum @ roots[1]
    found = stepped(lambda p: Shampoo(p, 1.0, eps=0.1, root_every=3), torch.zeros(3, 3).double(), gradients)
    torch.testing.assert_close(found, w, rtol=1e-6, atol=1e-9)


def test_averaged_factors_do_not_shrink_steps_and_are_damped_relatively():
    """Equal gradients for long: sums let steps vanish, averages do not; the scale of gradients does not matter."""
    g = torch.randn(4, 3)
    make = {
        "sum": lambda p: Shampoo(p, 1.0, beta=0.0, root_every=1),
        "average": lambda p: Shampoo(p, 1.0, beta=0.0, factor_decay=0.9),
    }
    lengths = {}
    for name, optimizer_of in make.items():
        before, after = (stepped(optimizer_of, torch.zeros(4, 3), [g] * k) for k in (60, 61))
        lengths[name] = float((after - before).norm())
    assert lengths["average"] > 5 * lengths["sum"]
    tiny = stepped(make["average"], torch.zeros(4, 3), [1e-4 * g] * 5)
    large = stepped(make["average"], torch.zeros(4, 3), [g] * 5)
    torch.testing.assert_close(tiny, large, rtol=1e-3, atol=1e-5)
    every = stepped(
        lambda p: Shampoo(p, 1.0, factor_decay=0.9, root_every=20),
        torch.zeros(4, 3),
        [g, 2 * g, 3 * g, -g, g],
    )
    often = stepped(
        lambda p: Shampoo(p, 1.0, factor_decay=0.9, root_every=2), torch.zeros(4, 3), [g, 2 * g, 3 * g, -g, g]
    )
    assert torch.equal(every, often)  # at least every 1 / (4 (1 - d)) = 2 steps


@pytest.mark.parametrize("grafting", ["sgd", "adam"])
def test_grafting_gives_the_length_of_another_step(grafting):
    gradients = [torch.randn(4, 3).double() for _ in range(3)]
    peer = (
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9))
        if grafting == "sgd"
        else (lambda p: torch.optim.Adam(p, 0.1, betas=(0.9, 0.999)))
    )
    zero = torch.zeros(4, 3).double()
    for optimizer_of in (peer, lambda p: Shampoo(p, 0.1, grafting=grafting)):
        steps = [stepped(optimizer_of, zero, gradients[:k]) for k in range(4)]
        lengths = [float((b - a).norm()) for a, b in itertools.pairwise(steps)]
        if optimizer_of is peer:
            expected = lengths
    assert lengths == pytest.approx(expected, rel=1e-6)


def test_a_rank_one_factor_in_single_precision_has_finite_roots():
    v = torch.randn(50) * 1e3
    roots = inverse_roots((torch.outer(v, v) + 1e-4 * torch.eye(50))[None], 4, 0.5e-4)
    assert bool(torch.isfinite(roots).all())
    assert float(torch.linalg.eigvalsh(roots[0]).min()) > 0
    with pytest.raises(InputError, match="lower lr or raise eps"):
        inverse_roots(torch.full((1, 3, 3), torch.inf), 4, 1e-3)


def test_a_failed_factorisation_is_tried_again_with_more_damping(monkeypatch):
    true, calls = torch.linalg.eigh, []

    def fails_once(matrix):
        calls.append(matrix)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError("did not converge")
        return true(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails_once)
    roots = inverse_roots(torch.eye(3)[None].double(), 4, 1e-3)
    torch.testing.assert_close(roots[0], 1.001**-0.25 * torch.eye(3).double())
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: (_ for _ in ()).throw(torch.linalg.LinAlgError("no")))
    with pytest.raises(InputError, match="could not be decomposed"):
        inverse_roots(torch.eye(3)[None].double(), 4, 1e-3)


def train(model: nn.Module, optimizer, steps: range) -> list[torch.Tensor]:
    for k in steps:
        optimizer.zero_grad()
        part = slice(10 * k % 100, 10 * k % 100 + 10)
        F.cross_entropy(model(X[part]), Y[part]).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


MAKERS = {
    "shampoo": lambda p: Shampoo(p, 0.01, root_every=3),
    "averaged": lambda p: Shampoo(p, 0.01, factor_decay=0.9, grafting="adam", weight_decay=0.1),
    "powerprop": lambda p: PowerPropagated(torch.optim.SGD(p, 0.01, momentum=0.9)),
    "powerprop adam": lambda p: PowerPropagated(torch.optim.Adam(p, 0.01)),
}


@pytest.mark.parametrize("name", MAKERS)
def test_optimizers_resume_bitwise_obey_schedulers_and_groups(name, tmp_path):
    make, model = MAKERS[name], net()
    other = copy.deepcopy(model)
    optimizer = make(model.parameters())
    assert isinstance(optimizer, torch.optim.Optimizer)
    train(model, optimizer, range(4))
    torch.save([optimizer.state_dict(), model.state_dict()], tmp_path / "state.pt")
    whole = train(model, optimizer, range(4, 9))
    kept, at = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(at)
    resumed = make(other.parameters())
    resumed.load_state_dict(kept)
    assert all(torch.equal(a, b) for a, b in zip(whole, train(other, resumed, range(4, 9)), strict=True))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.0)
    assert optimizer.param_groups[0]["lr"] == 0
    before = [p.detach().clone() for p in model.parameters()]
    after = train(model, optimizer, range(1))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    scheduler.step()
    idle = nn.Parameter(torch.ones(2, 2))
    optimizer.add_param_group({"params": [idle], "lr": 0.1})
    train(model, optimizer, range(1))
    assert torch.equal(idle, torch.ones(2, 2))


def test_optimizers_in_a_hugging_face_trainer_of_gpt2_stopped_and_resumed(tmp_path):
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(0, 20, (8, 6), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]

    def trained(folder, steps, resume=False):
        torch.manual_seed(0)
        config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
        model = transformers.GPT2LMHeadModel(config)
        optimizer = PowerPropagated(Shampoo(model.parameters(), 0.01), 1.5)
        args = transformers.TrainingArguments(
            str(tmp_path / folder),
            max_steps=4,
            per_device_train_batch_size=4,
            save_steps=2,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=True,
        )

        class Stop(transformers.TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                control.should_training_stop = state.global_step >= steps

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / 10)
        trainer = transformers.Trainer(
            model, args, train_dataset=rows, optimizers=(optimizer, schedule), callbacks=[Stop()]
        )
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict()

    whole = trained("whole", 4)
    trained("stopped", 2)
    resumed = trained("stopped", 4, resume=True)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lr": -1}, "lr is -1"),
        ({"lr": 0.1, "eps": 0}, "eps is 0"),
        ({"lr": 0.1, "beta": 1.0}, "beta is 1"),
        ({"lr": 0.1, "factor_decay": 1.0}, "factor_decay is 1"),
        ({"lr": 0.1, "root_every": 0}, "root_every is 0"),
        ({"lr": 0.1, "max_dim": 0}, "max_dim is 0"),
        ({"lr": 0.1, "grafting": "lion"}, "grafting is 'lion'"),
        ({"lr": 0.1, "weight_decay": -1}, "weight_decay is -1"),
    ],
)
def test_refusals_of_shampoo(options, says):
    with pytest.raises(InputError, match=says):
        Shampoo([nn.Parameter(torch.ones(2))], **options)


def test_refusals_of_gradients_and_types():
    with pytest.raises(InputError, match="bfloat16"):
        Shampoo([nn.Parameter(torch.ones(2, dtype=torch.bfloat16))], 0.1)
    w = nn.Parameter(torch.ones(2, 2))
    w.grad = torch.tensor([[torch.nan, 0], [0, 0]])
    with pytest.raises(InputError, match="lower lr or raise eps"):
        Shampoo([w], 0.1).step()
    w.grad = torch.zeros(2, 2).to_sparse()
    with pytest.raises(InputError, match="sparse"):
        Shampoo([w], 0.1).step()


# --- Powerpropagation --------------------------------------------------------------------------------------


def test_one_step_is_that_of_the_reparametrised_weights_to_first_order():
    """The undivided form at rate lr a^2 and SGD on t differ by O(lr^2): a tenth of the rate, a hundredth of the gap."""
    alpha, start = 3.0, nn.Linear(5, 4).double()
    with torch.no_grad():
        start.weight.add_(start.weight.sign())
    x, y = torch.randn(20, 5).double(), torch.arange(20) % 4

    def gap(lr: float) -> float:
        wrapped, plain = copy.deepcopy(start), reparametrize(copy.deepcopy(start), alpha)
        for model, optimizer in (
            (
                wrapped,
                PowerPropagated(torch.optim.SGD(wrapped.parameters(), lr * alpha**2), alpha, divide=False),
            ),
            (plain, torch.optim.SGD(plain.parameters(), lr)),
        ):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return float((wrapped.weight - plain.weight).detach().norm())

    assert gap(1e-3) < 0.02 * gap(1e-2)
    torch.testing.assert_close(reparametrize(copy.deepcopy(start), alpha).weight, start.weight)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_alpha_of_one_is_the_optimizer_itself(make):
    model, other = net(), None
    other = copy.deepcopy(model)
    a = train(model, PowerPropagated(make(model.parameters(), lr=0.01), 1.0), range(5))
    b = train(other, make(other.parameters(), lr=0.01), range(5))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_adam_normalises_a_factor_on_its_gradient_away_but_not_one_on_its_step():
    w = torch.tensor([[0.01, 1.0]])
    small = {}
    for where in ("gradient", "step", "auto"):
        p = nn.Parameter(w.clone())
        optimizer = PowerPropagated(torch.optim.Adam([p], 0.001), 2.0, where=where)
        p.grad = torch.ones(1, 2)
        optimizer.step()
        assert torch.equal(p.grad, torch.ones(1, 2))
        moved = (p.detach() - w).abs()[0]
        small[where] = float(moved[0] / moved[1])
    assert small["gradient"] == pytest.approx(1, abs=1e-3)
    assert small["step"] == pytest.approx(0.01, rel=1e-3)
    assert small["auto"] == small["step"]


def test_the_factor_has_mean_one_and_biases_are_left_alone():
    model = net()
    wrapped = PowerPropagated(torch.optim.SGD(model.parameters(), 0.1), 2.0)
    assert len(wrapped.weights) == 2
    assert float(wrapped.factor(model[0].weight).mean()) == pytest.approx(1)
    torch.testing.assert_close(
        PowerPropagated(torch.optim.SGD(model.parameters(), 0.1), 2.0, divide=False).factor(model[0].weight),
        model[0].weight.detach().abs(),
    )


def test_refusals_of_powerprop():
    model = net()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(InputError, match=r"alpha is 0\.5"):
        PowerPropagated(sgd, 0.5)
    with pytest.raises(InputError, match=r"alpha is 0\.5"):
        reparametrize(model, 0.5)
    with pytest.raises(InputError, match="where is 'loss'"):
        PowerPropagated(sgd, 2.0, where="loss")
    with torch.no_grad():
        model[0].weight[0, :3] = 0
    with pytest.raises(InputError, match="3 weights are exactly 0; with alpha above 1 they would never move"):
        PowerPropagated(sgd, 2.0)
    PowerPropagated(sgd, 1.0)
