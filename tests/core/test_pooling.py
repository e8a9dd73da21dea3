"""Pooling by products against PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradmatch.core.pooling import ProductPool, with_product_pools


@pytest.mark.parametrize("shape", [(2, 3, 8, 6), (2, 3, 7, 6), (1, 1, 6, 96), (3, 4, 6)])
@pytest.mark.parametrize("k", [2, 3])
def test_values_and_both_derivatives(shape: tuple[int, ...], k: int) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
    expected, got = F.avg_pool2d(x, k), ProductPool(k)(x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(expected.shape, generator=g, dtype=torch.float64)
    pairs = [
        torch.autograd.grad((p.square() * weight).sum(), x, create_graph=True)[0] for p in (got, expected)
    ]
    torch.testing.assert_close(*pairs, rtol=1e-12, atol=1e-12)
    twice = [torch.autograd.grad(p.square().sum(), x)[0] for p in pairs]
    torch.testing.assert_close(*twice, rtol=1e-12, atol=1e-12)


def test_only_what_is_equal_is_replaced() -> None:
    kept = [
        nn.AvgPool2d(2, stride=1),
        nn.AvgPool2d(3, padding=1),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.AvgPool2d(2, divisor_override=3),
        nn.AvgPool2d((2, 3)),
        nn.MaxPool2d(2),
    ]
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.AvgPool2d(2)), nn.AvgPool2d((3, 3), 3), *kept)
    names = list(module.state_dict())
    assert with_product_pools(module) is module
    assert (module[1][0].window, module[2].window) == (2, 3)
    assert list(module[3:]) == kept
    assert list(module.state_dict()) == names
