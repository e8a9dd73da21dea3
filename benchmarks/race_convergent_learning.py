"""Unit correlations of six networks against a loop over pairs, and lasso paths of all units against scikit-learn's.

Correlations: 5,000 activations of 256 units of each of six networks come in batches of 500; ours are the moments of
all networks' units side by side, the peer keeps the activations and calls ``numpy.corrcoef`` for each of the 15 pairs.

Lasso: every unit of one network from the 256 of another at four penalties, down a warm-started path. The peer is
``sklearn.linear_model.lasso_path`` on the same precomputed Gram matrix, unit by unit, at its own tolerance (1e-4 of the
duality gap) and at 1e-8; ours ends at 1e-7 of the optimality conditions. "The same" is the same sum of objectives, and
ours not above theirs. scipy's assignment is already the best there is; ours is a call to it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from _timer import main, race
from gradmatch.analysis._activations import Activations, Moments
from gradmatch.analysis._lasso import lasso_path

N, UNITS, NETWORKS, BATCH = 5_000, 256, 6, 500
LAMBDAS = (0.3, 0.1, 0.03, 0.01)


def layers() -> list[Tensor]:
    """Rectified units with 40 common causes of falling strength, as trained layers have them."""
    g = torch.Generator().manual_seed(0)
    causes = torch.randn(N, 40, generator=g) * torch.linspace(3, 0.2, 40)
    return [
        (causes @ torch.randn(40, UNITS, generator=g) + torch.randn(N, UNITS, generator=g)).relu()
        for _ in range(NETWORKS)
    ]


def stacked(nets: list[Tensor]) -> np.ndarray:
    halves = [Moments(NETWORKS * UNITS) for _ in range(2)]
    for k, rows in enumerate(torch.cat(nets, 1).split(BATCH)):
        halves[k % 2].add(rows)
    seen = Activations(("l",), {"l": (UNITS,) * NETWORKS}, {"l": (halves[0], halves[1])}, {})
    moments = seen.moments("l")
    deviation = moments.deviation
    table = moments.products / (moments.count * deviation[:, None] * deviation)
    blocks = table.reshape(NETWORKS, UNITS, NETWORKS, UNITS).permute(0, 2, 1, 3)
    return blocks[tuple(zip(*itertools.combinations(range(NETWORKS), 2), strict=True))].numpy()


def pair_by_pair(nets: list[Tensor]) -> np.ndarray:
    arrays = [n.double().numpy() for n in nets]
    return np.stack(
        [np.corrcoef(a, b, rowvar=False)[:UNITS, UNITS:] for a, b in itertools.combinations(arrays, 2)]
    )


def close(a: np.ndarray, b: np.ndarray) -> None:
    assert np.abs(a - b).max() < 1e-6, f"correlations differ by {np.abs(a - b).max()}"


def peer_path(gram: Tensor, cross: Tensor, x: Tensor, y: Tensor, tol: float) -> Tensor:
    from sklearn.linear_model import lasso_path as theirs

    alphas, n = [v / 2 for v in LAMBDAS], len(x)
    whole, inner = gram.numpy() * n, cross.numpy() * n
    columns = [
        theirs(
            x.numpy(), y[:, t].numpy(), alphas=alphas, precompute=whole, Xy=inner[:, t],
            tol=tol, max_iter=20_000,
        )[1]
        for t in range(y.shape[1])
    ]  # fmt: skip
    return torch.from_numpy(np.stack(columns, 2)).permute(1, 0, 2)


def same_objectives(gram: Tensor, cross: Tensor) -> Callable[[Tensor, Tensor], None]:
    def total(path: Tensor) -> list[float]:
        return [
            float(((w * (gram @ w)).sum() - 2 * (w * cross).sum() + v * w.abs().sum()) / cross.shape[1])
            for v, w in zip(LAMBDAS, path, strict=True)
        ]

    def check(ours: Tensor, theirs: Tensor) -> None:
        for one, two in zip(total(ours), total(theirs), strict=True):
            assert one <= two + 1e-9, f"objective {one} above {two}"
            assert two - one < 2e-3, f"objective {one}, theirs {two}"

    return check


def run() -> None:
    nets = layers()
    race(
        f"correlations of {NETWORKS} networks, {UNITS} units, {N} samples",
        lambda: stacked(nets),
        lambda: pair_by_pair(nets),
        peer="numpy.corrcoef for each pair",
        check=close,
        target=2.0,
    )
    x, y = ((n[::2] - n[::2].mean(0)) / n[::2].std(0, correction=0) for n in (n.double() for n in nets[:2]))
    gram, cross = x.T @ x / len(x), x.T @ y / len(x)
    x, y = np.asfortranarray(x.numpy()), y  # as scikit-learn wants it, so that it copies nothing
    for tol in (1e-4, 1e-8):
        race(
            f"lasso paths of {UNITS} units from {UNITS}, {len(LAMBDAS)} penalties",
            lambda: lasso_path(gram, cross, LAMBDAS),
            lambda tol=tol: peer_path(gram, cross, torch.from_numpy(x), y, tol),
            peer=f"scikit-learn lasso_path, Gram, tol {tol:g}",
            rounds=3,
            check=same_objectives(gram, cross),
            target=2.0,
            unit="s",
        )


if __name__ == "__main__":
    main(run)
