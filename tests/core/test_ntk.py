"""The empirical tangent kernel against one backward pass for each output."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradmatch.core.checks import InputError
from gradmatch.core.ntk import empirical_ntk, kernel_distance


def test_kernel_equals_dot_products_of_separate_gradients() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(), nn.Linear(5, 3)
    ).double()
    module.train()
    x = torch.randn(6, 4, dtype=torch.float64)
    got = empirical_ntk(module, x)
    assert module.training
    assert all(m.training for m in module)
    module.eval()
    rows = []
    for i in range(6):
        for c in range(3):
            grads = torch.autograd.grad(module(x[i : i + 1])[0, c], list(module.parameters()))
            rows.append(torch.cat([g.flatten() for g in grads]))
    jacobian = torch.stack(rows)
    torch.testing.assert_close(got, jacobian @ jacobian.T, rtol=1e-10, atol=1e-12)


def test_distance_ignores_scale_and_refuses_zero() -> None:
    a = torch.randn(4, 4, dtype=torch.float64)
    assert kernel_distance(a, 3 * a) == pytest.approx(0, abs=1e-12)
    assert kernel_distance(a, -a) == pytest.approx(2)
    with pytest.raises(InputError, match="zero"):
        kernel_distance(a, 0 * a)
    with pytest.raises(InputError, match="alike"):
        kernel_distance(a, a[:2])
