"""GNS: iterations that exact and approximate Hessians need, on the paper's functions and on real data.

1. LogSumExp (200 x 100, minimum at 0) at two temperatures, with exact and weighted Gauss-Newton Hessians in the metric
   A^T A, against the same rule without curvature, gradient descent, super-universal and cubic Newton: f - f* < 1e-8.
2. Logistic regression on breast cancer at three weights of L2, softmax regression on digits: gradient norm < 1e-6.
3. |u(x)|^p / p for Rosenbrock's, a linear and Chebyshev's map: f < 1e-12; a small MLP on digits: gradient norm < 1e-2.

Seeds draw the functions, the starts, and 80 % of the real rows. A run that does not get there counts its limit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradmatch.evidence._common import Result, Row, Settings, gain, parallel, verdict_of
from gradmatch.evidence.optim import _gns_problems as problems
from gradmatch.optim._newton_rules import CubicNewton, GradientDescent, SuperUniversal
from gradmatch.optim._regularised import minimize
from gradmatch.optim._vector import Vector
from gradmatch.optim.gns import GradNormSmooth, minimize_gns

SLUG = "gns"
TITLE = "GNS: regularised Newton with one self-tuned radius"
CLAIM = (
    "One adaptive rule gives fast convergence with exact Hessians and, at a few times the iterations, with "
    "approximate ones (Gauss-Newton, Fisher), where gradient methods are far slower or stall."
)
RULE = (
    "Iterations to the tolerance, the limit where it is not reached; 'fewer' means by two standard errors of the log "
    "ratio over seeds, 'at most k times' that it is not above by as much. LogSumExp, at each temperature: the exact "
    "and the weighted Gauss-Newton Hessian need fewer than each of the same rule without curvature and gradient "
    "descent in either metric (2 conditions), Gauss-Newton at most 5 times exact (1), exact at most 1.25 times "
    "super-universal Newton (1). Real data (breast cancer at L2 0, 1e-4, 1e-2; digits at 1e-3), on each: exact fewer "
    "than L-BFGS, empirical Fisher fewer than L-BFGS, diagonal fewer than no curvature (3). Powers of norms "
    "(Rosenbrock p 2 and 5, linear p 4, Chebyshev p 4), on each: full Gauss-Newton at most 1.25 times exact, and fewer "
    "than each of L-BFGS, gradient descent and no curvature (2); for p > 2 the Fisher term alone fewer than no "
    "curvature (1). MLP: Gauss-Newton fewer than L-BFGS (1). 'holds' if all are met, 'holds in part' if some are."
)
LINKS = {"paper": "https://arxiv.org/abs/2506.13710", "code": "https://github.com/epfml/grad-norm-smooth"}
METRIC = "iterations to the tolerance"

LSE = {f"LogSumExp mu {mu:g}": mu for mu in (1.0, 0.1)}
CANCER = {f"breast cancer l2 {l2:g}": l2 for l2 in (0.0, 1e-4, 1e-2)}
DIGITS = "digits l2 0.001"
NORMS = ("Rosenbrock p 2", "Rosenbrock p 5", "linear p 4", "Chebyshev p 4")
MLP = "MLP on digits"
NONE, DESCENT, EUCLID, LBFGS = (
    "no curvature",
    "gradient descent",
    "gradient descent, identity metric",
    "L-BFGS",
)
WEIGHTED, FULL, GN, FISHER = "weighted Gauss-Newton", "full Gauss-Newton", "Gauss-Newton term", "Fisher term"
REAL = ("exact", "empirical Fisher", "diagonal", NONE, DESCENT, LBFGS)


class Budget(NamedTuple):
    """Sizes of the experiment."""

    seeds: int
    rows: int
    columns: int
    chebyshev: int
    limit: int
    heavy_limit: int
    mlp_rows: int
    mlp_limit: int


SMALL = Budget(3, 200, 100, 100, 2000, 150, 300, 100)
PAPER = Budget(5, 1000, 1000, 1000, 10000, 2000, 1500, 1000)


def arms() -> list[tuple[str, str]]:
    """All pairs of a problem and a method."""
    found = [
        (p, m)
        for p in LSE
        for m in ("exact", WEIGHTED, NONE, DESCENT, EUCLID, "super-universal Newton", "cubic Newton")
    ]
    found += [(p, m) for p in (*CANCER, DIGITS) for m in REAL]
    for p in NORMS:
        fisher = (FISHER,) if p[-1] != "2" else ()
        found += [(p, m) for m in ("exact", FULL, GN, *fisher, NONE, DESCENT, LBFGS)]
    return found + [(MLP, m) for m in ("Gauss-Newton", LBFGS)]


# --- problems ----------------------------------------------------------------------------------------------


def real(name: str, seed: int) -> tuple[Tensor, Tensor]:
    """80 % of the rows: features (n, d) float64, standardised for breast cancer and / 16 for digits; labels."""
    from sklearn.datasets import load_breast_cancer, load_digits

    bunch = load_digits() if "digits" in name else load_breast_cancer()
    x = torch.tensor(bunch.data, dtype=torch.float64)
    x = x / 16 if "digits" in name else (x - x.mean(0)) / x.std(0)
    own = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: 4 * len(x) // 5]
    return x[own], torch.tensor(bunch.target)[own]


def problem(name: str, seed: int, budget: Budget) -> problems.Smooth:
    """The problem of that name."""
    g = torch.Generator().manual_seed(seed)
    if name in LSE:
        return problems.log_sum_exp(LSE[name], g, budget.rows, budget.columns)
    if name in CANCER:
        return problems.softmax_regression(*real(name, seed), 2, CANCER[name])
    if name == DIGITS:
        return problems.softmax_regression(*real(name, seed), 10, 1e-3)
    if name.startswith("Rosenbrock"):
        near = 0.1 * torch.randn(2, generator=g, dtype=torch.float64)
        return problems.power_of_norm(
            problems.rosenbrock(), float(name[-1]), torch.tensor([-2.0, 2.0]).double() + near
        )
    if name.startswith("linear"):
        a, b = problems.uniform(g, 100, 200), problems.uniform(g, 100)
        metric = a.T @ a + 1e-8 * torch.eye(200, dtype=torch.float64)
        return problems.power_of_norm(
            problems.linear(a, b), 4.0, torch.ones(200, dtype=torch.float64), metric
        )
    near = 0.45 + 0.1 * torch.rand(budget.chebyshev, generator=g, dtype=torch.float64)
    return problems.power_of_norm(problems.chebyshev(budget.chebyshev), 4.0, near)


# --- one run -----------------------------------------------------------------------------------------------

Run = dict[str, Any]
"""iterations, trials (systems solved, or calls of f and gradient), seconds, curve (gradient norms or f - f*)."""


def one(name: str, method: str, seed: int, budget: Budget) -> Run:
    """One method on one problem."""
    if name == MLP:
        return network(method, seed, budget)
    own = problem(name, seed, budget)
    heavy = name == DIGITS and method in ("empirical Fisher", "diagonal")
    limit = budget.heavy_limit if heavy else budget.limit
    goal: dict[str, float] = {"tol_grad": 1e-6}
    if name in LSE:
        goal = {"f_star": float(own.value(torch.zeros_like(own.start))[0]), "tol": 1e-8}
    elif name in NORMS:
        goal = {"f_star": 0.0, "tol": 1e-12}
    if method == LBFGS:
        return lbfgs(own.value, own.start, goal, limit)
    metric = None if method == EUCLID else own.metric
    common: dict[str, Any] = {"metric": metric, "max_iter": limit, **goal}
    others: dict[str, tuple[Any, Any]] = {
        DESCENT: (GradientDescent(), None),
        EUCLID: (GradientDescent(), None),
        "super-universal Newton": (SuperUniversal(), own.matrices.get("exact")),
        "cubic Newton": (CubicNewton(), own.matrices.get("exact")),
    }
    began = time.perf_counter()
    if method in others:
        rule, hess = others[method]
        solver: Any = "eigen" if method == "cubic Newton" else "auto"  # some sixty shifts a trial
        found = minimize(own.value, own.start, rule, 1.0, hess=hess, solver=solver, **common)
    else:
        found = minimize_gns(own.value, own.start, hess=own.matrices.get(method), **common)
    curve = found.grad_norms if "tol_grad" in goal else found.values - goal["f_star"]
    done = found.status == "converged"
    return _run(curve.tolist(), found.trials, time.perf_counter() - began, done, limit)


def _run(curve: list[float], trials: int, seconds: float, done: bool, limit: int) -> Run:
    count = len(curve) - 1 if done else limit
    return {"iterations": max(1, count), "trials": trials, "seconds": seconds, "done": done, "curve": curve}


class _Reached(Exception):
    """A tolerance was met inside scipy's loop."""


