"""Fashion-MNIST brought to this machine without root: from Debian's package, else from the Hugging Face hub."""

from __future__ import annotations

import gzip
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gradmatch.core.store import write_bytes
from gradmatch.datasets.fashion_mnist import FILES, data_folder, read_idx

PACKAGE, HUB = "dataset-fashion-mnist", "zalando-datasets/fashion_mnist"
SECONDS = 300


class FetchError(RuntimeError):
    """The data could not be had; the message says what to do."""


def fetch_fashion_mnist(home: Path | None = None, say: Callable[[str], object] = lambda _: None) -> Path:
    """Fetch the four files into ``home / "fashion-mnist"`` and return that folder.

    Args:
        home: default the folder that the loader looks in first.
        say: called with a line on what is tried.

    Raises:
        FetchError: neither way worked; says why, and what to do by hand.
    """
    target = (home or data_folder()) / "fashion-mnist"
    reasons = []
    for name, way in ((f"Debian's package {PACKAGE}", _from_debian), (f"the hub's {HUB}", _from_hub)):
        say(f"trying {name}")
        try:
            way(target)
        except (OSError, subprocess.SubprocessError, LookupError, ValueError, ImportError) as error:
            reasons.append(f"{name}: {_line(error)}")
            continue
        return target
    raise FetchError(
        f"fashion-mnist could not be fetched ({'; '.join(reasons)}); run 'apt-get install {PACKAGE}' as root, or put "
        f"{', '.join(FILES)} into {target}"
    )


def _from_debian(target: Path) -> None:
    """``apt-get download`` and ``dpkg -x``, which need no root, then only the four files."""
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            raise LookupError(f"there is no {program}")
    with tempfile.TemporaryDirectory() as folder:
        _run(["apt-get", "download", PACKAGE], folder)
        package = next(Path(folder).glob("*.deb"), None)
        if package is None:
            raise LookupError("nothing was downloaded")
        _run(["dpkg", "-x", str(package), "unpacked"], folder)
        for name in FILES:
            file = next((Path(folder) / "unpacked").rglob(name), None)
            if file is None:
                raise LookupError(f"the package lacks {name}")
            read_idx(file)  # a broken file is refused here rather than at first use
            write_bytes(target / name, file.read_bytes())


def _run(command: list[str], folder: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)
    if done.returncode != 0:
        raise LookupError(_line(done.stderr or f"{command[0]} ended with {done.returncode}"))


def _from_hub(target: Path) -> None:
    """The hub's copy, written as the four files, so that later use needs no network."""
    from datasets import load_dataset

    try:
        parts = load_dataset(HUB)
    except Exception as error:  # the hub client raises many kinds; all mean that it cannot be had
        raise LookupError(_line(error)) from error
    write_idx_files(parts, target)


def write_idx_files(parts: Any, target: Path) -> None:
    """Rows with "image" and "label" of parts "train" and "test" as the four gzipped IDX files."""
    contents = []
    for part in ("train", "test"):
        contents.append(np.stack([np.asarray(i, dtype=np.uint8) for i in parts[part]["image"]]))
        contents.append(np.asarray(parts[part]["label"], dtype=np.uint8))
    for name, array in zip(FILES, contents, strict=True):
        header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
        write_bytes(target / name, gzip.compress(header + array.tobytes(), mtime=0))


def _line(error: Any) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200].rstrip(".")
