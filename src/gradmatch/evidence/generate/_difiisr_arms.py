"""The parts of the super-resolution experiment: two sets of grey images, the networks, and what is measured."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.core.guidance import GradientGuide
from gradmatch.core.networks import seeded
from gradmatch.core.regress import PairStore
from gradmatch.core.store import load_tensors, save_tensors
from gradmatch.core.training import train
from gradmatch.datasets import fashion_mnist
from gradmatch.evidence._common import hold_out
from gradmatch.evidence._judges import judge
from gradmatch.generate._spectrum import amplitudes, radii
from gradmatch.generate.difiisr import PerceptualLoss, ResShift, SpectrumLoss
from gradmatch.zoo.judge import JudgeNet

SCALE, WIDTH, BLOCKS, BATCH, RATE = 4, 48, 3, 32, 2e-3
NOISE, TESTS, HELD = 0.02, 500, 200
GARMENTS, PHOTOS = "garments", "photographs"
FREE: dict[str, float] = {"visual": 0.0, "perceptual": 0.0}
SHIFTS = (0.01, 0.03, 0.1)


def degraded(hr: Tensor, generator: torch.Generator) -> Tensor:
    """Blurred by a Gaussian of one pixel, averaged over 4 x 4, with noise of 0.02."""
    return clean(hr) + NOISE * torch.randn(
        len(hr), 1, hr.shape[2] // SCALE, hr.shape[3] // SCALE, generator=generator
    )


def clean(hr: Tensor) -> Tensor:
    """The same without noise."""
    bell = torch.exp(-torch.arange(-2.0, 3.0).square() / 2)
    kernel = (bell[:, None] * bell / bell.sum() ** 2)[None, None]
    return F.avg_pool2d(F.conv2d(F.pad(hr, (2, 2, 2, 2), "reflect"), kernel), SCALE)


@lru_cache(maxsize=2)
def images(name: str) -> dict[str, Any]:
    """{"train", "held", "test": sharp images in [0, 1]; "labels": of the test images, for garments}."""
    if name == GARMENTS:
        data = fashion_mnist()
        rest, held = hold_out(data.train, 50, 0)
        order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))[:TESTS]
        kept = held.x[torch.randperm(len(held), generator=torch.Generator().manual_seed(0))[:HELD]]
        return {"train": rest.x, "held": kept, "test": data.test.x[order], "labels": data.test.y[order]}
    return {part: _crops(*ends) for part, ends in
            {"train": (0.0, 0.6, 8), "held": (0.6, 0.75, 32), "test": (0.75, 1.0, 32)}.items()}  # fmt: skip


def _crops(left: float, right: float, stride: int) -> Tensor:
    """32 x 32 crops of scikit-image's photographs, from one band of columns."""
    from skimage import data

    found = []
    for name in ("camera", "moon", "coins", "text", "page"):
        photo = torch.from_numpy(getattr(data, name)()).float() / 255
        band = photo[:, int(left * photo.shape[1]) : int(right * photo.shape[1])]
        crops = band.unfold(0, 32, stride).unfold(1, 32, stride)
        found.append(crops.reshape(-1, 1, 32, 32))
    return torch.cat(found)


