"""Spaces of architectures: edges that each carry one of several operations, and networks that hold all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.core import checks

Genotype = tuple[int, ...]
"""The place of the operation on every edge."""
Architecture = Sequence[int] | Tensor
"""A genotype, or weights (edges, most operations) of a mixture on every edge."""


@runtime_checkable
class SearchSpace(Protocol):
    """What a search needs of a space; ``CellSpace`` and ``NASBench201Space`` are two."""

    @property
    def edges(self) -> Sequence[str]:
        """Their names."""
        ...

    @property
    def ops(self) -> Sequence[Sequence[str]]:
        """Names of the operations by edge."""
        ...

    def supernet(self) -> nn.Module:
        """A fresh network with all operations.

        Called as ``net(x, architecture)``, it gives logits (n, classes); ``net.edge_parameters(e)`` names the
        parameters of edge e's operations; all others are shared.
        """
        ...

    def child(self, genotype: Sequence[int]) -> nn.Module:
        """A fresh network of one architecture, called as ``net(x)``."""
        ...

    def connected(self, genotype: Sequence[int]) -> bool:
        """Whether anything reaches the output."""
        ...


class MixedEdge(nn.Module):
    """All operations of one edge."""

    def __init__(self, ops: Sequence[nn.Module]) -> None:
        super().__init__()
        self.ops = nn.ModuleList(ops)

    def forward(self, x: Tensor, choice: int | Tensor) -> Tensor:
        """One operation by its place, or the sum of all by their weights."""
        if isinstance(choice, int):
            out: Tensor = self.ops[choice](x)
            return out
        return torch.stack([choice[o] * op(x) for o, op in enumerate(self.ops)]).sum(0)


class Single(nn.Module):
    """A supernet fixed to one genotype."""

    def __init__(self, supernet: nn.Module, genotype: Sequence[int]) -> None:
        super().__init__()
        self.supernet, self.genotype = supernet, tuple(genotype)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        out: Tensor = self.supernet(x, self.genotype)
        return out


class Zero(nn.Module):
    """Nothing, at the stride and width of the other operations (all keep theirs)."""

    def forward(self, x: Tensor) -> Tensor:
        """Zeros."""
        return 0 * x


def reaches(links: Sequence[tuple[int, int]], live: Sequence[bool], last: int) -> bool:
    """Whether node ``last`` is reached from node 0 over live links; links are in order of their targets."""
    seen = {0}
    for (a, b), on in zip(links, live, strict=True):
        if on and a in seen:
            seen.add(b)
    return last in seen


def _of_edge(module: nn.Module, edges: nn.ModuleDict, edge: str) -> list[str]:
    own = {id(p) for p in edges[edge].parameters()}
    return [n for n, p in module.named_parameters() if id(p) in own]


# --- a small cell ------------------------------------------------------------------------------------------


class CellSpace:
    """Four nodes in a chain and a skip from first to last, on vectors: 256 architectures, 219 of them connected.

    Operations on each edge: zero, identity, a linear layer with ReLU, a bottleneck of 3 with tanh.

    Args:
        inputs, width, classes: of the network.

    >>> space = CellSpace()
    >>> net = space.child((2, 1, 3, 0))
    >>> net(torch.zeros(5, 64)).shape
    torch.Size([5, 10])
    """

    LINKS = ((0, 1), (1, 2), (2, 3), (0, 3))
    OPS = ("zero", "identity", "linear", "bottleneck")

    def __init__(self, inputs: int = 64, width: int = 16, classes: int = 10) -> None:
        self.inputs, self.width, self.classes = inputs, width, classes
        self.edges = tuple(f"{a}-{b}" for a, b in self.LINKS)
        self.ops = (self.OPS,) * len(self.LINKS)

    def supernet(self) -> nn.Module:
        """A fresh cell with all operations."""
        return _Cell(self)

    def child(self, genotype: Sequence[int]) -> nn.Module:
        """A fresh network of one architecture."""
        return Single(_Cell(self, genotype), [0] * len(self.edges))

    def connected(self, genotype: Sequence[int]) -> bool:
        """Whether the input reaches the output."""
        return reaches(self.LINKS, [g != 0 for g in genotype], 3)

    def op(self, k: int) -> nn.Module:
        """One fresh operation."""
        d = self.width
        made = (
            Zero,
            nn.Identity,
            lambda: nn.Sequential(nn.Linear(d, d), nn.ReLU()),
            lambda: nn.Sequential(nn.Linear(d, 3), nn.Tanh(), nn.Linear(3, d)),
        )
        return made[k]()


class _Cell(nn.Module):
    def __init__(self, space: CellSpace, genotype: Sequence[int] | None = None) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(space.inputs, space.width), nn.ReLU())
        kinds = [range(len(space.OPS))] * len(space.edges) if genotype is None else [[k] for k in genotype]
        self.cell = nn.ModuleDict(
            {e: MixedEdge([space.op(k) for k in own]) for e, own in zip(space.edges, kinds, strict=True)}
        )
        self.head = nn.Linear(space.width, space.classes)

    def forward(self, x: Tensor, architecture: Architecture) -> Tensor:
        """Logits (n, classes)."""
        nodes: list[Tensor | None] = [self.stem(x), None, None, None]
        for (a, b), edge, choice in zip(CellSpace.LINKS, self.cell.values(), architecture, strict=True):
            flow = edge(nodes[a], choice)
            nodes[b] = flow if nodes[b] is None else nodes[b] + flow
        out: Tensor = self.head(nodes[3])
        return out

    def edge_parameters(self, edge: int) -> list[str]:
        """Names of the parameters of one edge's operations."""
        return _of_edge(self, self.cell, list(self.cell)[edge])


