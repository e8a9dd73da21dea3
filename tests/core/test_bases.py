"""Orthonormal bases and the cosine transform."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.fft
import torch

from gradmatch.core.bases import KINDS, basis, dct2
from gradmatch.core.checks import InputError

SIZES = (1, 2, 3, 8, 15, 64, 101)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_bases_are_orthonormal(kind: str, size: int) -> None:
    if kind == "hadamard" and size & (size - 1):
        with pytest.raises(InputError, match=f'basis is "hadamard" for a side of {size}'):
            basis(kind, size)
        return
    q = basis(kind, size, torch.float64)
    torch.testing.assert_close(q @ q.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_the_transform_by_fft_is_the_product_and_scipys(size: int) -> None:
    x = torch.randn(5, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    expected = torch.from_numpy(np.asarray(scipy.fft.dct(x.numpy(), type=2, norm="ortho")))
    for found in (dct2(x), x @ basis("dct2", size, torch.float64)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    third = torch.from_numpy(np.asarray(scipy.fft.dct(x.numpy(), type=3, norm="ortho")))
    torch.testing.assert_close(x @ basis("dct3", size, torch.float64), third, rtol=0, atol=1e-10)
    torch.testing.assert_close(dct2(x.float()).double(), expected, rtol=0, atol=1e-5)


def test_a_basis_is_made_once_for_each_size_and_type() -> None:
    assert basis("dct2", 12) is basis("dct2", 12)
    assert basis("dct2", 12) is not basis("dct2", 12, torch.float64)
    assert not torch.equal(basis("random", 12, seed=0), basis("random", 12, seed=1))


def test_what_it_refuses() -> None:
    with pytest.raises(InputError, match=r"x is torch.float16; an FFT needs float32 or float64"):
        dct2(torch.ones(2, 4, dtype=torch.float16))
    with pytest.raises(InputError, match="basis is 'wavelet'; it must be one of"):
        basis("wavelet", 4)
