"""Networks of the paper-scale pilots, initialised as they were."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn


def relu_mlp(widths: Sequence[int], seed: int, bias: bool = True) -> nn.Sequential:
    """Linear layers with ReLU between them on flattened inputs; weights N(0, 2 / fan_in), biases 0."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in itertools.pairwise(widths):
        linear = nn.Linear(a, b, bias=bias)
        with torch.no_grad():
            linear.weight.normal_(0, (2 / a) ** 0.5, generator=generator)
            if bias:
                linear.bias.zero_()
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
