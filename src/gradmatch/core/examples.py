"""Labelled examples in memory, in a fixed order, from whatever the user has."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gradmatch.core import checks

_IMAGE_KEYS = ("image", "img", "pixel_values", "images", "x", "input")
_LABEL_KEYS = ("label", "labels", "y", "target", "fine_label")


@dataclass(frozen=True)
class Examples:
    """Inputs ``x`` (n, ...) in float32 or float64 with class labels ``y`` (n,) in 0..classes-1."""

    x: Tensor
    y: Tensor
    classes: int

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]

    def of_class(self, label: int) -> Tensor:
        """Indices (n_c,) of the examples of one class, in order."""
        return torch.nonzero(self.y == label).flatten()

    def take(self, indices: Tensor) -> Examples:
        """The examples at ``indices``, with the same number of classes."""
        return Examples(self.x[indices], self.y[indices], self.classes)

    def to(self, device: torch.device | str) -> Examples:
        """The same examples on another device."""
        return Examples(self.x.to(device), self.y.to(device), self.classes)


def as_examples(source: Any, classes: int | None = None, *, name: str = "dataset") -> Examples:
    """Read labelled data once, in its order, into memory.

    Args:
        source: ``Examples``; a pair of arrays or tensors ``(x, y)``; a torch ``Dataset`` or Hugging Face
            data set of (input, label) rows; or a DataLoader-like iterable of batches. uint8 images become
            float32 in [0, 1]; PIL images become (c, h, w). A loader with random transforms is read once,
            and that one draw is what is used (a warning says so for shuffling loaders).
        classes: number of classes; default is the largest label plus one.

    Returns:
        Examples with finite inputs and labels 0..C-1, every class present.

    Raises:
        InputError: no rows, labels of another length, not whole, missing classes, or non-finite inputs.

    >>> as_examples((torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 0, 1]))).classes
    2
    """
    if isinstance(source, Examples):
        checks.finite(f"{name} inputs", source.x)
        checks.labels(f"{name} labels", source.y, classes or source.classes)
        return source
    if isinstance(source, tuple | list) and len(source) == 2 and hasattr(source[0], "shape"):
        x, y = as_tensor(f"{name} inputs", source[0]), as_tensor(f"{name} labels", source[1])
    elif isinstance(source, DataLoader) or (isinstance(source, Iterable) and not _is_map_style(source)):
        x, y = _read_batches(source, name)
    elif _is_map_style(source):
        x, y = _read_rows(source, name)
    else:
        checks.refuse(
            f"{name} is a {type(source).__name__}; it must be (x, y) arrays, a Dataset, a DataLoader or Examples."
        )
    checks.same_length(f"{name} inputs", x, f"{name} labels", y)
    x = _as_float(x)
    if not y.is_floating_point():
        y = y.long()
    count = checks.labels(f"{name} labels", y.flatten() if y.ndim == 2 and y.shape[1] == 1 else y, classes)
    return Examples(checks.finite(f"{name} inputs", x), y.flatten(), count)


def _is_map_style(source: Any) -> bool:
    return isinstance(source, Dataset) or (hasattr(source, "__getitem__") and hasattr(source, "__len__"))


def as_tensor(name: str, value: Any) -> Tensor:
    """An array, number, list of numbers or PIL image (c, h, w) as a tensor; names and objects are refused."""
    if isinstance(value, Tensor):
        return value.detach()
    if hasattr(value, "convert") and hasattr(value, "getbands"):  # a PIL image
        if value.mode in ("P", "PA"):  # numbers of colours are no intensities
            value = value.convert("RGB")
        array = np.array(value)
        return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())
    try:
        array = np.array(value)
    except ValueError as error:  # rows of unequal length
        raise checks.InputError(f"{name} cannot be made an array: {error}.") from error
    if array.dtype.kind not in "biuf":
        example = array.flat[0] if array.size else value
        checks.refuse(f"{name} holds {type(example).__name__} values; it must hold numbers.")
    if array.dtype == np.float64 and not hasattr(value, "dtype"):
        array = array.astype(np.float32)  # Python numbers, which have no precision of their own
    return torch.from_numpy(array)


def _as_float(x: Tensor) -> Tensor:
    if x.dtype == torch.uint8:
        return x.float() / 255
    return x if x.dtype == torch.float64 else x.float()


def _split_row(row: Any, name: str) -> tuple[Any, Any]:
    if isinstance(row, Mapping):
        x = next((row[k] for k in _IMAGE_KEYS if k in row), None)
        y = next((row[k] for k in _LABEL_KEYS if k in row), None)
        if x is None or y is None:
            checks.refuse(f"{name} has columns {sorted(row)}; it needs an image column and a label column.")
        return x, y
    checks.require(
        isinstance(row, tuple | list) and len(row) >= 2,
        f"{name} rows are {type(row).__name__}; they must be (input, label).",
    )
    return row[0], row[1]


def _read_rows(source: Any, name: str) -> tuple[Tensor, Tensor]:
    checks.require(len(source) > 0, f"{name} is empty; at least one example is needed.")
    rows = [_split_row(source[i], name) for i in range(len(source))]
    xs = [as_tensor(f"{name} inputs", x) for x, _ in rows]
    return _stack(xs, name), torch.stack([as_tensor(f"{name} labels", y) for _, y in rows])


def _read_batches(source: Iterable[Any], name: str) -> tuple[Tensor, Tensor]:
    if isinstance(source, DataLoader) and type(source.sampler).__name__ == "RandomSampler":
        warnings.warn(
            f"{name} is a shuffling DataLoader; one pass of it is read and kept, in the order it came.",
            stacklevel=3,
        )
    state = torch.random.get_rng_state()  # a DataLoader draws a seed from the global generator
    try:
        batches = [_split_row(batch, name) for batch in source]
    finally:
        torch.random.set_rng_state(state)
    checks.require(len(batches) > 0, f"{name} is empty; at least one example is needed.")
    xs = torch.cat([as_tensor(f"{name} inputs", x) for x, _ in batches])
    return xs, torch.cat([as_tensor(f"{name} labels", y).flatten() for _, y in batches])


def _stack(xs: list[Tensor], name: str) -> Tensor:
    shapes = {tuple(x.shape) for x in xs}
    if len(shapes) > 1:
        checks.refuse(
            f"{name} has inputs of shapes {checks.listing(sorted(shapes))}; all must have one shape."
        )
    return torch.stack(xs)
