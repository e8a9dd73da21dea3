"""The two settings of the reflection experiment: a mixture known exactly, and networks on two classes of garments."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.core.networks import seeded
from gradmatch.core.path import Prediction, VariancePreserving
from gradmatch.core.quality import frechet_distance, noise_floor
from gradmatch.core.sampler import Model, Network, Solver
from gradmatch.core.store import load_tensors, save_tensors
from gradmatch.core.training import train
from gradmatch.datasets import fashion_mnist
from gradmatch.evidence._judges import judge
from gradmatch.generate.w2sd import w2sd_sample
from gradmatch.zoo import MixtureOracle

STABLE = VariancePreserving.from_betas(0.00085, 0.012, scaled=True)
LINEAR = VariancePreserving.from_betas(1e-4, 0.02)
IDEAL, STRONG, WEAK, SHARPER = 0.5, 0.25, 0.05, (0.2, 0.1, 0.02)
CLASSES, MAJORITY, STRONG_MINORITY = (1, 8), 5000, 2500
WIDTH, BLOCKS, BATCH, RATE = 384, 3, 64, 1e-3

Draw = Callable[[VariancePreserving, Model, Model, Tensor], tuple[Tensor, int]]
"""(path, strong, weak, noise) -> samples, and the network calls that each took."""


def plain(steps: int) -> Draw:
    """The strong model alone."""

    def draw(path: VariancePreserving, strong: Model, weak: Model, x: Tensor) -> tuple[Tensor, int]:
        found = Solver(torch.linspace(999, -1, steps + 1, dtype=torch.float64), "ddim").run(strong, path, x)
        return found.x, int(found.calls[0])

    return draw


def reflected(steps: int, reflections: int, *, inside: bool = False) -> Draw:
    """W2SD; ``inside``: the step down by the weak model and the step back by the strong one."""

    def draw(path: VariancePreserving, strong: Model, weak: Model, x: Tensor) -> tuple[Tensor, int]:
        pair = (strong, weak) if inside else (weak, None)
        found = w2sd_sample(strong, pair[0], x, path, steps, reflections, inner=pair[1])
        return found.x, int(found.calls[0])

    return draw


def swapped(of: Draw) -> Draw:
    """With the roles of the models exchanged."""
    return lambda path, strong, weak, x: of(path, weak, strong, x)


def extrapolated(steps: int, gain: float) -> Draw:
    """eps_strong + gain (eps_strong - eps_weak): two calls a step, no reflection."""

    def draw(path: VariancePreserving, strong: Model, weak: Model, x: Tensor) -> tuple[Tensor, int]:
        def model(x: Tensor, t: Tensor, cond: Any = None) -> Prediction:
            s, w = strong(x, t).tensor, weak(x, t).tensor
            return Prediction("noise", s + gain * (s - w))

        samples, calls = plain(steps)(path, model, model, x)
        return samples, 2 * calls

    return draw


METHODS: dict[str, Draw] = {
    "strong, T 50": plain(50),
    "strong, T 100": plain(100),
    "strong, T 148": plain(148),
    "weak, T 50": swapped(plain(50)),
    "W2SD, T 50, lambda 49": reflected(50, 49),
    "W2SD, T 50, lambda 25": reflected(50, 25),
    "W2SD, T 50, lambda 10": reflected(50, 10),
    "W2SD, T 25, lambda 12": reflected(25, 12),
    "S2WD, T 50, lambda 49": swapped(reflected(50, 49)),
    "swap inside only, T 50, lambda 49": reflected(50, 49, inside=True),
    "extrapolation by 1, T 50": extrapolated(50, 1.0),
    "extrapolation by 2, T 50": extrapolated(50, 2.0),
    "extrapolation by 1, T 25": extrapolated(25, 1.0),
    "extrapolation by 1, T 74": extrapolated(74, 1.0),
}
TUNED: dict[str, dict[str, Draw]] = {
    "W2SD": {"T 50, lambda 25": reflected(50, 25), "T 40, lambda 30": reflected(40, 30),
             "T 34, lambda 33": reflected(34, 33)},
    "extrapolation": {f"by {g:g}, T 50": extrapolated(50, g) for g in (0.5, 1.0, 2.0)},
}  # fmt: skip
"""Three settings of each at 100 network calls."""


def mixture(left: float) -> MixtureOracle:
    """Two modes of deviation 0.5 at -4 and 4, the left one of this weight."""
    means, weights = torch.tensor([[-4.0], [4.0]]), torch.tensor([left, 1 - left])
    return MixtureOracle(means, 0.5, weights, path=STABLE, kind="noise")


def exact(seed: int, n: int) -> dict[str, Any]:
    """Share of the left mode and deviation within modes, for every method and for other weak models."""
    x = torch.randn(n, 1, generator=torch.Generator().manual_seed(seed))
    jobs = [(name, draw, WEAK) for name, draw in METHODS.items()]
    full = METHODS["W2SD, T 50, lambda 49"]
    jobs += [(f"W2SD, weak of weight {w:g}", full, w) for w in SHARPER]
    jobs += [("W2SD, weak is the ideal", full, IDEAL), ("W2SD, weak is strong", full, STRONG)]
    found = {}
    for name, draw, weight in jobs:
        samples, calls = draw(STABLE, mixture(STRONG), mixture(weight), x)
        within = samples - 4 * samples.sign()
        found[name] = {
            "share": float((samples < 0).double().mean()),
            "std": float(within.std()),
            "calls": calls,
        }
    return found


class ResidualMLP(nn.Module):
    """Noise in 14 x 14 pixels: residual blocks of LayerNorm and two layers, the time added to each (about 1.1 M)."""

    def __init__(self, dim: int, width: int, blocks: int) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, math.log(1000), 32)))
        self.first, self.last = nn.Linear(dim, width), nn.Linear(width, dim)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(blocks)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t.to(x)[:, None] / 1000 * self.frequencies
        h, time = self.first(x), self.time(torch.cat([angles.sin(), angles.cos()], 1))
        for block in self.blocks:
            h = h + block(h + time)
        out: Tensor = self.last(h)
        return out


@lru_cache(maxsize=1)
def garments() -> dict[str, Any]:
    """Trousers and bags at 14 x 14 in [-1, 1] (n, 196): for training by class, held out and test in equal parts."""
    data = fashion_mnist()
    halves = {
        part: [F.avg_pool2d(e.x[e.of_class(c)], 2).flatten(1) * 2 - 1 for c in CLASSES]
        for part, e in (("train", data.train), ("test", data.test))
    }
    held = torch.cat([x[MAJORITY:] for x in halves["train"]])
    goals = {"held out": features(held), "test": features(torch.cat(halves["test"]))}
    return {"train": [x[:MAJORITY] for x in halves["train"]], "goals": goals}


def pictures(x: Tensor) -> Tensor:
    """(n, 196) in [-1, 1] -> (n, 1, 28, 28) in [0, 1], for the judge."""
    small = ((x + 1) / 2).clamp(0, 1).reshape(-1, 1, 14, 14)
    return F.interpolate(small, (28, 28), mode="bilinear")


def features(x: Tensor) -> Tensor:
    """The judge's (n, 64)."""
    return judge().features(pictures(x))


