"""The simplex, the loss in closed form, sequential training, and search across models whose answers are known."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from gradmatch.core.checks import InputError
from gradmatch.embed import (
    CompatibleModel,
    CompatibleTrainer,
    DSimplex,
    StationaryHead,
    average_accuracy,
    average_compatibility,
    compatibility_matrix,
    hoc_loss,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(d: int) -> Tensor:
    return torch.linalg.qr(randn(d, d, seed=9).double())[0]


def model(width: int = 6, slots: int = 8, seed: int = 0, **options: object) -> CompatibleModel:
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(width, 12), nn.ReLU())
    return CompatibleModel(backbone, StationaryHead(12, slots, **options))  # type: ignore[arg-type]


def task(*labels: int, each: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points around a mean of their class."""
    y = torch.tensor(labels).repeat(each)
    return 2 * randn(10, 6, seed=77)[y] + 0.3 * randn(len(y), 6, seed=seed), y


def sgd(groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=5e-4)


# --- the simplex and the head ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "tol"), [(2, 1e-6), (7, 1e-6), (64, 1e-6), (1024, 1e-4)])
def test_vertices_of_a_regular_simplex(k: int, tol: float) -> None:
    w = DSimplex(k)
    assert w.shape == (k, k - 1)
    assert w.dtype == torch.float32
    wanted = torch.full((k, k), -1 / (k - 1)).fill_diagonal_(1)
    assert float((w @ w.T - wanted).abs().max()) < tol
    assert float(w.double().sum(0).abs().max()) < tol * k**0.5
    if k <= 64:
        assert int(torch.linalg.matrix_rank(w.double())) == k - 1


def test_logits_are_products_with_the_vertices_and_keep_the_length_of_features() -> None:
    head = StationaryHead(5, 8)
    z = randn(4, 7)
    assert torch.allclose(head.classify(z), z @ DSimplex(8).T)
    assert torch.allclose(head.classify(3 * z), 3 * head.classify(z), atol=1e-6)
    assert torch.allclose(StationaryHead(5, 8, scale=4).classify(z), 4 * head.classify(z))
    with pytest.raises(InputError, match="features have 5 numbers; a head of 8 slots takes 7"):
        head.classify(randn(4, 5))


def test_logits_are_single_precision_under_autocast() -> None:
    """1,024 cosines differ by about 1e-3; bfloat16 products cannot tell them apart."""
    head = StationaryHead(5, 1024)
    z = randn(3, 1023)
    with torch.autocast("cpu", torch.bfloat16):
        found = head.classify(z)
    assert found.dtype == torch.float32
    assert torch.equal(found, head.classify(z))
    assert head.classify(z.bfloat16()).dtype == torch.float32


def test_slots_fill_from_the_end_from_the_start_or_by_a_map() -> None:
    y = torch.tensor([0, 3, 1])
    assert StationaryHead(5, 8).targets(y).tolist() == [7, 4, 6]
    assert StationaryHead(5, 8, "from_start").targets(y).tolist() == [0, 3, 1]
    assert StationaryHead(5, 8, {3: 0, 0: 5, 1: 2}).targets(y).tolist() == [5, 0, 2]
    for slots, labels in (("from_end", [8]), ("from_start", [-1]), ({0: 1}, [2, 0])):
        with pytest.raises(InputError, match="have no slot among the 8"):
            StationaryHead(5, 8, slots).targets(torch.tensor(labels))
    for slots, message in (
        ({0: 1, 1: 1}, "gives slot 1 to more than one label"),
        ({0: 8}, r"slots\[0\] is 8"),
        ({}, "slots is empty"),
        ("middle", "slots is 'middle'"),
    ):
        with pytest.raises(InputError, match=message):
            StationaryHead(5, 8, slots)
    with pytest.raises(InputError, match="num_classes is 1"):
        StationaryHead(5, 1)


def test_a_checkpoint_of_another_space_is_refused() -> None:
    head = StationaryHead(5, 8)
    state = head.state_dict()
    assert set(state) == {"projection.weight", "space"}  # the vertices are built, not stored
    StationaryHead(5, 8).load_state_dict(state)
    for other, what in (
        (StationaryHead(5, 9), "number of slots"),
        (StationaryHead(5, 8, "from_start"), "slot map"),
        (StationaryHead(5, 8, {0: 7}), "slot map"),
    ):
        with pytest.raises(InputError, match=f"its {what} is"):
            other.load_state_dict(state)
    changed = state | {"space": state["space"] + torch.tensor([1, 0, 0])}
    with pytest.raises(InputError, match="its construction is 2"):
        StationaryHead(5, 8).load_state_dict(changed)


