"""Where a supernet should be split: between operations whose gradients on the shared weights disagree.

For one mini-batch and one drawn architecture, the gradient of the loss in all parameters but those of edge e is taken
with each operation o alone on that edge: g_o. Distances 1 - <g_o, g_o'> / (|g_o| |g_o'| + 1e-6) are averaged over
``repeat`` draws. An operation that cuts the network (zero) leaves gradients of zero behind it, at distance 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.core import checks
from gradmatch.core.distance import gradient_distance
from gradmatch.weights._partition import best_partition
from gradmatch.weights._path_gradients import PathGradients, again_and_again, shared_columns, still
from gradmatch.weights._spaces import Genotype, SearchSpace

DISTANCES, EDGE_SCORES = ("cos", "filter", "mse"), ("cut", "within")
EPS = 1e-6
AT_ONCE = 64
"""Architectures whose gradients are taken in one program, where networks are small."""
RESAMPLES, LOOK = 200, 10


@dataclass(frozen=True)
class Split:
    """A decision to split.

    Attributes:
        edge: which.
        groups: of the places of its operations.
        distances: mean distances on every edge (E, O, O); 0 on edges that are split already.
        scores: of every edge; larger is better, -inf for edges split already.
        draws: (mini-batch, architecture) pairs looked at.
    """

    edge: int
    groups: tuple[tuple[int, ...], ...]
    distances: Float[Tensor, "E O O"]
    scores: tuple[float, ...]
    draws: int

    def encodings(self, encoding: Bool[Tensor, "E O"]) -> list[Bool[Tensor, "E O"]]:
        """What each child may still use, given what the parent may."""
        return children(encoding, self.edge, self.groups)


def full_encoding(space: SearchSpace) -> Bool[Tensor, "E O"]:
    """Everything allowed; rows of edges with fewer operations end in False."""
    most = max(len(o) for o in space.ops)
    return torch.tensor([[k < len(o) for k in range(most)] for o in space.ops])


def children(
    encoding: Bool[Tensor, "E O"], edge: int, groups: Sequence[Sequence[int]]
) -> list[Bool[Tensor, "E O"]]:
    """The encoding with one edge restricted to each of the groups."""
    made = []
    for group in groups:
        child = encoding.clone()
        child[edge] = False
        child[edge, list(group)] = True
        made.append(child)
    return made


def check_encoding(encoding: Tensor, space: SearchSpace) -> Bool[Tensor, "E O"]:
    """Refuse an encoding of another shape, with operations that do not exist, or with an edge that has none left."""
    full = full_encoding(space)
    checks.require(
        encoding.dtype == torch.bool and encoding.shape == full.shape and not bool((encoding & ~full).any()),
        f"encoding is {encoding.dtype} of shape {tuple(encoding.shape)}; it must be bool of shape {tuple(full.shape)} "
        "and allow only operations that exist.",
    )
    empty = torch.nonzero(~encoding.any(1)).flatten().tolist()
    checks.require(not empty, f"encoding allows no operation on edge {checks.listing(empty)}.")
    return encoding


def draw(space: SearchSpace, encoding: Tensor, generator: torch.Generator) -> Genotype:
    """A connected architecture, uniform among those allowed.

    Raises:
        InputError: none found in 10,000 draws.
    """
    allowed = encoding.double()
    for _ in range(10_000):
        genotype = tuple(torch.multinomial(allowed, 1, generator=generator)[:, 0].tolist())
        if space.connected(genotype):
            return genotype
    return checks.refuse("encoding allows hardly any connected architecture; 10,000 draws found none.")


class GMSplitter:
    """Chooses the edge to split, and the groups, by gradient matching.

    Args:
        space: of the supernets.
        n_groups: children of a split.
        repeat: draws of a mini-batch and an architecture, 100 as published.
        distance: "cos" (as in all published scripts), "filter" (a cosine for each row of each tensor), "mse".
        hard: operations one-hot and the rest one drawn architecture; else each with its softmax weight, and the rest
            soft (``alpha``).
        edge_score: "cut" (the largest weight across groups, as in the paper and its NAS-Bench-201 script) or "within"
            (the smallest within groups, as in its DARTS script).
        singletons: groups of one operation are allowed; default only where groups of two are impossible.
        confidence: stop as soon as this share of bootstrap resamples of the draws agrees on edge and groups.
        loss: mean loss of (outputs, target); default cross-entropy.
        vectorized: gradients of many architectures as one program; default where no layer is a convolution, whose
            single paths are less work one by one.
        seed: of the draws.

    Raises:
        InputError: options out of range, a space with a single edge.
    """

    def __init__(
        self,
        space: SearchSpace,
        n_groups: int = 2,
        repeat: int = 100,
        *,
        distance: str = "cos",
        hard: bool = True,
        edge_score: str = "cut",
        singletons: bool | None = None,
        confidence: float | None = None,
        loss: Any = F.cross_entropy,
        vectorized: bool | None = None,
        seed: int = 0,
    ) -> None:
        checks.require(
            isinstance(space, SearchSpace),
            f"space is a {type(space).__name__}; it must have edges, ops, supernet, child and connected.",
        )
        checks.require(
            len(space.edges) > 1, f"space has {len(space.edges)} edge; without a second nothing is shared."
        )
        self.space, self.n_groups = space, checks.whole("n_groups", n_groups, 2)
        self.repeat, self.hard = checks.whole("repeat", repeat), bool(hard)
        checks.one_of("distance", distance, DISTANCES)
        checks.one_of("edge_score", edge_score, EDGE_SCORES)
        self.distance, self.edge_score, self.singletons = distance, edge_score, singletons
        self.confidence = None if confidence is None else checks.fraction("confidence", confidence)
        self.loss, self.vectorized = loss, vectorized
        self.seed = checks.whole("seed", seed, 0)

    def distances(
        self,
        supernet: nn.Module,
        edge: int,
        loader: Iterable[Any],
        encoding: Tensor | None = None,
        alpha: Tensor | None = None,
    ) -> Float[Tensor, "O O"]:
        """Mean distances between the operations of one edge."""
        checks.whole("edge", edge, 0, len(self.space.edges) - 1)
        enc = check_encoding(full_encoding(self.space) if encoding is None else encoding, self.space)
        found = list(self._draws(supernet, [edge], loader, enc, alpha, self.repeat))
        return torch.stack(found)[:, edge].mean(0)

    def choose(
        self,
        supernet: nn.Module,
        loader: Iterable[Any],
        encoding: Tensor | None = None,
        alpha: Tensor | None = None,
    ) -> Split:
        """The edge to split and the groups of its operations.

        Args:
            supernet: of the space; parameters, gradients and running statistics stay as they are.
            loader: labelled batches (x, y); walked through once, and again from its start if it is too short.
            encoding: what is still allowed (E, O), bool; only edges with all operations left are split.
            alpha: architecture parameters (E, O), for ``hard=False``; default zeros.

        Raises:
            InputError: no edge left, ``n_groups`` above the operations of every such edge, an empty loader.
        """
        enc = check_encoding(full_encoding(self.space) if encoding is None else encoding, self.space)
        edges = open_edges(self.space, enc, self.n_groups)
        found: list[Tensor] = []
        for sample in self._draws(supernet, edges, loader, enc, alpha, self.repeat):
            found.append(sample)
            if self.confidence is not None and len(found) % LOOK == 0 and self._agreed(found, edges):
                break
        edge, groups, scores = self._decide(torch.stack(found).mean(0), edges)
        return Split(edge, groups, torch.stack(found).mean(0), scores, len(found))

    def split(
        self,
        supernet: nn.Module,
        loader: Iterable[Any],
        encoding: Tensor | None = None,
        alpha: Tensor | None = None,
    ) -> list[Bool[Tensor, "E O"]]:
        """The encodings of the children; see :meth:`choose`."""
        enc = full_encoding(self.space) if encoding is None else encoding
        return self.choose(supernet, loader, enc, alpha).encodings(enc)

    def _decide(
        self, distances: Tensor, edges: Sequence[int]
    ) -> tuple[int, tuple[tuple[int, ...], ...], tuple[float, ...]]:
        scores, parts = [-float("inf")] * len(self.space.edges), {}
        for e in edges:
            n = len(self.space.ops[e])
            d = distances[e, :n, :n]
            groups, within = best_partition(d, self.n_groups, self.singletons)
            parts[e] = groups
            scores[e] = float(d.triu(1).sum()) - within if self.edge_score == "cut" else -within
        edge = max(edges, key=lambda e: scores[e])  # the first of equals, also if all distances are 0
        return edge, parts[edge], tuple(scores)

    def _agreed(self, found: list[Tensor], edges: Sequence[int]) -> bool:
        samples = torch.stack(found)
        g = torch.Generator().manual_seed(self.seed)
        n = len(samples)
        now = self._decide(samples.mean(0), edges)[:2]
        counts = torch.stack(
            [torch.bincount(torch.randint(n, (n,), generator=g), minlength=n) / n for _ in range(RESAMPLES)]
        )
        means = torch.tensordot(counts.to(samples), samples, 1)
        same = sum(self._decide(m, edges)[:2] == now for m in means)
        assert self.confidence is not None
        return same >= self.confidence * RESAMPLES

    def _draws(
        self, net: nn.Module, edges: Sequence[int], loader: Iterable[Any], enc: Tensor, alpha: Tensor | None, count: int
    ) -> Iterator[Float[Tensor, "E O O"]]:  # fmt: skip
        """For each draw the distances on the named edges; one batch serves all of them."""
        g = torch.Generator().manual_seed(self.seed)
        batches = again_and_again(loader)
        most = enc.shape[1]
        soft = None if self.hard else softened(torch.zeros(enc.shape) if alpha is None else alpha, enc)
        shared = [shared_columns(net, e) for e in range(len(self.space.edges))]
        engine = PathGradients(net, self.loss, self.vectorized, most)
        done = 0
        with still(net):
            while done < count:
                paths, each = self._paths(edges, enc, soft, g)
                many = max(1, min(AT_ONCE // len(paths), count - done)) if engine.vectorized else 1
                jobs = [(paths, each)] + [self._paths(edges, enc, soft, g) for _ in range(many - 1)]
                grads = engine([j[0] for j in jobs], [next(batches) for _ in jobs])
                for (_, each_), rows in zip(jobs, grads, strict=True):
                    out = torch.zeros(len(self.space.edges), most, most)
                    for e in edges:
                        n = len(self.space.ops[e])
                        out[e, :n, :n] = self._matrix(rows[each_[e]], shared[e], engine).cpu()
                    yield out
                done += many

    def _paths(
        self, edges: Sequence[int], enc: Tensor, soft: Tensor | None, g: torch.Generator
    ) -> tuple[list[Any], dict[int, list[int]]]:
        """The distinct architectures of one draw, and for each edge which of them has each of its operations."""
        rest = draw(self.space, enc, g)
        paths: list[Any] = []
        each: dict[int, list[int]] = {}
        for e in edges:
            each[e] = []
            for o in range(len(self.space.ops[e])):
                if soft is not None:
                    path: Any = soft.clone()
                    path[e] = 0
                    path[e, o] = soft[e, o]
                else:
                    path = (*rest[:e], o, *rest[e + 1 :])
                    if path in paths:
                        each[e].append(paths.index(path))
                        continue
                each[e].append(len(paths))
                paths.append(path)
        return paths, each

    def _matrix(self, rows: Tensor, shared: Tensor, engine: PathGradients) -> Float[Tensor, "O O"]:
        """Distances between gradient rows (O, P) on the shared parameters."""
        rows = checks.finite("gradients of the supernet", rows * shared.to(rows))
        if self.distance == "filter":
            lists = [engine.unflatten(r) for r in rows]
            d = rows.new_zeros(len(rows), len(rows))
            for i, j in combinations(range(len(rows)), 2):
                d[i, j] = d[j, i] = gradient_distance(lists[i], lists[j], "filter_cosine", EPS)
            return d
        gram = rows @ rows.T
        squares = gram.diagonal()
        if self.distance == "mse":
            d = squares[:, None] + squares - 2 * gram
        else:
            norms = squares.sqrt()
            d = 1 - gram / (norms[:, None] * norms + EPS)
        d = ((d + d.T) / 2).clamp_min(0)
        return d - torch.diag(d.diagonal())


def softened(alpha: Tensor, encoding: Tensor) -> Float[Tensor, "E O"]:
    """Softmax of alpha over the operations allowed on each edge."""
    return torch.softmax(alpha.masked_fill(~encoding, -torch.inf), 1)


def open_edges(space: SearchSpace, encoding: Tensor, n_groups: int) -> list[int]:
    """Edges with all their operations left that can be cut into so many groups.

    Raises:
        InputError: none.
    """
    whole = [e for e in range(len(space.edges)) if torch.equal(encoding[e], full_encoding(space)[e])]
    checks.require(
        bool(whole), "encoding has no edge with all its operations left; every edge is split already."
    )
    fit = [e for e in whole if len(space.ops[e]) >= n_groups]
    most = max(len(space.ops[e]) for e in whole)
    checks.require(bool(fit), f"n_groups is {n_groups}, but no edge left has more than {most} operations.")
    return fit
