"""Small things that optimizers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradmatch.core import checks
from gradmatch.core.foreach import Tensors

State = dict[str, Any]
"""What an optimizer keeps of one parameter: tensors, and counters as whole numbers."""
Numbers = dict[str, Any]
"""A rule's numbers by name: floats, or in a compiled rule tensors of one float64 (a float would be compiled in)."""


def wide_dtype(t: Tensor) -> torch.dtype:
    """The type to keep state and do arithmetic in: float32 for half precision, else the tensor's own."""
    return torch.float32 if t.dtype in (torch.float16, torch.bfloat16) else t.dtype


def refuse_sparse(name: str) -> None:
    """Say what to do instead of giving sparse gradients to optimizer ``name``."""
    checks.refuse(
        f"{name}.step found a sparse gradient; make the layer with sparse=False, or give its parameters to "
        "torch.optim.SparseAdam."
    )


def scale_(x: Tensors, factor: float | Tensor) -> Tensors:
    """``x`` times ``factor`` in place, without touching memory for a plain 1."""
    return x if isinstance(factor, float) and factor == 1.0 else x.mul_(factor)


def optimizer_state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state.

    >>> p = torch.nn.Parameter(torch.zeros(10))
    >>> optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    >>> p.sum().backward(); _ = optimizer.step()
    >>> optimizer_state_bytes(optimizer)
    40
    """
    states = [s for s in optimizer.state.values() if isinstance(s, dict)]
    return sum(t.numel() * t.element_size() for s in states for t in s.values() if isinstance(t, Tensor))


def check_betas(betas: Any, count: int = 2) -> None:
    """Refuse moment rates outside [0, 1)."""
    checks.require(
        isinstance(betas, tuple | list) and len(betas) == count,
        f"betas is {betas!r}; it must be {count} numbers in [0, 1).",
    )
    for i, beta in enumerate(betas):
        checks.fraction(f"betas[{i}]", beta, zero=True, one=False)
