"""The parts of the Fashion-MNIST table: a set to learn or an image rate to try, each kept and resumed on its own."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from gradmatch.core import checks
from gradmatch.core.examples import Examples
from gradmatch.core.store import read_json, write_json
from gradmatch.data import DCC, FTD, TESLA, AutoDistill, SyntheticDataset, evaluate, random_subset
from gradmatch.data._common import Distiller
from gradmatch.datasets import fashion_mnist
from gradmatch.evidence._common import Settings, hold_out, kept
from gradmatch.zoo import ConvNet, convnet

SLUG = "fashion-mnist-table"
AUTO, LONG_AUTO = "auto", "auto, long"
TUNING_SEED = 1000
NETWORK_SEED = 10_000  # evaluation network k of a seed is trained from seed + k * NETWORK_SEED
HELD_PER_CLASS = 500
_KEEP_SECONDS = 5.0


def wide() -> ConvNet:
    """The published evaluator's network."""
    return convnet(width=128)


def narrow() -> ConvNet:
    """The network every method distils with."""
    return convnet(width=32)


@lru_cache(maxsize=1)
def _data() -> tuple[Examples, Examples]:
    split = fashion_mnist()
    return split.train, split.test


@lru_cache(maxsize=1)
def _held_out() -> tuple[Examples, Examples]:
    return hold_out(_data()[0], HELD_PER_CLASS, TUNING_SEED)


# Image updates that take about half a minute of one quiet core of the machine the results were made on.
STEPS = {
    "dc": {1: 75, 10: 35},
    "dsa": {1: 70, 10: 32},
    "dcc": {1: 80, 10: 38},
    "dsac": {1: 70, 10: 32},
    "ftd": {1: 40, 10: 6},
    "tesla": {1: 40, 10: 6},
    "auto": {1: 150, 10: 60},
}
LONG = 10  # the full budget's multiple of those


@dataclass(frozen=True)
class Cell:
    """One synthetic set of the table: a row, images per class and a seed."""

    row: str
    method: str
    ipc: int
    seed: int
    networks: int
    lr: float
    full: bool

    @property
    def name(self) -> str:
        """A file name."""
        return f"{self.row}-{self.ipc}-{self.seed}".replace(", ", "-").replace(" ", "-")

    def distiller(self) -> Distiller | None:
        """The method in the settings of this cell; none for random images."""
        if self.method == "random":
            return None
        if self.row == LONG_AUTO:
            return AutoDistill(per_class=self.ipc, seed=self.seed, preset="full")
        steps = STEPS[self.method][self.ipc] * (LONG if self.full else 1)
        if self.method == "auto":
            return AutoDistill(per_class=self.ipc, seed=self.seed, steps=steps, refine_steps=0)
        return _published_method(self.method, self.ipc, self.seed, steps, self.lr)

    def config(self) -> dict[str, Any]:
        """All that decides the set."""
        made = self.distiller()
        own = {"method": self.method} if made is None else made.describe()
        return own | {"ipc": self.ipc, "seed": self.seed}


def _published_method(method: str, ipc: int, seed: int, steps: int, lr: float) -> Distiller:
    """A published method in settings that fit the time: smaller real batches and fewer epochs than its preset."""
    if method in ("dc", "dsa", "dcc", "dsac"):
        return DCC(
            per_class=ipc,
            method=method,
            steps=steps,
            inner_loop=10,
            net_epochs=5,
            batch_real=64,
            lr_img=lr,
            seed=seed,
        )
    experts = {"n_experts": 2, "epochs": 5, "lr": 0.02, "batch_size": 64}
    common: dict[str, Any] = {
        "per_class": ipc,
        "steps": steps,
        "syn_steps": 10,
        "expert_epochs": 1,
        "max_start_epoch": 4,
        "lr_img": lr,
        "lr_syn": 0.02,
        "seed": seed,
    }
    if method == "ftd":
        return FTD(experts=experts | {"rho": 0.2, "alpha": 0.3, "adaptive": False}, ema_decay=0.9, **common)
    return TESLA(experts=experts, **common)


