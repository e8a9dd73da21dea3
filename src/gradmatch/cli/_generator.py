"""A trained generator as a folder: how it is built from its settings, trained, kept and read back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from gradmatch.cli import _show
from gradmatch.core import checks
from gradmatch.core.examples import Examples
from gradmatch.core.networks import seeded
from gradmatch.core.quality import frechet_distance
from gradmatch.core.store import RunFolder, load_tensors, read_json, save_tensors, write_bytes
from gradmatch.generate import Labels, LatentFlow, bellman_steps
from gradmatch.zoo import autoencoder, dit, fit_autoencoder, unet

FLOW, CODER, COSTS = "flow.safetensors", "autoencoder.safetensors", "bellman.safetensors"
_SMALLEST, _CHANNELS = 8, 4


class Generator:
    """Latent flow matching with the networks of the zoo.

    Args:
        config: the settings that decide the result, as in ``run.json``.
        folder: where it lives.
        device: default the CPU.
    """

    def __init__(self, config: dict[str, Any], folder: Path, device: str | None = None) -> None:
        self.config, self.folder, self.device = config, Path(folder), device or "cpu"
        channels, height, width = self._shape()
        for name in ("steps", "batch"):
            checks.whole(f"--{name}", config[name])
        checks.whole("--autoencoder-steps", config["autoencoder_steps"], 0)
        checks.one_of("--backbone", config["backbone"], ("unet", "dit"))
        checks.positive("--lr", config["lr"])
        halvings, side = 0, height
        while config["autoencoder_steps"] and side > _SMALLEST:
            halvings, side = halvings + 1, -(-side // 2)
        checks.require(
            height == width and height == side * 2**halvings,
            f"DATA has images of {height} x {width}; they must be square, and halve evenly down to {_SMALLEST} or "
            "less (bring a folder's images to such a side with --size, or train on pixels: --autoencoder-steps 0).",
        )
        with seeded(config["seed"]):
            widths = [8, *[16] * halvings]
            self.coder = autoencoder(channels, _CHANNELS, widths).to(self.device) if halvings else None
            self.latent = (_CHANNELS if halvings else channels, side, side)
            net = self._backbone(0 if halvings else 1)
        condition = Labels(config["classes"]) if config["classes"] else None
        self.flow = LatentFlow(self.coder, net, condition=condition).to(self.device)

    def _shape(self) -> tuple[int, int, int]:
        shape = self.config["shape"]
        checks.require(len(shape) == 3, f"DATA has inputs of shape {tuple(shape)}; generation needs images.")
        return tuple(shape)

    def _backbone(self, extra_levels: int) -> torch.nn.Module:
        channels, side, _ = self.latent
        classes, width = self.config["classes"] or None, checks.whole("--width", self.config["width"])
        if self.config["backbone"] == "dit":
            return dit(channels, side, width, patch=1 if side <= 8 else 2, classes=classes)
        return unet(channels, side, width, levels=1 + 2 * extra_levels, classes=classes)

    def train(self, data: Examples, resume: bool, save_every: float, after: Callable[[int], object]) -> None:
        """Train both parts, going on from what the folder holds if ``resume``."""
        run = RunFolder(self.folder, self.config, resume)
        images = (data.x * 2 - 1).to(self.device)
        if self.coder is not None:
            self._train_coder(images, save_every)
        if (self.folder / FLOW).exists():
            self.flow.load_state_dict(load_tensors(self.folder / FLOW, self.device)[0])
            return
        config = self.config
        with _show.progress_bar("flow", config["steps"]) as advance:
            self.flow.fit(
                (images, data.y.to(self.device)), config["steps"], batch=config["batch"], lr=config["lr"],
                schedule="cosine", warmup=min(100, config["steps"] // 10), clip=1.0, ema=0.99, seed=config["seed"],
                after=after, progress=advance, run=run, save_every=save_every,
            )  # fmt: skip
        run.finish(lambda folder: save_tensors(folder / FLOW, self.flow.state_dict()))

    def _train_coder(self, images: Tensor, save_every: float) -> None:
        coder, file = self.coder, self.folder / CODER
        assert coder is not None
        if not file.exists():
            own = RunFolder(self.folder / "autoencoder", self.config, resume=True)
            steps = self.config["autoencoder_steps"]
            with _show.progress_bar("autoencoder", steps) as advance:
                fit_autoencoder(
                    coder, images, steps, lr=4e-3, batch=32, seed=self.config["seed"], progress=advance, run=own,
                    save_every=save_every,
                )  # fmt: skip
            own.finish(lambda _: save_tensors(file, coder.state_dict()))
        coder.load_state_dict(load_tensors(file, self.device)[0])

    @classmethod
    def load(cls, folder: Path, device: str | None = None) -> Self:
        """A trained model from its folder.

        Raises:
            InputError: there is none, or its training is not over.
        """
        checks.require(
            (Path(folder) / "run.json").exists(),
            f"DIR {str(folder)!r} holds no model; 'gradmatch generate train' makes one.",
        )
        found = cls(read_json(Path(folder) / "run.json"), Path(folder), device)
        checks.require(
            (found.folder / FLOW).exists(),
            f"DIR {str(folder)!r} holds a training that is not over; go on with its command and --resume.",
        )
        if found.coder is not None:
            found.coder.load_state_dict(load_tensors(found.folder / CODER, found.device)[0])
        found.flow.load_state_dict(load_tensors(found.folder / FLOW, found.device)[0])
        found.flow.eval()
        return found

    def noise(self, n: int, seed: int) -> Tensor:
        """Starting points (n, ...)."""
        return torch.randn(n, *self.latent, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def labels(self, n: int, label: int | None = None) -> Tensor | None:
        """Labels in turn, or one for all; None without labels."""
        classes = self.config["classes"]
        if label is not None:
            checks.require(classes > 0, "--label is given, but the model was trained with --no-labels.")
            checks.whole("--label", label, 0, classes - 1)
            return torch.full((n,), label, device=self.device)
        return torch.arange(n, device=self.device) % classes if classes else None

    def pixels(self, images: Tensor) -> Tensor:
        """Images in [0, 1] on the CPU."""
        return ((images + 1) / 2).clamp(0, 1).cpu()

    def times(self, schedule: str, steps: int, guidance: float = 1.0) -> Tensor:
        """Times (steps + 1,) from noise at 1 to data at 0; the costs of Bellman's are measured once and kept."""
        if schedule == "uniform":
            return torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        from gradmatch.core.schedule import shortest_path

        checks.whole("--steps", steps, 1, 100)
        file, facts = self.folder / COSTS, {"guidance": guidance, "version": 1}
        if not file.exists() or load_tensors(file)[1] != facts:
            grid, cost = self._costs(guidance)
            save_tensors(file, {"grid": grid, "cost": cost.nan_to_num(posinf=-1.0)}, facts)
        found, _ = load_tensors(file)
        cost = torch.where(found["cost"] < 0, torch.inf, found["cost"])
        return found["grid"][shortest_path(cost, steps)[0]]

    def _costs(self, guidance: float) -> tuple[Tensor, Tensor]:
        from gradmatch.core.guidance import ClassifierFreeGuidance

        flow, model = self.flow, self.flow.field
        labels = self.labels(100)
        ready = flow.prepared(labels, None, self.latent[1:])
        if guidance != 1:
            checks.require(
                bool(ready), f"--guidance is {guidance:g}, but the model was trained with --no-labels."
            )
            model = ClassifierFreeGuidance(guidance, flow.condition.null(ready)).wrap(model, flow.path)
        with _show.progress_bar("measuring jumps", 1) as advance:
            _, cost = bellman_steps(
                model, self.noise(100, 10_000), 1, 100, path=flow.path, cond=ready or None, return_cost=True
            )
            advance(1, 1, {})
        return torch.linspace(1, 0, 101, dtype=torch.float64), cost

    def distance(self) -> tuple[Callable[[Tensor], float], str]:
        """The Frechet distance of images in [0, 1] to the data's test images, and in what features."""
        from gradmatch.datasets import load
        from gradmatch.zoo.judge import fashion_judge, seen

        test = load(self.config["data"], size=self.config["size"]).test.x
        if self.config["data"] == "fashion-mnist":
            net = fashion_judge()
            real = seen(net, test)[0]
            return lambda images: frechet_distance(seen(net, images)[0], real), "the judge's features"
        flat = test.flatten(1).double()
        basis = torch.linalg.svd(flat - flat.mean(0), full_matrices=False).Vh[:32].T
        return (
            lambda images: frechet_distance(images.flatten(1).double() @ basis, flat @ basis),
            "32 principal components",
        )

    def picture(self, strips: Sequence[Tensor], file: Path) -> Path:
        """Write images (n, c, h, w) in [0, 1]: one set as a square sheet, several as rows."""
        import io

        from PIL import Image

        if len(strips) == 1:
            across = int(np.ceil(np.sqrt(len(strips[0]))))
            strips = torch.split(strips[0], across)
        wide = max(len(s) for s in strips)
        rows = [torch.cat([s, s.new_zeros(wide - len(s), *s.shape[1:])]) for s in strips]
        grid = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
        array = (grid * 255).round().byte().permute(1, 2, 0).numpy()
        k = max(1, 56 // strips[0].shape[-1])
        array = array.repeat(k, 0).repeat(k, 1)
        buffer = io.BytesIO()
        Image.fromarray(array[..., 0] if array.shape[2] == 1 else array[..., :3]).save(buffer, "PNG")
        return write_bytes(file, buffer.getvalue())
