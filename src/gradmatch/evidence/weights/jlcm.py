"""Networks on Fashion-MNIST compressed to 2 and 3 bits a weight: one codebook, grouped codebooks, learned ones.

An MLP (784-256-256-10, raw images) and a small ConvNet with batch-norm (32 and 64 channels, a hidden layer of
128; images at half the side) are trained for three epochs. Every Linear and convolution layer is compressed,
the first and the last too, with 512 unlabelled training images. All rows of one network and bit width are of
the same size on disk within 1 %. Learned rows take 200 steps of 64 inputs a layer; nothing is tuned: rates
are those of the method for all of them."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.core.examples import Examples
from gradmatch.core.networks import build
from gradmatch.core.picture import blank, png
from gradmatch.datasets import fashion_mnist
from gradmatch.evidence._common import (
    Gain,
    Result,
    Row,
    Settings,
    accuracy,
    gain,
    halved,
    kept,
    parallel,
    verdict_of,
)
from gradmatch.weights import CompressedModel, compress
from gradmatch.weights._coded import Coded, coded_layer, is_compressible, matrix_of, replace
from gradmatch.weights._compressed import in_half_precision
from gradmatch.weights._mapping import nearest_codes, stored_type

SLUG = "jlcm"
TITLE = "JLCM: codebooks and mappings learned jointly"
CLAIM = (
    "At 2 and 3 bits a weight and equal size, codebooks and their indices learned together keep more of a "
    "network than one codebook a tensor, grouped codebooks and codes learned alone; a mapping gradient that "
    "reaches near codes first is what makes it work."
)
RULE = (
    "Cells are MLP and ConvNet x 2 and 3 bits; 'error' is the squared error of the test logits relative to "
    "their variance, on a log scale, and a difference counts if it exceeds two standard errors, paired by "
    "seed. Averaged over all cells: (1) the proximal rule (4 groups, one-hot start) is above uniform min-max,"
    " MSE-optimal uniform and k-means, each with one codebook a tensor, in accuracy. (2) k-means with 4 "
    "groups has less error than k-means. (3) Proximal has less error than codes learned alone and (4) higher "
    "accuracy. (5) At 3 bits its error is less than a third of the default gradient's, (6) at 2 bits less "
    "than it, (7) and its accuracy is higher over all cells. (8) It has less error than the sign alone. (9) "
    "From the distance start, too, proximal has less error than default. (10) At 3 bits it is within one "
    "point of the float network in both. (11) Every file is within 1 % of the size predicted, and reloads to "
    "the same logits. 'holds' if all eleven are met, 'holds in part' if some are, 'does not hold' if none is."
)

BITS, NETS = (2, 3), ("MLP", "ConvNet")
CALIBRATION, STEPS = 512, 200
ARMS: dict[str, dict[str, Any]] = {
    "uniform, min-max": {},
    "uniform, MSE-optimal": {},
    "k-means": {"steps": 0, "groups": 1},
    "k-means, 4 groups": {"steps": 0},
    "k-means, 4 scales": {"steps": 0, "variant": "scales"},
    "codes learned": {"grad": None},
    "joint, default gradient": {"grad": "default"},
    "joint, sign alone": {"grad": "sign"},
    "joint, proximal": {"grad": "proximal"},
    "joint, default, distance start": {"grad": "default", "map_init": "distance"},
    "joint, proximal, distance start": {"grad": "proximal", "map_init": "distance"},
}
SHOWN = 8
"""Neurons of the picture."""


def mlp() -> nn.Module:
    """784-256-256-10."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def convnet() -> nn.Module:
    """Two convolutions with batch-norm and one hidden layer, for images of 14 x 14."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 9, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


@lru_cache(maxsize=2)
def _data(net: str) -> tuple[Examples, Examples]:
    found = fashion_mnist()
    return (found.train, found.test) if net == "MLP" else (halved(found.train), halved(found.test))


def trained(net: str, train: Examples, seed: int, epochs: int) -> nn.Module:
    """Adam, batches of 128."""
    model = build(mlp if net == "MLP" else convnet, seed)
    optimizer, g = torch.optim.Adam(model.parameters(), 1e-3), torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.split(torch.randperm(len(train), generator=g), 128):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(train.x[index]), train.y[index]))
            optimizer.step()
    return model.eval()


def uniform(model: nn.Module, bits: int, optimal: bool) -> CompressedModel:
    """Codes evenly spread over each tensor's range, or over the share of it with the least squared error."""
    made = in_half_precision(copy.deepcopy(model))
    for name, layer in list(made.named_modules()):
        if not is_compressible(layer):
            continue
        matrix = matrix_of(model, name)
        ends = torch.tensor([len(matrix)], dtype=torch.int32)
        low, high = float(matrix.min()), float(matrix.max())
        tried = []
        for share in torch.linspace(0.05, 1, 64).tolist() if optimal else [1.0]:
            codes = stored_type(torch.linspace(share * low, share * high, 2**bits)[None])
            coded = Coded(nearest_codes(matrix, codes.float(), ends), codes, None, ends, bits)
            tried.append((float((coded.dense() - matrix).square().sum()), coded))
        replace(made, name, coded_layer(layer, min(tried, key=lambda t: t[0])[1]))
    return CompressedModel(made)


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in torch.split(x, 1000)])


