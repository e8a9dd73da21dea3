"""Optimizers: each a ``torch.optim.Optimizer`` with schedulers, groups and bitwise state."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradmatch.optim._parts import optimizer_state_bytes
    from gradmatch.optim.closure_trainer import ClosureTrainer

_HOMES = {
    "ClosureTrainer": "closure_trainer",
    "optimizer_state_bytes": "_parts",
}

__all__ = [
    "ClosureTrainer",
    "optimizer_state_bytes",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"gradmatch.optim.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'gradmatch.optim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
