"""How the training of a latent flow gets its batches, and what is encoded once for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core.examples import Examples
from gradmatch.core.store import RunFolder
from gradmatch.generate._conditions import Condition, Inpainting, Labels
from gradmatch.generate._latents import Codec, Moments


def encoded(codec: Codec, images: Tensor, batch: int = 256, dtype: torch.dtype = torch.float16) -> Moments:
    """The posterior of every image."""
    parts = [codec.moments(part) for part in torch.split(images, batch)]
    spreads = [p.std.to(dtype) for p in parts if p.std is not None]
    return Moments(torch.cat([p.mean.to(dtype) for p in parts]), torch.cat(spreads) if spreads else None)


def matched(z0: Tensor, z1: Tensor) -> Tensor:
    """The order of z1 with the least total squared distance to z0."""
    from scipy.optimize import linear_sum_assignment

    # the squares of each do not depend on the order, so that least distance is greatest inner product
    cost = -z0.flatten(1).double() @ z1.flatten(1).double().T
    return torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1]).to(z0.device)


def drawn(
    codec: Codec,
    condition: Condition,
    data: Any,
    batch: int,
    *,
    cache: bool,
    cond: Any,
    run: RunFolder | None,
) -> Callable[[torch.Generator], tuple[Tensor | Moments, Any]]:
    """How a training step gets its images and their condition."""
    checks.whole("batch", batch)
    images, labels = _in_memory(data)
    if images is None:
        checks.require(
            run is None, "data is a loader, whose order no folder can bring back; give arrays to resume."
        )
        return _streamed(data, condition, cond)
    checks.require(
        len(images) > 0 and images.is_floating_point(),
        f"data is {images.dtype} of shape {tuple(images.shape)}; it must be floating point, one image or more.",
    )
    checks.finite("data", images)
    source: Tensor | Moments = images
    if not isinstance(condition, Inpainting):
        if codec.autoencoder is None:
            source = Moments(images, None)  # checked above, once for all steps
        elif cache:
            source = encoded(codec, images)

    def draw(generator: torch.Generator) -> tuple[Tensor | Moments, Any]:
        index = torch.randint(len(images), (batch,), generator=generator, device=generator.device).cpu()
        y = None if labels is None else labels[index]
        if cond is not None:
            return source[index], cond(images[index], y, generator)
        return source[index], y if isinstance(condition, Labels) else None

    return draw


def _in_memory(data: Any) -> tuple[Tensor | None, Tensor | None]:
    if isinstance(data, Tensor):
        return data, None
    if isinstance(data, Examples):
        return data.x, data.y
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(d, Tensor) for d in data):
        checks.same_length("data images", data[0], "data labels", data[1])
        return data[0], data[1]
    checks.require(
        isinstance(data, Iterable),
        f"data is a {type(data).__name__}; it must be images, (images, labels) or an iterable of batches.",
    )
    return None, None


def _streamed(data: Any, condition: Condition, cond: Any) -> Callable[[torch.Generator], tuple[Tensor, Any]]:
    batches = forever(data)

    def draw(generator: torch.Generator) -> tuple[Tensor, Any]:
        x, y = next(batches)
        if cond is not None:
            return x, cond(x, y, generator)
        return x, y if isinstance(condition, Labels) else None

    return draw


def forever(data: Iterable[Any]) -> Iterator[tuple[Tensor, Any]]:
    """(examples, what comes with them or None) of a loader's batches, which is gone through again and again.

    A batch is a tensor, a sequence of tensors or a mapping of them; of the last two the first is the examples.
    """
    while True:
        empty = True
        for rows in data:
            empty = False
            rows = list(rows.values()) if isinstance(rows, Mapping) else rows  # Hugging Face's batches
            yield (rows, None) if isinstance(rows, Tensor) else (rows[0], rows[1] if len(rows) > 1 else None)
        checks.require(
            not empty,
            "data is empty; at least one batch is needed (an iterator ends once: give a list or a loader).",
        )