class Upscaler(nn.Module):
    """x_0 from x_t and y: both folded by 4 x 4 pixels into channels, residual convolutions, unfolded; about 0.15 M."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.exp(torch.linspace(-3, 1, 8)))
        self.first, self.time = nn.Conv2d(32, width, 3, padding=1), nn.Linear(16, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
                nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            )
            for _ in range(blocks)
        )  # fmt: skip
        self.last = nn.Conv2d(width, 16, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t.to(x)[:, None] * self.frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))[:, :, None, None]
        h = self.first(F.pixel_unshuffle(x, 4)) + time
        for block in self.blocks:
            h = h + block(h)
        out: Tensor = x[:, 1:] + F.pixel_shuffle(self.last(h), 4)  # what is missing from y
        return out


def model() -> ResShift:
    """Untrained."""
    return ResShift(Upscaler(WIDTH, BLOCKS), scale=SCALE)


def trained(folder: Path, data: str, kind: str, seed: int, steps: int) -> ResShift:
    """The diffusion ("teacher"), or the same network on y alone ("regression"); kept in ``folder``."""
    with seeded(seed):
        found = model()
    file, facts = folder / f"{data}-{kind}-{seed}.safetensors", {"steps": steps, "batch": BATCH, "rate": RATE}
    if file.exists() and load_tensors(file)[1] == facts:
        found.load_state_dict(load_tensors(file)[0])
        return found.eval()
    hr = images(data)["train"]

    def loss(generator: torch.Generator) -> Tensor:
        x = hr[torch.randint(len(hr), (BATCH,), generator=generator)]
        small = degraded(x, generator)
        if kind == "teacher":
            return found.loss(x, small, generator)
        error: Tensor = regressed(found, small) - x
        return error.square().mean()

    train(found, loss, steps, lr=RATE, schedule="cosine", seed=seed)
    save_tensors(file, found.state_dict(), facts)
    return found.eval()


def regressed(net: ResShift, small: Tensor) -> Tensor:
    """The network's answer from y alone, t = 0."""
    y = net.enlarged(small)
    return net.x0(torch.zeros_like(y), torch.zeros(len(y)), y, small)


def extractors(folder: Path, steps: int) -> PerceptualLoss:
    """Convolutional parts of two small classifiers of garments, of different seeds, frozen; none of them judges."""
    parts = []
    data = fashion_mnist().train
    for seed in (11, 12):
        with seeded(seed):
            net = JudgeNet(width=8)
        file, facts = folder / f"extractor-{seed}.safetensors", {"steps": steps}
        if file.exists() and load_tensors(file)[1] == facts:
            net.load_state_dict(load_tensors(file)[0])
        else:

            def loss(generator: torch.Generator, net: nn.Module = net) -> Tensor:
                x, y = data[torch.randint(len(data), (64,), generator=generator)]
                return F.cross_entropy(net(x), y)

            train(net, loss, steps, lr=4e-3, schedule="cosine", seed=seed)
            save_tensors(file, net.state_dict(), facts)
        parts.append(net.eval().requires_grad_(False).body)
    return PerceptualLoss(parts)


def student(
    teacher: ResShift, pairs: PairStore, steps: int, seed: int, seen: PerceptualLoss, **weights: float
) -> ResShift:
    """A copy of the teacher, distilled with these weights."""
    found = copy.deepcopy(teacher)
    options = FREE | weights
    found.distill(
        teacher, pairs.tensors["lr"], steps, pairs=pairs, extractors=seen, batch=BATCH, rate=1e-3, schedule="cosine",
        seed=seed, **options,
    )  # fmt: skip
    return found.eval()


def pairs_of(teacher: ResShift, data: str, n: int, seed: int) -> PairStore:
    """Where the teacher goes from ``n`` degraded training images."""
    g = torch.Generator().manual_seed(500 + seed)
    hr = images(data)["train"]
    return teacher.pairs(degraded(hr[torch.randint(len(hr), (n,), generator=g)], g), seed=seed)


def figures(found: Tensor, hr: Tensor, small: Tensor, labels: Tensor | None) -> dict[str, float]:
    """What is measured of images: errors in pixels, spectrum, and what the judge sees."""
    from skimage.metrics import structural_similarity

    logs = [(amplitudes(x) + 1e-3).log() for x in (found, hr)]
    gap, high = (logs[0] - logs[1]).abs(), radii(*hr.shape[2:]) > 1 / SCALE
    seen, real = judge().features(found.clamp(0, 1)), judge().features(hr)
    similarity: Any = structural_similarity
    pairs = zip(found[:, 0].clamp(0, 1).numpy(), hr[:, 0].numpy(), strict=True)
    ssim = [similarity(a, b, data_range=1.0) for a, b in pairs]
    measured = {
        "psnr": float((-10 * (found - hr).square().flatten(1).mean(1).clamp_min(1e-10).log10()).mean()),
        "ssim": float(torch.tensor(ssim).mean()),
        "spectrum": float(gap.mean()),
        "high": float(gap[..., high].mean()),
        "features": float((seen - real).square().sum(1).sqrt().mean()),
        "consistency": float((clean(found) - small).abs().mean()),
    }
    if labels is not None:
        said = judge().net.head(seen).argmax(1)
        measured["accuracy"] = float((said == labels).double().mean())
    return measured


