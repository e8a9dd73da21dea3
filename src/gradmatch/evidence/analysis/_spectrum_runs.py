"""The small trainings whose spectra are compared, and what is read off each; every result is plain numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.analysis import decompose, segment, spectrum
from gradmatch.core.examples import Examples
from gradmatch.core.krylov import gaussian_width, smoothed
from gradmatch.core.networks import seeded
from gradmatch.datasets import digits, fashion_mnist
from gradmatch.evidence._common import PREPROCESSINGS, per_class, relabelled

STOPS = {2: 0.10, 3: 0.25, 5: 0.29, 10: 0.50}
"""Training loss at which the spectrum is taken, by number of classes."""
IMAGES, BASIN_IMAGES = 1000, 5000
KEPT = 30  # largest eigenvalues that are kept for the picture


# --- data and training -------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _fashion() -> Examples:
    return fashion_mnist().train


@lru_cache(maxsize=1)
def _digits() -> Examples:
    return digits().train


def images(
    source: str, classes: int, count: int, pool: int, scaling: str, seed: int
) -> tuple[Tensor, Tensor]:
    """``count`` images of the first classes, mean-pooled, flat, float64; scaled by a named preprocessing."""
    everything = _fashion() if source == "fashion" else _digits()
    some = per_class(relabelled(everything, range(classes)), count // classes, seed)
    x = F.avg_pool2d(some.x, pool).flatten(1).double()
    found = Examples(x, some.y, classes)
    return PREPROCESSINGS[scaling](found, found)[0].x, some.y


def tanh_net(inputs: int, width: int, classes: int, seed: int) -> nn.Sequential:
    """One tanh layer, weights N(0, 1 / fan_in), biases 0, float64."""
    net = nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, classes)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in (net[0], net[2]):
            assert isinstance(layer, nn.Linear)
            draws = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)
            layer.weight.copy_(draws / layer.in_features**0.5)
            layer.bias.zero_()
    return net


def descend(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    steps: int,
    *,
    lr: float,
    momentum: float = 0.0,
    batch: int | None = None,
    stop: float = 0.0,
    seed: int = 0,
    every: int = 0,
) -> list[float]:
    """SGD on ``net``, until the loss of a full batch is under ``stop``; the loss on everything each ``every`` steps."""
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum)
    generator, order, path = torch.Generator().manual_seed(seed), torch.arange(0), []
    for step in range(steps):
        xb, yb = x, y
        if batch is not None:
            if len(order) < batch:
                order = torch.randperm(len(x), generator=generator)
            xb, yb, order = x[order[:batch]], y[order[:batch]], order[batch:]
        optimizer.zero_grad()
        loss = F.cross_entropy(net(xb), yb)
        if batch is None and float(loss.detach()) <= stop:
            break
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if every and (step + 1) % every == 0:
            with torch.no_grad():
                path.append(float(F.cross_entropy(net(x), y)))
    optimizer.zero_grad()
    return path


# --- what is measured --------------------------------------------------------------------------------------


def class_count(seed: int, source: str, classes: int, scaling: str) -> dict[str, Any]:
    """Where the largest ratio of neighbouring eigenvalues lies, at a fixed training loss; and at the start."""
    pool, count = (4, IMAGES) if source == "fashion" else (1, min(IMAGES, 130 * classes))
    x, y = images(source, classes, count, pool, scaling, seed)
    net = tanh_net(x.shape[1], 12, classes, seed)
    before, parts = spectrum(net, (x, y)), decompose(net, (x, y))
    descend(net, x, y, 5000, lr=0.1, momentum=0.9, stop=STOPS[classes])
    after, then = spectrum(net, (x, y)), decompose(net, (x, y))
    place, ratio = after.gap()
    return {
        "gap": place,
        "ratio": ratio,
        "loss": after.loss,
        "top": after.top.tolist(),
        "low": [float(s.eigenvalues[0] / s.top[0]) for s in (before, after) if s.eigenvalues is not None],
        "residual": [parts.residual_share, then.residual_share],
        "energy": then.logit_energy,
        "curves": [[t.tolist() for t in s.curve(400)] for s in (before, after)],
    }


def blobs(seed: int, clusters: int) -> dict[str, Any]:
    """Tight clusters, a tenth of them relabelled at random."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(clusters, 10, generator=generator, dtype=torch.float64)
    y = torch.arange(600) % clusters
    x = means[y] + 0.2 * torch.randn(600, 10, generator=generator, dtype=torch.float64)
    wrong = torch.randperm(600, generator=generator)[:60]
    y[wrong] = torch.randint(0, clusters, (60,), generator=generator)
    net = tanh_net(10, 12, clusters, seed)
    descend(net, x, y, 300, lr=0.2, momentum=0.9)
    found = spectrum(net, (x, y), top=KEPT)
    place, ratio = found.gap()
    return {
        "gap": place,
        "ratio": ratio,
        "count": found.above(0.1 * float(found.top[0])),
        "top": found.top.tolist(),
    }


