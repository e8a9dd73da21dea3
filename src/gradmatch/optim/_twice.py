"""Which module has no second derivative, for optimizers that know parameters and a closure only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from gradmatch.core._second import differentiable_twice
from gradmatch.core.checks import refuse

_ABOUT = ("is not implemented", "once_differentiable", "differentiable only once")


def refuse_once_differentiable(name: str, closure: Callable[[], Any] | None, error: RuntimeError) -> None:
    """Say what cannot be differentiated twice, if that is what ``error`` is about.

    With a closure, it is run once more to find the module.
    """
    reason = str(error).strip().splitlines()[0].rstrip(".")
    if not any(words in reason for words in _ABOUT):
        return
    if closure is None:
        refuse(
            f"{name}.step needs second derivatives: {reason}; fused attention has them inside "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), as step(closure) sets by itself."
        )
    _refuse_module(name, closure, reason)


def _refuse_module(name: str, closure: Callable[[], Any], reason: str) -> NoReturn:
    calls: list[tuple[nn.Module, Any]] = []
    hook = register_module_forward_hook(lambda module, inputs, _: calls.append((module, inputs)))
    try:
        with torch.no_grad():
            closure()
    finally:
        hook.remove()
    for module, inputs in calls:
        if not list(module.children()) and not differentiable_twice(module, inputs):
            refuse(f"{name}.step got a model with {module}, which cannot be differentiated twice: {reason}.")
    refuse(f"{name}.step got a loss that cannot be differentiated twice: {reason}.")
