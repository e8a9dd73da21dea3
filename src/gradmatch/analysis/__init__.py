"""Reading a trained model: its curvature, the coherence of its gradients, what kind of solution it is.

``spectrum`` and ``decompose`` show the eigenvalues of the loss, ``segment`` the loss between two networks.
``match_units`` and ``sparse_predict`` compare what networks have learned, unit by unit. ``train_score`` estimates the
score of a diffusion by regression, and stops before it memorises.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gradmatch.core.lazy import lazily

if TYPE_CHECKING:
    from gradmatch.analysis._coherence import Coherence
    from gradmatch.analysis._coherence_tracker import CoherenceTracker
    from gradmatch.analysis._powerprop import PowerPropagated, reparametrize
    from gradmatch.analysis._robust_gradient import RobustGradient
    from gradmatch.analysis._shampoo import Shampoo
    from gradmatch.analysis._solution import describe_solution
    from gradmatch.analysis._solution_report import SolutionReport
    from gradmatch.analysis._streams import Stream, class_stream, permuted_stream
    from gradmatch.analysis.coherence import (
        coherence,
        coherence_from_microbatches,
        cross_coherence,
        example_scores,
        microbatch_coherence,
        relative_gap_bound,
    )
    from gradmatch.analysis.convergent_learning import (
        Activations,
        SparsePrediction,
        UnitMatch,
        cocluster,
        collect,
        match_units,
        rotated,
        sparse_predict,
        unit_report,
    )
    from gradmatch.analysis.hessian_spectrum import Decomposition, Spectrum, decompose, segment, spectrum
    from gradmatch.analysis.optimizer_bias import compare_optimizers
    from gradmatch.analysis.score_estimation import (
        DenoisingRegression,
        EmpiricalKernel,
        ErrorSplit,
        KernelPath,
        ReLUKernel,
        ScoreFit,
        TweedieScore,
        TwoLayerReLU,
        error_split,
        stopping_time,
        train_score,
    )

_HOMES = {
    "PowerPropagated": "_powerprop",
    "reparametrize": "_powerprop",
    "Shampoo": "_shampoo",
    "describe_solution": "_solution",
    "SolutionReport": "_solution_report",
    "Stream": "_streams",
    "class_stream": "_streams",
    "permuted_stream": "_streams",
    "compare_optimizers": "optimizer_bias",
    "Coherence": "_coherence",
    "CoherenceTracker": "_coherence_tracker",
    "RobustGradient": "_robust_gradient",
    "coherence": "coherence",
    "coherence_from_microbatches": "coherence",
    "cross_coherence": "coherence",
    "example_scores": "coherence",
    "microbatch_coherence": "coherence",
    "relative_gap_bound": "coherence",
    "Activations": "convergent_learning",
    "SparsePrediction": "convergent_learning",
    "UnitMatch": "convergent_learning",
    "cocluster": "convergent_learning",
    "collect": "convergent_learning",
    "match_units": "convergent_learning",
    "rotated": "convergent_learning",
    "sparse_predict": "convergent_learning",
    "unit_report": "convergent_learning",
    "Decomposition": "hessian_spectrum",
    "Spectrum": "hessian_spectrum",
    "decompose": "hessian_spectrum",
    "segment": "hessian_spectrum",
    "spectrum": "hessian_spectrum",
    "DenoisingRegression": "score_estimation",
    "EmpiricalKernel": "score_estimation",
    "ErrorSplit": "score_estimation",
    "KernelPath": "score_estimation",
    "ReLUKernel": "score_estimation",
    "ScoreFit": "score_estimation",
    "TweedieScore": "score_estimation",
    "TwoLayerReLU": "score_estimation",
    "error_split": "score_estimation",
    "stopping_time": "score_estimation",
    "train_score": "score_estimation",
}

__all__ = [
    "Activations",
    "Coherence",
    "CoherenceTracker",
    "Decomposition",
    "DenoisingRegression",
    "EmpiricalKernel",
    "ErrorSplit",
    "KernelPath",
    "PowerPropagated",
    "ReLUKernel",
    "RobustGradient",
    "ScoreFit",
    "Shampoo",
    "SolutionReport",
    "SparsePrediction",
    "Spectrum",
    "Stream",
    "TweedieScore",
    "TwoLayerReLU",
    "UnitMatch",
    "class_stream",
    "cocluster",
    "coherence",
    "coherence_from_microbatches",
    "collect",
    "compare_optimizers",
    "cross_coherence",
    "decompose",
    "describe_solution",
    "error_split",
    "example_scores",
    "match_units",
    "microbatch_coherence",
    "permuted_stream",
    "relative_gap_bound",
    "reparametrize",
    "rotated",
    "segment",
    "sparse_predict",
    "spectrum",
    "stopping_time",
    "train_score",
    "unit_report",
]


class _Package(ModuleType):
    """A package in which ``coherence`` is the function, and not the module of that name that Python would put there."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

__getattr__, __dir__ = lazily(__name__, _HOMES)