# --- NAS-Bench-201 -----------------------------------------------------------------------------------------


class NASBench201Space:
    """The cells of NAS-Bench-201 (Dong, Yang; ICLR 2020): 4 nodes, 6 edges, 5 operations, 15,625 architectures.

    Three stacks of cells with residual blocks of stride 2 between them. Norms take the batch's statistics, without
    running ones and, in the supernet, without scale and shift, as in its searches.

    Args:
        channels: of the first stack, 16 as published.
        cells: of a stack, 5 as published.
        classes: of the data.
        inputs: channels of the images.
    """

    LINKS = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
    OPS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")

    def __init__(self, channels: int = 16, cells: int = 5, classes: int = 10, inputs: int = 3) -> None:
        self.channels, self.cells = checks.whole("channels", channels), checks.whole("cells", cells)
        self.classes, self.inputs = classes, inputs
        self.edges = tuple(f"{b}<-{a}" for a, b in self.LINKS)
        self.ops = (self.OPS,) * len(self.LINKS)

    def supernet(self) -> nn.Module:
        """A fresh network with all operations."""
        return _Stacks(self)

    def child(self, genotype: Sequence[int]) -> nn.Module:
        """A fresh network of one architecture, its norms with scale and shift."""
        return Single(_Stacks(self, genotype), [0] * len(self.edges))

    def connected(self, genotype: Sequence[int]) -> bool:
        """Whether the input of a cell reaches its output."""
        return reaches(self.LINKS, [g != 0 for g in genotype], 3)

    def name(self, genotype: Sequence[int]) -> str:
        """An architecture as the benchmark writes it.

        >>> NASBench201Space().name((3, 1, 0, 2, 4, 1))[:34]
        '|nor_conv_3x3~0|+|skip_connect~0|n'
        """
        parts: list[str] = []
        for b in (1, 2, 3):
            own = [(a, g) for (a, end), g in zip(self.LINKS, genotype, strict=True) if end == b]
            parts.append("|" + "|".join(f"{self.OPS[g]}~{a}" for a, g in own) + "|")
        return "+".join(parts)

    def parse(self, name: str) -> Genotype:
        """:meth:`name` undone, for tables of accuracies that a user has.

        Raises:
            InputError: not such a name.
        """
        words = [w.partition("~") for part in name.split("+") for w in part.strip("|").split("|")]
        links = [(a, b) for b in (1, 2, 3) for a in range(b)]
        sound = [w[2] for w in words] == [str(a) for a, _ in links] and all(w[0] in self.OPS for w in words)
        checks.require(sound, f"name is {name!r}; it must be an architecture as NAS-Bench-201 writes it.")
        found = {link: self.OPS.index(w[0]) for link, w in zip(links, words, strict=True)}
        return tuple(found[link] for link in self.LINKS)


