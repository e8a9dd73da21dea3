"""Telling a teacher's data from a generator's at every noise level, by a module or a head on the teacher's features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.core import checks
from gradmatch.core.bridge import Denoiser
from gradmatch.core.networks import seeded
from gradmatch.core.path import AffinePath, Prediction
from gradmatch.core.sampler import Model
from gradmatch.core.tap import capture

R1_FORMS = ("difference", "gradient")
_SHAKE = 0.1


class Discriminator:
    """Logits (n, m) at (x_t, t), positive for data, and the game they play.

    Args:
        source: a module ``(x_t, t[, cond])`` -> logits (n, ...), or "features".
        teacher: whose features a head reads.
        names: parts as in ``named_modules``; default the middle block of a diffusers network, or the middle one of
            the linear layers and convolutions.
        r1: weight of the gradient penalty, by ``form`` "difference" (logits of data and of data moved by noise of
            0.1, squared) or "gradient" (squared norm).
    """

    def __init__(
        self, source: Any, teacher: Any, names: Sequence[str] | None, *, r1: float, form: str
    ) -> None:
        self.r1 = checks.nonnegative("r1", r1)
        self.form = checks.one_of("r1_form", form, R1_FORMS)
        self.names: tuple[str, ...] = ()
        self.module: nn.Module | None = source if isinstance(source, nn.Module) else None
        if self.module is not None:
            return
        checks.require(
            source == "features",
            f"discriminator is {source!r}; it must be None, 'features' or a module (x_t, t) -> logits.",
        )
        inner = teacher.module if isinstance(teacher, Denoiser) else teacher
        checks.require(
            isinstance(inner, nn.Module),
            f"discriminator is 'features' and teacher a {type(inner).__name__}; only a module has features.",
        )
        self.teacher, self.names = inner, tuple(names) if names else (_middle(inner),)

    def build(self, model: Model, x: Tensor, t: Tensor, cond: Any, seed: int) -> bool:
        """Make the head, once the features' shapes can be seen; whether it was made now."""
        if self.module is not None:
            return False
        with torch.no_grad():
            _, seen = self._during(lambda: model(x, t, cond), len(x))
        self.module = FeatureHead(seen, seed)
        return True

    def judge(
        self, model: Model, x_t: Tensor, t: Tensor, cond: Any, through: bool
    ) -> tuple[Prediction, Tensor]:
        """What the teacher says, without a graph, and the logits, from the same pass of it where they can be.

        The logits have a graph to ``x_t`` if ``through``.
        """
        assert self.module is not None
        if not self.names:
            with torch.no_grad():
                said = model(x_t.detach(), t, cond)
            with torch.set_grad_enabled(through):
                return said, self._plain(x_t, t, cond)
        with torch.set_grad_enabled(through):
            said, seen = self._during(lambda: model(x_t, t, cond), len(x_t))
            return Prediction(said.kind, said.tensor.detach()), self.module(seen)

    def loss(
        self,
        model: Model,
        path: AffinePath,
        real: tuple[Tensor, Tensor, Tensor],
        fake: tuple[Tensor, Tensor],
        cond: Any,
        generator: torch.Generator,
    ) -> Tensor:
        """softplus(-l_real) + softplus(l_fake), means, and the penalty.

        Args:
            real: data (n, ...), their noise and times.
            fake: samples already noised, and their times.
        """
        data, noise, t = real
        exact = self.r1 > 0 and self.form == "gradient"
        noised = path.sample(data, noise, t).requires_grad_(exact)
        told = self.logits(model, noised, t, cond, exact)
        loss = F.softplus(-told).mean() + F.softplus(self.logits(model, *fake, cond, False)).mean()
        if exact:
            total = told.flatten(1).mean(1).sum()
            (slope,) = torch.autograd.grad(total, noised, create_graph=True)
            return loss + self.r1 * slope.square().flatten(1).sum(1).mean()
        if self.r1:
            shake = torch.randn(data.shape, generator=generator, device=data.device, dtype=data.dtype)
            near = path.sample(data + _SHAKE * shake, noise, t)
            return loss + self.r1 * (told - self.logits(model, near, t, cond, False)).square().mean()
        return loss

    def logits(self, model: Model, x_t: Tensor, t: Tensor, cond: Any, through: bool) -> Tensor:
        """Logits with a graph to the module's own parameters; through the teacher only if ``through``."""
        assert self.module is not None
        if not self.names:
            return self._plain(x_t, t, cond)
        with torch.set_grad_enabled(through):
            _, seen = self._during(lambda: model(x_t, t, cond), len(x_t))
        found: Tensor = self.module(seen)
        return found

    def _plain(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        assert self.module is not None
        found = self.module(x_t, t) if cond is None else self.module(x_t, t, cond)
        flat: Tensor = found.reshape(len(x_t), -1)
        return flat

    def _during(self, call: Callable[[], Prediction], n: int) -> tuple[Prediction, list[Tensor]]:
        """What ``call`` gives, and the features of its first ``n`` rows (guidance doubles the batch)."""
        with capture(self.teacher, *self.names) as seen:
            said = call()
        return said, [seen[name][:n] for name in self.names]


class FeatureHead(nn.Module):
    """A two-layer network at every place of each feature: (n, c, h, w), (n, places, d) or (n, d) -> (n, m)."""

    def __init__(self, features: Sequence[Tensor], seed: int) -> None:
        super().__init__()
        widths = [_last(h).shape[-1] for h in features]
        with seeded(seed):
            self.heads = nn.ModuleList(
                nn.Sequential(nn.LayerNorm(w), nn.Linear(w, w), nn.SiLU(), nn.Linear(w, 1)) for w in widths
            )
        self.to(features[0])

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        found = [head(_last(h)).flatten(1) for head, h in zip(self.heads, features, strict=True)]
        return torch.cat(found, 1)


def _last(h: Tensor) -> Tensor:
    return h.movedim(1, -1) if h.ndim >= 4 else h


def _middle(module: nn.Module) -> str:
    known: list[str] = [n for n, _ in module.named_modules() if n.rsplit(".", 1)[-1] == "mid_block"]
    if known:
        return min(known, key=len)
    layers: list[str] = [
        n for n, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d) and n
    ]
    checks.require(bool(layers), "teacher has no linear layer or convolution; name its features.")
    return layers[len(layers) // 2]
