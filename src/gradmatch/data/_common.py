"""What the data systems share: the synthetic set, its evaluator, and the resumable loop that learns it."""

from __future__ import annotations

import copy
import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Dataset

from gradmatch.core import checks
from gradmatch.core.ensemble import train_ensemble
from gradmatch.core.examples import Examples, as_examples
from gradmatch.core.networks import Network, build, output_width
from gradmatch.core.store import RunFolder, generator_state, load_tensors, save_tensors

FILE = "synthetic.safetensors"
Progress = Callable[[int, int, Mapping[str, float]], None]
"""Called after every step with (steps done, steps in all, figures such as the loss)."""
State = dict[str, Tensor | torch.Generator]
"""All that a run needs to go on from a step: tensors, and the generators it draws from."""


@dataclass(frozen=True)
class SyntheticDataset(Dataset[tuple[Tensor, Tensor]]):
    """A small learned training set; itself a torch ``Dataset`` of (image, label).

    Attributes:
        images: (n, channels, height, width) float32, in the scale of the data they were learned from, unclipped.
        labels: (n,) whole numbers, or (n, classes) probabilities.
        classes: number of classes.
        lr: learned step size for training on the set, or None where the method learns none.
        mean, std: per-channel standardisation under which the set was learned and is evaluated, or None.
        meta: how it was made, as JSON values.
    """

    images: Tensor
    labels: Tensor
    classes: int
    lr: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.same_length("images", self.images, "labels", self.labels)
        checks.finite("images", self.images)
        checks.finite("labels", self.labels)
        if self.labels.ndim == 2:
            checks.require(
                self.labels.shape[1] == self.classes,
                f"labels have {self.labels.shape[1]} columns; they must have one for each of {self.classes} classes.",
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    @property
    def soft(self) -> bool:
        """Whether the labels are probabilities."""
        return self.labels.ndim == 2

    @property
    def hard_labels(self) -> Tensor:
        """The class (n,) of every image; the most probable one where labels are soft."""
        return self.labels.argmax(1) if self.soft else self.labels

    def standardised(self) -> Tensor:
        """The images as the evaluator feeds them to a network."""
        return standardise(self.images, self.mean, self.std)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, atomically; a folder gets ``synthetic.safetensors``."""
        header = {
            "classes": self.classes,
            "lr": self.lr,
            "mean": self.mean,
            "std": self.std,
            "meta": self.meta,
        }
        return save_tensors(_file(path), {"images": self.images, "labels": self.labels}, header)

    @classmethod
    def load(cls, path: str | Path) -> SyntheticDataset:
        """Read what :meth:`save` wrote, from the file or its folder.

        Raises:
            InputError: the file is missing, broken or not a synthetic set.
        """
        tensors, header = load_tensors(_file(path))
        checks.require(
            {"images", "labels"} <= tensors.keys() and "classes" in header,
            f"{path} does not hold a synthetic set.",
        )
        mean, std = (None if header[k] is None else tuple(header[k]) for k in ("mean", "std"))
        return cls(
            tensors["images"],
            tensors["labels"],
            header["classes"],
            header["lr"],
            mean,
            std,
            dict(header["meta"]),
        )

    def contact_sheet(self, path: str | Path | None = None, real: Any = None, most: int = 10) -> np.ndarray:
        """One picture (height, width, 3) uint8: a row a class, learned images, then real ones beside them.

        Args:
            path: where to write it as PNG (needs pillow); default nowhere.
            real: data to take as many real images of each class from; default none.
            most: at most so many images of a class.
        """
        rows = _class_rows(self.images, self.hard_labels, self.classes, most)
        if real is not None:
            examples = as_examples(real)
            beside = _class_rows(examples.x, examples.y, self.classes, rows.shape[1])
            rows = np.concatenate([rows, np.ones_like(rows[:, :1]), beside], axis=1)
        sheet = _tile(rows)
        if path is not None:
            from PIL import Image

            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(sheet).save(path)
        return sheet

    def evaluate(self, network: Network, test: Any, **options: Any) -> Evaluation:
        """Train fresh networks on this set and test them; see :func:`evaluate`."""
        return evaluate(self, network, test, **options)


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / FILE


def _class_rows(images: Tensor, labels: Tensor, classes: int, most: int) -> np.ndarray:
    """(classes, k, h, w, 3) in [0, 1]: each image stretched over its own central range."""
    k = min(most, max(1, int(torch.bincount(labels, minlength=classes).max())))
    c, h, w = images.shape[1:] if images.ndim == 4 else (1, 1, images[0].numel())
    out = np.ones((classes, k, h, w, 3), dtype=np.float32)
    for label in range(classes):
        for j, i in enumerate(torch.nonzero(labels == label).flatten()[:k].tolist()):
            image = images[i].detach().float().cpu().reshape(c, h, w)
            low, high = torch.quantile(image, 0.01), torch.quantile(image, 0.99)
            shown = ((image - low) / (high - low).clamp_min(1e-6)).clamp(0, 1).numpy()
            out[label, j] = (shown if c == 3 else shown[:1].repeat(3, 0)).transpose(1, 2, 0)
    return out


def _tile(rows: np.ndarray, margin: int = 2) -> np.ndarray:
    padded = np.pad(rows, ((0, 0), (0, 0), (0, margin), (0, margin), (0, 0)), constant_values=1.0)
    r, k, h, w, _ = padded.shape
    sheet = padded.transpose(0, 2, 1, 3, 4).reshape(r * h, k * w, 3)
    scale = max(1, 56 // h)
    return (sheet * 255).astype(np.uint8).repeat(scale, 0).repeat(scale, 1)


def _shaped(x: Tensor, values: tuple[float, ...]) -> Tensor:
    ends = (1,) * max(0, x.ndim - 2)
    return torch.tensor(values, dtype=x.dtype, device=x.device).reshape(1, -1, *ends)


def channel_moments(x: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel of (n, channels, ...); of all entries together for (n, d)."""
    if x.ndim <= 2:
        return (x.double().mean().item(),), (max(x.double().std().item(), 1e-6),)
    flat = x.double().transpose(0, 1).flatten(1)
    return tuple(flat.mean(1).tolist()), tuple(flat.std(1).clamp_min(1e-6).tolist())


def standardise(x: Tensor, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Tensor:
    """(x - mean) / std by channel; ``x`` itself where mean is None."""
    return x if mean is None or std is None else (x - _shaped(x, mean)) / _shaped(x, std)


def unstandardise(x: Tensor, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Tensor:
    """The inverse of :func:`standardise`."""
    return x if mean is None or std is None else x * _shaped(x, std) + _shaped(x, mean)


def soft_cross_entropy(logits: Float[Tensor, "n c"], labels: Tensor) -> Tensor:
    """Mean cross-entropy against whole-number labels (n,) or probabilities (n, c)."""
    return torch.nn.functional.cross_entropy(logits, labels)


@dataclass(frozen=True)
class Evaluation:
    """Test accuracies in [0, 1], one a network, and how long training and testing took."""

    accuracies: tuple[float, ...]
    seconds: float
    program: str

    @property
    def mean(self) -> float:
        """Mean accuracy over the networks."""
        return float(np.mean(self.accuracies))

    @property
    def std(self) -> float:
        """Standard deviation over the networks (n - 1 in the denominator); 0 for a single one."""
        return float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else 0.0


def evaluate(
    synthetic: SyntheticDataset,
    network: Network,
    test: Any,
    *,
    networks: int = 3,
    epochs: int = 300,
    lr: float | None = None,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 256,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    seed: int = 0,
    program: str = "auto",
    workers: int | None = None,
    device: torch.device | str | None = None,
) -> Evaluation:
    """Accuracy on ``test`` of fresh networks trained on a synthetic (or any small) set: one evaluator for all.

    The defaults are those published for dataset condensation: SGD at ``lr`` 0.01 (the set's own learned rate
    where it has one), divided by ten after half of the epochs.

    Args:
        synthetic: the set to train on; both it and ``test`` are standardised by its mean and std.
        network: factory of fresh networks with ``synthetic.classes`` outputs.
        test: labelled data (see :func:`gradmatch.core.examples.as_examples`), never used for training.
        networks: how many networks, with seeds that follow from ``seed``.
        epochs, lr, momentum, weight_decay, batch_size, augment: the training of each.
        program, workers: how the networks are trained at once; see ``core.ensemble.train_ensemble``.

    Raises:
        InputError: bad options, or a network of another output width.
    """
    began = time.perf_counter()
    held = as_examples(test, name="test")
    x_test = standardise(held.x.to(synthetic.images.dtype), synthetic.mean, synthetic.std)
    width = output_width(build(network, seed).to(synthetic.images.dtype), synthetic.images[:1])
    checks.require(
        width == synthetic.classes,
        f"network has {width} outputs; it must have one for each of {synthetic.classes} classes.",
    )
    ensemble = train_ensemble(
        network,
        (synthetic.standardised(), synthetic.labels),
        checks.whole("networks", networks),
        epochs=epochs,
        lr=lr if lr is not None else synthetic.lr if synthetic.lr is not None else 0.01,
        momentum=momentum,
        weight_decay=weight_decay,
        batch_size=batch_size,
        augment=augment,
        seed=seed,
        program=program,
        workers=workers,
        device=device,
        test=(x_test, held.y),
    )
    assert ensemble.test_accuracy is not None  # a test set was given
    return Evaluation(
        tuple(float(a) for a in ensemble.test_accuracy), time.perf_counter() - began, ensemble.program
    )


def random_subset(dataset: Any, per_class: int, seed: int = 0) -> SyntheticDataset:
    """``per_class`` real images of every class drawn without replacement: the baseline of every distillation."""
    real = as_examples(dataset)
    mean, std = channel_moments(real.x)
    index = class_draw(real, checks.whole("per_class", per_class), torch.Generator().manual_seed(seed))
    meta = {"method": "random", "per_class": per_class, "seed": seed}
    return SyntheticDataset(real.x[index].clone(), real.y[index].clone(), real.classes, None, mean, std, meta)


def class_draw(real: Examples, per_class: int, generator: torch.Generator) -> Tensor:
    """Indices (classes * per_class,), class by class, drawn without replacement (refused where a class has fewer)."""
    chosen = []
    for label in range(real.classes):
        of = real.of_class(label)
        checks.require(
            len(of) >= per_class,
            f"class {label} has {len(of)} samples; per_class {per_class} needs at least as many.",
        )
        chosen.append(of[torch.randperm(len(of), generator=generator)[:per_class].to(of.device)])
    return torch.cat(chosen)


@dataclass(frozen=True)
class Job:
    """What a distiller works on: standardised real data and the fresh-network factory, on the device."""

    real: Examples
    network: Network
    images: Tensor
    labels: Tensor
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    device: torch.device


class Distiller(ABC):
    """A method that learns a small training set step by step, and can be stopped and resumed at any step.

    A subclass holds its options as public attributes and gives ``start``, ``step`` and ``images_of``
    (and ``labels_of``, ``lr_of`` where it learns those). All that changes lives in the ``State``.

    Args:
        per_class: images per class, at least 1.
        steps: whole steps of the method.
        init: "real" (random real images), "noise" (standard normal), or "mean" (class means).
        standardise: learn in per-channel standardised space (the result is brought back to the data's scale).
        seed: decides everything drawn.
        device: default the device of the data.
    """

    def __init__(
        self,
        *,
        per_class: int = 10,
        steps: int = 1000,
        init: str = "real",
        standardise: bool = True,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        self.per_class = checks.whole("per_class", per_class)
        self.steps = checks.whole("steps", steps, least=0)
        self.init = checks.one_of("init", init, ("real", "noise", "mean"))
        self.standardise = bool(checks.one_of("standardise", standardise, (True, False)))
        self.seed = checks.whole("seed", seed, least=0)
        self.device = device
        self.checkpoint_seconds = 5.0

    @abstractmethod
    def start(self, job: Job) -> State:
        """The state before the first step."""

    @abstractmethod
    def step(self, job: Job, state: State, k: int) -> Mapping[str, float]:
        """Make step ``k`` by changing ``state`` in place; figures to show."""

    @abstractmethod
    def images_of(self, job: Job, state: State) -> Tensor:
        """The learned images (standardised) after the last step."""

    def labels_of(self, job: Job, state: State) -> Tensor:
        """The labels that go with the images."""
        return job.labels

    def lr_of(self, job: Job, state: State) -> float | None:
        """The learned step size, where the method learns one."""
        return None

    def describe(self) -> dict[str, Any]:
        """The options that decide the result, as JSON values."""
        hidden = {"device", "checkpoint_seconds"}
        return {"method": type(self).__name__.lower()} | {
            k: v if isinstance(v, int | float | str | bool | list | type(None)) else repr(v)
            for k, v in vars(self).items()
            if k not in hidden and not k.startswith("_")
        }

    def distill(
        self,
        dataset: Any,
        network: Network,
        *,
        out: str | Path | None = None,
        resume: bool = False,
        init: SyntheticDataset | str | Path | None = None,
        progress: Progress | None = None,
    ) -> SyntheticDataset:
        """Learn the synthetic set from ``dataset``.

        Args:
            dataset: labelled data; see :func:`gradmatch.core.examples.as_examples`.
            network: factory of the networks whose gradients or features are matched.
            out: folder for the result, and for the state from which a killed run is resumed.
            resume: go on from the state in ``out``; the result equals that of an unbroken run.
            init: an earlier result (or its folder) to start from, in place of the option ``init``.
            progress: called after every step.

        Raises:
            InputError: bad data or options, a network of another output width, non-finite loss.
        """
        job = self.job(dataset, network, init)
        folder = (
            None if out is None else RunFolder(out, self.describe() | {"data": _fingerprint(job)}, resume)
        )
        if folder is not None and resume and (folder.path / FILE).exists() and folder.load() is None:
            return SyntheticDataset.load(folder.path)
        kept = folder.load() if folder is not None else None
        done, state = (0, self.start(job)) if kept is None else (kept[0], _unpack(kept[1], job.device))
        last = time.monotonic()
        for k in range(done, self.steps):
            figures = self.step(job, state, k)
            bad = [name for name, value in figures.items() if not np.isfinite(value)]
            checks.require(
                not bad, f"{bad and bad[0]} became non-finite at step {k}; lower the learning rates."
            )
            if progress is not None:
                progress(k + 1, self.steps, figures)
            if folder is not None and time.monotonic() - last >= self.checkpoint_seconds:
                folder.save(k + 1, _pack(state))
                last = time.monotonic()
        result = self._result(job, state)
        if folder is not None:
            folder.finish(result.save)
        return result

    def job(self, dataset: Any, network: Network, init: SyntheticDataset | str | Path | None = None) -> Job:
        """Check and prepare the data: in memory, standardised, on the device, with the initial synthetic set."""
        real = as_examples(dataset)
        device = torch.device(self.device) if self.device is not None else real.x.device
        module = build(network, self.seed).to(real.x.dtype)
        width = output_width(module, real.x[:1].cpu())
        checks.require(
            width == real.classes,
            f"network has {width} outputs; it must have one for each of {real.classes} classes.",
        )
        mean, std = channel_moments(real.x) if self.standardise else (None, None)
        real = replace(real, x=standardise(real.x, mean, std)).to(device)
        labels = torch.arange(real.classes, device=device).repeat_interleave(self.per_class)
        images = self._initial(real, mean, std, init).to(device)
        precise = network if real.x.dtype == torch.float32 else _in_double(network)
        return Job(real, precise, images, labels, mean, std, device)

    def _initial(
        self, real: Examples, mean: Any, std: Any, init: SyntheticDataset | str | Path | None
    ) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        if init is not None:
            given = init if isinstance(init, SyntheticDataset) else SyntheticDataset.load(init)
            return _start_from(given, real, self.per_class, mean, std)
        if self.init == "noise":
            shape = (real.classes * self.per_class, *real.x.shape[1:])
            return torch.randn(shape, generator=generator, dtype=real.x.dtype)
        if self.init == "mean":
            means = torch.stack([real.x[real.of_class(c)].mean(0) for c in range(real.classes)])
            return means.repeat_interleave(self.per_class, 0)
        return real.x[class_draw(real, self.per_class, generator)].clone()

    def _result(self, job: Job, state: State) -> SyntheticDataset:
        images = unstandardise(self.images_of(job, state).detach(), job.mean, job.std)
        labels = self.labels_of(job, state).detach().cpu().clone()
        return SyntheticDataset(
            images.cpu().clone(),
            labels,
            job.real.classes,
            self.lr_of(job, state),
            job.mean,
            job.std,
            self.describe(),
        )


def _in_double(network: Network) -> Network:
    """The same networks in the precision of float64 data."""
    return copy.deepcopy(network).double() if isinstance(network, nn.Module) else lambda: network().double()


def _start_from(given: SyntheticDataset, real: Examples, per_class: int, mean: Any, std: Any) -> Tensor:
    """The first ``per_class`` images of each class of an earlier result, in the new standardised space."""
    checks.require(
        given.images.shape[1:] == real.x.shape[1:] and given.classes == real.classes,
        f"init holds images {tuple(given.images.shape[1:])} of {given.classes} classes; the data has "
        f"{tuple(real.x.shape[1:])} of {real.classes}.",
    )
    earlier = Examples(given.images, given.hard_labels, given.classes)
    index = torch.cat([earlier.of_class(c)[:per_class] for c in range(given.classes)])
    checks.require(
        len(index) == given.classes * per_class,
        f"init holds {len(given)} images of {given.classes} classes; per_class {per_class} needs that many of each.",
    )
    return standardise(given.images[index].to(real.x), mean, std)


def _fingerprint(job: Job) -> str:
    """A digest of the data, the start and the network, so that a resumed run is known to be the same run."""
    digest = hashlib.sha256()
    tensors = [job.real.x, job.real.y, job.images, *build(job.network, 0).state_dict().values()]
    for t in tensors:
        digest.update(repr((tuple(t.shape), t.dtype)).encode())
        digest.update(t.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _pack(state: State) -> dict[str, Tensor]:
    return {
        f"generator:{k}" if isinstance(v, torch.Generator) else k: generator_state(v)
        if isinstance(v, torch.Generator)
        else v
        for k, v in state.items()
    }


def _unpack(tensors: Mapping[str, Tensor], device: torch.device) -> State:
    state: State = {}
    for k, v in tensors.items():
        if k.startswith("generator:"):
            generator = torch.Generator()
            generator.set_state(v)
            state[k.removeprefix("generator:")] = generator
        else:
            state[k] = v.to(device)
    return state
