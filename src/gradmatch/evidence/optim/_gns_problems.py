"""Smooth problems with closed-form derivatives, exact and approximate: what GNS is measured on.

Each has ``value`` (x -> (f, gradient)), ``matrices`` (name -> x -> H), a ``metric`` B or None, and where to start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmatch.core.shifted import LowRank, Matrix

Oracle = Callable[[Tensor], Matrix]


@dataclass(frozen=True)
class Smooth:
    """A problem; ``f_star`` where the minimum is known."""

    value: Callable[[Tensor], tuple[Tensor, Tensor]]
    matrices: dict[str, Oracle]
    start: Tensor
    metric: Tensor | None = None
    f_star: float | None = None


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """Numbers in [-1, 1], float64."""
    return 2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1


def log_sum_exp(mu: float, generator: torch.Generator, n: int = 200, d: int = 100) -> Smooth:
    """f = mu log sum exp((A x - b) / mu) with its minimum at 0, in the metric A^T A."""
    a, b = uniform(generator, n, d), uniform(generator, n)
    a = a - torch.softmax(-b / mu, 0) @ a

    def weights(x: Tensor) -> Tensor:
        return torch.softmax((a @ x - b) / mu, 0)

    def value(x: Tensor) -> tuple[Tensor, Tensor]:
        z = (a @ x - b) / mu
        return mu * torch.logsumexp(z, 0), a.T @ torch.softmax(z, 0)

    def gauss_newton(x: Tensor) -> Tensor:
        rows = (a * (weights(x) / mu).sqrt()[:, None]).numpy()
        return torch.from_numpy(rows.T @ rows)  # numpy sees that the factors are one, at half the cost

    def exact(x: Tensor) -> Tensor:
        q = a.T @ weights(x)
        return gauss_newton(x).addr_(q, q, alpha=-1 / mu)

    return Smooth(
        value,
        {"exact": exact, "weighted Gauss-Newton": gauss_newton},
        torch.ones(d, dtype=torch.float64),
        a.T @ a,
    )


def softmax_regression(x: Tensor, y: Tensor, classes: int, l2: float) -> Smooth:
    """Mean cross-entropy of a linear model with bias plus l2/2 |w|^2; w is [classes, features + 1], flat.

    For two classes the weights are those of one logit. Fisher = Gauss-Newton = exact here.
    """
    rows = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    heads, d = (1 if classes == 2 else classes), rows.shape[1]
    hot = torch.nn.functional.one_hot(y, classes).to(x.dtype)[:, -heads:]

    def probabilities(w: Tensor) -> tuple[Tensor, Tensor]:
        z = rows @ w.view(heads, d).T
        full = torch.cat([torch.zeros_like(z), z], 1) if heads == 1 else z
        logp = torch.log_softmax(full, 1)
        return -logp.gather(1, y[:, None]).mean(), logp.exp()[:, -heads:]

    def value(w: Tensor) -> tuple[Tensor, Tensor]:
        loss, p = probabilities(w)
        return loss + l2 / 2 * w @ w, ((p - hot).T @ rows / len(rows)).flatten() + l2 * w

    def exact(w: Tensor) -> Tensor:
        p = probabilities(w)[1]
        h = torch.zeros(heads, d, heads, d, dtype=x.dtype)
        for c in range(heads):
            for e in range(c + 1):
                bend = p[:, c] * (float(c == e) - p[:, e])
                h[c, :, e] = (rows.T * bend) @ rows / len(rows)
                h[e, :, c] = h[c, :, e]
        return h.view(heads * d, heads * d) + l2 * torch.eye(heads * d, dtype=x.dtype)

    def fisher(w: Tensor) -> Tensor:
        delta = probabilities(w)[1] - hot
        g = (delta[:, :, None] * rows[:, None]).flatten(1)
        return g.T @ g / len(rows) + l2 * torch.eye(g.shape[1], dtype=x.dtype)

    def diagonal(w: Tensor) -> Tensor:
        p = probabilities(w)[1]
        return ((p * (1 - p)).T @ rows.square() / len(rows)).flatten() + l2

    start = torch.zeros(heads * d, dtype=x.dtype)
    return Smooth(value, {"exact": exact, "empirical Fisher": fisher, "diagonal": diagonal}, start)


@dataclass(frozen=True)
class Map:
    """u: R^d -> R^m with its Jacobian, and the diagonal of sum_i c_i Hess u_i (all else in it is 0 here)."""

    u: Callable[[Tensor], Tensor]
    jacobian: Callable[[Tensor], Tensor]
    bend: Callable[[Tensor], Tensor]


def rosenbrock() -> Map:
    """(1 - x1, 10 (x2 - x1^2))."""

    def jacobian(x: Tensor) -> Tensor:
        return torch.stack([x.new_tensor([-1.0, 0.0]), torch.stack([-20 * x[0], x.new_tensor(10.0)])])

    return Map(
        lambda x: torch.stack([1 - x[0], 10 * (x[1] - x[0] ** 2)]),
        jacobian,
        lambda c: torch.stack([-20 * c[1], torch.zeros_like(c[1])]),
    )


def chebyshev(d: int) -> Map:
    """((1 - x_1) / 2, x_i - (2 x_{i-1}^2 - 1))."""

    def u(x: Tensor) -> Tensor:
        return torch.cat([(1 - x[:1]) / 2, x[1:] - 2 * x[:-1] ** 2 + 1])

    def jacobian(x: Tensor) -> Tensor:
        main = torch.ones(d, dtype=x.dtype)
        main[0] = -0.5
        return torch.diag(main) + torch.diag(-4 * x[:-1], -1)

    return Map(u, jacobian, lambda c: torch.cat([-4 * c[1:], torch.zeros_like(c[:1])]))


def linear(a: Tensor, b: Tensor) -> Map:
    """A x - b."""
    return Map(lambda x: a @ x - b, lambda x: a, lambda c: torch.zeros(a.shape[1], dtype=a.dtype))


def power_of_norm(of: Map, power: float, start: Tensor, metric: Tensor | None = None) -> Smooth:
    """f = |u(x)|^p / p, p >= 2, minimum 0.

    The Fisher term is written (p - 2) g g^T / |u|^p, as |u|^(p-4) is not finite near 0 for p < 4; the exact Hessian's
    last factor is |u|^(p-2), not the p / |u|^2 of one released oracle.
    """

    def value(x: Tensor) -> tuple[Tensor, Tensor]:
        u = of.u(x)
        size = u.norm()
        return size**power / power, size ** (power - 2) * (of.jacobian(x).T @ u)

    def fisher_rows(x: Tensor) -> Tensor:
        size = of.u(x).norm()
        g = value(x)[1]
        root = ((power - 2) / size**power) ** 0.5
        return (g * root if float(size) ** power > 0 else torch.zeros_like(g))[None]

    def gauss_newton(x: Tensor) -> Tensor:
        j = of.jacobian(x)
        size: Tensor = of.u(x).norm()
        return torch.mul(j.T @ j, size ** (power - 2))

    def full(x: Tensor) -> Tensor:
        row = fisher_rows(x)
        return gauss_newton(x) + row.T @ row

    def exact(x: Tensor) -> Tensor:
        u = of.u(x)
        return full(x) + torch.diag(u.norm() ** (power - 2) * of.bend(u))

    matrices: dict[str, Oracle] = {
        "exact": exact,
        "full Gauss-Newton": full,
        "Gauss-Newton term": gauss_newton,
    }
    if power > 2:
        matrices["Fisher term"] = lambda x: LowRank(fisher_rows(x))
    return Smooth(value, matrices, start, metric, 0.0)
