"""One training loop: a loss that draws its own batch, an optimiser, a schedule, an average of the weights, resuming.

The generator given to the loss at step k, and the global one (dropout), are seeded from (seed, k) alone, so that a run
that was killed and goes on ends with the same weights, and nothing of a generator need be kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.core.store import RunFolder

Loss = Callable[[torch.Generator], Tensor]
"""Draws a batch with the generator and gives a scalar loss."""
Progress = Callable[[int, int, Mapping[str, Any]], None]
_MIXER = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Trained:
    """How training went.

    Attributes:
        losses: of every step taken by this call, (steps,) float64 (a resumed run has only its own part).
        averaged: the moving average of the weights, by name, where one was asked for.
    """

    losses: Tensor
    averaged: dict[str, Tensor] = field(default_factory=dict, repr=False)


def train(
    module: nn.Module,
    loss: Loss,
    steps: int,
    *,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    lr: float = 1e-3,
    schedule: str | Callable[[int], float] = "constant",
    warmup: int = 0,
    clip: float | None = None,
    average: float | None = None,
    seed: int = 0,
    after: Callable[[int], object] | None = None,
    progress: Progress | None = None,
    run: RunFolder | None = None,
    save_every: float = 30.0,
) -> Trained:
    """Train ``module`` in place.

    Args:
        module: its parameters that require gradients are trained; it is in train mode meanwhile.
        loss: called with the step's generator (on the device of the parameters).
        steps: of the whole run.
        optimizer: ``optimizer(parameters, lr=lr)``; default AdamW without weight decay.
        lr: of the first step after ``warmup``.
        schedule: "constant", "cosine" down to 0, or a factor of ``lr`` for each step 0, 1, ...
        warmup: steps over which the rate rises in proportion.
        clip: largest norm of the gradient.
        average: decay of a moving average of the weights, which starts at the initial ones.
        seed: decides every draw of the loss.
        after: called with the number of steps done.
        progress: called with (steps done, steps, {"loss": ...}).
        run: a folder to keep the state in and to go on from.
        save_every: seconds between states kept.

    Raises:
        InputError: options out of range, nothing to train, or a loss that is not a finite scalar, or weights that
            are not finite where they are kept or the run ends; the step is named.

    >>> line = nn.Linear(1, 1)
    >>> found = train(line, lambda g: (line(torch.ones(4, 1)) - 3).square().mean(), 200, lr=0.1)
    >>> bool(found.losses[-1] < 1e-2)
    True
    """
    checks.whole("steps", steps)
    if not callable(schedule):
        checks.one_of("schedule", schedule, ("constant", "cosine"))
    checks.whole("warmup", warmup, 0)
    trained = [p for p in module.parameters() if p.requires_grad]
    checks.require(
        bool(trained), "module has no parameter that requires a gradient; there is nothing to train."
    )
    if average is not None:
        checks.fraction("average", average, zero=True, one=False)
    make = optimizer or (lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.0))
    step_size = make(trained, lr=checks.positive("lr", lr))
    kept = TrainState(module, step_size, average)
    first = kept.resume(run)
    generator = torch.Generator(trained[0].device)
    losses: list[float] = []
    mode, saved = module.training, time.monotonic()
    module.train()
    try:
        with torch.random.fork_rng(enabled=True), torch.enable_grad():
            for step in range(first, steps):
                for group in step_size.param_groups:
                    group["lr"] = lr * _rate(step, steps, schedule, warmup)
                draw = seed_of(seed, step)
                generator.manual_seed(draw)
                _seed_globally(draw)
                losses.append(_step(loss, generator, trained, step_size, clip, step))
                kept.follow()
                if progress is not None:
                    progress(step + 1, steps, {"loss": losses[-1]})
                last = step + 1 == steps
                due = run is not None and time.monotonic() - saved >= save_every
                if last or due:
                    require_finite_weights("module has weights", trained, step + 1)
                if run is not None and (last or due):
                    run.save(step + 1, kept.tensors())
                    saved = time.monotonic()
                if after is not None:
                    after(step + 1)
    finally:
        module.train(mode)
        step_size.zero_grad(set_to_none=True)
    return Trained(torch.tensor(losses, dtype=torch.float64), kept.average())


def seed_of(seed: int, step: int) -> int:
    """A seed for one step: distinct for distinct (seed, step), its bits well mixed."""
    z = (seed * 0x100000001B3 + step + 1) * _MIXER % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    return (z ^ (z >> 27)) % 2**63


def require_finite_weights(what: str, weights: Iterable[Tensor], step: int) -> None:
    """Refuse weights that a gradient without a finite value has left, though the loss was finite."""
    bad = sum(int((~w.detach().isfinite()).sum()) for w in weights)
    checks.require(
        bad == 0,
        f"{what} that are NaN or infinite ({bad} of them) after step {step}: its loss was finite and its gradient "
        "was not; training stops there.",
    )


def _seed_globally(seed: int) -> None:
    """What dropout draws from; ``torch.manual_seed`` does the same at a hundred times the cost."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def _step(
    loss: Loss,
    generator: torch.Generator,
    trained: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    clip: float | None,
    step: int,
) -> float:
    optimizer.zero_grad(set_to_none=True)
    try:
        value = loss(generator)
    except checks.InputError as error:
        raise checks.InputError(f"Step {step + 1} of training stops: {error}") from error
    if not (isinstance(value, Tensor) and value.ndim == 0):
        shape = tuple(getattr(value, "shape", ()))
        checks.refuse(f"the loss of step {step + 1} is of shape {shape}; it must be a scalar.")
    said = float(value.detach())
    if not math.isfinite(said):
        checks.refuse(f"the loss of step {step + 1} is {said}; training stops there.")
    value.backward()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(trained, clip)
    optimizer.step()
    return said


