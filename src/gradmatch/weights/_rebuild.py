"""Ways to make the rows of unseen tokens in one embedding space from those of another.

Row i of ``donor`` and ``base`` is the same token in both spaces (an anchor); ``targets`` are rows of the
donor's space that have none in the base's. Orthogonal matching pursuit is the system; the others are what it
is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core.pick import batch_omp

RIDGE = 1e-2
"""Of the linear map, relative to the mean squared length of a donor dimension."""
KS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Anchors:
    """Rows of the shared tokens in both spaces, [N, d_D] and [N, d_B]."""

    donor: Tensor
    base: Tensor


@dataclass(frozen=True)
class Task:
    """One matrix to be rebuilt.

    Attributes:
        anchors: the shared tokens.
        targets: donor rows [T, d_D].
        whole: all rows of the base's matrix, for its mean and covariance and for pieces.
        pieces: base ids of the pieces of each target's text, for the subword ways.
        head: whether it is the output matrix.
        k: atoms, or neighbours.
        normalize: choose atoms by angle.
        ridge: of the coefficients, relative to an atom's mean squared length.
        generator: for the random ways.
    """

    anchors: Anchors
    targets: Tensor
    whole: Tensor
    pieces: Sequence[Sequence[int]]
    head: bool
    k: int
    normalize: bool
    ridge: float
    generator: torch.Generator


def omp(task: Task) -> Tensor:
    """sum_s c_s base[j_s] with the support j and coefficients c of the target in the donor's space."""
    return mixed(pursued(task), task.anchors.base)


def mixed(support: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
    """Mixes [T, d] of rows [N, d] by indices and coefficients [T, k]."""
    parts = zip(*(torch.split(t, 512) for t in support), strict=True)
    return torch.cat([torch.einsum("tk,tkd->td", c, rows[i]) for i, c in parts])


def pursued(task: Task) -> tuple[Tensor, Tensor]:
    """Support and coefficients [T, k]; with ``ridge`` the coefficients are shrunk on the same support."""
    indices, coefficients = batch_omp(
        task.targets, task.anchors.donor, task.k, normalize_atoms=task.normalize
    )
    if task.ridge and len(indices):
        used = (coefficients != 0).to(coefficients.dtype)
        atoms = task.anchors.donor[indices] * used[:, :, None]
        scale = task.ridge * float(task.anchors.donor.square().sum(1).mean())
        gram = atoms @ atoms.mT + scale * torch.eye(task.k, dtype=atoms.dtype, device=atoms.device)
        coefficients = torch.linalg.solve(gram, (atoms @ task.targets[:, :, None]))[:, :, 0] * used
    return indices, coefficients


# --- without the donor -------------------------------------------------------------------------------------


def zero(task: Task) -> Tensor:
    """Rows of zeros."""
    return task.whole.new_zeros(len(task.targets), task.whole.shape[1])


def mean(task: Task) -> Tensor:
    """The mean row of the base."""
    row: Tensor = task.whole.mean(0)
    return row.expand(len(task.targets), -1)


def normal(task: Task) -> Tensor:
    """Standard normal rows."""
    shape = (len(task.targets), task.whole.shape[1])
    return torch.randn(shape, generator=task.generator, dtype=task.whole.dtype).to(task.whole.device)


def hewitt(task: Task) -> Tensor:
    """Rows from a normal distribution of the base's mean and covariance (Hewitt 2021)."""
    centred = task.whole - task.whole.mean(0)
    _, values, axes = torch.linalg.svd(centred, full_matrices=False)
    draws = torch.randn(len(task.targets), len(values), generator=task.generator, dtype=task.whole.dtype).to(
        values
    )
    rows: Tensor = task.whole.mean(0) + (draws * values / max(len(task.whole) - 1, 1) ** 0.5) @ axes
    return rows


def _subword(weigh: Callable[[int, bool], list[float]]) -> Callable[[Task], Tensor]:
    def rows(task: Task) -> Tensor:
        out = zero(task)
        for row, pieces in enumerate(task.pieces):
            if pieces:
                weights = out.new_tensor(weigh(len(pieces), task.head))
                out[row] = weights @ task.whole[torch.tensor(pieces)]
        return out

    return rows


def _weighted(n: int, head: bool) -> list[float]:
    """The piece nearest to what the matrix says counts most: the last for the input, the first for the output."""
    ramp = [2 * (i + 1) / (n * (n + 1)) for i in range(n)]
    return ramp[::-1] if head else ramp


def _end(n: int, head: bool) -> list[float]:
    return [1.0] + [0.0] * (n - 1) if head else [0.0] * (n - 1) + [1.0]


# --- with the donor ----------------------------------------------------------------------------------------


def _knn(distance: str, weigh: str) -> Callable[[Task], Tensor]:
    def rows(task: Task) -> Tensor:
        parts = [_neighbours(task, part, distance, weigh) for part in torch.split(task.targets, 512)]
        return torch.cat(parts) if parts else zero(task)

    return rows


def _neighbours(task: Task, x: Tensor, distance: str, weigh: str) -> Tensor:
    atoms, k = task.anchors.donor, min(task.k, len(task.anchors.donor))
    if distance == "cosine":
        unit = torch.nn.functional.normalize
        apart = (1 - unit(x, dim=1) @ unit(atoms, dim=1).T).clamp(min=0)
    else:
        apart = torch.cdist(x, atoms)
    near, index = apart.topk(k, largest=False)
    if weigh == "inverse":
        weights = 1 / near.clamp(min=1e-8)
        weights = weights / weights.sum(1, keepdim=True)
    else:
        own = atoms[index]
        weights = _barycentric(x, own) if weigh == "barycentric" else _least_squares(x, own)
    return torch.einsum("tk,tkd->td", weights, task.anchors.base[index])


def _least_squares(x: Tensor, own: Tensor) -> Tensor:
    """Weights with the least |x - sum w a|, of least norm."""
    weights: Tensor = (torch.linalg.pinv(own.mT) @ x[:, :, None])[:, :, 0]
    return weights


def _barycentric(x: Tensor, own: Tensor) -> Tensor:
    """The same among weights that sum to 1."""
    offsets = own - x[:, None]
    gram = offsets @ offsets.mT
    scale = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp(min=1e-12)
    ones = x.new_ones(*own.shape[:2], 1)
    solved: Tensor = torch.linalg.solve(
        gram + 1e-3 * scale * torch.eye(own.shape[1], dtype=x.dtype, device=x.device), ones
    )[:, :, 0]
    return solved / solved.sum(1, keepdim=True)


def linear(task: Task) -> Tensor:
    """An affine map of all anchors, by ridge regression."""
    a, b = task.anchors.donor, task.anchors.base
    centred = a - a.mean(0)
    gram = centred.T @ centred
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=a.dtype, device=a.device)
    slope: Tensor = torch.linalg.solve(gram, centred.T @ (b - b.mean(0)))
    rows: Tensor = (task.targets - a.mean(0)) @ slope + b.mean(0)
    return rows


