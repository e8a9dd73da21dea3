"""Networks, data and training of the comparison of compatible representations."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.core.networks import seeded
from gradmatch.datasets import digits, fashion_mnist
from gradmatch.embed import CompatibleModel, CompatibleTrainer, StationaryHead, compatibility_matrix, hoc_loss
from gradmatch.embed.stationary import unit_rows

ARMS = ("rehearsal", "feature distillation", "simplex", "simplex and HOC")
SLOTS, SIDE, PER_CLASS, HELD = 64, 14, 300, 60
EPOCHS, PROVIDER_EPOCHS, PROVIDER_RATE, BATCH = 4, 3, 1e-3, 64
SCALE = 10.0
"""Of the logits of every arm. At the published 1 such short trainings leave all features in one direction: with and
without the simplex the accuracy on held-out images of the training classes is a fifth to a third lower."""
SEEN = 6
"""Classes 0..5 are those that providers train on, in other slots and turned or inverted."""


@dataclass(frozen=True)
class Condition:
    """What a sequence of models is made of.

    Attributes:
        tasks: the new classes of each.
        weak: images of the provider of the first model.
        strong: of the one that replaces it at the third task, which is also wider and a layer deeper; 0: none does.
        unseen: "digits", or "clothes" for Fashion-MNIST's classes 6..9.
    """

    tasks: tuple[tuple[int, ...], ...]
    weak: int
    strong: int
    unseen: str = "digits"


ALL = ((0, 1, 2, 3), (4, 5), (6, 7), (8, 9))
CONDITIONS = {
    "no replacement": Condition(ALL, 1500, 0),
    "replacement": Condition(ALL, 1500, 8000),
    "large step": Condition(ALL, 600, 8000),
    "unseen clothes": Condition(((0, 1), (2, 3), (4,), (5,)), 1500, 8000, "clothes"),
}


class LearnedHead(StationaryHead):
    """The same projection and slots with a classifier that is trained: what the stationary one replaces."""

    def __init__(self, in_features: int, num_classes: int, slots: str, *, scale: float) -> None:
        super().__init__(in_features, num_classes, slots, scale=scale)
        del self.vertices
        self.vertices: Any = nn.Parameter(torch.empty(num_classes, num_classes - 1))
        self.reset()

    def reset(self) -> None:
        """A fresh classifier, as a client of a provider's network begins with."""
        nn.init.normal_(self.vertices, std=(self.num_classes - 1) ** -0.5)


def network(stationary: bool, seed: int, large: bool = False, slots: str = "from_end") -> CompatibleModel:
    """Two convolutions for images of 14 x 14, or three wider ones, and a head of either kind."""
    width = 24 if large else 16
    with seeded(seed):
        layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        if large:
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        head = StationaryHead if stationary else LearnedHead
        return CompatibleModel(nn.Sequential(*layers), head(18 * width, SLOTS, slots, scale=SCALE))


@lru_cache(maxsize=1)
def images() -> dict[str, tuple[Tensor, Tensor]]:
    """Fashion-MNIST at half size, by use, and digits enlarged: clients, held out, providers, search."""
    found, small = fashion_mnist(), digits()
    x, y = F.avg_pool2d(found.train.x, 2), found.train.y
    rank = torch.zeros_like(y)
    for c in range(10):
        of = y == c
        rank[of] = torch.arange(int(of.sum()))
    clients, held = rank < PER_CLASS, (rank >= PER_CLASS) & (rank < PER_CLASS + HELD)
    rest = rank >= PER_CLASS + HELD
    figures = torch.cat([small.train.x, small.test.x]), torch.cat([small.train.y, small.test.y])
    test = F.avg_pool2d(found.test.x, 2), found.test.y
    clothes = test[1] >= SEEN
    return {
        "clients": (x[clients], y[clients]),
        "held": (x[held], y[held]),
        "providers": (x[rest], y[rest]),
        "digits": (F.interpolate(figures[0], size=(SIDE, SIDE), mode="bilinear"), figures[1]),
        "clothes": (test[0][clothes], test[1][clothes]),
    }


def provider_images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Classes 0..5 turned by a quarter, inverted, or both: 18 classes that no client has."""
    x, y = images()["providers"]
    at = torch.nonzero(y < SEEN).flatten()
    generator = torch.Generator().manual_seed(seed)
    at = at[torch.randperm(len(at), generator=generator)[:count]]
    kind = torch.arange(len(at)) % 3
    x, y = x[at], y[at]
    turned = torch.where((kind != 1)[:, None, None, None], x.rot90(1, (2, 3)), x)
    return torch.where((kind != 0)[:, None, None, None], 1 - turned, turned), y + SEEN * kind


def _optimizer(rate: float) -> Any:
    return lambda groups: torch.optim.Adam(
        [{k: v for k, v in g.items() if k == "params"} for g in groups], rate
    )


@cache
def provided(stationary: bool, seed: int, count: int, large: bool) -> CompatibleModel:
    """A model trained elsewhere, on the provider's classes in slots from the start, by cross-entropy alone."""
    model = network(stationary, 10 * seed + 7 + large, large, "from_start")
    trainer = CompatibleTrainer(
        model, _optimizer(PROVIDER_RATE), lam=1.0, epochs=PROVIDER_EPOCHS, batch_size=BATCH, memory_per_class=0,
        seed=seed,
    )  # fmt: skip
    trainer.update(provider_images(count, seed))
    return model.eval()


def agreement(arm: str, weight: float) -> Any:
    """The term beside cross-entropy."""
    if arm == "feature distillation":
        return lambda new, old, y: (
            weight * (unit_rows("new", new) - unit_rows("old", old)).square().sum(1).mean()
        )
    return hoc_loss


def sequence(
    arm: str, condition: Condition, seed: int, rate: float, weight: float
) -> tuple[list[CompatibleModel], list[CompatibleModel]]:
    """The arm's model after each task, and the providers' models as they came, one for each task."""
    stationary = "simplex" in arm
    weak = provided(stationary, seed, condition.weak, False)
    strong = provided(stationary, seed, condition.strong, True) if condition.strong else None
    lam = {"simplex and HOC": 0.1, "feature distillation": 0.5}.get(arm, 1.0)
    trainer = CompatibleTrainer(
        network(stationary, seed), _optimizer(rate), lam=lam, epochs=EPOCHS, batch_size=BATCH,
        agreement=agreement(arm, weight), seed=seed,
    )  # fmt: skip
    x, y = images()["clients"]
    models, bare = [], []
    for k, classes in enumerate(condition.tasks):
        at = torch.isin(y, torch.tensor(classes))
        new = {0: weak, 2: strong}.get(k)
        trainer.update((x[at], y[at]), replace_with=None if new is None else _fresh(new, seed))
        models.append(copy.deepcopy(trainer.model).eval())
        bare.append(weak if strong is None or k < 2 else strong)
    return models, bare


def _fresh(model: CompatibleModel, seed: int) -> CompatibleModel:
    """A provider's network with its classifier, where that is learned, dropped."""
    found = copy.deepcopy(model)
    if isinstance(found.head, LearnedHead):
        with seeded(seed), torch.no_grad():
            found.head.reset()
    return found


def searched(models: list[CompatibleModel], name: str) -> Tensor:
    """C with every other image in the gallery."""
    x, y = images()[name]
    return compatibility_matrix(models, (x[::2], y[::2]), (x[1::2], y[1::2]))
