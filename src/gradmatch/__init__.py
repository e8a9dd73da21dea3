"""gradmatch: systems that align one thing with another by following gradients.

Families load when used: ``gradmatch.data``, ``gradmatch.optim``, ``gradmatch.weights``, ...

>>> import gradmatch
>>> gradmatch.__version__
'0.1.0'
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_FAMILIES = ("adapt", "analysis", "data", "embed", "generate", "optim", "solve", "weights")
_PARTS = (*_FAMILIES, "zoo", "datasets", "evidence", "catalog", "board", "core")

__all__ = ["__version__"]


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return importlib.import_module(f"gradmatch.{name}")
    raise AttributeError(f"module 'gradmatch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PARTS])
