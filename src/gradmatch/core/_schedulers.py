"""The noise levels of diffusers' schedulers as paths whose exact step is the scheduler's own step.

A scheduler is taken only if its step is one deterministic map of (x, prediction), which the path can undo; each class
of diffusers is either in ``_READERS`` or refused with the reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core.path import EDM, AffinePath, LinearPath, VariancePreserving
from gradmatch.core.sampler import as_times

_KINDS = {
    "epsilon": "noise",
    "sample": "x0",
    "original_sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "velocity",
}
_REASONS = {
    "draws noise at every step, which has no inverse": """
        DDPM DDPMParallel DDPMWuerstchen EulerAncestralDiscrete KDPM2AncestralDiscrete LCM TCD UnCLIP RePaint ScoreSdeVe
        ScoreSdeVp KarrasVe CMStochasticIterative ConsistencyDecoder DPMSolverSDE CosineDPMSolverMultistep CogVideoXDPM
        FlowMatchLCM LTXEulerAncestralRF SCM SASolver RFD4Proteina""",
    "steps by what it remembers of earlier steps, so that one step has no inverse": """
        DEISMultistep DPMSolverMultistep DPMSolverMultistepInverse EDMDPMSolverMultistep IPNDM LMSDiscrete PNDM
        UniPCMultistep Helios""",
    "calls the network several times a step, so that one prediction does not undo it": """
        DPMSolverSinglestep FlowMatchHeunDiscrete HeunDiscrete KDPM2Discrete""",
    "works on tokens, which have no noise level to convert": """
        Amused BlockRefinement DiscreteDDIM EntropyBound VQDiffusion""",
    "runs towards noise, where the path of the scheduler it inverts has the inverse step": "DDIMInverse",
}
_UNKNOWN = "is not known to step by one deterministic map of latent and prediction"


def noise_path(scheduler: Any) -> AffinePath:
    """The path whose exact step is the scheduler's step.

    Raises:
        InputError: the step draws noise, remembers earlier steps, calls the network more than once or clips.
    """
    return reader(scheduler).path


def prediction_kind(scheduler: Any) -> str:
    """What a network of this scheduler predicts, in the library's names."""
    if name_of(scheduler) == "FlowMatchEulerDiscrete":
        return "velocity"
    said = scheduler.config.get("prediction_type", "epsilon")
    checks.one_of("prediction_type", said, _KINDS)
    return _KINDS[said]


def path_times(scheduler: Any) -> Tensor:
    """The path's times (steps + 1,) of the steps that were set with ``set_timesteps``.

    Raises:
        InputError: no steps are set, or DDIM's fixed stride misses the timesteps it lists.
    """
    checks.require(
        getattr(scheduler, "num_inference_steps", None) is not None,
        "scheduler has no steps yet; call its set_timesteps first.",
    )
    return as_times(reader(scheduler).times())


def scheduled(scheduler: Any, steps: int, **options: Any) -> Tensor:
    """The path's times (steps + 1,) after ``set_timesteps``; ``options`` are its others (``mu``).

    Raises:
        InputError: a scheduler that shifts its times by the size of the image, and no ``mu``.
    """
    checks.require(
        not scheduler.config.get("use_dynamic_shifting") or "mu" in options,
        "scheduler shifts its times by the image's size (use_dynamic_shifting=True); name the times themselves, or "
        "build it with use_dynamic_shifting=False and the shift.",
    )
    scheduler.set_timesteps(checks.whole("steps", steps), **options)
    return path_times(scheduler)


class Reader:
    """How one class of schedulers is read: its path, times, and what its networks are given."""

    path: AffinePath
    outputs: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.config = scheduler, scheduler.config

    def times(self) -> Any:
        """The times of the steps that are set."""
        return self.scheduler.sigmas

    def inputs(self, x: Tensor, t: Tensor) -> Tensor:
        """What the network is given for x (n, ...) at times (n,)."""
        return x

    def timestep(self, t: Tensor) -> Tensor:
        """The network's time for path times (n,)."""
        return t


