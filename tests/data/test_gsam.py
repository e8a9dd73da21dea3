"""GSAM's step against its formulas written out, and the promises of a torch optimiser."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

from gradmatch.core.checks import InputError
from gradmatch.core.ensemble import member_seeds, train_ensemble
from gradmatch.core.networks import build
from gradmatch.data._gsam import GSAM, GSAMUpdate, kept_running_statistics, perturbation

SGD = functools.partial(torch.optim.SGD, lr=0.1)


def _net(seed: int = 0, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 6), *([nn.BatchNorm1d(6)] if norm else []), nn.Tanh(), nn.Linear(6, 3)]
    return nn.Sequential(*layers).double()


def _fresh() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def _batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(8, 4, generator=g, dtype=torch.float64), torch.arange(8) % 3


def _loss(net: nn.Module) -> Tensor:
    x, y = _batch()
    return nn.functional.cross_entropy(net(x), y)


def _vector(tensors) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def _one_step(rho: float, alpha: float, adaptive: bool, norm: bool = False) -> tuple[nn.Module, GSAM]:
    net = _net(norm=norm)
    optimizer = GSAM(net.parameters(), SGD, rho=rho, alpha=alpha, adaptive=adaptive)
    optimizer.step(lambda: _loss(net))
    return net, optimizer


def _by_hand(rho: float, alpha: float, adaptive: bool) -> Tensor:
    """New parameters as one vector, from the published formulas on vectors."""
    net = _net()
    theta = _vector(net.parameters())

    def gradient(at: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(at, net.parameters())
        return _vector(torch.autograd.grad(_loss(net), list(net.parameters())))

    g = gradient(theta)
    eps = rho * g / (g.norm() + 1e-12)
    if adaptive:
        eps = rho * theta**2 * g / ((theta.abs() * g).norm() + 1e-12)
    gp = gradient(theta + eps)
    orthogonal = g - (g @ gp) / (gp @ gp) * gp
    assert abs(float(orthogonal @ gp)) < 1e-5
    return theta - 0.1 * (gp - alpha * orthogonal)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_step_equals_the_formulas_written_out(alpha: float, adaptive: bool) -> None:
    net, _ = _one_step(0.5, alpha, adaptive)
    assert torch.allclose(_vector(net.parameters()), _by_hand(0.5, alpha, adaptive), atol=1e-12, rtol=0)
    assert not torch.allclose(_vector(net.parameters()), _by_hand(0.5, alpha + 0.1, adaptive), atol=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
def test_rho_zero_is_the_base_optimiser_and_alpha_zero_is_sam(adaptive: bool) -> None:
    plain = _net()
    _loss(plain).backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    net, _ = _one_step(0.0, 1.0, adaptive)
    assert torch.equal(_vector(net.parameters()), _vector(plain.parameters()))
    sam, optimizer = _one_step(0.2, 0.0, adaptive)
    moved = _vector(_net().parameters()) - 0.1 * _vector([p.grad for p in sam.parameters()])
    assert torch.allclose(_vector(sam.parameters()), moved, atol=1e-15)
    assert torch.allclose(_vector(sam.parameters()), _by_hand(0.2, 0.0, adaptive), atol=1e-12, rtol=0)
    assert optimizer.param_groups[0]["rho"] == 0.2


def test_radius_of_the_climb() -> None:
    g = torch.Generator().manual_seed(0)
    params = [torch.randn(5, 3, generator=g), torch.randn(7, generator=g)]
    params[0][0] = 0.0
    grads = [torch.randn(5, 3, generator=g), torch.randn(7, generator=g)]
    plain = _vector(perturbation(params, grads, 0.3, adaptive=False))
    assert abs(float(plain.norm()) - 0.3) < 1e-5
    scaled = perturbation(params, grads, 0.3, adaptive=True)
    theta, eps = _vector(params), _vector(scaled)
    assert torch.equal(eps[theta == 0], torch.zeros(3))
    ratio = eps[theta != 0] / theta[theta != 0].abs()
    assert abs(float(ratio.norm()) - 0.3) < 1e-5


@pytest.mark.parametrize("program", ["loop", "vmap"])
def test_many_members_at_once_equal_the_optimiser_alone(program: str) -> None:
    x, y = _batch()
    update = GSAMUpdate(0.5, 0.3, True, momentum=0.9, weight_decay=0.01)
    ensemble = train_ensemble(
        _fresh, (x, y), 3, epochs=4, lr=0.1, batch_size=8, milestones=(), update=update, program=program
    )
    for k in range(3):
        net = build(_fresh, member_seeds(0, k).init).double()
        base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        optimizer = GSAM(net.parameters(), base, rho=0.5, alpha=0.3)
        for _ in range(4):
            optimizer.step(lambda net=net: _loss(net))
        got = _vector([p[k] for p in ensemble.params.values()])
        assert torch.allclose(got, _vector(net.parameters()), atol=1e-12, rtol=0)


def test_orthogonal_part_vanishes_on_a_round_quadratic() -> None:
    w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    steps = []
    for alpha in (0.0, 5.0):
        copy = nn.Parameter(w.detach().clone())
        GSAM([copy], SGD, rho=0.3, alpha=alpha, adaptive=False).step(lambda c=copy: 1.5 * c.square().sum())
        steps.append(copy.detach())
    assert torch.allclose(steps[0], steps[1], atol=1e-14)


def test_parameters_come_back_to_the_bit_when_the_base_does_not_move() -> None:
    net = _net()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = GSAM(net.parameters(), functools.partial(torch.optim.SGD, lr=0.0), rho=2.0)
    optimizer.step(lambda: _loss(net))
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_parameters_come_back_when_the_second_pass_fails() -> None:
    net, calls = _net(), []
    before = [p.detach().clone() for p in net.parameters()]

    def closure() -> Tensor:
        calls.append(1)
        loss = _loss(net)
        return loss if len(calls) == 1 else loss * float("nan")

    with pytest.raises(InputError, match="loss of nan"):
        GSAM(net.parameters(), SGD, rho=0.5).step(closure)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_batch_norm_keeps_the_statistics_of_the_first_pass() -> None:
    net, _ = _one_step(0.5, 0.3, True, norm=True)
    once = _net(norm=True)
    _loss(once)
    assert torch.equal(net[1].running_mean, once[1].running_mean)
    assert torch.equal(net[1].running_var, once[1].running_var)
    assert int(net[1].num_batches_tracked) == 1
    with kept_running_statistics():
        net(_batch()[0])
    assert torch.equal(net[1].running_mean, once[1].running_mean)
    net(_batch()[0])
    assert not torch.equal(net[1].running_mean, once[1].running_mean)


def test_closure_may_run_backward_itself() -> None:
    net, _ = _one_step(0.5, 0.3, True)
    other = _net()
    optimizer = GSAM(other.parameters(), SGD, rho=0.5, alpha=0.3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _loss(other)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.equal(_vector(net.parameters()), _vector(other.parameters()))


def test_groups_schedulers_and_state_round_trip() -> None:
    net = _net()
    base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    optimizer = GSAM(net.parameters(), base, rho=0.1, alpha=0.3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step(lambda: _loss(net))
    schedule.step()
    assert base.param_groups[0]["lr"] == 0.05
    other = _net(3)
    other.load_state_dict(net.state_dict())
    again = GSAM(other.parameters(), torch.optim.SGD(other.parameters(), lr=9.0, momentum=0.9))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert again.param_groups[0]["rho"] == 0.1
    assert again.param_groups[0]["lr"] == 0.05
    optimizer.step(lambda: _loss(net))
    again.step(lambda: _loss(other))
    assert torch.equal(_vector(net.parameters()), _vector(other.parameters()))


def test_groups_may_have_their_own_radius() -> None:
    net = _net()
    groups = [
        {"params": list(net[0].parameters())},
        {"params": list(net[2].parameters()), "rho": 0.0},
    ]
    optimizer = GSAM(groups, torch.optim.SGD([dict(g) for g in groups], lr=0.1), rho=0.4, adaptive=False)
    seen = []

    def closure() -> Tensor:
        seen.append([p.detach().clone() for p in net.parameters()])
        return _loss(net)

    optimizer.step(closure)
    assert not torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][2], seen[1][2])


def test_refusals() -> None:
    net, other = _net(), _net()
    with pytest.raises(InputError, match="rho is -1"):
        GSAM(net.parameters(), SGD, rho=-1)
    with pytest.raises(InputError, match="alpha is nan"):
        GSAM(net.parameters(), SGD, alpha=float("nan"))
    with pytest.raises(InputError, match="base_optimizer holds"):
        GSAM(net.parameters(), torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(InputError, match="closure is None"):
        GSAM(net.parameters(), SGD).step()
    with pytest.raises(InputError, match="scalar loss"):
        GSAM(net.parameters(), SGD).step(lambda: net(_batch()[0]))
