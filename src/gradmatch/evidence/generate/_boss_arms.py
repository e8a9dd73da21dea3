"""The three settings of the Bellman-step experiment: an exact field of real images, a ring, and a trained network."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.core.networks import seeded
from gradmatch.core.path import LinearPath
from gradmatch.core.quality import frechet_distance
from gradmatch.core.sampler import Model, Network, Solver
from gradmatch.core.schedule import shortest_path
from gradmatch.core.store import load_tensors, save_tensors
from gradmatch.core.training import train
from gradmatch.datasets import fashion_mnist
from gradmatch.evidence._judges import judge
from gradmatch.generate.boss import bellman_steps, straighten
from gradmatch.zoo import MixtureOracle, mlp_velocity

FINE, COST_SAMPLES = 100, 100
UNIFORM, BELLMAN = "uniform", "Bellman"
TUNED = ("reflow, t uniform", "reflow, t in {k/K}", "BOSS", "straightened at uniform times")
BATCH, HELD, JUDGED = 256, 5000, 1000


def uniform(calls: int) -> Tensor:
    """Equal steps from noise at 1 to data at 0."""
    return torch.linspace(1, 0, calls + 1, dtype=torch.float64)


def noise(shape: tuple[int, ...], n: int, seed: int) -> Tensor:
    """Seeded starting points."""
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def ends(model: Model, x: Tensor, times: Tensor) -> Tensor:
    """Where Euler ends."""
    return Solver(times).run(model, LinearPath(), x).x


def rmse(a: Tensor, b: Tensor) -> float:
    """Root of the mean squared distance of end points."""
    return float((a - b).flatten(1).square().sum(1).mean().sqrt())


def schedules(model: Model, shape: tuple[int, ...], calls: Sequence[int], seed: int) -> dict[int, Tensor]:
    """Bellman times for each number of calls, measured once on 100 noises of their own."""
    x = noise(shape, COST_SAMPLES, 10_000 + seed)
    _, cost = bellman_steps(model, x, 1, FINE, path=LinearPath(), return_cost=True)
    return {k: uniform(FINE)[shortest_path(cost, k)[0]] for k in calls}


@lru_cache(maxsize=1)
def images14() -> tuple[Tensor, Tensor]:
    """Training and test images (n, 196), averaged to 14 x 14, in [-1, 1]."""
    data = fashion_mnist()
    small = [F.avg_pool2d(e.x, 2).flatten(1) * 2 - 1 for e in (data.train, data.test)]
    return small[0], small[1]


def exact_field(seed: int, calls: tuple[int, ...], tests: int) -> dict[str, Any]:
    """The closed-form field of 3,000 images smoothed by 0.1; Frechet distances are in their 32 first components."""
    points = images14()[0][:3000]
    model = MixtureOracle(points, 0.1)
    centre = points.mean(0)
    basis = torch.linalg.svd(points - centre, full_matrices=False).Vh[:32].T
    x = noise((196,), tests, seed)
    fine = ends(model, x, uniform(FINE))
    found: dict[str, Any] = {}
    bellman = schedules(model, (196,), calls, seed)
    for k in calls:
        for name, times in ((UNIFORM, uniform(k)), (BELLMAN, bellman[k])):
            reached = ends(model, x, times)
            distance = frechet_distance((reached - centre) @ basis, (points - centre) @ basis)
            found[f"{name} {k}"] = {"rmse": rmse(reached, fine), "frechet": distance, "times": times.tolist()}
    return found


def ring(seed: int, calls: tuple[int, ...], tests: int) -> dict[str, Any]:
    """Eight Gaussians on a circle: where the cost misleads."""
    angles = torch.arange(8) * math.pi / 4
    model = MixtureOracle(torch.stack([angles.cos(), angles.sin()], 1) * 4, 0.15)
    x = noise((2,), tests, seed)
    fine = ends(model, x, uniform(FINE))
    found: dict[str, Any] = {}
    bellman = schedules(model, (2,), calls, seed)
    for k in calls:
        for name, times in ((UNIFORM, uniform(k)), (BELLMAN, bellman[k])):
            reached = ends(model, x, times)
            found[f"{name} {k}"] = {
                "rmse": rmse(reached, fine),
                "mmd": mmd(reached, fine),
                "times": times.tolist(),
            }
    return found


def mmd(a: Tensor, b: Tensor) -> float:
    """Maximum mean discrepancy with a Gaussian kernel of width 1, biased."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(x.double(), y.double()).square() / 2).mean()

    return float((kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)).clamp_min(0).sqrt())


class Latents:
    """Fashion-MNIST in 16 principal components of unit mean variance, and back to 28 x 28 for the judge."""

    def __init__(self) -> None:
        data = fashion_mnist()
        flat = data.train.x.flatten(1)
        self.centre = flat.mean(0)
        self.basis = torch.linalg.eigh(torch.cov(flat.T)).eigenvectors[:, -16:]
        self.scale = ((flat - self.centre) @ self.basis).std()
        whole, test = (self.code(e.x) for e in (data.train, data.test))
        self.train, self.goals = whole[:-HELD], {"test": test, "held out": whole[-HELD:]}
        self.judged = judge().features(self.pixels(test))

    def code(self, images: Tensor) -> Tensor:
        """(n, 16)."""
        codes: Tensor = (images.flatten(1) - self.centre) @ self.basis / self.scale
        return codes

    def pixels(self, z: Tensor) -> Tensor:
        """(n, 1, 28, 28) in [0, 1]."""
        flat: Tensor = z * self.scale @ self.basis.T + self.centre
        return flat.clamp(0, 1).reshape(-1, 1, 28, 28)

    def figures(self, z: Tensor, fine: Tensor) -> dict[str, float]:
        """Frechet distances to test images, in components and in the judge's features of both, and end-point error."""
        return {
            "frechet": frechet_distance(z, self.goals["test"]),
            "judge": frechet_distance(judge().features(self.pixels(z[:JUDGED])), self.judged),
            "rmse": rmse(z, fine),
        }


