"""Networks that take on what others have learned, or what several domains share.

``Guidance`` pulls a network's hidden layers towards those of another architecture while it trains.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradmatch.adapt.guidance import Guidance, calibrate_batch_norm, noise_input, uniform_map

_HOMES = {
    "Guidance": "guidance",
    "calibrate_batch_norm": "guidance",
    "noise_input": "guidance",
    "uniform_map": "guidance",
}

__all__ = [
    "Guidance",
    "calibrate_batch_norm",
    "noise_input",
    "uniform_map",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"gradmatch.adapt.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'gradmatch.adapt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
