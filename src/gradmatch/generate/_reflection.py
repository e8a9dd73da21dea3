"""One step down by a strong model and one back up by a weak one, as a hook of a solver; adapters at other scales."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.core.guidance import ClassifierFreeGuidance
from gradmatch.core.path import Path, Prediction, Time
from gradmatch.core.sampler import Hook, Model, State

INVERSES = ("approx", "fixed_point")


class Reflection(Hook):
    """Moves x along the strong model's score less the weak one's before each of the first steps of a solver.

    Args:
        weak: a model; None is the solver's own, under another guidance, condition or adapter scale.
        reflect_steps: lambda, at most steps - 1; default steps - 1.
        inner: the model of the reflection's step down; default the solver's own, without the hooks that follow.
        strong_guidance, weak_guidance: within the reflection, 1.0 as published; others need ``null``.
        null: the condition that means "none".
        weak_cond: the weak model's condition; default the solver's.
        strong_adapter_scale, weak_adapter_scale: of the networks' peft adapters within the reflection; as found by
            default (0.8 and -1.5 as published).
        inverse: "approx" calls the weak model once, where the step down ended; "fixed_point" goes on to the x~ whose
            weak step ends there.
        iterations: further weak calls of "fixed_point".
        networks: (strong, weak), whose adapters are scaled.

    Raises:
        InputError: options out of range, models whose predictions differ in kind or shape.
    """

    def __init__(
        self,
        weak: Model | None = None,
        reflect_steps: int | None = None,
        *,
        inner: Model | None = None,
        strong_guidance: float = 1.0,
        weak_guidance: float = 1.0,
        null: Any = None,
        weak_cond: Any = None,
        strong_adapter_scale: float | None = None,
        weak_adapter_scale: float | None = None,
        inverse: str = "approx",
        iterations: int = 3,
        networks: tuple[Any, Any] = (None, None),
    ) -> None:
        self.reflect_steps = (
            None if reflect_steps is None else checks.whole("reflect_steps", reflect_steps, 0)
        )
        self.models = inner, weak
        self.guides = tuple(ClassifierFreeGuidance(g, null) for g in (strong_guidance, weak_guidance))
        self.scales = tuple(
            None if s is None else checks.number(f"{name}_adapter_scale", s)
            for name, s in (("strong", strong_adapter_scale), ("weak", weak_adapter_scale))
        )
        self.weak_cond, self.networks = weak_cond, networks
        self.inverse = checks.one_of("inverse", inverse, INVERSES)
        self.iterations = checks.whole("iterations", iterations) if inverse == "fixed_point" else 0
        self._plain: Model | None = None

    def wrap(self, model: Model, path: Path) -> Model:
        self._plain = model  # before the hooks that follow change it
        return model

    def before_step(self, state: State) -> None:
        if state.index >= self.count(state.steps):
            return
        plain = self._plain or state.model
        strong, weak = (
            self.view(k, plain if m is None else state.counted(m), state.path)
            for k, m in enumerate(self.models)
        )
        state.x = self.reflected(state.x, state.t, state.t_next, state.path, strong, weak, state.cond)

    def count(self, steps: int) -> int:
        """lambda for so many steps."""
        found = steps - 1 if self.reflect_steps is None else self.reflect_steps
        checks.require(
            found < steps, f"reflect_steps is {found}; with {steps} steps it must be at most {steps - 1}."
        )
        return found

    def view(self, which: int, model: Model, path: Path) -> Model:
        """The strong (0) or weak (1) model under its guidance and adapter scale."""
        guided, scale, network = (
            self.guides[which].wrap(model, path),
            self.scales[which],
            self.networks[which],
        )
        if scale is None:
            return guided

        def scaled(x: Tensor, t: Time, cond: Any = None) -> Prediction:
            with adapter_scale(network, scale):
                return guided(x, t, cond)

        return scaled

    def reflected(
        self, x: Tensor, t: float, t_next: float, path: Path, strong: Model, weak: Model, cond: Any = None
    ) -> Tensor:
        """x~ for x (n, ...) at ``t``: down to ``t_next`` by ``strong``, back by ``weak``."""
        fine = x if x.dtype == torch.float64 else x.float()
        down = strong(x, t, cond)
        lower = path.step(fine, Prediction(down.kind, down.tensor.to(fine)), t, t_next)
        place, weak_cond = lower, cond if self.weak_cond is None else self.weak_cond
        for _ in range(1 + self.iterations):
            up = weak(place.to(x.dtype), t, weak_cond)  # the less noisy latent, the noisier time
            checks.require(
                up.kind == down.kind and up.tensor.shape == x.shape,
                f"the weak model gives {up.kind!r} of shape {tuple(up.tensor.shape)} and the strong one "
                f"{down.kind!r} of {tuple(down.tensor.shape)}; both must predict the same of one latent.",
            )
            place = path.inverse_step(lower, Prediction(up.kind, up.tensor.to(fine)), t, t_next)
        return place.to(x.dtype)


@contextmanager
def adapter_scale(network: Any, scale: float) -> Iterator[None]:
    """Within the block the active peft adapters of ``network`` count ``scale`` times; theirs comes back after it.

    Raises:
        InputError: there are no adapters.
    """
    parts = network.modules() if isinstance(network, nn.Module) else ()
    layers: list[Any] = [p for p in parts if hasattr(p, "set_scale") and hasattr(p, "scaling")]
    checks.require(bool(layers), "an adapter scale is given, but the network has no adapters.")
    found = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            for name in layer.active_adapters:
                layer.set_scale(name, scale)
        yield
    finally:
        for layer, own in zip(layers, found, strict=True):
            layer.scaling.update(own)
