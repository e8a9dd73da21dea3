"""Low-rank projectors of a gradient matrix [n, d]: to r columns of a fixed basis, singular vectors, a fixed subspace.

A projector is called with the state of its parameter, in which it keeps what it needs; ``state["step"]`` is the number
of the update, from 1. Subspaces are chosen anew at the first update and whenever the number is a multiple of the gap.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradmatch.core.bases import basis, dct2
from gradmatch.optim._parts import State

FFT_FROM = 192
"""Size from which the FFT beats the product with the matrix on one CPU thread."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def top_columns(scores: Float[Tensor, " d"], rank: int) -> Int[Tensor, " r"]:
    """Places of the largest scores, ascending; ties go to the lower place.

    >>> top_columns(torch.tensor([1.0, 5.0, 1.0, 7.0]), 3).tolist()
    [0, 1, 3]
    """
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:rank].sort().values.int()


def moved(x: Tensor, old: Int[Tensor, " r"], new: Int[Tensor, " r"]) -> Tensor:
    """The columns of ``x`` that belong to indices ``old``, at the places of ``new``; zero where an index is new.

    Both are ascending. It is x @ (Q[:, old]^T Q[:, new]) for orthonormal Q, without the products.
    """
    place = torch.searchsorted(old, new).clamp_(max=len(old) - 1)
    return x.index_select(1, place) * (old[place] == new)


def _due(state: State, gap: int) -> bool:
    return bool(state["step"] == 1 or state["step"] % gap == 0)


class Orthonormal:
    """What projectors onto the span of r orthonormal vectors share."""

    def vectors(self, like: Tensor, state: State) -> Float[Tensor, "d r"]:
        """The vectors, of the type and on the device of ``like``."""
        raise NotImplementedError

    def up(self, update: Float[Tensor, "n r"], state: State) -> Float[Tensor, "n d"]:
        """Back to the coordinates of the gradient."""
        return update @ self.vectors(update, state).T

    def descend(
        self, w: Float[Tensor, "n d"], update: Float[Tensor, "n r"], state: State, rate: float, decay: float
    ) -> None:
        """w <- decay w - rate up(update) in one pass; a transposed ``w`` is moved as it lies in memory."""
        vectors, scaled = self.vectors(update, state), update * -rate
        if w.stride(1) == 1:
            w.addmm_(scaled, vectors.T, beta=decay)
        else:
            w.T.addmm_(vectors, scaled.T, beta=decay)


@dataclass(frozen=True)
class Columns(Orthonormal):
    """Onto the r columns of an orthonormal basis along which the gradient is largest; keeps r whole numbers."""

    rank: int
    size: int
    gap: int = 1
    kind: str = "dct2"
    norm: int = 2
    rotate: bool = True
    transform: str = "auto"
    seed: int = 0

    def _basis(self, like: Tensor) -> Tensor:
        return basis(self.kind, self.size, like.dtype, like.device, self.seed)

    def coordinates(self, gradient: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """The gradient's rows in the whole basis."""
        fast = self.kind == "dct2" and self.size >= FFT_FROM
        if self.transform == "fft" or (self.transform == "auto" and fast):
            return dct2(gradient.contiguous())
        return gradient if self.kind == "identity" else gradient @ self._basis(gradient)

    def down(self, gradient: Float[Tensor, "n d"], state: State) -> Float[Tensor, "n r"]:
        """Coordinates along the columns chosen; averages move to the columns' new places."""
        if not _due(state, self.gap):
            return gradient @ self.vectors(gradient, state)
        whole = self.coordinates(gradient)
        new = top_columns(whole.abs().sum(0) if self.norm == 1 else whole.square().sum(0), self.rank)
        if self.rotate and "indices" in state:
            for name in MOMENTS:
                state[name] = moved(state[name], state["indices"], new)
        state["indices"] = new
        return whole.index_select(1, new)

    def vectors(self, like: Tensor, state: State) -> Float[Tensor, "d r"]:
        """The columns chosen."""
        return self._basis(like).index_select(1, state["indices"])


@dataclass(frozen=True)
class Singular(Orthonormal):
    """Onto the leading right singular vectors of the gradient (GaLore, Zhao et al. 2024); keeps them, d x r."""

    rank: int
    gap: int = 1
    rotate: bool = False

    def down(self, gradient: Float[Tensor, "n d"], state: State) -> Float[Tensor, "n r"]:
        """Coordinates along the singular vectors; averages are turned into new ones if ``rotate``."""
        if _due(state, self.gap):
            new = torch.linalg.svd(gradient, full_matrices=False).Vh[: self.rank].T.contiguous()
            if self.rotate and "vectors" in state:
                turn = state["vectors"].T @ new
                for name in MOMENTS:
                    state[name] = state[name] @ turn
                state[MOMENTS[1]].abs_()
            state["vectors"] = new
        return gradient @ self.vectors(gradient, state)

    def vectors(self, like: Tensor, state: State) -> Float[Tensor, "d r"]:
        """The singular vectors kept."""
        found: Tensor = state["vectors"]
        return found


@dataclass(frozen=True)
class Fixed(Orthonormal):
    """Onto one random subspace for good, drawn from a seed and not kept in the state."""

    rank: int
    size: int
    seed: int = 0

    def vectors(self, like: Tensor, state: State) -> Float[Tensor, "d r"]:
        """The basis of the subspace."""
        return basis("random", self.size, like.dtype, like.device, self.seed)[:, : self.rank]

    def down(self, gradient: Float[Tensor, "n d"], state: State) -> Float[Tensor, "n r"]:
        """Coordinates in the subspace."""
        return gradient @ self.vectors(gradient, state)
