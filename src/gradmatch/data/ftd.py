"""FTD: flat trajectory distillation (Du et al., CVPR 2023, arXiv 2211.11004).

In distillation every segment of matching starts on the expert; in use a student starts each where the last one
ended, so that its errors pile up. FTD trains the experts with a flatness-seeking optimiser, GSAM, so that a piled-up
error costs less, then matches their trajectories as MTT does and averages the pixels over the iterations.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from gradmatch.core import checks
from gradmatch.data._flatness import (
    AccumulatedError,
    accumulated_error,
    loss_rise,
    matching_error,
    top_eigenvalue,
)
from gradmatch.data._gsam import GSAM, GSAMUpdate
from gradmatch.data._matching import TrajectoryMatcher
from gradmatch.data._trajectories import TrajectoryBuffer, train_experts

__all__ = [
    "FTD",
    "GSAM",
    "PRESETS",
    "AccumulatedError",
    "GSAMUpdate",
    "TrajectoryBuffer",
    "accumulated_error",
    "loss_rise",
    "matching_error",
    "top_eigenvalue",
    "train_experts",
]

_COLUMNS = (
    *("per_class", "syn_steps", "expert_epochs", "max_start_epoch", "batch_syn", "lr_img", "lr_lr", "lr_syn"),
    *("alpha", "ema_decay"),
)
_ROWS: dict[str, tuple[Any, ...]] = {
    "cifar10-1": (1, 50, 2, 2, None, 100.0, 1e-7, 0.01, 0.3, 0.9999),
    "cifar10-10": (10, 30, 2, 20, None, 100.0, 1e-5, 0.001, 0.3, 0.9995),
    "cifar10-50": (50, 30, 2, 40, None, 1000.0, 1e-5, 0.01, 1.0, 0.999),
    "cifar100-1": (1, 40, 3, 20, None, 1000.0, 1e-5, 0.01, 1.0, 0.9995),
    "cifar100-10": (10, 20, 2, 40, None, 1000.0, 1e-5, 0.01, 1.0, 0.9995),
    "cifar100-50": (50, 80, 2, 40, 1000, 1000.0, 1e-5, 0.01, 1.0, 0.999),
    "tiny-1": (1, 30, 2, 10, None, 10000.0, 1e-4, 0.01, 1.0, 0.999),
    "tiny-10": (10, 20, 2, 40, 500, 10000.0, 1e-4, 0.01, 1.0, 0.999),
}


def _preset(row: tuple[Any, ...]) -> dict[str, Any]:
    options = dict(zip(_COLUMNS, row, strict=True))
    experts = {"optimizer": "gsam", "rho": 0.01, "alpha": options.pop("alpha"), "adaptive": True}
    experts |= {"n_experts": 100, "epochs": 50, "lr": 0.01, "batch_size": 256}
    strategy = "color_crop_cutout_flip_scale_rotate"
    return options | {"steps": 5000, "augment": strategy, "experts": experts}


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType({k: _preset(r) for k, r in _ROWS.items()})
"""The paper's settings (its table 7, and its scripts for the experts) by data set and images per class.

Data are ZCA-whitened there (:class:`gradmatch.data._zca.ZCA`) and the network is ConvNet-3 (4 on Tiny ImageNet).
Evidence runs use settings of their own.
"""


class FTD(TrajectoryMatcher):
    """Trajectory matching on flat experts, with averaged images.

    All options are those of :class:`gradmatch.data._matching.TrajectoryMatcher`; the defaults are the paper's for
    CIFAR-10 at 10 images per class, with ``ema_decay`` 0.999. With far fewer than 5000 iterations take a smaller
    decay (0.99 for 300), or the average still is the initial images.

    >>> FTD.preset("cifar10-1", steps=100).syn_steps
    50
    """

    expert_defaults: Mapping[str, Any] = MappingProxyType({"optimizer": "gsam"})

    def __init__(self, *, ema_decay: float = 0.999, **options: Any) -> None:
        super().__init__(ema_decay=ema_decay, **options)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> FTD:
        """The paper's settings for one of :data:`PRESETS`, with changes."""
        checks.one_of("name", name, tuple(PRESETS))
        return cls(**{**PRESETS[name], **changes})
