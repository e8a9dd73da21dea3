"""Solvers: linear systems by learned directions, and low-rank matrices from a few of their entries.

``DirectionSolver`` makes the directions that a network proposes conjugate; ``MatrixCompletion`` fills in a matrix.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradmatch.solve._direction_training import (
        DirectionTraining,
        direction_loss,
        ritz_dataset,
        train_direction_net,
    )
    from gradmatch.solve.dcdm import DirectionInfo, DirectionNet, DirectionSolver
    from gradmatch.solve.matrix_completion import MatrixCompletion, Sweep

_HOMES = {
    "DirectionInfo": "dcdm",
    "DirectionNet": "dcdm",
    "DirectionSolver": "dcdm",
    "DirectionTraining": "_direction_training",
    "direction_loss": "_direction_training",
    "ritz_dataset": "_direction_training",
    "train_direction_net": "_direction_training",
    "MatrixCompletion": "matrix_completion",
    "Sweep": "matrix_completion",
}

__all__ = [
    "DirectionInfo",
    "DirectionNet",
    "DirectionSolver",
    "DirectionTraining",
    "MatrixCompletion",
    "Sweep",
    "direction_loss",
    "ritz_dataset",
    "train_direction_net",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"gradmatch.solve.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'gradmatch.solve' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
