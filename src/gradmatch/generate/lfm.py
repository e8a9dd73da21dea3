"""LFM: flow matching in latent space (Dao, Phung, Nguyen, Tran; 2023, arXiv 2307.08698).

With the latents of a frozen autoencoder, z_0 = s * (posterior sample of Enc(x)), noise z_1 ~ N(0, I) and t in (0, 1):

    z_t = (1 - t) z_0 + (eps + (1 - eps) t) z_1,   eps = 1e-5,
    loss = mean |v(z_t, t, c) - u|^2,              u = dz_t/dt = (1 - eps) z_1 - z_0,

and images are Dec(z_0 / s) after integrating dz/dt = v from t = 1 (noise) to t = 0 (data). Guidance by labels is
v_null + g (v_c - v_null) on all channels.

Readings: a posterior sample, not its mean, is the target; the scale is fitted to the autoencoder ("auto") since the
published 0.18215 belongs to Stable Diffusion's. As printed, the bound on W2^2 of the theorem lacks its cross term and
is exceeded by simple cases; :func:`w2_bound` is the form by the triangle inequality, which holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.core.guidance import ClassifierFreeGuidance
from gradmatch.core.networks import first_floats
from gradmatch.core.path import AffinePath, LinearPath, Prediction
from gradmatch.core.sampler import Hook, Solver
from gradmatch.core.store import RunFolder
from gradmatch.core.tap import evaluating
from gradmatch.core.training import Progress, Trained, train
from gradmatch.generate._batches import drawn, encoded, matched
from gradmatch.generate._conditions import Condition, Inpainting, Labels, Layout, Ready
from gradmatch.generate._latents import Codec, Moments

__all__ = ["Inpainting", "Labels", "LatentFlow", "Layout", "Moments", "Samples", "w2_bound"]

COUPLINGS = ("independent", "ot")
TIMES = ("uniform", "logit-normal")


class Samples(NamedTuple):
    """Images (n, c, h, w), and the network calls each of them took (n,); a guided pair counts twice."""

    images: Tensor
    nfe: Tensor


class LatentFlow(nn.Module):
    """A flow-matching generator on the latents of a frozen autoencoder.

    Args:
        autoencoder: diffusers' ``AutoencoderKL``, any object with ``encode`` and ``decode``, or None for pixels.
        velocity: network ``(z, t)``, or ``(z, t, label)`` with labels -> dz/dt (n, ...); diffusers' networks too.
        scale: of the latents: "auto" (1 / std of the first images seen) or a number.
        path: straight, with eps = 1e-5 as published.
        condition: :class:`Labels`, :class:`Inpainting` or :class:`Layout`; default unconditional.
        shift: taken from the latents before scaling.
        mean: encode to the posterior's mean.
        times: t "uniform" (published) or "logit-normal".
        coupling: z_1 "independent" of z_0 (published), or matched to it in the batch by least squared distance ("ot").
        seed: of the draws of :meth:`loss` where it is given no generator.

    Raises:
        InputError: an option out of range.

    >>> flow = LatentFlow(None, lambda z, t: -z, scale=1.0)
    >>> flow.sample(2, shape=(1, 4, 4), solver="euler", steps=3).nfe.tolist()
    [3, 3]
    """

    def __init__(
        self,
        autoencoder: Any,
        velocity: Callable[..., Any],
        scale: str | float = "auto",
        path: AffinePath | None = None,
        *,
        condition: Condition | None = None,
        shift: float = 0.0,
        mean: bool = False,
        times: str = "uniform",
        coupling: str = "independent",
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.require(
            callable(velocity),
            f"velocity is a {type(velocity).__name__}; it must be a network (z, t) -> dz/dt.",
        )
        self.velocity = velocity
        # tells the precision; in a tuple, since it is the velocity's parameter and not one more of this module
        self._first = (first_floats(velocity),)
        self.codec = Codec(autoencoder, scale, shift, mean)
        self.path = path or LinearPath(eps=1e-5)
        self.condition = condition or Condition()
        self.times = checks.one_of("times", times, TIMES)
        self.coupling = checks.one_of("coupling", coupling, COUPLINGS)
        self._generator = torch.Generator().manual_seed(checks.whole("seed", seed, 0))
        self.latent_shape: tuple[int, ...] | None = None

    def loss(self, x: Tensor | Moments, cond: Any = None, generator: torch.Generator | None = None) -> Tensor:
        """Flow-matching loss of a batch, mean over all elements.

        Args:
            x: images (n, c, h, w), or their cached moments (no masks then: those need the images).
            cond: what :attr:`condition` takes.
            generator: of posterior, noise, time and dropout.
        """
        generator = generator or self._generator
        checks.require(len(x) > 0, "x is empty; at least one image is needed.")
        z0 = self.codec.latents(x, generator)
        if self._first[0] is not None and self._first[0].dtype == torch.float64:
            z0 = z0.double()
        self.latent_shape = tuple(z0.shape[1:])
        z1 = torch.randn(z0.shape, generator=generator, device=generator.device, dtype=z0.dtype).to(z0)
        if self.coupling == "ot":
            z1 = z1[matched(z0, z1)]
        t = torch.rand(len(z0), generator=generator, device=generator.device)
        if self.times == "logit-normal":
            t = torch.sigmoid(torch.randn(len(z0), generator=generator, device=generator.device))
        t = t.to(z0)
        ready = self.prepared(cond, x if isinstance(x, Tensor) else None, z0.shape[2:], generator)
        z, target = self.path.pair("velocity", z0, z1, t)
        said = self.field(z, t, self.condition.dropped(ready, generator))
        return (said.tensor - target).square().mean()

    def prepared(
        self,
        cond: Any,
        images: Tensor | None,
        size: tuple[int, ...],
        generator: torch.Generator | None = None,
    ) -> Ready:
        """The user's condition as what the network is given; see :mod:`gradmatch.generate._conditions`."""

        def encode(x: Tensor) -> Tensor:
            return self.codec.latents(x, generator or self._generator)

        return self.condition.ready(cond, images, encode, tuple(size))

    def field(self, z: Tensor, t: Tensor, cond: Mapping[str, Tensor] | None = None) -> Prediction:
        """The network as a model of (z, t, prepared condition), for any solver."""
        cond = cond or {}
        given = torch.cat([z, cond["concat"].to(z)], 1) if "concat" in cond else z
        own = z.dtype if self._first[0] is None else self._first[0].dtype
        if own != z.dtype:  # a network in another precision than its latents
            given, t = given.to(own), t.to(torch.promote_types(own, torch.float32))
        label = (cond["label"].to(z.device),) if "label" in cond else ()
        try:
            said = self.velocity(given, t, *label)
        except RuntimeError as error:
            why = str(error).strip().splitlines()[0]
            raise checks.InputError(
                f"velocity does not take {given.shape[1]} channels of {tuple(given.shape[2:])} "
                f"({z.shape[1]} of the latents, {given.shape[1] - z.shape[1]} of the condition): {why}."
            ) from error
        out = getattr(said, "sample", said)
        checks.require(
            isinstance(out, Tensor) and out.shape == z.shape,
            f"velocity gave {tuple(getattr(out, 'shape', ())) or type(out).__name__}; it must give {tuple(z.shape)}.",
        )
        return Prediction("velocity", out.to(z.dtype))

    def moments(self, images: Tensor, batch: int = 256, dtype: torch.dtype = torch.float16) -> Moments:
        """A cache: the posterior of every image, encoded once; samples of it stay random."""
        return encoded(self.codec, images, batch, dtype)

    def fit(
        self,
        data: Any,
        steps: int,
        *,
        batch: int = 128,
        lr: float = 2e-4,
        schedule: str = "constant",
        warmup: int = 0,
        clip: float | None = None,
        ema: float | None = None,
        cache: bool = True,
        cond: Callable[[Tensor, Tensor | None, torch.Generator], Any] | None = None,
        seed: int = 0,
        after: Callable[[int], object] | None = None,
        progress: Progress | None = None,
        run: RunFolder | None = None,
        save_every: float = 30.0,
    ) -> Trained:
        """Train the velocity (and a layout's convolution) with AdamW without weight decay.

        Args:
            data: images (n, c, h, w), a pair of images and labels, :class:`Examples`, or an iterable of batches such
                as a DataLoader (which is gone through again and again, and cannot be resumed to the same bits).
            steps: updates.
            lr: 2e-4 as published for transformers (1e-4 and 2e-5 for others).
            schedule: "constant" or "cosine".
            ema: decay of averaged weights, which replace the trained ones at the end; off as published.
            cache: encode images once, in half precision; not where a mask needs the images.
            cond: (images, labels, generator) -> condition of a batch; default the labels, where there are some.
            warmup, clip, seed, after, progress, run, save_every: as in :func:`gradmatch.core.training.train`.

        Raises:
            InputError: data or a loss that is not finite, named with its step.
        """
        draw = drawn(self.codec, self.condition, data, batch, cache=cache, cond=cond, run=run)

        def loss(generator: torch.Generator) -> Tensor:
            x, condition = draw(generator)
            return self.loss(x, condition, generator)

        found = train(
            self, loss, steps, lr=lr, schedule=schedule, warmup=warmup, clip=clip, average=ema, seed=seed,
            after=after, progress=progress, run=run, save_every=save_every,
        )  # fmt: skip
        if found.averaged:
            self.load_state_dict(found.averaged)
        return found

    @torch.no_grad()
    def sample(
        self,
        n: int | Tensor,
        cond: Any = None,
        guidance: float = 1.0,
        solver: str = "dopri5",
        steps: int | None = None,
        *,
        times: Any = None,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        shape: tuple[int, ...] | None = None,
        hooks: tuple[Hook, ...] = (),
        seed: int = 0,
    ) -> Samples:
        """Images from noise.

        Args:
            n: how many, or noise z_1 (n, ...) of the latents' shape.
            cond: what :attr:`condition` takes.
            guidance: 1 is the conditional field, one call a step; 0 the null field; 1.5 as published for ImageNet.
            solver: "dopri5" (as published, 1e-5), "euler" or "heun".
            steps: of the fixed solvers, uniform in t; Euler calls the network once a step, Heun twice.
            times: the times themselves, in place of ``steps``.
            shape: of one latent, where nothing was trained yet.
            hooks: of the solver, after guidance.
            seed: of the noise.

        Raises:
            InputError: guidance other than 1 where no condition was ever dropped, steps below 1.
        """
        z = self._noise(n, shape, seed)
        ready = self.prepared(cond, None, tuple(z.shape[2:]))
        checks.require(
            not ready or all(len(v) == len(z) for v in ready.values()),
            f"cond is for {[len(v) for v in ready.values()]} samples; there are {len(z)}.",
        )
        guides: tuple[Hook, ...] = ()
        if guidance != 1:
            null = self.condition.null(ready)
            checks.require(
                null is not None,
                f"guidance is {guidance:g}, but the condition was never dropped in training; use Labels(dropout > 0).",
            )
            guides = (ClassifierFreeGuidance(guidance, null),)
        run = Solver(self._times(solver, steps, times), solver, rtol=rtol, atol=atol)
        with evaluating(self):
            found = run.run(self.field, self.path, z, cond=ready or None, hooks=(*guides, *hooks))
        return Samples(self.codec.images(found.x), found.calls)

    def _noise(self, n: int | Tensor, shape: tuple[int, ...] | None, seed: int) -> Tensor:
        if isinstance(n, Tensor):
            return n
        shape = shape or self.latent_shape
        checks.require(
            shape is not None, "shape is None and nothing was trained yet; give the shape of a latent."
        )
        generator = torch.Generator().manual_seed(checks.whole("seed", seed, 0))
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        own = torch.float32 if self._first[0] is None else self._first[0].dtype
        kind = torch.promote_types(own, torch.float32)
        return torch.randn(checks.whole("n", n), *(shape or ()), generator=generator, dtype=kind).to(device)

    def _times(self, solver: str, steps: int | None, times: Any) -> Any:
        if times is not None:
            checks.require(
                steps is None, "steps and times are both given; times says how many steps there are."
            )
            return times
        if solver == "dopri5":
            checks.require(steps is None, "steps is given, but dopri5 finds its own; set rtol and atol.")
            return [1.0, 0.0]
        checks.require(steps is not None, f"steps is None; solver {solver!r} needs a number of steps.")
        return torch.linspace(1, 0, checks.whole("steps", steps) + 1, dtype=torch.float64)


def w2_bound(gap: float, decoder: float, field: float, error: float) -> float:
    """W2(data, generated) <= |gap| + L_g exp(1/2 + L) sqrt(int int q_t |v - v_theta|^2 dz dt).

    Args:
        gap: root mean square of x - Dec(Enc(x)).
        decoder: Lipschitz constant L_g of the decoder.
        field: Lipschitz constant L of the learned field in z.
        error: the integral, the excess of the flow-matching loss summed over a latent's elements.

    >>> round(w2_bound(1.0, 1.0, 1.0, 0.01), 3)
    1.448
    """
    for name, value in (("gap", gap), ("decoder", decoder), ("field", field), ("error", error)):
        checks.nonnegative(name, value)
    return gap + decoder * math.exp(0.5 + field) * math.sqrt(error)
