"""Solvers: linear systems by learned directions, low-rank matrices from a few entries, images by a learned prior.

``DirectionSolver`` makes the directions that a network proposes conjugate; ``MatrixCompletion`` fills in a matrix;
``LearnedProx`` is a denoiser that is a proximal operator, trained by ``ProximalMatching`` and used by ``pnp``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradmatch.core.lazy import lazily

if TYPE_CHECKING:
    from gradmatch.solve._direction_training import (
        DirectionTraining,
        direction_loss,
        ritz_dataset,
        train_direction_net,
    )
    from gradmatch.solve._pnp import Reconstruction, pnp
    from gradmatch.solve._proximal_matching import ProximalMatching, Stage, proximal_matching_loss
    from gradmatch.solve.dcdm import DirectionInfo, DirectionNet, DirectionSolver
    from gradmatch.solve.lpn import ConvexNet, LearnedProx, Patches, Prior
    from gradmatch.solve.matrix_completion import MatrixCompletion, Sweep

_HOMES = {
    "DirectionInfo": "dcdm",
    "DirectionNet": "dcdm",
    "DirectionSolver": "dcdm",
    "DirectionTraining": "_direction_training",
    "direction_loss": "_direction_training",
    "ritz_dataset": "_direction_training",
    "train_direction_net": "_direction_training",
    "ConvexNet": "lpn",
    "LearnedProx": "lpn",
    "Patches": "lpn",
    "Prior": "lpn",
    "ProximalMatching": "_proximal_matching",
    "Stage": "_proximal_matching",
    "proximal_matching_loss": "_proximal_matching",
    "Reconstruction": "_pnp",
    "pnp": "_pnp",
    "MatrixCompletion": "matrix_completion",
    "Sweep": "matrix_completion",
}

__all__ = [
    "ConvexNet",
    "DirectionInfo",
    "DirectionNet",
    "DirectionSolver",
    "DirectionTraining",
    "LearnedProx",
    "MatrixCompletion",
    "Patches",
    "Prior",
    "ProximalMatching",
    "Reconstruction",
    "Stage",
    "Sweep",
    "direction_loss",
    "pnp",
    "proximal_matching_loss",
    "ritz_dataset",
    "train_direction_net",
]

__getattr__, __dir__ = lazily(__name__, _HOMES)
