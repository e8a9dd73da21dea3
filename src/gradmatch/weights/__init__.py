"""What a model builder does with trained networks: merge, align, transplant, compress, search.

``merge`` averages models, plainly or by their ``fisher_diagonal``; ``search`` chooses the weights. ``transplant`` gives
a language model another's tokenizer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradmatch.weights.fisher_merge import fisher_diagonal, merge, search
    from gradmatch.weights.omp_tokens import TransplantReport, transplant, transplant_folder

_HOMES = {
    "fisher_diagonal": "fisher_merge",
    "merge": "fisher_merge",
    "search": "fisher_merge",
    "TransplantReport": "omp_tokens",
    "transplant": "omp_tokens",
    "transplant_folder": "omp_tokens",
}

__all__ = [
    "TransplantReport",
    "fisher_diagonal",
    "merge",
    "search",
    "transplant",
    "transplant_folder",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"gradmatch.weights.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'gradmatch.weights' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
