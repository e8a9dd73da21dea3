"""f-distill: one-step generators by matching distributions in any f-divergence (Xu, Nie, Vahdat; 2025, 2502.15681).

With the teacher's distribution p and the student's q, both noised to level t, r = p_t / q_t and D_f = E_q f(p / q),

    grad D_f = -E[h(r) (score_p - score_q)(x_t) alpha_t dG/dtheta],   h(r) = f''(r) r^2,

so that one loop serves every divergence and only the weight of a sample differs: 1 for reverse KL (DMD, VSD), r for KL,
r / (1 + r) for Jensen-Shannon, ... The ratio comes from a discriminator's logits, r = exp(mean logit).

The student's step, with x0 = G(z), x_t = alpha x0 + sigma noise and both networks' x0 predicted there:

    w = h / (mean |x0 - x_p| + 1e-6) of the sample,   g = w (x_q - x_p),
    loss = 1/2 mean (x0 - sg[x0 - g])^2 + gan_weight * softplus(-l);

every other step trains the fake network to denoise the student's samples, and the discriminator to tell them from data.

Readings: constants of h are kept (they cancel); AdamW with the decay of 0.01 that the authors' configurations have; the
R1 term by finite differences as in their code, or by the exact gradient.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.core import checks
from gradmatch.core import divergence as divergences
from gradmatch.core.bridge import Denoiser
from gradmatch.core.divergence import RatioWeight, ratio_of
from gradmatch.core.guidance import ClassifierFreeGuidance
from gradmatch.core.path import AffinePath
from gradmatch.core.regress import gradient_loss
from gradmatch.core.sampler import Model
from gradmatch.core.store import RunFolder
from gradmatch.core.training import Progress, TrainState, require_finite_weights, seed_of
from gradmatch.generate._common import as_model, in_eval
from gradmatch.generate._discriminator import Discriminator
from gradmatch.generate._noise_times import NoiseTimes, Times, copied, drawn

__all__ = ["FDistill"]


class FDistill:
    """Distils a diffusion or flow teacher into a generator of one call.

    Args:
        teacher: a network from ``from_diffusers``; or ``(x_t, t)`` or ``(x_t, t, cond)`` -> prediction, with its
            ``kind`` and ``schedule``. Never changed.
        student: the same form, called at pure noise and the last time; default a copy of the teacher.
        fake: the same form, learns the student's scores; default a copy of the teacher. A function without
            parameters is taken as exact.
        discriminator: None, "features" (a head on the teacher's), or a module ``(x_t, t[, cond])`` -> logits (n, ...).
        divergence: "rkl", "sf", "js" (default), "sh", "kl", "jf" or "neyman".
        schedule: the path of the noise; a diffusers network has its own.
        cond: condition of every step and sample that names none.
        kind: what a plain teacher predicts: "x0", "noise", "v", "velocity" or "score".
        gan_weight: of the generator's part of the game; 1e-3 (CIFAR-10, SD 1.5), 3e-3 (ImageNet-64). At 0 the
            discriminator only estimates ratios.
        student_every: the student moves every so many iterations, 5 (10 for SD 1.5).
        ratio_clip, time_bins, ratio_ema: of the weights, see :class:`gradmatch.core.divergence.RatioWeight`; 0.5 as
            ratio_ema for ImageNet-64.
        guidance, null: classifier-free guidance of the teacher, and its null condition.
        ratio_fn: ``(x_t, t, cond) -> p_t / q_t`` (n,) in place of a discriminator's ratio.
        features: parts of the teacher to read; default its middle.
        times: of noising: "uniform" within ``ends``, "polynomial" (EDM's, rho = 7), or (n, generator) -> t (n,).
        ends: (low, high) of these times; default 0.001 to 0.999 of the path (0.002 to 80 for EDM's).
        lr, fake_lr, discriminator_lr: of AdamW; 1e-4 (CIFAR-10; 2e-6 for ImageNet-64), the others default to ``lr``.
        r1: weight of the discriminator's gradient penalty (published: 1), by ``r1_form`` "difference" (logits of data
            and of data with noise of 0.1, squared) or "gradient" (squared norm of the logit's gradient).
        ema: decay of an average of the student, used by :meth:`sample`.
        seed: decides every draw.

    Raises:
        InputError: an unknown divergence; one other than "rkl" with neither discriminator nor ``ratio_fn``; a teacher
            whose kind is not declared; options out of range.

    >>> from gradmatch.core.path import LinearPath
    >>> from gradmatch.zoo import mlp_velocity
    >>> distill = FDistill(mlp_velocity(2, (8, 8)), discriminator="features", schedule=LinearPath(), kind="velocity")
    >>> sorted(distill.step(torch.randn(16, 2)))  # the other networks come first
    ['discriminator', 'fake']
    >>> distill.sample(3, shape=(2,)).shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        teacher: Any,
        student: Any = None,
        fake: Any = None,
        discriminator: str | nn.Module | None = None,
        divergence: str = "js",
        schedule: AffinePath | None = None,
        cond: Any = None,
        *,
        kind: str | None = None,
        gan_weight: float = 1e-3,
        student_every: int = 5,
        ratio_clip: tuple[float, float] | None = (0.1, 20.0),
        time_bins: int = 10,
        ratio_ema: float = 0.0,
        guidance: float | None = None,
        null: Any = None,
        ratio_fn: Callable[[Tensor, Tensor, Any], Tensor] | None = None,
        features: Sequence[str] | None = None,
        times: str | Times = "uniform",
        ends: tuple[float, float] | None = None,
        lr: float = 1e-4,
        fake_lr: float | None = None,
        discriminator_lr: float | None = None,
        weight_decay: float = 1e-2,
        r1: float = 0.0,
        r1_form: str = "difference",
        ema: float | None = None,
        seed: int = 0,
    ) -> None:
        _required(divergence, discriminator, ratio_fn)
        self.teacher, self.cond, self.ratio_fn = teacher, cond, ratio_fn
        self._teacher, self.path = _declared(teacher, schedule, kind)
        self.student = copied(teacher) if student is None else student
        self.fake = copied(teacher) if fake is None else fake
        modules = [m.module if isinstance(m, Denoiser) else m for m in (teacher, self.student, self.fake)]
        own = [m for m in modules if isinstance(m, nn.Module)]
        checks.require(
            len({id(m) for m in own}) == len(own),
            "teacher, student and fake share a network; each must be its own (None makes a copy of the teacher).",
        )
        said = str(kind or getattr(teacher, "kind", None))
        self._student, self._fake = (as_model(m, self.path, said)[0] for m in (self.student, self.fake))
        self.guide: Model = self._teacher
        if guidance is not None:
            self.guide = ClassifierFreeGuidance(guidance, null).wrap(self._teacher, self.path)
        self.gan_weight = checks.nonnegative("gan_weight", gan_weight)
        self.discriminator = None
        if discriminator is not None:
            self.discriminator = Discriminator(discriminator, teacher, features, r1=r1, form=r1_form)
        self.times = NoiseTimes(self.path, times, ends)
        self.weigh = RatioWeight(divergence, self.times.ends, bins=time_bins, ema=ratio_ema, clip=ratio_clip)
        self.seed, self.iteration = checks.whole("seed", seed, 0), 0
        self.rates = {
            "student": checks.positive("lr", lr),
            "fake": checks.positive("fake_lr", fake_lr or lr),
            "discriminator": checks.positive("discriminator_lr", discriminator_lr or lr),
        }
        if self.rates["fake"] < lr:
            warnings.warn(
                f"fake_lr is {self.rates['fake']:g}, below the student's {lr:g}; a fake network that lags behind is "
                "the usual cause of divergence.",
                stacklevel=2,
            )
        self.weight_decay = checks.nonnegative("weight_decay", weight_decay)
        self.states: dict[str, TrainState] = {}
        self._train("student", self.student, ema)
        self._train("fake", self.fake)
        self._train("discriminator", self.discriminator and self.discriminator.module)
        checks.require("student" in self.states, "student has no parameters; there is nothing to train.")
        others = "fake" in self.states or self.discriminator is not None
        self.student_every = checks.whole("student_every", student_every, 2 if others else 1)
        first = next(iter(self.states["student"].now.values()))
        self.device, self.dtype = first.device, torch.promote_types(first.dtype, torch.float32)

    def step(
        self, real: Tensor | None = None, cond: Any = None, *, shape: tuple[int, ...] | None = None
    ) -> dict[str, float]:
        """One iteration: the student's every ``student_every``-th time, else the other networks'.

        Args:
            real: data (n, ...); only a discriminator looks at them.
            cond: condition of the batch, as the teacher takes it.
            shape: (n, ...) of the batch where there are no data.

        Returns:
            The losses of the iteration; the student's also has the mean "ratio", "h_min", "h_mean", "h_max" of the
            weights, and the share of the batch that they leave "effective", mean(h)^2 / mean(h^2).

        Raises:
            InputError: no data where a discriminator needs them, or a loss that is not finite, named with its step.
        """
        checks.require(
            real is not None or (shape is not None and self.discriminator is None),
            "real is None; a discriminator needs data, and without one give shape=(n, ...).",
        )
        size = tuple(real.shape) if real is not None else tuple(shape or ())
        checks.require(bool(size) and size[0] > 0, f"the batch is of shape {size}; one example is needed.")
        cond = self.cond if cond is None else cond
        generator = torch.Generator(self.device).manual_seed(seed_of(self.seed, self.iteration))
        if real is not None:
            real = checks.finite("real", real.to(self.device, self.dtype))
        self._ready(size, cond)
        z, noise = (
            torch.randn(size, generator=generator, device=self.device, dtype=self.dtype) for _ in range(2)
        )
        t = self.times.draw(size[0], generator).to(self.dtype)
        self.iteration += 1
        with in_eval(self.teacher), torch.enable_grad():
            if self.iteration % self.student_every == 0:
                return self._student_step(z, noise, t, cond)
            return self._other_step(real, z, noise, t, cond, generator)

    def generate(self, z: Tensor, cond: Any = None) -> Tensor:
        """x0 = G(z) (n, ...) of standard normal noise z, in one call, with its graph."""
        t = torch.full((len(z),), self.times.last, device=z.device, dtype=z.dtype)
        x = self.times.sigma * z
        return self.path.convert(self._student(x, t, cond), "x0", x, t).tensor

    @torch.no_grad()
    def sample(self, z: Tensor | int, cond: Any = None, *, shape: tuple[int, ...] | None = None) -> Tensor:
        """Data (n, ...) in one call of the (averaged) student.

        Args:
            z: standard normal noise (n, ...), or a number of samples with the ``shape`` of one.
            cond: their condition.
        """
        if not isinstance(z, Tensor):
            checks.require(shape is not None, "shape is None; a number of samples needs the shape of one.")
            generator = torch.Generator().manual_seed(self.seed)
            z = torch.randn(checks.whole("z", z), *(shape or ()), generator=generator, dtype=self.dtype)
        z = checks.finite("z", z).to(self.device)
        state = self.states["student"]
        now = {k: p.detach().clone() for k, p in state.now.items()} if state.shadow else {}
        try:
            for name, value in state.shadow.items():
                state.now[name].copy_(value)
            with in_eval(self.student):
                return self.generate(z, self.cond if cond is None else cond)
        finally:
            for name, value in now.items():
                state.now[name].copy_(value)

    def fit(
        self,
        data: Any,
        iterations: int,
        *,
        batch: int = 256,
        progress: Progress | None = None,
        run: RunFolder | None = None,
        save_every: int = 500,
    ) -> list[dict[str, float]]:
        """Iterations on batches of ``data``, up to ``iterations`` in all; what every student step reported.

        Args:
            data: tensor (N, ...), a pair of it and its conditions (N, ...), or an iterable of batches of either.
            batch: examples drawn with replacement each iteration, from tensors.
            progress: called with (done, iterations, figures).
            run: a folder to keep the state in, every ``save_every`` iterations, and to go on from (tensors only).
        """
        checks.whole("iterations", iterations)
        draw = drawn(data, checks.whole("batch", batch), self.seed, run is not None)
        if run is not None and self.iteration == 0 and (found := run.load()) is not None:
            real, cond = draw(0)
            self._ready(tuple(real.shape), cond)
            self.restore(found[1])
        figures = []
        while self.iteration < iterations:
            real, cond = draw(self.iteration)
            found_now = self.step(real, cond)
            if "h_mean" in found_now:
                figures.append(found_now)
            if progress is not None:
                progress(self.iteration, iterations, found_now)
            last = self.iteration == iterations
            if last or (run is not None and self.iteration % save_every == 0):
                for name, state in self.states.items():
                    require_finite_weights(f"{name} has weights", state.now.values(), self.iteration)
                if run is not None:
                    run.save(self.iteration, self.tensors())
        return figures

    def tensors(self) -> dict[str, Tensor]:
        """Every network, optimiser and running mean, by name; :meth:`restore` takes them back."""
        found = {"iteration": torch.tensor(self.iteration), "ratio_means": self.weigh.means.clone()}
        for name, state in self.states.items():
            found |= {f"{name}/{k}": v for k, v in state.tensors().items()}
        return found

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what :meth:`tensors` gave (a features head must have seen a batch)."""
        for name, state in self.states.items():
            state.restore(
                {k.removeprefix(f"{name}/"): v for k, v in tensors.items() if k.startswith(f"{name}/")}
            )
        self.weigh.means.copy_(tensors["ratio_means"])
        self.iteration = int(tensors["iteration"])

    def _student_step(self, z: Tensor, noise: Tensor, t: Tensor, cond: Any) -> dict[str, float]:
        x0 = self.generate(z, cond)
        x_t = self.path.sample(x0, noise, t)
        place, logits = x_t.detach(), None
        with torch.no_grad():
            x_q = self._x0(self._fake, place, t, cond)
        if self.discriminator is None:
            with torch.no_grad():
                x_p = self._x0(self.guide, place, t, cond)
        else:
            said, logits = self.discriminator.judge(self.guide, x_t, t, cond, self.gan_weight > 0)
            x_p = self.path.convert(said, "x0", place, t).tensor
        ratio = self._ratio(place, t, cond, logits)
        h = self.weigh(ratio, t).to(x0)
        w = h / ((x0.detach() - x_p).abs().flatten(1).mean(1) + 1e-6)
        matching = gradient_loss(x0, x_q - x_p, w)
        game = matching.new_zeros(()) if logits is None else F.softplus(-logits).mean()
        self._update({"student": matching + self.gan_weight * game if self.gan_weight else matching})
        figures = {"matching": matching.detach(), "gan": game.detach(), "ratio": ratio.mean()}
        figures |= {"h_min": h.min(), "h_mean": h.mean(), "h_max": h.max()}
        figures["effective"] = h.mean().square() / h.square().mean()
        return {k: float(v) for k, v in figures.items()}

    def _other_step(
        self, real: Tensor | None, z: Tensor, noise: Tensor, t: Tensor, cond: Any, generator: torch.Generator
    ) -> dict[str, float]:
        with torch.no_grad():
            x0 = self.generate(z, cond)
            x_t = self.path.sample(x0, noise, t)
        losses = {}
        if "fake" in self.states:
            said = self._fake(x_t, t, cond)
            losses["fake"] = (said.tensor - self.path.target(said.kind, x0, noise, t)).square().mean()
        if self.discriminator is not None and real is not None:
            t_real = self.times.draw(len(real), generator).to(self.dtype)
            own = torch.randn(real.shape, generator=generator, device=real.device, dtype=self.dtype)
            losses["discriminator"] = self.discriminator.loss(
                self._teacher, self.path, (real, own, t_real), (x_t, t), cond, generator
            )
        self._update(losses)
        return {k: float(v.detach()) for k, v in losses.items()}

    def _x0(self, model: Model, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        return self.path.convert(model(x_t, t, cond), "x0", x_t, t).tensor

    def _ratio(self, x_t: Tensor, t: Tensor, cond: Any, logits: Tensor | None) -> Tensor:
        if self.ratio_fn is not None:
            ratio = self.ratio_fn(x_t, t, cond)
            checks.require(
                ratio.shape == t.shape and bool((ratio >= 0).all()),
                f"ratio_fn gave {tuple(ratio.shape)}; it must give ratios of at least 0, ({len(t)},).",
            )
            return ratio
        return torch.ones_like(t) if logits is None else ratio_of(logits)

    def _update(self, losses: dict[str, Tensor]) -> None:
        """Step each named network down its own loss; no other gets a gradient."""
        for name, loss in losses.items():
            value = float(loss.detach())
            if not math.isfinite(value):
                checks.refuse(
                    f"the loss of {name} in iteration {self.iteration} is {value}; training stops there."
                )
        for name, loss in losses.items():
            state = self.states[name]
            parameters = list(state.now.values())
            for p, g in zip(
                parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
            ):
                p.grad = g
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            state.follow()

    def _ready(self, size: tuple[int, ...], cond: Any) -> None:
        """Build a head on the teacher's features once their shapes can be seen."""
        if self.discriminator is None:
            return
        x = torch.zeros(size, device=self.device, dtype=self.dtype)
        t = torch.full((size[0],), self.times.ends[1], device=self.device, dtype=self.dtype)
        with in_eval(self.teacher):
            made = self.discriminator.build(self._teacher, x, t, cond, self.seed)
        if made:
            self._train("discriminator", self.discriminator.module)

    def _train(self, name: str, model: Any, ema: float | None = None) -> None:
        """Give a network an optimiser; a function without parameters needs none."""
        module = model.module if isinstance(model, Denoiser) else model
        if not isinstance(module, nn.Module) or not any(True for _ in module.parameters()):
            return
        if ema is not None:
            checks.fraction("ema", ema, zero=True, one=False)
        optimizer = torch.optim.AdamW(
            module.requires_grad_(True).parameters(), lr=self.rates[name], weight_decay=self.weight_decay
        )
        self.states[name] = TrainState(module, optimizer, ema)


def _required(name: str, discriminator: Any, ratio_fn: Any) -> None:
    divergences.divergence(name)
    checks.require(
        name == "rkl" or discriminator is not None or ratio_fn is not None,
        f"divergence is {name!r}, which needs density ratios; give discriminator='features' or a ratio_fn, or use "
        "'rkl'.",
    )


def _declared(teacher: Any, schedule: AffinePath | None, kind: str | None) -> tuple[Model, AffinePath]:
    """The teacher as a model on its path."""
    kind, path = kind or getattr(teacher, "kind", None), schedule or getattr(teacher, "path", None)
    checks.require(
        isinstance(kind, str),
        "kind is None; say what the teacher predicts: 'x0', 'noise', 'v', 'velocity' or 'score'.",
    )
    checks.require(
        path is not None,
        "schedule is None; a plain teacher needs the path of its noise, such as LinearPath().",
    )
    model, found, _ = as_model(teacher, path, str(kind))
    return model, found
