"""diffusers objects as models, paths and times: its networks are called, its noise levels are read, its steps are ours.

The schedulers that are taken, and why others are not, stand in :mod:`gradmatch.core._schedulers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.core._schedulers import noise_path, path_times, prediction_kind, reader, scheduled
from gradmatch.core.guidance import GradientGuide
from gradmatch.core.path import Prediction
from gradmatch.core.sampler import as_times

__all__ = [
    "Denoiser",
    "GuideCallback",
    "from_diffusers",
    "noise_path",
    "path_times",
    "prediction_kind",
    "scheduled",
    "to_scheduler",
]


class Denoiser:
    """A diffusers network as a model on a path.

    Called as ``(x, t, cond)`` with x in the path's own scale and t its time; ``cond`` is a mapping of further
    arguments of the network (``encoder_hidden_states``, ``class_labels``, ...).

    Attributes:
        module: the network.
        path: the scheduler's noise levels.
        kind: what the network predicts.
    """

    def __init__(self, module: nn.Module, scheduler: Any, timestep_scale: float = 1.0) -> None:
        self.module, self.scheduler = module, scheduler
        self.timestep_scale = checks.positive("timestep_scale", timestep_scale)
        self.path, self._read = noise_path(scheduler), reader(scheduler)
        self.kind = "x0" if self._read.outputs else prediction_kind(scheduler)

    def __call__(self, x: Tensor, t: Tensor, cond: Any = None) -> Prediction:
        checks.require(
            cond is None or isinstance(cond, Mapping),
            f"cond is a {type(cond).__name__}; a diffusers network needs a mapping of its arguments.",
        )
        timestep = self._read.timestep(t) * self.timestep_scale
        said = self.module(self._read.inputs(x, t), timestep=timestep, **(cond or {}), return_dict=False)
        out = said[0]
        if self._read.outputs is not None:
            out = self._read.outputs(x, t, out)
        return Prediction(self.kind, out)

    def times(self, steps: int) -> Tensor:
        """The scheduler's own times for so many steps, (steps + 1,) from noise to data."""
        return scheduled(self.scheduler, steps)

    def start(self, noise: Tensor) -> Tensor:
        """``noise`` at the scheduler's first level, as its pipelines start."""
        return noise * float(getattr(self.scheduler, "init_noise_sigma", 1.0))


def from_diffusers(model: nn.Module, scheduler: Any, timestep_scale: float = 1.0) -> Denoiser:
    """A ``UNet2DModel``, ``UNet2DConditionModel`` or transformer with the noise levels of ``scheduler``.

    Args:
        model: called as ``model(x, timestep=..., **cond, return_dict=False)``.
        scheduler: its ``prediction_type`` and noise levels are read; it is not stepped.
        timestep_scale: where a pipeline changes the scheduler's timestep before its network is called (Flux: 1e-3).

    Raises:
        InputError: a scheduler whose step has no inverse, in one sentence.

    >>> from diffusers import DDIMScheduler, UNet2DModel
    >>> unet = UNet2DModel(8, 1, 1, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
    ...     down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False)
    >>> model = from_diffusers(unet, DDIMScheduler(clip_sample=False))
    >>> model(torch.zeros(2, 1, 8, 8), torch.full((2,), 500.0)).kind
    'noise'
    """
    checks.require(
        callable(model) and not isinstance(model, type), f"model is {model!r}; it must be a network."
    )
    return Denoiser(model, scheduler, timestep_scale)


def to_scheduler(times: Any, scheduler: Any = None) -> Any:
    """A scheduler that pipelines can run, set to ``times`` of the straight path (1 is noise, 0 data).

    Rising times, from noise at 0 to data at 1, are turned round. A pipeline takes them as
    ``pipe(..., sigmas=times[:-1])`` too; the scheduler itself adds the final 0.

    Args:
        times: (steps + 1,), from one end to the other.
        scheduler: a ``FlowMatchEulerDiscreteScheduler`` with ``shift=1`` and no dynamic shifting; default a new one.

    Raises:
        InputError: times that do not span [0, 1], or a scheduler that would bend them.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    found = as_times(times)
    found = 1 - found if float(found[0]) < float(found[-1]) else found
    checks.require(
        abs(float(found[0]) - 1) < 1e-6 and abs(float(found[-1])) < 1e-6,
        f"times runs from {float(found[0]):g} to {float(found[-1]):g}; it must span the path from 1 to 0.",
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0) if scheduler is None else scheduler
    checks.require(
        isinstance(scheduler, FlowMatchEulerDiscreteScheduler),
        f"scheduler is a {type(scheduler).__name__}; times of the straight path go into a "
        "FlowMatchEulerDiscreteScheduler.",
    )
    config = scheduler.config
    bends = [k for k in ("use_dynamic_shifting", "shift_terminal", "use_karras_sigmas") if config.get(k)]
    bends += [k for k in ("use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas") if config.get(k)]
    bends += ["shift"] if scheduler.shift != 1 else []
    checks.require(
        not bends, f"scheduler has {' and '.join(bends)} set, which bends the times; build it without."
    )
    scheduler.set_timesteps(sigmas=found[:-1].tolist())
    return scheduler


class GuideCallback:
    """A :class:`GradientGuide` as ``callback_on_step_end`` of a diffusers pipeline.

    A deterministic step is x' = A x + B x0, so the x0 that the pipeline used (after its own guidance) follows from
    the latents before and after it, and x' moves by B times the guide's shift.

    Args:
        guide: with ``through="x0"`` (the network is out of reach here).
        latents: what is given to the pipeline as ``latents``; the callback serves one run.

    >>> # pipe(..., latents=latents, callback_on_step_end=GuideCallback(guide, latents))
    """

    def __init__(self, guide: GradientGuide, latents: Tensor) -> None:
        checks.require(
            guide.through == "x0",
            "guide has through='network'; at the end of a pipeline's step only 'x0' is within reach.",
        )
        self.guide, self.latents = guide, latents

    def __call__(self, pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == 0:
            self._path, self._times = noise_path(pipe.scheduler), path_times(pipe.scheduler).tolist()
            first = float(getattr(pipe.scheduler, "init_noise_sigma", 1.0))
            self._before = self.latents.to(kwargs["latents"]).to(_fine(kwargs["latents"])) * first
        t, t_next = self._times[index], self._times[index + 1]
        path = self._path
        given, before = kwargs["latents"], self._before
        after = given.to(before.dtype)  # x0 is a small difference of latents: not in half precision
        said = path.aim("x0", before, after, t, t_next)
        moved = self.guide.wrap(lambda *_: said, path)(before, t)
        if moved is not said:
            given = path.step(before, moved, t, t_next).to(given.dtype)
        self._before = given.to(before.dtype)
        return {"latents": given}


def _fine(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
