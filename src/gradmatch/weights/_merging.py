"""The weighted mean of several state dicts, entry by entry and piece by piece."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core.state_dicts import StateDict, open_state_dict

Filter = str | Callable[[str], bool] | None
BATCH_NORM = re.compile(r"(^|\.)(running_mean|running_var|num_batches_tracked)$")
"""Names of batch-norm statistics, for files, which do not tell buffers from parameters."""
_SAMPLE, _RELATED = 2**16, 0.5


@dataclass(frozen=True)
class Merging:
    """What is to be merged: models, the names, and for each model its weight and perhaps its Fisher diagonal.

    ``weights`` apply where there are no Fishers and to averaged buffers; ``scaled`` multiply the Fishers.
    """

    models: Sequence[StateDict]
    fishers: Sequence[StateDict]
    weights: Sequence[float]
    scaled: Sequence[float]
    floors: Sequence[float]
    names: frozenset[str]
    averaged: frozenset[str]

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The merged tensor in consecutive flat parts, in the target's type; the target's own where not
        merged.

        A part may be overwritten by the next.
        """
        target = self.models[0]
        if name not in self.names and name not in self.averaged:
            yield from target.pieces(name)
            return
        dtype = target.spec(name).dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        by_fisher = bool(self.fishers) and name in self.names
        parts = [m.pieces(name) for m in self.models]
        fishers = [f.pieces(name) for f in self.fishers] if by_fisher else []
        for theta in zip(*parts, strict=True):
            values = [t.to(theta[0].device, wide) for t in theta]
            if by_fisher:
                precisions = [next(f).to(theta[0].device, wide) for f in fishers]
                mean = _precise_mean(values, precisions, self.scaled, self.floors)
            else:
                mean = _plain_mean(values, self.weights)
            if not bool(torch.isfinite(mean.sum())):  # one cheap look; the sum alone may overflow
                checks.finite(f"merged {name}", mean)
            yield mean.to(dtype)


def _plain_mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum w_i v_i / sum w_i as a running mean, which is exact where one weight has it all."""
    mean, total = values[0], weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total += weight
        mean = torch.lerp(mean, value, weight / total if total else 0.0)
    return mean


def _precise_mean(
    values: Sequence[Tensor], fishers: Sequence[Tensor], weights: Sequence[float], floors: Sequence[float]
) -> Tensor:
    """sum w_i F_i v_i / sum w_i F_i with F_i >= floor_i, likewise; the first value where the sum of weights is 0."""
    mean, total = values[0], fishers[0].clamp(min=floors[0]) * weights[0]
    for value, fisher, weight, floor in zip(values[1:], fishers[1:], weights[1:], floors[1:], strict=True):
        own = (fisher.clamp(min=floor) if floor else fisher) * weight
        total = total + own
        mean = torch.lerp(mean, value, (own / total).nan_to_num_(nan=0.0))
    return mean


def chosen(keep: Filter) -> Callable[[str], bool]:
    """A filter of names as a function: all, those in which a regular expression is found, or the user's own."""
    if keep is None:
        return lambda name: True
    if isinstance(keep, str):
        try:
            pattern = re.compile(keep)
        except re.error as error:
            raise checks.InputError(
                f"mergeable is {keep!r}, which is no regular expression: {error}."
            ) from error
        return lambda name: pattern.search(name) is not None
    checks.require(callable(keep), f"mergeable is {type(keep).__name__}; it must be a pattern or a function.")
    return keep


def is_buffer(model: StateDict, name: str) -> bool:
    """Whether a name is a buffer's: known for modules, batch-norm statistics by name in files and dicts."""
    return name in model.buffers if model.buffers is not None else BATCH_NORM.search(name) is not None


def merged_names(models: Sequence[StateDict], mergeable: Filter) -> list[str]:
    """Floating-point parameters of the target that the filter lets through; all models must agree on them.

    Raises:
        InputError: the first name that one model has and another has not, or whose shapes differ.
    """
    keep, target = chosen(mergeable), models[0]

    def own(model: StateDict) -> list[str]:
        return [
            n
            for n, s in model.specs.items()
            if s.dtype.is_floating_point and not is_buffer(model, n) and keep(n)
        ]

    names = own(target)
    checks.require(
        bool(names),
        f"mergeable leaves no parameter of {target.name}; it has {checks.listing(list(target.specs))}.",
    )
    for k, model in enumerate(models[1:], 1):
        for name in names:
            checks.require(
                name in model,
                f"models[{k}] has no {name!r}, which models[0] has; leave it out by mergeable or align them.",
            )
            mine, theirs = target.spec(name).shape, model.spec(name).shape
            checks.require(
                mine == theirs,
                f"{name!r} has shape {theirs} in models[{k}] and {mine} in models[0]; leave it out by mergeable.",
            )
        for name in own(model):
            checks.require(
                name in target,
                f"models[0] has no {name!r}, which models[{k}] has; leave it out by mergeable or align them.",
            )
            first = target.tied.get(name)
            checks.require(
                first is None or first not in model or _equal(model, name, first),
                f"models[0] ties {name!r} to {first!r}, and models[{k}] has two different tensors there; tie or untie "
                "them in both.",
            )
    return names


def _equal(model: StateDict, name: str, other: str) -> bool:
    """Whether two tensors of a model have the same numbers."""
    if model.spec(name).shape != model.spec(other).shape:
        return False
    return all(
        torch.equal(a.float(), b.float())
        for a, b in zip(model.pieces(name), model.pieces(other), strict=True)
    )


