"""Per-example gradient features on disk: written once, in parts, and read lazily by whoever needs them."""

from __future__ import annotations

import bisect
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Size, Tensor

from gradmatch.core._params import ParamSpace
from gradmatch.core._projection import SparseProjection
from gradmatch.core.checks import InputError, listing, one_of, refuse, require, whole
from gradmatch.core.problem import Problem
from gradmatch.core.store import read_json, write_bytes, write_json

__all__ = ["GradientStore"]

MANIFEST = "gradients.json"
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
Progress = Callable[[int, int], object]


class GradientStore:
    """Gradient features [n, k] of the examples of a problem, in a folder, read where they are asked for.

    Row i is the gradient of example i's loss in the chosen parameters, projected to k numbers so that inner products
    are kept (see :class:`~gradmatch.core._projection.SparseProjection`), or whole. Parts are memory-mapped safetensors
    files; nothing is read before it is asked for.

    Args:
        path: a folder that :meth:`build` or :meth:`merge` made.
        problem: refuse the store unless it holds the gradients of this problem's model, loss, data and parameters.

    Raises:
        InputError: no store there, or one of another problem.

    >>> import tempfile
    >>> from torch import nn
    >>> problem = Problem(nn.Linear(30, 5), "cross_entropy", (torch.randn(20, 30), torch.arange(20) % 5))
    >>> store = GradientStore.build(problem, tempfile.mkdtemp() + "/gradients", project=64)
    >>> store.shape, store[3].shape, store[[0, 5]].shape, store[2:6].shape
    ((20, 64), torch.Size([64]), torch.Size([2, 64]), torch.Size([4, 64]))
    """

    def __init__(self, path: str | Path, problem: Problem | None = None) -> None:
        self.path = Path(path)
        file = self.path / MANIFEST
        require(file.is_file(), f"{str(self.path)!r} holds no gradients: there is no {MANIFEST} in it.")
        self.manifest: dict[str, Any] = read_json(file)
        self._stops = [stop for _, stop in self.manifest["parts"]]
        self._open: dict[int, dict[str, Tensor]] = {}
        if problem is not None:
            compare(self.path, self.manifest, identity(problem))

    @classmethod
    def build(
        cls,
        problem: Problem,
        path: str | Path,
        *,
        project: int | None = 2048,
        seed: int = 0,
        dtype: str = "float32",
        part_rows: int = 512,
        shard: tuple[int, int] = (0, 1),
        workers: int | None = 1,
        progress: Progress | None = None,
    ) -> GradientStore:
        """Compute the features of all examples, or go on with a folder in which some are.

        Memory is bounded by the activations of one batch, 128 MiB of gradient rows and one part. Every process
        computes on one thread on a CPU, so that the bytes do not depend on how the work was shared or interrupted.

        Args:
            problem: model, loss, data and parameters (``Problem(..., select=REGEX)``).
            path: folder of the store. Parts found in it are kept; a store of other settings is refused.
            project: k, a multiple of 4; None keeps whole gradients.
            seed: of the projection. Stores of one seed and the same parameters have comparable rows.
            dtype: "float32", "float16", "bfloat16" or "float64" on disk.
            part_rows: examples in a part, rounded up to whole batches.
            shard: (i, m): only every m-th part from the i-th on, for work spread over machines; see :meth:`merge`.
            workers: processes; None: as many as cores, if what is left after the first part repays starting them.
            progress: called with (examples done, of all) after every part.

        Raises:
            InputError: active dropout or batch norm, changing data, or a folder with another store.
        """
        from gradmatch.core._gradient_writer import write

        for name in ("dropout", "batchnorm"):
            active = problem.active(name)
            require(not active, f"model has active {name} in {listing(active)}; call model.eval().")
        require(len(shard) == 2, f"shard is {shard!r}; it must be (i, m).")
        number = whole("shard", shard[0], 0, whole("shard", shard[1]) - 1)
        if project is not None:
            whole("project", project)
        settings = {
            "width": problem.space.size if project is None else project,
            "projection": None if project is None else {"kind": "sparse", "seed": whole("seed", seed, 0)},
            "dtype": one_of("dtype", dtype, tuple(DTYPES)),
            "parts": _parts(problem.data.sizes, whole("part_rows", part_rows)),
            "batches": _runs(problem.data.sizes),
        }
        manifest = {"format": "gradmatch gradients 1", **identity(problem), **settings}
        folder = Path(path)
        require(not folder.exists() or folder.is_dir(), f"{str(folder)!r} is a file; it must be a folder.")
        if (folder / MANIFEST).exists():
            compare(folder, read_json(folder / MANIFEST), manifest)
        else:
            write_json(folder / MANIFEST, manifest)
        store = cls(folder)
        write(problem, store, list(range(len(manifest["parts"])))[number :: shard[1]], workers, progress)
        return store

    @classmethod
    def merge(cls, path: str | Path, *stores: str | Path | GradientStore) -> GradientStore:
        """One store of the parts of several shards; equal to the store of an unsharded run, byte by byte.

        Raises:
            InputError: shards of different problems or settings.
        """
        opened = [s if isinstance(s, GradientStore) else cls(s) for s in stores]
        require(bool(opened), "stores is empty; at least one is needed.")
        folder = Path(path)
        held = [cls(folder)] if (folder / MANIFEST).exists() else []
        for other in held + opened[1:]:
            compare(other.path, other.manifest, opened[0].manifest)
        for source in opened:
            for part in source.present():
                if not part_file(folder, part).exists():
                    source._part(part)  # refuses a broken file
                    write_bytes(part_file(folder, part), part_file(source.path, part).read_bytes())
        write_json(folder / MANIFEST, opened[0].manifest)
        return cls(folder)

    # --- what it holds ---------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return int(self.manifest["examples"])

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k)."""
        return len(self), int(self.manifest["width"])

    @property
    def space(self) -> ParamSpace:
        """The blocks the gradients are made of."""
        blocks = self.manifest["blocks"]
        dtypes = tuple(getattr(torch, b["dtype"]) for b in blocks.values())
        shapes = tuple(Size(b["shape"]) for b in blocks.values())
        return ParamSpace(tuple(blocks), shapes, dtypes, torch.device("cpu"))

    @property
    def complete(self) -> bool:
        """Whether all parts are there."""
        return len(self.present()) == len(self._stops)

    def present(self) -> list[int]:
        """Numbers of the parts that are there."""
        return [k for k in range(len(self._stops)) if part_file(self.path, k).exists()]

    @property
    def norms(self) -> Tensor:
        """Exact norm [n] of every example's unprojected gradient, float64."""
        return torch.cat([self._part(k)["norms"] for k in range(len(self._stops))])

    def projection(self, device: torch.device | str = "cpu") -> SparseProjection | None:
        """The map that made the rows, for gradients of other origin; None if they are whole."""
        made = self.manifest["projection"]
        space = replace(self.space, device=torch.device(device))
        return None if made is None else SparseProjection(space, self.shape[1], made["seed"])

    # --- reading ---------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Tensor]:
        """The rows part by part, each a mapped tensor [m, k]."""
        return (self._part(k)["features"] for k in range(len(self._stops)))

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Tensor:
        """One row [k] for a whole number, else the rows [m, k] at a slice, a mask or whole numbers."""
        if isinstance(index, int):
            return self._rows([range(len(self))[index]])[0]
        if isinstance(index, slice):
            return self._rows(range(len(self))[index])
        wanted = torch.as_tensor(index)
        wanted = wanted if wanted.numel() else wanted.long()  # an empty list has no type of its own
        if wanted.dtype == torch.bool:
            require(
                wanted.shape == (len(self),),
                f"index is a mask of shape {tuple(wanted.shape)}; it must be ({len(self)},).",
            )
            wanted = torch.nonzero(wanted).flatten()
        require(
            wanted.ndim == 1 and not wanted.is_floating_point(),
            f"index is {wanted.dtype} of shape {tuple(wanted.shape)}; it must be whole numbers in one dimension.",
        )
        outside = wanted[(wanted < -len(self)) | (wanted >= len(self))].tolist()
        require(not outside, f"index has {listing(outside)}; there are {len(self)} examples.")
        return self._rows((wanted % len(self)).tolist())

    def _rows(self, index: Sequence[int]) -> Tensor:
        out = torch.empty(len(index), self.shape[1], dtype=DTYPES[self.manifest["dtype"]])
        parts = [bisect.bisect_right(self._stops, i) for i in index]
        begin = 0
        while begin < len(index):  # runs of rows from one part, so that slices are copied in blocks
            number, end = parts[begin], begin
            while end < len(index) and parts[end] == number:
                end += 1
            start = self.manifest["parts"][number][0]
            places = torch.tensor([i - start for i in index[begin:end]])
            torch.index_select(self._part(number)["features"], 0, places, out=out[begin:end])
            begin = end
        return out

    def _part(self, number: int) -> dict[str, Tensor]:
        """One part, mapped: its tensors take memory only where they are touched."""
        if number not in self._open:
            file, (start, stop) = part_file(self.path, number), self.manifest["parts"][number]
            require(
                file.exists(),
                f"{str(self.path)!r} has {len(self.present())} of {len(self._stops)} parts and lacks {file.name}; "
                "build it again to go on, or merge the other shards.",
            )
            try:
                with safe_open(str(file), framework="pt") as opened:
                    found = {name: opened.get_tensor(name) for name in ("features", "norms")}
            except (SafetensorError, OSError) as error:
                raise InputError(f"{file} is not a readable part of a store: {error}.") from error
            fits = (
                found["features"].shape == (stop - start, self.shape[1])
                and len(found["norms"]) == stop - start
            )
            require(
                fits,
                f"{file} has shape {tuple(found['features'].shape)}; the store needs {(stop - start, self.shape[1])}.",
            )
            self._open[number] = found
        return self._open[number]


