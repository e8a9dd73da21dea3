"""The four ways in which an optimizer may be stepped, and one sentence for each wrong use.

========================  ====================================================================================
"grad"                    ``loss.backward(); optimizer.step()``, or ``step(closure)`` as for torch's own
"graph"                   ``loss.backward(create_graph=True); optimizer.step()``
"loss closure"            ``optimizer.step(closure)``: the closure returns the loss and does not call backward
"output closure"          ``optimizer.step(closure)``: it returns (outputs, loss_of_outputs)
========================  ====================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gradmatch.core.checks import finite, refuse, require

Protocol = Literal["grad", "graph", "loss closure", "output closure"]

WRITE: dict[Protocol, str] = {
    "grad": "call loss.backward() and then step(), or let the closure call backward and return the loss",
    "graph": "call loss.backward(create_graph=True) and then step()",
    "loss closure": "call step(closure) with a closure that returns the loss without calling backward",
    "output closure": "call step(closure) with a closure that returns (outputs, loss_of_outputs)",
}


def how(protocols: Sequence[Protocol]) -> str:
    """What to write for a class that can be stepped in these ways."""
    return ", or ".join(WRITE[p] for p in protocols)


def _marks(params: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(0, 0) if p.grad is None else (id(p.grad), p.grad._version) for p in params]


def after_backward(name: str, params: Sequence[Tensor], closure: Callable[[], Any]) -> Any:
    """Run a closure that calls backward, as torch's optimizers take it; returns its loss.

    Raises:
        InputError: it returned outputs, or left every gradient as it was.
    """
    before, held = (
        _marks(params),
        [p.grad for p in params],
    )  # held: no new gradient can take an old one's address
    with torch.enable_grad():
        loss = closure()
    require(
        not isinstance(loss, tuple),
        f"{name}.step got a closure that returns {type(loss).__name__}; {how(['grad'])}.",
    )
    unchanged = _marks(params) == before
    del held
    if unchanged and isinstance(loss, Tensor) and loss.requires_grad:
        refuse(f"{name}.step got a closure that did not call backward; {how(['grad'])}.")
    return loss


def _without_backward(
    name: str, params: Sequence[Tensor], closure: Callable[[], Any], protocols: Sequence[Protocol]
) -> Any:
    before, held = _marks(params), [p.grad for p in params]
    with torch.enable_grad():
        found = closure()
    require(_marks(params) == before, f"{name}.step got a closure that calls backward; {how(protocols)}.")
    del held
    return found


def loss_with_graph(
    name: str, params: Sequence[Tensor], closure: Callable[[], Any], protocols: Sequence[Protocol]
) -> Tensor:
    """Run a closure that must not call backward; returns its scalar loss, with graph.

    Raises:
        InputError: it called backward, or returned something else or a loss that is not finite.
    """
    loss = _without_backward(name, params, closure, protocols)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        if isinstance(loss, Tensor) and loss.numel() == 1:
            got = "a loss without a graph"
        refuse(f"{name}.step got a closure that returns {got}; {how(protocols)}.")
    return finite("loss", loss)


def outputs_and_loss(
    name: str, params: Sequence[Tensor], closure: Callable[[], Any], protocols: Sequence[Protocol]
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Run a closure that returns (outputs with graph, function of outputs).

    Raises:
        InputError: it called backward, or returned something else or outputs that are not finite.
    """
    found = _without_backward(name, params, closure, protocols)
    right = (
        isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Tensor) and callable(found[1])
    )
    if not right:
        got = "a loss" if isinstance(found, Tensor) else type(found).__name__
        refuse(f"{name}.step got a closure that returns {got}; {how(protocols)}.")
    outputs, loss_of = found
    require(
        outputs.requires_grad,
        f"{name}.step got outputs without a graph to the parameters; compute them from the model with grad enabled.",
    )
    return finite("outputs", outputs), loss_of


def require_graph(name: str, params: Sequence[Tensor], protocols: Sequence[Protocol]) -> None:
    """Refuse gradients that carry no graph (no ``create_graph=True``, or replaced by clipping)."""
    for i, p in enumerate(params):
        if p.grad is not None and not p.grad.requires_grad:
            refuse(f"{name}.step found a gradient of parameter {i} without a graph; {how(protocols)}.")


def require_no_closure(name: str, closure: object, protocols: Sequence[Protocol]) -> None:
    """Refuse a closure for a class that takes none."""
    require(closure is None, f"{name}.step got a closure; {how(protocols)}.")


def require_closure(name: str, closure: Callable[[], Any] | None, protocols: Sequence[Protocol]) -> None:
    """Refuse a step without closure for a class that needs one."""
    require(closure is not None, f"{name}.step got no closure; {how(protocols)}.")
