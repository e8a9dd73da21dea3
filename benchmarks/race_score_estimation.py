"""Kernel gradient descent for 4,000 steps on 800 labels, and steps of the network of two layers.

The path is wanted after 60 steps of a geometric grid, at the 800 inputs and at 2,000 others. Peers: the loop that
everyone writes, in torch; neural-tangents' ``gradient_descent_mse`` (PyPI, on jax), which also decomposes the kernel.
The network's step is raced against autograd on the same module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from _timer import main, missing, race
from gradmatch.analysis import DenoisingRegression, KernelPath, ReLUKernel, TwoLayerReLU
from gradmatch.core.cpu import keep_freed_memory

N, OTHERS, STEPS, DIM, WIDTH, T_MIN = 800, 2000, 4000, 2, 512, 0.2
GRID = sorted({round(STEPS ** (k / 59)) for k in range(60)})


def data() -> tuple[DenoisingRegression, DenoisingRegression]:
    g = torch.Generator().manual_seed(0)

    def task(count: int, seed: int) -> DenoisingRegression:
        points = torch.randint(0, 2, (count, DIM), generator=g) * 2.0 - 1
        return DenoisingRegression(
            points + 0.05 * torch.randn(count, DIM, generator=g), t_min=T_MIN, t_max=2.0, seed=seed
        )

    return task(N, 0), task(OTHERS, 1)


def loop(train: DenoisingRegression, other: DenoisingRegression, eta: float) -> Tensor:
    """F <- F - eta / N K (F - Y), with the coefficients that give it elsewhere."""
    x, t, y = train.inputs.double(), train.t.double(), train.labels.double()
    kernel = ReLUKernel(T_MIN)
    k, across = kernel(x, t, x, t), kernel(other.inputs.double(), other.t.double(), x, t)
    fit, coefficients, found, wanted = torch.zeros_like(y), torch.zeros_like(y), [], set(GRID)
    for step in range(1, STEPS + 1):
        change = (eta / N) * (fit - y)
        fit, coefficients = fit - k @ change, coefficients - change
        if step in wanted:
            found.append(torch.cat([fit, across @ coefficients]))
    return torch.stack(found)


def ours(train: DenoisingRegression, other: DenoisingRegression, eta: float) -> Tensor:
    path = KernelPath(ReLUKernel(T_MIN), (train.inputs, train.t), train.labels, eta=eta)
    return torch.cat([path.fit_at(GRID), path.predict(other.inputs, other.t, GRID)], 1)


def tangents(train: DenoisingRegression, other: DenoisingRegression, eta: float) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp
    from neural_tangents import predict

    jax.config.update("jax_enable_x64", True)
    kernel = ReLUKernel(T_MIN)

    def measure() -> Tensor:
        x, t = train.inputs.double(), train.t.double()
        k, across = kernel(x, t, x, t), kernel(other.inputs.double(), other.t.double(), x, t)
        known, y = jnp.asarray(k.numpy()), jnp.asarray(train.labels.double().numpy())
        descend = predict.gradient_descent_mse(known, y, learning_rate=eta)
        start = jnp.zeros_like(y), jnp.zeros((OTHERS, DIM))
        parts = [descend(float(s), *start, jnp.asarray(across.numpy())) for s in GRID]
        return torch.stack([torch.cat([torch.tensor(p.__array__()) for p in pair]) for pair in parts])

    return measure


def close(tolerance: float) -> Callable[[Tensor, Tensor], None]:
    def check(a: Tensor, b: Tensor) -> None:
        gap = float((a - b).norm() / b.norm())
        assert gap < tolerance, f"relative difference {gap:.1e}"

    return check


def steps_of(count: int, analytic: bool, train: DenoisingRegression) -> Tensor:
    net = TwoLayerReLU(DIM, WIDTH, t_min=T_MIN)
    slopes = net.slopes(train.inputs, train.t, train.labels)
    for _ in range(count):
        if analytic:
            gradient = slopes()[1][0][1]
        else:
            loss = (net(train.inputs, train.t) - train.labels).square().sum(1).mean()
            gradient = torch.autograd.grad(loss, net.weight)[0]
        with torch.no_grad():
            net.weight.sub_(gradient, alpha=0.1)
    return net.weight.detach()


def run() -> None:
    keep_freed_memory()
    train, other = data()
    eta = KernelPath(ReLUKernel(T_MIN), (train.inputs, train.t), train.labels).eta
    name = f"{len(GRID)} of {STEPS} steps of kernel descent, {N} labels, {OTHERS} other points"
    race(
        name,
        lambda: ours(train, other, eta),
        lambda: loop(train, other, eta),
        peer="loop over steps",
        rounds=3,
        check=close(1e-9),
        target=2.0,
        unit="s",
    )
    try:
        theirs = tangents(train, other, eta)
        theirs()
    except Exception as error:  # whatever keeps it from running here is the reason
        missing("neural-tangents", f"{type(error).__name__}: {str(error).splitlines()[0][:100]}")
    else:
        race(
            name,
            lambda: ours(train, other, eta),
            theirs,
            peer="neural-tangents",
            rounds=3,
            check=close(0.2),  # its continuous time differs from steps by O(eta)
            target=2.0,
            unit="s",
        )
    race(
        f"50 steps of the network of {WIDTH} units, {N} labels",
        lambda: steps_of(50, True, train),
        lambda: steps_of(50, False, train),
        peer="autograd",
        rounds=3,
        check=close(1e-4),
        target=2.0,
    )


if __name__ == "__main__":
    main(run)
