"""Proximal matching: a denoiser trained towards the most probable image, not the mean of the possible ones.

For noisy y = x + sigma v the loss ::

    L_gamma = E [ 1 - exp(-|f(y) - x|^2 / gamma^2) ]             |.| over the whole sample

has, as gamma -> 0, the maximiser of p(x | y) as its minimiser, which is the proximal operator of -sigma^2 log p at y.
(The mean of squares gives the posterior's mean, that of absolute values its median.) Where gamma is far below
|f(y) - x| the loss is 1 with no slope, so training begins with absolute errors and takes gamma down in stages.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.core.store import RunFolder
from gradmatch.core.training import Progress, Trained, train

LOSSES = ("l1", "l2", "proximal")
SATURATED = 0.999
GAMMA_PER_NUMBER = 0.08
"""The last gamma is this times the square root of how many numbers a sample has, as released."""


def proximal_matching_loss(
    output: Float[Tensor, "b ..."], clean: Float[Tensor, "b ..."], gamma: float
) -> Tensor:
    """Mean over the batch of 1 - exp(-|output - clean|^2 / gamma^2), in [0, 1]; the norm is over the whole sample.

    >>> float(proximal_matching_loss(torch.ones(2, 3), torch.ones(2, 3), 0.5))
    0.0
    """
    distance = (output - clean).flatten(1).square().sum(1)
    return -torch.expm1(-distance / checks.positive("gamma", gamma) ** 2).mean()


@dataclass(frozen=True)
class Stage:
    """Some steps of training with one loss ("l1", "l2", "proximal") and rate; ``gamma`` is of "proximal" alone."""

    loss: str
    steps: int
    lr: float
    gamma: float | None = None

    def __post_init__(self) -> None:
        checks.one_of("loss", self.loss, LOSSES)
        checks.whole("steps", self.steps)
        checks.positive("lr", self.lr)
        checks.require(
            (self.gamma is not None) == (self.loss == "proximal"),
            f"gamma is {self.gamma} for the loss {self.loss!r}; 'proximal' needs one and the others have none.",
        )
        if self.gamma is not None:
            checks.positive("gamma", self.gamma)


class ProximalMatching:
    """Train a denoiser by proximal matching.

    Args:
        model: a :class:`gradmatch.solve.LearnedProx`, kept convex after every step, or any denoiser.
        sigma: deviation of the noise, or (low, high) drawn evenly for each sample.
        stages: with gamma = gamma_min 2^(stages - 1), ..., 2, 1 times ``gamma_min``; 4 as published.
        gamma_min: "auto" is 0.08 sqrt(D) for samples of D numbers, as released.
        pretrain: steps with the absolute error first, 20,000.
        pretrain_lr: 1e-3.
        steps: of each stage, 5,000.
        lr: of the stages, 1e-4.
        schedule: the stages themselves, in place of all these.

    Raises:
        InputError: sigma not above 0, options out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        sigma: float | tuple[float, float],
        stages: int = 4,
        gamma_min: float | str = "auto",
        *,
        pretrain: int = 20_000,
        pretrain_lr: float = 1e-3,
        steps: int = 5_000,
        lr: float = 1e-4,
        schedule: Sequence[Stage] | None = None,
    ) -> None:
        self.model = model
        low, high = sigma if isinstance(sigma, tuple) else (sigma, sigma)
        self.sigma = checks.positive("sigma", low), checks.positive("sigma", high)
        checks.require(low <= high, f"sigma is {sigma}; it must be (low, high).")
        self.stages, self.steps = checks.whole("stages", stages), checks.whole("steps", steps)
        self.gamma_min = gamma_min if gamma_min == "auto" else checks.positive("gamma_min", gamma_min)
        self.pretrain, self.pretrain_lr = checks.whole("pretrain", pretrain, 0), pretrain_lr
        self.lr, self.schedule = lr, schedule
        checks.require(
            schedule is None or len(schedule) > 0, "schedule is empty; it needs one stage at least."
        )

    def plan(self, numbers: int) -> list[Stage]:
        """The stages for samples of ``numbers`` numbers."""
        if self.schedule is not None:
            return list(self.schedule)
        last = GAMMA_PER_NUMBER * numbers**0.5 if self.gamma_min == "auto" else float(self.gamma_min)
        first = [Stage("l1", self.pretrain, self.pretrain_lr)] if self.pretrain else []
        return first + [
            Stage("proximal", self.steps, self.lr, last * 2**k) for k in reversed(range(self.stages))
        ]

    def fit(
        self,
        data: Any,
        batch: int = 64,
        *,
        seed: int = 0,
        progress: Progress | None = None,
        run: RunFolder | None = None,
        save_every: float = 30.0,
    ) -> Trained:
        """Train with Adam on fresh noise in every step.

        Args:
            data: clean samples (n, ...); a function of (count, generator) that draws them; or an iterable of batches,
                such as a DataLoader, gone through again and again (which is not resumed to the same bits). Of a
                tuple or dictionary the first tensor is taken.
            batch: samples a step; a loader has its own.
            seed, progress, run, save_every: as in :func:`gradmatch.core.training.train`.

        Returns:
            The loss of every step taken.

        Raises:
            InputError: data or a loss that is not finite, named with its step.

        Warns:
            where a stage begins with a loss near 1: its gamma is too small for what was learned before.
        """
        draw = _drawn(data, checks.whole("batch", batch))
        with torch.random.fork_rng(devices=[]):  # a loader that shuffles draws from the global generator
            numbers = draw(torch.Generator())[0].numel()
        plan = self.plan(numbers)
        starts = [0, *itertools.accumulate(stage.steps for stage in plan)]
        by_step = [stage for stage in plan for _ in range(stage.steps)]
        project = getattr(self.model, "project_", lambda: None)
        device = next(self.model.parameters()).device
        taken = itertools.count(self._first(run))

        def loss(generator: torch.Generator) -> Tensor:
            project()  # what the last step has left
            step = next(taken)
            value = self._loss(by_step[step], draw(generator).to(device), generator)
            if step in starts and by_step[step].loss == "proximal" and float(value.detach()) > SATURATED:
                warnings.warn(
                    f"the stage with gamma {by_step[step].gamma:g} begins with a loss of {float(value.detach()):.5f}, "
                    "where there is no slope; begin with a larger gamma or train longer before.",
                    stacklevel=2,
                )
            return value

        base = plan[0].lr
        found = train(
            self.model, loss, len(by_step), optimizer=torch.optim.Adam, lr=base,
            schedule=lambda step: by_step[step].lr / base, seed=seed,
            progress=progress, run=run, save_every=save_every,
        )  # fmt: skip
        project()
        return found

    @staticmethod
    def _first(run: RunFolder | None) -> int:
        kept = None if run is None else run.load()
        return 0 if kept is None else kept[0]

    def _loss(self, stage: Stage, clean: Tensor, generator: torch.Generator) -> Tensor:
        def random(maker: Callable[..., Tensor], *shape: int) -> Tensor:
            return maker(*shape, generator=generator, device=generator.device).to(clean)

        low, high = self.sigma
        sigma = torch.full((len(clean),), low).to(clean)
        if high > low:
            sigma = low + (high - low) * random(torch.rand, len(clean))
        noise = random(torch.randn, *clean.shape)
        output: Tensor = self.model(clean + sigma.reshape(-1, *[1] * (clean.ndim - 1)) * noise)
        if stage.gamma is not None:
            return proximal_matching_loss(output, clean, stage.gamma)
        gap = output - clean
        return gap.abs().mean() if stage.loss == "l1" else gap.square().mean()


