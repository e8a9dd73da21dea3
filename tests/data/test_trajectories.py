"""Experts, their buffer, and the loop that matches their trajectories."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gradmatch.core.augment import SiameseAugment
from gradmatch.core.checks import InputError
from gradmatch.core.ensemble import member_seeds
from gradmatch.core.networks import build
from gradmatch.data import FTD, TESLA, evaluate, match_trajectories, train_experts
from gradmatch.data._inner import batch_order
from gradmatch.data._match_state import tensor_of
from gradmatch.data._matching import TrajectoryMatcher
from gradmatch.data._trajectories import TrajectoryBuffer
from gradmatch.data._zca import ZCA


class GroupNet(nn.Module):
    """Somebody's own network, with group norm."""

    def __init__(self, drop: float = 0.0, norm: type[nn.Module] | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4) if norm is None else norm(4)
        self.drop = nn.Dropout(drop)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.tanh(self.norm(self.conv(x)))).flatten(1))


def _data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(30) % 3
    centres = torch.randn(3, 1, 4, 4, generator=g)
    return (centres[y] + 0.3 * torch.randn(30, 1, 4, 4, generator=g)).to(dtype), y


EXPERTS = {"n_experts": 2, "epochs": 4, "optimizer": "sgd", "lr": 0.1, "batch_size": 10}
SMALL = {"per_class": 2, "steps": 4, "syn_steps": 3, "max_start_epoch": 3, "lr_img": 3.0, "lr_syn": 0.1}


@pytest.fixture(scope="module")
def buffer() -> TrajectoryBuffer:
    return train_experts(_data(), GroupNet, **EXPERTS)


def test_every_checkpoint_is_its_own_and_starts_at_the_initialisation(buffer: TrajectoryBuffer) -> None:
    assert buffer.tensor.shape == (2, 5, sum(p.numel() for p in GroupNet().parameters()))
    assert buffer.tensor.dtype == torch.float32
    rows = buffer.tensor.flatten(0, 1)
    distances = torch.cdist(rows, rows) + 9 * torch.eye(len(rows))
    assert float(distances.min()) > 1e-3
    seed = member_seeds(0, 0).init >> 32
    first = build(GroupNet, member_seeds(seed, 1).init)
    assert torch.equal(buffer.at(1, 0), nn.utils.parameters_to_vector(first.parameters()).detach())


def test_gsam_experts_share_starts_with_sgd_and_rho_zero_is_sgd(buffer: TrajectoryBuffer) -> None:
    same = train_experts(_data(), GroupNet, **{**EXPERTS, "optimizer": "gsam"}, rho=0.0)
    assert torch.allclose(same.tensor, buffer.tensor, atol=1e-6)
    flat = train_experts(_data(), GroupNet, **{**EXPERTS, "optimizer": "gsam"}, rho=1.0, alpha=0.3)
    assert torch.equal(flat.tensor[:, 0], buffer.tensor[:, 0])
    assert float((flat.tensor[:, 1] - buffer.tensor[:, 1]).norm()) > 1e-2
    sam = train_experts(_data(), GroupNet, **{**EXPERTS, "optimizer": "sam"}, rho=1.0, alpha=0.3)
    none = train_experts(_data(), GroupNet, **{**EXPERTS, "optimizer": "gsam"}, rho=1.0, alpha=0.0)
    assert torch.equal(sam.tensor, none.tensor)
    assert not torch.equal(sam.tensor, flat.tensor)