def tuned(settings: Settings, method: str, ipc: int, lr: float, full: bool) -> dict[str, float]:
    """Hold-out accuracy of one image rate: a third of the time, one network of width 32."""
    steps = max(2, STEPS[method][ipc] // 3) * (LONG if full else 1)

    def make() -> dict[str, float]:
        began = time.perf_counter()
        train, held = _held_out()
        train = _expert_share(method, train)
        try:
            made = _published_method(method, ipc, TUNING_SEED, steps, lr).distill(train, narrow)
        except checks.InputError:  # a rate at which the loss leaves the finite numbers is the worst there is
            return {"accuracy": 0.0, "wall": time.perf_counter() - began}
        scores = evaluate(made, narrow, held, networks=1, epochs=150, lr=0.02, program="loop")
        return {"accuracy": scores.mean, "wall": time.perf_counter() - began}

    config = {"steps": steps, "lr": lr, "version": 1}
    return dict(kept(settings, SLUG, f"tune-{method}-{ipc}-{lr:g}", config, make))


def _expert_share(method: str, train: Examples) -> Examples:
    """Expert trajectories are trained on 200 images of each class: all 60,000 would take the whole time."""
    return hold_out(train, 200, TUNING_SEED)[1] if method in ("ftd", "tesla") else train


def distilled(settings: Settings, cell: Cell) -> dict[str, float]:
    """Learn (or draw) the set of a cell into its folder, going on where a stopped run was; computing seconds."""
    config = cell.config()
    folder = settings.runs / SLUG / f"{cell.name}-{_digest(config)}"

    def make() -> dict[str, float]:
        train, method = _data()[0], cell.distiller()
        if method is None:
            random_subset(train, cell.ipc, cell.seed).save(folder)
            return {"seconds": 0.0, "wall": 0.0}
        clock = _Clock(folder.with_suffix(".seconds.json"))
        method.distill(_expert_share(cell.method, train), narrow, out=folder, resume=True, progress=clock)
        return clock.keep()

    return dict(kept(settings, SLUG, f"{cell.name}-set", config, make))


class _Clock:
    """Processor and wall seconds of a job over all its runs, kept beside it every few seconds."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.before = read_json(file) if file.exists() else {"seconds": 0.0, "wall": 0.0}
        self.began, self.kept = (time.process_time(), time.perf_counter()), time.perf_counter()

    def __call__(self, *_: object) -> None:
        if time.perf_counter() - self.kept >= _KEEP_SECONDS:
            self.keep()

    def keep(self) -> dict[str, float]:
        """Write the figures; and return them."""
        self.kept = time.perf_counter()
        spent = {
            "seconds": self.before["seconds"] + time.process_time() - self.began[0],
            "wall": self.before["wall"] + self.kept - self.began[1],
        }
        write_json(self.file, spent)
        return spent


def _digest(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]


def scored(settings: Settings, cell: Cell, network: int, hard: bool) -> dict[str, float]:
    """Test accuracy of one fresh network trained as published on a cell's set, with hard labels if so asked."""
    config = cell.config() | {"network": network, "hard": hard}
    folder = settings.runs / SLUG / f"{cell.name}-{_digest(cell.config())}"

    def make() -> dict[str, float]:
        began = time.perf_counter()
        made = SyntheticDataset.load(folder)
        if hard:
            made = replace(made, labels=made.hard_labels)
        # the learned rate belongs to plain steps without momentum; the table's evaluator is one and the same for all
        seed = NETWORK_SEED * network + cell.seed
        scores = evaluate(made, wide, _data()[1], networks=1, lr=0.01, seed=seed, program="loop")
        return {"accuracy": scores.mean, "wall": time.perf_counter() - began}

    return dict(kept(settings, SLUG, f"{cell.name}-net{network}{'-hard' * hard}", config, make))
