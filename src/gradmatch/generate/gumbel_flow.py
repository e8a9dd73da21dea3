r"""Gumbel-Softmax flow matching: sequences by a flow on the simplex that cools, steered by classifiers of clean ones.

"Gumbel-Softmax Flow Matching with Straight-Through Guidance for Controllable Biological Sequence Generation", Tang,
Zhang, Tong, Chatterjee; 2025, arXiv 2503.17361. Path, field and exact step stand in :class:`GumbelPath`; a denoiser
p_theta(k | x_t, t) is trained by cross-entropy at uniform t, and a position is decoded from its last posterior.

Published settings are the default. As :class:`GumbelPath` explains, that path rescales one draw, so that its samples
are biased even with the exact posterior; ``path="consistent"`` lets the signal grow with time and is exact.

Straight-through guidance draws one-hot sequences at every step, takes the gradient of a score of them, and shifts the
logits by scale * dt times its centred mean (:class:`gradmatch.core.guidance.StraightThroughGuide`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.core.guidance import StraightThroughGuide
from gradmatch.core.networks import first_floats
from gradmatch.core.path import Prediction
from gradmatch.core.sampler import Hook, Solver, State
from gradmatch.core.simplex import GumbelPath, gumbel_noise, on_simplex
from gradmatch.core.tap import evaluating

__all__ = ["GumbelSimplexFlow", "Sequences"]

INTEGRATORS = {"exp": "exponential", "euler": "euler"}
DECODERS = ("posterior", "argmax_x", "argmax_p")
Guide = Callable[[Tensor], Tensor]


class Sequences(NamedTuple):
    """Tokens (n, L), the last point of the simplex (n, L, K), the last posterior, and denoiser calls of each (n,)."""

    tokens: Tensor
    x: Tensor
    posterior: Tensor
    calls: Tensor


class GumbelSimplexFlow(nn.Module):
    """A generator of sequences of L tokens from an alphabet of K.

    Args:
        denoiser: (x (B, L, K), t (B,)) -> logits (B, L, K); a condition, where one is given, is its third argument.
        num_classes: K >= 2.
        tau_max, decay, beta: of the path; 10, 3 and 2, as published.
        path: "published" or "consistent".
        signal: A of the consistent path; 4 ends one-hot to 0.99.

    Raises:
        InputError: options as above not kept.

    >>> net = nn.Linear(5, 5)
    >>> flow = GumbelSimplexFlow(lambda x, t: net(x), num_classes=5)
    >>> g = torch.Generator().manual_seed(0)
    >>> flow.loss(torch.randint(5, (8, 3), generator=g), generator=g).shape
    torch.Size([])
    >>> flow.sample(2, 3, steps=10, generator=g).tokens.shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        num_classes: int,
        tau_max: float = 10.0,
        decay: float = 3.0,
        beta: float = 2.0,
        path: str = "published",
        signal: float = 4.0,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        # tells the precision; in a tuple, since it is the denoiser's parameter and not one more of this module
        self._first = (first_floats(denoiser),)
        self.k = checks.whole("num_classes", num_classes, least=2)
        checks.one_of("path", path, ("published", "consistent"))
        self.path = GumbelPath(tau_max, decay, beta, signal if path == "consistent" else None)

    # --- training ------------------------------------------------------------------------------------------

    def noised(
        self, tokens: Int[Tensor, "b l"], mask: Tensor | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Points (B, L, K) of the path at uniform times (B,); padded positions lie at the uniform distribution."""
        checks.require(
            tokens.ndim == 2 and not tokens.is_floating_point() and tokens.numel() > 0,
            f"tokens is {tokens.dtype} of shape {tuple(tokens.shape)}; it must be whole numbers (B, L).",
        )
        inside = tokens if mask is None else tokens[_mask(mask, tokens.shape)]
        low, high = (int(inside.min()), int(inside.max())) if inside.numel() else (0, 0)
        checks.require(
            low >= 0 and high < self.k, f"tokens run from {low} to {high}; they must lie in 0..{self.k - 1}."
        )
        t = torch.rand(len(tokens), generator=generator, device=generator.device).to(tokens.device)
        noise = gumbel_noise(*tokens.shape, self.k, generator=generator, device=tokens.device)
        hot = F.one_hot(tokens.long().clamp(0, self.k - 1), self.k).to(noise)
        return self._padded(self.path.sample(hot, noise, t), mask), t

    def loss(
        self,
        tokens: Int[Tensor, "b l"],
        cond: Any = None,
        mask: Tensor | None = None,
        *,
        generator: torch.Generator,
    ) -> Float[Tensor, ""]:
        """Mean cross-entropy of the denoiser at a random time of the path.

        Args:
            tokens: whole numbers in [0, K).
            cond: given to the denoiser.
            mask: bool (B, L), False where a position is padding: it does not count, and its token may be anything.
            generator: of times and noise.
        """
        x, t = self.noised(tokens, mask, generator)
        logits = self._logits(x, t, cond)
        if mask is not None:
            logits, tokens = logits[mask], tokens[mask]
        return checks.finite(
            "the loss", F.cross_entropy(logits.reshape(-1, self.k), tokens.reshape(-1).long())
        )

    def score_loss(
        self,
        tokens: Int[Tensor, "b l"],
        cond: Any = None,
        mask: Tensor | None = None,
        *,
        generator: torch.Generator,
    ) -> Float[Tensor, ""]:
        """Score matching: the softmax weights of the score of y = log x, regressed on those given the token."""
        x, t = self.noised(tokens, mask, generator)
        at = self.path.amount(t).reshape(-1, 1, 1)
        truth = self.path.weights(
            self.path.beta * at * F.one_hot(tokens.long().clamp(0, self.k - 1), self.k).to(x), x, t
        )
        error = (self.path.weights(self._logits(x, t, cond), x, t) - truth).square().sum(-1)
        return checks.finite("the loss", (error if mask is None else error[mask]).mean())

    # --- sampling ------------------------------------------------------------------------------------------

    def sample(
        self,
        n: int,
        length: int,
        *,
        steps: int = 100,
        integrator: str = "exp",
        decode: str = "posterior",
        guide: Guide | None = None,
        guide_scale: float = 1.0,
        guide_samples: int = 10,
        guide_at: str = "x",
        temperature: float = 1.0,
        cond: Any = None,
        mask: Tensor | None = None,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> Sequences:
        """Draw sequences.

        Args:
            n, length: how many, and L.
            steps: of equal length in t.
            integrator: "exp", the exact step for a fixed posterior, never off the simplex; or "euler", which is held
                at 0 and normalised.
            decode: "posterior" draws each token from the last posterior; "argmax_p" and "argmax_x" take its mode and
                that of the last point. The published path's end is far from one-hot: the two modes distort it.
            guide: (m, L, K) one-hot -> (m,), higher is better, differentiable; trained on clean sequences alone.
            guide_scale: gamma; depends on the guide's units, try {0.1, 1, 10}. 0 changes nothing.
            guide_samples: draws a step.
            guide_at: draw from the point ("x") or the posterior ("prediction").
            temperature: of the posterior in decoding.
            mask: bool (n, L), False where a position is padding; it stays uniform, and its token is 0.
            generator: of noise, guide and decoding.

        Raises:
            InputError: options as above not kept, a guide that gives not one number a sequence.
        """
        checks.whole("n", n)
        checks.whole("length", length)
        checks.one_of("integrator", integrator, INTEGRATORS)
        checks.one_of("decode", decode, DECODERS)
        checks.positive("temperature", temperature)
        hooks: list[Hook] = [_Fixed(mask)] if mask is not None else []
        if guide is not None:
            own = StraightThroughGuide(
                guide, guide_scale, samples=guide_samples, at=guide_at,
                generator=torch.Generator(generator.device).manual_seed(_drawn_seed(generator)),
            )  # fmt: skip
            hooks.insert(0, own)
        else:
            _drawn_seed(generator)  # so that a guide of scale 0 leaves all that follows as it is
        if integrator == "euler":
            hooks.insert(0, _Normalised())  # before the guide, which takes logarithms
        noise = gumbel_noise(n, length, self.k, generator=generator, device=device)
        start = self._padded(self.path.prior(noise), mask)
        solver = Solver(torch.linspace(0, 1, checks.whole("steps", steps) + 1), INTEGRATORS[integrator])
        with evaluating(self):
            found = solver.run(self._model, self.path, start, cond=cond, hooks=hooks)
            ends = torch.ones(n, device=device)
            with torch.no_grad():
                logits = self._logits(found.x, ends, cond)
        p = logits.softmax(-1)
        tokens = self._decoded(found.x, logits / temperature, decode, generator)
        return Sequences(tokens if mask is None else tokens * mask, found.x, p, found.calls + 1)

    def sample_score(
        self,
        n: int,
        length: int,
        *,
        steps: int = 100,
        corrections: int = 5,
        rate: float = 0.1,
        cond: Any = None,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> Float[Tensor, "n l k"]:
        """Points at t = 1 by annealed Langevin steps in y = log x, for a denoiser trained by :meth:`score_loss`.

        Args:
            steps, corrections: times, and Langevin steps at each.
            rate: their size, over (beta tau)^2, which is the scale of y.
        """
        y = self.path.prior(gumbel_noise(n, length, self.k, generator=generator, device=device)).log()
        times = torch.linspace(0, 1, checks.whole("steps", steps) + 1)[1:].tolist()
        before = float(self.path.tau(0.0))
        with evaluating(self), torch.no_grad():
            for t in times:
                tau = float(self.path.tau(t))
                y = (y * (before / tau)).log_softmax(-1)
                before = tau
                size = checks.positive("rate", rate) / (self.path.beta * tau) ** 2
                for _ in range(corrections):
                    x = y.exp()
                    logits = self._logits(x, torch.full((n,), t, device=device), cond)
                    drift = self.path.score(self.path.weights(logits, x, t), t)
                    noise = torch.randn(y.shape, generator=generator, device=generator.device).to(y)
                    y = (y + size * drift + (2 * size) ** 0.5 * noise).log_softmax(-1)
        return checks.finite("the sample", y.exp())

    def _decoded(self, x: Tensor, logits: Tensor, decode: str, generator: torch.Generator) -> Tensor:
        if decode != "posterior":
            return (x if decode == "argmax_x" else logits).argmax(-1)
        noise = gumbel_noise(*logits.shape, generator=generator, device=logits.device)
        return (logits + noise).argmax(-1)

    # --- pieces --------------------------------------------------------------------------------------------

    def posterior(self, x: Float[Tensor, "b l k"], t: Tensor, cond: Any = None) -> Float[Tensor, "b l k"]:
        """What the denoiser says at points of the simplex.

        Raises:
            InputError: ``x`` off the simplex, a denoiser that gives another shape.
        """
        return self._logits(on_simplex("x", x), t, cond).softmax(-1)

    def _model(self, x: Tensor, t: Tensor, cond: Any = None) -> Prediction:
        return Prediction("posterior", self._logits(x, t, cond).softmax(-1))

    def _logits(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        given = x
        first = self._first[0]
        if first is not None and first.dtype != x.dtype:
            given, t = x.to(first.dtype), t.to(torch.promote_types(first.dtype, torch.float32))
        logits = self.denoiser(given, t) if cond is None else self.denoiser(given, t, cond)
        checks.require(
            isinstance(logits, Tensor) and logits.shape == x.shape,
            f"denoiser gave {tuple(getattr(logits, 'shape', ()))}; it must give logits shaped as x, {tuple(x.shape)}.",
        )
        return logits.to(torch.promote_types(logits.dtype, x.dtype))

    def _padded(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return x
        return torch.where(_mask(mask, x.shape[:2])[..., None], x, torch.full_like(x, 1 / self.k))


def _mask(mask: Tensor, shape: Any) -> Tensor:
    checks.require(
        mask.dtype == torch.bool and mask.shape == torch.Size(shape),
        f"mask is {mask.dtype} of shape {tuple(mask.shape)}; it must be bool of the tokens' shape, {tuple(shape)}.",
    )
    return mask


def _drawn_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (1,), generator=generator, device=generator.device))


class _Normalised(Hook):
    """Puts an Euler step back on the simplex."""

    def after_step(self, state: State) -> None:
        x = state.x.clamp_min(0)
        state.x = x / x.sum(-1, keepdim=True)


class _Fixed(Hook):
    """Keeps padded positions where they are."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask[..., None]

    def after_step(self, state: State) -> None:
        state.x = torch.where(self.mask, state.x, torch.full_like(state.x, 1 / state.x.shape[-1]))
