"""Reading and replacing what flows through a network's modules, by name; the network is always left as found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from gradmatch.core import checks


def submodule(module: nn.Module, name: str) -> nn.Module:
    """The part of ``module`` called ``name``; an unknown name is refused with a few that exist."""
    parts = dict(module.named_modules())
    if name not in parts:
        known = [n for n in parts if n]
        checks.refuse(f"network has no module {name!r}; it has {checks.listing(known)}.")
    return parts[name]


def last_of(module: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> str:
    """Name of the last part of one of these types, in the order in which parts were registered."""
    names = [name for name, part in module.named_modules() if isinstance(part, kind)]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    wanted = " or ".join(k.__name__ for k in kinds)
    checks.require(bool(names), f"network has no {wanted}; name the module to read.")
    return names[-1]


@contextmanager
def capture(module: nn.Module, *names: str, side: str = "output") -> Iterator[dict[str, Tensor]]:
    """Within the block, every forward pass puts the named modules' tensors into the dictionary given.

    Hooks go when the block ends, also after an exception. Tensors keep their graph.

    Args:
        module: the network.
        names: names of parts as in ``named_modules``.
        side: ``"output"`` or ``"input"`` (the first positional argument).

    Raises:
        InputError: no such part, or one that takes or gives no tensor.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> with capture(net, "2", side="input") as seen:
    ...     out = net(torch.zeros(5, 3))
    >>> seen["2"].shape
    torch.Size([5, 4])
    """
    checks.one_of("side", side, ("input", "output"))
    seen: dict[str, Tensor] = {}

    def keep(name: str, value: Any) -> None:
        checks.require(
            isinstance(value, Tensor),
            f"{side} of module {name!r} is a {type(value).__name__}; it must be one tensor.",
        )
        seen[name] = value

    with ExitStack() as stack:
        for name in names:
            part = submodule(module, name)
            if side == "output":
                handle = part.register_forward_hook(lambda _, __, out, name=name: keep(name, out))
            else:
                handle = part.register_forward_pre_hook(
                    lambda _, args, name=name: keep(name, args[0] if args else None)
                )
            stack.callback(handle.remove)
        yield seen


@contextmanager
def inject(
    module: nn.Module, values: Mapping[str, Tensor | Callable[[Tensor], Tensor]], side: str = "output"
) -> Iterator[None]:
    """Within the block, every forward pass goes on with other tensors at the named modules.

    Hooks go when the block ends, also after an exception.

    Args:
        module: the network.
        values: for each part a tensor that takes the place of its own, or a function of its own.
        side: ``"output"`` or ``"input"`` (the first positional argument).

    Raises:
        InputError: no such part, or one that takes or gives no tensor.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> with inject(net, {"1": lambda h: 0 * h}):
    ...     bool((net(torch.ones(5, 3)) == net[2].bias).all())
    True
    """
    checks.one_of("side", side, ("input", "output"))

    def other(name: str, value: Any) -> Tensor:
        checks.require(
            isinstance(value, Tensor),
            f"{side} of module {name!r} is a {type(value).__name__}; it must be one tensor.",
        )
        given = values[name]
        return given if isinstance(given, Tensor) else given(value)

    with ExitStack() as stack:
        for name in values:
            part = submodule(module, name)
            if side == "output":
                handle = part.register_forward_hook(lambda _, __, out, name=name: other(name, out))
            else:
                handle = part.register_forward_pre_hook(
                    lambda _, args, name=name: (other(name, args[0] if args else None), *args[1:])
                )
            stack.callback(handle.remove)
        yield


@contextmanager
def evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """Within the block every part of ``module`` is in eval mode; each part's own mode comes back after it."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield module
    finally:
        for part, mode in modes:
            part.training = mode