def shares(weights: Any, count: int) -> list[float]:
    """Merge weights that sum to 1; equal ones by default."""
    if weights is None:
        return [1 / count] * count
    found = [checks.nonnegative(f"weights[{i}]", w) for i, w in enumerate(weights)]
    checks.require(
        len(found) == count, f"weights has {len(found)} entries; it needs one for each of {count} models."
    )
    checks.require(sum(found) > 0, "weights are all 0; at least one must be above.")
    return [w / sum(found) for w in found]


def fisher_norm(fisher: StateDict, k: int, names: Sequence[str], models: Sequence[StateDict]) -> float:
    """Euclidean norm over all merged entries, in double precision, after a look at every one.

    Raises:
        InputError: a name that is missing or of another shape, or entries that are negative or not finite.
    """
    total = 0.0
    for name in names:
        checks.require(
            name in fisher, f"fishers[{k}] has no {name!r}; leave it out by mergeable or take its Fisher too."
        )
        got, wanted = fisher.spec(name).shape, models[0].spec(name).shape
        checks.require(got == wanted, f"fishers[{k}][{name!r}] has shape {got}; the parameter has {wanted}.")
        for piece in fisher.pieces(name):
            if not piece.numel():
                continue
            square = float(torch.linalg.vector_norm(piece, dtype=torch.float64)) ** 2
            low = float(piece.min())
            checks.require(
                low >= 0 and square < float("inf"),
                f"fishers[{k}][{name!r}] has entries that are negative or not finite (least {low:g}).",
            )
            total += square
    return math.sqrt(total)


def refuse_unshared_adapters(models: Sequence[StateDict], names: Sequence[str]) -> None:
    """Low-rank adapters B A add up only where A is the same: the mean of products is not the product of means."""
    for name in names:
        if ".lora_A." in name:
            same = all(
                torch.equal(a, b)
                for m in models[1:]
                for a, b in zip(models[0].pieces(name), m.pieces(name), strict=True)
            )
            checks.require(
                same,
                f"{name!r} differs between the models, and adapters of different A do not average; merge each into its "
                "own base first (peft: merge_and_unload).",
            )


def warn_unrelated(models: Sequence[StateDict], names: Sequence[str]) -> None:
    """Say so where weights point elsewhere, as those of separate initialisations do: merging them means nothing."""
    matrices = [n for n in names if len(models[0].spec(n).shape) > 1 and models[0].spec(n).numel]

    def sample(model: StateDict, name: str) -> Tensor:
        return next(model.pieces(name, _SAMPLE)).to("cpu", torch.float64)

    for k, model in enumerate(models[1:], 1):
        products = torch.zeros(3, dtype=torch.float64)
        for name in matrices:
            a, b = sample(models[0], name), sample(model, name)
            products += torch.stack([a @ b, a @ a, b @ b])
        cosine = float(products[0] / (products[1] * products[2]).sqrt().clamp(min=1e-300))
        if matrices and cosine < _RELATED:
            warnings.warn(
                f"models[{k}] has cosine {cosine:.2f} with the target: they do not seem to come from one "
                "initialisation, and average well only with their units matched (weight_match).",
                stacklevel=4,
            )


def plan(
    models: Sequence[Any], fishers: Sequence[Any] | None, weights: Any, normalize: bool, floor: float,
    favor_target: bool, mergeable: Filter, buffers: Any,
) -> Merging:  # fmt: skip
    """Everything checked, before any work."""
    checks.require(
        isinstance(models, Sequence) and not isinstance(models, str) and len(models) > 0,
        "models must be a list of at least one model.",
    )
    if isinstance(buffers, str):
        checks.one_of("buffers", buffers, ("target", "average"))
    sources = [open_state_dict(m, f"models[{k}]") for k, m in enumerate(models)]
    lambdas = shares(weights, len(sources))
    checks.nonnegative("floor", floor)
    names = merged_names(sources, mergeable)
    refuse_unshared_adapters(sources, names)
    warn_unrelated(sources, names)
    statistics: list[str] = []
    if buffers == "average":
        statistics = [
            n for n, s in sources[0].specs.items() if s.dtype.is_floating_point and is_buffer(sources[0], n)
        ]
        for k, source in enumerate(sources):
            for name in statistics:
                checks.require(name in source, f"models[{k}] has no buffer {name!r}, which models[0] has.")
    opened, scaled = [], lambdas
    if fishers is not None:
        checks.require(
            len(fishers) == len(sources),
            f"fishers has {len(fishers)} entries; it needs one for each of {len(sources)} models.",
        )
        opened = [open_state_dict(f, f"fishers[{k}]") for k, f in enumerate(fishers)]
        norms = [fisher_norm(f, k, names, sources) for k, f in enumerate(opened)]
        if normalize:
            zero = [k for k, n in enumerate(norms) if n == 0]
            checks.require(
                not zero,
                f"fishers[{zero[0] if zero else 0}] is 0 everywhere; normalize needs one that is not.",
            )
            scaled = [w / n for w, n in zip(lambdas, norms, strict=True)]
    floors = [floor if k == 0 or not favor_target else 0.0 for k in range(len(sources))]
    return Merging(sources, opened, lambdas, scaled, floors, frozenset(names), frozenset(statistics))
