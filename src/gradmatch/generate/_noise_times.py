"""What training a generator of one call needs around it: times of noising, copies of a network, batches."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.core.bridge import Denoiser
from gradmatch.core.path import EDM, AffinePath, LinearPath, ResidualPath, VariancePreserving
from gradmatch.core.training import seed_of
from gradmatch.generate._batches import forever

Times = Callable[[int, torch.Generator], Tensor]
_RHO = 7
_EDM_ENDS = (0.002, 80.0)


class NoiseTimes:
    """Where a path ends in noise, and at which times samples are noised.

    Args:
        path: between data and noise.
        kind: "uniform" within the ends, "polynomial" (EDM's, rho = 7), or (n, generator) -> t (n,).
        ends: (low, high); default 0.001 to 0.999 of the path, 0.002 to 80 for EDM's.
    """

    def __init__(self, path: AffinePath, kind: str | Times, ends: tuple[float, float] | None) -> None:
        checks.require(
            not isinstance(path, ResidualPath),
            "schedule is a ResidualPath; a one-step student needs pure noise at its end.",
        )
        self.kind = kind if callable(kind) else checks.one_of("times", kind, ("uniform", "polynomial"))
        if isinstance(path, VariancePreserving):
            last = float(len(path.angles) - 2)
        elif isinstance(path, LinearPath):
            last = 1.0
        else:
            ends = ends or (_EDM_ENDS if isinstance(path, EDM) else None)
            checks.require(
                ends is not None,
                f"ends is None; a {type(path).__name__} has no times of its own, so name them.",
            )
            last = float((ends or (0.0, 1.0))[1])
        low, high = ends or (0.001 * last, 0.999 * last)
        checks.require(low < high, f"ends is ({low:g}, {high:g}); it must rise.")
        self.last, self.ends = last, (float(low), float(high))
        levels = path.levels(torch.tensor(last, dtype=torch.float64))
        self.sigma, signal = float(levels.sigma), float(levels.alpha / levels.sigma)
        if signal > 0.1:
            warnings.warn(
                f"at the last time {last:g} the schedule still has alpha / sigma = {signal:.2g}; a student of one "
                "call starts from noise alone.",
                stacklevel=3,
            )

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """t (n,) on the generator's device."""
        if callable(self.kind):
            return self.kind(n, generator).to(generator.device)
        low, high = self.ends
        u = torch.rand(n, generator=generator, device=generator.device)
        if self.kind == "uniform":
            return low + (high - low) * u
        top, bottom = (float(e ** (1 / _RHO)) for e in (high, low))
        return (top + u * (bottom - top)) ** _RHO


def copied(model: Any) -> Any:
    """A network of the same kind with weights of its own."""
    if isinstance(model, Denoiser):
        return Denoiser(copy.deepcopy(model.module), model.scheduler, model.timestep_scale)
    checks.require(
        isinstance(model, nn.Module),
        f"teacher is a {type(model).__name__}, which cannot be copied; name student and fake.",
    )
    return copy.deepcopy(model)


def drawn(data: Any, batch: int, seed: int, resumable: bool) -> Callable[[int], tuple[Tensor, Any]]:
    """How iteration k gets its batch (n, ...) and its condition; see :meth:`FDistill.fit`."""
    pair = (data, None) if isinstance(data, Tensor) else data
    if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], Tensor)):
        checks.require(
            not resumable, "data is a loader, whose order no folder can bring back; give tensors to resume."
        )
        batches = forever(data)
        return lambda k: next(batches)
    x, cond = pair
    checks.finite("data", x)
    if cond is not None:
        checks.same_length("data", x, "its conditions", cond)

    def draw(k: int) -> tuple[Tensor, Any]:
        generator = torch.Generator().manual_seed(seed_of(seed + 1, k))
        index = torch.randint(len(x), (batch,), generator=generator).to(x.device)
        return x[index], None if cond is None else cond[index]

    return draw
