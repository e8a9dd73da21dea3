"""Matrix completion on 3,000 x 3,000 with 6 k n entries, ranks 5 to 100, against exact solvers and public packages.

Half-sweeps (residual and new factor of the columns, from the state after two sweeps): solver "auto" against exact
solutions in batches by Cholesky, and against the loop over columns in numpy with LAPACK's ``posv``, all in float64
on the threads PyTorch has. Whole fits: from the spectral start to a misfit of 1e-6, ours with "auto" and with "exact".

``implicit`` solves another problem of the same shape (weights for all entries, unobserved ones included), so only the
time of five sweeps of its conjugate-gradient ALS is compared. ``fancyimpute`` gets the same matrix with NaN; its
soft-impute (30 rounds, no shrinkage, rank k) and one epoch of its gradient descent end with a larger error on the
hidden entries than ours, which the check asks for. cvxpy, which fancyimpute imports for a method not used here, is
stood in for where it is missing, and so is an argument that scikit-learn has renamed.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

from _timer import figure, main, missing, race
from gradmatch.solve import MatrixCompletion
from gradmatch.solve._entries import Entries, Side, as_entries
from gradmatch.solve.matrix_completion import orthonormal

SIZE = 3000
TARGETS = {5: 1.0, 10: 1.0, 20: 1.0, 50: 1.8, 100: 3.5}


@lru_cache(maxsize=1)
def problem(rank: int) -> tuple[Entries, Tensor]:
    """The observed entries, and the whole matrix."""
    g = torch.Generator().manual_seed(rank)
    U, V = (torch.randn(SIZE, rank, generator=g, dtype=torch.float64) for _ in range(2))
    rows, cols = (torch.rand(SIZE, SIZE, generator=g) < 6 * rank / SIZE).nonzero(as_tuple=True)
    M = U @ V.T
    return as_entries(rows, cols, M[rows, cols], (SIZE, SIZE), torch.float64), M


@lru_cache(maxsize=1)
def state(rank: int) -> tuple[Side, Tensor, Tensor]:
    """Columns, and the factors after two sweeps."""
    entries, _ = problem(rank)
    model = fit(rank, "auto", max_iter=2, tol=0)
    U, V = orthonormal(model.U_, model.V_)
    return entries.sides()[0], U, V


def fit(rank: int, solver: str, **options: Any) -> MatrixCompletion:
    entries, _ = problem(rank)
    model = MatrixCompletion(rank, solver=solver, **options)
    return model.fit(entries.rows, entries.cols, entries.values, entries.shape)


def ours(rank: int) -> Tensor:
    side, U, V = state(rank)
    inner = MatrixCompletion(rank)._inner("auto", torch.Generator())
    return V + inner.change(side, U, V, side.residual(U, V))[0]


def batched_cholesky(rank: int, megabytes: float = 4) -> Tensor:
    """Normal equations of columns of like length, padded to batches."""
    side, U, _ = state(rank)
    padded, values = torch.cat([U, U.new_zeros(1, rank)]), torch.cat([side.values, side.values.new_zeros(1)])
    order, found = torch.argsort(side.counts), U.new_empty(SIZE, rank)
    batch = max(1, int(megabytes * 2**20 / (8 * rank * float(side.counts.double().mean()))))
    for which in order.split(batch):
        longest = torch.arange(int(side.counts[which].max()))
        there = longest < side.counts[which, None]
        place = torch.where(there, side.offsets[which, None] + longest, len(side.index))
        A = padded[torch.where(there, side.index[place.clamp_max(len(side.index) - 1)], SIZE)]
        L = torch.linalg.cholesky(A.mT @ A)
        found[which] = torch.cholesky_solve(A.mT @ values[place][:, :, None], L)[:, :, 0]
    return found


def column_loop(rank: int) -> Tensor:
    """One column after the other: gather, Gram by BLAS, LAPACK's posv."""
    side, U, _ = state(rank)
    rows, index, values = U.numpy(), side.index.numpy(), side.values.numpy()
    ends, found = side.offsets.tolist(), np.empty((SIZE, rank))
    for j in range(SIZE):
        at = slice(ends[j], ends[j + 1])
        A = rows.take(index[at], 0)
        found[j] = lapack.dposv(A.T @ A, values[at] @ A)[1]
    return torch.from_numpy(found)


