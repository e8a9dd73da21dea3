"""One outer loop of DCC against the official program (Saehyung-Lee/DCC), unmodified, on the same data and network.

``GRADMATCH_PEER_DCC`` names a checkout of the official repository. Its ``main.py`` is run as it is, with one outer
loop and no evaluation; torchvision, which it imports for loading and saving pictures, is stood in for by empty names
where it is not installed. Work: 10 classes x 256 images of 28 x 28, ten images per class, batch_real 256, ConvNet-3,
ten contrastive image updates with fifty epochs of training after each but the last.

Each side runs in a process of its own, alternately: ours with freed memory kept, as the gradmatch program does, the
official one as Python starts it. As every real image is used at every update, both do exactly the same work, and the
first distance and the first update are compared (and, loosely, the later distances).

``GRADMATCH_RACE_WIDTHS`` (default "32,128") chooses the widths, ``GRADMATCH_RACE_LOOPS`` (default "10,50") the image
updates and epochs, for a quick look, and ``GRADMATCH_RACE_THREADS`` (default 2) the threads of both sides.
"""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import os
import sys
import tempfile
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import _timer

CLASSES, PER_CLASS, REAL = 10, 10, 256
THREADS = int(os.environ.get("GRADMATCH_RACE_THREADS", "2"))
INNER, EPOCHS = map(int, os.environ.get("GRADMATCH_RACE_LOOPS", "10,50").split(","))


@functools.lru_cache(maxsize=1)
def data() -> tuple[Tensor, Tensor]:
    """Blurred noise with class means; the figures do not depend on what the images show."""
    g = torch.Generator().manual_seed(0)
    means = torch.nn.functional.interpolate(
        torch.randn(CLASSES, 1, 4, 4, generator=g), size=28, mode="bilinear"
    )
    y = torch.arange(CLASSES).repeat_interleave(REAL)
    return means[y] + 0.5 * torch.randn(len(y), 1, 28, 28, generator=g), y


def start_images() -> Tensor:
    """What the synthetic images start from: the first ten of every class."""
    return torch.cat([data()[0][c * REAL : c * REAL + PER_CLASS] for c in range(CLASSES)])


def weights(width: int) -> list[Tensor]:
    """The parameters of the network that both sides use."""
    from gradmatch.core.networks import build
    from gradmatch.zoo import convnet

    return [p.detach() for p in build(lambda: convnet(width=width), 0).parameters()]


def watched(module: torch.nn.Module, width: int, seen: list[Tensor]) -> torch.nn.Module:
    """The network with the common weights; the synthetic images that go through it are kept in ``seen``."""
    with torch.no_grad():
        for p, value in zip(module.parameters(), weights(width), strict=True):
            p.copy_(value)

    def keep(_: Any, inputs: tuple[Tensor]) -> None:
        if inputs[0].requires_grad:
            seen.append(inputs[0].detach().clone())

    module.register_forward_pre_hook(keep)
    return module


# --- ours ----------------------------------------------------------------------------------------------------


def start_ours() -> None:
    """Settings of the gradmatch program."""
    from gradmatch.core.cpu import keep_freed_memory

    torch.set_num_threads(THREADS)
    keep_freed_memory()


def ours(width: int) -> tuple[Tensor, list[float]]:
    """Images after one update, and the distance at every update."""
    from gradmatch.data import DCC, SyntheticDataset
    from gradmatch.zoo import convnet

    seen: list[Tensor] = []
    losses: list[float] = []
    labels = torch.arange(CLASSES).repeat_interleave(PER_CLASS)
    options = {"inner_loop": INNER, "net_epochs": EPOCHS, "inner_warmup": 0, "batch_real": REAL}
    DCC(per_class=PER_CLASS, outer_loop=1, standardise=False, **options).distill(
        data(),
        lambda: watched(convnet(width=width), width, seen),
        init=SyntheticDataset(start_images(), labels, CLASSES),
        progress=lambda done, steps, figures: losses.append(figures["loss"]),
    )
    return seen[1], losses


# --- the official program ------------------------------------------------------------------------------------


