"""Optimizers: each a ``torch.optim.Optimizer`` with schedulers, groups and bitwise state."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradmatch.optim._boost_head import boost_head
    from gradmatch.optim._parts import optimizer_state_bytes
    from gradmatch.optim._program import Program
    from gradmatch.optim._program_run import ProgramOptimizer
    from gradmatch.optim.closure_trainer import ClosureTrainer
    from gradmatch.optim.diffgrad import DiffGrad
    from gradmatch.optim.gbnn import GBNNClassifier, GBNNRegressor
    from gradmatch.optim.lion import Lion
    from gradmatch.optim.program_search import ProgramSearch
    from gradmatch.optim.tract import apply_tract, remove_tract

_HOMES = {
    "GBNNClassifier": "gbnn",
    "GBNNRegressor": "gbnn",
    "boost_head": "_boost_head",
    "SearchResult": "_program_result",
    "ProgramSearch": "program_search",
    "ProgramOptimizer": "_program_run",
    "Program": "_program",
    "DiffGrad": "diffgrad",
    "remove_tract": "tract",
    "apply_tract": "tract",
    "Lion": "lion",
    "ClosureTrainer": "closure_trainer",
    "optimizer_state_bytes": "_parts",
}

__all__ = [
    "ClosureTrainer",
    "DiffGrad",
    "GBNNClassifier",
    "GBNNRegressor",
    "Lion",
    "Program",
    "ProgramOptimizer",
    "ProgramSearch",
    "SearchResult",
    "apply_tract",
    "boost_head",
    "optimizer_state_bytes",
    "remove_tract",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"gradmatch.optim.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'gradmatch.optim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
