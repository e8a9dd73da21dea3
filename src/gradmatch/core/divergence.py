"""f-divergences D_f(p||q) = E_q f(p/q), and how each weighs a density ratio in the gradient of a generator.

For samples x of q, d D_f / d theta = -E[h(r) (score_p - score_q) dx/dtheta] with r = p/q and h(r) = f''(r) r^2.
``r`` is always target over generator; the other convention swaps "kl" and "rkl".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradmatch.core import checks

_LEAST = 1e-6
_LOGITS = 10.0


class Divergence(NamedTuple):
    """A convex f with f(1) = 0, and its weight h(r) = f''(r) r^2 up to a constant factor."""

    f: Callable[[Tensor], Tensor]
    weight: Callable[[Tensor], Tensor]


DIVERGENCES: dict[str, Divergence] = {
    "rkl": Divergence(lambda r: -r.log(), torch.ones_like),
    "sf": Divergence(lambda r: (r + 1) * (0.5 + 0.5 / r).log(), lambda r: 1 / (1 + r)),
    "js": Divergence(lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(), lambda r: r / (1 + r)),
    "sh": Divergence(lambda r: (1 - r.sqrt()).square(), lambda r: r.sqrt() / 2),
    "kl": Divergence(lambda r: r * r.log(), lambda r: r),
    "jf": Divergence(lambda r: (r - 1) * r.log(), lambda r: 1 + r),
    "neyman": Divergence(lambda r: (1 - r).square() / r, lambda r: 2 / r),
}
"""Reverse KL, softened reverse KL, Jensen-Shannon, squared Hellinger, KL, Jeffreys, Neyman's chi-squared."""


def divergence(name: str) -> Divergence:
    """The divergence of that name.

    >>> float(divergence("js").weight(torch.tensor(1.0)))
    0.5
    """
    return DIVERGENCES[checks.one_of("divergence", name, tuple(DIVERGENCES))]


def ratio_of(logits: Tensor) -> Tensor:
    """p/q (n,) by a classifier whose logits (n, ...) are positive for p: exp of their mean, held within e^+-10."""
    return logits.detach().float().flatten(1).mean(1).clamp(-_LOGITS, _LOGITS).exp()


class RatioWeight(nn.Module):
    """Weights of mean 1 over a batch from estimated density ratios, each ratio relative to others at like times.

    A classifier is sure of itself where there is little noise and blind where there is much; so a ratio is first
    divided by a running mean over its time bin, then weighed, then the weights divided by their mean. Every mean is
    taken over all processes of a ``torch.distributed`` group.

    Args:
        name: of the divergence; with "rkl" every weight is exactly 1.
        ends: (low, high) of the times.
        bins: equal time bins; 0 for no division by bin means.
        ema: decay of a bin's mean; 0 takes the batch's own.
        clip: bounds of the ratio, or None.

    >>> weigh = RatioWeight("kl", (0.0, 1.0), bins=1)
    >>> weigh(torch.tensor([1.0, 3.0]), torch.tensor([0.2, 0.4])).tolist()
    [0.5, 1.5]
    """

    means: Tensor

    def __init__(
        self,
        name: str,
        ends: tuple[float, float],
        *,
        bins: int = 10,
        ema: float = 0.0,
        clip: tuple[float, float] | None = (0.1, 20.0),
    ) -> None:
        super().__init__()
        self.name, self.weight = name, divergence(name).weight
        self.ends, self.ema = ends, checks.fraction("ratio_ema", ema, zero=True, one=False)
        checks.require(ends[0] < ends[1], f"the times run from {ends[0]:g} to {ends[1]:g}; they must rise.")
        if clip is not None:
            low, high = (checks.positive("ratio_clip", c) for c in clip)
            checks.require(low < high, f"ratio_clip is ({low:g}, {high:g}); it must rise.")
        self.clip = clip
        self.register_buffer("means", torch.ones(checks.whole("time_bins", bins, 0)))

    @torch.no_grad()
    def forward(self, ratio: Tensor, t: Tensor) -> Tensor:
        """h (n,) for ratios (n,) at times (n,); the bins' means move."""
        ratio = ratio.detach().float()
        if self.name == "rkl":
            return torch.ones_like(ratio)
        if self.clip is not None:
            ratio = ratio.clamp(*self.clip)
        if len(self.means):
            ratio = ratio / (self._followed(ratio, t) + _LEAST)
        h = self.weight(ratio)
        total, count = _everywhere(torch.stack([h.sum(), torch.full_like(h[0], len(h))]))
        return h / (total / count + _LEAST)

    def _followed(self, ratio: Tensor, t: Tensor) -> Tensor:
        """The running means, moved by this batch, at each ratio's bin."""
        bins = len(self.means)
        low, high = self.ends
        place = ((t.double() - low) / (high - low) * bins).floor().long().clamp(0, bins - 1)
        sums = torch.zeros(2, bins, device=ratio.device)
        sums[0].index_add_(0, place, torch.ones_like(ratio))
        sums[1].index_add_(0, place, ratio)
        count, total = _everywhere(sums)
        moved = self.ema * self.means + (1 - self.ema) * total / (count + _LEAST)
        self.means.copy_(torch.where(count > 0, moved, self.means))
        return self.means[place]


def _everywhere(sums: Tensor) -> Tensor:
    """Sums over all processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return sums