def widths(seed: int, width: int) -> dict[str, Any]:
    """The same data and the same loss, more and more units."""
    x, y = images("fashion", 10, 600, 7, "raw", seed)
    net = tanh_net(16, width, 10, seed)
    descend(net, x, y, 8000, lr=0.1, momentum=0.9, stop=0.60)
    found = spectrum(net, (x, y))
    values = found.eigenvalues
    assert values is not None
    return {
        "share": found.share_below(),
        "top": float(found.top[0]),
        "count": found.above(0.05 * float(found.top[0])),
        "loss": found.loss,
        "values": values.flip(0)[values.flip(0) > 0][:400].tolist(),
    }


def overlap(seed: int, separation: float) -> dict[str, Any]:
    """Two unit clusters that come nearer to each other."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(600) % 2
    x = torch.randn(600, 10, generator=generator, dtype=torch.float64)
    x[:, 0] += separation * (y.double() - 0.5)
    net = tanh_net(10, 12, 2, seed)
    descend(net, x, y, 300, lr=0.1)
    found = spectrum(net, (x, y), top=KEPT)
    count = found.above(0.05 * float(found.top[0]))
    return {"top": float(found.top[0]), "count": count, "loss": found.loss, "values": found.top.tolist()}


def quadrature(seed: int) -> dict[str, Any]:
    """Stochastic Lanczos quadrature against the exact spectrum under the same Gaussians."""
    x, y = images("fashion", 10, IMAGES, 4, "raw", seed)
    net = tanh_net(49, 20, 10, seed)
    descend(net, x, y, 5000, lr=0.1, momentum=0.9, stop=STOPS[10])
    exact = spectrum(net, (x, y)).eigenvalues
    assert exact is not None
    density = spectrum(net, (x, y), density=True, probes=10, seed=seed).density
    assert density is not None
    low, high = float(exact[0]), float(exact[-1])
    found: dict[str, Any] = {}
    for name, width in (
        ("kappa", gaussian_width(low, high, 100)),
        ("pyhessian", (1e-5 * max(1.0, high - low)) ** 0.5),
    ):
        grid = torch.linspace(low - 4 * width, high + 4 * width, 20000, dtype=torch.float64)
        estimate, truth = density.evaluate(grid, width)[0], smoothed(grid, exact, width=width)
        found[name] = float((estimate - truth).abs().sum() * (grid[1] - grid[0]))
        if name == "kappa":
            found["curves"] = [t[::40].tolist() for t in (grid, estimate, truth)]
    return found


def basins(seed: int, momentum: float, full_steps: int) -> dict[str, Any]:
    """A large batch until it stalls, then small batches from there; the segment between the two ends."""
    train = per_class(_fashion(), BASIN_IMAGES // 10, seed)
    x, y = train.x.flatten(1), train.y

    def trained(start: int) -> nn.Sequential:
        with seeded(start):
            net = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
        descend(net, x, y, full_steps, lr=0.1, momentum=momentum)
        return net

    large, found = trained(seed), {}
    for batch in (64, 16):
        small = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
        small.load_state_dict(large.state_dict())
        path = descend(small, x, y, 1500, lr=0.1, momentum=momentum, batch=batch, seed=seed, every=25)
        between = segment(large, small, (x, y))
        found[str(batch)] = {
            "barrier": between.barrier,
            "midpoint": between.midpoint_gap,
            "distance": between.distance,
            "losses": between.losses.tolist(),
            "path": path,
        }
    if momentum:
        apart = segment(large, trained(1000 + seed), (x, y))
        found["independent"] = {"barrier": apart.barrier, "losses": apart.losses.tolist()}
    return found


RUNS: dict[str, Callable[..., dict[str, Any]]] = {
    "classes": class_count,
    "blobs": blobs,
    "widths": widths,
    "overlap": overlap,
    "quadrature": quadrature,
    "basins": basins,
}
