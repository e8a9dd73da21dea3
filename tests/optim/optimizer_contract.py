"""What every optimizer here must keep. A test file inherits it and says how to make and to step its class:

class TestLion(OptimizerContract):
    def make(self, params, **options):
        return Lion(params, lr=1e-2, **options)

``drive`` does one training step in the class's protocol; override it where a step is called in another way. Options
that a class does not have (flat, foreach, maximize, lr) are not tested.
"""

from __future__ import annotations

import copy
import inspect
import io
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmatch.core import foreach
from gradmatch.core.checks import InputError
from gradmatch.optim._base import OptimizerBase


class Net(nn.Module):
    """Parameters of every kind: 4-d, 2-d, 1-d, a scalar, one that is not always used."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        draw = lambda *shape: nn.Parameter((0.5 * torch.randn(*shape, generator=g)).to(dtype))  # noqa: E731
        self.kernel, self.head, self.bias = draw(3, 1, 3, 3), draw(2, 12), draw(2)
        self.scale, self.unused = nn.Parameter(torch.ones((), dtype=dtype)), draw(4)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.tanh(nn.functional.conv2d(x, self.kernel)).flatten(1)
        return self.scale * (maps @ self.head.T + self.bias)


def data(k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Batch k: inputs (8, 1, 4, 4) and targets (8, 2)."""
    g = torch.Generator().manual_seed(k)
    return torch.randn(8, 1, 4, 4, generator=g).to(dtype), torch.randn(8, 2, generator=g).to(dtype)


