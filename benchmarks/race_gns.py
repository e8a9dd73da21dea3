"""GNS against the authors' code on LogSumExp 1000 x 1000, and against scipy and L-BFGS on softmax regression.

The code is at https://github.com/epfml/grad-norm-smooth; GRADMATCH_GNS names the check-out. Both count iterations to
f - f* < 1e-8 in the metric A^T A from x = 1; theirs divides by gamma + 1e-8, so iterates agree to rounding only.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize as scipy_minimize

from _timer import main, missing, race
from gradmatch.evidence.optim import _gns_problems as problems
from gradmatch.evidence.optim.gns import real
from gradmatch.optim.gns import Result, minimize_gns

SIZE = 1000


def ours(problem: problems.Smooth, kind: str, f_star: float) -> Result:
    return minimize_gns(
        problem.value,
        problem.start,
        hess=problem.matrices[kind],
        metric=problem.metric,
        f_star=f_star,
        tol=1e-8,
    )


def theirs(a: np.ndarray, b: np.ndarray, metric: np.ndarray, kind: str, f_star: float) -> np.ndarray:
    from approximations import approx_hess_fn_logsumexp
    from methods import grad_norm_smooth
    from oracles import create_log_sum_exp_oracle

    oracle = create_log_sum_exp_oracle(a, b, 1.0)
    approximate = {"is_approx": True, "approx_oracle": oracle, "approx_hess_fn": approx_hess_fn_logsumexp}
    x, status, _ = grad_norm_smooth(
        oracle, np.ones(a.shape[1]), B=metric, f_star=f_star, eps=1e-8, trace=False,
        **({} if kind == "exact" else approximate),
    )  # fmt: skip
    assert status.startswith("success"), status
    return x


def log_sum_exp() -> None:
    where = os.environ.get("GRADMATCH_GNS")
    if where is None or not (Path(where) / "src" / "methods.py").exists():
        missing("grad-norm-smooth", "set GRADMATCH_GNS to a check-out of epfml/grad-norm-smooth")
        return
    sys.path.insert(0, str(Path(where) / "src"))
    g = torch.Generator().manual_seed(0)
    a, b = problems.uniform(g, SIZE, SIZE), problems.uniform(g, SIZE)
    a = a - torch.softmax(-b, 0) @ a
    problem = problems.log_sum_exp(1.0, torch.Generator().manual_seed(0), SIZE, SIZE)
    assert torch.equal(problem.metric, a.T @ a)
    f_star = float(problem.value(torch.zeros(SIZE, dtype=torch.float64))[0])

    def close(mine: Result, x: np.ndarray) -> None:
        assert mine.status == "converged"
        value = float(problem.value(torch.from_numpy(x))[0])
        assert abs(mine.value - value) < 1e-7, (mine.value, value)

    for kind in ("exact", "weighted Gauss-Newton"):
        race(
            f"LogSumExp {SIZE} x {SIZE}, {kind}",
            partial(ours, problem, kind, f_star),
            partial(theirs, a.numpy(), b.numpy(), problem.metric.numpy(), kind, f_star),
            peer="grad-norm-smooth", rounds=2, warmup=0, check=close, target=1.0, unit="s",
        )  # fmt: skip


def softmax() -> None:
    problem = problems.softmax_regression(*real("digits", 0), 10, 1e-3)

    def call(x: np.ndarray) -> tuple[float, np.ndarray]:
        f, g = problem.value(torch.from_numpy(x))
        return float(f), g.numpy()

    def trust_exact() -> float:
        def hess(x: np.ndarray) -> np.ndarray:
            return problem.matrices["exact"](torch.from_numpy(x)).numpy()

        found = scipy_minimize(
            call, problem.start.numpy(), jac=True, hess=hess, method="trust-exact", options={"gtol": 1e-6}
        )
        return float(found.fun)

    def lbfgs() -> float:
        w = problem.start.clone()
        optimizer = torch.optim.LBFGS(
            [w],
            max_iter=1000,
            tolerance_grad=1e-7,
            tolerance_change=0.0,
            history_size=10,
            line_search_fn="strong_wolfe",
        )

        def closure() -> torch.Tensor:
            f, w.grad = problem.value(w)
            return f

        with torch.no_grad():
            optimizer.step(closure)
        return float(problem.value(w)[0])

    def close(a: float, b: float) -> None:
        assert abs(a - b) < 1e-8, (a, b)

    def mine() -> float:
        return minimize_gns(problem.value, problem.start, hess=problem.matrices["exact"], tol_grad=1e-6).value

    race(
        "softmax regression on digits",
        mine,
        trust_exact,
        peer="scipy trust-exact",
        rounds=3,
        check=close,
        target=1.0,
    )
    race("softmax regression on digits", mine, lbfgs, peer="torch L-BFGS", rounds=3, check=close)


def run() -> None:
    log_sum_exp()
    softmax()


if __name__ == "__main__":
    main(run)