def _drawn(data: Any, batch: int) -> Callable[[torch.Generator], Tensor]:
    """A function that gives the next clean samples."""
    if isinstance(data, Tensor):
        checks.require(
            data.ndim > 1 and len(data) > 0, f"data has shape {tuple(data.shape)}; it must be (n, ...)."
        )
        samples = checks.floating("data", data)

        def some(generator: torch.Generator) -> Tensor:
            index = torch.randint(len(samples), (batch,), generator=generator, device=generator.device)
            return samples[index.to(samples.device)]

        return some
    if callable(data) and not hasattr(data, "__iter__"):
        return lambda generator: checks.floating("data", data(batch, generator))
    checks.require(
        hasattr(data, "__iter__") and not hasattr(data, "__next__"),
        f"data is {type(data).__name__}; it must be a tensor, a function of (count, generator) or a loader.",
    )
    batches = _again_and_again(data)
    return lambda _: checks.floating("data", next(batches))


def _again_and_again(loader: Any) -> Iterator[Tensor]:
    while True:
        empty = True
        for item in loader:
            empty = False
            values = list(item.values()) if isinstance(item, dict) else item
            yield torch.as_tensor(values[0] if isinstance(values, (list, tuple)) else values)
        checks.require(not empty, "data gave no batch; at least one is needed.")
