"""The small reference networks, each a plain ``nn.Module`` made by one function."""

from __future__ import annotations

from gradmatch.zoo.convnet import ConvNet, convnet
from gradmatch.zoo.mlp import mlp

__all__ = ["ConvNet", "convnet", "mlp"]
