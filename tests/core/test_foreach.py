"""Lists of tensors as one, and their blocks."""

from __future__ import annotations

import pytest
import torch

from gradmatch.core.foreach import TensorList, blocks, each


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_operation_is_that_of_one_tensor(dtype: torch.dtype) -> None:
    x, y, z = ([randn(3, 2, seed=s).to(dtype), randn(5, seed=s + 1).to(dtype)] for s in (0, 2, 4))
    rules = (
        lambda a, b, c: a.mul_(0.999).add_(b, alpha=-0.1),
        lambda a, b, c: a.add_(1e-8).div_(0.7).mul(b),
        lambda a, b, c: a.lerp(b, 0.1).sign_(),
        lambda a, b, c: a.lerp_(b, 0.9).sub(c).abs_().sigmoid_(),
        lambda a, b, c: a.addcmul_(b, b, value=0.3).addcdiv_(b, c.abs().add_(1.0), value=-0.2),
        lambda a, b, c: a.copy_(b).neg_().abs().sqrt(),
    )
    for rule in rules:
        ours = rule(*(TensorList(t.clone() for t in own) for own in (x, y, z)))
        theirs = [rule(*(t.clone() for t in row)) for row in zip(x, y, z, strict=True)]
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


def test_in_place_operations_change_the_tensors_given() -> None:
    own = [torch.ones(2), torch.ones(3)]
    x = TensorList(own)
    assert x.mul_(2.0) is x
    assert own[1].tolist() == [2.0, 2.0, 2.0]
    assert [t.tolist() for t in each(torch.exp, TensorList([torch.zeros(1)]))] == [[1.0]]
    assert each(torch.neg, torch.ones(1)).tolist() == [-1.0]
    with pytest.raises(AttributeError, match="no_such_thing"):
        x.no_such_thing()


def test_blocks_cover_everything_once_within_their_size() -> None:
    sizes = [1000, 1, 7, 250, 251, 3]
    a = [torch.arange(float(n)) for n in sizes]
    b = [x.clone() for x in a]
    seen = list(blocks([a, b], limit=100 * 8))
    assert all(sum(t.numel() for t in block[0]) <= 100 for block in seen)
    assert torch.equal(torch.cat([t for block in seen for t in block[0]]), torch.cat(a))
    for block in seen:
        for x, y in zip(*block, strict=True):
            assert torch.equal(x, y)
            x.add_(1.0)  # a view, not a copy
    assert all(torch.equal(x, y + 1) for x, y in zip(a, b, strict=True))
    lengths = [t.numel() for block in seen for t in block[0]]
    assert lengths[:10] == [100] * 10
    assert 84 in lengths  # 250 in three even parts, not 100 + 100 + 50


def test_tensors_that_cannot_be_flat_stay_whole() -> None:
    x = torch.zeros(20, 30).T
    assert [block[0][0].shape for block in blocks([[x]], limit=40)] == [x.shape]
    channels_last = torch.zeros(2, 8, 4, 4).to(memory_format=torch.channels_last)
    (only,) = blocks([[channels_last]], limit=16)
    assert only[0][0] is channels_last
