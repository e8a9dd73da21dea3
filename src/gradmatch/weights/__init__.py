"""What a model builder does with trained networks: merge, align, transplant, compress, search.

``merge`` averages models, plainly or by their ``fisher_diagonal``; ``search`` chooses the weights. ``weight_match``
permutes a network's units so that it averages well with another. ``transplant`` gives a language model another's
tokenizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradmatch.core.lazy import lazily

if TYPE_CHECKING:
    from gradmatch.core.assign import Permutation, PermutationSpec
    from gradmatch.weights._compressed import CompressedModel
    from gradmatch.weights._merge_analysis import MergeAnalysis, analyze_merge, barrier, energy_share
    from gradmatch.weights._statistics import repair, reset_statistics
    from gradmatch.weights._ste import ste_match
    from gradmatch.weights.fisher_merge import fisher_diagonal, merge, search
    from gradmatch.weights.gm_nas import (
        CellSpace,
        FewShotNAS,
        GMSplitter,
        NASBench201Space,
        SearchResult,
        SearchSpace,
    )
    from gradmatch.weights.jlcm import Compression, LayerReport, compress
    from gradmatch.weights.omp_tokens import TransplantReport, transplant, transplant_folder
    from gradmatch.weights.weight_matching import activation_match, weight_match

_HOMES = {
    "SearchSpace": "gm_nas",
    "SearchResult": "gm_nas",
    "NASBench201Space": "gm_nas",
    "GMSplitter": "gm_nas",
    "FewShotNAS": "gm_nas",
    "CellSpace": "gm_nas",
    "CompressedModel": "_compressed",
    "LayerReport": "jlcm",
    "Compression": "jlcm",
    "compress": "jlcm",
    "Permutation": "gradmatch.core.assign",
    "PermutationSpec": "gradmatch.core.assign",
    "MergeAnalysis": "_merge_analysis",
    "analyze_merge": "_merge_analysis",
    "barrier": "_merge_analysis",
    "energy_share": "_merge_analysis",
    "repair": "_statistics",
    "reset_statistics": "_statistics",
    "ste_match": "_ste",
    "activation_match": "weight_matching",
    "weight_match": "weight_matching",
    "fisher_diagonal": "fisher_merge",
    "merge": "fisher_merge",
    "search": "fisher_merge",
    "TransplantReport": "omp_tokens",
    "transplant": "omp_tokens",
    "transplant_folder": "omp_tokens",
}

__all__ = [
    "CellSpace",
    "CompressedModel",
    "Compression",
    "FewShotNAS",
    "GMSplitter",
    "LayerReport",
    "MergeAnalysis",
    "NASBench201Space",
    "Permutation",
    "PermutationSpec",
    "SearchResult",
    "SearchSpace",
    "TransplantReport",
    "activation_match",
    "analyze_merge",
    "barrier",
    "compress",
    "energy_share",
    "fisher_diagonal",
    "merge",
    "repair",
    "reset_statistics",
    "search",
    "ste_match",
    "transplant",
    "transplant_folder",
    "weight_match",
]

__getattr__, __dir__ = lazily(__name__, _HOMES)
