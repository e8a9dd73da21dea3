"""The small reference networks, each a plain ``nn.Module`` made by one function, and models that need no training."""

from __future__ import annotations

from gradmatch.zoo.autoencoder import autoencoder, fit_autoencoder
from gradmatch.zoo.convnet import ConvNet, convnet
from gradmatch.zoo.judge import JudgeNet, fashion_judge
from gradmatch.zoo.mlp import mlp
from gradmatch.zoo.oracles import MixtureOracle
from gradmatch.zoo.velocity import dit, mlp_velocity, unet

__all__ = [
    "ConvNet",
    "JudgeNet",
    "MixtureOracle",
    "autoencoder",
    "convnet",
    "dit",
    "fashion_judge",
    "fit_autoencoder",
    "mlp",
    "mlp_velocity",
    "unet",
]
