"""Batched L-BFGS against closed forms and scipy, function by function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from gradmatch.core.checks import InputError
from gradmatch.core.minimise import minimise_each


def quadratics(b: int, d: int, condition: float) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(b, d, d, generator=g, dtype=torch.float64)).Q
    values = torch.logspace(0, np.log10(condition), d, dtype=torch.float64)
    return basis @ (values[:, None] * basis.mT), torch.randn(b, d, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_quadratics_of_their_own_end_where_linear_algebra_says(condition: float) -> None:
    H, target = quadratics(5, 12, condition)

    def functions(x: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gap = x - target[k]
        image = (H[k] @ gap[:, :, None])[:, :, 0]
        return (gap * image).sum(1) / 2, image

    found = minimise_each(functions, torch.zeros(5, 12, dtype=torch.float64), tol=1e-9)
    assert bool(found.converged.all())
    assert float((found.x - target).abs().max()) < 1e-8
    assert float(found.slope.max()) <= 1e-9


def log_sums(b: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(b, 8, 6, generator=g, dtype=torch.float64), torch.randn(
        b, 6, generator=g
    ).double() / 10


def value_and_gradient(
    A: torch.Tensor, c: torch.Tensor, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """log sum exp(A x) + 0.01 |x|^2 - c x."""
    z = (A @ x[:, :, None])[:, :, 0]
    p = z.softmax(1)
    value = z.logsumexp(1) + 0.01 * x.square().sum(1) - (c * x).sum(1)
    return value, (A.mT @ p[:, :, None])[:, :, 0] + 0.02 * x - c


def test_equals_scipy_one_by_one_from_far_away() -> None:
    A, c = log_sums(6)
    start = 30 * torch.ones(6, 6, dtype=torch.float64)
    found = minimise_each(lambda x, k: value_and_gradient(A[k], c[k], x), start, tol=1e-9)
    assert bool(found.converged.all())
    for k in range(6):

        def alone(x: np.ndarray, k: int = k) -> tuple[float, np.ndarray]:
            value, g = value_and_gradient(A[k : k + 1], c[k : k + 1], torch.from_numpy(x)[None])
            return float(value), g[0].numpy()

        peer = minimize(alone, start[k].numpy(), jac=True, method="BFGS", options={"gtol": 1e-9})
        assert np.allclose(found.x[k].numpy(), peer.x, atol=1e-6)


def test_each_ends_on_its_own_and_only_the_others_are_called() -> None:
    A, c = log_sums(4)
    alone = minimise_each(
        lambda x, k: value_and_gradient(A[k], c[k], x), torch.zeros(4, 6, dtype=torch.float64)
    )
    start = torch.zeros(4, 6, dtype=torch.float64)
    start[1] = alone.x[1]
    sizes = []

    def counted(x: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(len(k))
        return value_and_gradient(A[k], c[k], x)

    found = minimise_each(counted, start)
    assert int(found.steps[1]) == 0
    assert torch.allclose(found.x, alone.x, atol=1e-6)
    assert sizes[0] == 4
    assert max(sizes[1:]) == 3
    assert found.calls == len(sizes)


def test_rough_functions_lead_most_of_the_way() -> None:
    A, c = log_sums(4)
    start = 3 * torch.ones(4, 6, dtype=torch.float64)
    calls = {"rough": 0, "exact": 0}

    def called(name: str, x: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls[name] += 1
        dtype = torch.float32 if name == "rough" else torch.float64
        return value_and_gradient(A[k].to(dtype), c[k].to(dtype), x.to(dtype))

    plain = minimise_each(lambda x, k: called("exact", x, k), start, tol=1e-9)
    alone = calls.pop("exact")
    calls["exact"] = 0
    found = minimise_each(
        lambda x, k: called("exact", x, k), start, tol=1e-9, first=1.0,
        rough=lambda x, k: called("rough", x, k), rough_tol=1e-4,
    )  # fmt: skip
    assert bool(found.converged.all())
    assert torch.allclose(found.x, plain.x, atol=1e-7)
    assert calls["exact"] < alone / 2
    assert calls["rough"] > calls["exact"]
    assert found.calls == calls["rough"] + calls["exact"]


def test_a_rough_function_that_leads_nowhere_is_left() -> None:
    A, c = log_sums(3)
    start = torch.zeros(3, 6, dtype=torch.float64)
    found = minimise_each(
        lambda x, k: value_and_gradient(A[k], c[k], x), start, rough=lambda x, k: (0 * x.sum(1), 1 + 0 * x)
    )
    assert bool(found.converged.all())


def test_goes_on_where_values_are_lost_in_rounding() -> None:
    scale = torch.tensor([[1.0, 7.0]], dtype=torch.float64)

    def raised(x: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 1e6 + (scale * (x - 1) ** 2).sum(1) / 2, scale * (x - 1)

    found = minimise_each(raised, torch.zeros(1, 2, dtype=torch.float64), tol=1e-10)
    assert bool(found.converged)  # differences of values end at 1e-10, that is slopes of 1e-5


def test_a_function_without_a_minimum_is_said_not_to_have_converged() -> None:
    def functions(x: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        bowl = (k == 0)[:, None].double()
        return (bowl * x.square() / 2 + (1 - bowl) * x).sum(1), bowl * x + (1 - bowl)

    found = minimise_each(functions, torch.ones(2, 1, dtype=torch.float64), max_iter=50)
    assert found.converged.tolist() == [True, False]
    assert bool(found.x.isfinite().all())


def test_infinite_values_beyond_a_wall_are_stepped_back_from() -> None:
    def barrier(x: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (x - x.log()).sum(1), 1 - 1 / x  # NaN for x < 0

    found = minimise_each(barrier, torch.tensor([[1e-3], [50.0]], dtype=torch.float64))
    assert torch.allclose(found.x, torch.ones(2, 1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tol": 0.0}, "tol is 0.0"),
        ({"max_iter": 0}, "max_iter is 0"),
        ({"memory": 0}, "memory is 0"),
        ({"first": 0.0}, "first is 0.0"),
    ],
)
def test_refuses(options: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        minimise_each(lambda x, k: (x.sum(1), x), torch.ones(1, 1), **options)


def test_refuses_what_is_not_finite() -> None:
    with pytest.raises(InputError, match="start has 1 NaN"):
        minimise_each(lambda x, k: (x.sum(1), x), torch.full((1, 1), torch.nan))
    with pytest.raises(InputError, match="a function at its start"):
        minimise_each(lambda x, k: (x.sum(1) / 0, x), torch.ones(1, 1))
