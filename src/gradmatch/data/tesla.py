"""TESLA: trajectory matching in constant memory, with soft labels (Cui et al., ICML 2023, arXiv 2211.10586).

MTT keeps the graph of all N inner steps. As theta_N = theta_0 - lr sum_i g_i, the gradient of
L = |theta_N - theta*|^2 / D splits into one term a step, and each needs only that step's graph. The published
estimator (``unroll="tesla"``) also takes every theta_i for a constant, which is exact at N = 1 only; the adjoint
recursion (``unroll="exact"``, the default) is exact at the same memory. With many classes, hard labels fail to follow
the experts; ``soft_labels="teacher"`` assigns the target expert's probabilities anew in every iteration.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gradmatch.core import checks
from gradmatch.core.networks import Network
from gradmatch.data._common import SyntheticDataset
from gradmatch.data._inner import TrajectoryGradient, trajectory_grad
from gradmatch.data._matching import TrajectoryMatcher
from gradmatch.data._trajectories import TrajectoryBuffer, train_experts

__all__ = [
    "PRESETS",
    "TESLA",
    "TrajectoryBuffer",
    "TrajectoryGradient",
    "lr_img_from_official",
    "match_trajectories",
    "train_experts",
    "trajectory_grad",
]


def lr_img_from_official(value: float) -> float:
    """Our ``lr_img`` for the same pixel step as the released code's.

    That code writes ``2 * torch.autograd.grad(...)``, which repeats the tuple instead of doubling the gradient, so its
    pixel gradient is half of the formula's and of ours.
    """
    return checks.nonnegative("value", value) / 2


_COLUMNS = (
    *("n_experts", "per_class", "syn_steps", "expert_epochs", "max_start_epoch", "batch_syn"),
    *("lr_img", "lr_lr", "soft_labels"),
)
_ROWS: dict[str, tuple[Any, ...]] = {
    "cifar10-1": (100, 1, 50, 2, 5, None, lr_img_from_official(1000), 1e-7, False),
    "cifar100-50": (100, 50, 80, 2, 40, 125, lr_img_from_official(1000), 1e-5, False),
    "imagenet1k-1": (50, 1, 10, 3, 10, 100, lr_img_from_official(10000), 1e-4, "teacher"),
}


def _preset(row: tuple[Any, ...]) -> dict[str, Any]:
    options = dict(zip(_COLUMNS, row, strict=True))
    experts = {"optimizer": "sgd", "epochs": 50, "lr": 0.01, "batch_size": 256}
    experts |= {"n_experts": options.pop("n_experts")}
    options |= {"steps": 10000, "unroll": "tesla", "augment": "color_crop_cutout_flip_scale_rotate"}
    return options | {"lr_syn": 0.01, "experts": experts}


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType({k: _preset(r) for k, r in _ROWS.items()})
"""The commands of the released code, with ``lr_img`` converted to ours; CIFAR is ZCA-whitened there."""


class TESLA(TrajectoryMatcher):
    """Trajectory matching with memory that does not grow with the inner steps, and soft labels.

    All options are those of :class:`gradmatch.data._matching.TrajectoryMatcher`. ``soft_labels`` is off by default:
    with few classes nothing anchors an image to its class, and labels assigned anew collapse at the pixel rates from
    which hard labels gain. "teacher-init" assigns them once and cannot collapse so.

    >>> TESLA.preset("imagenet1k-1", steps=10).lr_img
    5000.0
    """

    expert_defaults: Mapping[str, Any] = MappingProxyType({"optimizer": "sgd"})

    @classmethod
    def preset(cls, name: str, **changes: Any) -> TESLA:
        """The settings of one of the released commands, :data:`PRESETS`, with changes."""
        checks.one_of("name", name, tuple(PRESETS))
        return cls(**{**PRESETS[name], **changes})


def match_trajectories(
    buffer: TrajectoryBuffer | str | Path,
    dataset: Any,
    network: Network,
    ipc: int = 10,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Any = None,
    **options: Any,
) -> SyntheticDataset:
    """Learn ``ipc`` images a class whose training follows the experts' trajectories.

    Args:
        buffer: experts of :func:`gradmatch.data.train_experts`, or the folder they were written to.
        dataset: the data they were trained on.
        network: their architecture.
        options: those of :class:`TrajectoryMatcher` (``steps``, ``syn_steps``, ``unroll``, ``soft_labels``,
            ``ema_decay`` and so on).
        out, resume, progress: as for ``TrajectoryMatcher.distill``.
    """
    matcher = TrajectoryMatcher(per_class=ipc, **options)
    return matcher.distill(dataset, network, buffer=buffer, out=out, resume=resume, progress=progress)