def _rate(step: int, steps: int, schedule: str | Callable[[int], float], warmup: int) -> float:
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if callable(schedule):
        return rise * schedule(step)
    return rise if schedule == "constant" else rise * 0.5 * (1 + math.cos(math.pi * step / steps))


class TrainState:
    """Module, optimiser and average (by ``decay``, or None) as one set of named tensors."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, decay: float | None) -> None:
        self.module, self.optimizer, self.decay = module, optimizer, decay
        self.now = dict(module.named_parameters())
        self.shadow = {} if decay is None else {k: p.detach().clone() for k, p in self.now.items()}

    def follow(self) -> None:
        """Move the average towards the weights of now."""
        if self.decay is not None:
            with torch.no_grad():
                now = [p.detach() for p in self.now.values()]
                torch._foreach_lerp_(list(self.shadow.values()), now, 1 - self.decay)

    def average(self) -> dict[str, Tensor]:
        """Averaged parameters, with the module's own buffers."""
        if self.decay is None:
            return {}
        of = {id(p): self.shadow[k] for k, p in self.now.items()}
        names = {
            k: of[id(p)] for k, p in self.module.named_parameters(remove_duplicate=False)
        }  # tied ones too
        return {k: names.get(k, v.detach().clone()) for k, v in self.module.state_dict().items()}

    def tensors(self) -> dict[str, Tensor]:
        """All of it, by name."""
        found = {f"module.{k}": v for k, v in self.module.state_dict().items()}
        found |= {f"average.{k}": v for k, v in self.shadow.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
        return found

    def resume(self, run: RunFolder | None) -> int:
        """Go on from what the folder keeps; the step it was kept at, 0 for none."""
        found = None if run is None else run.load()
        if found is None:
            return 0
        self.restore(found[1])
        return found[0]

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`tensors` gave."""
        device = next(iter(self.now.values())).device

        def of(head: str) -> dict[str, Tensor]:
            return {
                k.removeprefix(head): v.to(device if head != "optimizer." else v.device)
                for k, v in tensors.items()
                if k.startswith(head)
            }

        self.module.load_state_dict(of("module."))
        averages = of("average.")
        self.shadow = {k: averages[k].clone() for k in self.shadow}
        state: dict[int, dict[str, Any]] = {}
        for name, value in of("optimizer.").items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = value
        whole = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**whole, "state": state})
