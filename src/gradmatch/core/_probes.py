"""Random vectors that estimators look at an operator through, and estimates with their standard error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gradmatch.core._operators import LinearOperator
from gradmatch.core.checks import finite, one_of, whole

__all__ = ["Estimate", "ProbeKind", "probe_vectors"]

ProbeKind = Literal["rademacher", "gaussian", "sphere"]
KINDS: tuple[ProbeKind, ...] = ("rademacher", "gaussian", "sphere")


@dataclass(frozen=True)
class Estimate:
    """A mean of independent samples with its standard error (infinite for a single one)."""

    value: float
    error: float
    samples: Float[Tensor, " n"]

    @classmethod
    def of(cls, samples: Tensor, shift: float = 0.0) -> Estimate:
        """The estimate from samples [n], all moved by a known ``shift``."""
        values = finite("samples of the estimate", samples.detach().double().cpu() + shift)
        n = len(values)
        error = float(values.std() / math.sqrt(n)) if n > 1 else math.inf
        return cls(float(values.mean()), error, values)

    def __str__(self) -> str:
        return f"{self.value:.6g} +- {self.error:.2g}"


def probe_vectors(
    operator: LinearOperator, count: int, generator: torch.Generator, kind: ProbeKind = "rademacher"
) -> Float[Tensor, "P n"]:
    """Independent random columns for an operator: signs, standard normal, or uniform on the unit sphere.

    The first two have E[z z^T] = I, the last I / P. They are drawn in float32 where the generator lives, so that the
    same seed gives the same vectors for every type of operator.
    """
    one_of("kind", kind, KINDS)
    shape = (operator.shape[1], whole("count", count))
    if kind == "rademacher":
        bits = torch.randint(0, 2, shape, generator=generator, device=generator.device, dtype=torch.int8)
        return bits.to(dtype=operator.dtype, device=operator.device) * 2 - 1
    normal = torch.randn(shape, generator=generator, device=generator.device)
    normal = normal.to(dtype=operator.dtype, device=operator.device)
    return normal if kind == "gaussian" else normal / normal.norm(dim=0)
