"""GM-NAS: few-shot architecture search split by gradient matching (Hu, Wang, Hong, Mok, Xie, Liu; ICLR 2022,
arXiv 2203.15207).

A supernet shares its weights among all architectures of a space, and its architectures pull them in different
directions. Few-shot search trains several supernets, each for a part of the space. GM-NAS decides where to cut:

1. train the supernet; at a checkpoint, choose the edge and the groups of its operations between which gradients on the
   shared weights disagree most (:class:`GMSplitter`); each child keeps one group there, and inherits all else;
2. go on with every child; at the next checkpoint each splits an edge of its own;
3. after the last split start from fresh weights (``restart="final"``), train every sub-supernet, and take the
   architecture that does best on validation data.

Published settings: NAS-Bench-201 splits in 2 after 15 and 30 epochs (20 and 40 for random sampling) and goes on for 30
(50); the DARTS space splits in 2 after 2, 4 and 6 epochs and goes on for 15.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core.examples import as_examples
from gradmatch.core.networks import build
from gradmatch.core.store import write_json
from gradmatch.weights._partition import best_partition
from gradmatch.weights._spaces import CellSpace, Genotype, NASBench201Space, SearchSpace
from gradmatch.weights._splitter import GMSplitter, Split, children, full_encoding, open_edges
from gradmatch.weights._supernet_training import Recipe, Trainee

__all__ = [
    "CellSpace",
    "FewShotNAS",
    "GMSplitter",
    "Leaf",
    "NASBench201Space",
    "SearchResult",
    "SearchSpace",
    "Split",
    "best_partition",
]

CRITERIA, RESTARTS = ("gm", "random", "exhaustive"), ("final", "never")


@dataclass(eq=False)
class Leaf:
    """A supernet of the tree.

    Attributes:
        encoding: allowed operations (E, O).
        trainee: the network with its training state.
        split: how it was split, if it was; ``distances`` only for "gm".
        children: what became of it.
    """

    encoding: Tensor
    trainee: Trainee
    split: Split | None = None
    children: list[Leaf] = field(default_factory=list)

    def leaves(self) -> list[Leaf]:
        """Those that were not split."""
        return [leaf for c in self.children for leaf in c.leaves()] if self.children else [self]

    def to_json(self, space: SearchSpace) -> dict[str, Any]:
        """The tree in words."""
        allowed = {
            e: [o for o, on in zip(ops, row, strict=False) if on]
            for e, ops, row in zip(space.edges, space.ops, self.encoding.tolist(), strict=True)
        }
        if self.split is None:
            return {"allowed": allowed}
        return {
            "split": space.edges[self.split.edge],
            "children": [c.to_json(space) for c in self.children],
        }


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        space: that was searched.
        best_genotype: the architecture that did best on validation data.
        tree: all supernets, with their splits.
        scores: validation accuracy of every architecture looked at.
        epochs: trained in all supernets together.
    """

    space: SearchSpace
    best_genotype: Genotype
    tree: Leaf
    scores: dict[Genotype, float]
    epochs: int

    def leaf_of(self, genotype: Sequence[int]) -> Leaf:
        """The sub-supernet that holds an architecture."""
        found = [x for x in self.tree.leaves() if all(x.encoding[e, g] for e, g in enumerate(genotype))]
        checks.require(len(found) == 1, f"genotype is {tuple(genotype)}; no sub-supernet holds it.")
        return found[0]

    def words(self, genotype: Sequence[int] | None = None) -> dict[str, str]:
        """An architecture (default the best) as operations by edge."""
        chosen = self.best_genotype if genotype is None else genotype
        return {e: o[g] for e, o, g in zip(self.space.edges, self.space.ops, chosen, strict=True)}

    def save(self, path: str | Path) -> Path:
        """Write the architecture, the tree and the scores as JSON."""
        ranked = sorted(self.scores.items(), key=lambda item: -item[1])
        return write_json(
            path,
            {
                "best": self.words(),
                "accuracy": self.scores[self.best_genotype],
                "tree": self.tree.to_json(self.space),
                "epochs": self.epochs,
                "scores": [{"genotype": list(g), "accuracy": s} for g, s in ranked],
            },
        )


