"""ZCA whitening, under which the trajectory-matching papers distil CIFAR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core.examples import Examples, as_examples


@dataclass(frozen=True)
class ZCA:
    """x -> (x - mean) W with W = U (S + eps)^(-1/2) U^T, for the covariance U S U^T of the data it was fitted to.

    Whiten training and test data with the same one, distil with ``standardise=False``, and bring images back to
    be looked at with ``inverse``.

    >>> x = torch.randn(50, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    >>> zca = ZCA.fit(x)
    >>> bool((zca.inverse(zca(x)) - x).abs().max() < 1e-5)
    True
    """

    mean: Float[Tensor, d]
    matrix: Float[Tensor, "d d"]
    inverse_matrix: Float[Tensor, "d d"]

    @classmethod
    def fit(cls, x: Float[Tensor, "n ..."], eps: float = 0.1) -> ZCA:
        """Learn the transform from training inputs; ``eps`` 0.1 is added to the eigenvalues as in the papers' code.

        The covariance has n - 1 in the denominator. Sums are taken in float64.

        Raises:
            InputError: fewer than two inputs, values that are not finite, eps not above 0.
        """
        checks.require(len(x) >= 2, f"x has {len(x)} inputs; a covariance needs at least 2.")
        eps = checks.positive("eps", eps)
        flat = checks.finite("x", x).flatten(1).double()
        mean = flat.mean(0)
        values, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean) / (len(x) - 1))
        root = (values.clamp_min(0) + eps).sqrt()
        return cls(
            mean.to(x.dtype),
            ((vectors / root) @ vectors.T).to(x.dtype),
            ((vectors * root) @ vectors.T).to(x.dtype),
        )

    def __call__(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        """Whitened inputs."""
        return ((self._flat(x) - self.mean) @ self.matrix).reshape(x.shape)

    def inverse(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        """Inputs as they were before whitening."""
        return (self._flat(x) @ self.inverse_matrix + self.mean).reshape(x.shape)

    def examples(self, dataset: Any) -> Examples:
        """Labelled data with whitened inputs."""
        found = as_examples(dataset)
        return Examples(self(found.x), found.y, found.classes)

    def _flat(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        checks.require(
            flat.shape[1] == len(self.mean),
            f"x has {flat.shape[1]} entries an input; the transform was fitted to {len(self.mean)}.",
        )
        return flat