def start_theirs(checkout: str) -> None:
    """Make the official files importable."""
    torch.set_num_threads(THREADS)
    sys.path.insert(0, checkout)
    try:
        import torchvision  # noqa: F401
    except ImportError:
        names = ("torchvision", "torchvision.utils", "torchvision.datasets", "torchvision.transforms")
        stubs = {name: types.ModuleType(name) for name in names}
        stubs["torchvision.utils"].save_image = lambda *args, **options: None  # type: ignore[attr-defined]
        for name in names[1:]:
            setattr(stubs["torchvision"], name.split(".")[1], stubs[name])
        sys.modules.update(stubs)
    if (
        "scipy.ndimage.interpolation" not in sys.modules
    ):  # gone from today's SciPy; the program's name for rotate
        import scipy.ndimage

        old = types.ModuleType("scipy.ndimage.interpolation")
        old.rotate = scipy.ndimage.rotate  # type: ignore[attr-defined]
        sys.modules["scipy.ndimage.interpolation"] = old


def theirs(width: int) -> tuple[Tensor, list[float]]:
    """Images after one update, and the distance at every update, of the official ``main()``."""
    import logging

    import main as program  # type: ignore[import-not-found]

    logging.raiseExceptions = False  # one of its messages has more arguments than places
    x, y = data()
    rows = [(x[i], int(y[i])) for i in range(len(y))]
    program.get_dataset = lambda *args: (1, (28, 28), CLASSES, [], [0.0], [1.0], rows, rows, None)
    factory, distance = (getattr(sys.modules["utils"], name) for name in ("get_network", "match_loss"))
    losses: list[float] = []
    seen: list[Tensor] = []

    def network(*args: Any) -> torch.nn.Module:
        return watched(factory(*args), width, seen)

    def match(*args: Any) -> Tensor:
        loss = distance(*args)
        losses.append(float(loss.detach()))
        return loss

    program.get_network, program.match_loss = network, match
    program.get_loops = lambda per_class: (INNER, EPOCHS)
    with tempfile.TemporaryDirectory() as folder, _changed(folder, width):
        program.main()
    return seen[1], losses


@contextlib.contextmanager
def _changed(folder: str, width: int) -> Any:
    """Its arguments, the same first images as ours, nothing written, and its log thrown away."""
    import numpy as np

    options = ["--model", f"ConvNetW{width}", "--ipc", str(PER_CLASS), "--num_exp", "1", "--num_eval", "0"]
    options += [
        "--eval_freq",
        "1",
        "--outer_loop",
        "1",
        "--outer_warmup",
        "0",
        "--inner_warmup",
        "0",
        "--contrast",
    ]
    options += ["--data_path", folder, "--save_path", folder]
    argv, save, permutation = sys.argv, torch.save, np.random.permutation
    sys.argv = ["main.py", *options]
    torch.save = lambda value, path: None
    np.random.permutation = np.asarray  # type: ignore[assignment]  # all images are used; the first ones start
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        sys.argv, torch.save, np.random.permutation = argv, save, permutation


# --- the race ------------------------------------------------------------------------------------------------


def agree(a: tuple[Tensor, list[float]], b: tuple[Tensor, list[float]]) -> None:
    """Equal first distance and first update of the images; later ones drift apart by rounding."""
    assert len(a[1]) == len(b[1]) == INNER, f"{len(a[1])} and {len(b[1])} updates"
    assert abs(a[1][0] - b[1][0]) <= 1e-4 * abs(b[1][0]), f"first distances {a[1][0]} and {b[1][0]}"
    moved = [images - start_images() for images, _ in (a, b)]
    off = float((moved[0] - moved[1]).norm() / moved[1].norm())
    assert off < 1e-3, f"the first update moved the images differently by {off:.2%}"
    sums = sum(a[1]), sum(b[1])
    assert abs(sums[0] - sums[1]) <= 0.02 * sums[1], (
        f"distances of the whole run add up to {sums[0]} and {sums[1]}"
    )


def run() -> None:
    """Race both widths."""
    checkout = os.environ.get("GRADMATCH_PEER_DCC", "")
    if not (Path(checkout) / "main.py").is_file() or not checkout:
        _timer.missing("Saehyung-Lee/DCC", "GRADMATCH_PEER_DCC does not name a checkout of it")
        return
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, context, start_ours) as left,
        ProcessPoolExecutor(1, context, start_theirs, (checkout,)) as right,
    ):
        for width in map(int, os.environ.get("GRADMATCH_RACE_WIDTHS", "32,128").split(",")):
            _timer.race(
                f"DCC, one outer loop, ConvNet-3 of width {width}",
                lambda width=width: left.submit(ours, width).result(),
                lambda width=width: right.submit(theirs, width).result(),
                peer="official",
                rounds=3 if width <= 32 else 1,
                warmup=0,
                check=agree,
                target=3.0,
                unit="s",
            )


if __name__ == "__main__":
    _timer.main(run)
