"""Orthogonal matching pursuit for many targets at once.

For each target x a support is built greedily: the atom a with the largest |<r, a>| joins it, and the residual
r is made orthogonal to it. Orthonormal directions q_s of the picked atoms are kept (Gram-Schmidt, repeated
where it lost digits), so r <- r - q_s <q_s, r>; at the end one triangular solve gives coefficients of the
atoms themselves, the least-squares fit on the support.

Almost all the time goes into <r, a> for every atom. Where the machine multiplies bfloat16 faster, that
product only
screens: rounding both factors to 8 bits moves <r, a> by at most about 2^-8 |r| |a| (Cauchy-Schwarz), so the
winner is among the atoms within twice that of the best, and these few are compared again in full precision.
The picks are those of the full product."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core.kernel import as_float

_HALF = torch.bfloat16
_UNIT = 2.0**-9 * 1.02  # of rounding to bfloat16, with room for that of the sum
_MOST_CANDIDATES = 64  # a target; with more, the full product is cheaper than comparing again


def batch_omp(
    targets: Any,
    atoms: Any,
    k: int = 64,
    *,
    normalize_atoms: bool = False,
    tol: float | None = None,
    chunk: int = 512,
) -> tuple[Int[Tensor, "B k"], Float[Tensor, "B k"]]:
    """Write each target as a mix of at most k atoms, chosen by orthogonal matching pursuit.

    Args:
        targets: rows [B, d], of any floating type; half precision is computed in single.
        atoms: rows [N, d].
        k: most atoms for each target.
        normalize_atoms: choose by <r, a> / |a|, as scikit-learn does after normalising. Otherwise long atoms
            are favoured. Coefficients always refer to the atoms as given.
        tol: stop a target when its residual is at most this share of its length. Without it a target stops
            early only where nothing is left, or no independent atom.
        chunk: targets at once; memory is about chunk * (N + k d) numbers.

    Returns:
        Indices [B, k] in the order picked and their coefficients [B, k]; unused slots have index 0,
        coefficient 0.

    Raises:
        InputError: widths that differ, no rows, values that are not finite, or k outside 1..N.

    >>> batch_omp(torch.tensor([[0.0, 3.0, 1.0]]), torch.eye(3), 2)
    (tensor([[1, 2]]), tensor([[3., 1.]]))
    """
    x, a = (_rows(name, value) for name, value in (("targets", targets), ("atoms", atoms)))
    checks.require(
        x.shape[1] == a.shape[1],
        f"targets have width {x.shape[1]} and atoms {a.shape[1]}; they must be equal.",
    )
    checks.whole("k", k, 1, len(a))
    checks.whole("chunk", chunk)
    least = 0.0 if tol is None else checks.nonnegative("tol", tol)
    wide = torch.promote_types(torch.promote_types(x.dtype, a.dtype), torch.float32)
    a = a.to(wide)
    choice = _Choice(a, normalize_atoms)
    parts = [_pursue(part.to(a.device, wide), a, choice, k, least) for part in x.split(chunk)]
    return torch.cat([i for i, _ in parts]), torch.cat([c for _, c in parts])


def _rows(name: str, value: Any) -> Tensor:
    rows = as_float(name, value)
    checks.require(
        rows.ndim == 2 and len(rows) > 0, f"{name} is of shape {tuple(rows.shape)}; it must be (n, d)."
    )
    return rows


def _pursue(x: Tensor, atoms: Tensor, choice: _Choice, k: int, tol: float) -> tuple[Tensor, Tensor]:
    """Indices and coefficients [B, k] of one chunk."""
    count, width = x.shape
    eps = torch.finfo(x.dtype).eps
    directions = x.new_zeros(count, k, width)
    triangle = torch.eye(k, dtype=x.dtype, device=x.device).repeat(count, 1, 1)
    shares, indices = x.new_zeros(count, k), torch.zeros(count, k, dtype=torch.long, device=x.device)
    residual, length = x.clone(), x.norm(dim=1)
    alive = length > 0
    for s in range(k):
        alive = alive & (residual.norm(dim=1) > max(tol, 4 * eps) * length)
        if not bool(alive.any()):
            break
        picked = choice.best(residual, indices[:, :s])
        atom = atoms[picked]
        inner, direction, norm = _orthogonalised(atom, directions[:, :s])
        alive = alive & (norm > 16 * eps * atom.norm(dim=1))  # else the atom depends on those before
        on = alive.to(x.dtype)[:, None]
        direction = torch.where(alive[:, None], direction / norm[:, None], 0)
        share = (direction * residual).sum(1)
        residual -= share[:, None] * direction
        directions[:, s], shares[:, s] = direction, share
        triangle[:, :s, s] = inner * on
        triangle[:, s, s] = torch.where(alive, norm, 1)
        indices[:, s] = torch.where(alive, picked, 0)
    return indices, torch.linalg.solve_triangular(triangle, shares[:, :, None], upper=True)[:, :, 0]


def _orthogonalised(atom: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Products with the directions [B, s], what is left of the atom [B, d], and its norm [B]."""
    inner = (atom[:, None] @ directions.mT)[:, 0]
    left = atom - (inner[:, None] @ directions)[:, 0]
    norm, before = left.norm(dim=1), atom.norm(dim=1)
    again = torch.nonzero(
        norm < 0.7 * before
    ).flatten()  # digits cancelled; a second pass is enough (Kahan, Parlett)
    if len(again) and directions.shape[1]:
        basis = directions[again]
        more = (left[again][:, None] @ basis.mT)[:, 0]
        inner[again] += more
        left[again] -= (more[:, None] @ basis)[:, 0]
        norm = left.norm(dim=1)
    return inner, left, norm


