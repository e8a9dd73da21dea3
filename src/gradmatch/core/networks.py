"""Seeded networks from a user's factory, and the small questions asked of any network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gradmatch.core import checks

Network = Callable[[], nn.Module] | nn.Module
"""A factory of fresh networks, or one network whose layers are re-initialised for each use."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block under its own seed of the global CPU generator, which is left as found."""
    state = torch.random.get_rng_state()
    torch.default_generator.manual_seed(int(seed) % (2**63))
    try:
        yield
    finally:
        torch.random.set_rng_state(state)


def build(network: Network, seed: int, device: torch.device | str | None = None) -> nn.Module:
    """A freshly initialised network; the same seed gives the same weights.

    Args:
        network: a function or class called without arguments, or an ``nn.Module``, which is copied and
            re-initialised by its layers' own ``reset_parameters``.
        seed: any whole number; the global generator is left as found.
        device: where to put it; default the CPU.

    Raises:
        InputError: not a factory, or a module with parameters that no ``reset_parameters`` covers.
    """
    with seeded(seed):
        if isinstance(network, nn.Module):
            module = copy.deepcopy(network)
            _reinitialise(module)
        else:
            checks.require(
                callable(network), f"network is {network!r}; it must be an nn.Module or a factory of one."
            )
            module = network()
    checks.require(
        isinstance(module, nn.Module), f"network made a {type(module).__name__}; it must make an nn.Module."
    )
    return module if device is None else module.to(device)


def _reinitialise(module: nn.Module) -> None:
    for part in module.modules():
        reset = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()
        elif next(part.parameters(recurse=False), None) is not None:
            checks.refuse(
                f"network holds a {type(part).__name__} with parameters but no reset_parameters; "
                "pass a factory (a function that builds a fresh network) instead."
            )


def output_width(module: nn.Module, x: Tensor) -> int:
    """The number of outputs of ``module`` for inputs like ``x`` (n, ...), run in eval mode without gradient."""
    was = module.training
    module.eval()
    try:
        with torch.no_grad():
            out = module(x[:1])
    except RuntimeError as error:
        shape, why = tuple(x.shape[1:]), str(error).strip().splitlines()[0]
        raise checks.InputError(f"network does not take inputs of shape {shape}: {why}.") from error
    finally:
        module.train(was)
    checks.require(
        isinstance(out, Tensor) and out.ndim == 2,
        f"network gives {getattr(out, 'shape', type(out).__name__)}; it must give logits of shape (n, classes).",
    )
    return int(out.shape[1])


def first_floats(module: object) -> Tensor | None:
    """A module's first floating-point parameter, which tells its type; None for anything else.

    >>> first_floats(nn.Linear(2, 2).double()).dtype
    torch.float64
    """
    parameters = module.parameters() if isinstance(module, nn.Module) else ()
    return next((p for p in parameters if p.is_floating_point()), None)


def fitted(module: nn.Module, x: Tensor) -> Tensor:
    """``x`` on the device and in the precision of the module's parameters; as it is where there are none."""
    like = first_floats(module)
    return x if like is None else x.to(device=like.device, dtype=like.dtype)


def draws_random_numbers(module: nn.Module, x: Tensor) -> bool:
    """Whether a forward pass in the module's present mode draws from the global CPU generator (left as found)."""
    before = torch.random.get_rng_state()
    try:
        with torch.no_grad():
            copy.deepcopy(module)(x)
        return not torch.equal(before, torch.random.get_rng_state())
    finally:
        torch.random.set_rng_state(before)


def has_batchnorm(module: nn.Module) -> bool:
    """Whether any layer keeps running statistics."""
    return any(
        isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats for m in module.modules()
    )


def active_dropout(module: nn.Module) -> list[str]:
    """Names of dropout layers that would act in the module's present mode."""
    return [
        name
        for name, m in module.named_modules()
        if isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0
    ]
