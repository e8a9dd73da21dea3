"""Fixed orthonormal bases of R^d, one shared matrix for each size, and the cosine transform by FFT.

With C[i, j] = sqrt(2 / d) cos(pi i (2 j + 1) / (2 d)) and row 0 divided by sqrt 2, "dct2" has the columns of C^T
(cosines over the coordinate: x C^T is the DCT-II of the rows of x), "dct3" those of C.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from gradmatch.core.checks import one_of, require, whole

KINDS = ("dct2", "dct3", "random", "hadamard", "identity")


def check_basis(kind: str, size: int) -> None:
    """Refuse an unknown kind, or a Hadamard matrix of a size that is no power of 2."""
    one_of("basis", kind, KINDS)
    if kind == "hadamard":
        require(
            size & (size - 1) == 0,
            f'basis is "hadamard" for a side of {size}; it must be a power of 2, or use basis="dct2".',
        )


@lru_cache(maxsize=64)
def basis(
    kind: str,
    size: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Float[Tensor, "d d"]:
    """The basis vectors as columns; computed in float64, kept, and shared: do not change it.

    ``seed`` is of "random", the Q of a Gaussian matrix.

    >>> basis("hadamard", 2)
    tensor([[ 0.7071,  0.7071],
            [ 0.7071, -0.7071]])
    """
    check_basis(kind, whole("size", size))
    with torch.no_grad():
        return _made(kind, size, seed).to(dtype=dtype, device=device).contiguous()


def _made(kind: str, d: int, seed: int) -> Tensor:
    if kind == "identity":
        return torch.eye(d, dtype=torch.float64)
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    if kind == "hadamard":
        matrix = torch.ones(1, 1, dtype=torch.float64)
        step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
        while len(matrix) < d:
            matrix = torch.kron(step, matrix)
        return matrix
    i = torch.arange(d, dtype=torch.float64)
    cosines = math.sqrt(2 / d) * torch.cos(math.pi * i[:, None] * (2 * i + 1) / (2 * d))
    cosines[0] /= math.sqrt(2)
    return cosines.T if kind == "dct2" else cosines


@lru_cache(maxsize=64)
def _phase(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """exp(-i pi k / 2 d) sqrt(2 / d) for k = 0 .. d // 2, the first over sqrt 2."""
    k = torch.arange(d // 2 + 1, dtype=torch.float64)
    phase = torch.polar(torch.full_like(k, math.sqrt(2 / d)), -math.pi * k / (2 * d))
    phase[0] /= math.sqrt(2)
    return phase.to(dtype=dtype, device=device)


def dct2(x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """Orthonormal DCT-II along the last dimension, x @ basis("dct2", d), in d log d operations (Makhoul 1980).

    Even entries, then odd ones reversed, have a real FFT whose turned real and imaginary parts are the transform.

    Raises:
        InputError: half precision, for which there is no FFT here.

    >>> dct2(torch.ones(1, 4))
    tensor([[2., 0., 0., 0.]])
    """
    require(
        x.dtype in (torch.float32, torch.float64),
        f"x is {x.dtype}; an FFT needs float32 or float64: x.float().",
    )
    d = x.shape[-1]
    wide = torch.complex64 if x.dtype is torch.float32 else torch.complex128
    turned = torch.fft.rfft(torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], -1)) * _phase(d, wide, x.device)
    half = d // 2 + 1
    return torch.cat([turned.real, -turned.imag[..., 1 : d - half + 1].flip(-1)], -1)
