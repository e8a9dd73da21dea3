"""Parts of the ``auto`` recipe: its narrow network, a network as a function of parameters, k-means, scaling."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradmatch.core import checks
from gradmatch.core.networks import active_dropout
from gradmatch.core.pooling import with_product_pools
from gradmatch.data._common import State

Parameters = dict[str, Tensor]
COARSE = 4  # evaluator steps that one step of the pool stands for
EVALUATOR_LR = 0.01  # of the published evaluator
EVALUATOR_FEATURES = 2048  # of the published evaluator's last layer: ConvNet-3, width 128, 28x28 images


def narrow_convnet(channels: int, size: int, classes: int, width: int = 32) -> Callable[[], nn.Module]:
    """Factory of the published ConvNet at an eighth of its cost or less: up to three blocks, instance norm, 2x2 means.

    Args:
        channels, size: of the (square) images; 28 is padded to 32 by the first layer.
        classes: outputs.
        width: channels of every block; the published evaluator has 128.
    """

    def make() -> nn.Module:
        layers: list[nn.Module] = []
        side, before = size, channels
        for block in range(3):
            padding = 3 if block == 0 and size == 28 else 1
            side = side + 2 * padding - 2
            layers += [nn.Conv2d(before, width, 3, padding=padding, bias=False), nn.GroupNorm(width, width)]
            layers += [nn.ReLU(), nn.AvgPool2d(2)]
            before, side = width, side // 2
            if side < 4:
                break
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * side * side, classes))

    return make


class FeatureNet:
    """A network as a function of its parameters, giving its logits and the input of its last linear layer."""

    def __init__(self, module: nn.Module, x: Tensor, rate: float | None) -> None:
        linear = [m for m in module.modules() if isinstance(m, nn.Linear)]
        checks.require(bool(linear), "network has no nn.Linear; its last layer must be one.")
        checks.require(
            not active_dropout(module), "network has active dropout; build it without, or in eval mode."
        )
        self.module, self.caught = with_product_pools(module), x
        self.width = linear[-1].in_features
        self.rate = rate or COARSE * EVALUATOR_LR * min(4.0, EVALUATOR_FEATURES / self.width)
        linear[-1].register_forward_pre_hook(self._catch)

    def _catch(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.caught = inputs[0]

    def parameters(self, state: State, i: int, kind: str = "net") -> Parameters:
        """Those of network ``i`` of a pool held in ``state``; its momentum with kind "speed"."""
        return {name: tensor(state, f"{kind}{i}:{name}") for name, _ in self.module.named_parameters()}

    def __call__(self, weights: Parameters, x: Tensor) -> tuple[Tensor, Tensor]:
        logits: Tensor = functional_call(self.module, weights, (x,))
        return logits, self.caught


def centroids(x: Tensor, k: int, generator: torch.Generator, rounds: int = 15) -> Tensor:
    """(k, ...) means of k-means clusters of ``x`` (n, ...); an empty cluster keeps its centre."""
    flat = x.flatten(1)
    centres = flat[torch.randperm(len(flat), generator=generator)[:k].to(flat.device)].clone()
    for _ in range(1 if k == 1 else rounds):
        nearest = (centres.square().sum(1) - 2 * flat @ centres.T).argmin(1)
        counts = torch.bincount(nearest, minlength=k)
        sums = torch.zeros_like(centres).index_add_(0, nearest, flat)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centres)
    return centres.reshape(k, *x.shape[1:])


def best_scale(logits: Tensor, y: Tensor, rounds: int = 12) -> Tensor:
    """The positive factor that makes ``cross_entropy(factor * logits, y)`` least (damped Newton on its logarithm).

    Scaling all logits changes no prediction, so the second phase should not be paid for it.
    """
    true = logits.gather(1, y[:, None])[:, 0]
    log = torch.zeros((), dtype=logits.dtype, device=logits.device)
    for _ in range(rounds):
        p = (log.exp() * logits).softmax(1)
        mean = (p * logits).sum(1)
        slope = log.exp() * (mean - true).mean()
        bend = log.exp() ** 2 * ((p * logits.square()).sum(1) - mean.square()).mean() + slope.abs()
        log = log - (slope / (bend + 1e-8)).clamp(-1, 1)
    return log.clamp(-3, 6).exp()


def tensor(state: State, name: str) -> Tensor:
    """The tensor of this name in a run's state."""
    value = state[name]
    assert isinstance(value, Tensor)
    return value