def _one(settings: Settings, net: str, seed: int, fast: bool) -> dict[str, Any]:
    """All arms of one network and seed: accuracy, error, bytes, jump; and the first layer for the picture."""

    def make() -> dict[str, Any]:
        train, test = _data(net)
        train = train.take(torch.arange(600)) if fast else train
        test = test.take(torch.arange(200)) if fast else test
        model = trained(net, train, seed, 1 if fast else 3)
        truth = _logits(model, test.x)
        found: dict[str, Any] = {"float": accuracy(truth, test.y), "arms": {}}
        for bits in BITS:
            for arm, options in ARMS.items():
                small, more = _compressed(model, train.x[:CALIBRATION], bits, arm, options, seed, fast)
                found["arms"][f"{arm}, {bits} bits"] = _scores(small, model, truth, test) | more
                if net == "MLP" and bits == BITS[0] and seed == 0 and arm in PICTURED:
                    found[f"neurons {arm}"] = _fields(model, small)
        return found

    name = f"{net}-{seed}"
    return dict(kept(settings, SLUG, name, {"fast": fast, "steps": STEPS, "version": 2}, make))


def _compressed(
    model: nn.Module, x: Tensor, bits: int, arm: str, options: dict[str, Any], seed: int, fast: bool
) -> tuple[CompressedModel, dict[str, float]]:
    if not options:
        return uniform(model, bits, "MSE" in arm), {}
    options = {"steps": 4 if fast else STEPS, "groups": 4} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the logits keep their order, as they should
        small, figures = compress(
            model, x, bits=bits, keep_first_last=False, candidates="all", seed=seed, **options
        )
    return small, {
        "predicted": figures.bytes,
        "jump": figures.layers[0].jump,
        "moved": figures.layers[0].moved,
    }


def _scores(small: CompressedModel, model: nn.Module, truth: Tensor, test: Examples) -> dict[str, float]:
    logits = _logits(small, test.x)
    with tempfile.TemporaryDirectory() as folder:
        file = small.save(Path(folder) / "model.safetensors")
        again = _logits(CompressedModel.load(file, model).eval(), test.x[:500])
        size = file.stat().st_size
    return {
        "accuracy": accuracy(logits, test.y),
        "error": float((logits - truth).square().mean() / truth.var()),
        "bytes": size,
        "reload": float((again - logits[:500]).abs().max()),
    }


PICTURED = ("uniform, min-max", "k-means", "joint, proximal")


