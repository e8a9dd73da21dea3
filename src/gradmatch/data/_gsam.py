"""GSAM, surrogate-gap guided sharpness-aware minimisation (Zhuang et al., arXiv 2203.08065).

It extends SAM (Foret et al., arXiv 2010.01412) and its adaptive scaling ASAM (Kwon et al., arXiv 2102.11600).
One step on a batch: g = grad L(theta); climb by eps; g_p = grad L(theta + eps) on the same batch; put theta back;
step along d = g_p - alpha g_perp, where g_perp is the part of g orthogonal to g_p. With |.| over all parameters::

    eps = rho g / |g|                         (plain)
    eps = rho theta^2 g / | |theta| g |       (adaptive: | eps / |theta| | = rho)

alpha = 0 is SAM, rho = 0 the base optimiser itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer

from gradmatch.core import checks

Named = dict[str, Tensor]

TINY = 1e-12
"""Added to the norm that rho is divided by, as in the published code."""


def _inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def perturbation(
    params: Sequence[Tensor], grads: Sequence[Tensor], rho: float, adaptive: bool
) -> list[Tensor]:
    """The climb eps of SAM, or of ASAM where ``adaptive``; the norm is taken over all tensors together."""
    if adaptive:
        scaled = [t * g for t, g in zip(params, grads, strict=True)]
        scale = rho / (_inner(scaled, scaled).sqrt() + TINY)
        return [scale * t * s for t, s in zip(params, scaled, strict=True)]
    scale = rho / (_inner(grads, grads).sqrt() + TINY)
    return [scale * g for g in grads]


def direction(grads: Sequence[Tensor], perturbed: Sequence[Tensor], alpha: float) -> list[Tensor]:
    """d = g_p - alpha (g - <g, g_p> g_p / |g_p|^2)."""
    if alpha == 0:
        return list(perturbed)
    square = _inner(perturbed, perturbed)
    along = _inner(grads, perturbed) / square.clamp_min(torch.finfo(square.dtype).tiny)
    return [p - alpha * (g - along * p) for g, p in zip(grads, perturbed, strict=True)]


@dataclass(frozen=True)
class GSAMUpdate:
    """GSAM around SGD as the ``update`` of :func:`gradmatch.core.ensemble.train_ensemble`: many experts at once.

    Attributes:
        rho, alpha, adaptive: as in :class:`GSAM`.
        momentum, weight_decay: of the base SGD, as in ``torch.optim.SGD``.
    """

    rho: float = 0.01
    alpha: float = 1.0
    adaptive: bool = True
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __call__(
        self, params: Named, grad_fn: Callable[[Named], Named], state: Named, lr: float
    ) -> tuple[Named, Named]:
        names, theta = list(params), list(params.values())
        first = grad_fn(params)
        step = [first[k] for k in names]
        if self.rho:
            climb = perturbation(theta, step, self.rho, self.adaptive)
            second = grad_fn({k: t + e for k, t, e in zip(names, theta, climb, strict=True)})
            step = direction(step, [second[k] for k in names], self.alpha)
        if self.weight_decay:
            step = [d + self.weight_decay * t for d, t in zip(step, theta, strict=True)]
        if self.momentum:
            step = [self.momentum * state[k] + d if state else d for k, d in zip(names, step, strict=True)]
            state = dict(zip(names, step, strict=True))
        return {k: t - lr * d for k, t, d in zip(names, theta, step, strict=True)}, state


class GSAM(Optimizer):
    """Sharpness-aware steps around any torch optimiser.

    ``step(closure)`` needs the closure, which evaluates the loss of one batch and is called twice. It may call
    ``backward`` itself, as for ``torch.optim.LBFGS``, or only return the loss. Batch norm sees the batch twice but
    keeps the running statistics of the first, unperturbed pass. Dropout would draw two masks: leave it out, or
    re-seed it in the closure. Parameters are restored from a copy, so that the climb leaves no rounding behind.

    Args:
        params: the parameters, or parameter groups, which may carry their own ``rho``, ``alpha``, ``adaptive``.
        base_optimizer: an optimiser over the same parameters, or a function that makes one of them
            (``functools.partial(torch.optim.SGD, lr=0.1)``).
        rho: radius of the climb; default 0.01, the value of FTD's released scripts with ``adaptive``.
        alpha: weight of the orthogonal part; default 1.0 as FTD has for its larger settings.
        adaptive: scale the climb by the parameters (ASAM).

    Raises:
        InputError: negative or non-finite options, an optimiser of other parameters, no closure, a loss that is
            not finite.

    >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> optimizer = GSAM([w], torch.optim.SGD([w], lr=0.1), rho=0.1, adaptive=False)
    >>> round(float(optimizer.step(lambda: w.square().sum())), 4)
    5.0
    """

    step_protocol = "loss closure"

    def __init__(
        self,
        params: Any,
        base_optimizer: Optimizer | Callable[[Any], Optimizer],
        rho: float = 0.01,
        alpha: float = 1.0,
        adaptive: bool = True,
    ) -> None:
        defaults = {"rho": rho, "alpha": alpha, "adaptive": adaptive}
        super().__init__(params, defaults)
        for group in self.param_groups:
            checks.nonnegative("rho", group["rho"])
            checks.nonnegative("alpha", group["alpha"])
            checks.one_of("adaptive", group["adaptive"], (True, False))
        mine = [p for group in self.param_groups for p in group["params"]]
        base = base_optimizer if isinstance(base_optimizer, Optimizer) else base_optimizer(mine)
        theirs = [p for group in base.param_groups for p in group["params"]]
        checks.require(
            {id(p) for p in mine} == {id(p) for p in theirs},
            f"base_optimizer holds {len(theirs)} parameters, not the {len(mine)} of params; "
            "both must hold the same.",
        )
        options = {id(p): {k: g[k] for k in defaults} for g in self.param_groups for p in g["params"]}
        for group in base.param_groups:
            group |= options[id(group["params"][0])]
        self.base_optimizer = base
        self._share()

    def _share(self) -> None:
        """Groups and state are the base optimiser's own, so that schedulers and checkpoints see one of each."""
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state

    def state_dict(self) -> dict[str, Any]:
        """The base optimiser's state, whose groups also hold rho, alpha and adaptive."""
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state made by :meth:`state_dict`."""
        self.base_optimizer.load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """One step; returns the loss before it. Afterwards ``.grad`` holds the direction stepped along."""
        if closure is None:
            checks.refuse("closure is None; GSAM needs a function that evaluates the loss of one batch.")
        loss = self._backward(closure)
        active = [(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None]
        params = [p for _, p in active]
        if any(group["rho"] for group, _ in active):
            grads = [p.grad.clone() for p in params]
            self._second_pass(closure, active, grads)
            second = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            for alpha in {group["alpha"] for group, _ in active}:
                for (group, p), d in zip(active, direction(grads, second, alpha), strict=True):
                    if group["alpha"] == alpha:
                        p.grad = d
        self.base_optimizer.step()
        return loss

    def _second_pass(self, closure: Callable[[], Tensor], active: list[Any], grads: list[Tensor]) -> None:
        params = [p for _, p in active]
        kept = [p.clone() for p in params]
        kinds = {(g["rho"], bool(g["adaptive"])) for g, _ in active}
        climbs = {kind: perturbation(params, grads, *kind) for kind in kinds}
        try:
            for k, (group, p) in enumerate(active):
                p.add_(climbs[group["rho"], bool(group["adaptive"])][k])
            with kept_running_statistics():
                self._backward(closure)
        finally:
            for p, old in zip(params, kept, strict=True):
                p.copy_(old)

    def _backward(self, closure: Callable[[], Tensor]) -> Tensor:
        """The loss, with its gradients in ``.grad`` (None where a parameter does not take part)."""
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        for p in params:
            p.grad = None
        with torch.enable_grad():
            loss = closure()
            checks.require(
                isinstance(loss, Tensor) and loss.numel() == 1,
                f"closure gave {getattr(loss, 'shape', type(loss).__name__)}; it must give a scalar loss.",
            )
            if all(p.grad is None for p in params):
                for p, g in zip(params, torch.autograd.grad(loss, params, allow_unused=True), strict=True):
                    p.grad = g
        loss = loss.detach()
        checks.require(
            bool(torch.isfinite(loss)), f"closure gave a loss of {float(loss)}; it must be finite."
        )
        return loss


@contextmanager
def kept_running_statistics() -> Iterator[None]:
    """Forward passes in this block leave the running statistics of every batch norm as they were, to the bit."""
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training:
            for buffer in module.buffers(recurse=False):
                if id(buffer) not in kept:
                    kept[id(buffer)] = (buffer, buffer.clone())

    handle = register_module_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()
        with torch.no_grad():
            for buffer, old in kept.values():
                buffer.copy_(old)
