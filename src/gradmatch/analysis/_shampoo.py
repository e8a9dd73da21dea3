"""Shampoo: a preconditioner for every mode of a tensor (Gupta, Koren, Singer; ICML 2018, arXiv 1802.09568)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradmatch.core import checks

__all__ = ["Shampoo", "inverse_roots"]

RELATIVE = 1e-2
"""Damping of averaged factors, relative to their mean eigenvalue."""
ADAM = 0.999
"""Decay of the squares whose step is grafted on."""


class Shampoo(Optimizer):
    """W <- W - lr L^{-1/4} M R^{-1/4} with L = eps I + sum G G^T, R = eps I + sum G^T G, M <- beta M + G.

    A tensor of k modes has k factors with exponent -1 / (2 k). Vectors, and modes wider than ``max_dim``, keep the
    diagonal of their factor; for vectors that is Adagrad started at eps. Momentum is a heavy ball as in torch's SGD
    (with 1 - beta before G the same needs ten times the rate). Roots are taken in float64 at the first step and then
    every ``root_every`` steps, all factors of one size at once.

    Args:
        params: parameters or groups.
        lr: step size.
        eps: what factors start from; also the floor of their eigenvalues, halved. Below 1e-2 it may diverge.
        beta: of the momentum.
        factor_decay: d in L <- d L + (1 - d) G G^T instead of the sum, bias-corrected and damped by 1e-2 of the mean
            eigenvalue; roots are then refreshed at least every 1 / (4 (1 - d)) steps. The sum makes steps shrink over
            time, which an average does not, so the two tell accumulation from preconditioning.
        root_every: steps between roots.
        max_dim: widest mode with a full factor.
        grafting: give each tensor's step the length of another's: "sgd" (of M) or "adam" (betas beta and 0.999).
        weight_decay: decoupled.

    Raises:
        InputError: options out of range, or gradients so large that factors are not finite.

    >>> w = torch.nn.Parameter(torch.randn(3, 2))
    >>> w.grad = torch.randn(3, 2)
    >>> Shampoo([w], lr=0.1).step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        eps: float = 1e-2,
        beta: float = 0.9,
        factor_decay: float | None = None,
        root_every: int = 20,
        max_dim: int = 1024,
        grafting: Literal["sgd", "adam"] | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "eps": eps,
                "beta": beta,
                "factor_decay": factor_decay,
                "root_every": root_every,
                "max_dim": max_dim,
                "grafting": grafting,
                "weight_decay": weight_decay,
            },
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, its options checked first."""
        options = {**self.defaults, **param_group}
        checks.nonnegative("lr", options["lr"])  # schedulers may bring it to 0
        checks.positive("eps", options["eps"])
        checks.require(
            0 <= checks.number("beta", options["beta"]) < 1,
            f"beta is {options['beta']}; it must lie in [0, 1).",
        )
        if options["factor_decay"] is not None:
            checks.fraction("factor_decay", options["factor_decay"], one=False)
        for name in ("root_every", "max_dim"):
            checks.whole(name, options[name])
        checks.one_of("grafting", options["grafting"], (None, "sgd", "adam"))
        checks.nonnegative("weight_decay", options["weight_decay"])
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            checks.require(
                p.dtype in (torch.float32, torch.float64),
                f"params has a tensor of {p.dtype}; inverse roots need float32 or float64.",
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            live = [p for p in group["params"] if p.grad is not None]
            checks.require(
                not any(p.grad.is_sparse for p in live), "gradients are sparse; Shampoo needs dense ones."
            )
            for p in live:
                self._accumulate(p, group)
            self._take_roots([self.state[p] for p in live], group)
            for p in live:
                self._move(p, group)
        return loss

    def _accumulate(self, p: Tensor, group: dict[str, Any]) -> None:
        """Momentum and factors with the present gradient."""
        assert p.grad is not None
        state, d = self.state[p], group["factor_decay"]
        grad = p.grad if p.ndim else p.grad[None]
        if not state:
            state["step"] = 0
            state["momentum"] = torch.zeros_like(p)
            for mode in range(grad.ndim):
                state[f"factor{mode}"] = _start(grad, mode, group["max_dim"], 0.0 if d else group["eps"])
        state["step"] += 1
        state["momentum"].mul_(group["beta"]).add_(p.grad)
        for mode in range(grad.ndim):
            factor = state[f"factor{mode}"]
            rows = grad.movedim(mode, 0).reshape(grad.shape[mode], -1)
            now = rows @ rows.T if factor.ndim == 2 else rows.square().sum(1)
            factor.add_(now) if d is None else factor.lerp_(now, 1 - d)
        if group["grafting"] == "adam":
            state.setdefault("square", torch.zeros_like(p)).lerp_(p.grad.square(), 1 - ADAM)

    def _take_roots(self, states: list[dict[str, Any]], group: dict[str, Any]) -> None:
        """Inverse roots of the factors whose time has come, those of one size and order together."""
        due: dict[tuple[int, ...], list[tuple[dict[str, Any], str]]] = {}
        for state in states:
            if (state["step"] - 1) % _every(group) == 0:
                names = [k for k in state if k.startswith("factor")]
                for name in names:
                    due.setdefault((*state[name].shape, len(names)), []).append((state, name))
        floor = group["eps"] / 2 if group["factor_decay"] is None else torch.finfo(torch.float64).tiny
        for (*_, order), own in due.items():
            factors = torch.stack([_ready(state[name], state["step"], group) for state, name in own])
            for (state, name), root in zip(own, inverse_roots(factors, 2 * order, floor), strict=True):
                state[name.replace("factor", "root")] = root.to(state[name].dtype)

    def _move(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        update = state["momentum"] if p.ndim else state["momentum"][None]
        for mode in range(update.ndim):
            root = state[f"root{mode}"]
            moved = update.movedim(mode, -1)
            update = (moved @ root if root.ndim == 2 else moved * root).movedim(-1, mode)
        if group["grafting"] is not None:
            update = update * (_graft(state, group) / update.norm().clamp(min=1e-30))
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.reshape(p.shape), alpha=group["lr"])


def _start(grad: Tensor, mode: int, max_dim: int, eps: float) -> Tensor:
    size = grad.shape[mode]
    if grad.ndim >= 2 and size <= max_dim:
        return eps * torch.eye(size, dtype=grad.dtype, device=grad.device)
    return torch.full((size,), eps, dtype=grad.dtype, device=grad.device)


def _every(group: dict[str, Any]) -> int:
    d, every = group["factor_decay"], int(group["root_every"])
    return every if d is None else max(1, min(every, int(1 / (1 - d) / 4)))


def _ready(factor: Tensor, step: int, group: dict[str, Any]) -> Tensor:
    """A factor in float64; averaged ones with their bias corrected and damped."""
    factor, d = factor.double(), group["factor_decay"]
    if d is None:
        return factor
    factor = factor / (1 - d**step)
    mean = (factor.diagonal() if factor.ndim == 2 else factor).mean()
    damp = RELATIVE * mean + torch.finfo(torch.float64).tiny
    if factor.ndim == 1:
        return factor + damp
    return factor + damp * torch.eye(len(factor), dtype=factor.dtype, device=factor.device)


def _graft(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Length of the step that is grafted on."""
    momentum: Tensor = state["momentum"]
    grafted = momentum
    if group["grafting"] == "adam":
        grafted = _adam(momentum, state, group["beta"])
    found: Tensor = torch.linalg.vector_norm(grafted)
    return found