def test_buffer_round_trip_in_parts_and_resumed_training(tmp_path) -> None:
    whole = train_experts(_data(), GroupNet, **EXPERTS, at_once=1, augment="crop")
    kept = train_experts(_data(), GroupNet, **EXPERTS, at_once=1, augment="crop", out=tmp_path / "a")
    assert len(kept.parts) == 2
    assert torch.equal(kept.tensor, whole.tensor)
    (tmp_path / "a" / "experts-0001.safetensors").unlink()
    with pytest.raises(InputError, match="already holds a run"):
        train_experts(_data(), GroupNet, **EXPERTS, at_once=1, augment="crop", out=tmp_path / "a")
    again = train_experts(
        _data(), GroupNet, **EXPERTS, at_once=1, augment="crop", out=tmp_path / "a", resume=True
    )
    assert torch.equal(again.tensor, whole.tensor)
    with pytest.raises(InputError, match="experts="):
        train_experts(_data(), GroupNet, **{**EXPERTS, "lr": 0.2}, at_once=1, out=tmp_path / "a", resume=True)
    loaded = TrajectoryBuffer.load(whole.save(tmp_path / "b"))
    assert torch.equal(loaded.tensor, whole.tensor)
    assert (loaded.names, loaded.shapes) == (whole.names, whole.shapes)
    assert torch.equal(loaded.at(1, 3), whole.tensor[1, 3])
    with pytest.raises(InputError, match="no expert trajectories"):
        TrajectoryBuffer.load(tmp_path)


def test_a_loaded_buffer_is_mapped_not_read(tmp_path, buffer: TrajectoryBuffer) -> None:
    path = buffer.save(tmp_path) / "experts-0000.safetensors"
    loaded = TrajectoryBuffer.load(tmp_path)
    marked = path.read_bytes()
    with path.open(
        "r+b"
    ) as file:  # writing through the file shows in the tensor only where it is a map of it
        file.seek(len(marked) - 4)
        file.write(torch.tensor([123.0]).numpy().tobytes())
    assert float(loaded.parts[0].flatten()[-1]) == 123.0


def test_draws_stay_in_the_buffer_and_come_from_the_generator(buffer: TrajectoryBuffer) -> None:
    g = torch.Generator().manual_seed(0)
    seen = [buffer.draw(g, 3, 2)[:2] for _ in range(60)]
    assert {e for e, _ in seen} == {0, 1}
    assert {t for _, t in seen} == {0, 1, 2}
    e, t, start, target = buffer.draw(torch.Generator().manual_seed(0), 3, 2)
    assert (e, t) == seen[0]
    assert torch.equal(start, buffer.tensor[e, t])
    assert torch.equal(target, buffer.tensor[e, t + 2])
    with pytest.raises(InputError, match="max_start_epoch is 4"):
        buffer.draw(g, 4, 2)


@pytest.mark.parametrize("cls", [FTD, TESLA])
def test_both_learn_from_a_data_loader_and_somebodys_network(cls, buffer: TrajectoryBuffer) -> None:
    x, y = _data()
    loader = DataLoader(TensorDataset(x, y), batch_size=7)
    losses = []
    matcher = cls(**{**SMALL, "steps": 40}, **({"ema_decay": 0.9} if cls is FTD else {}))
    found = matcher.distill(
        loader, GroupNet, buffer=buffer, progress=lambda k, n, f: losses.append(f["loss"])
    )
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert found.images.shape == (6, 1, 4, 4)
    assert torch.equal(found.labels, torch.arange(3).repeat_interleave(2))
    assert found.lr != pytest.approx(0.1, abs=1e-6)
    assert evaluate(found, GroupNet, (x, y), networks=2, epochs=40).mean > 0.9


def test_same_seed_same_set_and_the_global_generator_is_left_alone(buffer: TrajectoryBuffer) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    options = {k: v for k, v in SMALL.items() if k != "per_class"} | {"augment": "crop_scale", "batch_syn": 4}
    runs = [match_trajectories(buffer, _data(), GroupNet, 2, seed=s, **options) for s in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(runs[0].images, runs[1].images)
    assert not torch.equal(runs[0].images, runs[2].images)


class _Stop(Exception):
    pass


@pytest.mark.parametrize("soft", [False, "teacher"])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, soft) -> None:
    options = SMALL | {"soft_labels": soft, "batch_syn": 4, "augment": "crop", "experts": EXPERTS}
    unbroken = FTD(**options, ema_decay=0.5)
    want = unbroken.distill(_data(), GroupNet)

    def stop(k: int, n: int, figures) -> None:
        if k == 3:
            raise _Stop

    broken = FTD(**options, ema_decay=0.5)
    broken.checkpoint_seconds = 0.0
    with pytest.raises(_Stop):
        broken.distill(_data(), GroupNet, out=tmp_path / "run", progress=stop)
    again = FTD(**options, ema_decay=0.5)
    got = again.distill(_data(), GroupNet, out=tmp_path / "run", resume=True)
    assert torch.equal(got.images, want.images)
    assert torch.equal(got.labels, want.labels)
    assert got.lr == want.lr
    assert torch.equal(again.raw.images, unbroken.raw.images)
    finished = FTD(**options, ema_decay=0.5)
    same = finished.distill(_data(), GroupNet, out=tmp_path / "run", resume=True)
    assert torch.equal(same.images, want.images)
    assert torch.equal(finished.raw.images, unbroken.raw.images)


