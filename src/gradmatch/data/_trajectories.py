"""Expert trajectories: the parameters of networks trained on the real data, kept after every epoch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.core._params import ParamSpace
from gradmatch.core.augment import SiameseAugment
from gradmatch.core.ensemble import member_seeds, train_ensemble
from gradmatch.core.examples import Examples, as_examples
from gradmatch.core.networks import Network, build
from gradmatch.core.store import RunFolder, load_tensors, save_tensors
from gradmatch.data._common import channel_moments
from gradmatch.data._common import standardise as standardised
from gradmatch.data._gsam import GSAMUpdate

OPTIMIZERS = ("gsam", "sam", "sgd")
_PART = "experts-{:04d}.safetensors"


@dataclass(frozen=True)
class TrajectoryBuffer:
    """Flat parameters of E experts at initialisation and after every epoch.

    Attributes:
        parts: the experts in groups, each (experts, epochs + 1, P) float32; read from disk they are mapped, not
            loaded, so that a buffer may be larger than the memory.
        names, shapes: the parameters that a vector (P,) strings together, in order.
        meta: how the experts were trained, as JSON values.
    """

    parts: tuple[Tensor, ...]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.require(len(self.parts) > 0, "the trajectory buffer is empty; it needs at least one expert.")
        size = sum(torch.Size(s).numel() for s in self.shapes)
        for part in self.parts:
            checks.require(
                part.ndim == 3 and part.shape[1:] == (self.parts[0].shape[1], size),
                f"the trajectory buffer has a part {tuple(part.shape)}; it must be (experts, epochs + 1, {size}).",
            )

    @property
    def tensor(self) -> Float[Tensor, "experts checkpoints P"]:
        """All trajectories as one tensor; a copy where there are several parts."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)

    def __len__(self) -> int:
        return sum(len(p) for p in self.parts)

    @property
    def epochs(self) -> int:
        """Epochs of training that were recorded; there is one checkpoint more."""
        return int(self.parts[0].shape[1]) - 1

    def at(self, expert: int, epoch: int) -> Float[Tensor, P]:
        """Parameters of one expert after ``epoch`` epochs (0: initialisation); a view."""
        checks.whole("epoch", epoch, least=0, most=self.epochs)
        left = checks.whole("expert", expert, least=0, most=len(self) - 1)
        for part in self.parts:
            if left < len(part):
                return part[left, epoch]
            left -= len(part)
        raise AssertionError("expert lies in no part")

    def draw(
        self, generator: torch.Generator, max_start_epoch: int, expert_epochs: int
    ) -> tuple[int, int, Tensor, Tensor]:
        """A random segment: expert, start epoch below ``max_start_epoch``, parameters there and later."""
        self.require_segments(max_start_epoch, expert_epochs)
        expert = int(torch.randint(len(self), (1,), generator=generator))
        start = int(torch.randint(max_start_epoch, (1,), generator=generator))
        return expert, start, self.at(expert, start), self.at(expert, start + expert_epochs)

    def require_segments(self, max_start_epoch: int, expert_epochs: int) -> None:
        """Refuse segments that would run past the last checkpoint."""
        checks.require(
            max_start_epoch + expert_epochs <= self.epochs + 1,
            f"max_start_epoch is {max_start_epoch} and expert_epochs {expert_epochs}; together they must be at "
            f"most {self.epochs + 1}, the number of checkpoints in the buffer.",
        )

    def require_network(self, module: nn.Module) -> ParamSpace:
        """The parameter space of ``module``, refused where it is not the experts' own."""
        space = ParamSpace.of({k: p.detach() for k, p in module.named_parameters()})
        own = dict(zip(space.names, (tuple(s) for s in space.shapes), strict=True))
        theirs = dict(zip(self.names, self.shapes, strict=True))
        differing = [k for k in {**own, **theirs} if own.get(k) != theirs.get(k)]
        checks.require(
            not differing and list(own) == list(theirs),
            f"network has other parameters than the buffer's experts (first {differing[:1] or 'in their order'}: "
            f"{own.get(*differing[:1]) if differing else list(own)[:3]} against "
            f"{theirs.get(*differing[:1]) if differing else list(theirs)[:3]}); both must be one architecture.",
        )
        return space

    def save(self, path: str | Path) -> Path:
        """Write the buffer into a folder, one safetensors file a part."""
        for k, part in enumerate(self.parts):
            _write_part(Path(path), k, part, self.names, self.shapes, self.meta)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> TrajectoryBuffer:
        """Map the parts of a folder written by :meth:`save` or :func:`train_experts`.

        Raises:
            InputError: no parts there, or a broken or foreign one.
        """
        files = sorted(p for p in Path(path).glob("experts-*.safetensors") if re.search(r"-\d+\.", p.name))
        checks.require(len(files) > 0, f"{path} holds no expert trajectories.")
        parts, headers = [], []
        for k, file in enumerate(files):
            checks.require(file.name == _PART.format(k), f"{path} lacks {_PART.format(k)}.")
            tensors, header = load_tensors(file)
            checks.require(
                "checkpoints" in tensors and {"names", "shapes", "meta"} <= header.keys(),
                f"{file} does not hold expert trajectories.",
            )
            parts.append(tensors["checkpoints"])
            headers.append(header)
        checks.require(all(h == headers[0] for h in headers), f"{path} holds trajectories of different runs.")
        shapes = tuple(tuple(int(d) for d in s) for s in headers[0]["shapes"])
        return cls(tuple(parts), tuple(headers[0]["names"]), shapes, dict(headers[0]["meta"]))


def _write_part(folder: Path, k: int, part: Tensor, names: Any, shapes: Any, meta: Mapping[str, Any]) -> None:
    header = {"names": list(names), "shapes": [list(s) for s in shapes], "meta": dict(meta)}
    save_tensors(folder / _PART.format(k), {"checkpoints": part}, header)


