"""Data by name or path: a known set, a folder of class folders, arrays in a file, or a hub data set."""

from __future__ import annotations

import logging
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core.examples import Examples, as_examples
from gradmatch.core.store import load_tensors

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif")
MOST_PIXELS = 50_000_000
MOST_BYTES = 16 * 2**30


@dataclass(frozen=True)
class Split:
    """Training and test examples of one data set, with the names of its classes.

    ``rows`` holds the place in the source of every training example where some were held out for the test, and
    ``files`` the image file of every training example where there is one.
    """

    train: Examples
    test: Examples
    names: tuple[str, ...]
    name: str
    rows: Tensor | None = None
    files: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input, such as (channels, height, width)."""
        return tuple(self.train.x.shape[1:])

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.train.classes


def split(
    examples: Examples, test: float = 0.2, seed: int = 0, *, names: tuple[str, ...] = (), name: str = "data"
) -> Split:
    """Hold out a share of every class (at least one example of each) as the test set.

    Raises:
        InputError: a class with fewer than two examples, or a share outside (0, 1).
    """
    share = checks.fraction("test", test, one=False)
    generator = torch.Generator().manual_seed(seed)
    held, kept = [], []
    for label in range(examples.classes):
        of = examples.of_class(label)
        checks.require(
            len(of) >= 2, f"class {label} has {len(of)} sample; a held-out test set needs at least 2."
        )
        order = of[torch.randperm(len(of), generator=generator)]
        count = min(len(of) - 1, max(1, round(share * len(of))))
        held.append(order[:count])
        kept.append(order[count:])
    train, rest = (torch.cat(part).sort().values for part in (kept, held))
    return Split(
        examples.take(train),
        examples.take(rest),
        names or tuple(str(c) for c in range(examples.classes)),
        name,
        train,
    )


def load(source: str | Path, *, size: int | None = None, seed: int = 0) -> Split:
    """Read labelled data for the command line and the evidence.

    Args:
        source: "digits", "fashion-mnist", a folder of class folders of images (or with ``train`` and ``test``
            in it), an ``.npz`` or ``.safetensors`` file with arrays, or a Hugging Face data set id.
        size: side to which a folder's images are brought; needed when they differ in size.
        seed: of the split where the source has no test set of its own (a fifth of each class).

    Raises:
        InputError: nothing readable under that name.
    """
    from gradmatch.datasets.digits import digits
    from gradmatch.datasets.fashion_mnist import fashion_mnist

    name = str(source)
    if name == "digits":
        return digits(seed=seed)
    if name == "fashion-mnist":
        return fashion_mnist()
    path = Path(source)
    if path.is_dir():
        return folder(path, size=size, seed=seed)
    if path.suffix in (".npz", ".safetensors"):
        return arrays(path, seed=seed)
    checks.require(
        not path.exists() and name.count("/") <= 1 and not name.startswith((".", "/", "~")),
        f"DATA is {name!r}; it must be digits, fashion-mnist, a folder of class folders, an .npz or .safetensors "
        "file, or a Hugging Face data set id.",
    )
    return hub(name, seed=seed)


def folder(path: str | Path, *, size: int | None = None, seed: int = 0) -> Split:
    """Images of 8 or 16 bits in class folders, as (n, c, h, w) float32 in [0, 1]; classes in alphabetical order.

    ``path`` has a folder for each class, or ``train`` and ``test`` (or ``val``) folders that do.

    Raises:
        InputError: no class folders, an unreadable image (named), or images of several sizes without ``size``.
    """
    root = Path(path)
    parts = {d.name for d in root.iterdir() if d.is_dir()}
    held = next((p for p in ("test", "val", "validation") if p in parts), None)
    if "train" in parts and held:
        names = _class_names(root / "train")
        train, files = _read_folder(root / "train", names, size)
        return Split(train, _read_folder(root / held, names, size)[0], names, root.name, None, files)
    names = _class_names(root)
    examples, files = _read_folder(root, names, size)
    found = split(examples, 0.2, seed, names=names, name=root.name)
    assert found.rows is not None
    return replace(found, files=tuple(files[i] for i in found.rows.tolist()))


def _class_names(root: Path) -> tuple[str, ...]:
    names = tuple(sorted(d.name for d in root.iterdir() if d.is_dir() and not d.name.startswith(".")))
    checks.require(
        len(names) >= 2, f"DATA {str(root)!r} has {len(names)} class folders; it needs at least 2."
    )
    return names


def _read_folder(root: Path, names: tuple[str, ...], size: int | None) -> tuple[Examples, tuple[str, ...]]:
    images, labels, read = [], [], []
    for label, name in enumerate(names):
        files = sorted(f for f in (root / name).glob("*") if f.suffix.lower() in IMAGE_ENDINGS)
        checks.require(
            len(files) > 0, f"DATA folder {str(root / name)!r} holds no images; every class needs some."
        )
        images += [_read_image(f, size) for f in files]
        labels += [label] * len(files)
        read += [str(f) for f in files]
    channels = max(i.shape[0] for i in images)
    images = [i.expand(channels, -1, -1) for i in images]
    shapes = sorted({tuple(i.shape[1:]) for i in images})
    checks.require(
        len(shapes) == 1,
        f"DATA has images of sizes {checks.listing(shapes)}; give --size to bring them to one.",
    )
    return Examples(torch.stack(images), torch.tensor(labels), len(names)), tuple(read)


def _read_image(path: Path, size: int | None) -> Tensor:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            checks.require(
                image.width * image.height <= MOST_PIXELS,
                f"{path} has {image.width}x{image.height} pixels; at most {MOST_PIXELS} are read.",
            )
            deep = image.mode == "F" or image.mode.startswith("I")  # convert("L") would cut these off at 255
            plain = image.convert("F" if deep else "L" if image.mode in ("1", "L") else "RGB")
            if size is not None:
                plain = plain.resize((size, size), Image.Resampling.BILINEAR)
            array = np.array(plain)
            full = 255.0 if not deep else 1.0 if image.mode == "F" else 65535.0
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise checks.InputError(f"{path} is not a readable image: {error}.") from error
    x = torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy()).float() / full
    checks.require(
        bool((x >= 0).all() and (x <= 1).all()),
        f"{path} holds levels outside 0..{full:g}; images of 8 or 16 bits, or floats in [0, 1], are read.",
    )
    return x


def arrays(path: str | Path, *, seed: int = 0) -> Split:
    """Arrays in an ``.npz`` or ``.safetensors`` file.

    Names: ``x`` and ``y`` (or ``images`` and ``labels``), optionally ``x_test`` and ``y_test``; or
    ``x_train``, ``y_train``, ``x_test``, ``y_test``. Images are (n, c, h, w) or (n, h, w); uint8 is brought to [0, 1].

    Raises:
        InputError: the file is missing or broken, or has no such arrays.
    """
    found = _read_arrays(Path(path))
    x, y = (_pick(found, path, *names) for names in (("x", "x_train", "images"), ("y", "y_train", "labels")))
    train = as_examples((_with_channel(x), y), name="DATA")
    stem = Path(path).stem
    if "x_test" in found and "y_test" in found:
        test = as_examples((_with_channel(found["x_test"]), found["y_test"]), train.classes, name="DATA test")
        return Split(train, test, tuple(str(c) for c in range(train.classes)), stem)
    return split(train, 0.2, seed, name=stem)


def _read_arrays(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_tensors(path)[0]
    checks.require(path.is_file(), f"{path} does not exist.")
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(part.file_size for part in archive.infolist())
        checks.require(size <= MOST_BYTES, f"{path} unpacks to {size} bytes; at most {MOST_BYTES} are read.")
        with np.load(path, allow_pickle=False) as file:
            return {k: torch.from_numpy(file[k]) for k in file.files}
    except checks.InputError:
        raise
    except (ValueError, OSError, EOFError, TypeError, KeyError, zipfile.BadZipFile) as error:
        raise checks.InputError(f"{path} is not a readable .npz file of plain arrays: {error}.") from error


def _pick(found: dict[str, Tensor], path: Any, *names: str) -> Tensor:
    for name in names:
        if name in found:
            return found[name]
    return checks.refuse(f"{path} has arrays {sorted(found)}; it needs one named {' or '.join(names)}.")


def _with_channel(x: Tensor) -> Tensor:
    return x.unsqueeze(1) if x.ndim == 3 else x


def hub(name: str, *, seed: int = 0) -> Split:
    """A Hugging Face data set of images and labels, by its id (needs ``datasets``).

    Raises:
        InputError: ``datasets`` is missing, or the hub does not give it.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise checks.InputError(
            f"DATA {name!r} would be read from the Hugging Face hub; that needs 'pip install gradmatch[data]'."
        ) from error
    notes = logging.getLogger("huggingface_hub")
    level = notes.level
    notes.setLevel(logging.ERROR)  # a line for every retry; what matters is in the sentence below
    try:
        parts = load_dataset(name)
    except Exception as error:  # the hub client raises many kinds; all mean that it cannot be had
        raise checks.InputError(
            f"DATA {name!r} is no file or folder here and could not be read from the Hugging Face hub: {_line(error)}"
        ) from error
    finally:
        notes.setLevel(level)
    return from_rows(parts, name, seed)


def from_rows(parts: Any, name: str, seed: int = 0) -> Split:
    """A Hugging Face ``DatasetDict`` (or dict of row sets) as a split."""
    train_rows = parts["train"] if "train" in parts else next(iter(parts.values()))
    train = as_examples(train_rows, name="DATA")
    held = next((parts[k] for k in ("test", "validation") if k in parts), None)
    feature = getattr(train_rows, "features", {}).get("label")
    names = tuple(getattr(feature, "names", None) or (str(c) for c in range(train.classes)))
    if held is None:
        return split(train, 0.2, seed, names=names, name=name)
    return Split(train, as_examples(held, train.classes, name="DATA test"), names, name)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
