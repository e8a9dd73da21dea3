"""DifIISR: infrared super-resolution by a guided residual diffusion (Li et al.; CVPR 2025, arXiv 2503.01187).

Between a sharp image x_0 and the enlarged image y of low resolution (ResShift, arXiv 2307.12348), with T = 15 steps,

    x_t = x_0 + eta_t (y - x_0) + kappa sqrt(eta_t) noise,    sqrt(eta_t) = s (0.99 / s)^((t / (T - 1))^p),

the network predicts x_0 from x_t and y, and sampling starts at x_{T-1} = y + kappa sqrt(eta_{T-1}) noise. A student is
then taught to give in one step what the teacher reaches in T, with two further losses between student and teacher:
amplitudes of the Fourier transform (visual) and features of frozen networks (perceptual).

Guidance in sampling is :class:`gradmatch.core.guidance.GradientGuide` with these losses: x_0 moves down their gradient
by a fixed length in pixels. Readings: the paper's guidance classes are not public, so that this rule, and the reference
at test time (the image of low resolution in the band that it knows, and features of it), are this library's; the
literal shift of the noise grows 10^5-fold over the steps and is the guide's form "noise", held at 0.1. The true sharp
image as reference is an oracle, for analysis alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.core import checks
from gradmatch.core.guidance import GradientGuide
from gradmatch.core.path import Prediction, ResidualPath
from gradmatch.core.regress import PairStore
from gradmatch.core.sampler import Calls, Model, Solver
from gradmatch.core.store import RunFolder
from gradmatch.core.tap import evaluating
from gradmatch.core.training import Progress, Trained, seed_of, train
from gradmatch.generate._latents import Codec, untouched
from gradmatch.generate._one_step import one_step
from gradmatch.generate._spectrum import (
    ConsistencyLoss,
    PerceptualLoss,
    ProfileLoss,
    SpectrumLoss,
    radial_profile,
)

__all__ = [
    "ConsistencyLoss",
    "PerceptualLoss",
    "ProfileLoss",
    "ResShift",
    "SpectrumLoss",
    "Upscaled",
    "one_step",
    "radial_profile",
    "residual_roots",
]


class Upscaled(NamedTuple):
    """Images (n, c, scale h, scale w), and the network calls each of them took (n,)."""

    images: Tensor
    nfe: Tensor


def residual_roots(
    T: int = 15, kappa: float = 2.0, p: float = 0.3, min_noise: float = 0.04, eta_end: float = 0.99
) -> Tensor:
    """sqrt(eta_t) for t = 0..T-1 (T,) float64: from min(min_noise / kappa, min_noise, sqrt(0.001)) to ``eta_end``.

    >>> [round(float(r), 3) for r in residual_roots(3)]
    [0.02, 0.476, 0.99]
    """
    checks.whole("T", T, 2)
    start = min(
        checks.positive("min_noise", min_noise) / checks.positive("kappa", kappa), min_noise, 0.001**0.5
    )
    last = checks.fraction("eta_end", eta_end)
    place = torch.linspace(0, 1, T, dtype=torch.float64) ** checks.positive("p", p)
    roots: Tensor = start * (last / start) ** place
    return roots


class ResShift(nn.Module):
    """Super-resolution by residual shifting, in T steps or, distilled, in one.

    Args:
        network: (x, t (n,)) -> x_0 (n, c, h, w), with t = 0..T-1. Its x has c channels of x_t and, beside them, those
            of the enlarged image, or of the small one itself where latents are of its size; diffusers' networks too.
        T, kappa, p, min_noise, eta_end: of the path; 15, 2, 0.3, 0.04, 0.99 as published.
        scale: factor of the sides, 4 as published.
        autoencoder: as in :class:`gradmatch.generate.LatentFlow`, or None for pixels as they are.
        latent_scale: factor of the latents, or "auto" (1 / std of the first images seen).
        multiple: sides of the small image are padded by reflection to multiples of this, and the result cropped.
        seed: of the draws of :meth:`loss` where it is given no generator.

    Raises:
        InputError: kappa not above 0, T below 2, a network or autoencoder that is none.

    >>> model = ResShift(lambda x, t: x[:, 1:], scale=2)
    >>> images, nfe = model.sample(torch.rand(3, 1, 4, 4))
    >>> images.shape, nfe.tolist()
    (torch.Size([3, 1, 8, 8]), [15, 15, 15])
    """

    def __init__(
        self,
        network: Callable[..., Any],
        T: int = 15,
        kappa: float = 2.0,
        p: float = 0.3,
        min_noise: float = 0.04,
        eta_end: float = 0.99,
        scale: int = 4,
        autoencoder: Any = None,
        *,
        latent_scale: str | float = 1.0,
        multiple: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.require(callable(network), f"network is a {type(network).__name__}; it must be callable.")
        self.network = network
        self.path = ResidualPath(residual_roots(T, kappa, p, min_noise, eta_end), kappa)
        self.T, self.scale, self.multiple = (
            T,
            checks.whole("scale", scale),
            checks.whole("multiple", multiple),
        )
        self.codec = Codec(autoencoder, latent_scale, mean=True)
        self._generator = torch.Generator().manual_seed(checks.whole("seed", seed, 0))

    # --- the model ----------------------------------------------------------------------------------------------------

    def enlarged(self, lr: Tensor) -> Tensor:
        """y: the small image (n, c, h, w) enlarged bicubically and encoded."""
        return self.encode(F.interpolate(lr, scale_factor=self.scale, mode="bicubic", align_corners=False))

    def encode(self, images: Tensor) -> Tensor:
        """Latents of images: themselves, without an autoencoder."""
        if self.codec.autoencoder is None:
            return checks.floating("images", images)
        return self.codec.latents(images, self._generator)

    def x0(self, x: Tensor, t: Tensor, y: Tensor, lr: Tensor) -> Tensor:
        """The network's x_0 at (x, t): its input scaled to about unit size, the image of low resolution beside it."""
        noise = self.path.levels(t.double()).sigma.to(x).reshape(-1, 1, 1, 1)
        size = 3 * noise + 1 if self.codec.autoencoder is None else (noise.square() + 1).sqrt()
        beside = lr if lr.shape[2:] == x.shape[2:] else y
        said = self.network(torch.cat([x / size, beside.to(x)], 1), t)
        out = getattr(said, "sample", said)
        checks.require(
            isinstance(out, Tensor) and out.shape == x.shape,
            f"network gave {tuple(getattr(out, 'shape', ())) or type(out).__name__}; it must give {tuple(x.shape)}.",
        )
        found: Tensor = out
        return found

    def _model(self, y: Tensor, lr: Tensor) -> Model:
        def model(x: Tensor, t: Tensor, cond: Any = None) -> Prediction:
            return Prediction("x0", self.x0(x, t, y, lr))

        return model

    def decode(self, z: Tensor) -> Tensor:
        """Images of latents, differentiable in them, in float32: what a guide's ``decode`` is for."""
        coder = self.codec.autoencoder
        if coder is None:
            return z
        with untouched(coder):
            out = coder.decode(z.float() / self.codec.known())
        found: Tensor = getattr(out, "sample", out)
        return found

    def loss(self, hr: Tensor, lr: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error of x_0 at a random step.

        Args:
            hr: sharp images (n, c, scale h, scale w).
            lr: small ones (n, c, h, w).
            generator: of step and noise.
        """
        generator = generator or self._generator
        self._check_pair(hr, lr)
        x0, y = self.encode(hr), self.enlarged(lr)
        t = torch.randint(self.T, (len(x0),), generator=generator, device=generator.device).to(x0.device)
        noise = torch.randn(x0.shape, generator=generator, device=generator.device, dtype=x0.dtype).to(x0)
        x = self.path.towards(y).sample(x0, noise, t)
        return (self.x0(x, t, y, lr) - x0).square().mean()

    def _check_pair(self, hr: Tensor, lr: Tensor) -> None:
        wanted = (*lr.shape[:2], *(self.scale * s for s in lr.shape[2:]))
        checks.require(
            hr.shape == wanted,
            f"hr is of shape {tuple(hr.shape)} and lr of {tuple(lr.shape)}; hr must be {self.scale} times as large, "
            f"{wanted}.",
        )
        checks.require(
            all(s % self.multiple == 0 for s in lr.shape[2:]),
            f"lr has sides {tuple(lr.shape[2:])}; in training they must be multiples of {self.multiple}.",
        )

    def fit(
        self,
        hr: Tensor,
        lr: Tensor | Callable[[Tensor, torch.Generator], Tensor],
        steps: int,
        *,
        batch: int = 64,
        rate: float = 5e-5,
        schedule: str = "constant",
        ema: float | None = 0.999,
        seed: int = 0,
        progress: Progress | None = None,
        run: RunFolder | None = None,
    ) -> Trained:
        """Train the network with AdamW; 64, 5e-5 and 0.999 as published (500,000 steps).

        Args:
            hr: sharp images (m, c, scale h, scale w).
            lr: the small ones, or a degradation (hr batch, generator) -> small ones.
            ema: decay of averaged weights, which replace the trained ones at the end.
            steps, batch, rate, schedule, seed, progress, run: as in :func:`gradmatch.core.training.train`.
        """
        checks.floating("hr", hr)
        if isinstance(lr, Tensor):
            checks.same_length("hr", hr, "lr", lr)
            self._check_pair(hr, checks.floating("lr", lr))

        def loss(generator: torch.Generator) -> Tensor:
            index = torch.randint(len(hr), (batch,), generator=generator, device=generator.device).to(
                hr.device
            )
            small = lr[index] if isinstance(lr, Tensor) else lr(hr[index], generator)
            return self.loss(hr[index], small, generator)

        found = train(
            self, loss, steps, lr=rate, schedule=schedule, average=ema, seed=seed, progress=progress, run=run
        )
        if found.averaged:
            self.load_state_dict(found.averaged)
        return found

    # --- sampling -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        lr: Tensor,
        steps: str | int = "ddim",
        guide: GradientGuide | Sequence[GradientGuide] | None = None,
        *,
        noise: Tensor | None = None,
        seed: int = 0,
    ) -> Upscaled:
        """Sharp images of small ones.

        Args:
            lr: (n, c, h, w), of any sides.
            steps: "ddim" (the T deterministic steps), "ancestral" (each with fresh noise), or how many deterministic
                ones; 1 is for a distilled network.
            guide: gradient guides, in order; ``reference="lr"`` is y.
            noise: of the start, of the shape of y; default drawn by ``seed``.
            seed: of all noise.

        Raises:
            InputError: images that are not finite, or steps other than these.
        """
        padded = self._padded(lr)
        start, y = self._start(padded, noise, seed)
        path, guides = (
            self.path.towards(y),
            [guide] if isinstance(guide, GradientGuide) else list(guide or ()),
        )

        model = self._model(y, padded)
        with evaluating(self):
            if steps == "ancestral":
                z, nfe = self._ancestral(model, path, start, guides, seed)
            else:
                count = self.T if steps == "ddim" else steps
                checks.require(
                    not isinstance(count, str),
                    f"steps is {steps!r}; it must be 'ddim', 'ancestral' or whole.",
                )
                times = torch.linspace(self.T - 1, -1, checks.whole("steps", count, 1, self.T) + 1).round()
                found = Solver(times, "ddim").run(model, path, start, hooks=guides)
                z, nfe = found.x, found.calls
        images = z if self.codec.autoencoder is None else self.codec.images(z)
        return Upscaled(images[..., : self.scale * lr.shape[2], : self.scale * lr.shape[3]], nfe)

    def _padded(self, lr: Tensor) -> Tensor:
        checks.require(lr.ndim == 4 and lr.is_floating_point(), f"lr is {lr.dtype} of shape {tuple(lr.shape)}; "
                       "it must be floating point (n, c, h, w).")  # fmt: skip
        high, wide = (-s % self.multiple for s in checks.finite("lr", lr).shape[2:])
        return F.pad(lr, (0, wide, 0, high), mode="reflect") if high or wide else lr

    def _start(self, lr: Tensor, noise: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
        y = self.enlarged(lr)
        if noise is None:
            noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype).to(
                y.device
            )
        return self.path.towards(y).prior(noise, float(self.T - 1)), y

    def _ancestral(
        self, model: Model, path: ResidualPath, x: Tensor, guides: list[GradientGuide], seed: int
    ) -> tuple[Tensor, Tensor]:
        """Each step drawn from q(x_{t-1} | x_t, x_0): no noise at t = 0."""
        calls, generator = Calls(len(x)), torch.Generator().manual_seed(seed_of(seed, 1))
        guided = calls.counted(model)
        for guide in guides:
            guided = guide.wrap(guided, path)
        etas = path.roots.square().tolist()  # from the clean end, 0
        for t in reversed(range(self.T)):
            before, eta = etas[t], etas[t + 1]
            x0 = path.convert(guided(x, float(t)), "x0", x, float(t)).tensor
            spread = path.kappa * (before / eta * (eta - before)) ** 0.5
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
            x = before / eta * x + (eta - before) / eta * x0 + spread * noise
        return checks.finite("the sample", x), calls.total()

    # --- one step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def pairs(self, lr: Tensor, hr: Tensor | None = None, *, seed: int = 0, chunk: int = 256) -> PairStore:
        """{"lr", "start", "x0"[, "hr"]}: where this model's T deterministic steps go from one noise for each image."""
        checks.floating("lr", lr)
        parts = []
        for k, small in enumerate(torch.split(lr, chunk)):
            start, y = self._start(small, None, seed_of(seed, k))
            solver, path = Solver(range(self.T - 1, -2, -1), "ddim"), self.path.towards(y)
            with evaluating(self):
                found = solver.run(self._model(y, small), path, start)
            parts.append({"lr": small, "start": start, "x0": found.x})
        store = PairStore.joined(parts)
        return store if hr is None else PairStore({**store.tensors, "hr": hr})

    def distill(self, teacher: ResShift, lr: Tensor, steps: int, **options: Any) -> Trained:
        """Teach this model to give in one step what ``teacher`` reaches in T; see :func:`one_step`."""
        return one_step(self, teacher, lr, steps, **options)