class _Ddim(Reader):
    """alphas_cumprod by whole timesteps; the clean end is t = -1."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        clips = [k for k in ("clip_sample", "thresholding") if self.config.get(k)]
        name = type(scheduler).__name__
        checks.require(
            not clips,
            f"scheduler clips x0 ({clips[0] if clips else ''}=True), so its step cannot be undone; use "
            f"{name}.from_config(scheduler.config, {clips[0] if clips else ''}=False).",
        )
        self.path = VariancePreserving(scheduler.alphas_cumprod, float(scheduler.final_alpha_cumprod))

    def times(self) -> Any:
        steps, config = self.scheduler.timesteps.tolist(), self.config
        stride = config.num_train_timesteps // self.scheduler.num_inference_steps
        checks.require(
            all(a - stride == b for a, b in itertools.pairwise(steps)),
            f"scheduler lists timesteps {checks.listing(steps, 3)} but its step always goes down by {stride}; take a "
            f"number of steps that divides {config.num_train_timesteps}, or timestep_spacing='leading'.",
        )
        return [*steps, max(-1, steps[-1] - stride)]


class _Euler(Reader):
    """Sigmas of a table of timesteps; networks see x / sqrt(sigma^2 + 1)."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        checks.require(
            self.config.get("interpolation_type", "linear") == "linear",
            "scheduler has interpolation_type='log_linear', whose timesteps do not follow from its sigmas; "
            "use 'linear'.",
        )
        self.path = EDM()
        bars = scheduler.alphas_cumprod.double()
        self.sigmas = ((1 - bars) / bars).sqrt().numpy()

    def inputs(self, x: Tensor, t: Tensor) -> Tensor:
        return x / wide((t.square() + 1).sqrt(), x)

    def timestep(self, t: Tensor) -> Tensor:
        config = self.config
        if config.timestep_type == "continuous" and config.prediction_type == "v_prediction":
            return 0.25 * t.log()
        bent = any(config.get(f"use_{k}_sigmas") for k in ("karras", "exponential", "beta"))
        scale = np.log if bent else np.asarray
        at = scale(np.maximum(t.detach().cpu().double().numpy(), 1e-10))
        return torch.from_numpy(np.interp(at, scale(self.sigmas), np.arange(len(self.sigmas)))).to(t)


class _EdmEuler(Reader):
    """The preconditioned network of Karras et al. (arXiv 2206.00364), read as a prediction of x0."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        self.path, self.outputs = EDM(), self._outputs

    def inputs(self, x: Tensor, t: Tensor) -> Tensor:
        return self.scheduler.precondition_inputs(x, wide(t, x))

    def timestep(self, t: Tensor) -> Tensor:
        return self.scheduler.precondition_noise(t)

    def _outputs(self, x: Tensor, t: Tensor, out: Tensor) -> Tensor:
        return self.scheduler.precondition_outputs(x, out, wide(t, x))


class _Flow(Reader):
    """The straight path; the timestep is 1000 t."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        checks.require(
            not self.config.get("stochastic_sampling"),
            "scheduler has stochastic_sampling=True and draws noise at every step, which "
            "has no inverse; build it without.",
        )
        checks.require(
            not self.config.get("invert_sigmas"),
            "scheduler has invert_sigmas=True and runs from data at 1 to noise at 0; build it without.",
        )
        self.path = LinearPath()

    def timestep(self, t: Tensor) -> Tensor:
        return t * self.config.num_train_timesteps


_READERS: dict[str, type[Reader]] = {
    "DDIM": _Ddim,
    "DDIMParallel": _Ddim,
    "CogVideoXDDIM": _Ddim,
    "EulerDiscrete": _Euler,
    "EDMEuler": _EdmEuler,
    "FlowMatchEulerDiscrete": _Flow,
}


def reader(scheduler: Any) -> Reader:
    """How this scheduler is read, or the sentence that refuses it."""
    name = name_of(scheduler)
    if name in _READERS:
        return _READERS[name](scheduler)
    use = f"use one of {', '.join(f'{k}Scheduler' for k in _READERS)}"
    if hasattr(scheduler, "alphas_cumprod"):
        use = "use DDIMScheduler.from_config(scheduler.config, clip_sample=False), which has the same noise levels"
    why = next((reason for reason, names in _REASONS.items() if name in names.split()), _UNKNOWN)
    return checks.refuse(f"scheduler is a {type(scheduler).__name__}, which {why}; {use}.")


def name_of(scheduler: Any) -> str:
    """The scheduler's class without its last word."""
    return type(scheduler).__name__.removesuffix("Scheduler")


def wide(t: Tensor, like: Tensor) -> Tensor:
    """Times (n,) as a factor of ``like`` (n, ...)."""
    return t.to(like).reshape(-1, *[1] * (like.ndim - 1))