def _norm(width: int, affine: bool) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, affine=affine, track_running_stats=False)


def _conv(before: int, width: int, size: int, affine: bool, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(before, width, size, stride, size // 2, bias=False)
    return nn.Sequential(nn.ReLU(), conv, _norm(width, affine))


class _Pool(nn.Module):
    """Mean over 3 x 3 pixels, of those there are; as a convolution, which processors do several times faster."""

    def forward(self, x: Tensor) -> Tensor:
        sums = F.conv2d(x, x.new_ones(1, 1, 3, 3).expand(x.shape[1], 1, 3, 3), padding=1, groups=x.shape[1])
        rows, columns = (
            F.conv1d(x.new_ones(1, 1, n), x.new_ones(1, 1, 3), padding=1)[0, 0] for n in x.shape[2:]
        )
        return sums / (rows[:, None] * columns)


class _Residual(nn.Module):
    """Two 3 x 3 convolutions, the first of stride 2, and a pooled 1 x 1 beside them."""

    def __init__(self, before: int, width: int, affine: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(before, width, 3, affine, 2), _conv(width, width, 3, affine))
        self.side = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(before, width, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x) + self.side(x)
        return out


class _Stacks(nn.Module):
    def __init__(self, space: NASBench201Space, genotype: Sequence[int] | None = None) -> None:
        super().__init__()
        c, affine = space.channels, genotype is not None
        self.stem = nn.Sequential(nn.Conv2d(space.inputs, c, 3, padding=1, bias=False), _norm(c, True))
        self.stacks, self.between = nn.ModuleList(), nn.ModuleList()
        kinds = [range(len(space.OPS))] * len(space.edges) if genotype is None else [[k] for k in genotype]
        for k in range(3):
            width = c * 2**k
            if k:
                self.between.append(_Residual(width // 2, width, affine))
            made = []
            for _ in range(space.cells):
                ops = [[self._op(o, width, affine) for o in own] for own in kinds]
                edges = zip(space.edges, ops, strict=True)
                made.append(nn.ModuleDict({e: MixedEdge(own) for e, own in edges}))
            self.stacks.append(nn.ModuleList(made))
        self.last, self.head = nn.Sequential(_norm(4 * c, True), nn.ReLU()), nn.Linear(4 * c, space.classes)

    @staticmethod
    def _op(k: int, width: int, affine: bool) -> nn.Module:
        made = (
            Zero,
            nn.Identity,
            lambda: _conv(width, width, 1, affine),
            lambda: _conv(width, width, 3, affine),
            _Pool,
        )
        return made[k]()

    def forward(self, x: Tensor, architecture: Architecture) -> Tensor:
        """Logits (n, classes)."""
        x = self.stem(x)
        for k, stack in enumerate(self.stacks):
            x = self.between[k - 1](x) if k else x
            for cell in stack:  # type: ignore[attr-defined]
                nodes: list[Tensor | None] = [x, None, None, None]
                for (a, b), edge, choice in zip(
                    NASBench201Space.LINKS, cell.values(), architecture, strict=True
                ):
                    flow = edge(nodes[a], choice)
                    nodes[b] = flow if nodes[b] is None else nodes[b] + flow
                x = nodes[3]  # type: ignore[assignment]
        out: Tensor = self.head(self.last(x).mean((2, 3)))
        return out

    def edge_parameters(self, edge: int) -> list[str]:
        """Names of the parameters of one edge's operations, in all cells."""
        names: list[str] = []
        for stack in self.stacks:
            for cell in stack:  # type: ignore[attr-defined]
                names += _of_edge(self, cell, list(cell)[edge])
        return names