def procrustes(task: Task) -> Tensor:
    """Principal axes of the anchors in both spaces, one turned and scaled onto the other."""
    a, b = task.anchors.donor, task.anchors.base
    rank = min(a.shape[1], b.shape[1], len(a) - 1)
    axes = [torch.linalg.svd(m - m.mean(0), full_matrices=False)[2][:rank].T for m in (a, b)]
    left, right = ((m - m.mean(0)) @ v for m, v in zip((a, b), axes, strict=True))
    u, values, vt = torch.linalg.svd(left.T @ right)
    scale = values.sum() / left.square().sum().clamp(min=1e-30)
    rows: Tensor = scale * ((task.targets - a.mean(0)) @ axes[0]) @ (u @ vt) @ axes[1].T + b.mean(0)
    return rows


METHODS: dict[str, Callable[[Task], Tensor]] = {
    "omp": omp,
    "zero": zero,
    "mean": mean,
    "normal": normal,
    "hewitt": hewitt,
    "subword": _subword(lambda n, head: [1 / n] * n),
    "subword-sum": _subword(lambda n, head: [1.0] * n),
    "subword-weighted": _subword(_weighted),
    "subword-end": _subword(_end),
    "knn": _knn("euclidean", "inverse"),
    "knn-cosine": _knn("cosine", "inverse"),
    "knn-barycentric": _knn("euclidean", "barycentric"),
    "knn-lstsq": _knn("euclidean", "lstsq"),
    "linear": linear,
    "procrustes": procrustes,
}


def choose_k(
    anchors: Anchors,
    ks: Sequence[int] = KS,
    *,
    method: str = "omp",
    normalize: bool = False,
    hidden: float = 0.2,
    most: int = 1000,
    seed: int = 0,
) -> tuple[int, dict[int, float]]:
    """The k with which hidden anchors are best rebuilt (mean cosine to their true base row), and every k's
    figure.

    Args:
        hidden: share of the anchors that is hidden, at most ``most`` of them.
    """
    n = len(anchors.donor)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    held, rest = order[: min(most, max(1, round(hidden * n)))], order[max(1, round(hidden * n)) :]
    ks = [k for k in ks if k <= min(len(rest), anchors.donor.shape[1])]
    checks.require(bool(ks), f"k is 'auto' and there are {n} shared tokens; it needs more.")
    known = Anchors(anchors.donor[rest], anchors.base[rest])
    scores = {}
    for k in ks:
        task = Task(known, anchors.donor[held], known.base, (), False, k, normalize, 0.0, torch.Generator())
        scores[k] = float(torch.cosine_similarity(METHODS[method](task), anchors.base[held]).mean())
    return max(scores, key=lambda k: scores[k]), scores
