"""W2SD: weak-to-strong diffusion with reflection (Bai, Sugiyama, Xie; ICLR 2026, arXiv 2502.00473).

A strong model's distance from the data cannot be seen, but its distance from a weaker model can, and usually points the
same way. Before each of the first lambda of T deterministic steps t -> t' the latent is moved along it,

    x~ = M_weak^-1( M_strong(x, t), t ),        then x' = M_strong(x~, t),

which to first order adds c (score_strong - score_weak), c > 0: one step down with the strong model, one step back up
with the weak one. The weak network is called at the less noisy latent with the noisier time t, as the paper's equation
5 and its code have it. The cost is T + 2 lambda network calls. No training.

The pair may differ in weights, in adapter scale, in guidance (5.5 against 0 is Z-Sampling) or in condition. Both steps
of the reflection are the path's own exact step and its inverse, in float32 or better, so that nothing of a scheduler's
state is touched.

Readings: T = 50, lambda = T - 1 and guidance 1 within the reflection are the paper's; its adapter scales (0.8 strong,
-1.5 weak) are given by name, as a network without adapters has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.core.bridge import Denoiser, from_diffusers, noise_path, path_times, prediction_kind, scheduled
from gradmatch.core.guidance import ClassifierFreeGuidance
from gradmatch.core.path import AffinePath
from gradmatch.core.sampler import Calls, Solver, Trajectory
from gradmatch.generate._common import as_model, fine_grid, in_eval
from gradmatch.generate._reflection import Reflection, adapter_scale

__all__ = ["Reflection", "W2SDCallback", "adapter_scale", "w2sd_sample"]


def w2sd_sample(
    strong: Any,
    weak: Any,
    x: Tensor,
    path: Any = None,
    steps: int = 50,
    reflect_steps: int | None = None,
    *,
    kind: str | None = None,
    times: Any = None,
    cond: Any = None,
    guidance: float = 1.0,
    null: Any = None,
    inner: Any = None,
    record: bool = False,
    **reflection: Any,
) -> Trajectory:
    """Samples of a strong model, each of its first steps made after a reflection on a weak one.

    Args:
        strong: (x, t) or (x, t, cond) -> tensor of ``kind`` or ``Prediction``; a network from ``from_diffusers``; or
            a diffusers network, with a scheduler as ``path``.
        weak: likewise; None is ``strong`` itself, under another guidance, condition or adapter scale.
        x: noise (n, ...), at the path's own scale.
        path: a path or a diffusers scheduler; default the one that ``strong`` has.
        steps: T, 50 as published; from one end of the path to the other, or the scheduler's own.
        reflect_steps: lambda; default steps - 1 as published.
        kind: what plain tensors are: "noise", "x0", "v", "velocity" or "score"; default the scheduler's, or noise.
        times: the times themselves, in place of ``steps``.
        cond: for every call of the strong model.
        guidance: of the steps themselves; 5.5 as published for text. Others than 1 need ``null``.
        null: the condition that means "none".
        inner: in place of ``strong`` for the reflection's step down alone.
        record: keep every state.
        reflection: further options of :class:`Reflection`.

    Returns:
        ``x`` and exact ``calls``: T + 2 lambda for each example, a guided pair counted twice.

    Raises:
        InputError: lambda out of range, a scheduler whose step has no inverse, models that do not belong together.

    >>> from gradmatch.core.path import LinearPath
    >>> found = w2sd_sample(lambda x, t: 1 - x, lambda x, t: -x, torch.zeros(3, 2), LinearPath(), 5, kind="velocity")
    >>> found.calls.tolist()
    [13, 13, 13]
    """
    scheduler = None if isinstance(path, AffinePath) else path
    given = [_loaded(m, scheduler) for m in (strong, weak, inner)]
    checks.require(
        path is not None or isinstance(given[0], Denoiser), "path is None; name a path or a scheduler."
    )
    line = path if scheduler is None else noise_path(scheduler)
    kind = kind or ("noise" if scheduler is None else prediction_kind(scheduler))
    model, line, _ = as_model(given[0], line, kind)
    others = [None if m is None else as_model(m, line, kind)[0] for m in given[1:]]
    grid = _grid(given[0], line, scheduler, checks.whole("steps", steps), times)
    _same_levels(given[1], line, grid)
    networks = _network_of(given[0]), _network_of(given[0] if weak is None else given[1])
    hook = Reflection(others[0], reflect_steps, null=null, inner=others[1], networks=networks, **reflection)
    hook.count(len(grid) - 1)
    hooks = [hook, ClassifierFreeGuidance(guidance, null)]
    with ExitStack() as stack:
        for part in given:
            stack.enter_context(in_eval(part))
        return Solver(grid, "ddim").run(model, line, x, cond=cond, hooks=hooks, record=record)


class W2SDCallback:
    """The reflection in a diffusers pipeline, as its ``callback_on_step_end``.

    A callback runs after steps, so the first reflection is made by :meth:`start`, on the latents that the pipeline is
    then given. The pipeline's own guidance is that of the steps; the reflection has its own.

    Args:
        weak: another network (with the pipeline's noise levels), or None for the pipeline's own.
        reflect_steps: lambda; default steps - 1.
        cond: arguments of the network for each latent, such as ``{"encoder_hidden_states": embeddings}``.
        reflection: further options of :class:`Reflection`: strong_guidance, weak_guidance, null, weak_cond,
            strong_adapter_scale, weak_adapter_scale, inverse, inner.

    Attributes:
        calls: network calls of each example that the reflections of the last run took.

    >>> # callback = W2SDCallback(cond=words, null=none, strong_guidance=5.5, weak_guidance=0.0)
    >>> # latents = callback.start(pipe, latents, steps=50)
    >>> # pipe(..., latents=latents, num_inference_steps=50, callback_on_step_end=callback)
    """

    def __init__(
        self,
        weak: Any = None,
        reflect_steps: int | None = None,
        *,
        cond: Mapping[str, Any] | None = None,
        **reflection: Any,
    ) -> None:
        self.weak, self.cond, self.options = weak, cond, {"reflect_steps": reflect_steps, **reflection}
        Reflection(None, **self.options)  # refused here rather than in the middle of a run
        self.calls = 0
        self._run: tuple[list[float], Callable[[Tensor, int], Tensor]] | None = None

    @torch.no_grad()
    def start(self, pipe: Any, latents: Tensor, steps: int = 50, **timesteps: Any) -> Tensor:
        """The pipeline's first latents, reflected.

        Args:
            pipe: the pipeline; its scheduler is set to ``steps``, as the pipeline itself will do.
            latents: noise (n, ...), as the pipeline takes it.
            steps: T, ``num_inference_steps``.
            timesteps: what the pipeline gives the scheduler besides (``mu``).
        """
        network = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
        checks.require(
            network is not None and hasattr(pipe, "scheduler"),
            f"pipe is a {type(pipe).__name__}; it must have a unet or a transformer, and a scheduler.",
        )
        strong, weak = (_loaded(m, pipe.scheduler) for m in (network, self.weak))
        times, path = scheduled(pipe.scheduler, steps, **timesteps).tolist(), strong.path
        _same_levels(weak, path, torch.tensor(times))
        hook = Reflection(weak, networks=(network, _network_of(weak) or network), **self.options)
        last, counter = hook.count(len(times) - 1), Calls(len(latents))
        inner = hook.models[0] or strong
        views = [hook.view(k, counter.counted(m), path) for k, m in enumerate((inner, weak or strong))]

        def reflect(x: Tensor, index: int) -> Tensor:
            if index >= last:
                return x
            moved = hook.reflected(x, times[index], times[index + 1], path, views[0], views[1], self.cond)
            self.calls = counter.everyone
            return checks.finite("the reflected latents", moved)

        self._run, self.calls = (times, reflect), 0
        first = float(getattr(pipe.scheduler, "init_noise_sigma", 1.0))
        return reflect(latents * first, 0) / first if last else latents

    def __call__(self, pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if self._run is None:
            checks.refuse(
                "start was not called; give the pipeline latents=callback.start(pipe, latents, steps)."
            )
        times, reflect = self._run
        if index == 0:
            found = path_times(pipe.scheduler).tolist()
            checks.require(
                found == times,
                f"start was called for {len(times) - 1} steps from {times[0]:g} and the pipeline takes "
                f"{len(found) - 1} from {found[0]:g}; both need the same.",
            )
        with torch.no_grad():
            return {"latents": reflect(kwargs["latents"], index + 1)}


def _loaded(model: Any, scheduler: Any) -> Any:
    """A diffusers network with a scheduler as one model; anything else as it is."""
    if scheduler is None or not isinstance(model, nn.Module):
        return model
    return from_diffusers(model, scheduler)


def _network_of(model: Any) -> Any:
    return model.module if isinstance(model, Denoiser) else model


def _grid(model: Any, path: AffinePath, scheduler: Any, steps: int, times: Any) -> Tensor:
    if scheduler is None or times is not None:
        return fine_grid(model, path, True, steps, times)
    return scheduled(scheduler, steps)


def _same_levels(weak: Any, path: AffinePath, times: Tensor) -> None:
    if isinstance(weak, Denoiser):
        mine, theirs = (torch.stack(tuple(p.levels(times.double())[:2])) for p in (path, weak.path))
        checks.require(
            torch.allclose(mine, theirs, atol=1e-6),
            "weak has other noise levels than strong at the same times; both need those of one scheduler.",
        )