def losses(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs - y).square().mean(1)


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def saved(value: Any) -> Any:
    """Through a file and back, without pickled code."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class OptimizerContract:
    """Tests of any :class:`OptimizerBase`; see the module."""

    steps = 8
    tolerance = 1e-6

    def make(self, params: Any, **options: Any) -> OptimizerBase:
        raise NotImplementedError

    def drive(self, optimizer: Optimizer, net: nn.Module, x: Tensor, y: Tensor, sign: float = 1.0) -> Any:
        """One step on a batch, in the first protocol of the class."""
        optimizer.zero_grad()

        def loss() -> Tensor:
            return sign * losses(net(x), y).mean()

        protocol = optimizer.protocols[0]  # type: ignore[attr-defined]
        if protocol == "output closure":
            return optimizer.step(lambda: (net(x), lambda z: sign * losses(z, y)))  # type: ignore[arg-type,return-value]
        if protocol == "loss closure":
            return optimizer.step(loss)  # type: ignore[arg-type]
        loss().backward(create_graph=protocol == "graph")
        return optimizer.step()

    # --- helpers -------------------------------------------------------------------------------------------

    def has(self, option: str) -> bool:
        cls = type(self.make(Net().parameters()))
        return option in inspect.signature(cls.__init__).parameters

    def need(self, option: str) -> None:
        if not self.has(option):
            pytest.skip(f"has no option {option}")

    def run(
        self, net: nn.Module, optimizer: Optimizer, first: int = 0, count: int | None = None
    ) -> list[Tensor]:
        for k in range(first, first + (self.steps if count is None else count)):
            self.drive(optimizer, net, *data(k, next(net.parameters()).dtype))
        return weights(net)

    def trained(self, dtype: torch.dtype = torch.float32, **options: Any) -> list[Tensor]:
        net = Net(dtype)
        return self.run(net, self.make(net.parameters(), **options))

    # --- the contract --------------------------------------------------------------------------------------

    def test_is_a_torch_optimizer_that_moves_weights(self) -> None:
        net = Net()
        before, optimizer = weights(net), self.make(net.parameters())
        assert isinstance(optimizer, Optimizer)
        assert optimizer.protocols
        after = self.run(net, optimizer)
        moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert moved == [True, True, True, True, False]
        assert all(bool(torch.isfinite(w).all()) for w in after)

    def test_single_tensor_equals_lists_and_small_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.need("foreach")
        single = self.trained(foreach=False)
        for listed in (self.trained(), self.trained(foreach=True)):
            for a, b in zip(single, listed, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=self.tolerance)
        monkeypatch.setattr(foreach.blocks, "__defaults__", (64,))
        for a, b in zip(single, self.trained(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=self.tolerance)

    def test_flat_storage_equals_single_tensors(self) -> None:
        self.need("flat")
        for a, b in zip(self.trained(), self.trained(flat=True), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=self.tolerance)

    @pytest.mark.parametrize("flat", [False, True])
    def test_state_dict_round_trip_continues_bitwise(self, flat: bool) -> None:
        options = {"flat": True} if flat else {}
        if flat:
            self.need("flat")
        net = Net()
        optimizer = self.make(net.parameters(), **options)
        self.run(net, optimizer, 0, 3)
        kept, at = saved(optimizer.state_dict()), saved(net.state_dict())
        expected = self.run(net, optimizer, 3)
        other = Net()
        other.load_state_dict(at)
        resumed = self.make(other.parameters(), **options)
        resumed.load_state_dict(kept)
        assert equal(expected, self.run(other, resumed, 3))
        kept_again = saved(resumed.state_dict())
        assert kept_again["param_groups"] == saved(optimizer.state_dict())["param_groups"]

    def test_a_deep_copy_continues_the_same(self) -> None:
        net = Net()
        optimizer = self.make(net.parameters())
        self.run(net, optimizer, 0, 3)
        copied_net, copied = copy.deepcopy((net, optimizer))
        assert equal(self.run(net, optimizer, 3), self.run(copied_net, copied, 3))

    def test_schedulers_are_obeyed(self) -> None:
        self.need("lr")
        net = Net()
        optimizer = self.make(net.parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0 if k < 2 else 0.0)
        seen = [weights(net)]
        for k in range(4):
            self.drive(optimizer, net, *data(k))
            scheduler.step()
            seen.append(weights(net))
        assert [equal(a, b) for a, b in pairwise(seen)] == [False, False, True, True]

    def test_every_group_has_its_own_settings(self) -> None:
        self.need("lr")
        net = Net()
        names = dict(net.named_parameters())
        base = self.make(net.parameters()).defaults["lr"]
        still = {"params": [names["kernel"]], "lr": 0.0}
        rest = {"params": [p for n, p in names.items() if n != "kernel"]}
        optimizer = self.make([still, rest])
        assert [g["lr"] for g in optimizer.param_groups] == [0.0, base]
        before = weights(net)
        after = self.run(net, optimizer)
        assert torch.equal(before[0], after[0])
        assert not torch.equal(before[1], after[1])

    def test_a_group_added_later_joins(self) -> None:
        net = Net()
        optimizer = self.make([net.kernel, net.head])
        before = weights(net)
        self.run(net, optimizer, 0, 2)
        optimizer.add_param_group({"params": [net.bias]})
        after = self.run(net, optimizer, 2, 2)
        assert not torch.equal(before[2], after[2])
        assert torch.equal(before[3], after[3])

    def test_maximize_climbs_what_minus_descends(self) -> None:
        self.need("maximize")
        up, down = Net(), Net()
        climbing, descending = self.make(up.parameters(), maximize=True), self.make(down.parameters())
        for k in range(self.steps):
            self.drive(climbing, up, *data(k))
            self.drive(descending, down, *data(k), sign=-1.0)
        for a, b in zip(weights(up), weights(down), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=self.tolerance)

    def test_a_parameter_without_gradient_is_left_alone(self) -> None:
        net = Net()
        optimizer = self.make(net.parameters(), **({"weight_decay": 0.1} if self.has("weight_decay") else {}))
        before = net.unused.detach().clone()
        self.run(net, optimizer)
        assert torch.equal(net.unused, before)
        assert net.unused not in optimizer.state

    def test_a_frozen_parameter_is_left_alone(self) -> None:
        net = Net()
        net.kernel.requires_grad_(False)
        optimizer = self.make(net.parameters(), **({"weight_decay": 0.1} if self.has("weight_decay") else {}))
        kernel, head = net.kernel.clone(), net.head.detach().clone()
        self.run(net, optimizer, 0, 2)
        assert torch.equal(net.kernel, kernel)
        assert not torch.equal(net.head, head)

    def test_a_parameter_without_numbers_does_no_harm(self) -> None:
        net = Net()
        net.none = nn.Parameter(torch.zeros(0, 3))  # as of a layer of no units
        optimizer = self.make(net.parameters())
        for k in range(2):
            net.none.grad = torch.zeros(0, 3)
            self.drive(optimizer, net, *data(k))
        assert all(bool(p.isfinite().all()) for p in net.parameters())

    def test_step_leaves_gradients_and_global_randomness_as_found(self) -> None:
        net = Net()
        optimizer = self.make(net.parameters())
        if optimizer.protocols[0] not in ("grad", "graph"):
            pytest.skip("makes its gradients itself")
        before = torch.get_rng_state()
        for k in range(2):
            x, y = data(k)
            optimizer.zero_grad()
            losses(net(x), y).mean().backward(create_graph=optimizer.protocols[0] == "graph")
            kept = [None if p.grad is None else p.grad.detach().clone() for p in net.parameters()]
            optimizer.step()
            for p, g in zip(net.parameters(), kept, strict=True):
                assert g is None or p.grad is None or torch.equal(p.grad, g)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_other_precisions(self, dtype: torch.dtype) -> None:
        net = Net(dtype)
        optimizer = self.make(net.parameters())
        after = self.run(net, optimizer)
        assert all(w.dtype is dtype and bool(torch.isfinite(w).all()) for w in after)
        wide = torch.float32 if dtype is torch.bfloat16 else dtype
        held = [t for s in optimizer.state.values() if isinstance(s, dict) for t in s.values()]
        kinds = {t.dtype for t in held if isinstance(t, Tensor) and t.is_floating_point()}
        assert kinds <= {wide}
        kept = saved(optimizer.state_dict())
        optimizer.load_state_dict(kept)
        again = saved(optimizer.state_dict())["state"]
        for k, s in kept["state"].items():
            for name, value in s.items() if isinstance(s, dict) else ():
                if isinstance(value, Tensor):
                    assert again[k][name].dtype is value.dtype
                    assert torch.equal(again[k][name], value)
                else:
                    assert again[k][name] == value

    def test_complex_weights_are_refused(self) -> None:
        with pytest.raises(InputError, match="real floating-point"):
            self.make([nn.Parameter(torch.ones(2, dtype=torch.complex64))])

    def test_sparse_gradients_are_refused(self) -> None:
        p = nn.Parameter(torch.ones(3))
        optimizer = self.make([p])
        if "grad" not in optimizer.protocols:
            pytest.skip("makes its gradients itself")
        p.grad = torch.sparse_coo_tensor([[0]], [1.0], (3,), check_invariants=True)
        with pytest.raises(InputError, match="SparseAdam"):
            optimizer.step()

    def test_a_bad_group_is_not_kept(self) -> None:
        self.need("lr")
        net = Net()
        optimizer = self.make([net.kernel])
        with pytest.raises(InputError, match="lr is -1"):
            optimizer.add_param_group({"params": [net.bias], "lr": -1.0})
        assert len(optimizer.param_groups) == 1

    def test_a_wrong_closure_is_refused_with_what_to_write(self) -> None:
        net = Net()
        optimizer = self.make(net.parameters())
        x, y = data(0)

        def no_backward() -> Tensor:
            return losses(net(x), y).mean()

        def with_backward() -> Tensor:
            optimizer.zero_grad()
            loss = losses(net(x), y).mean()
            loss.backward()
            return loss

        def outputs() -> Any:
            return net(x), lambda z: losses(z, y)

        kinds = {"grad": with_backward, "loss closure": no_backward, "output closure": outputs}
        for kind, closure in kinds.items():
            if kind not in optimizer.protocols:
                with pytest.raises(InputError, match=r"step got .* call "):
                    optimizer.step(closure)
        if "grad" in optimizer.protocols:
            assert float(optimizer.step(with_backward).detach()) > 0
            with pytest.raises(InputError, match="did not call backward"):
                optimizer.step(no_backward)  # stale gradients of the step before do not hide it
        else:
            with_backward()
            with pytest.raises(InputError, match="call "):
                optimizer.step()