def test_vertices_are_no_parameters_and_survive_training() -> None:
    net = model()
    assert [n for n, _ in net.named_parameters()] == [
        "backbone.1.weight", "backbone.1.bias", "head.projection.weight"
    ]  # fmt: skip
    before = net.head.vertices.clone()
    trainer = CompatibleTrainer(net, sgd, epochs=3)
    trainer.update(task(0, 1))
    assert torch.equal(trainer.model.head.vertices, before)
    assert not trainer.model.head.vertices.requires_grad


def test_a_backbone_of_hugging_face() -> None:
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic"
    )
    net = CompatibleModel(ResNetModel(config), StationaryHead(6, 8))
    x, y = randn(12, 1, 16, 16), torch.arange(12) % 3
    assert net(x).shape == (12, 7)
    update = CompatibleTrainer(net, epochs=1, batch_size=6).update((x, y))
    assert len(update.losses) == 2
    assert compatibility_matrix([net], (x, y), (x, y)).shape == (1, 1)
    with pytest.raises(InputError, match="must be a tensor or have a pooler_output"):
        CompatibleModel(_Tuple(), StationaryHead(6, 8))(x)


class _Tuple(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x,)


# --- the loss -------------------------------------------------------------------------------------------------


def naive(new: Tensor, old: Tensor, y: Tensor, mu: float, official: bool) -> float:
    z, o = F.normalize(new), F.normalize(old)
    total = 0.0
    for i in range(len(y)):
        own = [math.exp(mu * float(o[i] @ z[j])) for j in range(len(y)) if y[j] != y[i]]
        own += [1.0] * int((y == y[i]).sum()) if official else []
        total += -mu * float(o[i] @ z[i]) + (math.log(sum(own)) if own else 0.0)
    return total / len(y)


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("labels", [[0, 0, 1, 2, 2, 1, 0], [4] * 7, [0, 1, 1, 1, 1, 1, 1]])
def test_the_loss_is_that_of_its_formula(labels: list[int], official: bool) -> None:
    new, old, y = randn(7, 5).double(), randn(7, 5, seed=1).double(), torch.tensor(labels)
    found = hoc_loss(new, old, y, 10.0, official)
    assert float(found) == pytest.approx(naive(new, old, y, 10.0, official), rel=1e-9)


def test_two_images_of_two_classes_in_closed_form() -> None:
    new, old = randn(2, 3).double(), randn(2, 3, seed=1).double()
    z, o = F.normalize(new), F.normalize(old)
    wanted = (-10 * (o[0] @ z[0]) + 10 * (o[0] @ z[1]) - 10 * (o[1] @ z[1]) + 10 * (o[1] @ z[0])) / 2
    assert float(hoc_loss(new, old, torch.tensor([0, 1]))) == pytest.approx(float(wanted))


def test_a_batch_of_one_class_has_only_its_positives_and_finite_gradients() -> None:
    new, old = randn(4, 3).requires_grad_(), randn(4, 3, seed=1)
    loss = hoc_loss(new, old, torch.zeros(4, dtype=torch.long))
    assert float(loss.detach()) == pytest.approx(-10 * float(F.cosine_similarity(new, old).mean()), rel=1e-5)
    loss.backward()
    assert bool(torch.isfinite(new.grad).all())
    assert float(new.grad.abs().max()) > 0


def test_the_loss_does_not_change_when_both_spaces_turn_or_scale() -> None:
    new, old, y = randn(6, 5).double(), randn(6, 5, seed=1).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    q = rotation(5)
    for official in (False, True):
        plain = hoc_loss(new, old, y, official=official)
        assert float(hoc_loss(3 * new @ q, 0.1 * old @ q, y, official=official)) == pytest.approx(
            float(plain)
        )
    assert float(hoc_loss(new @ q, old, y)) != pytest.approx(float(hoc_loss(new, old, y)))


def test_what_the_loss_refuses() -> None:
    new, old, y = randn(4, 3), randn(4, 3, seed=1), torch.arange(4)
    zero, nan = new.clone(), new.clone()
    zero[2], nan[1, 1] = 0, torch.nan
    for args, message in (
        ((new, randn(4, 5), y), r"new is \(4, 3\) and old \(4, 5\)"),
        ((new, old, y[:3]), "labels has 3 entries"),
        ((new, old.clone().requires_grad_(), y), "old requires a gradient"),
        ((zero, old, y), "new has 1 rows that are 0"),
        ((new, zero, y), "old has 1 rows that are 0"),
        ((nan, old, y), "new has 1 NaN"),
        ((new, old, y, 0.0), "mu is 0.0"),
    ):
        with pytest.raises(InputError, match=message):
            hoc_loss(*args)