def _adam(momentum: Tensor, state: dict[str, Any], beta: float) -> Tensor:
    average = momentum * (1 - beta) / (1 - beta ** state["step"])
    square: Tensor = state["square"] / (1 - ADAM ** state["step"])
    step: Tensor = average / (square.sqrt() + 1e-8)
    return step


def inverse_roots(factors: Tensor, order: int, floor: float) -> Tensor:
    """A^{-1 / order} of positive matrices [n, d, d], or of diagonals [n, d], in float64.

    Eigenvalues are raised to ``floor`` where rounding left them below. A factorisation that fails is tried again with a
    thousandth, then a tenth of the largest entry on the diagonal.

    Raises:
        InputError: entries that are not finite, or three failures.
    """
    checks.require(
        bool(torch.isfinite(factors).all()),
        "gradients made a factor that is not finite; lower lr or raise eps.",
    )
    wide = factors.double()
    if wide.ndim == 2:
        diagonal: Tensor = wide.clamp(min=floor).pow(-1 / order)
        return diagonal
    eye = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    for damp in (0.0, 1e-3, 1e-1):
        try:
            values, vectors = torch.linalg.eigh(wide + damp * wide.abs().amax((1, 2), keepdim=True) * eye)
        except RuntimeError:  # torch.linalg's error among them
            continue
        powers = values.clamp(min=floor).pow(-1 / order)
        found: Tensor = (vectors * powers[:, None]) @ vectors.mT
        return found
    return checks.refuse("factors could not be decomposed, even damped; lower lr or raise eps.")
