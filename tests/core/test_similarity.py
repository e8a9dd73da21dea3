"""CKA and RSA against their definitions with dense centring matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gradmatch.core import _similarity
from gradmatch.core.checks import InputError
from gradmatch.core.distance import cka_matrix, linear_cka, rsa


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(x: Tensor, y: Tensor) -> float:
    n = len(x)
    h = torch.eye(n).double() - 1 / n

    def hsic(a: Tensor, b: Tensor) -> float:
        return float(torch.trace(a @ a.T @ h @ b @ b.T @ h))

    return hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))


def debiased(x: Tensor, y: Tensor) -> float:
    n = len(x)

    def hsic(a: Tensor, b: Tensor) -> float:
        k, l_ = (g @ g.T for g in (a, b))
        k, l_ = (g - torch.diag(g.diagonal()) for g in (k, l_))
        one = torch.ones(n).double()
        total = torch.trace(k @ l_) + one @ k @ one * (one @ l_ @ one) / ((n - 1) * (n - 2))
        return float(total - 2 / (n - 2) * (one @ k @ l_ @ one)) / (n * (n - 3))

    return hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))


SHAPES = [(12, 3, 4), (12, 40, 5), (12, 30, 50), (80, 90, 100), (101, 130, 7)]


@pytest.mark.parametrize(("n", "p", "q"), SHAPES)
def test_both_forms_equal_the_definition(n: int, p: int, q: int) -> None:
    x, y = randn(n, p) + 3, randn(n, q, seed=1)
    y[:, :2] += x[:, :2]
    for is_debiased, wanted in ((False, dense(x, y)), (True, debiased(x, y))):
        k, l_ = (_similarity._relation(z, is_debiased) for z in (x, y))
        by_gram = (k * l_).sum() / (k.norm() * l_.norm())
        by_features = (_similarity._debiased_by_features if is_debiased else _similarity._biased_by_features)(
            x, y
        )
        for got in (by_gram, by_features, linear_cka(x, y, debiased=is_debiased)):
            assert float(got) == pytest.approx(wanted, abs=1e-9)
        pairs = cka_matrix([x, y], [y, x], debiased=is_debiased)
        assert float(pairs[0, 0]) == pytest.approx(wanted, abs=1e-9)
        assert torch.allclose(cka_matrix([x, y], debiased=is_debiased).diagonal(), torch.ones(2).double())


@pytest.mark.parametrize("is_debiased", [False, True])
def test_what_it_does_not_see(is_debiased: bool) -> None:
    x, y = randn(30, 8), randn(30, 6, seed=1)
    base = float(linear_cka(x, y, debiased=is_debiased))
    q = torch.linalg.qr(randn(8, 8, seed=2))[0]
    for same in (x @ q, 5 * x, x + 7, x.reshape(30, 2, 4)):
        assert float(linear_cka(same, y, debiased=is_debiased)) == pytest.approx(base, abs=1e-9)
    assert float(linear_cka(y, x, debiased=is_debiased)) == pytest.approx(base)
    stretched = x * torch.linspace(0.1, 5, 8)
    assert abs(float(linear_cka(stretched, y, debiased=is_debiased)) - base) > 1e-3
    assert float(linear_cka(x, x, debiased=is_debiased)) == pytest.approx(1)
    assert is_debiased or 0 <= base <= 1


def test_wide_noise_saturates_the_biased_form_only() -> None:
    values = torch.tensor(
        [
            [
                float(linear_cka(randn(64, 512, seed=2 * k), randn(64, 512, seed=2 * k + 1), debiased=d))
                for d in (0, 1)
            ]
            for k in range(40)
        ]
    )
    assert float(values[:, 0].mean()) > 0.85
    assert abs(float(values[:, 1].mean())) < 0.02
    assert float(values[:, 1].min()) < 0


@pytest.mark.parametrize("is_debiased", [False, True])
@pytest.mark.parametrize("width", [3, 200])
def test_constant_features_give_zero_and_finite_gradients(is_debiased: bool, width: int) -> None:
    y = randn(20, 5)
    for constant in (torch.zeros(20, width), torch.full((20, width), 0.1), torch.full((20, width), 1e3)):
        x = constant.clone().requires_grad_()
        value = linear_cka(x, y.float(), debiased=is_debiased)
        assert float(value.detach()) == 0
        value.backward()
        assert bool(torch.isfinite(x.grad).all())  # type: ignore[arg-type]
        assert float(linear_cka(x.detach(), x.detach(), debiased=is_debiased)) == 0


def test_the_slope_vanishes_where_features_agree() -> None:
    y = randn(25, 6)
    x = (2 * y @ torch.linalg.qr(randn(6, 6, seed=1))[0]).requires_grad_()
    (1 - linear_cka(x, y)).backward()
    assert float(x.grad.abs().max()) < 1e-9  # type: ignore[union-attr]
    for kind in (lambda a: linear_cka(a, y), lambda a: linear_cka(a, y, debiased=True), lambda a: rsa(a, y)):
        assert torch.autograd.gradcheck(kind, randn(25, 4, seed=3).requires_grad_())


def test_large_means_do_not_cancel_in_single_precision() -> None:
    x, y = randn(40, 100), randn(40, 100, seed=1)
    wanted = linear_cka(x, y)
    assert float(linear_cka(x.float() + 100, y.float() - 50)) == pytest.approx(float(wanted), abs=1e-4)
    assert linear_cka(x.half(), y.half()).dtype == torch.float32
    assert float(linear_cka(x.float(), y)) == pytest.approx(float(wanted), abs=1e-5)


def test_rsa_is_the_correlation_of_similarities() -> None:
    x, y = randn(15, 4), randn(15, 7, seed=1)
    i, j = torch.triu_indices(15, 15, 1)
    cosines = [torch.nn.functional.cosine_similarity(z[i], z[j]) for z in (x, y)]
    assert float(rsa(x, y)) == pytest.approx(float(torch.corrcoef(torch.stack(cosines))[0, 1]))
    assert float(rsa(x, 3 * x @ torch.linalg.qr(randn(4, 4))[0])) == pytest.approx(1)
    assert float(rsa(torch.ones(5, 3), randn(5, 3).float())) == pytest.approx(0, abs=1e-4)


def test_refusals() -> None:
    x = randn(5, 3)
    for call, message in (
        (lambda: linear_cka(x, randn(6, 3)), "x has 5 examples and y has 6"),
        (lambda: linear_cka(x[:1], x[:1]), "at least 2 are needed"),
        (lambda: linear_cka(x[:3], x[:3], debiased=True), "at least 4 are needed"),
        (lambda: linear_cka(x.long(), x), "must be a floating tensor"),
        (lambda: linear_cka(x, x * torch.nan), "y has 15 NaN"),
        (lambda: linear_cka(1e25 * x.float(), x.float()), "x and y are so large"),
        (lambda: cka_matrix([x, x * torch.inf]), r"xs\[1\] has 15 NaN or infinite"),
        (lambda: rsa(x, x / 0), "y has 15 NaN"),
        (lambda: cka_matrix([]), "xs is empty"),
        (lambda: cka_matrix([x, randn(6, 3)]), "xs is of"),
        (lambda: cka_matrix([x], [randn(6, 3)]), "different numbers of examples"),
        (lambda: rsa(x[:2], x[:2]), "at least 3"),
        (lambda: rsa(x, randn(6, 3)), "x has 5 examples and y has 6"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_features_wider_than_the_cache_are_centred_piece_by_piece():
    g = torch.Generator().manual_seed(3)
    x = torch.randn(300, 4000, generator=g) + 5 * torch.randn(4000, generator=g)
    y = torch.randn(300, 3000, generator=g) + x[:, :3000]
    a, b = ((v.double() - v.double().mean(0)) for v in (x, y))
    k, l_ = a @ a.T, b @ b.T
    exact = float((k * l_).sum() / (k.norm() * l_.norm()))
    assert abs(float(linear_cka(x, y)) - exact) < 1e-5
    assert abs(float(linear_cka(x.double(), y.double())) - exact) < 1e-12