def nearly(rank: int) -> Callable[[Tensor, Tensor], None]:
    """Ours has done most of what an exact solution would do to the misfit."""
    side, U, V = state(rank)

    def check(mine: Tensor, exact: Tensor) -> None:
        before, best, got = (float(side.residual(U, W).norm()) for W in (V, exact, mine))
        assert best <= got * (1 + 1e-9), f"ours has a misfit of {got}, below the exact {best}"
        assert got - best < 0.05 * (before - best), f"misfit {got}, exact {best}, before {before}"

    return check


def both_recover(rank: int) -> Callable[[MatrixCompletion, MatrixCompletion], None]:
    def check(mine: MatrixCompletion, theirs: MatrixCompletion) -> None:
        _, M = problem(rank)
        errors = [float((m.complete() - M).norm() / M.norm()) for m in (mine, theirs)]
        figure(f"rank {rank}, sweeps to 1e-6", auto=mine.n_iter_, exact=theirs.n_iter_)
        assert max(errors) < 1e-4, f"errors {errors}"

    return check


def with_implicit(rank: int) -> None:
    try:
        from implicit.cpu.als import AlternatingLeastSquares
        from scipy.sparse import csr_matrix
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        missing("implicit", str(error))
        return
    entries, _ = problem(rank)
    matrix = csr_matrix(
        (entries.values.abs().numpy(), (entries.rows.numpy(), entries.cols.numpy())), entries.shape
    )

    def theirs() -> None:
        model = AlternatingLeastSquares(
            rank, iterations=5, dtype=np.float64, num_threads=torch.get_num_threads(), random_state=0
        )
        with threadpool_limits(1, "blas"):  # as its documentation asks
            model.fit(matrix, show_progress=False)

    race(
        f"five sweeps at rank {rank}",
        lambda: fit(rank, "auto", max_iter=5, tol=0, init="random"),
        theirs,
        peer="implicit CG-ALS",
        rounds=3,
    )


def load_fancyimpute() -> types.ModuleType:
    try:
        importlib.import_module("cvxpy")
    except ImportError:
        sys.modules["cvxpy"] = types.ModuleType("cvxpy")
    found = importlib.import_module("fancyimpute")
    for name in ("solver", "soft_impute", "matrix_factorization"):
        module = importlib.import_module(f"fancyimpute.{name}")
        module.check_array = lambda X, force_all_finite: X  # scikit-learn 1.8 calls it ensure_all_finite
    return found


def with_fancyimpute(rank: int) -> None:
    try:
        package = load_fancyimpute()
    except ImportError as error:
        missing("fancyimpute", str(error))
        return
    entries, M = problem(rank)
    seen = np.full(entries.shape, np.nan)
    seen[entries.rows, entries.cols] = entries.values
    hidden = np.isnan(seen)
    truth = M.numpy()[hidden]

    def closer(mine: np.ndarray, theirs: np.ndarray) -> None:
        errors = [float(np.linalg.norm(X[hidden] - truth) / np.linalg.norm(truth)) for X in (mine, theirs)]
        figure(f"rank {rank}, error on the hidden entries", ours=errors[0], theirs=errors[1])
        assert errors[0] < 1e-4
        assert errors[0] < errors[1]

    peers = {
        "fancyimpute SoftImpute": package.SoftImpute(1e-9, max_iters=30, max_rank=rank, verbose=False),
        "fancyimpute MatrixFactorization": package.MatrixFactorization(rank, max_iters=1, verbose=False),
    }
    for peer, model in peers.items():
        race(
            f"filling in at rank {rank}",
            lambda: np.asarray(fit(rank, "auto").complete()),
            lambda model=model: model.fit_transform(seen),
            peer=peer,
            rounds=1,
            warmup=0,
            check=closer,
            target=2.0,
            unit="s",
        )


def run() -> None:
    for rank, target in TARGETS.items():
        for peer, theirs in (("batched Cholesky", batched_cholesky), ("column loop", column_loop)):
            race(
                f"half-sweep at rank {rank}",
                lambda rank=rank: ours(rank),
                lambda rank=rank, theirs=theirs: theirs(rank),
                peer=peer,
                rounds=5,
                check=nearly(rank),
                target=target,
            )
    for rank in (50, 100):
        race(
            f"fit at rank {rank}",
            lambda rank=rank: fit(rank, "auto"),
            lambda rank=rank: fit(rank, "exact"),
            peer="exact solver",
            rounds=1,
            warmup=0,
            check=both_recover(rank),
            target=TARGETS[rank],
            unit="s",
        )
        with_implicit(rank)
    with_fancyimpute(50)


if __name__ == "__main__":
    main(run)