def minority(seen: Tensor) -> float:
    """Share that the judge takes for bags rather than trousers."""
    logits = judge().net.head(seen)[:, list(CLASSES)]
    return float(logits.argmax(1).double().mean())


def floors(n: int) -> dict[str, float]:
    """What two draws of ``n`` real images score, and the judge's share of bags among balanced test images."""
    real = garments()["goals"]["test"]
    n = min(n, len(real) // 2)
    return {"frechet": noise_floor(frechet_distance, real, n)[0], "share": minority(real)}


def network(folder: Path, seed: int, bags: int, steps: int) -> Model:
    """A model of the noise, trained on 5,000 trousers and so many bags; kept in ``folder``."""
    with seeded(seed):
        net = ResidualMLP(196, WIDTH, BLOCKS)
    file, facts = folder / f"network-{bags}-{seed}.safetensors", {"steps": steps, "batch": BATCH, "lr": RATE}
    if file.exists() and load_tensors(file)[1] == facts:
        net.load_state_dict(load_tensors(file)[0])
    else:
        trousers, others = garments()["train"]
        data = torch.cat([trousers, others[:bags]])

        def loss(generator: torch.Generator) -> Tensor:
            x0 = data[torch.randint(len(data), (BATCH,), generator=generator)]
            t = torch.randint(1000, (BATCH,), generator=generator)
            noise = torch.randn(x0.shape, generator=generator)
            x = LINEAR.sample(x0, noise, t)
            error: Tensor = net(x, t) - noise
            return error.square().mean()

        train(net, loss, steps, lr=RATE, schedule="cosine", seed=seed)
        save_tensors(file, net.state_dict(), facts)
    return Network(net.eval(), "noise")


def judged(samples: Tensor, goal: str) -> dict[str, float]:
    """Share of the minority and Frechet distance to balanced real images."""
    seen = features(samples)
    return {"share": minority(seen), "frechet": frechet_distance(seen, garments()["goals"][goal])}


def trained(
    folder: Path, seed: int, bags: int, sizes: dict[str, int], chosen: dict[str, str]
) -> dict[str, Any]:
    """Figures of every method for one pair of networks, and of the chosen settings at 100 calls."""
    strong, weak = (network(folder, seed, k, sizes["steps"]) for k in (STRONG_MINORITY, bags))
    x = noise(sizes["samples"], seed)
    jobs = dict(METHODS) | {f"{kind}, {chosen[kind]}": TUNED[kind][chosen[kind]] for kind in TUNED}
    found = {}
    for name, draw in jobs.items():
        if name in ("extrapolation by 1, T 25", "extrapolation by 1, T 74"):  # asked of the mixture alone
            continue
        samples, calls = draw(LINEAR, strong, weak, x)
        found[name] = judged(samples, "test") | {"calls": calls}
        save_tensors(folder / "images" / f"{bags}-{seed}-{name}.safetensors", {"x": pictures(samples[:24])})
    return found


def tuning(folder: Path, seed: int, bags: int, sizes: dict[str, int]) -> dict[str, str]:
    """Of each kind the setting with the least Frechet distance to held-out training images, at 100 calls."""
    strong, weak = (network(folder, seed, k, sizes["steps"]) for k in (STRONG_MINORITY, bags))
    x = noise(sizes["samples"] // 2, 1000 + seed)
    chosen = {}
    for kind, settings in TUNED.items():
        scores = {
            n: judged(draw(LINEAR, strong, weak, x)[0], "held out")["frechet"] for n, draw in settings.items()
        }
        chosen[kind] = min(scores, key=lambda n: scores[n])
    return chosen


def noise(n: int, seed: int) -> Tensor:
    """Seeded starting points."""
    return torch.randn(n, 196, generator=torch.Generator().manual_seed(seed))