def lbfgs(
    value: Callable[[Tensor], tuple[Tensor, Tensor]], start: Tensor, goal: dict[str, float], limit: int
) -> Run:
    """scipy's L-BFGS with ten pairs."""
    from scipy.optimize import minimize as scipy_minimize

    calls, curve = 0, []

    def figure(x: np.ndarray) -> float:
        f, g = value(torch.from_numpy(x.copy()))
        return float(g.norm()) if "tol_grad" in goal else float(f) - goal["f_star"]

    def call(x: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal calls
        calls += 1
        f, g = value(torch.from_numpy(x.copy()))
        return float(f), g.numpy()

    def watch(x: np.ndarray) -> None:
        curve.append(figure(x))
        if curve[-1] < goal.get("tol_grad", goal.get("tol", 0.0)):
            raise _Reached

    curve.append(figure(start.numpy()))
    began, done = time.perf_counter(), False
    options = {"maxiter": limit, "maxfun": 20 * limit, "ftol": 0.0, "gtol": 0.0, "maxcor": 10}
    try:
        scipy_minimize(call, start.numpy(), jac=True, method="L-BFGS-B", callback=watch, options=options)
    except _Reached:
        done = True
    return _run(curve, calls, time.perf_counter() - began, done, limit)


def network(method: str, seed: int, budget: Budget) -> Run:
    """An MLP 64-8-10 with tanh and L2 1e-3, in float64."""
    x, y = (t[: budget.mlp_rows] for t in real("digits", seed))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Tanh(), torch.nn.Linear(8, 10)).double()
    goal, decay, limit = {"tol_grad": 1e-2}, 1e-3, budget.mlp_limit

    def losses(z: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(z, y, reduction="none")

    if method == LBFGS:
        vector = Vector(list(net.parameters()))

        def value(w: Tensor) -> tuple[Tensor, Tensor]:
            vector.write(w)
            loss: Tensor = losses(net(x)).mean()
            return loss.detach() + decay / 2 * w @ w, vector.gradient(loss) + decay * w

        return lbfgs(value, vector.read(), goal, limit)
    optimizer = GradNormSmooth(
        net.parameters(), curvature="ggn", weight_decay=decay, tol_grad=goal["tol_grad"]
    )
    curve, trials, began = [], 0, time.perf_counter()
    for _ in range(limit + 1):
        optimizer.step(lambda: (net(x), losses))
        assert optimizer.info is not None
        curve.append(optimizer.info.grad_norm)
        trials += optimizer.info.trials
        if optimizer.info.status != "stepped":
            break
    return _run(curve, trials, time.perf_counter() - began, curve[-1] <= goal["tol_grad"], limit)


# --- the whole ---------------------------------------------------------------------------------------------


def run(settings: Settings) -> Result:
    """Run all arms; the verdict follows from the rows by ``RULE``."""
    return experiment(settings, PAPER if settings.full else SMALL)


def experiment(settings: Settings, budget: Budget) -> Result:
    """The same at any budget."""
    from gradmatch.evidence.optim._gns_picture import picture

    seeds = settings.seed_list(budget.seeds)
    tasks = [(p, m, s, budget) for p, m in arms() for s in seeds]
    found = parallel(one, tasks, settings, label="gns")
    by = {arm: found[k * len(seeds) : (k + 1) * len(seeds)] for k, arm in enumerate(arms())}
    rows = [row(p, m, runs) for (p, m), runs in by.items()]
    verdict, reason = judge(rows)
    return Result(
        SLUG, TITLE, CLAIM, RULE, verdict, reason, METRIC, tuple(rows), higher_is_better=False, links=LINKS,
        pictures=((f"{SLUG}.png", picture(by, budget)),),
    )  # fmt: skip


def row(name: str, method: str, runs: list[Run]) -> Row:
    """Iterations of every seed; systems and seconds as cost."""
    what = "calls of f and gradient" if method == LBFGS else "systems"
    systems = sum(r["trials"] for r in runs) / len(runs)
    cost = f"{systems:.0f} {what}, {sum(r['seconds'] for r in runs) / len(runs):.2g} s"
    missed = sum(not r["done"] for r in runs)
    cost += f", {missed} of {len(runs)} not there" if missed else ""
    return Row(f"{name}: {method}", tuple(float(r["iterations"]) for r in runs), cost)


def judge(rows: list[Row]) -> tuple[str, str]:
    """The verdict of ``RULE``, and what led to it."""
    by = {r.method: r for r in rows}

    def logs(name: str, method: str, factor: float = 1.0) -> list[float]:
        return [math.log(factor * v) for v in by[f"{name}: {method}"].values]

    def fewer(name: str, ours: str, *others: str) -> bool:
        return all(gain(logs(name, ours), logs(name, other)).below() for other in others)

    def at_most(name: str, ours: str, other: str, factor: float) -> bool:
        return not gain(logs(name, ours), logs(name, other, factor)).above()

    gradients = (NONE, DESCENT, EUCLID)
    groups = {
        "LogSumExp, fewer than gradient methods": [
            fewer(p, m, *gradients) for p in LSE for m in ("exact", WEIGHTED)
        ],
        "LogSumExp, approximate at most 5 times exact": [at_most(p, WEIGHTED, "exact", 5) for p in LSE],
        "LogSumExp, at most 1.25 times super-universal": [
            at_most(p, "exact", "super-universal Newton", 1.25) for p in LSE
        ],
        "real data, exact under L-BFGS": [fewer(p, "exact", LBFGS) for p in (*CANCER, DIGITS)],
        "real data, empirical Fisher under L-BFGS": [
            fewer(p, "empirical Fisher", LBFGS) for p in (*CANCER, DIGITS)
        ],
        "real data, diagonal under no curvature": [fewer(p, "diagonal", NONE) for p in (*CANCER, DIGITS)],
        "powers of norms, approximate at most 1.25 times exact": [
            at_most(p, FULL, "exact", 1.25) for p in NORMS
        ],
        "powers of norms, fewer than gradient methods": [fewer(p, FULL, LBFGS, DESCENT, NONE) for p in NORMS],
        "Fisher term under no curvature": [fewer(p, FISHER, NONE) for p in NORMS if p[-1] != "2"],
        "MLP under L-BFGS": [fewer(MLP, "Gauss-Newton", LBFGS)],
    }
    met = [c for group in groups.values() for c in group]
    reason = f"{sum(met)} of {len(met)} conditions met: "
    reason += "; ".join(f"{name} {sum(group)} of {len(group)}" for name, group in groups.items())
    shown = [
        (p, m) for p, m in arms() if m in ("exact", WEIGHTED, "empirical Fisher", FULL, "Gauss-Newton", LBFGS)
    ]
    reason += ". Mean iterations: " + ", ".join(f"{p} {m} {by[f'{p}: {m}'].mean:.0f}" for p, m in shown)
    return verdict_of(met), reason + "."