def _fields(model: nn.Module, small: CompressedModel) -> list[list[list[float]]]:
    """First-layer weights of some neurons, float above compressed; the latter found again by their angle."""
    own, theirs = matrix_of(model, "1"), next(iter(small.coded.values())).coded.dense()
    at = own.norm(dim=1).argsort(descending=True)[:: len(own) // SHOWN][:SHOWN]
    match = (F.normalize(own[at], dim=1) @ F.normalize(theirs, dim=1).T).argmax(1)
    return [own[at].tolist(), theirs[match].tolist()]


def run(settings: Settings, fast: bool = False) -> Result:
    """Train, compress, judge by ``RULE``."""
    seeds = settings.seed_list(5 if settings.full else 3)
    tasks = [(settings, net, s, fast) for s in seeds for net in NETS]
    found = parallel(_one, tasks, settings, label="networks")
    by_net = {net: [f for t, f in zip(tasks, found, strict=True) if t[1] == net] for net in NETS}
    return judged(by_net)


def judged(by_net: dict[str, list[dict[str, Any]]]) -> Result:
    """The verdict by ``RULE``, and the rows."""
    cells = [(net, bits) for net in NETS for bits in BITS]

    def values(arm: str, key: str, net: str, bits: int) -> list[float]:
        return [f["arms"][f"{arm}, {bits} bits"][key] for f in by_net[net]]

    def mean(arm: str, key: str, over: Sequence[tuple[str, int]] = cells) -> list[float]:
        each = [values(arm, key, *cell) for cell in over]
        if key == "error":
            each = [torch.tensor(v, dtype=torch.double).log10().tolist() for v in each]
        return [sum(v) / len(v) for v in zip(*each, strict=True)]

    def less(a: str, b: str, over: Sequence[tuple[str, int]] = cells) -> Gain:
        return gain(mean(a, "error", over), mean(b, "error", over))

    def more(a: str, b: str) -> Gain:
        return gain(mean(a, "accuracy"), mean(b, "accuracy"))

    best, default = "joint, proximal", "joint, default gradient"
    at3, at2 = ([c for c in cells if c[1] == bits] for bits in (3, 2))
    plain = {b: more(best, b) for b in ("uniform, min-max", "uniform, MSE-optimal", "k-means")}
    lost = {net: gain(values(best, "accuracy", net, 3), [f["float"] for f in by_net[net]]) for net in NETS}
    arms = [a for net in NETS for f in by_net[net] for a in f["arms"].values()]
    off = max(abs(a["bytes"] / a["predicted"] - 1) for a in arms if "predicted" in a)
    gains = {
        "groups": less("k-means, 4 groups", "k-means"),
        "codes": less(best, "codes learned"),
        "codes accuracy": more(best, "codes learned"),
        "default 3": less(best, default, at3),
        "default 2": less(best, default, at2),
        "default accuracy": more(best, default),
        "sign": less(best, "joint, sign alone"),
        "distance": less("joint, proximal, distance start", "joint, default, distance start"),
    }
    met = [
        all(g.above() for g in plain.values()),
        gains["groups"].below(),
        gains["codes"].below(),
        gains["codes accuracy"].above(),
        gains["default 3"].below(-0.4771),
        gains["default 2"].below(),
        gains["default accuracy"].above(),
        gains["sign"].below(),
        gains["distance"].below(),
        all(g.above(-0.01) for g in lost.values()),
        off <= 0.01 and max(a["reload"] for a in arms) <= 1e-4,
    ]
    words = "accuracy: proximal - " + ", - ".join(f"{b} {g}" for b, g in plain.items())
    words += f", - codes alone {gains['codes accuracy']}, - default {gains['default accuracy']}, - float at 3 bits "
    words += ", ".join(f"{n} {g}" for n, g in lost.items())
    words += f"; log10 error: 4 groups - one {gains['groups']}, proximal - codes alone {gains['codes']}"
    words += (
        f", - default at 3 bits {gains['default 3']}, at 2 bits {gains['default 2']}, - sign {gains['sign']}"
    )
    words += f", from the distance start proximal - default {gains['distance']}"
    words += f"; largest miss of a predicted size {off:.2%}"
    rows = [Row(f"float, {net}", tuple(f["float"] for f in by_net[net]), "32 bits a weight") for net in NETS]
    rows += [
        Row(
            f"{arm}, {bits} bits, {net}",
            tuple(values(arm, "accuracy", net, bits)),
            _cost(values, arm, net, bits),
        )
        for net, bits in cells
        for arm in ARMS
    ]
    return Result(
        SLUG,
        TITLE,
        CLAIM,
        RULE,
        verdict_of(met),
        f"{sum(met)} of {len(met)} conditions met (all but {_unmet(met)}). {words}.",
        "test accuracy",
        tuple(rows),
        pictures=((f"{SLUG}.png", picture(by_net)),),
        links={"paper": "https://arxiv.org/abs/2309.17361"},
    )


def _unmet(met: Sequence[bool]) -> str:
    return ", ".join(str(k + 1) for k, m in enumerate(met) if not m) or "none"


def _cost(values: Any, arm: str, net: str, bits: int) -> str:
    size, error = (values(arm, key, net, bits) for key in ("bytes", "error"))
    text = f"{max(size):,.0f} bytes on disk; error {sum(error) / len(error):.3g}"
    if "joint" in arm:
        jump, moved = (values(arm, key, net, bits) for key in ("jump", "moved"))
        text += f"; first layer: jumps of {sum(jump) / len(jump):.2f} of the range, {sum(moved) / len(moved):.1%} moved"
    return text


def picture(by_net: dict[str, list[dict[str, Any]]]) -> bytes:
    """First-layer weights at 2 bits as images; error of the logits against accuracy lost, for every arm."""
    from matplotlib import colormaps

    figure = blank(figsize=(13, 8.4))
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.25))
    _neurons(top, by_net["MLP"][0])
    axes = bottom.subplots(1, len(NETS) * len(BITS))
    cells = [(net, bits) for net in NETS for bits in BITS]
    colours: Any = colormaps["tab20"].colors  # type: ignore[attr-defined]
    for axis, (net, bits) in zip(axes, cells, strict=True):
        for k, arm in enumerate(ARMS):
            found = [f["arms"][f"{arm}, {bits} bits"] for f in by_net[net]]
            lost = [100 * (f["float"] - a["accuracy"]) for f, a in zip(by_net[net], found, strict=True)]
            marker = (
                "s" if "uniform" in arm else "^" if "k-means" in arm else "D" if "distance" in arm else "o"
            )
            axis.plot(
                [a["error"] for a in found],
                lost,
                marker,
                color=colours[k],
                label=arm,
                markersize=7,
                alpha=0.9,
            )
        axis.set_xscale("log")
        axis.axhline(0, color="#33485a", linewidth=0.8)
        axis.set_yscale("symlog", linthresh=2)
        axis.set_yticks([-1, 0, 1, 2, 10, 50], ["-1", "0", "1", "2", "10", "50"])
        axis.set_title(f"{net}, {bits} bits", loc="left", fontsize=11)
        axis.set_xlabel("error of the logits", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("points of test accuracy lost")
    handles, labels = axes[0].get_legend_handles_labels()
    bottom.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return png(figure, dpi=120)


def _neurons(figure: Any, found: dict[str, Any]) -> None:
    fields = [(arm, found[f"neurons {arm}"]) for arm in PICTURED]
    rows = [("float, 32 bits", fields[0][1][0]), *((f"{arm}, 2 bits", f[1]) for arm, f in fields)]
    axes = figure.subplots(len(rows), SHOWN)
    limit = torch.tensor(rows[0][1]).abs().quantile(0.995)
    for (label, images), line in zip(rows, axes, strict=True):
        for image, axis in zip(images, line, strict=True):
            axis.imshow(torch.tensor(image).reshape(28, 28), cmap="RdBu_r", vmin=-limit, vmax=limit)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10)
    figure.suptitle("What first-layer neurons of the MLP look for (seed 0)", fontsize=12, x=0.01, ha="left")
