"""Boosted small nets side by side: one network with a hidden layer, to be cut after any step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from gradmatch.core import checks
from gradmatch.optim._small_net import ACTIVATIONS, SmallNet

MODULES = {"logistic": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}


@dataclass(frozen=True)
class FoldedNet:
    """F_t(x) = out_bias[t] + out_weight a(weight x + bias), over the first t ``units_per_step`` hidden units.

    Attributes:
        weight, bias: of all hidden units, (T J, d) and (T J,).
        out_weight: with eta rho_t in it, (K, T J).
        out_bias: F_0 and the biases summed up to every step, (T + 1, K).
        units_per_step, activation: J, and the name of a.
    """

    weight: np.ndarray
    bias: np.ndarray
    out_weight: np.ndarray
    out_bias: np.ndarray
    units_per_step: int
    activation: str

    @staticmethod
    def of(
        nets: Sequence[SmallNet],
        scales: Sequence[float],
        start: np.ndarray,
        d: int,
        units: int,
        activation: str,
    ) -> FoldedNet:
        """From nets with what each is multiplied by, and the constant (K,)."""
        K = len(start)
        weight = np.concatenate([np.zeros((0, d)), *(n.weight for n in nets)])
        bias = np.concatenate([np.zeros(0), *(n.bias for n in nets)])
        pairs = list(zip(scales, nets, strict=True))
        out_weight = np.concatenate([np.zeros((K, 0)), *(s * n.out_weight for s, n in pairs)], 1)
        steps = np.concatenate([start[None], *(s * n.out[None] for s, n in pairs)])
        return FoldedNet(weight, bias, out_weight, steps.cumsum(0), units, activation)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.out_bias) - 1

    def scaled(self, factor: np.ndarray | float, shift: np.ndarray | float = 0.0) -> FoldedNet:
        """The network of factor F_t + shift, with a factor for each output."""
        each = np.broadcast_to(np.asarray(factor, dtype=float), (len(self.out_weight),))
        return FoldedNet(
            self.weight,
            self.bias,
            self.out_weight * each[:, None],
            self.out_bias * each + shift,
            self.units_per_step,
            self.activation,
        )

    def _prefix(self, n_steps: int | None) -> tuple[int, int]:
        t = self.steps if n_steps is None else checks.whole("n_steps", n_steps, 0, self.steps)
        return t, t * self.units_per_step

    def __call__(self, X: np.ndarray, n_steps: int | None = None) -> np.ndarray:
        """F_t (n, K) of rows (n, d) after ``n_steps`` steps, default all."""
        t, units = self._prefix(n_steps)
        hidden, _ = ACTIVATIONS[self.activation](X @ self.weight[:units].T + self.bias[:units])
        F: np.ndarray = hidden @ self.out_weight[:, :units].T + self.out_bias[t]
        return F

    def staged(self, X: np.ndarray) -> Iterator[np.ndarray]:
        """F_0, F_1, ..., F_T."""
        hidden, _ = ACTIVATIONS[self.activation](X @ self.weight.T + self.bias)
        F = np.zeros((len(X), len(self.out_weight)))
        yield F + self.out_bias[0]
        for t in range(self.steps):
            at = slice(t * self.units_per_step, (t + 1) * self.units_per_step)
            F = F + hidden[:, at] @ self.out_weight[:, at].T
            yield F + self.out_bias[t + 1]

    def module(self, n_steps: int | None = None, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        """The first ``n_steps`` steps as layers of PyTorch."""
        t, units = self._prefix(n_steps)
        return nn.Sequential(
            linear(self.weight[:units], self.bias[:units], dtype),
            MODULES[self.activation](),
            linear(self.out_weight[:, :units], self.out_bias[t], dtype),
        )


def linear(weight: np.ndarray, bias: np.ndarray, dtype: torch.dtype) -> nn.Linear:
    """A linear layer with these weights; no random number is drawn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a layer of no units, for the constant, has nothing to initialise
        layer: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
            nn.Linear, weight.shape[1], weight.shape[0], dtype=dtype
        )
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight)))
        layer.bias.copy_(torch.from_numpy(np.ascontiguousarray(bias)))
    return layer
