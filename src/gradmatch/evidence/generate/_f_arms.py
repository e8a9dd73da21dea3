"""The two halves of the f-distill experiment: exact scores in one dimension, and networks on a grid of Gaussians."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.core.divergence import DIVERGENCES, divergence
from gradmatch.core.networks import seeded
from gradmatch.core.path import EDM, LinearPath
from gradmatch.core.quality import frechet_distance
from gradmatch.core.sampler import Network, Solver
from gradmatch.core.training import train
from gradmatch.generate import FDistill
from gradmatch.zoo import MixtureOracle, mlp_velocity

LEVELS = (0.1, 0.3)
START = (1.0, 0.0)
SMALL_MODE = 0.35
SPACING, STD, SIDE = 1.0, 0.1, 5
WEIGHTS = {"equal modes": 1.0, "falling modes": 0.85}
SAMPLES = 10_000


def exact(seeds: int, steps: int, batch: int = 512, lr: float = 5e-3) -> dict[str, Tensor]:
    """The exact gradient for every divergence, with the ratio as it is and clipped, all seeds at once.

    Target: 0.35 N(-2, 0.6^2) + 0.65 N(2, 0.6^2); student: mu + exp(s) z.

    Returns:
        (mu, s) of the students (seeds, 2) by "name" and "name, clipped".
    """
    names = [(n, clip) for n in DIVERGENCES for clip in (False, True)]
    oracle = MixtureOracle(
        torch.tensor([[-2.0], [2.0]]),
        0.6,
        torch.tensor([SMALL_MODE, 1 - SMALL_MODE]),
        path=EDM(),
        kind="score",
    )
    generator = torch.Generator().manual_seed(0)
    mu, s = (torch.full((len(names), seeds), v) for v in START)
    optimizer = torch.optim.Adam([mu, s], lr=lr)
    for _ in range(steps):
        z, noise = torch.randn(2, 1, seeds, batch, generator=generator)
        level = torch.where(torch.rand(1, seeds, batch, generator=generator) < 0.5, *LEVELS)
        scale = s.exp().unsqueeze(2)
        x = mu.unsqueeze(2) + scale * z + level * noise
        spread = (scale.square() + level.square()).expand_as(x)
        log_q = -0.5 * (x - mu.unsqueeze(2)).square() / spread - 0.5 * spread.log()
        flat, t = x.reshape(-1, 1), level.expand_as(x).reshape(-1)
        log_p = oracle.log_density(flat, t).reshape(x.shape) + 0.9189385  # of 2 pi, as in log_q
        score = oracle(flat, t).tensor.reshape(x.shape)
        ratio = (log_p - log_q).clamp(-30, 30).exp()
        h = torch.stack(
            [
                divergence(n).weight(r.clamp(0.1, 20.0) if c else r)
                for (n, c), r in zip(names, ratio, strict=True)
            ]
        )
        pull = -h / h.mean(2, keepdim=True) * (score + (x - mu.unsqueeze(2)) / spread)
        mu.grad, s.grad = pull.mean(2), (pull * scale * z).mean(2)
        optimizer.step()
    return {n + ", clipped" * c: torch.stack([m, v], 1) for (n, c), m, v in zip(names, mu, s, strict=True)}


def share_below(found: Tensor) -> Tensor:
    """Mass of each student (k,) at the smaller mode, below 0."""
    shares: Tensor = torch.special.ndtr(-found[:, 0] / found[:, 1].exp())
    return shares


@lru_cache(maxsize=2)
def grid(decay: float) -> MixtureOracle:
    """25 Gaussians on a square grid, the k-th in a fixed random order of weight decay^k."""
    places = (torch.arange(SIDE) - SIDE // 2) * SPACING
    means = torch.cartesian_prod(places, places)
    order = torch.randperm(len(means), generator=torch.Generator().manual_seed(0))
    return MixtureOracle(means, STD, decay ** order.float())


def figures(x: Tensor, decay: float, seed: int) -> dict[str, float]:
    """What samples (n, 2) are worth against the true mixture."""
    target = grid(decay)
    far, mode = torch.cdist(x, target.means).min(1)
    counts = torch.bincount(mode, minlength=len(target.means)).double() + 0.5
    shares, truth = counts / counts.sum(), target.weights.double()
    own = torch.bincount(mode[far < 3 * STD], minlength=len(truth)).double() / len(x)
    real = target.sample(len(x), torch.Generator().manual_seed(10_000 + seed))
    return {
        "histogram": float((truth * (truth / shares).log()).sum()),
        "covered": float((own > truth / 4).sum()),
        "near": float((far < 3 * STD).double().mean()),
        "frechet": frechet_distance(real, x),
    }


def teacher(decay: float, seed: int, steps: int) -> nn.Module:
    """A flow of the grid: three layers of 128."""
    with seeded(seed):
        net = mlp_velocity(2, (128, 128, 128))
    target, path = grid(decay), LinearPath()

    def loss(generator: torch.Generator) -> Tensor:
        x0 = target.sample(1024, generator)
        noise, t = torch.randn(x0.shape, generator=generator), torch.rand(len(x0), generator=generator)
        x, v = path.pair("velocity", x0, noise, t)
        value: Tensor = (net(x, t) - v).square().mean()
        return value

    train(net, loss, steps, lr=3e-3, schedule="cosine", clip=1.0, seed=seed)
    return net.requires_grad_(False)


def noise(seed: int) -> Tensor:
    """Where every generator starts."""
    return torch.randn(SAMPLES, 2, generator=torch.Generator().manual_seed(20_000 + seed))


@torch.no_grad()
def sampled(net: nn.Module, calls: int, seed: int) -> Tensor:
    """Samples of the teacher by Euler's steps."""
    times = torch.linspace(1, 0, calls + 1, dtype=torch.float64)
    found: Tensor = Solver(times).run(Network(net, "velocity"), LinearPath(), noise(seed)).x
    return found


def distilled(
    net: nn.Module, decay: float, name: str, lr: float, updates: int, seed: int
) -> tuple[Tensor, dict[str, Any]]:
    """Samples of the student of one call, and the weights' statistics over the last half of its updates."""
    run = FDistill(
        net, discriminator="features", divergence=name, schedule=LinearPath(), kind="velocity",
        lr=lr, fake_lr=2 * lr, discriminator_lr=5e-3, weight_decay=0.0, ema=0.98, seed=seed,
    )  # fmt: skip
    data = grid(decay).sample(50_000, torch.Generator().manual_seed(30_000 + seed))
    found = run.fit(data, updates * run.student_every, batch=256)
    late = found[len(found) // 2 :]
    return run.sample(noise(seed)), {"effective": sum(f["effective"] for f in late) / len(late)}