class FewShotNAS:
    """Search a space with several supernets.

    Args:
        space: see :class:`SearchSpace`; ``CellSpace`` and ``NASBench201Space`` are built in.
        splits: (epoch, groups) of each split; epochs count from the start. Default: in 2 after 20 and after 40.
        final_epochs: of every sub-supernet after the last split, 50 as published for random sampling.
        criterion: "gm", "random" (an edge and groups of nearly equal size by chance), or "exhaustive" (few-shot search:
            a random edge, one sub-supernet for each operation).
        restart: "final" (fresh weights after the last split) or "never".
        select_samples: architectures judged in each sub-supernet with "rsps".
        splitter: options of :class:`GMSplitter` (repeat, distance, edge_score, ...).
        search: "rsps", "darts" (first order), "darts2" or "snas"; default the recipe's, which is "rsps".
        recipe: of the training; see :class:`Recipe`.
        batch_size: for data given as tensors; loaders keep theirs.
        seed: of weights, batches, architectures and splits.
        device: where supernets live; data given as tensors are moved there.
        progress: called with (epochs done, all epochs).

    Raises:
        InputError: options out of range, splits that do not follow each other.

    >>> x, y = torch.randn(128, 64), torch.arange(128) % 10
    >>> search = FewShotNAS(CellSpace(), [(1, 2)], final_epochs=1, splitter={"repeat": 2}, select_samples=5)
    >>> found = search.fit((x, y), (x, y))
    >>> len(found.tree.leaves()), len(found.best_genotype)
    (2, 4)
    """

    def __init__(
        self,
        space: SearchSpace,
        splits: Sequence[tuple[int, int]] = ((20, 2), (40, 2)),
        *,
        final_epochs: int = 50,
        criterion: str = "gm",
        restart: str = "final",
        select_samples: int = 200,
        splitter: dict[str, Any] | None = None,
        recipe: Recipe | None = None,
        search: str | None = None,
        batch_size: int = 48,
        seed: int = 0,
        device: torch.device | str = "cpu",
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        checks.one_of("criterion", criterion, CRITERIA)
        checks.one_of("restart", restart, RESTARTS)
        self.splitter = GMSplitter(space, seed=seed, **(splitter or {}))
        self.space, self.splits = space, [(checks.whole("splits epoch", e), g) for e, g in splits]
        epochs = [e for e, _ in self.splits]
        checks.require(
            epochs == sorted(set(epochs)),
            f"splits are at epochs {epochs}; each must come after the one before.",
        )
        for _, groups in self.splits:
            most = max(len(o) for o in space.ops)
            checks.whole("splits groups", groups, 2, most)
        self.final_epochs = checks.whole("final_epochs", final_epochs)
        self.criterion, self.restart = criterion, restart
        self.select_samples = checks.whole("select_samples", select_samples)
        self.recipe = recipe or Recipe()
        if search is not None:
            self.recipe = replace(self.recipe, search=search)
        self.batch_size, self.seed = checks.whole("batch_size", batch_size), checks.whole("seed", seed, 0)
        self.device, self.progress = torch.device(device), progress
        self._done, self._total = 0, (epochs[-1] if epochs else 0) + self.final_epochs

    def fit(self, train: Any, valid: Any) -> SearchResult:
        """Search.

        Args:
            train: labelled data: (x, y), a data set, or a loader of batches (x, y) with a length.
            valid: likewise, for alphas and for the choice.

        Raises:
            InputError: data that is empty, or no edge left to split.
        """
        self._done = 0
        generator = torch.Generator().manual_seed(self.seed)
        batches = _Batches(train, self.batch_size, self.device, torch.Generator().manual_seed(self.seed + 1))
        judged = _Batches(valid, self.batch_size, self.device, None)
        net = build(self.space.supernet, self.seed, self.device)
        encoding = full_encoding(self.space)
        root = Leaf(encoding, Trainee(self.space, net, encoding, self.recipe, self._total))
        begun = 0
        for k, (epoch, groups) in enumerate(self.splits):
            for leaf in root.leaves():
                self._train(leaf, (begun, epoch), (batches, judged), False, generator)
            for leaf in root.leaves():
                self._split(leaf, groups, batches, k == len(self.splits) - 1, generator)
            begun = epoch
        for leaf in root.leaves():
            self._train(leaf, (begun, self._total), (batches, judged), True, generator)
        scores = {
            g: leaf.trainee.accuracy(g, judged)
            for leaf in root.leaves()
            for g in leaf.trainee.candidates(self.select_samples, generator)
        }
        best = max(scores, key=lambda g: scores[g])
        return SearchResult(self.space, best, root, scores, self._done)

    def _train(
        self,
        leaf: Leaf,
        span: tuple[int, int],
        data: tuple[_Batches, _Batches],
        last: bool,
        g: torch.Generator,
    ) -> None:
        """Train a leaf for the epochs from ``span[0]`` to ``span[1]``; ``last`` after the last split."""
        batches, valid = data
        again = valid.endless()
        for epoch in range(*span):
            leaf.trainee.epoch(batches, again, last, epoch / self._total, g)
            self._done += 1
            if self.progress is not None:
                self.progress(self._done, self._all_epochs())

    def _all_epochs(self) -> int:
        """Epochs of all supernets of a whole search."""
        count, begun, nets = 0, 0, 1
        for epoch, groups in self.splits:
            count += nets * (epoch - begun)
            begun = epoch
            nets *= len(self.space.ops[0]) if self.criterion == "exhaustive" else groups
        return count + nets * self.final_epochs

    def _split(self, leaf: Leaf, groups: int, batches: _Batches, last: bool, g: torch.Generator) -> None:
        """Give a leaf its children; after the last split with fresh weights, if so asked."""
        leaf.split = self._chosen(leaf, groups, batches, g)
        for encoding in children(leaf.encoding, leaf.split.edge, leaf.split.groups):
            if last and self.restart == "final":
                seed = int(torch.randint(2**31, (1,), generator=g))
                net = build(self.space.supernet, seed, self.device)
                trainee = Trainee(
                    self.space, net, encoding, self.recipe, self.final_epochs, leaf.trainee.alpha
                )
            else:
                trainee = leaf.trainee.child(encoding)
            leaf.children.append(Leaf(encoding, trainee))

    def _chosen(self, leaf: Leaf, groups: int, batches: _Batches, g: torch.Generator) -> Split:
        if self.criterion == "gm":
            self.splitter.n_groups = groups
            return self.splitter.choose(
                leaf.trainee.net, batches, leaf.encoding, leaf.trainee.alpha.detach().cpu()
            )
        edges = open_edges(self.space, leaf.encoding, groups)
        edge = edges[int(torch.randint(len(edges), (1,), generator=g))]
        order = torch.randperm(len(self.space.ops[edge]), generator=g)
        parts = torch.tensor_split(order, len(order) if self.criterion == "exhaustive" else groups)
        found = tuple(tuple(sorted(p.tolist())) for p in parts)
        most = leaf.encoding.shape[1]
        empty = torch.zeros(len(self.space.edges), most, most)
        return Split(edge, found, empty, (0.0,) * len(self.space.edges), 0)


class _Batches:
    """Labelled batches, to be walked again and again; those of tensors in a new order each time if seeded."""

    def __init__(self, data: Any, size: int, device: torch.device, generator: torch.Generator | None) -> None:
        self.loader: Iterable[Any] | None = None
        if isinstance(data, torch.utils.data.DataLoader):
            self.loader = data
        else:
            found = as_examples(data)
            self.x, self.y = found.x.to(device), found.y.to(device)
            checks.require(len(self.y) > 0, "data is empty; at least one example is needed.")
        self.size, self.device, self.generator = size, device, generator

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.loader is not None:
            yield from ((x.to(self.device), y.to(self.device)) for x, y in self.loader)
            return
        n = len(self.y)
        order = torch.arange(n) if self.generator is None else torch.randperm(n, generator=self.generator)
        for index in torch.split(order, self.size):
            yield self.x[index], self.y[index]

    def endless(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The same without an end."""
        while True:
            yield from self
