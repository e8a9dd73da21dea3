"""A sparse random projection of gradients that keeps inner products, applied block by block."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmatch.core._params import ParamSpace
from gradmatch.core.checks import require, whole

__all__ = ["SparseProjection"]

COPIES = 4  # places to which every coordinate is added; more places thin the tails, not the variance
_PIECE = 2**16  # coordinates that share one table of places


class SparseProjection:
    """Sparse Johnson-Lindenstrauss map S from R^P to R^k (after Kane and Nelson, J. ACM 2014, arXiv 1012.1577).

    The k outputs are cut into s = 4 equal parts. A coordinate gets one random sign and, in each part, one random place
    to which it is added with weight 1 / sqrt(s): s additions a coordinate where a dense random matrix takes k. Then

        E <Sx, Sy> = <x, y>,   Var <Sx, Sy> <= (1 + s^2 / k) (|x|^2 |y|^2 + <x, y>^2) / k,

    over the seeds, for all x and y: the variance of a dense matrix of random signs to within s^2 / k.

    Signs are independent. Places come from one table for every 65,536 coordinates, shifted by a random amount each
    time, so that two coordinates share a place with the right probability while nothing of size P x k, nor P indices,
    is kept: one byte a coordinate.

    Args:
        space: the blocks the gradients are made of.
        width: k, a multiple of 4.
        seed: decides the map, on every device alike.
    """

    def __init__(self, space: ParamSpace, width: int, seed: int = 0) -> None:
        self.width = whole("project", width, least=COPIES)
        require(self.width % COPIES == 0, f"project is {width}; it must be a multiple of {COPIES}.")
        self.space, self.places = space, self.width // COPIES
        generator = torch.Generator().manual_seed(whole("seed", seed, least=0))
        table = torch.randint(self.places, (COPIES, _PIECE), generator=generator)
        signs = torch.randint(2, (space.size,), generator=generator, dtype=torch.int8) * 2 - 1
        counts = [-(-numel // _PIECE) for numel in space.numels]
        shifts = torch.randint(self.places, (sum(counts), COPIES), generator=generator)
        self.shifts = dict(zip(space.names, (s.tolist() for s in shifts.split(counts)), strict=True))
        self.table, self.signs = table.to(space.device), signs.to(space.device)

    def add(self, name: str, rows: Tensor, out: Tensor) -> None:
        """Add the projection of one block's rows [m, numel], which are overwritten, to ``out`` [m, k]."""
        signs = self.signs[self.space.slices[name]]
        parts = out.view(len(out), COPIES, self.places)
        for number, shifts in enumerate(self.shifts[name]):
            piece = slice(number * _PIECE, min((number + 1) * _PIECE, rows.shape[1]))
            signed = rows[:, piece].mul_(signs[piece])
            for copy, shift in enumerate(shifts):
                added = out.new_zeros(len(out), self.places)
                added.index_add_(1, self.table[copy, : signed.shape[1]], signed)
                parts[:, copy].add_(added.roll(shift, 1), alpha=COPIES**-0.5)

    def __call__(self, gradients: Tensor) -> Tensor:
        """Projection [..., k] of whole gradients [..., P], columns in the order of the space."""
        require(
            gradients.shape[-1] == self.space.size,
            f"gradients has shape {tuple(gradients.shape)}; its last dimension must be P = {self.space.size}.",
        )
        flat = gradients.detach().reshape(-1, self.space.size).to(self.space.device)
        out = torch.zeros(len(flat), self.width, dtype=flat.dtype, device=flat.device)
        for name, columns in self.space.slices.items():
            self.add(name, flat[:, columns].clone(), out)
        return out.view(*gradients.shape[:-1], self.width)
