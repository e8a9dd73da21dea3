"""Assignments and permutations: which unit of one network stands for which of another.

``linear_assignment`` is exact; ``sinkhorn`` its smooth relative. A :class:`PermutationSpec` says which axes of a
network's parameters and buffers are permuted together (read off a run of the network, or given by hand), and a
:class:`Permutation` carries one order for each of its groups. ``singular`` and ``overlap`` compare matrices by their
singular vectors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core._axes import expose, multiply
from gradmatch.core._spec import Occurrence, PermutationSpec, Reading, Weights, call, state_of
from gradmatch.core._svd import Singular, as_matrix, overlap, singular
from gradmatch.core.store import load_tensors, save_tensors

__all__ = [
    "Occurrence",
    "Permutation",
    "PermutationSpec",
    "Reading",
    "Singular",
    "Weights",
    "apply_matrices",
    "as_matrix",
    "call",
    "expose",
    "linear_assignment",
    "linear_assignments",
    "overlap",
    "singular",
    "sinkhorn",
    "state_of",
]

CORES = os.cpu_count() or 1
PARALLEL_FROM = 32
"""Matrices of fewer rows are assigned faster than a thread starts."""


def linear_assignment(
    scores: Float[Tensor, "*batch n m"] | np.ndarray, *, maximize: bool = True
) -> Int[Tensor, "*batch n"]:
    """The column assigned to each row, with the largest (or smallest) sum of scores; exact (scipy).

    Args:
        scores: (..., n, m). Batches are worked on by all cores.
        maximize: else the sum is made small.

    Returns:
        Columns (..., n), on the CPU; -1 for rows left over where n > m.

    Raises:
        InputError: fewer than two axes, or scores that are not finite.

    >>> linear_assignment(torch.tensor([[1.0, 5.0], [2.0, 7.0]])).tolist()
    [0, 1]
    """
    tensor = torch.as_tensor(scores)
    checks.require(tensor.ndim >= 2, f"scores has the shape {tuple(tensor.shape)}; it must be (..., n, m).")
    flat = tensor.reshape(-1, *tensor.shape[-2:])
    solved = linear_assignments(list(flat), maximize=maximize)
    return (torch.stack(solved) if solved else torch.empty(0).long()).reshape(tensor.shape[:-1])


def linear_assignments(scores: Sequence[Tensor], *, maximize: bool = True) -> list[Tensor]:
    """:func:`linear_assignment` of several matrices of any sizes, side by side on all cores."""
    from scipy.optimize import linear_sum_assignment

    matrices = [torch.as_tensor(s).detach().cpu().double().numpy() for s in scores]

    def solve(matrix: np.ndarray) -> Tensor:
        with np.errstate(invalid="ignore", over="ignore"):
            if not np.isfinite(matrix.sum()):  # one cheap look; the sum alone may overflow
                checks.finite("scores", torch.from_numpy(matrix))
        rows, columns = linear_sum_assignment(*_eased(matrix, maximize))
        found = np.full(len(matrix), -1, dtype=np.int64)
        found[rows] = columns
        return torch.from_numpy(found)

    workers = min(len(matrices), CORES)
    if workers > 1 and max(len(m) for m in matrices) >= PARALLEL_FROM:
        with ThreadPoolExecutor(workers) as pool:  # scipy lets other threads run meanwhile
            return list(pool.map(solve, matrices))
    return [solve(m) for m in matrices]


def _eased(matrix: np.ndarray, maximize: bool) -> tuple[np.ndarray, bool]:
    """A problem with the same solutions that takes scipy about a quarter less time.

    Where every row and column is assigned, a constant added to one of them changes nothing; taking out the best of each
    row and then of each column gives scipy, which has no such start of its own, prices to begin with.
    """
    if len(matrix) < PARALLEL_FROM or matrix.shape[0] != matrix.shape[1]:
        return matrix, maximize
    costs = matrix.max(1)[:, None] - matrix if maximize else matrix - matrix.min(1)[:, None]
    costs -= costs.min(0)
    return costs, False


def sinkhorn(
    scores: Float[Tensor, "*batch n n"], *, tau: float = 1.0, rounds: int = 20
) -> Float[Tensor, "*batch n n"]:
    """A nearly doubly stochastic matrix exp(scores / tau) with scaled rows and columns, in the log domain.

    Rows sum to one up to what ``rounds`` leave, columns exactly. The smaller ``tau``, the closer to the assignment.

    >>> float(sinkhorn(torch.zeros(2, 2))[0, 0])
    0.5
    """
    checks.positive("tau", tau)
    checks.whole("rounds", rounds)
    log = scores / tau
    for _ in range(rounds):
        log = log - log.logsumexp(-1, keepdim=True)
        log = log - log.logsumexp(-2, keepdim=True)
    return log.exp()


@dataclass(frozen=True)
class Permutation:
    """An order for each group of a specification: new unit i is old unit ``order[group][i]``.

    In matrix form P[i, order[i]] = 1 and a layer's weight becomes P_out W P_in^T. The network's function stays.

    Attributes:
        spec: the groups and where they stand.
        order: whole numbers (n,) for each group; a group that is left out keeps its order.

    Raises:
        InputError: an order of a group that does not exist, or that is no permutation.

    >>> spec = PermutationSpec.from_axes({"w": ("P", None)}, {"w": torch.zeros(3, 1)})
    >>> p = Permutation(spec, {"P": torch.tensor([2, 0, 1])})
    >>> p.apply({"w": torch.tensor([[0.0], [1.0], [2.0]])})["w"].flatten().tolist()
    [2.0, 0.0, 1.0]
    """

    spec: PermutationSpec
    order: dict[str, Tensor]

    def __post_init__(self) -> None:
        unknown = [k for k in self.order if k not in self.spec.sizes]
        known = checks.listing(list(self.spec.sizes))
        checks.require(
            not unknown, f"order names the group {checks.listing(unknown)}; the specification has {known}."
        )
        full = {}
        for name, size in self.spec.sizes.items():
            found = torch.as_tensor(self.order.get(name, torch.arange(size))).cpu()
            checks.require(
                found.shape == (size,) and torch.equal(found.sort().values, torch.arange(size)),
                f"order[{name!r}] is no permutation of {size} units.",
            )
            full[name] = found.long()
        object.__setattr__(self, "order", full)

    @classmethod
    def identity(cls, spec: PermutationSpec) -> Permutation:
        """Every unit in its place."""
        return cls(spec, {})

    @classmethod
    def random(cls, spec: PermutationSpec, seed: int = 0) -> Permutation:
        """Every group in a random order."""
        g = torch.Generator().manual_seed(checks.whole("seed", seed, 0))
        return cls(spec, {k: torch.randperm(n, generator=g) for k, n in spec.sizes.items()})

    def apply(self, weights: Weights) -> dict[str, Tensor]:
        """The permuted state dict: new tensors of the same dtypes, on their devices.

        Raises:
            InputError: weights of another network, or not finite.
        """
        state = self.spec.check(weights)
        moved = {k: self.spec.permuted(k, t, self.order) for k, t in state.items()}
        return {k: t.clone() if t is state[k] else t for k, t in moved.items()}

    def inverse(self) -> Permutation:
        """The permutation that undoes this one."""
        return Permutation(self.spec, {k: o.argsort() for k, o in self.order.items()})

    def compose(self, first: Permutation) -> Permutation:
        """This one after ``first``: ``p.compose(q).apply(w)`` is ``p.apply(q.apply(w))``."""
        checks.require(
            self.spec.sizes == first.spec.sizes, "first is of another specification than this permutation."
        )
        return Permutation(self.spec, {k: first.order[k][o] for k, o in self.order.items()})

    def moved(self) -> dict[str, float]:
        """For each group, the share of units that change places."""
        return {
            k: float((o != torch.arange(len(o))).double().mean()) if len(o) else 0.0
            for k, o in self.order.items()
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the orders and the specification as one safetensors file."""
        return save_tensors(Path(path), self.order, {"permutation": self.spec.to_json()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Permutation:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: not such a file.
        """
        order, header = load_tensors(Path(path))
        checks.require("permutation" in header, f"{path} does not hold a permutation.")
        return cls(PermutationSpec.from_json(header["permutation"]), order)


def apply_matrices(
    spec: PermutationSpec, weights: Mapping[str, Tensor], matrices: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """As :meth:`Permutation.apply` with a matrix (n, n) of each group in place of an order; differentiable.

    Integer tensors pass as they are.
    """
    out: dict[str, Any] = {}
    for key, tensor in weights.items():
        for d, axis in enumerate(spec.axes[key]):
            tensor = multiply(tensor, d, axis, matrices) if tensor.is_floating_point() else tensor
        out[key] = tensor
    return out
