"""Training data: distil it into a few learned images, or select from it.

``AutoDistill``, ``DCC``, ``FTD``, ``TESLA`` learn a :class:`SyntheticDataset`; ``DQ`` selects a subset.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradmatch.core.lazy import lazily

if TYPE_CHECKING:
    from gradmatch.data._common import Distiller, Evaluation, SyntheticDataset, evaluate, random_subset
    from gradmatch.data._selection import Selection, random_selection
    from gradmatch.data.auto_distill import AutoDistill
    from gradmatch.data.dcc import DCC
    from gradmatch.data.dq import DQ, PatchQuantizer, quantize
    from gradmatch.data.ftd import FTD, GSAM, train_experts
    from gradmatch.data.tesla import TESLA, match_trajectories

_HOMES = {
    "Distiller": "_common",
    "Evaluation": "_common",
    "SyntheticDataset": "_common",
    "evaluate": "_common",
    "random_subset": "_common",
    "Selection": "_selection",
    "random_selection": "_selection",
    "AutoDistill": "auto_distill",
    "DCC": "dcc",
    "DQ": "dq",
    "PatchQuantizer": "dq",
    "quantize": "dq",
    "FTD": "ftd",
    "GSAM": "ftd",
    "train_experts": "ftd",
    "TESLA": "tesla",
    "match_trajectories": "tesla",
}

__all__ = [
    "DCC",
    "DQ",
    "FTD",
    "GSAM",
    "TESLA",
    "AutoDistill",
    "Distiller",
    "Evaluation",
    "PatchQuantizer",
    "Selection",
    "SyntheticDataset",
    "evaluate",
    "match_trajectories",
    "quantize",
    "random_selection",
    "random_subset",
    "train_experts",
]

__getattr__, __dir__ = lazily(__name__, _HOMES)