@lru_cache(maxsize=1)
def latents() -> Latents:
    """Made once a process."""
    return Latents()


def trained(
    folder: Path, seed: int, calls: tuple[int, ...], sizes: dict[str, int], rates: dict[str, float]
) -> dict[str, Any]:
    """A network on 16 components: before and after each way of fine-tuning, with equal pairs and updates."""
    space, parts = latents(), Tuning(folder, seed, sizes, calls)
    x = noise((16,), sizes["tests"], seed)
    fine = ends(parts.model, x, uniform(FINE))
    found: dict[str, Any] = {"fine 100": space.figures(fine, fine)}
    for k in calls:
        for name, times in ((UNIFORM, uniform(k)), (BELLMAN, parts.bellman[k])):
            found[f"{name} {k}"] = space.figures(ends(parts.model, x, times), fine)
        for name in TUNED:
            student, times = parts.tuned(name, k, rates[name])
            found[f"{name} {k}"] = space.figures(ends(Network(student, "velocity"), x, times), fine)
    return found


def held_out(
    folder: Path, method: str, rates: Sequence[float], seed: int, calls: int, sizes: dict[str, int]
) -> list[float]:
    """Frechet distance to held-out training images after fine-tuning with each rate."""
    parts, found = Tuning(folder, seed, sizes, (calls,)), []
    for rate in rates:
        student, times = parts.tuned(method, calls, rate)
        reached = ends(Network(student, "velocity"), noise((16,), sizes["tests"], seed), times)
        found.append(frechet_distance(reached, latents().goals["held out"]))
    return found


class Tuning:
    """One pretrained network, 5,000 pairs of noise and fine end points, and the four ways to fine-tune on them."""

    def __init__(self, folder: Path, seed: int, sizes: dict[str, int], calls: Sequence[int]) -> None:
        self.seed, self.steps = seed, sizes["tune"]
        self.net = pretrained(folder, seed, sizes["pretrain"])
        self.model = Network(self.net, "velocity")
        self.start = noise((16,), sizes["pairs"], 20_000 + seed)
        self.end = ends(self.model, self.start, uniform(FINE))
        self.bellman = schedules(self.model, (16,), calls, seed)
        self._reflowed: dict[float, nn.Module] = {}

    def tuned(self, method: str, calls: int, rate: float) -> tuple[nn.Module, Tensor]:
        """The fine-tuned network and the times to call it at."""
        if method == TUNED[0]:
            if rate not in self._reflowed:  # the same network for every number of calls
                self._reflowed[rate] = self.reflow(None, rate)
            return self._reflowed[rate], uniform(calls)
        if method == TUNED[1]:
            return self.reflow(calls, rate), uniform(calls)
        times = self.bellman[calls] if method == TUNED[2] else uniform(calls)
        return self.straighten(times, rate), times

    def reflow(self, calls: int | None, rate: float) -> nn.Module:
        """Straight lines between noise and end points, at all times or at the K where the network will be called."""
        student, path = copy.deepcopy(self.net), LinearPath()

        def loss(generator: torch.Generator) -> Tensor:
            index = torch.randint(len(self.start), (BATCH,), generator=generator)
            t = torch.rand(BATCH, generator=generator)
            if calls is not None:
                t = 1 - torch.randint(calls, (BATCH,), generator=generator) / calls
            return path_loss(student, path, self.end[index], self.start[index], t)

        train(student, loss, self.steps, lr=rate, schedule="cosine", seed=self.seed)
        return student.eval()

    def straighten(self, times: Tensor, rate: float) -> nn.Module:
        """BOSS's second stage from the same starting points, with the same updates."""
        taken = iter(torch.split(self.start, 256))
        student = straighten(
            self.net, times, lambda n, generator: next(taken)[:n], len(self.start), self.steps, path=LinearPath(),
            batch=BATCH, lr=rate, schedule="cosine", warmup=0, clip=None, ema=None, held_out=0.02, seed=self.seed,
        )  # fmt: skip
        found: nn.Module = student.network
        return found


def pretrained(folder: Path, seed: int, steps: int) -> nn.Module:
    """A velocity MLP, 256 x 3, Adam 5e-4 by a cosine, batches of 256; kept in ``folder``."""
    with seeded(seed):
        net = mlp_velocity(16)
    file, facts = folder / f"network-{seed}.safetensors", {"steps": steps}
    if file.exists() and load_tensors(file)[1] == facts:
        net.load_state_dict(load_tensors(file)[0])
        return net.eval()
    data, path = latents().train, LinearPath()

    def loss(generator: torch.Generator) -> Tensor:
        x0 = data[torch.randint(len(data), (BATCH,), generator=generator)]
        x1, t = torch.randn(BATCH, 16, generator=generator), torch.rand(BATCH, generator=generator)
        return path_loss(net, path, x0, x1, t)

    train(net, loss, steps, lr=5e-4, schedule="cosine", seed=seed)
    save_tensors(file, net.state_dict(), facts)
    return net.eval()


def path_loss(net: Callable[..., Tensor], path: LinearPath, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """Flow matching between given ends."""
    return (net(path.sample(x0, x1, t), t) - path.target("velocity", x0, x1, t)).square().mean()
