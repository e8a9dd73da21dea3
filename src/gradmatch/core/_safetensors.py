"""The safetensors format, read in slices and written in a stream.

A file is the length of a header (u64, little-endian), the header (JSON: name -> dtype, shape, data_offsets) and the
tensors' bytes. The library's own reader maps the file into memory, whose touched pages count as the process's; here the
bytes asked for are read and nothing else, so that memory is what the caller holds. Files come from outside: a header
that does not describe its file exactly is refused.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from gradmatch.core.checks import InputError, refuse, require

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "C64": torch.complex64,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # as in the library


@dataclass(frozen=True)
class Spec:
    """Type and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        """That of a tensor at hand."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in it."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its spec and the place of its first byte."""

    spec: Spec
    file: Path
    start: int

    def read(self, first: int = 0, last: int | None = None, out: Tensor | None = None) -> Tensor:
        """Numbers ``first`` to ``last`` of the flattened tensor, into fresh memory or the uint8 buffer ``out``."""
        size = self.spec.dtype.itemsize
        count = ((self.spec.numel if last is None else last) - first) * size
        buffer = torch.empty(count, dtype=torch.uint8) if out is None else out[:count]
        if count:
            with open(self.file, "rb", buffering=0) as file:
                file.seek(self.start + first * size)
                _fill(file, buffer, self.file)
        return buffer.view(self.spec.dtype)


def _fill(file: IO[bytes], buffer: Tensor, name: Path) -> None:
    view, done = buffer.numpy().data, 0
    while done < len(view):
        got = file.readinto(view[done:])  # type: ignore[attr-defined]
        require(bool(got), f"{name} ended while it was read; it must not change.")
        done += got


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Every tensor of a safetensors file, and its metadata.

    Raises:
        InputError: missing, truncated or padded file, broken header, a name twice, an unknown dtype, a shape that
            does not fit its bytes, or tensors that overlap or leave holes.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_LONGEST_HEADER, size - 8):
                refuse(f"{path} is not a safetensors file, or is cut short; it has {size} bytes.")
            header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} has no readable safetensors header: {error}.") from error
    require(isinstance(header, dict), f"{path} has a safetensors header that is no object.")
    metadata = header.pop("__metadata__", {})
    begin = 8 + length
    found = {name: _entry(path, name, value, begin) for name, value in header.items()}
    place = begin
    for name, stored in sorted(found.items(), key=lambda item: (item[1].start, item[1].spec.nbytes)):
        require(stored.start == place, f"{path} has overlapping or missing bytes at tensor {name!r}.")
        place += stored.spec.nbytes
    require(
        place == size, f"{path} has {size} bytes and its header describes {place}; it is cut short or padded."
    )
    return found, metadata if isinstance(metadata, dict) else {}


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name!r} stands there twice")
        found[name] = value
    return found


def _entry(path: Path, name: str, value: Any, begin: int) -> Stored:
    shape, offsets = (value.get(k) if isinstance(value, dict) else None for k in ("shape", "data_offsets"))
    sound = all(
        isinstance(v, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in v)
        for v in (shape, offsets)
    )
    require(sound and len(offsets) == 2, f"{path}: tensor {name!r} has no sound shape and offsets.")  # type: ignore[arg-type]
    kind = value.get("dtype")
    require(
        isinstance(kind, str) and kind in DTYPES, f"{path}: tensor {name!r} is of the unknown type {kind!r}."
    )
    spec, (first, last) = Spec(DTYPES[kind], tuple(shape)), offsets  # type: ignore[arg-type, misc]
    require(
        last - first == spec.nbytes,
        f"{path}: tensor {name!r} of shape {spec.shape} needs {spec.nbytes} bytes and has {last - first}.",
    )
    return Stored(spec, path, begin + first)


def header(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> bytes:
    """What stands before the tensors of a file: its own length and where each tensor lies."""
    found: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name, spec in specs.items():
        end = place + spec.nbytes
        found[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(found, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_stream(
    file: IO[bytes],
    specs: Mapping[str, Spec],
    pieces: Iterable[Iterable[Tensor]],
    metadata: Mapping[str, str],
) -> Iterator[int]:
    """Write a safetensors file into ``file``; gives the bytes of each piece as it is written.

    Args:
        specs: every tensor, in the order of ``pieces`` (see :func:`aligned`).
        pieces: for each tensor its whole or its consecutive parts.
    """
    file.write(header(specs, metadata))
    for (name, spec), parts in zip(specs.items(), pieces, strict=True):
        written = 0
        for part in parts:
            require(
                part.dtype == spec.dtype,
                f"tensor {name!r} is announced as {spec.dtype} and comes as {part.dtype}.",
            )
            flat = part.detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)
            written += flat.numel() * spec.dtype.itemsize
            yield flat.numel() * spec.dtype.itemsize
        require(
            written == spec.nbytes,
            f"tensor {name!r} is announced with {spec.nbytes} bytes and comes with {written}.",
        )


def aligned(specs: Mapping[str, Spec]) -> dict[str, Spec]:
    """The same, wider types first, so that every tensor starts at a multiple of its numbers' size."""
    return dict(sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize))