def weights_of(folder: Path, data: str, sizes: dict[str, int], grid: Sequence[float]) -> dict[str, float]:
    """The weight of each loss, on held-out training images: the least of its figure within 0.3 dB of plain."""
    teacher, seen = (
        trained(folder, data, "teacher", 0, sizes["steps"]),
        extractors(folder, sizes["extractor"]),
    )
    pairs, hr = pairs_of(teacher, data, sizes["pairs"], 0), images(data)["held"]
    small = degraded(hr, torch.Generator().manual_seed(900))

    def scores(**weights: float) -> dict[str, float]:
        net = student(teacher, pairs, sizes["student"], 0, seen, **weights)
        return figures(net.sample(small, 1, seed=900).images, hr, small, None)

    least, found = scores()["psnr"] - 0.3, {}
    for name, figure in (("visual", "high"), ("perceptual", "features")):
        every = {w: scores(**{name: w}) for w in grid}
        able = {w: s[figure] for w, s in every.items() if s["psnr"] >= least} or {min(grid): 0.0}
        found[name] = min(able, key=lambda w: able[w])
    return found


def measured(
    folder: Path, data: str, seed: int, sizes: dict[str, int], chosen: dict[str, float]
) -> dict[str, Any]:
    """All figures of one set and seed."""
    whole = images(data)
    hr, labels = whole["test"], whole.get("labels")
    small = degraded(hr, torch.Generator().manual_seed(100 + seed))
    teacher, blur = (trained(folder, data, k, seed, sizes["steps"]) for k in ("teacher", "regression"))
    seen, pairs = extractors(folder, sizes["extractor"]), pairs_of(teacher, data, sizes["pairs"], seed)
    with torch.no_grad():
        outputs = {"the truth": hr, "bicubic": teacher.enlarged(small), "regression": regressed(blur, small)}
    outputs["15 steps"] = teacher.sample(small, seed=seed).images
    outputs["15 steps, ancestral"] = teacher.sample(small, "ancestral", seed=seed).images
    variants = {
        "student, plain": FREE,
        "student, visual": {"visual": chosen["visual"]},
        "student, perceptual": {"perceptual": chosen["perceptual"]},
        "student, both": chosen,
        "student, both at 0.001": {"visual": 0.001, "perceptual": 0.001},
    }
    for name, weights in variants.items():
        net = student(teacher, pairs, sizes["student"], seed, seen, **weights)
        outputs[name] = net.sample(small, 1, seed=seed).images

    def known(x: Tensor, small: Tensor) -> Tensor:
        return (clean(x) - small).square().mean()

    for shift in SHIFTS:
        guide = GradientGuide([known], scale=shift, reference=small)
        outputs[f"15 steps, guided by {shift:g}"] = teacher.sample(small, guide=guide, seed=seed).images
    spectral = GradientGuide([SpectrumLoss(band=(0, 1 / SCALE))], scale=0.01, reference="lr")
    outputs["15 steps, guided by the spectrum"] = teacher.sample(small, guide=spectral, seed=seed).images
    literal = GradientGuide([known], scale=0.01, reference=small, form="noise")
    outputs["15 steps, guided in the noise"] = teacher.sample(small, guide=literal, seed=seed).images
    shown = hr.flatten(1).std(1).argsort(descending=True)[: len(hr) // 2]
    shown = shown[:: max(1, len(shown) // 12)]  # not the flat ones
    strip = {name.replace(" ", "-").replace(",", ""): x[shown].clamp(0, 1) for name, x in outputs.items()}
    save_tensors(folder / "images" / f"{data}-{seed}.safetensors", strip)
    return {name: figures(x, hr, small, labels) for name, x in outputs.items()}


def parameters() -> int:
    """Of the network."""
    return sum(math.prod(p.shape) for p in model().parameters())