# --- training -------------------------------------------------------------------------------------------------


def losses_by_hand(net: CompatibleModel, data: tuple[Tensor, Tensor], lam: float) -> float:
    """The first step's loss from its formula, on the whole task."""
    x, y = data
    features = net(x).detach()
    ce = F.cross_entropy(features @ DSimplex(8).T, 7 - y)
    return float(lam * ce + (1 - lam) * hoc_loss(features, features, y))


@pytest.mark.parametrize("lam", [0.0, 0.1, 1.0])
def test_the_first_step_weighs_both_losses(lam: float) -> None:
    data = task(0, 1, 2, each=4)
    net = model()
    wanted = losses_by_hand(net, data, lam)
    update = CompatibleTrainer(net, sgd, lam=lam, epochs=1, batch_size=12).update(data)
    assert update.losses[0] == pytest.approx(wanted, rel=1e-5)


def test_without_cross_entropy_labels_are_but_a_mask() -> None:
    """Renaming classes changes the slots, and with lam = 0 nothing else."""
    found = []
    x, y = task(0, 1, 2, each=4)
    for labels in (y, (y + 1) % 3):
        trainer = CompatibleTrainer(model(), sgd, lam=0, epochs=2, batch_size=6, seed=3)
        trainer.update((x, labels))
        found.append(trainer.model.head.projection.weight.detach().clone())
    assert torch.equal(*found)


def test_old_models_and_generators_are_left_alone() -> None:
    net, old = model(), model(seed=1)
    kept, state = copy.deepcopy(old.state_dict()), torch.random.get_rng_state()
    trainer = CompatibleTrainer(net.eval(), sgd, epochs=2, batch_size=16)
    trainer.update(task(0, 1), old_model=old)
    assert all(torch.equal(t, kept[k]) for k, t in old.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in old.parameters())
    assert all(p.grad is None for p in net.parameters())
    assert not net.training
    assert torch.equal(state, torch.random.get_rng_state())


def test_tasks_are_rehearsed_half_and_half() -> None:
    seen: list[Tensor] = []

    def agreement(new: Tensor, old: Tensor, y: Tensor) -> Tensor:
        seen.append(y)
        return new.sum() * 0

    trainer = CompatibleTrainer(model(), sgd, epochs=1, batch_size=8, memory_per_class=3, agreement=agreement)
    assert trainer.update(task(0, 1)).classes == (0, 1)
    assert {k: len(v) for k, v in trainer.memory.items()} == {0: 3, 1: 3}
    assert all(len(y) == 8 for y in seen)
    seen.clear()
    x, y = task(2, 3)
    update = trainer.update(DataLoader(TensorDataset(x, y), 4, shuffle=True, generator=torch.Generator()))
    assert update.task == 2
    assert update.classes == (0, 1, 2, 3)
    for labels in seen:
        assert (labels >= 2).tolist() == [True] * 4 + [False] * 4
    known = {tuple(row) for row in task(0, 1)[0].tolist()}
    assert all(tuple(row) in known for k in (0, 1) for row in trainer.memory[k].tolist())
    assert CompatibleTrainer(model(), sgd, epochs=1, memory_per_class=0).update(task(0)).classes == ()


def test_vectors_have_no_decay_and_the_default_is_the_published_optimizer() -> None:
    from gradmatch.embed._compatible import _groups, published_optimizer

    groups = published_optimizer(_groups(model())).param_groups
    assert [g["weight_decay"] for g in groups] == [5e-4, 0.0]
    assert [p.ndim for g in groups for p in g["params"]] == [2, 2, 1]
    assert groups[0]["lr"] == 1e-3
    assert groups[0]["momentum"] == 0.9
    trainer = CompatibleTrainer(model())
    assert (trainer.lam, trainer.epochs, trainer.batch_size, trainer.memory_per_class) == (0.1, 70, 128, 20)


