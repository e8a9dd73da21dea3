"""Flat storage: parameters stay what they are, gradients find their place, and what cannot be viewed is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradmatch.core.checks import InputError
from gradmatch.core.flat import FlatStorage, flat_storages


def params() -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), (), (2, 3, 2, 2)]
    found = [nn.Parameter(torch.randn(s, generator=g)) for s in shapes]
    found[3].data = found[3].data.to(memory_format=torch.channels_last)
    return found


def test_values_and_strides_stay_and_views_are_aligned() -> None:
    own = params()
    before = [(p.detach().clone(), p.stride(), id(p)) for p in own]
    flat = FlatStorage(own)
    for p, (value, stride, identity) in zip(own, before, strict=True):
        assert torch.equal(p, value)
        assert (p.stride(), id(p)) == (stride, identity)
        assert p.untyped_storage().data_ptr() == flat.values.untyped_storage().data_ptr()
        assert (p.data_ptr() - flat.values.data_ptr()) % 64 == 0
    flat.values.mul_(2)
    assert torch.equal(own[3], 2 * before[3][0])
    assert flat.values.numel() % 16 == 0


def test_gradients_are_collected_once_and_then_accumulate_in_place() -> None:
    own = params()[:2]
    flat = FlatStorage(own)
    (3 * own[0].sum()).backward()
    assert flat.collect() == [True, False]
    assert torch.equal(flat.gradients[flat.span(0, 1)][:12], torch.full((12,), 3.0))
    kept = own[0].grad
    (2 * own[0].sum() + own[1].sum()).backward()
    assert own[0].grad is kept
    assert flat.collect() == [True, True]
    assert torch.equal(flat.gradients[flat.span(0, 1)][:12], torch.full((12,), 5.0))
    flat.zero_gradients()
    assert float(flat.gradients.abs().sum()) == 0
    assert own[0].grad is kept


def test_dropped_gradients_are_brought_back() -> None:
    model = nn.Linear(3, 2)
    flat = FlatStorage(list(model.parameters()))
    for k in range(3):
        model.zero_grad()  # drops the views
        model(torch.full((1, 3), float(k))).sum().backward()
        expected = model.weight.grad.clone()
        assert flat.collect() == [True, True]
        assert torch.equal(model.weight.grad, expected)
        assert torch.equal(flat.gradients[:6].view(2, 3), expected)


def test_what_cannot_be_viewed_is_refused() -> None:
    base = torch.zeros(10)
    for bad, words in (
        (base[:5], "parameter 1 of shape .5,. shares its storage"),
        (torch.zeros(4, 6)[:, :3], "strides .6, 1., with gaps or overlaps"),
        (torch.zeros(1).expand(4), "with gaps or overlaps"),
        (torch.zeros(3, device="meta"), "on meta; flat=True needs dense tensors"),
    ):
        own = [nn.Parameter(torch.ones(2)), bad]
        with pytest.raises(InputError, match=words):
            FlatStorage(own)
        assert own[0].untyped_storage().nbytes() == 8  # nothing was moved


def test_models_moved_afterwards_are_refused() -> None:
    model = nn.Linear(3, 2)
    flat = FlatStorage(list(model.parameters()))
    model.weight.data = model.weight.data.clone()
    with pytest.raises(InputError, match=r"parameter 0 was moved .* make the optimizer then"):
        flat.collect()
    model = nn.Linear(3, 2)
    flat = FlatStorage(list(model.parameters()))
    model(torch.ones(1, 3)).sum().backward()
    flat.collect()
    model.weight.grad.data = model.weight.grad.data.clone()
    with pytest.raises(InputError, match="a gradient was moved"):
        flat.collect()


def test_sparse_gradients_are_refused() -> None:
    p = nn.Parameter(torch.ones(3))
    flat = FlatStorage([p])
    p.grad = torch.sparse_coo_tensor([[0]], [1.0], (3,), check_invariants=True)
    with pytest.raises(InputError, match="parameter 0 has a sparse gradient"):
        flat.collect()


def test_one_storage_for_each_run_of_a_type() -> None:
    own = [nn.Parameter(torch.ones(2, dtype=t)) for t in (torch.float32, torch.float32, torch.float64)]
    found = flat_storages(own)
    assert [len(f.params) for f in found] == [2, 1]
    assert [f.values.dtype for f in found] == [torch.float32, torch.float64]
    assert [f.first for f in found] == [0, 2]