def train_experts(
    dataset: Any,
    net_factory: Network,
    n_experts: int = 100,
    epochs: int = 50,
    *,
    optimizer: str = "gsam",
    rho: float = 0.01,
    alpha: float = 1.0,
    adaptive: bool = True,
    lr: float = 0.01,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    batch_size: int = 256,
    augment: str | Callable[[Tensor, torch.Generator], Tensor] | None = None,
    standardise: bool = True,
    seed: int = 0,
    at_once: int = 10,
    program: str = "auto",
    out: str | Path | None = None,
    resume: bool = False,
    progress: Callable[[int, int], object] | None = None,
    device: torch.device | str | None = None,
) -> TrajectoryBuffer:
    """Train networks on the real data and keep their parameters at initialisation and after every epoch.

    Defaults are those of FTD's released script for CIFAR; 100 experts of 50 epochs are days of one core for its
    networks. The same seed gives experts of every optimiser the same initial weights and batches.

    Args:
        dataset: labelled data; see :func:`gradmatch.core.examples.as_examples`.
        net_factory: factory of the experts.
        n_experts, epochs: how many, and for how long.
        optimizer: "gsam", "sam" (GSAM with alpha 0), or "sgd"; the rate is constant.
        rho, alpha, adaptive: of GSAM; see :class:`gradmatch.data.GSAM`. The released rho 0.01 with ``adaptive``
            moves an expert by almost nothing: see ``docs/systems/ftd.md`` for radii that do.
        lr, momentum, weight_decay, batch_size: of SGD and of the base optimiser.
        augment: operations of :class:`gradmatch.core.augment.SiameseAugment` joined by "_", or a function
            ``augment(x, generator) -> x``; on every batch.
        standardise: bring every channel to mean 0 and standard deviation 1 first, as the distillers do.
        at_once: experts trained together (and written together); part of what decides their seeds.
        program: how they are trained together; see :func:`gradmatch.core.ensemble.train_ensemble`.
        out: folder for the buffer, which then is read from there, mapped; ``resume`` keeps groups already there.
        progress: called with (expert epochs done, in all).

    Raises:
        InputError: bad data or options, or training that diverges.

    >>> x, y = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2
    >>> train_experts((x, y), lambda: nn.Linear(3, 2), 2, 3, batch_size=10).tensor.shape
    torch.Size([2, 4, 8])
    """
    checks.one_of("optimizer", optimizer, OPTIMIZERS)
    n_experts, at_once = checks.whole("n_experts", n_experts), checks.whole("at_once", at_once)
    checks.one_of("adaptive", adaptive, (True, False))
    checks.one_of("standardise", standardise, (True, False))
    update = None
    if optimizer != "sgd":
        rho, alpha = checks.nonnegative("rho", rho), checks.nonnegative("alpha", alpha)
        alpha = 0.0 if optimizer == "sam" else alpha
        update = GSAMUpdate(rho, alpha, bool(adaptive), momentum, weight_decay)
    augment = SiameseAugment(augment) if isinstance(augment, str) else augment
    real = as_examples(dataset)
    mean, std = channel_moments(real.x) if standardise else (None, None)
    real = Examples(standardised(real.x, mean, std), real.y, real.classes)
    options: dict[str, Any] = {"optimizer": optimizer, "epochs": epochs, "lr": lr, "momentum": momentum}
    options |= {"weight_decay": weight_decay, "batch_size": batch_size}
    meta = options | {"seed": seed, "n_experts": n_experts, "at_once": at_once, "mean": mean, "std": std}
    meta |= {"augment": name_of(augment)}
    meta |= {} if update is None else {"rho": rho, "alpha": alpha, "adaptive": bool(adaptive)}
    folder = None if out is None else RunFolder(out, {"experts": meta, "data": _digest(real)}, resume)
    template = {k: tuple(p.shape) for k, p in build(net_factory, 0).named_parameters()}
    del options["optimizer"]
    parts: list[Tensor] = []
    for k, first in enumerate(range(0, n_experts, at_once)):
        if folder is not None and (folder.path / _PART.format(k)).exists():
            continue
        ensemble = train_ensemble(
            net_factory,
            real,
            min(at_once, n_experts - first),
            **options,
            milestones=(),
            augment=augment,
            update=update,
            record="epochs",
            seed=member_seeds(seed, k).init >> 32,
            program=program,
            device=device,
            progress=_shifted(progress, first * epochs, n_experts * epochs),
        )
        part = ensemble.trajectories
        assert part is not None
        if folder is None:
            parts.append(part)
        else:
            _write_part(folder.path, k, part, template, template.values(), meta)
    if folder is not None:
        return TrajectoryBuffer.load(folder.path)
    return TrajectoryBuffer(tuple(parts), tuple(template), tuple(template.values()), meta)


def _shifted(
    progress: Callable[[int, int], object] | None, before: int, total: int
) -> Callable[[int, int], object] | None:
    return None if progress is None else lambda done, _: progress(before + done, total)


def _digest(real: Examples) -> list[float]:
    """Enough of the data to notice that a resumed run has other data."""
    x = real.x.double()
    return [float(len(real)), float(x.sum()), float(x.square().sum()), float(real.y.sum())]


def name_of(augment: Any) -> str | None:
    """A name of an augmentation that is the same in every process."""
    if augment is None:
        return None
    named = getattr(augment, "__qualname__", None) or type(augment).__qualname__
    plain = {k: v for k, v in getattr(augment, "__dict__", {}).items() if not callable(v)}
    return f"{named}({', '.join(f'{k}={v!r}' for k, v in sorted(plain.items()))})"