def test_the_rate_falls_by_a_cosine_to_a_hundredth() -> None:
    made: list[torch.optim.Optimizer] = []

    def optimizer(groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        made.append(sgd(groups))
        return made[-1]

    CompatibleTrainer(model(), optimizer, epochs=2, batch_size=8).update(task(0, 1, each=8))
    assert made[0].param_groups[0]["lr"] == pytest.approx(1e-3)


def test_features_converge_to_the_vertices() -> None:
    trainer = CompatibleTrainer(model(), sgd, lam=1.0, epochs=60)
    x, y = task(0, 1, 2)

    def cosine() -> float:
        z = F.normalize(trainer.model(x).detach())
        return float((z * DSimplex(8)[7 - y]).sum(1).mean())

    before = cosine()
    trainer.update((x, y))
    assert cosine() > max(0.8, before + 0.5)


def test_a_replacement_takes_over_and_keeps_our_slots() -> None:
    trainer = CompatibleTrainer(model(), sgd, epochs=1)
    trainer.update(task(0, 1))
    before = copy.deepcopy(trainer.model)
    other = model(seed=5, slots=8)
    other.head = StationaryHead(12, 8, "from_start")
    held: list[Tensor] = []
    trainer.agreement = lambda new, old, y: held.append(old - new.detach()) or new.sum() * 0  # type: ignore[func-returns-value]
    trainer.update(task(2), replace_with=other)
    assert float(held[0].abs().max()) == 0  # as released: both start from the replacement
    assert trainer.model.head.slots == "from_end"
    assert other.head.slots == "from_start"
    held.clear()
    trainer.update(task(3), old_model=before, replace_with=model(seed=6))
    assert float(held[0].abs().max()) > 0
    with pytest.raises(InputError, match="replace_with has 9 slots and the model 8"):
        trainer.update(task(3), replace_with=model(slots=9))
    with pytest.raises(InputError, match="replace_with is a Linear"):
        trainer.update(task(3), replace_with=nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_stopped_sequence_goes_on_with_the_same_result(tmp_path) -> None:
    def trainer() -> CompatibleTrainer:
        return CompatibleTrainer(model(), sgd, epochs=2, memory_per_class=4, seed=5)

    whole, first, second = trainer(), trainer(), trainer()
    for t in (task(0, 5), task(2), task(3)):
        whole.update(t)
    first.update(task(0, 5))
    first.update(task(2))
    second.load(first.save(tmp_path / "state.safetensors"))
    assert second.update(task(3)).task == 3
    assert all(torch.equal(t, second.model.state_dict()[k]) for k, t in whole.model.state_dict().items())
    other = CompatibleTrainer(model(slots=9))
    with pytest.raises(InputError, match="its number of slots is 8"):
        other.load(tmp_path / "state.safetensors")
    with pytest.raises(InputError, match="does not fit the model"):
        CompatibleTrainer(model(width=7)).load(tmp_path / "state.safetensors")


def test_dropout_and_shuffling_loaders_follow_the_trainers_seed(tmp_path) -> None:
    def trainer() -> CompatibleTrainer:
        made = model()
        made.backbone.insert(1, nn.Dropout(0.3))
        return CompatibleTrainer(made, sgd, epochs=2, memory_per_class=4, seed=5)

    def shuffled(t: tuple[Tensor, Tensor]) -> DataLoader:
        return DataLoader(TensorDataset(*t), batch_size=7, shuffle=True)

    whole, first, second = trainer(), trainer(), trainer()
    before = torch.get_rng_state()
    whole.update(task(0, 5)), whole.update(shuffled(task(2)))
    first.update(task(0, 5))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    second.load(first.save(tmp_path / "state.safetensors"))
    second.update(shuffled(task(2)))
    assert all(torch.equal(t, second.model.state_dict()[k]) for k, t in whole.model.state_dict().items())


def test_a_lone_last_image_joins_the_batch_before() -> None:
    normed = model()
    normed.backbone.append(nn.BatchNorm1d(12))
    x, y = task(0, 5)
    steps: list[tuple[int, int, float]] = []
    found = CompatibleTrainer(normed, sgd, epochs=2, batch_size=8).update(
        (x[:17], y[:17]), progress=lambda *step: steps.append(step)
    )
    assert len(found.losses) == steps[-1][0] == steps[-1][1] == 4


def test_what_the_trainer_refuses() -> None:
    for options in (
        {"lam": 1.1},
        {"lam": -0.1},
        {"mu": 0},
        {"epochs": 0},
        {"memory_per_class": -1},
        {"batch_size": 1},
    ):
        with pytest.raises(InputError):
            CompatibleTrainer(model(), **options)
    with pytest.raises(InputError, match="model is a Linear"):
        CompatibleTrainer(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="labels 8, 9 have no slot"):
        CompatibleTrainer(model(), sgd, epochs=1).update(task(8, 9))
    with pytest.raises(InputError, match="labels are torch"):
        CompatibleTrainer(model(), sgd, epochs=1).update((task(0)[0], task(0)[1].float()))
    with pytest.raises(InputError, match="data has inputs of dict"):
        CompatibleTrainer(model(), sgd, epochs=1).update(
            {"pixel_values": randn(4, 6), "labels": torch.zeros(4).long()}
        )


# --- search ---------------------------------------------------------------------------------------------------


class _Table(nn.Module):
    """Features by the image's number."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.rows = torch.tensor(rows)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += len(x)
        return self.rows[x.flatten().long()]


def test_templates_are_normalised_means_and_absent_identities_are_misses() -> None:
    # two long features of identity 1 must not outweigh the direction of the mean of unit ones
    rows = [[100.0, 0.0], [0.0, 1.0], [0.6, 0.8], [1.0, 0.2], [-1.0, 0.1]]
    gallery = torch.tensor([0, 1, 4]), torch.tensor([1, 1, 5])
    query = torch.tensor([2, 3, 4, 2]), torch.tensor([1, 1, 5, 8])
    net = _Table(rows)
    assert float(compatibility_matrix([net], query, gallery)) == 0.75  # identity 8 is not there


def test_the_matrix_is_that_of_a_plain_loop_and_every_model_embeds_once() -> None:
    nets = [_Table(randn(60, 5, seed=s).tolist()) for s in range(3)]
    gallery = torch.arange(30), torch.arange(30) % 4
    query = torch.arange(30, 60), torch.arange(30) % 4
    found = compatibility_matrix(nets, query, gallery, batch_size=7)
    assert [n.calls for n in nets] == [60] * 3
    for i in range(3):
        for j in range(3):
            if j > i:
                assert math.isnan(found[i, j])
                continue
            unit = F.normalize(nets[j].rows[:30])
            templates = F.normalize(torch.stack([unit[gallery[1] == c].mean(0) for c in range(4)]))
            right = (F.normalize(nets[i].rows[30:]) @ templates.T).argmax(1) == query[1]
            assert float(found[i, j]) == pytest.approx(float(right.double().mean()))


def test_identical_models_tie_in_every_pair() -> None:
    net = _Table(randn(40, 5).tolist())
    c = compatibility_matrix(
        [net, net, net],
        (torch.arange(20), torch.arange(20) % 3),
        (torch.arange(20, 40), torch.arange(20) % 3),
    )
    assert all(float(c[i, j]) == float(c[j, j]) for i in range(3) for j in range(i))
    assert average_compatibility(c) == 0


def test_the_matrix_keeps_modes_and_refuses_what_does_not_compare() -> None:
    net = model(width=1).train()
    data = torch.arange(6.0)[:, None] + 1, torch.arange(6) % 2
    compatibility_matrix([net], data, data)
    assert net.training
    with pytest.raises(InputError, match=r"features of \[7, 8\] numbers"):
        compatibility_matrix([model(width=1), model(width=1, slots=9)], data, data)
    with pytest.raises(InputError, match="models is empty"):
        compatibility_matrix([], data, data)
    with pytest.raises(InputError, match=r"features of models\[0\] has 6 rows that are 0"):
        compatibility_matrix([_Table([[0.0, 0.0]] * 9)], data, data)


def test_averages_of_known_matrices() -> None:
    nan = torch.nan
    better = torch.tensor([[0.5, nan, nan], [0.6, 0.5, nan], [0.7, 0.6, 0.5]])
    worse = torch.tensor([[0.5, nan, nan], [0.4, 0.5, nan], [0.4, 0.4, 0.5]])
    mixed = torch.tensor([[0.5, nan, nan], [0.6, 0.5, nan], [0.5, 0.0, 0.9]])
    assert average_compatibility(better) == 1
    assert average_compatibility(worse) == 0
    assert average_compatibility(mixed) == pytest.approx(1 / 3)  # the tie and the zero fail
    assert average_compatibility(torch.tensor([[0.3]])) == 1
    assert average_accuracy(mixed) == pytest.approx(100 * 3.0 / 6)
    assert average_accuracy(torch.zeros(2, 2)) == 0
    assert average_accuracy(torch.eye(2)) == pytest.approx(200 / 3)  # a zero counts, and nothing is rescaled
    assert average_accuracy(torch.full((2, 2), 0.01)) == pytest.approx(1)
    for bad in (torch.zeros(2, 3), torch.full((2, 2), 35.0), torch.full((2, 2), nan)):
        with pytest.raises(InputError, match="matrix"):
            average_accuracy(bad)