def part_file(folder: Path, number: int) -> Path:
    """Where a part lies."""
    return folder / f"part-{number:06d}.safetensors"


def compare(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse a store whose manifest differs from what is ``wanted``."""
    for key, value in wanted.items():
        if found.get(key) != value:
            mine, theirs = (json.dumps(v)[:80] for v in (found.get(key), value))
            refuse(
                f"{str(path)!r} holds gradients with {key} {mine}, and this one has {theirs}; they must agree."
            )


def identity(problem: Problem) -> dict[str, Any]:
    """What decides the gradients, as JSON values."""
    space = problem.space
    return {
        "examples": problem.n,
        "loss": problem.loss_name,
        "blocks": {
            name: {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
            for name, shape, dtype in zip(space.names, space.shapes, space.dtypes, strict=True)
        },
        "model": _model_fingerprint(problem),
        "data": problem.data.fingerprint(),
    }


def _model_fingerprint(problem: Problem) -> str:
    """Of all parameters and buffers, and of how the module prints, which tells layers and their settings."""
    tensors = dict(problem.live_params())
    code = hashlib.sha256()
    if problem.module is not None:
        tensors |= dict(problem.module.named_buffers())
        code.update(re.sub(r" at 0x[0-9a-f]+", "", repr(problem.module)).encode())
    for name, tensor in tensors.items():
        code.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        code.update(flat)
    return code.hexdigest()[:16]


def _parts(sizes: Sequence[int], rows: int) -> list[list[int]]:
    """[start, stop] of runs of whole batches with at least ``rows`` examples each, but for the last."""
    parts, start, stop = [], 0, 0
    for size in sizes:
        stop += size
        if stop - start >= rows:
            parts.append([start, stop])
            start = stop
    return parts if start == stop else [*parts, [start, stop]]


def _runs(sizes: Sequence[int]) -> list[list[int]]:
    """Batch sizes as [size, how many in a row]; rounding depends on them."""
    runs: list[list[int]] = []
    for size in sizes:
        if runs and runs[-1][0] == size:
            runs[-1][1] += 1
        else:
            runs.append([size, 1])
    return runs
