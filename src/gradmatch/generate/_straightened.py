"""A network fine-tuned for a few times only, which carries them and refuses others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path as File
from typing import Any, Self

import torch
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.core.bridge import Denoiser
from gradmatch.core.path import KINDS, AffinePath, Prediction
from gradmatch.core.sampler import Solver, as_times
from gradmatch.core.store import load_tensors, save_tensors
from gradmatch.generate._common import as_model


class Straightened(nn.Module):
    """A network that is straight between the times it carries, and refuses to be called at others.

    Called as (x, t) -> prediction; :meth:`sample` takes all its steps.

    Args:
        network: the module, or a diffusers network from ``from_diffusers``.
        times: (K + 1,), from noise to data.
        path, kind: what a module's output means; default the velocity of the straight path.
    """

    times: Tensor

    def __init__(
        self,
        network: nn.Module | Denoiser,
        times: Sequence[float] | Tensor,
        path: AffinePath | None = None,
        kind: str = "velocity",
    ) -> None:
        super().__init__()
        self._denoiser = network if isinstance(network, Denoiser) else None
        self.network: Any = network.module if isinstance(network, Denoiser) else network
        self.kind = checks.one_of("kind", kind, KINDS) if self._denoiser is None else self._denoiser.kind
        self.path = as_model(network, path)[1]
        self.register_buffer("times", as_times(times))
        self.held_out: float | None = None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        gap = (t.double().reshape(-1, 1) - self.times[:-1]).abs().amin(1)
        checks.require(
            bool((gap <= 1e-6 * self.times.abs().max()).all()),
            f"t is {float(t.flatten()[gap.argmax()]):g}; the network was straightened at "
            f"{checks.listing([f'{s:g}' for s in self.times[:-1].tolist()], 12)} and means nothing elsewhere.",
        )
        return self.predict(x, t)

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        """The network's tensor at (x, t), whatever t."""
        if self._denoiser is None:
            out: Tensor = self.network(x, t)
            checks.require(
                isinstance(out, Tensor),
                f"the network gave a {type(out).__name__}; it must give a tensor (name its kind by ``kind``).",
            )
            return out
        self._denoiser.module = self.network
        return self._denoiser(x, t).tensor

    def sample(self, x0: Tensor) -> Tensor:
        """From noise (n, ...) to data in as many network calls as there are steps."""
        with torch.no_grad():
            return Solver(self.times, "ddim").run(self._as_prediction, self.path, x0).x

    def _as_prediction(self, x: Tensor, t: Tensor, cond: Any = None) -> Prediction:
        return Prediction(self.kind, self(x, t))

    def save(self, file: str | File) -> File:
        """Weights and times as one safetensors file."""
        facts = {"times": self.times.tolist(), "kind": self.kind}
        return save_tensors(file, self.network.state_dict(), facts)

    @classmethod
    def load(cls, file: str | File, network: nn.Module | Denoiser, path: AffinePath | None = None) -> Self:
        """What :meth:`save` wrote, into a network of the same build (its weights are replaced)."""
        tensors, facts = load_tensors(file)
        checks.require("times" in facts, f"{file} holds no times; it is not a straightened network.")
        found = cls(network, facts["times"], path, facts["kind"])
        found.network.load_state_dict(tensors)
        return found.eval()
