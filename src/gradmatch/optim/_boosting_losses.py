"""Losses of gradient boosting: starting constant, negative gradient, curvature, and the step along a direction.

Arrays are (n, K), weights (n,) of sum 1. Targets are numbers, -1 and 1 (n, 1), or one-hot rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, log_softmax, softmax

from gradmatch.core.checks import require

TINY = 1e-12
"""Added to a curvature, which vanishes where all probabilities are 0 or 1."""


class BoostingLoss(ABC):
    """A loss l(y, F), summed over outputs."""

    scale = 1.0
    """What F is multiplied by to be the link's argument."""

    @abstractmethod
    def start(self, y: np.ndarray, w: np.ndarray) -> np.ndarray:
        """The constant (K,) that boosting starts from."""

    @abstractmethod
    def slope(self, y: np.ndarray, F: np.ndarray) -> np.ndarray:
        """Negative gradient - dl/dF (n, K), the pseudo-residuals."""

    @abstractmethod
    def bend(self, r: np.ndarray, y: np.ndarray, h: np.ndarray) -> np.ndarray:
        """Second derivative of each example's loss along h (n,), from the pseudo-residuals."""

    @abstractmethod
    def value(self, y: np.ndarray, F: np.ndarray, w: np.ndarray) -> float:
        """Mean loss."""

    def step(self, y: np.ndarray, r: np.ndarray, h: np.ndarray, w: np.ndarray) -> float:
        """The Newton step along h on all rows: sum r h / sum l'' h^2; 0 where h does nothing."""
        return float(w @ (r * h).sum(1) / (w @ self.bend(r, y, h) + TINY))


def _sums(rows: np.ndarray) -> np.ndarray:
    total: np.ndarray = rows.sum(1)
    return total


class Squared(BoostingLoss):
    """|y - F|^2 / 2."""

    def start(self, y: np.ndarray, w: np.ndarray) -> np.ndarray:
        constant: np.ndarray = w @ y
        return constant

    def slope(self, y: np.ndarray, F: np.ndarray) -> np.ndarray:
        r: np.ndarray = y - F
        return r

    def bend(self, r: np.ndarray, y: np.ndarray, h: np.ndarray) -> np.ndarray:
        return _sums(np.square(h))

    def value(self, y: np.ndarray, F: np.ndarray, w: np.ndarray) -> float:
        return float(w @ np.square(y - F).sum(1)) / 2


class Binary(BoostingLoss):
    """ln(1 + exp(-2 y F)) with y in {-1, 1}; P(y = 1) = 1 / (1 + exp(-2 F))."""

    scale = 2.0

    def start(self, y: np.ndarray, w: np.ndarray) -> np.ndarray:
        mean = w @ y
        require(bool(np.abs(mean) < 1), "y has one class only in the rows fitted; two are needed.")
        constant: np.ndarray = np.arctanh(mean)  # ln((1 + mean) / (1 - mean)) / 2
        return constant

    def slope(self, y: np.ndarray, F: np.ndarray) -> np.ndarray:
        r: np.ndarray = 2 * y * expit(-2 * y * F)
        return r

    def bend(self, r: np.ndarray, y: np.ndarray, h: np.ndarray) -> np.ndarray:
        size = np.abs(r)
        return _sums(size * (2 - size) * np.square(h))

    def value(self, y: np.ndarray, F: np.ndarray, w: np.ndarray) -> float:
        return float(w @ np.logaddexp(0, -2 * y * F).sum(1))


@dataclass(frozen=True)
class Softmax(BoostingLoss):
    """- sum_k y_k ln p_k. ``exact`` takes the whole Hessian along h, else its diagonal as published."""

    exact: bool = False

    def start(self, y: np.ndarray, w: np.ndarray) -> np.ndarray:
        return np.zeros(y.shape[1])

    def slope(self, y: np.ndarray, F: np.ndarray) -> np.ndarray:
        r: np.ndarray = y - softmax(F, axis=1)
        return r

    def bend(self, r: np.ndarray, y: np.ndarray, h: np.ndarray) -> np.ndarray:
        p = y - r
        if self.exact:
            curve: np.ndarray = _sums(p * np.square(h)) - np.square(_sums(p * h))
            return curve
        return _sums(p * (1 - p) * np.square(h))

    def value(self, y: np.ndarray, F: np.ndarray, w: np.ndarray) -> float:
        return -float(w @ (y * log_softmax(F, axis=1)).sum(1))
