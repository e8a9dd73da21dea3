"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747): 60,000 + 10,000 images of 28 x 28, ten classes.

Looked for in ``$GRADMATCH_DATA``, in the user's data folder, then where Debian's package
``dataset-fashion-mnist`` puts it, then asked of the Hugging Face hub when ``datasets`` is installed.
"""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import torch

from gradmatch.core import checks
from gradmatch.core.examples import Examples, as_examples
from gradmatch.datasets._load import Split

NAMES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
FILES = tuple(
    f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def data_folder() -> Path:
    """Where fetched data is kept: ``$GRADMATCH_DATA`` or the user's cache folder."""
    given = os.environ.get("GRADMATCH_DATA")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(given) if given else cache / "gradmatch"


def find_fashion_mnist() -> Path | None:
    """The folder that holds the four files, or None."""
    home = data_folder()
    for place in (home, home / "fashion-mnist", _DEBIAN):
        if all((place / f).is_file() for f in FILES):
            return place
    return None


def fashion_mnist() -> Split:
    """All of Fashion-MNIST as (n, 1, 28, 28) float32 in [0, 1].

    Raises:
        InputError: it is on this machine in none of the known places and cannot be fetched.
    """
    place = find_fashion_mnist()
    if place is None:
        return _from_hub()
    images_train, labels_train, images_test, labels_test = (read_idx(place / f) for f in FILES)
    train, test = (
        Examples(torch.from_numpy(x).unsqueeze(1).float() / 255, torch.from_numpy(y).long(), 10)
        for x, y in ((images_train, labels_train), (images_test, labels_test))
    )
    return Split(train, test, NAMES, "fashion-mnist")


def _from_hub() -> Split:
    advice = (
        "fashion-mnist is not on this machine; run 'gradmatch data fashion-mnist', or install Debian's package "
        "dataset-fashion-mnist, or set GRADMATCH_DATA to a folder with its four .gz files."
    )
    try:
        from datasets import load_dataset

        rows = load_dataset("zalando-datasets/fashion_mnist")
    except Exception as error:  # the hub client raises many kinds; all mean that it cannot be had from there
        raise checks.InputError(advice) from error
    return Split(as_examples(rows["train"]), as_examples(rows["test"]), NAMES, "fashion-mnist")


def read_idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of unsigned bytes as an array.

    Raises:
        InputError: the file is not what its header says.
    """
    try:
        with gzip.open(path, "rb") as file:
            raw = file.read(200_000_000)
    except (OSError, EOFError) as error:
        raise checks.InputError(f"{path} is not a readable gzip file: {error}.") from error
    checks.require(len(raw) >= 8 and raw[:3] == b"\0\0\x08", f"{path} is not an IDX file of unsigned bytes.")
    dims = raw[3]
    shape = struct.unpack(f">{dims}I", raw[4 : 4 + 4 * dims])
    body = np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * dims)
    checks.require(
        body.size == int(np.prod(shape)), f"{path} holds {body.size} values; its header says {shape}."
    )
    return body.reshape(shape).copy()