def _gradient(buffer: TrajectoryBuffer, unroll: str, **changes):
    """Loss and gradients of the first iteration in float64."""
    matcher = TrajectoryMatcher(**{**SMALL, "syn_steps": 5, "unroll": unroll, "seed": 3, **changes})
    matcher._buffer = buffer
    net = lambda: GroupNet(drop=0.3 if changes.get("allow_dropout") else 0.0).double()  # noqa: E731
    job = matcher.job(_data(torch.float64), net)
    return matcher.gradient(job, matcher.start(job))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch_syn": 4},
        {"augment": "crop_scale_rotate_cutout_color"},
        {"lr_label": 0.1, "batch_syn": 4},
        {"allow_dropout": True},
    ],
    ids=["plain", "batches", "augmented", "labels", "dropout"],
)
def test_every_exact_mode_gives_one_gradient(buffer: TrajectoryBuffer, changes) -> None:
    full = _gradient(buffer, "full", **changes)
    for mode in ("exact", "checkpoint", "tesla"):
        got = _gradient(buffer, mode, **changes)
        assert float(got.loss) == pytest.approx(float(full.loss), rel=1e-12)
        same = mode != "tesla"
        for name, grad in full.grads.items():
            assert torch.allclose(got.grads[name], grad, rtol=1e-8, atol=1e-12) == same
        assert torch.allclose(got.lr_grad, full.lr_grad, rtol=1e-8) == same
    assert set(full.grads) == {"images", "logits"} if "lr_label" in changes else {"images"}


def test_augmented_gradient_equals_a_loop_written_out(buffer: TrajectoryBuffer) -> None:
    """The same draws in every pass, one draw for each step, taken through to the pixels."""
    augment = SiameseAugment("crop_scale_rotate")
    matcher = TrajectoryMatcher(**{**SMALL, "syn_steps": 3}, augment=augment, batch_syn=4, seed=3)
    matcher._buffer = buffer
    job = matcher.job(_data(torch.float64), lambda: GroupNet().double())
    state = matcher.start(job)
    g = state["generator"].clone_state()
    _, _, start, target = buffer.draw(g, 3, 2)
    order = batch_order(6, 4, 3, g)
    seeds = torch.randint(2**62, (3,), generator=g).tolist()
    images = state["images"].clone().requires_grad_()
    theta = first = start.double()
    for index, seed in zip(order, seeds, strict=True):
        at = theta if theta.requires_grad else theta.requires_grad_()
        x = augment(images[index], torch.Generator().manual_seed(seed))
        loss = nn.functional.cross_entropy(
            torch.func.functional_call(job.net, job.space.unflatten(at), (x,)), job.labels[index]
        )
        theta = at - 0.1 * torch.autograd.grad(loss, at, create_graph=True)[0]
    gap = (first - target.double()).square().sum()
    want = torch.autograd.grad((theta - target).square().sum() / gap, images)[0]
    got = matcher.gradient(job, state)
    assert torch.allclose(got.grads["images"], want, rtol=1e-7, atol=1e-10)


def test_batches_are_permutations_cut_into_chunks() -> None:
    order = batch_order(7, 3, 6, torch.Generator().manual_seed(0))
    assert [len(b) for b in order] == [3, 3, 1, 3, 3, 1]
    for k in (0, 3):
        assert sorted(torch.cat(order[k : k + 3]).tolist()) == list(range(7))
    assert not torch.equal(torch.cat(order[:3]), torch.cat(order[3:]))
    assert batch_order(7, 7, 2, torch.Generator()) == [None, None]


