"""Updating a model task by task so that its features stay comparable, with rehearsal and replacement."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from gradmatch.core import checks
from gradmatch.core._batches import Batch, OrderedData
from gradmatch.core.store import generator_state, load_tensors, restored_generator, save_tensors
from gradmatch.core.tap import evaluating
from gradmatch.embed.stationary import CompatibleModel, hoc_loss

__all__ = ["CompatibleTrainer", "Update"]

Agreement = Callable[[Tensor, Tensor, Tensor], Tensor]
Optimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Update:
    """One task's training.

    Attributes:
        task: its number, from 1.
        losses: of every step.
        classes: labels of which the memory has images now.
    """

    task: int
    losses: tuple[float, ...]
    classes: tuple[int, ...] = field(default=())


def published_optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The paper's for CIFAR-100: SGD at 1e-3, momentum 0.9, weight decay 5e-4."""
    return torch.optim.SGD(groups, lr=1e-3, momentum=0.9, weight_decay=5e-4)


class CompatibleTrainer:
    """Trains a model on one task after the other: L = lam CE + (1 - lam) L_HOC against the frozen old model.

    Batches are half new images and half rehearsed ones, once there are any. Vectors (biases, norms) have no weight
    decay, the vertices are no parameters. The rate falls by a cosine to a hundredth within each task.

    Args:
        model: a :class:`CompatibleModel`; trained in place, and kept as ``.model`` (a replacement takes its place).
        optimizer: makes an optimizer of parameter groups; default the published SGD.
        lam: weight of cross-entropy; 0.1 as published. 1 trains the stationary classifier alone.
        mu: of :func:`hoc_loss`.
        memory_per_class: images of a class that are kept for later tasks; 20 as published.
        epochs: of each task; 70 as published.
        batch_size: of data without batches, new and rehearsed together; 128 as published.
        official: of :func:`hoc_loss`.
        agreement: loss (new features, old features, labels) in place of :func:`hoc_loss`, for comparisons.
        seed: of the order of images and of the memory.

    >>> from gradmatch.embed import StationaryHead
    >>> model = CompatibleModel(nn.Flatten(), StationaryHead(4, num_classes=6))
    >>> trainer = CompatibleTrainer(model, epochs=1)
    >>> trainer.update((torch.randn(8, 1, 2, 2), torch.arange(8) % 2)).classes
    (0, 1)
    """

    def __init__(
        self,
        model: CompatibleModel,
        optimizer: Optimizer = published_optimizer,
        lam: float = 0.1,
        mu: float = 10.0,
        memory_per_class: int = 20,
        *,
        epochs: int = 70,
        batch_size: int = 128,
        official: bool = False,
        agreement: Agreement | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.optimizer = _compatible("model", model), optimizer
        self.lam = checks.fraction("lam", lam, zero=True)
        mu_ = checks.positive("mu", mu)
        self.agreement = agreement or (lambda new, old, y: hoc_loss(new, old, y, mu_, official))
        self.memory_per_class = checks.whole("memory_per_class", memory_per_class, 0)
        self.epochs = checks.whole("epochs", epochs)
        self.batch_size = checks.whole("batch_size", batch_size, 2)
        self.memory: dict[int, Tensor] = {}
        self.tasks = 0
        self.generator = torch.Generator().manual_seed(checks.whole("seed", seed, 0))

    def update(
        self,
        data: Any,
        old_model: nn.Module | None = None,
        replace_with: CompatibleModel | None = None,
        progress: Callable[[int, int, float], Any] | None = None,
    ) -> Update:
        """Train on one task.

        Args:
            data: its labelled images: (x, y), a ``Dataset``, or a ``DataLoader``, whose batches are the new halves.
            old_model: what the features are held to. Default, as released, is the model as it stands when training
                begins: the last checkpoint, or at a replacement the replacement itself. Give the model that is
                replaced for the stronger constraint.
            replace_with: a better model, trained elsewhere with the same simplex, that takes over before training.
            progress: called with (step, steps, loss).

        Raises:
            InputError: a replacement with other slots or widths, labels without slots, or a loss that is not finite.
        """
        if replace_with is not None:
            self._replace(replace_with)
        old = copy.deepcopy(self.model if old_model is None else old_model).requires_grad_(False)
        mode = self.model.training
        self.model.train()
        try:
            with self._seeded(), evaluating(old):
                losses = self._trained(self._source(data), old, progress)
        finally:
            self.model.train(mode)
        self.tasks += 1
        return Update(self.tasks, tuple(losses), tuple(sorted(self.memory)))

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Within the block dropout and loaders, which draw from the global generator, follow the trainer's own."""
        device = next(self.model.parameters()).device
        ahead = torch.Generator().set_state(self.generator.get_state())
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int(torch.randint(2**62, (), generator=ahead)))
            yield

    def _trained(
        self, source: OrderedData, old: nn.Module, progress: Callable[[int, int, float], Any] | None
    ) -> list[float]:
        """The losses of every step on one task, whose images are remembered in the end."""
        steps = self.epochs * (len(source.sizes) if source._whole is None else len(_cut(source)))
        optimizer = self.optimizer(_groups(self.model))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, steps, optimizer.param_groups[0]["lr"] / 100
        )
        losses: list[float] = []
        for new in self._new(source):
            losses.append(self._step(new, old, optimizer))
            schedule.step()
            if progress is not None:
                progress(len(losses), steps, losses[-1])
        self._remember(source)
        return losses

    def save(self, path: str | Path) -> Path:
        """Keep the model's weights, the memory and the count of tasks, to go on later with the same result."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"memory.{label}": x for label, x in self.memory.items()}
        return save_tensors(
            path, tensors | {"generator": generator_state(self.generator)}, {"tasks": self.tasks}
        )

    def load(self, path: str | Path) -> None:
        """Go on from what :meth:`save` kept of a trainer with the same architecture.

        Raises:
            InputError: features of another space, other weights, or a file that is no such state.
        """
        tensors, found = load_tensors(path)
        checks.require(
            "generator" in tensors and "tasks" in found, f"{path} is not what CompatibleTrainer.save writes."
        )
        state = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        try:
            self.model.load_state_dict(state)
        except RuntimeError as error:
            raise checks.InputError(
                f"{path} does not fit the model: {' '.join(str(error).split())[:200]}."
            ) from error
        parts = {k.removeprefix("memory."): v for k, v in tensors.items() if k.startswith("memory.")}
        self.memory = {int(k): x for k, x in parts.items()}
        self.tasks, self.generator = int(found["tasks"]), restored_generator(tensors["generator"])

    def _source(self, data: Any) -> OrderedData:
        """The task's data in batches of the size of the new half."""
        size = self.batch_size // 2 if self.memory else self.batch_size
        if isinstance(data, Dataset):
            data = DataLoader(data, size, shuffle=True, generator=self.generator)
        source = OrderedData(data, size, check_order=False)
        first = next(iter(source)).inputs
        checks.require(
            isinstance(first, Tensor), f"data has inputs of {type(first).__name__}; they must be tensors."
        )
        return source

    def _replace(self, other: CompatibleModel) -> None:
        _compatible("replace_with", other)
        ours, theirs = self.model.head, other.head
        checks.require(
            ours.num_classes == theirs.num_classes,
            f"replace_with has {theirs.num_classes} slots and the model {ours.num_classes}; they do not compare.",
        )
        self.model = CompatibleModel(other.backbone, copy.deepcopy(theirs))
        self.model.head.slots, self.model.head.space = ours.slots, ours.space.clone()

    def _new(self, source: OrderedData) -> Iterator[Batch]:
        """The task's batches, in memory in a new order every epoch, as they come from loaders."""
        for _ in range(self.epochs):
            if source._whole is None:
                yield from source
                continue
            everything = Batch(*source._whole, start=0)
            for at in torch.split(torch.randperm(source.n, generator=self.generator), _cut(source)):
                yield everything.take(at)

    def _step(self, new: Batch, old: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        device = next(self.model.parameters()).device
        x, y = new.inputs.to(device), new.target.to(device)
        if self.memory:
            kept, owners = self._rehearsed(len(y))
            x, y = torch.cat([x, kept.to(x)]), torch.cat([y, owners.to(y)])
        features = self.model(x)
        slots = self.model.head.targets(y)
        loss = self.lam * F.cross_entropy(self.model.head.classify(features), slots)
        if self.lam < 1:
            with torch.no_grad():
                before = old(x)
            loss = loss + (1 - self.lam) * self.agreement(features, before, y)
        value = checks.number("the loss", loss.detach())
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value

    def _rehearsed(self, count: int) -> tuple[Tensor, Tensor]:
        """Images and labels drawn from the memory."""
        kept = sorted(self.memory.items())
        images = torch.cat([x for _, x in kept])
        owners = torch.cat([torch.full((len(x),), label) for label, x in kept])
        at = torch.randint(len(images), (count,), generator=self.generator)
        return images[at], owners[at]

    def _remember(self, source: OrderedData) -> None:
        """Keep images of the task's classes, each as likely as any other of its class."""
        best: dict[int, tuple[Tensor, Tensor]] = {}
        if not self.memory_per_class:
            return
        for batch in source:
            keys = torch.rand(batch.size, generator=self.generator)
            for label in batch.target.unique().tolist():
                at = (batch.target == label).cpu()
                x, k = batch.inputs[at.to(batch.inputs.device)].cpu(), keys[at]
                if label in best:
                    x, k = torch.cat([best[label][0], x]), torch.cat([best[label][1], k])
                order = k.argsort()[: self.memory_per_class]
                best[int(label)] = x[order], k[order]
        self.memory |= {label: x.clone() for label, (x, _) in best.items()}


def _cut(source: OrderedData) -> list[int]:
    """Sizes of batches in memory; a last one of a single image, which batch-norm refuses, joins the one before."""
    *sizes, last = source.sizes
    return [*sizes[:-1], sizes[-1] + 1] if last == 1 and sizes else [*sizes, last]


def _compatible(name: str, model: Any) -> CompatibleModel:
    checks.require(
        isinstance(model, CompatibleModel),
        f"{name} is a {type(model).__name__}; it must be a CompatibleModel(backbone, StationaryHead(...)).",
    )
    found: CompatibleModel = model
    return found


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices with the optimizer's own weight decay, vectors with none."""
    trained = [p for p in model.parameters() if p.requires_grad]
    vectors = [p for p in trained if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]
