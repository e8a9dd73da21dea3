from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from gradmatch.core.checks import InputError, finite
from gradmatch.core.store import RunFolder
from gradmatch.core.training import seed_of, train


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))


def drawn(module: nn.Module):
    def loss(generator: torch.Generator) -> Tensor:
        x = torch.randn(16, 3, generator=generator)
        return (module(x) - x.sum(1, keepdim=True)).square().mean()

    return loss


OPTIONS = {"lr": 0.05, "schedule": "cosine", "warmup": 3, "clip": 1.0, "average": 0.9, "seed": 5}


def test_it_is_the_plain_loop() -> None:
    one, two = nn.Linear(3, 1), nn.Linear(3, 1)
    two.load_state_dict(one.state_dict())
    found = train(one, drawn(one), 7, lr=0.05, schedule="cosine", warmup=3, clip=0.5)
    adam, losses = torch.optim.AdamW(two.parameters(), lr=0.05, weight_decay=0.0), []
    for step in range(7):
        rate = min(1, (step + 1) / 3) * 0.5 * (1 + math.cos(math.pi * step / 7))
        adam.param_groups[0]["lr"] = 0.05 * rate
        loss = drawn(two)(torch.Generator().manual_seed(seed_of(0, step)))
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(two.parameters(), 0.5)
        adam.step()
        losses.append(loss.item())
    assert found.losses.tolist() == losses
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_schedule_may_be_a_factor_for_each_step() -> None:
    one, two = nn.Linear(3, 1), nn.Linear(3, 1)
    two.load_state_dict(one.state_dict())
    rates = [0.5 * (1 + math.cos(math.pi * step / 7)) for step in range(7)]
    found = train(one, drawn(one), 7, lr=0.05, schedule=lambda step: rates[step], warmup=3)
    other = train(two, drawn(two), 7, lr=0.05, schedule="cosine", warmup=3)
    assert torch.equal(found.losses, other.losses)


def test_stopped_and_resumed_ends_with_the_same_bits(tmp_path) -> None:
    whole = net()
    expected = train(whole, drawn(whole), 12, **OPTIONS)

    class Stop(Exception):
        pass

    def stop(step: int) -> None:
        if step == 5:
            raise Stop

    parts = net()
    with pytest.raises(Stop):
        train(parts, drawn(parts), 12, **OPTIONS, run=RunFolder(tmp_path, {}), save_every=0.0, after=stop)
    again = net(seed=1)  # other initial weights: all must come from the folder
    found = train(again, drawn(again), 12, **OPTIONS, run=RunFolder(tmp_path, {}, resume=True))
    assert found.losses.tolist() == expected.losses[5:].tolist()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert found.averaged.keys() == whole.state_dict().keys()
    for name, value in expected.averaged.items():
        assert torch.equal(value, found.averaged[name]), name
    finished = train(net(2), drawn(again), 12, **OPTIONS, run=RunFolder(tmp_path, {}, resume=True))
    assert len(finished.losses) == 0


def test_average_and_modes_and_generators() -> None:
    module = net().eval()
    before, shadow = (
        torch.random.get_rng_state(),
        {k: p.detach().clone() for k, p in module.named_parameters()},
    )
    seen = []

    def after(step: int) -> None:
        seen.append(step)
        for k, p in module.named_parameters():
            shadow[k].mul_(0.9).add_(p.detach(), alpha=0.1)

    progressed = []
    found = train(
        module, drawn(module), 4, average=0.9, after=after, progress=lambda *a: progressed.append(a[:2])
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert not module.training
    assert all(p.grad is None for p in module.parameters())
    assert seen == [1, 2, 3, 4]
    assert progressed == [(k, 4) for k in seen]
    for k, value in shadow.items():
        assert torch.allclose(found.averaged[k], value, atol=1e-6)


def test_nan_stops_with_the_step_named() -> None:
    module, count = nn.Linear(1, 1), [0]

    def loss(generator: torch.Generator) -> Tensor:
        count[0] += 1
        return module(torch.ones(1, 1)).sum() * (math.nan if count[0] == 4 else 1)

    weights = []
    with pytest.raises(InputError, match="the loss of step 4 is nan"):
        train(module, loss, 9, after=lambda k: weights.append(module.weight.item()))
    assert module.weight.item() == weights[-1]
    assert len(weights) == 3


def test_a_gradient_that_is_not_finite_is_never_kept_nor_returned(tmp_path) -> None:
    module = nn.Linear(1, 1)
    nn.init.zeros_(module.weight)

    def loss(generator: torch.Generator) -> Tensor:
        return module.weight.square().sum().sqrt()  # 0, and its slope is 0 / 0

    run = RunFolder(tmp_path / "run", {})
    with pytest.raises(InputError, match=r"weights that are NaN or infinite \(1 of them\) after step 1"):
        train(module, loss, 1)
    nn.init.zeros_(module.weight)
    with pytest.raises(InputError, match="after step 1"):
        train(module, loss, 5, run=run, save_every=0)
    assert run.load() is None


def test_bad_data_stop_with_the_step_named() -> None:
    module, count = nn.Linear(1, 1), [0]

    def loss(generator: torch.Generator) -> Tensor:
        count[0] += 1
        x = torch.full((2, 1), torch.inf if count[0] == 3 else 1.0)
        return module(finite("images", x)).sum()

    with pytest.raises(InputError, match="Step 3 of training stops: images has 2 NaN or infinite"):
        train(module, loss, 9)


def test_frozen_parameters_are_left_alone() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    module[0].requires_grad_(False)
    before = module[0].weight.clone()
    train(module, drawn(module), 3)
    assert torch.equal(before, module[0].weight)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"schedule": "linear"}, "schedule is 'linear'"),
        ({"average": 1.0}, "average is 1.0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"module": nn.ReLU()}, "nothing to train"),
        ({"loss": lambda g: torch.zeros(2)}, "loss of step 1 is of shape"),
    ],
)
def test_refusals(options, says) -> None:
    module = net()
    given = {"module": module, "loss": drawn(module), "steps": 2, **options}
    with pytest.raises(InputError, match=says):
        train(**given)


def test_seeds_of_steps_differ() -> None:
    seeds = {seed_of(s, k) for s in range(20) for k in range(500)}
    assert len(seeds) == 10_000