def test_pixels_and_rate_move_by_sgd_with_momentum(buffer: TrajectoryBuffer) -> None:
    matcher = TrajectoryMatcher(**SMALL, lr_lr=0.01, momentum=0.5)
    matcher._buffer = buffer
    job = matcher.job(_data(), GroupNet)
    state, twin = matcher.start(job), matcher.start(job)
    x, lr = nn.Parameter(twin["images"]), nn.Parameter(twin["lr"])
    pixel, rate = torch.optim.SGD([x], 3.0, momentum=0.5), torch.optim.SGD([lr], 0.01, momentum=0.5)
    for k in range(3):
        found = matcher.gradient(job, twin | {"images": x.detach(), "lr": lr.detach()})
        x.grad, lr.grad = found.grads["images"], found.lr_grad
        pixel.step()
        rate.step()
        matcher.step(job, state, k)
    assert torch.allclose(state["images"], x.detach(), atol=1e-6)
    assert torch.allclose(state["lr"], lr.detach(), atol=1e-7)


def test_refusals(buffer: TrajectoryBuffer) -> None:
    def distill(net=GroupNet, **changes):
        return TrajectoryMatcher(**{**SMALL, **changes}).distill(_data(), net, buffer=buffer)

    with pytest.raises(InputError, match="max_start_epoch is 4 and expert_epochs 2"):
        distill(max_start_epoch=4)
    with pytest.raises(InputError, match="other parameters"):
        distill(net=lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3)))
    with pytest.raises(InputError, match="batch norm in train mode"):
        distill(net=lambda: GroupNet(norm=nn.BatchNorm2d))
    with pytest.raises(InputError, match="active dropout"):
        distill(net=lambda: GroupNet(drop=0.5))
    with pytest.raises(InputError, match="batch_syn is 7; there are only 6"):
        distill(batch_syn=7)
    with pytest.raises(InputError, match="unroll is 'half'"):
        distill(unroll="half")
    with pytest.raises(InputError, match="lr_syn is 0"):
        distill(lr_syn=0)
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(InputError, match="ema_decay"):
            distill(ema_decay=decay)
    with pytest.raises(InputError, match="overwrites labels"):
        distill(soft_labels="teacher", lr_label=0.1)
    with pytest.raises(InputError, match="soft_labels is True"):
        distill(soft_labels=True)
    with pytest.raises(InputError, match="experts have 3 epochs"):
        TrajectoryMatcher(**SMALL, experts={"epochs": 3}).distill(_data(), GroupNet)
    with pytest.raises(InputError, match="standardised by mean"):
        distill(standardise=False)
    with pytest.raises(InputError, match="no buffer"):
        TrajectoryMatcher(**SMALL).job(_data(), GroupNet)
    still = TrajectoryBuffer((buffer.tensor[:, :1].expand(2, 5, -1),), buffer.names, buffer.shapes)
    with pytest.raises(InputError, match="start equals its target"):
        TrajectoryMatcher(**SMALL).distill(_data(), GroupNet, buffer=still)


def test_what_cannot_be_matched_is_refused_before_experts_are_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("experts were trained")

    monkeypatch.setattr("gradmatch.data._matching.train_experts", never)
    for net, changes, init, words in (
        (lambda: GroupNet(norm=nn.BatchNorm2d), {}, None, "batch norm in train mode"),
        (lambda: GroupNet(drop=0.5), {}, None, "active dropout"),
        (GroupNet, {"batch_syn": 7}, None, "batch_syn is 7"),
        (GroupNet, {}, "nowhere", "does not exist"),
    ):
        with pytest.raises(InputError, match=words):
            TrajectoryMatcher(**SMALL, **changes, experts=EXPERTS).distill(_data(), net, init=init)


