"""A network of a few hidden units fitted to targets by full-batch L-BFGS, with everything fused into few products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import fmin_l_bfgs_b
from scipy.special import expit

Pair = tuple[np.ndarray, np.ndarray]


def _logistic(z: np.ndarray) -> Pair:
    a = expit(z)
    return a, a * (1 - a)


def _tanh(z: np.ndarray) -> Pair:
    a = np.tanh(z)
    return a, 1 - a * a


def _relu(z: np.ndarray) -> Pair:
    return np.maximum(z, 0), (z > 0).astype(z.dtype)


ACTIVATIONS: dict[str, Callable[[np.ndarray], Pair]] = {"logistic": _logistic, "tanh": _tanh, "relu": _relu}
"""Value and derivative."""


@dataclass(frozen=True)
class SmallNet:
    """out + out_weight a(weight x + bias): weight (J, d), bias (J,), out_weight (K, J), out (K,)."""

    weight: np.ndarray
    bias: np.ndarray
    out_weight: np.ndarray
    out: np.ndarray

    @staticmethod
    def of(flat: np.ndarray, d: int, units: int, outputs: int, unit: float = 1.0) -> SmallNet:
        """From one vector: rows (weight, bias) and then rows (out_weight, out), these in multiples of ``unit``."""
        hidden = flat[: units * (d + 1)].reshape(units, d + 1)
        out = unit * flat[units * (d + 1) :].reshape(outputs, units + 1)
        return SmallNet(hidden[:, :d], hidden[:, d], out[:, :units], out[:, units])

    def __call__(self, X: np.ndarray, activation: str) -> np.ndarray:
        """Outputs (n, K) of rows (n, d)."""
        hidden, _ = ACTIVATIONS[activation](X @ self.weight.T + self.bias)
        out: np.ndarray = hidden @ self.out_weight.T + self.out
        return out


def fit_small_net(
    X: np.ndarray,
    r: np.ndarray,
    w: np.ndarray,
    *,
    units: int,
    activation: str,
    l2: float,
    max_iter: int,
    tol: float,
    restarts: int,
    rng: np.random.RandomState,
) -> SmallNet:
    """The best of ``restarts`` fits of min (1/2n) sum_i w_i |h(x_i) - r_i|^2 + (l2/2n) (|weight|^2 + |out_weight|^2).

    n is the sum of the weights and biases are free, as scikit-learn's perceptron has it; the start is Glorot's uniform
    one. Residuals shrink as boosting goes on, so the loss is divided by its value for h = 0, which makes ``tol``, the
    decrease in an iteration at which L-BFGS stops, relative; and output weights are counted in units of the
    residuals' size, else a start of order one would be far from every good fit.
    """
    outputs, d = r.shape[1], X.shape[1]
    power, total = w @ np.square(r).sum(1), w.sum()
    unit = np.sqrt(power / total)
    fit = _Objective(
        X, r / unit, 2 * w / total, 2 * l2 / power, 2 * l2 / total, units, ACTIVATIONS[activation]
    )
    best, lowest = np.zeros(0), np.inf
    for _ in range(restarts):
        factor = 2.0 if activation == "logistic" else 6.0
        first, second = np.sqrt(factor / (d + units)), np.sqrt(factor / (units + outputs))
        spread = np.repeat([first, second], [units * (d + 1), outputs * (units + 1)])
        start = rng.uniform(-1, 1, len(spread)) * spread
        found, value, _ = fmin_l_bfgs_b(
            fit, start, maxiter=max_iter, factr=tol / np.finfo(float).eps, pgtol=0.0, maxfun=15 * max_iter
        )
        if value < lowest:
            best, lowest = found, value
    return SmallNet.of(best, d, units, outputs, unit)


class _Objective:
    """Half of the weighted squares and the penalties, with the gradient.

    Data are transposed, so that units and outputs are rows, and end with a row of ones, so that biases are weights.
    """

    def __init__(
        self,
        X: np.ndarray,
        r: np.ndarray,
        w: np.ndarray,
        decay: float,
        out_decay: float,
        units: int,
        activation: Callable[[np.ndarray], Pair],
    ) -> None:
        n, d = X.shape
        self.units, self.outputs, self.activation = units, r.shape[1], activation
        self.X = np.concatenate([X, np.ones((n, 1))], 1)
        self.XT, self.r, self.w = np.ascontiguousarray(self.X.T), np.ascontiguousarray(r.T), w
        self.hidden = np.ones((units + 1, n))
        first = np.tile([decay] * d + [0.0], units)
        self.decay = np.concatenate([first, np.tile([out_decay] * units + [0.0], self.outputs)])
        self.cut = len(first)

    def __call__(self, flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight = flat[: self.cut].reshape(self.units, -1)
        out = flat[self.cut :].reshape(self.outputs, -1)
        self.hidden[:-1], derivative = self.activation(np.dot(weight, self.XT))
        gap = np.dot(out, self.hidden) - self.r
        pull = gap * self.w
        back = np.dot(out[:, :-1].T, pull) * derivative
        penalty = self.decay * flat
        gradient = np.concatenate([np.dot(back, self.X).ravel(), np.dot(pull, self.hidden.T).ravel()])
        gradient += penalty
        return float(np.vdot(gap, pull) + np.vdot(penalty, flat)) / 2, gradient
