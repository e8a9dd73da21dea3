"""Multi-layer perceptron."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn

from gradmatch.core import checks
from gradmatch.zoo.convnet import ACTIVATIONS


def mlp(
    inputs: int, hidden: Sequence[int] = (128, 128), classes: int = 10, activation: str = "relu"
) -> nn.Sequential:
    """Linear layers with an activation between them; flattens its input, so images go in as they are.

    Args:
        inputs: entries of one input.
        hidden: widths of the hidden layers; two of 128 as in the condensation papers.
        classes: outputs.
        activation: "relu", "leakyrelu", "sigmoid", "tanh" or "softplus".
    """
    checks.one_of("activation", activation, tuple(ACTIVATIONS))
    widths = [checks.whole("inputs", inputs), *(checks.whole("hidden", h) for h in hidden)]
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], checks.whole("classes", classes)))
