"""Optimizers: each a ``torch.optim.Optimizer`` with schedulers, groups and bitwise state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradmatch.core.lazy import lazily

if TYPE_CHECKING:
    from gradmatch.optim._boost_head import boost_head
    from gradmatch.optim._parts import optimizer_state_bytes
    from gradmatch.optim._program import Program
    from gradmatch.optim._program_run import ProgramOptimizer
    from gradmatch.optim.adahessian import AdaHessian
    from gradmatch.optim.closure_trainer import ClosureTrainer
    from gradmatch.optim.dct_lowrank import LowRankAdamW
    from gradmatch.optim.diffgrad import DiffGrad
    from gradmatch.optim.gbnn import GBNNClassifier, GBNNRegressor
    from gradmatch.optim.gns import GradNormSmooth, minimize_gns
    from gradmatch.optim.lion import Lion
    from gradmatch.optim.program_search import ProgramSearch
    from gradmatch.optim.sso import TargetSurrogate
    from gradmatch.optim.tract import apply_tract, remove_tract

_HOMES = {
    "TargetSurrogate": "sso",
    "GradNormSmooth": "gns",
    "minimize_gns": "gns",
    "GBNNClassifier": "gbnn",
    "GBNNRegressor": "gbnn",
    "boost_head": "_boost_head",
    "SearchResult": "_program_result",
    "ProgramSearch": "program_search",
    "ProgramOptimizer": "_program_run",
    "Program": "_program",
    "DiffGrad": "diffgrad",
    "LowRankAdamW": "dct_lowrank",
    "remove_tract": "tract",
    "apply_tract": "tract",
    "Lion": "lion",
    "AdaHessian": "adahessian",
    "ClosureTrainer": "closure_trainer",
    "optimizer_state_bytes": "_parts",
}

__all__ = [
    "AdaHessian",
    "ClosureTrainer",
    "DiffGrad",
    "GBNNClassifier",
    "GBNNRegressor",
    "GradNormSmooth",
    "Lion",
    "LowRankAdamW",
    "Program",
    "ProgramOptimizer",
    "ProgramSearch",
    "SearchResult",
    "TargetSurrogate",
    "apply_tract",
    "boost_head",
    "minimize_gns",
    "optimizer_state_bytes",
    "remove_tract",
]

__getattr__, __dir__ = lazily(__name__, _HOMES)
