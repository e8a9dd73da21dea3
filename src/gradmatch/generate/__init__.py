"""Generation: flow matching and diffusion, few-step sampling, guidance and distillation."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradmatch.core.guidance import GradientGuide

_HOMES = {
    "GradientGuide": "gradmatch.core.guidance",
}

__all__ = [
    "GradientGuide",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'gradmatch.generate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
