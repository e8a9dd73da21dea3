"""State dicts tensor by tensor: read lazily from wherever a model lies, written in a stream, never whole in memory.

A source is an ``nn.Module``, a mapping of tensors, a .safetensors file, or a folder with one or with the shards and the
index of Hugging Face. Merging, permuting, transplanting and compressing then need about one tensor of each model, or a
few pieces of one, instead of the models. Types are kept; tied weights appear once; nothing is unpickled.

>>> import tempfile
>>> model = open_state_dict({"w": torch.eye(2), "b": torch.zeros(2)})
>>> path = write_state_dict(tempfile.mkdtemp() + "/m.safetensors", model.specs, lambda name: [model.read(name) + 1])
>>> open_state_dict(path).read("b")
tensor([1., 1.])
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from gradmatch.core._safetensors import DTYPES, Spec, Stored, aligned, read_header, write_stream
from gradmatch.core.checks import listing, positive, refuse, require
from gradmatch.core.store import new_file, new_folder, read_json, write_json

__all__ = ["PIECE", "SHARD", "Spec", "StateDict", "companions", "open_state_dict", "write_state_dict"]

PIECE = 2**19
"""Numbers in a piece of a tensor: a few of them fit a core's second-level cache."""
SHARD = 5 * 10**9
"""Bytes in a shard, as transformers splits."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_COMPANIONS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class StateDict:
    """Named tensors of one model, each read when asked for.

    Attributes:
        specs: type and shape of every tensor, in the model's order; tied names are left out.
        tied: for each further name of a tensor, the name it goes by in ``specs``.
        buffers: names known to be buffers (of a module), or ``None`` where files do not tell.
        folder: where it was read from, if a folder.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor | Stored],
        name: str,
        *,
        tied: Mapping[str, str] | None = None,
        buffers: frozenset[str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self._tensors = dict(tensors)
        self.name, self.buffers, self.folder = name, buffers, folder
        self.tied = dict(tied or {})
        self.specs = {k: t.spec if isinstance(t, Stored) else Spec.of(t) for k, t in self._tensors.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors or name in self.tied

    def __len__(self) -> int:
        return len(self._tensors)

    def _held(self, name: str) -> Tensor | Stored:
        require(name in self, f"{self.name} has no tensor {name!r}; it has {listing(list(self.specs))}.")
        return self._tensors[self.tied.get(name, name)]

    def spec(self, name: str) -> Spec:
        """Type and shape of one tensor, also by a tied name."""
        held = self._held(name)
        return held.spec if isinstance(held, Stored) else Spec.of(held)

    def read(self, name: str) -> Tensor:
        """One whole tensor; of a module or mapping the tensor itself, which must not be written to."""
        held = self._held(name)
        return held.read().reshape(held.spec.shape) if isinstance(held, Stored) else held.detach()

    def pieces(self, name: str, numbers: int = PIECE) -> Iterator[Tensor]:
        """The flattened tensor in consecutive parts of ``numbers``; from a file each overwrites the one before."""
        held = self._held(name)
        if not isinstance(held, Stored):
            yield from held.detach().reshape(-1).split(numbers)
            return
        total = held.spec.numel
        buffer = torch.empty(min(numbers, total) * held.spec.dtype.itemsize, dtype=torch.uint8)
        for first in range(0, total, numbers):
            yield held.read(first, min(first + numbers, total), buffer)

    def tensors(self) -> dict[str, Tensor]:
        """All of them in memory, tied names sharing one tensor."""
        whole = {name: self.read(name) for name in self.specs}
        return whole | {name: whole[first] for name, first in self.tied.items()}


# --- reading -----------------------------------------------------------------------------------------------


def open_state_dict(source: Any, name: str = "model") -> StateDict:
    """The state dict of a module, a mapping of tensors, a .safetensors file or a folder of them.

    Of a folder: ``model.safetensors``, else the shards that its index names, else its only .safetensors file.

    Args:
        name: how to speak of it in a refusal.

    Raises:
        InputError: nothing to read there, pickled weights, a broken, truncated or inconsistent file, an index that
            names files elsewhere, or a name that stands in two shards.
    """
    if isinstance(source, StateDict):
        return source
    if isinstance(source, nn.Module):
        buffers = frozenset(k for k, _ in source.named_buffers(remove_duplicate=False))
        tensors, tied = _untied(source.state_dict(keep_vars=True), name)
        return StateDict(tensors, name, tied=tied, buffers=buffers)
    if isinstance(source, Mapping):
        tensors, tied = _untied(source, name)
        return StateDict(tensors, name, tied=tied)
    require(
        isinstance(source, str | Path),
        f"{name} is {type(source).__name__}; it must be a module, a state dict or a path.",
    )
    path = Path(source)
    require(path.exists(), f"{name} {str(path)!r} does not exist.")
    if path.is_dir():
        return StateDict(_folder(path), str(path), folder=path)
    require(
        path.suffix not in _PICKLES, f"{path} is a pickle, which is never read; save it as safetensors first."
    )
    return StateDict(read_header(path)[0], str(path))


def _untied(tensors: Mapping[str, Any], name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by the first of their names, and the further names of those that are tied."""
    first: dict[tuple[Any, ...], str] = {}
    kept, tied = {}, {}
    for key, t in tensors.items():
        require(isinstance(t, Tensor), f"{name}[{key!r}] is {type(t).__name__}; it must be a tensor.")
        place = (t.data_ptr(), t.device, t.dtype, t.shape, t.stride())
        if t.numel() and place in first:
            tied[key] = first[place]
        else:
            first[place], kept[key] = key, t
    require(bool(kept), f"{name} holds no tensor.")
    return kept, tied


def _folder(path: Path) -> dict[str, Stored]:
    for weights, index in ((WEIGHTS, INDEX), *_others(path)):
        if weights and (path / weights).is_file():
            return read_header(path / weights)[0]
        if index and (path / index).is_file():
            return _shards(path, index)
    pickles = sorted(f.name for f in path.iterdir() if f.suffix in _PICKLES)
    if pickles:
        refuse(f"{path} holds {listing(pickles)}; pickles are never read, so save it as safetensors first.")
    return refuse(f"{path} holds no {WEIGHTS}, no {INDEX} and not exactly one other .safetensors file.")


def _others(path: Path) -> list[tuple[str, str]]:
    """The one other index or weight file of a folder, if it is the only one."""
    indices = sorted(f.name for f in path.glob("*.safetensors.index.json"))
    if indices:
        return [("", indices[0])] if len(indices) == 1 else []
    files = sorted(f.name for f in path.glob("*.safetensors"))
    return [(files[0], "")] if len(files) == 1 else []


def _shards(path: Path, index: str) -> dict[str, Stored]:
    found = read_json(path / index)
    where = found.get("weight_map") if isinstance(found, dict) else None
    require(isinstance(where, dict) and bool(where), f"{path / index} has no weight_map.")
    assert isinstance(where, dict)
    headers: dict[str, dict[str, Stored]] = {}
    for file in dict.fromkeys(where.values()):
        plain = isinstance(file, str) and Path(file).name == file and "\\" not in file and "\0" not in file
        require(
            plain and file.endswith(".safetensors"),
            f"{path / index} names the file {file!r}; it may only name .safetensors files beside it.",
        )
        headers[file] = read_header(path / file)[0]
        for name in headers[file]:
            require(
                where.get(name) == file,
                f"{path / file} holds {name!r}, which the index puts into {where.get(name)!r}.",
            )
    for name, file in where.items():
        require(name in headers[file], f"{path / index} puts {name!r} into {file}, which does not hold it.")
    return {name: headers[file][name] for name, file in where.items()}


# --- writing -----------------------------------------------------------------------------------------------


def write_state_dict(
    out: str | Path,
    specs: Mapping[str, Spec],
    pieces: Callable[[str], Iterable[Tensor]],
    *,
    shard_bytes: float = SHARD,
    metadata: Mapping[str, str] | None = None,
    like: StateDict | None = None,
    also: Callable[[Path], object] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Path:
    """Write a state dict in a stream, atomically, so that it loads with safetensors and transformers.

    Args:
        out: a path ending in .safetensors, or a folder that does not exist yet (or is empty); it then holds
            ``model.safetensors``, or shards and their index.
        specs: type and shape of every tensor to come.
        pieces: called for each name, in an order of its own; gives the tensor, whole or in consecutive parts.
        shard_bytes: most bytes in a file of the folder (default 5 GB, as transformers).
        metadata: kept in every header; default ``{"format": "pt"}``, which transformers asks for.
        like: a state dict whose folder's configuration and tokenizer files are copied along.
        also: called with the folder before it appears, to add files.
        progress: called with (bytes done, all bytes) after each piece.

    Raises:
        InputError: the place is taken, or a piece that is not of the announced type or length.
    """
    path, header = Path(out), dict(metadata if metadata is not None else {"format": "pt"})
    positive("shard_bytes", shard_bytes)
    for name, spec in specs.items():
        require(
            spec.dtype in DTYPES.values(),
            f"tensor {name!r} is {spec.dtype}, which safetensors does not know.",
        )
    total, done = sum(s.nbytes for s in specs.values()), 0

    def stream(file: IO[bytes], part: Mapping[str, Spec]) -> None:
        nonlocal done
        for count in write_stream(file, part, (pieces(name) for name in part), header):
            done += count
            if progress is not None:
                progress(done, total)

    if path.suffix == ".safetensors":
        with new_file(path) as file:
            stream(file, aligned(specs))
        return path
    with new_folder(path) as folder:
        _write_shards(folder, specs, shard_bytes, stream)
        for companion in companions(like):
            shutil.copyfile(companion, folder / companion.name)
        if also is not None:
            also(folder)
    return path


def _write_shards(
    folder: Path,
    specs: Mapping[str, Spec],
    shard_bytes: float,
    stream: Callable[[IO[bytes], Mapping[str, Spec]], None],
) -> None:
    shards: list[dict[str, Spec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += spec.nbytes
    files = [f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors" for k in range(len(shards))]
    files = [WEIGHTS] if len(shards) == 1 else files
    for name, part in zip(files, shards, strict=True):
        with new_file(folder / name) as file:
            stream(file, aligned(part))
    if len(shards) > 1:
        where = {name: file for file, part in zip(files, shards, strict=True) for name in part}
        size = sum(s.nbytes for s in specs.values())
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})


def companions(like: StateDict | None) -> list[Path]:
    """Configuration, tokenizer and code files beside a folder's weights."""
    if like is None or like.folder is None:
        return []
    return sorted(
        f
        for f in like.folder.iterdir()
        if f.suffix in _COMPANIONS and f.is_file() and not f.name.endswith(".index.json")
    )