class _Choice:
    """The atom with the largest |<r, a>|, or |<r, a>| / |a|, that was not taken."""

    def __init__(self, atoms: Tensor, normalize: bool) -> None:
        norms = atoms.norm(dim=1).clamp(min=torch.finfo(atoms.dtype).tiny)[:, None]
        self.atoms = atoms / (norms if normalize else norms.max())  # none is longer than 1
        self.half = self.atoms.to(_HALF) if halves_are_fast(atoms.device) else None

    def best(self, residual: Tensor, taken: Tensor) -> Tensor:
        """Index [B] for every residual; of equal ones the lowest."""
        if self.half is not None:
            found = self._screened(residual, taken, self.half)
            if found is not None:
                return found
        return (residual @ self.atoms.T).abs_().scatter_(1, taken, -1).argmax(1)

    def _screened(self, residual: Tensor, taken: Tensor, half: Tensor) -> Tensor | None:
        """By the product in half precision and another look at what comes near the best of it."""
        unit = residual / residual.norm(dim=1, keepdim=True).clamp(min=torch.finfo(residual.dtype).tiny)
        # bits of numbers of at least 0 are ordered as the numbers are, and compared much faster
        scores = (unit.to(_HALF) @ half.T).view(torch.int16).bitwise_and_(0x7FFF).scatter_(1, taken, 0)
        top = scores.amax(1).view(_HALF).to(residual.dtype)
        limit = (top - 2 * (2 * _UNIT + _UNIT * top)).clamp(min=0) * (1 - 2**-7)
        bits = torch.where(top > 0, limit, 2.0).to(_HALF).view(torch.int16)
        rows, columns = torch.nonzero(scores >= bits[:, None], as_tuple=True)
        if len(rows) > _MOST_CANDIDATES * len(residual):
            return None
        exact = (unit[rows] * self.atoms[columns]).sum(1).abs()
        best = exact.new_full((len(unit),), -1).scatter_reduce(0, rows, exact, "amax")
        first = torch.where(exact == best[rows], columns, len(half) - 1)
        last = rows.new_full((len(unit),), len(half) - 1)  # what a residual of nothing gets
        return last.scatter_reduce(0, rows, first, "amin")


def halves_are_fast(device: torch.device) -> bool:
    """Whether products of bfloat16 are well ahead of single precision there."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and bool(
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
