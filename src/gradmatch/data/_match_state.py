"""What trajectory matching works on and keeps between two iterations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.core._params import ParamSpace
from gradmatch.core.networks import has_batchnorm
from gradmatch.data._common import Job, State
from gradmatch.data._inner import caller
from gradmatch.data._trajectories import TrajectoryBuffer


@dataclass(frozen=True)
class MatchJob(Job):
    """A job with the experts and the student they were."""

    buffer: TrajectoryBuffer
    net: nn.Module
    space: ParamSpace


def match_job(job: Job) -> MatchJob:
    """The job of a matcher, which holds its experts."""
    assert isinstance(job, MatchJob)
    return job


def tensor_of(state: State, name: str) -> Tensor:
    """A tensor of the state."""
    found = state[name]
    assert isinstance(found, Tensor)
    return found


def generator_of(state: State) -> torch.Generator:
    """The state's generator."""
    found = state["generator"]
    assert isinstance(found, torch.Generator)
    return found


def require_scaling(buffer: TrajectoryBuffer, base: Job) -> None:
    """Experts that recorded how their data were standardised must have seen the data of this job."""
    theirs = [v for key in ("mean", "std") for v in buffer.meta.get(key) or ()]
    mine = [*(base.mean or ()), *(base.std or ())]
    same = len(theirs) == len(mine) and all(
        abs(a - b) <= 1e-3 * abs(b) + 1e-5 for a, b in zip(mine, theirs, strict=True)
    )
    checks.require(
        not theirs or same,
        f"the buffer's experts saw data standardised by mean and deviation {theirs}, here they are {mine or None}; "
        "both must be the same data under the same option standardise.",
    )


@torch.no_grad()
def teacher_labels(match: MatchJob, images: Tensor, target: Tensor) -> Tensor:
    """Probabilities (n, classes) that an expert with parameters ``target`` (P,) gives the plain images."""
    match.net.train(has_batchnorm(match.net))  # batch statistics where there are no running ones to use
    try:
        params = match.space.unflatten(target)
        logits = [caller(match.net)(params, part) for part in torch.split(images, 500)]
    finally:
        match.net.train()
    return torch.cat(logits).softmax(1)


def descend(state: State, name: str, grad: Tensor, lr: float, momentum: float) -> None:
    """One step of SGD with momentum on a tensor of the state, as ``torch.optim.SGD`` makes it."""
    velocity = tensor_of(state, f"{name}_velocity").mul_(momentum).add_(grad)
    tensor_of(state, name).sub_(velocity, alpha=lr)
