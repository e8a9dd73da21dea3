"""What the systems of this family share: what counts as a model, and times that span a path."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.core.bridge import Denoiser
from gradmatch.core.path import AffinePath, LinearPath, Prediction, VariancePreserving
from gradmatch.core.sampler import Model, as_times
from gradmatch.core.tap import evaluating


def as_model(
    velocity: Any, path: AffinePath | None, kind: str = "velocity"
) -> tuple[Model, AffinePath, bool]:
    """A model, its path, and whether the path was named (a bare velocity's time may run either way)."""
    if isinstance(velocity, Denoiser):
        return velocity, velocity.path, True
    checks.require(callable(velocity), f"velocity is a {type(velocity).__name__}; it must be callable.")

    def model(x: Tensor, t: Tensor, cond: Any = None) -> Prediction:
        said = velocity(x, t) if cond is None else velocity(x, t, cond)
        return said if isinstance(said, Prediction) else Prediction(kind, said)

    return model, path or LinearPath(), path is not None


@contextmanager
def in_eval(velocity: Any) -> Iterator[None]:
    """Within the block a network does nothing random; its parts' modes come back after it."""
    module = velocity.module if isinstance(velocity, Denoiser) else velocity
    with evaluating(module) if isinstance(module, nn.Module) else nullcontext():
        yield


def fine_grid(velocity: Any, path: AffinePath, given: bool, k_max: int, grid: Any) -> Tensor:
    """``grid`` if it spans the path, else ``k_max`` equal steps along it (a bare velocity runs from 0 to 1)."""
    if grid is not None:
        times = as_times(grid)
        spanning(path, given, times, "grid")
        return times
    if isinstance(velocity, Denoiser):
        return velocity.times(k_max)
    if isinstance(path, LinearPath):
        ends = (1.0, 0.0) if given else (0.0, 1.0)
    elif isinstance(path, VariancePreserving):
        ends = (float(len(path.angles) - 2), -1.0)
    else:
        checks.refuse(f"grid is None; a {type(path).__name__} has no times of its own, so name them.")
    return torch.linspace(*ends, k_max + 1, dtype=torch.float64)


def spanning(path: AffinePath, given: bool, times: Tensor, name: str, noise_first: bool = False) -> None:
    first, last = float(times[0]), float(times[-1])
    noise, data = path.ends
    ways = [(noise, data)]
    if not given or not noise_first:
        ways.append((data, noise))
    fits = any(
        all(want is None or abs(got - want) < 1e-9 for got, want in zip((first, last), way, strict=True))
        for way in ways
    )
    checks.require(
        fits,
        f"{name} runs from {first:g} to {last:g}; it must span the path, whose ends are "
        f"{'any noise level' if noise is None else f'{noise:g}'} and {'0' if data is None else f'{data:g}'}.",
    )
