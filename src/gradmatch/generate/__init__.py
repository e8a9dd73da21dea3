"""Generation: flow matching and diffusion, few-step sampling, guidance and distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradmatch.core.lazy import lazily

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
    "ResShift": "difiisr",
    "PatchTokens": "u_repa",
    "FeatureAlignment": "u_repa",
    "W2SDCallback": "w2sd",
    "w2sd_sample": "w2sd",
    "FDistill": "f_distill",
    "GumbelSimplexFlow": "gumbel_flow",
    "GradientGuide": "gradmatch.core.guidance",
    "Straightened": "boss",
    "bellman_steps": "boss",
    "straighten": "boss",
    "Inpainting": "lfm",
    "Labels": "lfm",
    "LatentFlow": "lfm",
    "Layout": "lfm",
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

__getattr__, __dir__ = lazily(__name__, _HOMES)
