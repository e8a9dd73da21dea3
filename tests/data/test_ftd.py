"""FTD's diagnostics of flatness and of errors that pile up, and its presets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmatch.core.checks import InputError
from gradmatch.data import FTD, SyntheticDataset, train_experts
from gradmatch.data.ftd import PRESETS, accumulated_error, loss_rise, matching_error, top_eigenvalue


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def _data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(30) % 3
    return torch.randn(3, 1, 2, 3, generator=g)[y] + 0.3 * torch.randn(30, 1, 2, 3, generator=g), y


EXPERTS = {"n_experts": 2, "epochs": 6, "lr": 0.2, "batch_size": 30, "optimizer": "sgd"}


@pytest.fixture(scope="module")
def buffer():
    return train_experts(_data(), _net, **EXPERTS, standardise=False)


def _real() -> SyntheticDataset:
    x, y = _data()
    return SyntheticDataset(x, y, 3, lr=0.2)


def test_a_student_on_the_experts_own_steps_makes_no_error(buffer) -> None:
    """Whole-batch experts of two epochs are two SGD steps on the real data."""
    found = accumulated_error(_real(), _net, buffer, _data(), segments=3, syn_steps=2)
    assert max(found.accumulated) < 1e-9
    assert max(found.matching) < 1e-9
    assert max(abs(g) for g in found.loss_gap) < 1e-5
    assert matching_error(_real(), _net, buffer, syn_steps=2, max_start_epoch=4) < 1e-9
    assert matching_error(_real(), _net, buffer, syn_steps=1, max_start_epoch=4) > 0.05


def test_accumulated_error_against_a_loop_written_out(buffer) -> None:
    g = torch.Generator().manual_seed(3)
    synthetic = SyntheticDataset(torch.randn(3, 1, 2, 3, generator=g), torch.arange(3), 3, lr=0.1)
    found = accumulated_error(synthetic, _net, buffer, _data(), segments=2, syn_steps=4, experts=1)

    def train(theta: Tensor, steps: int) -> Tensor:
        net = _net()
        nn.utils.vector_to_parameters(theta.clone(), net.parameters())
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(steps):
            sgd.zero_grad()
            F.cross_entropy(net(synthetic.images), synthetic.labels).backward()
            sgd.step()
        return nn.utils.parameters_to_vector(net.parameters()).detach()

    def loss(theta: Tensor) -> float:
        net = _net()
        nn.utils.vector_to_parameters(theta.clone(), net.parameters())
        return float(F.cross_entropy(net(_data()[0]), _data()[1]).detach())

    first, middle, last = (buffer.at(0, k) for k in (0, 2, 4))
    end, single = train(first, 8), train(middle, 4)
    eps, delta = (end - last).square().sum(), (single - last).square().sum()
    assert found.accumulated[1] == pytest.approx(float(eps / (first - last).square().sum()), rel=1e-4)
    assert found.matching[1] == pytest.approx(float(delta / (middle - last).square().sum()), rel=1e-4)
    assert found.ratio[1] == pytest.approx(float(eps / delta), rel=1e-4)
    assert found.ratio[0] == pytest.approx(1.0, rel=1e-5)
    assert found.loss_gap[1] == pytest.approx(loss(end) - loss(last), rel=1e-3, abs=1e-6)


def test_top_eigenvalue_against_the_dense_hessian(buffer) -> None:
    theta = buffer.at(0, 6).double()
    x, y = _data()
    net = _net().double()

    def loss(v: Tensor) -> Tensor:
        parts, at = {}, 0
        for name, p in net.named_parameters():
            parts[name], at = v[at : at + p.numel()].view(p.shape), at + p.numel()
        return F.cross_entropy(torch.func.functional_call(net, parts, (x.double(),)), y)

    dense = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, theta))
    want = float(dense[dense.abs().argmax()])
    assert top_eigenvalue(_net, theta, _data(), iterations=500, tolerance=1e-9) == pytest.approx(
        want, rel=1e-4
    )


def test_loss_rise_on_a_known_function(buffer) -> None:
    theta = buffer.at(0, 6)
    x, y = _data()
    rises = {kind: loss_rise(_net, theta, (x, y), radius=0.05, kind=kind) for kind in ("random", "gradient")}
    assert rises["gradient"] > rises["random"]
    net = _net()
    nn.utils.vector_to_parameters(theta.clone(), net.parameters())
    here = F.cross_entropy(net(x), y)
    g = nn.utils.parameters_to_vector(torch.autograd.grad(here, list(net.parameters())))
    nn.utils.vector_to_parameters(theta + 0.05 * theta.norm() * g / g.norm(), net.parameters())
    assert rises["gradient"] == pytest.approx(float((F.cross_entropy(net(x), y) - here).detach()), rel=1e-4)
    again = [loss_rise(_net, theta, (x, y), seed=s) for s in (0, 0, 1)]
    assert again[0] == again[1] != again[2]


def test_the_released_radius_moves_an_expert_by_almost_nothing(buffer) -> None:
    """The released rho 0.01 with adaptive scaling, and alpha with it, leave experts where SGD has them."""

    def shift(**options) -> float:
        experts = train_experts(
            _data(), _net, **{**EXPERTS, "batch_size": 10, "optimizer": "gsam"}, standardise=False, **options
        )
        plain = train_experts(_data(), _net, **{**EXPERTS, "batch_size": 10}, standardise=False)
        return float((experts.tensor[:, -1] - plain.tensor[:, -1]).norm() / plain.tensor[:, -1].norm())

    assert shift(rho=0.01, alpha=1.0) < 0.01
    assert shift(rho=0.2, alpha=0.3, adaptive=False) > 0.02


def test_presets_are_the_papers_table() -> None:
    matcher = FTD.preset("cifar100-50")
    assert (matcher.syn_steps, matcher.batch_syn, matcher.lr_img, matcher.ema_decay) == (
        80,
        1000,
        1000,
        0.999,
    )
    assert matcher.experts["rho"] == 0.01
    assert matcher.steps == 5000
    assert len(PRESETS) == 8
    assert FTD.preset("cifar10-1", ema_decay=0.5).ema_decay == 0.5
    assert FTD().experts["optimizer"] == "gsam"
    with pytest.raises(InputError, match="name is 'mnist'"):
        FTD.preset("mnist")


def test_refusals(buffer) -> None:
    real = _real()
    with pytest.raises(InputError, match="segments is 4, each of 2 epochs; the buffer has 6"):
        accumulated_error(real, _net, buffer, _data(), segments=4)
    with pytest.raises(InputError, match="lr is None"):
        accumulated_error(SyntheticDataset(real.images, real.labels, 3), _net, buffer, _data(), segments=1)
    with pytest.raises(InputError, match="kind is 'up'"):
        loss_rise(_net, buffer.at(0, 0), _data(), kind="up")
    with pytest.raises(InputError, match="theta has shape"):
        top_eigenvalue(_net, torch.zeros(3), _data())
