"""Regularised Newton and gradient methods that GNS is compared with, as rules for the same loop.

* :class:`GradientDescent` (H = 0): lambda = L, f+ <= f - |g|_*^2 / (2 L); L doubles or halves;
* :class:`SuperUniversal` (Doikov, Mishchenko, Nesterov; SIAM J. Optim. 34, 2024): lambda = M |g|_*^alpha, accepted if
  <g+, x - x+> >= |g+|_*^2 / (4 lambda); M changes by factors of 4;
* :class:`CubicNewton` (Nesterov, Polyak; Math. Program. 108, 2006): lambda = (M / 2) |x+ - x|, accepted if f+ is at
  most the cubic model; M changes by factors of 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from gradmatch.core.shifted import Metric, Shifted
from gradmatch.optim._regularised import Point


@dataclass(frozen=True)
class GradientDescent:
    """Gradient method in the metric B with a backtracked constant L (at least ``least``)."""

    least: float = 1e-9

    def damping(self, scale: float, norm: float, g: Tensor, system: Shifted, metric: Metric) -> float:
        """L."""
        return scale

    def accepts(self, damping: float, before: Point, after: Point, metric: Metric) -> bool:
        """Enough decrease for an L-smooth f."""
        return before.value - after.value >= metric.dual2(before.gradient) / (2 * damping)

    def relaxed(self, scale: float) -> float:
        """L / 2."""
        return max(scale / 2, self.least)

    def tightened(self, scale: float) -> float:
        """2 L."""
        return 2 * scale


@dataclass(frozen=True)
class SuperUniversal:
    """Gradient-regularised Newton; alpha = 1 as in its released code."""

    alpha: float = 1.0
    least: float = 1e-5

    def damping(self, scale: float, norm: float, g: Tensor, system: Shifted, metric: Metric) -> float:
        """M |g|_*^alpha."""
        return scale * float(norm**self.alpha)

    def accepts(self, damping: float, before: Point, after: Point, metric: Metric) -> bool:
        """The new gradient still points back, by enough."""
        back = float(after.gradient @ (before.x - after.x))
        return back >= metric.dual2(after.gradient) / (4 * damping)

    def relaxed(self, scale: float) -> float:
        """M / 4."""
        return max(scale / 4, self.least)

    def tightened(self, scale: float) -> float:
        """4 M."""
        return 4 * scale


@dataclass(frozen=True)
class CubicNewton:
    """Cubically regularised Newton: lambda solves lambda = (M / 2) |h(lambda)|."""

    least: float = 1e-5

    def damping(self, scale: float, norm: float, g: Tensor, system: Shifted, metric: Metric) -> float:
        """The root, by bisection of log lambda: |h| falls and lambda grows."""

        def excess(damping: float) -> float:
            h = system.solve(damping, g)
            return -math.inf if h is None else damping - scale / 2 * math.sqrt(metric.norm2(h))

        low = high = math.sqrt(scale * norm / 2)  # the root for H = 0; with H >= 0 it is smaller
        while excess(high) < 0:
            low, high = high, 4 * high
        while low > 1e-300 and excess(low) > 0:
            low, high = low / 16, low
        for _ in range(40):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if excess(middle) < 0 else (low, middle)
        return high

    def accepts(self, damping: float, before: Point, after: Point, metric: Metric) -> bool:
        """At most the model <g, h> / 2 - lambda |h|^2 / 6, which is its value where (H + lambda B) h = -g."""
        h = after.x - before.x
        model = float(before.gradient @ h) / 2 - damping * metric.norm2(h) / 6
        return after.value <= before.value + model

    def relaxed(self, scale: float) -> float:
        """M / 2."""
        return max(scale / 2, self.least)

    def tightened(self, scale: float) -> float:
        """2 M."""
        return 2 * scale
