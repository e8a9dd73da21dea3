"""Files that appear whole or not at all, and run folders that a killed job can continue from.

Tensors are kept as safetensors and everything else as JSON; nothing is ever unpickled. ``GradientStore``, per-example
gradient features on disk, is one such folder; it loads when used, as it needs the gradient engine.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gradmatch.core import checks

if TYPE_CHECKING:
    from gradmatch.core._gradient_store import GradientStore as GradientStore

_STATE = "state.safetensors"
_CONFIG = "run.json"
_ALIGNMENT = 64  # bytes, of every fresh tensor on a CPU


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write a file atomically: to a temporary neighbour, flushed to disk, then renamed."""
    with new_file(path) as file:
        file.write(content)
    return Path(path)


@contextmanager
def new_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to be written in the block: it appears, whole, when the block ends, and not at all if that fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to be filled in the block: it appears, whole, when the block ends, and not at all if that fails.

    Raises:
        InputError: something is there already, other than an empty folder.
    """
    path = Path(path)
    taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    checks.require(not taken, f"out {str(path)!r} exists and is not an empty folder; name another.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | Path, value: Any) -> Path:
    """Write ``value`` as readable JSON, atomically; NaN and infinity are refused."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise checks.InputError(f"{path} cannot be written as JSON: {error}.") from error
    return write_bytes(path, (text + "\n").encode())


def read_json(path: str | Path) -> Any:
    """Read a JSON file; a missing or broken one is refused in one sentence."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise checks.InputError(f"{path} does not exist.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise checks.InputError(f"{path} is not valid JSON: {error}.") from error


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write named tensors, with JSON metadata, as one safetensors file, atomically."""
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    header = (
        None if metadata is None else {"gradmatch": json.dumps(metadata, allow_nan=False, sort_keys=True)}
    )
    return write_bytes(path, save(plain, metadata=header))


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor at an address like those of fresh tensors: kernels that sum by pieces round otherwise elsewhere.

    In a file tensors start wherever its header ends, and a resumed run would not end as an unbroken one does.
    """
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def load_tensors(path: str | Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a safetensors file as (tensors, metadata); a missing or broken one is refused in one sentence."""
    if not Path(path).is_file():
        raise checks.InputError(f"{path} does not exist.")
    try:
        with safe_open(str(path), framework="pt", device=device) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = (file.metadata() or {}).get("gradmatch", "{}")
    except (SafetensorError, OSError) as error:
        raise checks.InputError(f"{path} is not a readable safetensors file: {error}.") from error
    return tensors, json.loads(header)


class RunFolder:
    """A folder in which one long job keeps its settings, its last whole step and its results.

    Args:
        path: the folder; made if missing.
        config: the settings that decide the result, as JSON values. A folder begun with others is refused.
        resume: continue from the state found. Without it, a folder that holds a run is refused.

    >>> import tempfile
    >>> run = RunFolder(tempfile.mkdtemp() + "/run", {"seed": 0})
    >>> run.save(3, {"x": torch.ones(2)})
    >>> RunFolder(run.path, {"seed": 0}, resume=True).load()[0]
    3
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any], resume: bool = False) -> None:
        self.path = Path(path)
        self.config = json.loads(json.dumps(config))
        file = self.path / _CONFIG
        checks.require(
            not self.path.exists() or self.path.is_dir(),
            f"out is {str(self.path)!r}, a file; it must be a folder.",
        )
        if file.exists():
            checks.require(
                resume,
                f"out {str(self.path)!r} already holds a run; pass resume to continue it or name another folder.",
            )
            self._compare(read_json(file))
        else:
            write_json(file, self.config)

    def _compare(self, found: Any) -> None:
        changed = [k for k in sorted({*found, *self.config}) if found.get(k) != self.config.get(k)]
        if changed:
            k = changed[0]
            checks.refuse(
                f"out {str(self.path)!r} holds a run with {k}={found.get(k)!r}, and this one has "
                f"{k}={self.config.get(k)!r}; resume needs equal settings."
            )

    def save(self, step: int, tensors: Mapping[str, Tensor], info: Mapping[str, Any] | None = None) -> None:
        """Keep the state after ``step`` whole steps, in place of the last one."""
        save_tensors(self.path / _STATE, tensors, {"step": step, "info": dict(info or {})})

    def load(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """The last state kept as (step, tensors, info), or None for a run that has none yet."""
        if not (self.path / _STATE).exists():
            return None
        tensors, header = load_tensors(self.path / _STATE)
        return int(header["step"]), {k: _aligned(t) for k, t in tensors.items()}, dict(header["info"])

    def finish(self, write: Callable[[Path], object]) -> None:
        """Let ``write`` put the results into the folder, then drop the state that led to them."""
        write(self.path)
        (self.path / _STATE).unlink(missing_ok=True)


def generator_state(generator: torch.Generator) -> Tensor:
    """A generator's state as a tensor to be kept beside the weights."""
    return generator.get_state()


def restored_generator(state: Tensor, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that goes on from a state kept by :func:`generator_state`."""
    generator = torch.Generator(device)
    generator.set_state(state.to(torch.uint8).cpu())
    return generator


def __getattr__(name: str) -> Any:
    if name == "GradientStore":
        from gradmatch.core import _gradient_store

        return _gradient_store.GradientStore
    raise AttributeError(f"module 'gradmatch.core.store' has no attribute {name!r}")
