"""The networks of the command line: two of the zoo, or the user's own from ``module:factory``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from gradmatch.core import checks
from gradmatch.core.examples import Examples
from gradmatch.core.networks import Network, build, output_width

NAMES = {
    "channels": ("channels", "in_channels", "num_channels"),
    "size": ("size", "image_size", "img_size"),
    "classes": ("classes", "num_classes", "n_classes"),
}
"""Parameters of a user's factory that are filled in from the data."""


def depth_for(size: int) -> int:
    """Blocks of a ConvNet for images of ``size`` pixels: three, fewer where less than 2 x 2 would remain.

    >>> [depth_for(s) for s in (4, 8, 16, 28, 64)]
    [1, 2, 3, 3, 3]
    """
    side, depth = size + 4 if size == 28 else size, 0
    while depth < 3 and side >= 4:
        side, depth = side // 2, depth + 1
    return max(1, depth)


def network_for(spec: str, data: Examples, width: int = 32) -> Network:
    """The factory that ``--network`` asks for, tried on one input.

    Args:
        spec: "convnet", "mlp", or "module:factory".
        data: fixes channels, size and classes.
        width: of the convnet's convolutions, or the mlp's hidden layers.

    Raises:
        InputError: an unknown name, a factory that cannot be imported or called, or one whose network does not
            take the data or gives other than one output a class.
    """
    checks.whole("--width", width)
    network = _builtin(spec, data, width) if spec in ("convnet", "mlp") else _own(spec, data)
    _try(spec, network, data)
    return network


def _builtin(spec: str, data: Examples, width: int) -> Network:
    from gradmatch.zoo import convnet, mlp

    shape = tuple(data.x.shape[1:])
    if spec == "mlp":
        return partial(mlp, data.x[0].numel(), (width, width), data.classes)
    checks.require(
        len(shape) == 3,
        f"DATA holds inputs of shape {shape}; --network convnet takes images, so use mlp or module:factory.",
    )
    channels, height, side = shape
    checks.require(
        height == side >= 2,
        f"DATA holds images of {height} x {side} pixels; --network convnet takes square ones, so bring a folder's "
        "to one side with --size, or use --network mlp or module:factory.",
    )
    return partial(
        convnet, channels=channels, size=side, classes=data.classes, width=width, depth=depth_for(side)
    )


def _own(spec: str, data: Examples) -> Network:
    module, colon, name = spec.partition(":")
    checks.require(
        bool(colon and module and name),
        f"--network is {spec!r}; it must be convnet, mlp or module:factory.",
    )
    factory = imported(spec, module, name)
    if isinstance(factory, nn.Module):
        return factory
    checks.require(
        callable(factory),
        f"--network {spec}: {name} is a {type(factory).__name__}; it must be a function or class that makes a network.",
    )
    return _filled(spec, factory, data)


def imported(spec: str, module: str, name: str, option: str = "--network") -> Any:
    """The attribute ``name`` of a module that may lie in the current folder (or is a path ending in .py)."""
    home, file = Path.cwd(), Path(module)
    if file.suffix == ".py":
        checks.require(file.is_file(), f"{option} {spec}: there is no file {module}.")
        home, module = file.resolve().parent, file.stem
    with _findable(home):
        try:
            found = import_module(module)
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
                checks.refuse(
                    f"{option} {spec}: there is no module {module!r} here or among those installed."
                )
            _refuse(f"{option} {spec}", f"importing {module!r} failed", error)
    checks.require(hasattr(found, name), f"{option} {spec}: the module {module!r} has no {name!r}.")
    return getattr(found, name)


@contextmanager
def _findable(home: Path) -> Iterator[None]:
    """The user's folder first on the path while their module is imported, and last from then on.

    Last, so that worker processes find it, and a file of theirs named like an installed library hides nothing.
    """
    place = str(home)
    sys.path.insert(0, place)
    try:
        yield
    finally:
        sys.path.remove(place)
        if place not in sys.path:
            sys.path.append(place)


def _filled(spec: str, factory: Callable[..., Any], data: Examples) -> Network:
    """The factory with channels, size and classes filled in where it has such parameters."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # a builtin without a signature is called bare
        return factory
    given: dict[str, Any] = {}
    for kind, names in NAMES.items():
        for name in names:
            if name in parameters and parameters[name].kind is not inspect.Parameter.POSITIONAL_ONLY:
                given[name] = _fact(spec, kind, name, data)
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    missing = [
        p.name
        for p in parameters.values()
        if p.default is inspect.Parameter.empty and p.kind not in variable and p.name not in given
    ]
    checks.require(
        not missing,
        f"--network {spec}: the factory needs {', '.join(missing)}; it may need only channels, size and classes.",
    )
    return partial(factory, **given) if given else factory


def _fact(spec: str, kind: str, name: str, data: Examples) -> int:
    if kind == "classes":
        return data.classes
    shape = tuple(data.x.shape[1:])
    checks.require(
        len(shape) == 3 and (kind == "channels" or shape[1] == shape[2]),
        f"--network {spec}: the factory takes {name}, but DATA holds inputs of shape {shape}.",
    )
    return shape[0] if kind == "channels" else shape[1]


def _try(spec: str, network: Network, data: Examples) -> None:
    """Build it once and send an input through; a user's code may fail in any way."""
    try:
        module = build(network, 0)
        with torch.no_grad():
            width = output_width(module.to(data.x.dtype), data.x[:1].cpu())
    except checks.InputError as error:
        raise checks.InputError(f"--network {spec}: {error}") from error
    except Exception as error:
        _refuse(f"--network {spec}", "trying the network on one input failed", error)
    checks.require(
        width == data.classes,
        f"--network {spec}: the network has {width} outputs; it must have one for each of {data.classes} classes.",
    )


def _refuse(where: str, what: str, error: Exception) -> NoReturn:
    line = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    raise checks.InputError(f"{where}: {what} with {type(error).__name__}: {line}.") from error


def weighted(module: nn.Module, path: Path) -> nn.Module:
    """The network with the weights of a safetensors file; names and shapes must be its own."""
    from gradmatch.core.store import load_tensors

    found, own = load_tensors(path)[0], module.state_dict()
    missing, strange = ([k for k in a if k not in b] for a, b in ((own, found), (found, own)))
    checks.require(
        not missing and not strange,
        f"--weights {str(path)!r} lacks {checks.listing(missing) or 'nothing'} and has "
        f"{checks.listing(strange) or 'nothing'} that MODEL does not; it must hold the state dict of MODEL.",
    )
    for name, tensor in found.items():
        checks.require(
            tensor.shape == own[name].shape,
            f"--weights has {name} of shape {tuple(tensor.shape)}; MODEL needs {tuple(own[name].shape)}.",
        )
        checks.finite(f"--weights {name}", tensor)
    module.load_state_dict(found)
    return module
