"""Networks that take on what others have learned, or what several domains share.

``Guidance`` pulls a network's hidden layers towards those of another architecture while it trains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradmatch.core.lazy import lazily

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

__getattr__, __dir__ = lazily(__name__, _HOMES)
