"""Judges of generated Fashion-MNIST images: a network that takes no other part, figures with their noise floors.

``python -m gradmatch.evidence._judges train`` trains the shipped weights anew (about four minutes on one core).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from gradmatch.core.quality import frechet_distance, noise_floor, precision_recall, shares
from gradmatch.core.store import save_tensors
from gradmatch.core.training import train
from gradmatch.datasets import fashion_mnist
from gradmatch.zoo.judge import WEIGHTS, JudgeNet, fashion_judge, seen

EPOCHS, BATCH, RATE, SEED = 12, 128, 3e-3, 20240601


@dataclass(frozen=True)
class Scores:
    """What the judge says of a set of images; lower is better for ``frechet`` alone."""

    frechet: float
    precision: float
    recall: float
    shares: tuple[float, ...]


class Judge:
    """Compares images (n, 1, 28, 28) in [0, 1] with the test images of Fashion-MNIST.

    Args:
        classes: only these classes are compared with; default all.
    """

    def __init__(self, classes: Sequence[int] | None = None) -> None:
        self.net, test = fashion_judge(), fashion_mnist().test
        of = torch.isin(test.y, torch.tensor(range(10) if classes is None else classes))
        self.real, _ = seen(self.net, test.x[of])

    def features(self, images: Tensor) -> Tensor:
        """The judge's features (n, 64)."""
        return seen(self.net, images)[0]

    def labels(self, images: Tensor) -> Tensor:
        """What the judge takes each image for (n,)."""
        return seen(self.net, images)[1]

    def frechet(self, images: Tensor) -> float:
        """Frechet distance to all real test images."""
        return frechet_distance(self.features(images), self.real)

    def scores(self, images: Tensor, k: int = 3) -> Scores:
        """All figures; precision and recall against as many real images as there are generated ones."""
        features, labels = seen(self.net, images)
        real = self.real[
            torch.randperm(len(self.real), generator=torch.Generator().manual_seed(0))[: len(images)]
        ]
        precision, recall = precision_recall(real, features, k)
        found = tuple(shares(labels, 10).tolist())
        return Scores(frechet_distance(features, self.real), precision, recall, found)

    def floor(self, n: int, repeats: int = 5) -> dict[str, tuple[float, float]]:
        """(mean, deviation) of each figure between two disjoint draws of ``n`` real test images."""
        metrics = {
            "frechet": frechet_distance,
            "precision": lambda a, b: precision_recall(a, b)[0],
            "recall": lambda a, b: precision_recall(a, b)[1],
        }
        return {name: noise_floor(m, self.real, n, repeats=repeats) for name, m in metrics.items()}


@lru_cache(maxsize=4)
def judge(classes: tuple[int, ...] | None = None) -> Judge:
    """The judge, made once a process."""
    return Judge(classes)


def train_judge(epochs: int = EPOCHS) -> tuple[JudgeNet, float]:
    """The judge trained from scratch on all training images, and its test accuracy."""
    data = fashion_mnist()
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        net = JudgeNet()

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(data.train), (BATCH,), generator=generator)
        x, y = data.train[index]
        flip = torch.rand(len(x), generator=generator) < 0.5
        return F.cross_entropy(
            net(torch.where(flip[:, None, None, None], x.flip(3), x)), y, label_smoothing=0.05
        )

    train(net, loss, epochs * (len(data.train) // BATCH), lr=RATE, schedule="cosine", warmup=100, seed=SEED)
    net.eval().requires_grad_(False)
    return net, float((seen(net, data.test.x)[1] == data.test.y).double().mean())


def main() -> None:
    """``train`` trains and writes the weights; ``check`` says how the shipped ones do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("train", "check"))
    if parser.parse_args().what == "train":
        net, accuracy = train_judge()
        path = save_tensors(
            WEIGHTS, net.state_dict(), {"test_accuracy": round(accuracy, 4), "seed": SEED, "epochs": EPOCHS}
        )
        print(f"test accuracy {accuracy:.4f}; written: {path}")
    test = fashion_mnist().test
    accuracy = float((seen(fashion_judge(), test.x)[1] == test.y).double().mean())
    print(f"shipped judge: test accuracy {accuracy:.4f}; floors at 1000 images: {judge().floor(1000)}")


if __name__ == "__main__":
    main()
