"""The optimizers that are raced by their step, and how.

To race another: add an :class:`Entry` to ``ENTRIES`` with how to make ours (it gets flat=True and compile=True where
``flat``), the arrays that a step must read and write at least, and peers that compute the same. A peer that cannot be
imported is reported as missing.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from _timer import figure, missing, race
from gradmatch.optim import DiffGrad, Lion
from gradmatch.optim._adam import AdamFamily

Params = list[nn.Parameter]
Make = Callable[..., torch.optim.Optimizer]
LARGE, SMALL = (100, 100_000), (1000, 100)
"""Number and size of the tensors."""
LR, BETAS, DECAY = 1e-3, (0.9, 0.99), 0.1
AUTOML = "GOOGLE_AUTOML"


@dataclass(frozen=True)
class Entry:
    """One optimizer and its peers.

    Attributes:
        name: of ours.
        make: ours on parameters, with options.
        passes: arrays read or written by a step at the least.
        peers: by name, functions of parameters; they may raise ImportError.
        flat: whether ours takes flat and compile.
        same: share of weights that may differ from a peer's by more than 1e-5 (a sign of what is 0 but for rounding).
        timed_only: peers that compute something else and are timed without comparison.
    """

    name: str
    make: Make
    passes: int
    peers: dict[str, Callable[[Params], torch.optim.Optimizer]]
    flat: bool = True
    same: float = 0.0
    timed_only: tuple[str, ...] = field(default=())


def _lion_pytorch(foreach: bool) -> Callable[[Params], Any]:
    def make(params: Params) -> Any:
        module = importlib.import_module("lion_pytorch.foreach" if foreach else "lion_pytorch")
        return module.Lion(params, lr=LR, betas=BETAS, weight_decay=DECAY)

    return make


def _automl(params: Params) -> Any:
    file = Path(os.environ.get(AUTOML, "")) / "lion" / "lion_pytorch.py"
    if not file.is_file():
        raise ImportError(f"{AUTOML} names no check-out of google/automl")
    spec = importlib.util.spec_from_file_location("automl_lion", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Lion(params, lr=LR, betas=BETAS, weight_decay=DECAY)


def _pytorch_optimizer(name: str, **options: Any) -> Callable[[Params], Any]:
    def make(params: Params) -> Any:
        kind = getattr(importlib.import_module("pytorch_optimizer"), name)
        return kind(params, lr=LR, betas=BETAS, **options)

    return make


def _torch_optimizer(name: str, **options: Any) -> Callable[[Params], Any]:
    def make(params: Params) -> Any:
        kind = getattr(importlib.import_module("torch_optimizer"), name)
        return kind(params, lr=LR, betas=BETAS, **options)

    return make


def galore_adamw() -> Any:
    """GaLoreAdamW; its package wants bitsandbytes, for a class that is not raced."""
    if "bitsandbytes" not in sys.modules and importlib.util.find_spec("bitsandbytes") is None:
        stub, inner = types.ModuleType("bitsandbytes"), types.ModuleType("bitsandbytes.optim.optimizer")
        inner.Optimizer2State = torch.optim.Optimizer
        names = ("bitsandbytes", "bitsandbytes.functional", "bitsandbytes.optim")
        sys.modules |= dict.fromkeys(names, stub) | {"bitsandbytes.optim.optimizer": inner}
    return importlib.import_module("galore_torch").GaLoreAdamW


def _galore(params: Params) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = galore_adamw()
        with contextlib.suppress(TypeError):
            return kind(params, lr=LR, betas=BETAS, eps=1e-8, weight_decay=DECAY, no_deprecation_warning=True)
        return kind(params, lr=LR, betas=BETAS, eps=1e-8, weight_decay=DECAY)


def _adamw(params: Params, **options: Any) -> AdamFamily:
    settings = {"lr": LR, "betas": BETAS, "eps": 1e-8, "weight_decay": DECAY}
    return AdamFamily(params, {**settings, **options})


def _torch_adamw(**options: Any) -> Callable[[Params], Any]:
    return lambda params: torch.optim.AdamW(params, lr=LR, betas=BETAS, weight_decay=DECAY, **options)


FUSED = "torch AdamW fused"
ENTRIES: dict[str, Entry] = {
    "lion": Entry(
        "Lion",
        lambda params, **options: Lion(params, LR, BETAS, DECAY, **options),
        5,
        {
            "lion-pytorch": _lion_pytorch(foreach=False),
            "lion-pytorch foreach": _lion_pytorch(foreach=True),
            "google/automl lion_pytorch": _automl,
            "pytorch_optimizer Lion": _pytorch_optimizer("Lion", weight_decay=DECAY),
            "torch AdamW foreach": _torch_adamw(foreach=True),
            FUSED: _torch_adamw(fused=True),
        },
        same=1e-5,
        timed_only=("torch AdamW foreach", FUSED),
    ),
    "diffgrad": Entry(
        "DiffGrad",
        lambda params, **options: DiffGrad(params, LR, BETAS, **options),
        9,
        {
            "pytorch_optimizer DiffGrad": _pytorch_optimizer("DiffGrad", eps=1e-8),
            "torch_optimizer DiffGrad": _torch_optimizer("DiffGrad", eps=1e-8),
            FUSED: _torch_adamw(fused=True),
        },
        same=1e-5,  # where a gradient is below eps, what is left of the step is rounding
        timed_only=(FUSED,),
    ),
    "adam": Entry(
        "AdamW (the Adam kernel)",
        _adamw,
        7,
        {
            "torch AdamW single": _torch_adamw(foreach=False),
            "torch AdamW foreach": _torch_adamw(foreach=True),
            "galore-torch GaLoreAdamW, full rank": _galore,
            FUSED: _torch_adamw(fused=True),
        },
        timed_only=("galore-torch GaLoreAdamW, full rank", FUSED),  # GaLore's eps stands elsewhere
    ),
}


def params_of(count: int, size: int, seed: int = 0) -> Params:
    """Parameters with gradients."""
    g = torch.Generator().manual_seed(seed)
    found = [nn.Parameter(torch.randn(size, generator=g)) for _ in range(count)]
    for p in found:
        p.grad = torch.randn(size, generator=g)
    return found


def stepping(optimizer: torch.optim.Optimizer, params: Params, steps: int) -> Callable[[], list[Tensor]]:
    """Some steps on the same gradients; gives the weights."""

    def work() -> list[Tensor]:
        for _ in range(steps):
            optimizer.step()
        return [p.detach() for p in params]

    return work


def agree(share: float) -> Callable[[list[Tensor], list[Tensor]], None]:
    """A check that two lists of weights are equal to 1e-5, but for a share of them."""

    def check(a: list[Tensor], b: list[Tensor]) -> None:
        apart = sum(int((x - y).abs().gt(1e-5).sum()) for x, y in zip(a, b, strict=True))
        total = sum(x.numel() for x in a)
        assert apart <= share * total, f"{apart} of {total} weights differ by more than 1e-5"

    return check


def race_entry(entry: Entry, rounds: int = 7) -> None:
    """Ours as it comes against every peer on large and on small tensors; flat storage; the byte floor."""
    for shape, target, steps in ((LARGE, 2.5, 3), (SMALL, 1.0, 10)):
        _against_peers(entry, shape, {}, steps, target, rounds)
    if not entry.flat:
        return
    for options in ({"flat": True}, {"flat": True, "compile": True}):
        words = f"{entry.name} {', '.join(options)}"
        _against_peers(entry, SMALL, options, 10, 8.0, rounds, timed_only=False)
        ours, theirs = params_of(*LARGE), params_of(*LARGE)
        race(
            f"{words}, {LARGE[0]:,} tensors of {LARGE[1]:,}, 3 steps",
            stepping(entry.make(ours, **options), ours, 3),
            stepping(entry.make(theirs), theirs, 3),
            peer=f"{entry.name} as it comes",
            rounds=rounds,
            check=agree(max(entry.same, 1e-5)),
        )
        ours = params_of(*LARGE)
        floor(words, stepping(entry.make(ours, **options), ours, 3), 3, entry.passes)


def _against_peers(
    entry: Entry,
    shape: tuple[int, int],
    options: dict[str, bool],
    steps: int,
    target: float,
    rounds: int,
    timed_only: bool = True,
) -> None:
    words = "".join(f" {option}" for option in options)
    name = f"{entry.name}{words}, {shape[0]:,} tensors of {shape[1]:,}, {steps} steps"
    for peer, make in entry.peers.items():
        other = peer in entry.timed_only
        if other and not timed_only:
            continue
        ours, theirs = params_of(*shape), params_of(*shape)
        try:
            their_step = stepping(make(theirs), theirs, steps)
        except (ImportError, AttributeError) as error:
            missing(peer, f"{type(error).__name__}: {error}")
            continue
        race(
            name,
            stepping(entry.make(ours, **options), ours, steps),
            their_step,
            peer=peer,
            rounds=rounds,
            check=None if other else agree(max(entry.same, 1e-5) if options else entry.same),
            target=None if other else target,
        )


def floor(name: str, work: Callable[[], Any], steps: int, passes: int, rounds: int = 9) -> None:
    """Time of a step against the time in which the machine copies as many bytes as it must move, alternating."""
    import statistics
    import time

    count, size = LARGE
    moved = 4 * count * size * passes
    source = torch.zeros(moved // 8)  # a copy reads and writes each
    target = torch.zeros_like(source)
    own, copies = [], []
    work()
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        middle = time.perf_counter()
        target.copy_(source)
        copies.append(time.perf_counter() - middle)
        own.append((middle - began) / steps)
    ratio = statistics.median(a / b for a, b in zip(own, copies, strict=True))
    figure(
        f"{name}, {count} tensors of {size:,}",
        step_ms=1e3 * statistics.median(own),
        bytes_moved=moved,
        copy_gb_per_s=moved / statistics.median(copies) / 1e9,
        times_the_floor=ratio,
        target="1.5" if "compile" in name else "none",
        met=ratio <= 1.5,
    )
