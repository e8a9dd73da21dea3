"""Generation: flow matching and diffusion, few-step sampling, guidance and distillation."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradmatch.core.guidance import GradientGuide
    from gradmatch.generate.boss import Straightened, bellman_steps, straighten
    from gradmatch.generate.difiisr import ResShift
    from gradmatch.generate.f_distill import FDistill
    from gradmatch.generate.gumbel_flow import GumbelSimplexFlow
    from gradmatch.generate.lfm import Inpainting, Labels, LatentFlow, Layout
    from gradmatch.generate.u_repa import FeatureAlignment, PatchTokens
    from gradmatch.generate.w2sd import W2SDCallback, w2sd_sample

_HOMES = {
    "ResShift": "gradmatch.generate.difiisr",
    "PatchTokens": "gradmatch.generate.u_repa",
    "FeatureAlignment": "gradmatch.generate.u_repa",
    "W2SDCallback": "gradmatch.generate.w2sd",
    "w2sd_sample": "gradmatch.generate.w2sd",
    "FDistill": "gradmatch.generate.f_distill",
    "GumbelSimplexFlow": "gradmatch.generate.gumbel_flow",
    "GradientGuide": "gradmatch.core.guidance",
    "Straightened": "gradmatch.generate.boss",
    "bellman_steps": "gradmatch.generate.boss",
    "straighten": "gradmatch.generate.boss",
    "Inpainting": "gradmatch.generate.lfm",
    "Labels": "gradmatch.generate.lfm",
    "LatentFlow": "gradmatch.generate.lfm",
    "Layout": "gradmatch.generate.lfm",
}

__all__ = [
    "FDistill",
    "FeatureAlignment",
    "GradientGuide",
    "GumbelSimplexFlow",
    "Inpainting",
    "Labels",
    "LatentFlow",
    "Layout",
    "PatchTokens",
    "ResShift",
    "Straightened",
    "W2SDCallback",
    "bellman_steps",
    "straighten",
    "w2sd_sample",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'gradmatch.generate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
