"""Small trainings on which any optimizer is benched: one interface for functions, images and text."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmatch.core.checks import InputError

STEPS = {"quadratics": 200, "rosenbrock": 300, "digits-mlp": 200, "fashion-cnn": 120, "char-transformer": 120}
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
WORST = 1e6
Losses = Callable[[Tensor], Tensor]


@dataclass
class Task:
    """A model in training: a batch's (outputs, loss of outputs), and the loss that is reported."""

    params: list[nn.Parameter]
    batch: Callable[[], tuple[Callable[[], Tensor], Losses]]
    score: Callable[[], float]


def make(name: str, seed: int, tuning: bool) -> Task:
    """A task at a seed. Tuning scores on other draws, or on training rows held out; else on test rows."""
    g = torch.Generator().manual_seed(seed + (1000 if tuning else 0))
    if name in ("quadratics", "rosenbrock"):
        return _function(name, g)
    model, x, y, sx, sy = _data(name, tuning, g)

    def batch() -> tuple[Callable[[], Tensor], Losses]:
        rows = torch.randint(len(x), (64,), generator=g)
        return lambda: model(x[rows]), lambda z: _ce(z, y[rows])

    def score() -> float:
        model.eval()
        with torch.no_grad():
            found = float(_ce(model(sx), sy).mean())
        model.train()
        return found

    return Task(list(model.parameters()), batch, score)


def _ce(z: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(z.movedim(-1, 1), y, reduction="none")
    return losses if losses.ndim == 1 else losses.flatten(1).mean(1)


def _function(name: str, g: torch.Generator) -> Task:
    if name == "quadratics":
        q = torch.linalg.qr(torch.randn(20, 20, generator=g)).Q
        h = q * torch.logspace(0, -3, 20) @ q.T
        x = nn.Parameter(torch.randn(20, generator=g))

        def value(z: Tensor) -> Tensor:
            found: Tensor = 0.5 * (z @ h * z).sum(1)
            return found
    else:
        x = nn.Parameter(torch.tensor([-1.5, 1.5]) + 0.2 * torch.randn(2, generator=g))

        def value(z: Tensor) -> Tensor:
            steep: Tensor = z[:, 1] - z[:, 0] ** 2
            return (1 - z[:, 0]).square() + 100 * steep.square()

    return Task([x], lambda: (lambda: x[None] * 1, value), lambda: float(value(x.detach()[None])[0]))


def _data(name: str, tuning: bool, g: torch.Generator) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=g)))
        if name == "char-transformer":
            return _characters(tuning)
        if name == "digits-mlp":
            from gradmatch.datasets import digits

            split = digits()
            model: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        else:
            from gradmatch.datasets import fashion_mnist

            split = fashion_mnist()
            model = nn.Sequential(
                nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(),
                nn.Linear(784, 10),
            )  # fmt: skip
    train, test = split.train, split.test
    held = min(1000, len(train.x) // 5)
    scored = (train.x[:held], train.y[:held]) if tuning else (test.x[:1000], test.y[:1000])
    return model, train.x[held:], train.y[held:], *scored


class _Characters(nn.Module):
    def __init__(self, symbols: int = 128, width: int = 32, length: int = 32) -> None:
        super().__init__()
        self.embed, self.places = (
            nn.Embedding(symbols, width),
            nn.Parameter(0.02 * torch.randn(length, width)),
        )
        self.block = nn.TransformerEncoderLayer(width, 2, 64, 0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, symbols)
        self.register_buffer("mask", torch.triu(torch.full((length, length), float("-inf")), 1))

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.block(self.embed(ids) + self.places, src_mask=self.mask))
        return out


def _characters(tuning: bool, length: int = 32) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    from gradmatch.datasets.pydoc import pydoc_text

    text = pydoc_text()

    def windows(paragraphs: Sequence[str]) -> Tensor:
        whole = "\n".join(paragraphs).encode("ascii", "replace")[:400_000]
        count = (len(whole) - 1) // length
        ids = torch.tensor(list(whole[: count * length + 1]))
        return torch.stack([ids[:-1].reshape(count, length), ids[1:].reshape(count, length)], 1)

    train, held = windows(text.train), windows(text.held)
    scored = train[:200] if tuning else held[:200]
    return _Characters(), train[200:, 0], train[200:, 1], scored[:, 0], scored[:, 1]


def train(
    task: str, kind: Callable[..., Any], lr: float | None, seed: int, tuning: bool, steps: int
) -> dict[str, float]:
    """Loss after the steps, and seconds a step; a run that diverges or is refused has a loss of 1e6."""
    own = make(task, seed, tuning)
    rate = rate_name(kind)
    optimizer = kind(own.params, **({} if rate is None or lr is None else {rate: lr}))
    protocols = getattr(optimizer, "protocols", ("grad",))
    began = time.perf_counter()
    try:
        for _ in range(steps):
            _step(optimizer, protocols, *own.batch())
    except InputError:
        return {"loss": WORST, "seconds": (time.perf_counter() - began) / steps}
    seconds = (time.perf_counter() - began) / steps
    found = own.score()
    return {"loss": min(found, WORST) if found == found else WORST, "seconds": seconds}


def rate_name(kind: Callable[..., Any]) -> str | None:
    """What the optimizer calls its learning rate, or None if it has none."""
    names = inspect.signature(kind).parameters
    return next((n for n in ("lr", "eta") if n in names), None)


def _step(optimizer: Any, protocols: Sequence[str], outputs: Callable[[], Tensor], losses: Losses) -> None:
    if "output closure" in protocols:
        optimizer.step(lambda: (outputs(), losses))
    elif "loss closure" in protocols:
        optimizer.step(lambda: losses(outputs()).mean())
    else:

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = losses(outputs()).mean()
            torch.autograd.backward(loss, create_graph="graph" in protocols)
            return loss

        if "graph" in protocols:
            closure()
            optimizer.step()
        else:
            optimizer.step(closure)
