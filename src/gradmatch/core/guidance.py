"""Guidance as hooks of a solver: classifier-free, by gradients of any loss, and straight-through on a simplex.

One scale for all gradients: a shift of x0 in root-mean-square units, since scales of the noise do not carry over from
one schedule to another. What :meth:`Hook.wrap` returns is a model like any other, so that guided models also go into
everything else that takes a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core.path import AffinePath, Path, Prediction, ResidualPath, Time
from gradmatch.core.sampler import Calls, Hook, Model, State, part

NOISE_FORM_CAP = 0.1


class _OfEachExample(Hook):
    """What a hook holds for each example, where a solver calls the model on some of them only (dopri5)."""

    _calls: Calls | None = None

    def before_step(self, state: State) -> None:
        self._calls = state.calls

    def after_step(self, state: State) -> None:
        self._calls = None

    def _now(self, held: Any) -> Any:
        """``held`` for the examples of the present call."""
        calls = self._calls
        return held if calls is None or calls.index is None else part(held, calls.index, calls.examples)


class ClassifierFreeGuidance(_OfEachExample):
    """null + scale * (conditional - null), both in one call of twice the batch.

    Args:
        scale: 1 is the conditional model itself, 0 the null model; each is then the only call.
        null: the condition that means "none": a tensor (n, ...), (1, ...) or of no axis, or a mapping of them.
        interval: (low, high) of path time within which to guide; outside, the conditional model alone.
    """

    def __init__(self, scale: float, null: Any, interval: tuple[float, float] | None = None) -> None:
        self.scale, self.null, self.interval = checks.number("scale", scale), null, interval
        checks.require(
            null is not None or scale == 1,
            f"guidance is {scale:g} and no null condition is given; guidance other than 1 needs one.",
        )

    def wrap(self, model: Model, path: Path) -> Model:
        if self.scale == 1:
            return model

        def guided(x: Tensor, t: Time, cond: Any = None) -> Prediction:
            inside = within(t, self.interval)
            if not bool(torch.as_tensor(inside).any()):
                return model(x, t, cond)
            null = expanded(self._now(self.null), len(x))
            if self.scale == 0 and self.interval is None:
                return model(x, t, null)
            times = torch.cat([t, t]) if isinstance(t, Tensor) else t
            both = model(torch.cat([x, x]), times, joined(cond, null))
            with_cond, without = both.tensor.chunk(2)
            scale: float | Tensor = self.scale
            if isinstance(inside, Tensor):
                scale = torch.where(inside, self.scale, 1.0).to(x).reshape(-1, *[1] * (x.ndim - 1))
            return Prediction(both.kind, without + scale * (with_cond - without))

        return guided


class GradientGuide(_OfEachExample):
    """Moves every x0 a little down the gradient of some losses: x0 - scale * g, with g of RMS 1 for each example.

    Args:
        losses: functions (x0 (n, ...), reference) -> scalar.
        weights: one for each loss; default 1.
        scale: length of the shift, in RMS units of x0 a step; 0 leaves everything as it is, bit for bit.
        through: "x0" takes the gradient at the prediction, "network" through the network at x (a backward pass).
        interval: (low, high) of path time within which to guide; outside it no gradient is computed.
        reference: what the losses compare with: a tensor (n, ...), a function of x0, "lr" for the third end point of
            a residual path, or None.
        form: "x0", or "noise": the shift that adding ``scale * sigma * g`` to the noise amounts to,
            scale * sigma^2 / alpha, held at 0.1 since it grows without bound towards noise.
        decode: from x0 to what the losses see (a frozen decoder of latents).

    Raises:
        InputError: options as above not kept, or a loss that gives no scalar.
    """

    def __init__(
        self,
        losses: Sequence[Callable[[Tensor, Any], Tensor]],
        weights: Sequence[float] | None = None,
        scale: float = 0.01,
        *,
        through: str = "x0",
        interval: tuple[float, float] | None = None,
        reference: Any = None,
        form: str = "x0",
        decode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.losses, self.weights = (
            list(losses),
            list(weights) if weights is not None else [1.0] * len(losses),
        )
        checks.require(bool(self.losses), "losses is empty; at least one is needed.")
        checks.same_length("losses", self.losses, "weights", self.weights)
        self.scale = checks.nonnegative("scale", scale)
        self.through = checks.one_of("through", through, ("x0", "network"))
        self.form = checks.one_of("form", form, ("x0", "noise"))
        if isinstance(reference, str):
            checks.one_of("reference", reference, ("lr",))
        self.interval, self.reference, self.decode = interval, reference, decode

    def wrap(self, model: Model, path: Path) -> Model:
        affine = as_affine(path)
        if self.scale == 0:
            return model

        def guided(x: Tensor, t: Time, cond: Any = None) -> Prediction:
            inside = within(t, self.interval)
            if not bool(torch.as_tensor(inside).any()):
                return model(x, t, cond)
            with torch.set_grad_enabled(self.through == "network"):
                place = x.detach().requires_grad_(self.through == "network")
                x0 = affine.convert(model(place, t, cond), "x0", place, t).tensor
            g = self.direction(x0, affine, None if self.through == "x0" else place)
            size = self._size(affine, t)
            if isinstance(inside, Tensor):
                size = torch.as_tensor(size).to(x) * inside
            if isinstance(size, Tensor) and size.ndim:
                size = size.to(x).reshape(-1, *[1] * (x.ndim - 1))
            return Prediction("x0", x0.detach() - size * g)

        return guided

    def direction(self, x0: Tensor, path: Path, place: Tensor | None = None) -> Tensor:
        """The gradient in ``place`` (default x0 itself), scaled to RMS 1 for each example."""
        with torch.enable_grad():
            if place is None:
                place = x0 = x0.detach().requires_grad_()
            total = self._loss(x0, path)
            checks.require(
                total.requires_grad, "the guide's losses have no gradient in x0; one must depend on it."
            )
            (g,) = torch.autograd.grad(total, place)
        return unit_rms(checks.finite("the guide's gradient", g))

    def _loss(self, x0: Tensor, path: Path) -> Tensor:
        reference = self.reference
        if isinstance(reference, str):
            checks.require(
                isinstance(path, ResidualPath), "reference is 'lr'; only a residual path has that end point."
            )
            reference = getattr(path, "y", None)
        elif callable(reference) and not isinstance(reference, Tensor):
            reference = reference(x0.detach())
        elif isinstance(reference, Tensor):
            reference = self._now(reference)
            entries = len(reference) if reference.ndim else 1
            checks.require(
                entries in (1, len(x0)),
                f"reference has {entries} entries for {len(x0)} examples; it must "
                "have one for each (classifier-free guidance doubles them for the hooks before it: put it first).",
            )
        seen = x0 if self.decode is None else self.decode(x0)
        total = x0.new_zeros(())
        for loss, weight in zip(self.losses, self.weights, strict=True):
            value = loss(seen, reference)
            checks.require(
                isinstance(value, Tensor) and value.ndim == 0,
                f"a guide's loss gave {tuple(getattr(value, 'shape', ())) or type(value).__name__}; "
                "it must give a scalar tensor.",
            )
            total = total + weight * value
        return total

    def _size(self, path: AffinePath, t: Time) -> float | Tensor:
        if self.form == "x0":
            return self.scale
        levels = path.levels(torch.as_tensor(t, dtype=torch.float64))
        size = self.scale * levels.sigma.square() / levels.alpha.clamp_min(1e-8)
        capped = size.clamp_max(NOISE_FORM_CAP)
        return capped if capped.ndim else float(capped)


class StraightThroughGuide(Hook):
    """Steers points of a simplex by the gradient of a score that knows only one-hot sequences.

    At every step sequences are drawn from q, and x is multiplied by exp(scale * dt * G / x) and normalised, where G is
    the mean over the draws of :func:`straight_through_gradient`; for q = x, G / x is the centred gradient itself.

    Args:
        score: (m, L, K) one-hot -> (m,), higher is better, differentiable.
        scale: gamma; 0 leaves everything as it is.
        samples: draws a step, all in one call.
        at: q is the point itself ("x") or the model's posterior ("prediction").
        generator: of the draws.
    """

    def __init__(
        self,
        score: Callable[[Tensor], Tensor],
        scale: float,
        *,
        samples: int = 10,
        at: str = "x",
        generator: torch.Generator,
    ) -> None:
        self.score, self.scale = score, checks.nonnegative("scale", scale)
        self.samples, self.at = checks.whole("samples", samples), checks.one_of("at", at, ("x", "prediction"))
        self.generator = generator
        self._push: Tensor | None = None

    def before_step(self, state: State) -> None:
        self._push = None

    def on_prediction(self, prediction: Prediction, x: Tensor, t: Time, state: State) -> Prediction:
        if self.scale > 0 and self._push is None:
            q = x if self.at == "x" else prediction.tensor
            gradient = straight_through_gradient(q, self.score, self.samples, self.generator)
            self._push = gradient / x.clamp_min(torch.finfo(x.dtype).tiny)
        return prediction

    def after_step(self, state: State) -> None:
        if self._push is None:
            return
        exponent = self.scale * abs(state.t_next - state.t) * self._push
        state.x = (state.x.log() + exponent.clamp(max=80)).softmax(-1)


def straight_through_gradient(
    q: Tensor, score: Callable[[Tensor], Tensor], samples: int, generator: torch.Generator
) -> Tensor:
    """Mean over draws s ~ Cat(q) of d score(s + q - sg(q)) / d logits of q = q * (a - <q, a>), a = d score / ds.

    Args:
        q: token distributions (n, L, K).
        score: (m, L, K) one-hot -> (m,), differentiable.
        samples: draws, all in one call of the score.

    Returns:
        (n, L, K), zero-sum over K.

    Raises:
        InputError: a score that is not one number for each sequence, or not differentiable.
    """
    n, length, k = q.shape
    drawn = torch.multinomial(q.reshape(-1, k), samples, replacement=True, generator=generator)
    hot = torch.nn.functional.one_hot(drawn.T.reshape(samples * n, length), k).to(q)
    with torch.enable_grad():
        hot.requires_grad_()
        value = score(hot)
        checks.require(
            isinstance(value, Tensor) and value.shape == (samples * n,),
            f"the guide gave {tuple(getattr(value, 'shape', ()))}; it must give one number for each sequence, "
            f"({samples * n},).",
        )
        checks.require(value.requires_grad, "the guide's value has no gradient; it must be differentiable.")
        (a,) = torch.autograd.grad(value.sum(), hot)
    checks.finite("the guide's gradient", a)
    a = a.reshape(samples, n, length, k).mean(0)
    return q * (a - (q * a).sum(-1, keepdim=True))


def unit_rms(g: Tensor) -> Tensor:
    """``g`` (n, ...) divided by each example's root mean square (+ 1e-8)."""
    rms = g.flatten(1).square().mean(1).sqrt()
    return g / (rms + 1e-8).reshape(-1, *[1] * (g.ndim - 1))


