"""SSO's inner loop at 8,000 x 112 (the size of mushrooms), ten steps, against plain torch loops of the same work.

The released optimizer (github.com/WilderLavington/Target-Based-Surrogates-For-Stochastic-Optimization) moves everything
to a GPU by itself and has no package: it is reported as missing. Its inner loop, a closure evaluated from a step length
of 10 at every step, is timed here in its plain form on the same surrogate, and torch's L-BFGS for as many iterations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _timer import main, missing, race
from gradmatch.optim import TargetSurrogate

N, D, STEPS, OUTER = 8000, 112, 10, 5


def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = (torch.rand(N, D, generator=g) < 0.2).float()
    return x, (x @ torch.randn(D, generator=g) > 0).float()


X, Y = data()


def losses(z: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z[:, 0], Y, reduction="none")


def model() -> nn.Module:
    net = nn.Linear(D, 1)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    return net


def ours() -> float:
    net = model()
    optimizer = TargetSurrogate(net.parameters(), eta=4.0, inner_steps=STEPS)
    for _ in range(OUTER):
        optimizer.step(lambda: net(X), losses)
    return float(losses(net(X)).mean())


def surrogate(net: nn.Module) -> tuple[Tensor, Tensor]:
    z = net(X).detach().requires_grad_()
    (g,) = torch.autograd.grad(losses(z).sum(), z)
    return z.detach(), g


def reset_to_ten() -> float:
    net = model()
    params = list(net.parameters())
    for _ in range(OUTER):
        z, g = surrogate(net)

        def q(z: Tensor = z, g: Tensor = g) -> Tensor:
            d = net(X) - z
            return (g * d + d.square() / 8).sum(1).mean()

        for _ in range(STEPS):
            here = q()
            grads = torch.autograd.grad(here, params)
            slope, length = float(sum(t.square().sum() for t in grads)), 10.0
            with torch.no_grad():
                torch._foreach_add_(params, grads, alpha=-length)
                while float(q()) > float(here) - 0.1 * length * slope and length > 1e-8:
                    torch._foreach_add_(params, grads, alpha=0.1 * length)
                    length *= 0.9
    return float(losses(net(X)).mean())


def lbfgs() -> float:
    net = model()
    for _ in range(OUTER):
        z, g = surrogate(net)
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=STEPS, line_search_fn="strong_wolfe")

        def closure(z: Tensor = z, g: Tensor = g, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            d = net(X) - z
            q = (g * d + d.square() / 8).sum(1).mean()
            q.backward()
            return q

        optimizer.step(closure)
    return float(losses(net(X)).mean())


def as_low(mine: float, theirs: float) -> None:
    assert mine < 1.2 * theirs, (mine, theirs)


def run() -> None:
    missing("SGD_FMDOpt", "needs a GPU and has no package; its inner loop is timed in plain form below")
    race(
        "five steps of ten, step length kept",
        ours,
        reset_to_ten,
        peer="set back to 10",
        check=as_low,
        target=1.0,
    )
    race("five steps of ten", ours, lbfgs, peer="torch L-BFGS on the surrogate")


if __name__ == "__main__":
    main(run)
