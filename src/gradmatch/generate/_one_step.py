"""A student of a residual-shifting model that gives in one step what its teacher reaches in T."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core.regress import PairStore, pseudo_target_loss
from gradmatch.core.training import Progress, Trained, train
from gradmatch.generate._spectrum import PerceptualLoss, SpectrumLoss

if TYPE_CHECKING:
    from gradmatch.generate.difiisr import ResShift


def one_step(
    student: ResShift,
    teacher: ResShift,
    lr: Tensor,
    steps: int,
    *,
    visual: float = 0.001,
    perceptual: float = 0.001,
    spectrum: SpectrumLoss | None = None,
    extractors: PerceptualLoss | None = None,
    against: str = "teacher",
    hr: Tensor | None = None,
    truth: float = 0.0,
    inverse: float = 0.0,
    pairs: PairStore | None = None,
    batch: int = 64,
    rate: float = 5e-5,
    schedule: str = "constant",
    seed: int = 0,
    progress: Progress | None = None,
) -> Trained:
    """One-step distillation.

    Args:
        student: trained in place; most often a deep copy of ``teacher``.
        teacher: left as it is.
        lr: small images (m, c, h, w).
        visual, perceptual: weights of the two losses between decoded outputs, 0.001 each as published (where losses
            had another scale; sweep them).
        spectrum: the visual loss; default plain amplitudes.
        extractors: the perceptual loss; without it there is none.
        against: what the two losses compare with: the "teacher"'s output, or the "truth" (``hr``).
        hr, truth: sharp images and the weight of the squared error to them; off.
        inverse: weight of the squared error of x_{T-1} as the network gives it from x_0 at t = 0; off.
        pairs: of :meth:`ResShift.pairs`, where several students share them.
        batch: 64 and ``rate`` 5e-5 as published for training.
        steps, schedule, seed, progress: as in :func:`gradmatch.core.training.train`.
    """
    weights = {"visual": visual, "perceptual": perceptual, "truth": truth, "inverse": inverse}
    for name, value in weights.items():
        checks.nonnegative(name, value)
    store = teacher.pairs(lr, hr, seed=seed) if pairs is None else pairs
    checks.one_of("against", against, ("teacher", "truth"))
    checks.require(
        (truth == 0 and against == "teacher") or "hr" in store.tensors,
        f"truth is {truth:g} and against {against!r}, but there is no hr.",
    )
    spectrum = spectrum or SpectrumLoss()

    def loss(generator: torch.Generator) -> Tensor:
        rows = store.batch(batch, generator)
        small, start, goal = rows["lr"], rows["start"], rows["x0"]
        y, each = student.enlarged(small), torch.ones(len(small), device=small.device)
        said = student.x0(start, (student.T - 1) * each, y, small)
        total = 2 * pseudo_target_loss(said, goal)
        seen, wanted = student.decode(said), rows["hr"] if against == "truth" else student.decode(goal)
        if visual:
            total = total + visual * spectrum(seen, wanted)
        if perceptual and extractors is not None:
            total = total + perceptual * extractors(seen, wanted)
        if truth:
            total = total + 2 * truth * pseudo_target_loss(said, student.encode(rows["hr"]))
        if inverse:
            total = total + 2 * inverse * pseudo_target_loss(student.x0(goal, 0 * each, y, small), start)
        return total

    return train(student, loss, steps, lr=rate, schedule=schedule, seed=seed, progress=progress)
