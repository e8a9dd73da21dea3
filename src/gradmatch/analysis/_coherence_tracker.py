"""Coherence followed through training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import nn

from gradmatch.analysis._coherence import Coherence
from gradmatch.analysis.coherence import coherence
from gradmatch.core import checks
from gradmatch.core.problem import Loss
from gradmatch.core.store import write_json
from gradmatch.core.tap import evaluating

__all__ = ["CoherenceTracker"]


class CoherenceTracker:
    """Coherence on fixed data every so many steps or epochs, measured in eval mode.

    The data should not be the batch that is stepped on, whose own gradients agree more than others'.

    Args:
        loss, data: as :func:`~gradmatch.analysis.coherence.coherence`.
        every: measure at the calls 0, every, 2 every, ...
        options: further keyword arguments of ``coherence``.

    Attributes:
        history: (number of the call, what was found).

    >>> import torch
    >>> net, x, y = nn.Linear(3, 2), torch.randn(20, 3), torch.arange(20) % 2
    >>> tracker = CoherenceTracker("cross_entropy", (x, y), every=5)
    >>> for step in range(11):
    ...     found = tracker(net)
    >>> [k for k, _ in tracker.history]
    [0, 5, 10]
    """

    def __init__(self, loss: str | Loss, data: Any, *, every: int = 1, **options: Any) -> None:
        self.loss, self.data, self.every = loss, data, checks.whole("every", every)
        self.options = options
        self.calls = 0
        self.history: list[tuple[int, Coherence]] = []

    def __call__(self, model: nn.Module) -> Coherence | None:
        """Count a call; what was found, where it was time to measure."""
        number, self.calls = self.calls, self.calls + 1
        if number % self.every:
            return None
        with evaluating(model):
            found = coherence(model, self.loss, self.data, **self.options)
        self.history.append((number, found))
        return found

    def callback(self, at: Literal["step", "epoch"] = "epoch") -> Any:
        """A Hugging Face ``TrainerCallback`` that calls this before training and at the end of steps or epochs."""
        from transformers import TrainerCallback

        checks.one_of("at", at, ("step", "epoch"))
        tracker = self

        class Callback(TrainerCallback):
            def on_train_begin(
                self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
            ) -> None:
                if tracker.calls == 0:
                    tracker(model)

            def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
                if at == "step":
                    tracker(model)

            def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
                if at == "epoch":
                    tracker(model)

        return Callback()

    def save(self, path: str | Path) -> Path:
        """Write the history as JSON; undefined values are null."""

        def plain(value: float) -> float | None:
            return value if value == value else None

        rows = [
            {
                "at": at,
                "alpha": plain(c.alpha),
                "m_coherence": plain(c.m_coherence),
                "dead": c.dead,
                "groups": {k: plain(v) for k, v in c.per_group.items()},
            }
            for at, c in self.history
        ]
        return write_json(path, rows)
