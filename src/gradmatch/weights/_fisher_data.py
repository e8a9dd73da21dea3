"""What a Fisher diagonal is taken over: the first examples of any data, and the scores of their labels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Subset

from gradmatch.core import checks
from gradmatch.core._batches import Batch, examples_of
from gradmatch.core.diagonal import softmax_factor

MOST_PASSES = 4096
"""Backward passes a batch beyond which exact expectations are refused."""


class First:
    """The first ``count`` examples of any data as (inputs, target) batches, walked again whenever asked.

    With ``whole`` the inputs are the batch as it came.
    """

    def __init__(self, data: Any, count: int, batch_size: int, whole: bool) -> None:
        if hasattr(data, "x") and hasattr(data, "y"):
            data = (data.x, data.y)
        if isinstance(data, Tensor | tuple | Mapping):
            data = _Slices(data, checks.whole("batch_size", batch_size))
        elif (examples := examples_of(data)) is not None:
            most = min(count, len(examples))  # type: ignore[arg-type]
            checks.require(most > 0, "data is empty; at least one example is needed.")
            data = DataLoader(Subset(examples, range(most)), batch_size=batch_size)
        checks.require(
            hasattr(data, "__iter__") and not hasattr(data, "__next__"),
            f"data is {type(data).__name__}; it must be tensors, a Dataset, or batches that can be walked again.",
        )
        self.data, self.count, self.whole = data, count, whole

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        left = self.count
        for item in self.data:
            inputs, target = self._pair(item)
            size = len(tree_leaves(inputs)[0])
            yield (inputs, target) if size <= left else tree_map(lambda t: t[:left], (inputs, target))  # noqa: B023
            left -= size
            if left <= 0:
                return

    def _pair(self, item: Any) -> tuple[Any, Any]:
        if isinstance(item, Mapping):
            item = dict(item)  # transformers' own mapping is no tree of tensors
            inputs: Any = {k: v for k, v in item.items() if k != "labels"}
            target = item.get("labels", inputs)
        elif isinstance(item, tuple | list) and len(item) == 2:
            inputs, target = item[0], item[1]
        else:
            inputs = target = item
        return ((item,) if self.whole else inputs), target


class _Slices:
    def __init__(self, data: Any, size: int) -> None:
        self.data, self.size = data, size

    def __iter__(self) -> Iterator[Any]:
        tensors = tree_map(torch.as_tensor, self.data)
        for first in range(0, len(tree_leaves(tensors)[0]), self.size):
            yield tree_map(lambda t: t[first : first + self.size], tensors)  # noqa: B023


class Unlabelled:
    """The inputs of any data, as batches with a target that says nothing."""

    def __init__(self, data: Any, batch_size: int = 512) -> None:
        self.first = First(data, sys.maxsize, batch_size, whole=False)

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        for inputs, _ in self.first:
            yield inputs, torch.zeros(len(tree_leaves(inputs)[0]))


class Wrapped(nn.Module):
    """A model called by a user's function of it and the whole batch."""

    def __init__(self, model: nn.Module, call: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, batch: Any) -> Tensor:
        """Logits of a batch."""
        logits: Tensor = self.call(self.model, batch)
        return logits


def is_causal(model: nn.Module) -> bool:
    """Whether a transformers model predicts the tokens that follow in its own input."""
    config, generates = getattr(model, "config", None), getattr(model, "can_generate", None)
    return callable(generates) and bool(generates()) and not getattr(config, "is_encoder_decoder", False)


class Scores:
    """Vectors s with sum_r s s^T = E (e_y - p)(e_y - p)^T over the labels y, for :func:`squared_pullbacks`."""

    def __init__(self, labels: str, samples: int, causal: bool, device: torch.device, seed: int) -> None:
        self.labels, self.samples, self.causal = labels, samples, causal
        self.generator, self.seed = torch.Generator(device), checks.whole("seed", seed, 0)

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, m, ..., C] for logits [m, ..., C]."""
        checks.require(
            logits.shape[-1] > 1,
            f"model returns logits of one class, shape {tuple(logits.shape)}; two are needed (of a single logit z, "
            "forward= may give 0 and z).",
        )
        counted, truth = self._positions(logits, batch)
        if self.labels == "exact":
            return self._exact(logits, counted)
        p = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
        if self.labels == "sample":
            y, scale = self._drawn(p, batch.start), self.samples**-0.5
        else:
            y, scale = truth[None], 1.0
        score = (-p).expand(len(y), *p.shape).clone()
        score.scatter_add_(-1, y.clamp(min=0)[..., None], score.new_ones(*y.shape, 1))
        return score.mul_(scale * counted[..., None]).to(logits.dtype)

    def _drawn(self, p: Tensor, start: int) -> Tensor:
        """Labels [S, m, ...] from p [m, ..., C]; an example's do not depend on which others stand beside it."""
        rows = []
        for place, own in enumerate(p, start):
            self.generator.manual_seed(self.seed * 1_000_003 + place)
            flat = own.reshape(-1, own.shape[-1])
            y = torch.multinomial(flat, self.samples, replacement=True, generator=self.generator)
            rows.append(y.T.reshape(self.samples, *own.shape[:-1]))
        return torch.stack(rows, 1)

    def _exact(self, logits: Tensor, counted: Tensor) -> Tensor:
        classes, places = logits.shape[-1], logits[0].numel() // logits.shape[-1]
        passes = places * (classes - 1)
        checks.require(
            passes <= MOST_PASSES,
            f"labels is 'exact', which takes {passes} backward passes a batch for outputs {tuple(logits.shape[1:])}; "
            f"above {MOST_PASSES} use labels='sample'.",
        )
        columns = softmax_factor(logits.reshape(-1, classes)).reshape(
            classes - 1, len(logits), places, classes
        )
        columns = columns * counted.reshape(1, len(logits), places, 1)
        if places == 1:
            return columns.reshape(-1, *logits.shape)
        spread = (
            columns[:, None]
            * torch.eye(places, dtype=columns.dtype, device=columns.device)[None, :, None, :, None]
        )
        return spread.reshape(passes, *logits.shape)

    def _positions(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Which positions count, and the labels there, both [m, ...]."""
        shape, target, inputs = logits.shape[:-1], batch.target, batch.inputs
        found = target.get("input_ids") if isinstance(target, Mapping) else target
        labels = (
            found
            if isinstance(found, Tensor) and found.shape == shape and not found.is_floating_point()
            else None
        )
        if labels is None:
            checks.require(
                self.labels != "empirical",
                f"labels is 'empirical', which needs class ids of shape {tuple(shape)} in the data.",
            )
            labels = torch.zeros(shape, dtype=torch.long, device=logits.device)
        counted = labels != -100
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        if isinstance(mask, Tensor) and mask.shape == shape:
            counted = counted & (mask != 0)
        if self.causal and len(shape) > 1:  # the output at t is about t + 1, and the last about nothing
            none = torch.zeros_like(counted[:, :1])
            counted, labels = torch.cat([counted[:, 1:], none], 1), labels.roll(-1, 1)
        if self.labels == "empirical":
            known = labels[counted]
            checks.require(
                not known.numel() or (int(known.min()) >= 0 and int(known.max()) < logits.shape[-1]),
                f"labels of the data must be in 0..{logits.shape[-1] - 1}.",
            )
        return counted, labels
