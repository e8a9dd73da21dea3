"""Milliseconds and iterations to a residual of 1e-4 on Poisson systems of 64^2 to 256^2 unknowns, one right-hand side.

Learned directions (a network trained on 32^2 here, a minute, or read from ``GRADMATCH_DCDM_NET``) against scipy's
conjugate gradients, our own with and without incomplete Cholesky, and pyamg's smoothed aggregation; each prepared
before. The claim under test is iterations; in seconds a network on a CPU is expected to lose to most of them, and the
ratios say by how much. ``GRADMATCH_PEER_DCDM`` names a checkout of the official repository (ayano721/2023_DCDM): its
loop, in NumPy and single precision, gets the same network, and must need as many iterations to within one. TensorFlow,
which its file imports for training, is stood in for by an empty module.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import types
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import cg as scipy_cg

from _timer import figure, main, missing, race
from gradmatch.core.cpu import keep_freed_memory
from gradmatch.core.krylov import cg, incomplete_cholesky
from gradmatch.solve import DirectionSolver, DirectionTraining, train_direction_net

SIZES, TOL = (64, 128, 256), 1e-4
Answer = tuple[np.ndarray, int]
"""Solution and iterations."""


def poisson(n: int) -> sp.csr_matrix:
    line = sp.diags([2.0, -1.0, -1.0], [0, 1, -1], shape=(n, n))
    return (sp.kron(line, sp.identity(n)) + sp.kron(sp.identity(n), line)).tocsr()


@lru_cache(maxsize=1)
def network() -> torch.nn.Module:
    file = os.environ.get("GRADMATCH_DCDM_NET")
    return (DirectionTraining.load(file) if file else train_direction_net(poisson(32), (32, 32))).net


def learned(solver: DirectionSolver, b: np.ndarray) -> Answer:
    x, info = solver.solve(b)
    return x, int(info.iterations) + int(info.fallbacks)


def own_cg(A: Any, b: np.ndarray, **options: Any) -> Answer:
    found = cg(A, b, tol=TOL, **options)
    return found.x.numpy(), int(found.iterations)


def scipys(A: sp.csr_matrix, b: np.ndarray) -> Answer:
    count = [0]

    def counted(_: np.ndarray) -> None:
        count[0] += 1

    return scipy_cg(A, b, rtol=TOL, callback=counted)[0], count[0]


def multigrid(hierarchy: Any, b: np.ndarray) -> Answer:
    residuals: list[float] = []
    x = hierarchy.solve(b, tol=TOL, accel="cg", residuals=residuals)
    return x, len(residuals) - 1


def official(A: sp.csr_matrix) -> Callable[[np.ndarray], Answer] | None:
    folder = os.environ.get("GRADMATCH_PEER_DCDM")
    if folder is None or not (Path(folder) / "lib/conjugate_gradient.py").is_file():
        return None
    sys.modules.setdefault("tensorflow", types.ModuleType("tensorflow"))
    sys.path.insert(0, str(Path(folder) / "lib"))
    code = importlib.import_module("conjugate_gradient").ConjugateGradientSparse(A)
    n, net = int(A.shape[0] ** 0.5), network()

    @torch.no_grad()
    def predict(r: np.ndarray) -> np.ndarray:
        return net(torch.from_numpy(r.astype(np.float32)).reshape(1, 1, n, n)).numpy().ravel()

    def solve(b: np.ndarray) -> Answer:
        with contextlib.redirect_stdout(io.StringIO()):
            x, residuals = code.dcdm(b, np.zeros(len(b)), predict, 100, TOL, False, False)
        return x, len(residuals) - 1

    return solve


def solved(A: sp.csr_matrix, b: np.ndarray, alike: bool) -> Callable[[Answer, Answer], None]:
    def check(mine: Answer, theirs: Answer) -> None:
        n = int(len(b) ** 0.5)
        figure(f"{n} x {n}, iterations", ours=mine[1], theirs=theirs[1])
        for x, _ in (mine, theirs):
            assert np.linalg.norm(b - A @ x) <= 1.1 * TOL * np.linalg.norm(b)
        assert not alike or abs(mine[1] - theirs[1]) <= 1, "the same method took another number of iterations"

    return check


def run() -> None:
    keep_freed_memory()  # for all of them, as the gradmatch program does
    for n in SIZES:
        A, b = poisson(n), np.random.default_rng(n).standard_normal(n * n)
        solver = DirectionSolver(A, network(), grid_shape=(n, n), tol=TOL)
        operator, inverse = solver.operator, incomplete_cholesky(A)
        peers: list[tuple[str, Callable[[], Answer]]] = [
            ("scipy cg", lambda A=A, b=b: scipys(A, b)),
            ("our cg", lambda A=operator, b=b: own_cg(A, b)),
            ("IC(0)-cg", lambda A=operator, b=b, inverse=inverse: own_cg(A, b, precondition=inverse)),
        ]
        try:
            import pyamg
        except ImportError as error:
            missing("pyamg", str(error))
        else:
            hierarchy = pyamg.smoothed_aggregation_solver(A)
            peers.append(("pyamg, cg accelerated", lambda h=hierarchy, b=b: multigrid(h, b)))
        theirs = official(A)
        if theirs is None:
            missing("official DCDM", "GRADMATCH_PEER_DCDM names no checkout of it")
        else:
            peers.append(("official loop, same network", lambda solve=theirs, b=b: solve(b)))
        for peer, work in peers:
            race(
                f"{n} x {n} to {TOL:g}",
                lambda solver=solver, b=b: learned(solver, b),
                work,
                peer=peer,
                check=solved(A, b, peer.startswith("official")),
            )


if __name__ == "__main__":
    main(run)
