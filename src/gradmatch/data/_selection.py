"""A subset of a data set kept as bins, so that any share can be drawn from it later; and the random baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from gradmatch.core import checks
from gradmatch.core.examples import as_examples
from gradmatch.core.pick import largest_remainder
from gradmatch.core.store import load_tensors, save_tensors

FILE = "selection.safetensors"


@dataclass(frozen=True)
class Selection:
    """Which items of a data set are kept, and the bins they were drawn from.

    Attributes:
        indices: kept items, ascending, long [k].
        bins: all items cut into disjoint bins, each long, in the order picked (class by class where balanced).
        gains: gain of each item of each bin when it was picked, float64; NaN-free, zeros where none was made.
        ratio: share of the items kept, in (0, 1].
        seed: of the draw.
        labels: class of every item, long [n], where each class keeps its share; None draws without regard to it.
        meta: how it was made, as JSON values.
    """

    indices: Tensor
    bins: tuple[Tensor, ...]
    gains: tuple[Tensor, ...]
    ratio: float
    seed: int
    labels: Tensor | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.indices)

    def sample(self, ratio: float, seed: int = 0) -> Selection:
        """Draw another share from the same bins, without picking anew."""
        return draw(self.bins, self.gains, ratio, seed, self.labels, self.meta)

    def subset(self, dataset: Any) -> Subset[Any]:
        """The kept items of a torch data set (or any sequence), as a ``torch.utils.data.Subset``."""
        total = sum(len(b) for b in self.bins)
        checks.require(
            len(dataset) == total, f"dataset has {len(dataset)} items; this selection is of {total}."
        )
        return Subset(dataset, self.indices.tolist())

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, atomically; a folder gets ``selection.safetensors``."""
        tensors = {"indices": self.indices} | ({} if self.labels is None else {"labels": self.labels})
        tensors |= {f"bins.{b:04d}": items for b, items in enumerate(self.bins)}
        tensors |= {f"gains.{b:04d}": values for b, values in enumerate(self.gains)}
        return save_tensors(_file(path), tensors, {"ratio": self.ratio, "seed": self.seed, "meta": self.meta})

    @classmethod
    def load(cls, path: str | Path) -> Selection:
        """Read what :meth:`save` wrote, from the file or its folder.

        Raises:
            InputError: the file is missing, broken or not a selection.
        """
        tensors, header = load_tensors(_file(path))
        checks.require(
            {"indices", "bins.0000", "gains.0000"} <= tensors.keys() and "ratio" in header,
            f"{path} does not hold a selection.",
        )
        bins, gains = (
            tuple(tensors[k] for k in sorted(tensors) if k.startswith(f"{part}."))
            for part in ("bins", "gains")
        )
        meta = dict(header["meta"])
        labels = tensors.get("labels")
        return cls(tensors["indices"], bins, gains, header["ratio"], header["seed"], labels, meta)


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / FILE


def draw(
    bins: Sequence[Tensor],
    gains: Sequence[Tensor],
    ratio: float,
    seed: int,
    labels: Tensor | None = None,
    meta: dict[str, Any] | None = None,
) -> Selection:
    """Draw a share of every bin uniformly, without replacement.

    Each class (or all items, where ``labels`` is None) keeps exactly ``round(ratio * size)`` items, shared over
    its bins by largest remainder, equal remainders in an order that the seed decides. The draw does not depend
    on the order within a bin.

    Raises:
        InputError: ratio outside (0, 1], or a class that would keep no item.
    """
    ratio = checks.fraction("ratio", ratio)
    generator = torch.Generator().manual_seed(checks.whole("seed", seed, 0))
    groups = [[b.sort().values for b in bins]]
    if labels is not None:
        classes = int(labels.max()) + 1
        groups = [[b[labels[b] == c] for b in groups[0]] for c in range(classes)]
    kept = []
    for c, parts in enumerate(groups):
        sizes = [len(p) for p in parts]
        count = round(ratio * sum(sizes))
        of = "" if labels is None else f" of class {c}"
        checks.require(
            count >= 1, f"ratio is {ratio:g}, which keeps none of the {sum(sizes)} items{of}; raise it."
        )
        for share, part in zip(largest_remainder(count, sizes, generator), parts, strict=True):
            kept.append(part[torch.randperm(len(part), generator=generator)[:share]])
    indices = torch.cat(kept).sort().values
    return Selection(indices, tuple(bins), tuple(gains), ratio, int(seed), labels, dict(meta or {}))


def random_selection(dataset: Any, ratio: float = 0.1, *, balance: bool = True, seed: int = 0) -> Selection:
    """The baseline of every selection: items drawn uniformly, within each class unless ``balance`` is off.

    >>> data = torch.randn(20, 3), torch.arange(20) % 2
    >>> len(random_selection(data, 0.2))
    4
    """
    examples = as_examples(dataset)
    everything = torch.arange(len(examples))
    labels = examples.y.cpu() if balance else None
    meta = {"method": "random", "balance": balance}
    return draw([everything], [torch.zeros(len(examples)).double()], ratio, seed, labels, meta)
