"""Features for search: losses over similarities, heads, and models whose features stay comparable.

``StationaryHead`` pins every class to a fixed direction (``DSimplex``), ``CompatibleTrainer`` updates a model so that
its features search a gallery of an older one's, ``compatibility_matrix`` says whether they do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradmatch.core.lazy import lazily

if TYPE_CHECKING:
    from gradmatch.embed._compatibility import average_accuracy, average_compatibility, compatibility_matrix
    from gradmatch.embed._compatible import CompatibleTrainer, Update
    from gradmatch.embed.stationary import CompatibleModel, DSimplex, StationaryHead, hoc_loss

_HOMES = {
    "average_accuracy": "_compatibility",
    "average_compatibility": "_compatibility",
    "compatibility_matrix": "_compatibility",
    "CompatibleTrainer": "_compatible",
    "Update": "_compatible",
    "CompatibleModel": "stationary",
    "DSimplex": "stationary",
    "StationaryHead": "stationary",
    "hoc_loss": "stationary",
}

__all__ = [
    "CompatibleModel",
    "CompatibleTrainer",
    "DSimplex",
    "StationaryHead",
    "Update",
    "average_accuracy",
    "average_compatibility",
    "compatibility_matrix",
    "hoc_loss",
]

__getattr__, __dir__ = lazily(__name__, _HOMES)
