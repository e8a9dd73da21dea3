"""Token and relation losses against loops, their invariances, gradients, memory-saving forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradmatch.core.checks import InputError
from gradmatch.core.relational import relation_mismatch, token_cosine, unit


def pair(tokens: int = 6, d: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, tokens, d, generator=g, dtype=dtype) for _ in range(2))  # type: ignore


def loop(a: Tensor, b: Tensor) -> Tensor:
    def cos(x: Tensor, y: Tensor) -> float:
        return float(x @ y / x.norm() / y.norm())

    n = a.shape[1]
    return torch.tensor(
        [
            sum((cos(x[i], x[j]) - cos(y[i], y[j])) ** 2 for i in range(n) for j in range(n)) / n**2
            for x, y in zip(a, b, strict=True)
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("tokens", [5, 30])  # few: matrices of tokens; many: of widths
def test_the_mismatch_is_a_double_loop(tokens: int) -> None:
    a, b = pair(tokens)
    assert torch.allclose(relation_mismatch(a, b), loop(a, b), rtol=1e-10)
    wide = torch.cat([b, b[..., :1]], 2)
    assert torch.allclose(relation_mismatch(a, wide), loop(a, wide), rtol=1e-10)


@pytest.mark.parametrize("tokens", [5, 30])
def test_gradients(tokens: int) -> None:
    a, b = (x[:1].requires_grad_() for x in pair(tokens, 2))
    assert torch.autograd.gradcheck(relation_mismatch, (a, b))
    assert torch.autograd.gradcheck(token_cosine, (a, b))


def test_invariances() -> None:
    a, b = pair()
    turn = torch.linalg.qr(
        torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ).Q
    scale = torch.rand(3, 6, 1, dtype=torch.float64) + 0.1
    assert torch.allclose(relation_mismatch(a, b @ turn * scale), relation_mismatch(a, b))
    assert torch.allclose(token_cosine(a, b * scale), token_cosine(a, b))
    assert not torch.allclose(token_cosine(a, b @ turn), token_cosine(a, b), atol=1e-2)
    assert torch.allclose(token_cosine(a, a), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(relation_mismatch(a, a), torch.zeros(3, dtype=torch.float64), atol=1e-15)


@pytest.mark.parametrize("tokens", [5, 30])
def test_chunks_equal_the_whole_with_gradients(tokens: int) -> None:
    a, b = pair(tokens)
    grads = []
    for chunk in (None, 1, 2):
        x = b.clone().requires_grad_()
        value = relation_mismatch(a, x, chunk=chunk)
        grads.append((value.detach(), *torch.autograd.grad(value.sum(), x)))
    for other in grads[1:]:
        assert all(torch.allclose(u, v) for u, v in zip(grads[0], other, strict=True))


def test_half_precision_is_compared_in_single_and_zeros_are_no_nan() -> None:
    a, b = pair(dtype=torch.float32)
    half = token_cosine(a.bfloat16(), b.bfloat16())
    assert half.dtype == torch.float32
    assert torch.allclose(half, token_cosine(a, b), atol=2e-2)
    zero = torch.zeros(1, 2, 3, requires_grad=True)
    value = token_cosine(zero, torch.ones(1, 2, 3)).sum() + relation_mismatch(zero, torch.ones(1, 2, 3)).sum()
    value.backward()
    assert bool(value.isfinite())
    assert bool(zero.grad.isfinite().all())
    assert float(unit(torch.full((1, 3), 1e-9)).norm()) < 1


def test_other_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="examples, tokens, width"):
        token_cosine(torch.zeros(2, 3, 4), torch.zeros(2, 4, 4))
    with pytest.raises(InputError, match="examples, tokens, width"):
        relation_mismatch(torch.zeros(2, 3), torch.zeros(2, 3))
