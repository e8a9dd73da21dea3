"""Distillation as regression: a loss on targets held fixed, and a store of the pairs it is taught from.

One-step and few-step students regress what a frozen teacher reached; distribution matching wants a given gradient,
which is the same loss with the target x - g.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from gradmatch.core import checks
from gradmatch.core.store import load_tensors, save_tensors


def pseudo_target_loss(output: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """1/2 mean of weights * (output - sg(target))^2 over all elements; the target gets no gradient.

    Args:
        output, target: (n, ...).
        weights: one for each example (n,), held fixed too; default 1.

    >>> x = torch.ones(2, 3, requires_grad=True)
    >>> pseudo_target_loss(x, torch.zeros(2, 3), torch.tensor([1.0, 0.0])).backward()
    >>> (x.grad * 6).tolist()
    [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    """
    checks.require(
        output.shape == target.shape,
        f"output is of shape {tuple(output.shape)} and target of {tuple(target.shape)}; they must be equal.",
    )
    if weights is None:
        return 0.5 * F.mse_loss(output, target.detach())
    squares = (output - target.detach()).square()
    return 0.5 * (_of_each(weights, output) * squares).mean()


def gradient_loss(output: Tensor, gradient: Tensor, weights: Tensor | None = None) -> Tensor:
    """The loss whose gradient in ``output`` is ``g / numel``, by the target ``output - g``, g = weights * gradient."""
    g = gradient if weights is None else _of_each(weights, output) * gradient
    return pseudo_target_loss(output, output.detach() - g)


def _of_each(weights: Tensor, output: Tensor) -> Tensor:
    """Weights (n,), held fixed, as factors of ``output`` (n, ...)."""
    checks.require(
        weights.shape == output.shape[:1],
        f"weights is of shape {tuple(weights.shape)}; it must be ({len(output)},), one for each example.",
    )
    return weights.detach().reshape(-1, *[1] * (output.ndim - 1))


@dataclass(frozen=True)
class PairStore:
    """Named tensors with one row for each pair, such as where a teacher was and where it went.

    >>> store = PairStore({"x": torch.arange(10.0), "y": torch.arange(10.0) * 2})
    >>> rows = store.batch(4, torch.Generator().manual_seed(0))
    >>> bool((rows["y"] == 2 * rows["x"]).all())
    True
    """

    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        checks.require(bool(self.tensors), "tensors is empty; a store of pairs needs at least one.")
        lengths = {name: len(t) for name, t in self.tensors.items()}
        checks.require(
            len(set(lengths.values())) == 1 and min(lengths.values()) > 0,
            f"tensors have {lengths} rows; all must have equally many, at least one.",
        )
        for name, tensor in self.tensors.items():
            checks.finite(name, tensor)

    @classmethod
    def joined(cls, parts: Sequence[Mapping[str, Tensor]]) -> Self:
        """One store of several batches of rows."""
        checks.require(bool(parts), "parts is empty; at least one batch of pairs is needed.")
        return cls({k: torch.cat([p[k] for p in parts]) for k in parts[0]})

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        """The pairs at ``index``."""
        return {k: t[index] for k, t in self.tensors.items()}

    def batch(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """``size`` pairs drawn with replacement."""
        index = torch.randint(len(self), (size,), generator=generator, device=generator.device)
        return self.rows(index.to(next(iter(self.tensors.values())).device))

    def split(self, share: float, seed: int = 0) -> tuple[Self, Self]:
        """(the rest, a ``share`` of the pairs held out), at least one pair each."""
        checks.fraction("share", share, one=False)
        checks.require(len(self) > 1, "the store has one pair; holding some out needs at least two.")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        held = min(len(self) - 1, max(1, round(share * len(self))))
        return type(self)(self.rows(order[held:])), type(self)(self.rows(order[:held]))

    def save(self, path: str | Path) -> Path:
        """Write the store as one safetensors file."""
        return save_tensors(path, self.tensors)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote."""
        return cls(load_tensors(path)[0])
