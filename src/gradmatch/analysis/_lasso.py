"""The lasso on a Gram matrix, for many targets at once: min_w w'Gw - 2 c'w + lambda |w|_1.

Steps of the alternating direction method of multipliers find the supports: G + rho I is inverted once for all targets,
so that a step is one product, and the ill-conditioned Gram matrices of activations, on which gradient steps creep, do
not slow it down. In single precision they are good enough to tell which weights are 0; the solution on a support and
its signs is then a linear system, solved in double precision and checked against the optimality conditions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from gradmatch.core import checks

STEPS, NEWTON, ROUNDS = 30, 2, 11
"""Steps before the first attempt (doubled for each later one), linear systems of an attempt, and attempts."""
RELAX = 1.6
"""Over-relaxation, as is usual."""
AT_ONCE = 2**20
"""Numbers of the systems solved side by side."""


def lasso_path(
    gram: Float[Tensor, "d d"], targets: Float[Tensor, "d t"], lambdas: Sequence[float], tol: float = 1e-7
) -> Float[Tensor, "l d t"]:
    """Weights for each lambda, solved from the largest down, each from the one before.

    Args:
        gram: G, positive semi-definite with a positive diagonal, float64.
        targets: c for each target.
        lambdas: penalties; 0 is least squares (of least norm where G is singular).
        tol: largest violation of the optimality conditions.

    Raises:
        InputError: negative penalties, or a path that does not reach ``tol``.
    """
    for value in lambdas:
        checks.nonnegative("lambdas", value)
    weights = torch.zeros_like(targets)
    found = {}
    for value in sorted(set(lambdas), reverse=True):
        if value == 0:
            found[value] = torch.linalg.pinv(gram, hermitian=True, rtol=1e-10) @ targets
            continue
        weights = _solve(gram, targets, value / 2, weights, tol)
        found[value] = weights
    return torch.stack([found[v] for v in lambdas]) if lambdas else torch.empty(0, *targets.shape)


def violation(gram: Tensor, targets: Tensor, weights: Tensor, half: float) -> Float[Tensor, " t"]:
    """How far each target's weights are from optimal: of |r| <= half, and r = half sign(w) where w is not 0."""
    residual = targets - gram @ weights
    idle = (residual.abs() - half).clamp_min(0)
    return torch.where(weights == 0, idle, (residual - half * weights.sign()).abs()).amax(0)


def _solve(gram: Tensor, targets: Tensor, half: float, start: Tensor, tol: float) -> Tensor:
    weights, todo = start.clone(), torch.arange(targets.shape[1])
    for attempt in range(ROUNDS):
        dtype = torch.float64 if attempt else torch.float32
        own = _split(gram, targets[:, todo], half, weights[:, todo], STEPS * 2**attempt, dtype)
        exact = _newton(gram, targets[:, todo], half, own, tol)
        before, after = (violation(gram, targets[:, todo], w, half) for w in (own, exact))
        weights[:, todo] = torch.where(after < before, exact, own)
        todo = todo[torch.minimum(before, after) > tol]
        if not len(todo):
            return weights
    checks.refuse(
        f"the lasso with lambda {2 * half:g} did not settle for {len(todo)} of {targets.shape[1]} units; "
        "take a larger one."
    )


def _split(
    gram: Tensor, targets: Tensor, half: float, start: Tensor, steps: int, dtype: torch.dtype
) -> Tensor:
    """Alternating steps: x = argmin of the quadratic near z - u, z = x + u shrunk, u the rest of it.

    rho grows with the root of the penalty: what a smaller one lets in is spread over weaker directions of G.
    """
    rho = 3 * (2 * half) ** 0.5
    inverse = torch.linalg.inv(gram + rho * torch.eye(len(gram), dtype=gram.dtype))
    fixed, pull = (RELAX * (inverse @ targets)).to(dtype), inverse.to(dtype)
    z, u = start.to(dtype), ((targets - gram @ start) / rho).to(dtype)
    for _ in range(steps):
        both = torch.addmm(fixed, pull, z - u, alpha=RELAX * rho).add_(z, alpha=1 - RELAX).add_(u)
        u = both.clamp(-half / rho, half / rho)
        z = both - u
    return z.to(gram.dtype)


def _newton(gram: Tensor, targets: Tensor, half: float, weights: Tensor, tol: float) -> Tensor:
    """The solution on the support of ``weights``, then on those that the optimality conditions point to."""
    weights, todo = weights.clone(), torch.arange(targets.shape[1])
    signs = weights.sign()
    for _ in range(NEWTON):
        c = targets[:, todo]
        new = _on_supports(gram, c - half * signs, signs != 0)
        weights[:, todo] = new
        bad = violation(gram, c, new, half) > tol
        todo = todo[bad]
        if not len(todo):
            break
        pull = new[:, bad] + c[:, bad] - gram @ new[:, bad]
        signs = torch.where(pull.abs() > half, pull.sign(), 0)
    return weights


def _on_supports(gram: Tensor, right: Tensor, on: Tensor) -> Tensor:
    """Solutions (d, t) of G_SS w_S = right_S for each target's support S; supports of like size go together."""
    found, sizes = torch.zeros_like(right), on.sum(0)
    order = sizes.argsort()
    per = max(1, AT_ONCE // max(int(sizes.max()), 1) ** 2)
    for at in torch.split(order, per):
        width = max(int(sizes[at[-1]]), 1)
        # the support first, then places that are filled in
        places = on[:, at].T.to(torch.uint8).topk(width, dim=1).indices
        real = on[:, at].T.gather(1, places)
        system = gram[places[:, :, None], places[:, None, :]]
        system = system.where(real[:, :, None] & real[:, None, :], torch.diag_embed((~real).to(gram.dtype)))
        sides = right[:, at].T.gather(1, places).where(real, 0)
        factor = torch.linalg.cholesky_ex(system)[0]
        solved = torch.cholesky_solve(sides[:, :, None], factor)[:, :, 0].nan_to_num()
        found[:, at] = torch.zeros_like(right[:, at]).T.scatter(1, places, solved).T
    return found
