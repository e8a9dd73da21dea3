"""Directions learned on a 32 x 32 box, on boxes up to 256 x 256 with and without a disc, next to five other solvers.

For each seed a network is trained on the empty 32 x 32 box and then solves, with nothing trained again, two systems of
every kind to a residual of 1e-4: white noise and constant patches on the right-hand side, a disc held at zero and a
solid disc in the way (white noise). Iterations are means over the two; seconds are those of one system, best of two, on
one thread, without what a method prepares once for a matrix (which its row names).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from gradmatch.core.krylov import Deflation, cg, incomplete_cholesky, jacobi, lanczos
from gradmatch.evidence._common import Result, Row, Settings, kept, parallel, verdict_of
from gradmatch.evidence.solve._dcdm_picture import picture
from gradmatch.evidence.solve._poisson import OBSTACLES, disc, poisson, right_hand_sides
from gradmatch.solve import DirectionSolver, DirectionTraining, train_direction_net

SLUG = "dcdm"
TITLE = "DCDM: a deep conjugate direction method for linear systems"
CLAIM = (
    "Directions proposed by a network trained on one small box, made conjugate, solve Poisson systems in a fraction of "
    "the iterations of conjugate gradients, on larger grids and around obstacles it never saw, nearly independent of "
    "the size of the grid, and in less time where the grid is large."
)
RULE = (
    "All figures are means over the seeds of iterations to a residual of 1e-4, keeping two directions as published; "
    "trained on 32 x 32. (1) With white noise and with constant patches on the right-hand side: at most a quarter of "
    "conjugate gradients' iterations at 32 x 32 and at 64 x 64, and (2) at most a sixth at 128 x 128. (3) With a disc "
    "held at zero and with a solid disc: at most half at 32, 64 and 128. (4) Size independence: white noise at 256 x "
    "256 takes at most twice the iterations of 32 x 32. (5) Seconds: less than conjugate gradients on one thread at "
    "128 x 128 and at 256 x 256. 'holds' if all five are met, 'holds in part' if some are, 'does not hold' if none is. "
    "Keeping six directions, the preconditioned methods and algebraic multigrid are shown and not judged."
)

TRAINED, SYSTEMS, TOL, MAX_ITER = 32, 2, 1e-4, 1000
TRAINING: dict[str, Any] = {}
SIZES, SHOWN = (32, 64, 128, 256), 64
CASES = [
    *((kind, n) for kind in ("random", "blocks") for n in SIZES),
    *((kind, n) for kind in OBSTACLES for n in SIZES[:3]),
]
MINE = ("DCDM, 2 kept", "DCDM, 6 kept")
METHODS = ("CG", "Jacobi-PCG", "IC(0)-PCG", "deflated PCG, 16", "AMG-CG", *MINE)
LABELS = {"random": "white noise", "blocks": "patches", "held disc": "held disc", "solid disc": "solid disc"}


def _net(settings: Settings, seed: int) -> DirectionTraining:
    """The network of a seed, trained or read from where it was kept."""
    folder = settings.runs / SLUG / f"net-{seed}"
    if not (folder / "net.safetensors").exists():
        train_direction_net(
            poisson(TRAINED), (TRAINED, TRAINED), seed=seed, out=folder, resume=folder.exists(), **TRAINING
        )
    return DirectionTraining.load(folder / "net.safetensors")


Solve = Callable[[np.ndarray], np.ndarray]
"""Right-hand sides [n, b] -> iterations [b]."""


def _solvers(A: sp.csr_matrix, n: int, net: torch.nn.Module, seed: int) -> dict[str, Callable[[], Solve]]:
    """Every method as a function that prepares it for A and gives a solver."""

    def krylov(**options: Any) -> Solve:
        return lambda b: cg(A, b, tol=TOL, **options).iterations.numpy()

    def deflated() -> Solve:
        # the smallest Ritz values of a hundred Lanczos steps
        start = torch.randn(A.shape[0], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        values, vectors, _ = lanczos(A, torch.from_numpy(A @ start.numpy()), 100).ritz()
        lowest = vectors[:, values > 1e-8][:, :16]
        return krylov(deflation=Deflation(A, lowest), precondition=_jacobi(A))

    def directions(keep: int) -> Solve:
        solver = DirectionSolver(A, net, grid_shape=(n, n), keep=keep, tol=TOL, max_iter=MAX_ITER)
        return lambda b: _counted(solver, b)

    found: dict[str, Callable[[], Solve]] = {
        "CG": krylov,
        "Jacobi-PCG": lambda: krylov(precondition=_jacobi(A)),
        "IC(0)-PCG": lambda: krylov(precondition=incomplete_cholesky(A)),
        "deflated PCG, 16": deflated,
        "DCDM, 2 kept": lambda: directions(2),
        "DCDM, 6 kept": lambda: directions(6),
    }
    try:
        import pyamg
    except ImportError:
        return found
    return found | {"AMG-CG": lambda: _multigrid(pyamg.smoothed_aggregation_solver(A))}


def _jacobi(A: sp.csr_matrix) -> Callable[[torch.Tensor], torch.Tensor]:
    diagonal = torch.from_numpy(A.diagonal())
    return jacobi(torch.where(diagonal > 0, diagonal, 1.0))  # cells without an equation stay at 0


def _counted(solver: DirectionSolver, b: np.ndarray) -> np.ndarray:
    _, info = solver.solve(b)
    spent: np.ndarray = (info.iterations + info.fallbacks).numpy()
    return spent


def _multigrid(hierarchy: Any) -> Solve:
    def solve(b: np.ndarray) -> np.ndarray:
        counts = []
        for column in b.T:
            residuals: list[float] = []
            hierarchy.solve(column, tol=TOL, accel="cg", residuals=residuals)
            counts.append(len(residuals) - 1)
        return np.array(counts)

    return solve


def system(kind: str, n: int, seed: int) -> tuple[sp.csr_matrix, np.ndarray]:
    """The matrix and the right-hand sides of a case."""
    rng = np.random.default_rng([seed, n])
    if kind not in OBSTACLES:
        return poisson(n), right_hand_sides(kind, n, SYSTEMS, rng)
    b = right_hand_sides("random", n, SYSTEMS, rng) * ~disc(n).ravel()[:, None]
    return poisson(n, kind), b


def _measured(settings: Settings, seed: int) -> dict[str, dict[str, float]]:
    """Iterations, seconds and seconds of preparation, by case and method."""

    def make() -> dict[str, dict[str, float]]:
        net, found = _net(settings, seed).net, {}
        for kind, n in CASES:
            A, b = system(kind, n, seed)
            for name, prepare in _solvers(A, n, net, seed).items():
                began = time.perf_counter()
                solve = prepare()
                prepared = time.perf_counter() - began
                count = float(np.mean(solve(b)))
                seconds = []
                for _ in range(2):
                    began = time.perf_counter()
                    solve(b[:, :1])
                    seconds.append(time.perf_counter() - began)
                found[f"{kind} {n} {name}"] = {
                    "iterations": count,
                    "seconds": min(seconds),
                    "prepared": prepared,
                }
        return found

    config = {"cases": CASES, "training": TRAINING, "systems": SYSTEMS, "version": 1}
    return dict(kept(settings, SLUG, f"measured-{seed}", _plain(config), make))


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {k: [list(c) for c in v] if k == "cases" else v for k, v in config.items()}


def run(settings: Settings) -> Result:
    """Train and measure each seed in a process of its own; judge by ``RULE``."""
    seeds = settings.seed_list(5)
    found = parallel(_measured, [(settings, s) for s in seeds], settings, label="training and solving")
    rows = []
    for kind, n in CASES:
        for name in METHODS:
            cells = [f[f"{kind} {n} {name}"] for f in found if f"{kind} {n} {name}" in f]
            if cells:
                prepared = float(np.mean([c["prepared"] for c in cells]))
                cost = (
                    f"{np.mean([c['seconds'] for c in cells]):.4f} s a system; prepared in {prepared:.3f} s"
                )
                rows.append(Row(_name(kind, n, name), tuple(c["iterations"] for c in cells), cost))
    for n in SIZES:
        for name in METHODS:
            cells = [f[f"random {n} {name}"] for f in found if f"random {n} {name}" in f]
            if cells:
                rows.append(Row(_name("random", n, name, "seconds"), tuple(c["seconds"] for c in cells)))
    return judged(rows, picture(rows, SIZES, _fields(settings)))


def _name(kind: str, n: int, method: str, what: str = "iterations") -> str:
    return f"{what}, {LABELS[kind]}, {n} x {n}, {method}"


def _fields(settings: Settings, steps: int = 6) -> dict[str, Any]:
    """Around a solid disc: right-hand side, solution, both methods after a few iterations, and their residuals."""
    net, n = _net(settings, 0).net, SHOWN
    A, cells = poisson(n, "solid disc"), disc(n).ravel()
    b = right_hand_sides("blocks", n, 1, np.random.default_rng(3))[:, 0] * ~cells

    def after(propose: Any, count: int) -> tuple[np.ndarray, list[float]]:
        solver = DirectionSolver(A, propose, grid_shape=(n, n), max_iter=count, tol=1e-9, fallback=None)
        x, info = solver.solve(b)
        return np.where(cells, np.nan, x).reshape(n, n), info.residuals[:, 0].tolist()

    exact = DirectionSolver(A, incomplete_cholesky(A), tol=1e-10, max_iter=500).solve(b)[0]
    return {
        "b": np.where(cells, np.nan, b).reshape(n, n),
        "exact": np.where(cells, np.nan, exact).reshape(n, n),
        "CG": after("residual", steps)[0],
        "DCDM": after(net, steps)[0],
        "steps": steps,
        "curves": {"CG": after("residual", 120)[1], "DCDM": after(net, 40)[1]},
    }


def judged(rows: Sequence[Row], png: bytes | None = None) -> Result:
    """The verdict by ``RULE``."""
    found = {r.method: r.mean for r in rows}

    def share(kind: str, n: int, what: str = "iterations") -> float:
        return found[_name(kind, n, MINE[0], what)] / found[_name(kind, n, "CG", what)]

    small = max(share(kind, n) for kind in ("random", "blocks") for n in (32, 64))
    large = max(share(kind, 128) for kind in ("random", "blocks"))
    around = max(share(kind, n) for kind in OBSTACLES for n in (32, 64, 128))
    counts = [found[_name("random", n, MINE[0])] for n in SIZES]
    slower = max(share("random", n, "seconds") for n in (128, 256))
    met = [small <= 1 / 4, large <= 1 / 6, around <= 1 / 2, counts[-1] <= 2 * counts[0], slower < 1]
    plain = [found[_name("random", n, "CG")] for n in SIZES]
    reason = (
        f"{sum(met)} of 5 conditions met. White noise: {_listed(counts)} iterations at 32, 64, 128, 256 against "
        f"{_listed(plain)} of conjugate gradients. (1) at most {small:.2f} of them at 32 and 64, (2) {large:.2f} at "
        f"128, (3) {around:.2f} around a disc; (4) 256 takes {counts[-1] / counts[0]:.1f} times the iterations of 32; "
        f"(5) at 128 and 256 up to {slower:.1f} times the seconds of conjugate gradients."
    )
    links = {"paper": "https://arxiv.org/abs/2205.10763", "code": "https://github.com/ayano721/2023_DCDM"}
    return Result(
        SLUG,
        TITLE,
        CLAIM,
        RULE,
        verdict_of(met),
        reason,
        "iterations to a residual of 1e-4 (and seconds, where named)",
        tuple(rows),
        higher_is_better=False,
        pictures=() if png is None else ((f"{SLUG}.png", png),),
        links=links,
    )


def _listed(counts: Sequence[float]) -> str:
    return ", ".join(f"{c:.0f}" for c in counts)