def test_batch_norm_is_matched_with_batch_statistics_when_allowed() -> None:
    net = lambda: GroupNet(norm=nn.BatchNorm2d)  # noqa: E731
    buffer = train_experts(_data(), net, **EXPERTS)
    found = match_trajectories(
        buffer,
        _data(),
        net,
        2,
        allow_batchnorm=True,
        soft_labels="teacher",
        **{k: v for k, v in SMALL.items() if k != "per_class"},
    )
    assert bool(torch.isfinite(found.images).all())
    assert torch.allclose(found.labels.sum(1), torch.ones(6))


def test_a_rate_that_leaves_its_range_is_clamped_or_stops_the_run(buffer: TrajectoryBuffer) -> None:
    class Down(TrajectoryMatcher):
        def gradient(self, job, state):
            found = super().gradient(job, state)
            found.lr_grad.fill_(1.0)
            return found

    clamped = Down(**SMALL, lr_lr=0.06)
    assert clamped.distill(_data(), GroupNet, buffer=buffer).lr == pytest.approx(1e-3)
    with pytest.raises(InputError, match="iteration 1: lr_syn became -"):
        Down(**SMALL, lr_lr=0.06, lr_floor=None).distill(_data(), GroupNet, buffer=buffer)


def test_a_loss_that_is_not_finite_stops_with_the_iteration(buffer: TrajectoryBuffer) -> None:
    with pytest.raises(InputError, match=r"iteration 1: .*(finite|NaN)"):
        TrajectoryMatcher(**{**SMALL, "lr_img": 1e38}).distill(_data(), GroupNet, buffer=buffer)


def test_average_of_the_pixels(buffer: TrajectoryBuffer) -> None:
    plain, averaged = TrajectoryMatcher(**SMALL), FTD(**SMALL, ema_decay=0.0)
    a = plain.distill(_data(), GroupNet, buffer=buffer)
    b = averaged.distill(_data(), GroupNet, buffer=buffer)
    assert torch.equal(a.images, b.images)
    assert torch.equal(plain.raw.images, a.images)
    still = FTD(**{**SMALL, "lr_img": 0.0}, ema_decay=0.9)
    still._buffer = buffer
    job = still.job(_data(), GroupNet)
    state = still.start(job)
    assert torch.equal(state["ema"], state["images"])
    state["ema"] = torch.zeros_like(state["images"])
    for k in range(5):
        still.step(job, state, k)
    assert torch.allclose(state["ema"], (1 - 0.9**5) * tensor_of(state, "images"), atol=1e-6)
    moving = FTD(**SMALL, ema_decay=0.5)
    moving.distill(_data(), GroupNet, buffer=buffer)
    assert not torch.equal(moving.raw.images, moving.distill(_data(), GroupNet, buffer=buffer).images)


def test_evaluating_one_set_does_not_train_the_network_of_the_next(buffer: TrajectoryBuffer) -> None:
    """The released evaluation trains the averaged images on a network that the plain ones had already trained."""
    matcher = FTD(**SMALL, ema_decay=0.5)
    averaged = matcher.distill(_data(), GroupNet, buffer=buffer)
    shared = GroupNet()
    alone = evaluate(averaged, shared, _data(), networks=2, epochs=3).accuracies
    evaluate(matcher.raw, shared, _data(), networks=2, epochs=30)
    assert evaluate(averaged, shared, _data(), networks=2, epochs=3).accuracies == alone


def test_zca_against_its_definition_and_back() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 1, 3, 2, generator=g, dtype=torch.float64) @ torch.randn(
        2, 2, generator=g, dtype=torch.float64
    )
    zca = ZCA.fit(x, eps=0.1)
    white = zca(x)
    assert white.shape == x.shape
    values = torch.linalg.eigvalsh(torch.cov(x.flatten(1).T))
    assert torch.allclose(torch.linalg.eigvalsh(torch.cov(white.flatten(1).T)), values / (values + 0.1))
    assert torch.allclose(zca.matrix, zca.matrix.T)
    assert torch.allclose(zca.inverse(white), x)
    with pytest.raises(InputError, match="fitted to 6"):
        zca(torch.zeros(2, 5, dtype=torch.float64))
    with pytest.raises(InputError, match="at least 2"):
        ZCA.fit(x[:1])