def as_affine(path: Path) -> AffinePath:
    """``path``, refused if its predictions have no x0."""
    if not isinstance(path, AffinePath):
        checks.refuse(f"the path is a {type(path).__name__}; a gradient guide needs one that converts to x0.")
    return path


def within(t: Time, interval: tuple[float, float] | None) -> bool | Tensor:
    """Whether t lies in the closed interval (always, without one)."""
    if interval is None:
        return True
    low, high = interval
    return (t >= low) & (t <= high) if isinstance(t, Tensor) else low <= t <= high


def expanded(cond: Any, n: int) -> Any:
    """A condition for one or n examples as one for n."""
    if isinstance(cond, Mapping):
        return {k: expanded(v, n) for k, v in cond.items()}
    if not isinstance(cond, Tensor):
        return cond
    wide = cond.reshape(1, *cond.shape) if cond.ndim == 0 else cond
    return wide.expand(n, *wide.shape[1:]) if len(wide) == 1 else wide


def joined(a: Any, b: Any) -> Any:
    """Two conditions as one for the doubled batch."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        checks.require(set(a) == set(b), f"cond has {sorted(a)} and null has {sorted(b)}; they must agree.")
        return {k: joined(a[k], b[k]) for k in a}
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.cat([a, b.to(a)])
    checks.require(
        type(a) is type(b) and not isinstance(a, Tensor | Mapping),
        f"cond is a {type(a).__name__} and null a {type(b).__name__}; they must be of one kind.",
    )
    return a
