r"""SSO: one expensive gradient at the model's outputs, then many cheap parameter steps on a surrogate made of it.

"Target-based Surrogates for Stochastic Optimization", Lavington, Vaswani, Babanezhad, Schmidt, Le Roux; ICML 2023,
arXiv 2302.02607.

With z = f(theta) the outputs on a batch of b examples, l their losses and g_i = dl_i / dz_i at z_t,

    q_t(theta) = (1/b) sum_i [ l_i(z_t) + <g_i, f_i(theta) - z_i> + |f_i(theta) - z_i|^2 / (2 eta) ].

If every l_i is L-smooth in its outputs and eta <= 1/L, q_t lies above the loss and touches it at theta_t, so any
decrease of q_t, for which l is never called, is one of the loss. L is known whatever the data are: 1 for
0.5 |z - y|^2 (then q_t *is* the loss), 1/4 for the logistic loss (eta = 4), 1/2 for softmax (eta = 2).

Readings: the per-example form, so that eta has the units of 1/L of one example whatever the batch; the released code
has <g, f> / E + |f - f_t|^2 of sums, that is eta = stepsize / 2. Adagrad's |g_k|^2 is the batch mean of |g_i|^2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradmatch.core.checks import InputError, finite, nonnegative, one_of, positive, require, whole
from gradmatch.optim import _protocol
from gradmatch.optim._parts import wide_dtype
from gradmatch.optim._surrogate import (
    DIVERGENCES,
    Divergence,
    Inner,
    Surrogate,
    Target,
    TargetStep,
    armijo_descent,
    run_inner,
)
from gradmatch.optim._vector import Vector, VectorOptimizer, reached

__all__ = ["SurrogateStats", "TargetSurrogate"]

TargetLoss = Callable[[Tensor], Any]


@dataclass(frozen=True)
class SurrogateStats:
    """What the last step did, and what all steps cost.

    Attributes:
        calls: expensive calls of the target loss so far ("armijo" and ``verify`` make more than one a step).
        forwards: passes of the model so far, without those of closures called to look at them.
        inner_steps: of the last step; fewer than asked for where the surrogate's gradient came under ``tol``.
        eta: of the last step (its mean, where it differs by output).
        before, after: the surrogate's values around the last step's inner loop; ``before`` is the loss.
        violated: whether the loss came to lie above the surrogate, with ``verify``; else None.
    """

    calls: int
    forwards: int
    inner_steps: int
    eta: float
    before: float
    after: float
    violated: bool | None


class TargetSurrogate(VectorOptimizer):
    """SSO; see the module.

    Step it with ``step(forward, target_loss)``, or in the output-closure protocol with ``step(closure)`` and
    ``closure() -> (outputs, target_loss)``. ``forward`` is called again and again on the same batch and gives the
    outputs z [b, ...]; ``target_loss`` gets z without its graph and gives losses [b], or (losses [b], gradient of their
    sum), so that it may live outside autograd. It is called once a step.

    Args:
        params: parameters; groups may not differ in their settings. Groups hold eta as ``lr``, so torch's schedulers
            move it.
        eta: target-space step; 1/L of one example's loss is safe, larger ones (4/L, 10/L) are often faster.
        eta_schedule: "constant", "sqrt", "exp", "armijo", "adagrad" or "adagrad_diagonal"
            (``step(..., index=places of the examples)``); see :class:`TargetStep`.
        inner: "armijo_gd", or params -> a torch optimizer, which is made anew for every surrogate.
        inner_steps: m; with 1 and plain gradient descent this is SGD.
        divergence: "l2"; "logistic", weighted by p (1 - p) of the outputs; "kl" for outputs on the simplex; or
            (new, old) -> its elementwise parts.
        tol: ends the inner loop when the surrogate's gradient norm is at most this.
        total_steps: T of "exp".
        armijo_c: of "armijo", 0.5 in the paper's runs (0.1 is its code's default).
        verify: spend one more call of the target loss a step to see whether the surrogate was violated.
        check_forward: evaluate ``forward`` twice in the first step and refuse one that changes (dropout).

    Attributes:
        stats: what was done, a :class:`SurrogateStats`.

    Batch norm in train mode moves its running statistics with every inner pass: keep the model in eval mode.

    Raises:
        InputError: outputs without a graph, losses or a gradient of another shape, eta <= 0, m < 1, outputs off the
            simplex with "kl", values that are not finite, a forward that changes.

    >>> model, x, y = torch.nn.Linear(3, 1), torch.randn(20, 3), torch.randn(20, 1)
    >>> optimizer = TargetSurrogate(model.parameters(), eta=1.0, inner_steps=20)
    >>> first = optimizer.step(lambda: model(x), lambda z: 0.5 * (z - y).square().sum(1))
    >>> bool(optimizer.stats.after < first), optimizer.stats.calls
    (True, 1)
    """

    protocols = ("output closure",)

    def __init__(
        self,
        params: Iterable[Any],
        *,
        eta: float = 1.0,
        eta_schedule: str = "constant",
        inner: str | Callable[[list[Tensor]], torch.optim.Optimizer] = "armijo_gd",
        inner_steps: int = 10,
        divergence: str | Divergence = "l2",
        tol: float = 1e-6,
        total_steps: int | None = None,
        armijo_c: float = 0.5,
        verify: bool = False,
        check_forward: bool = False,
    ) -> None:
        if isinstance(divergence, str):
            divergence = DIVERGENCES[one_of("divergence", divergence, DIVERGENCES)]
        if isinstance(inner, str):
            one_of("inner", inner, ("armijo_gd",))
        positive("eta", eta)
        self.inner, self.divergence = inner, divergence
        self.target_step = TargetStep(eta_schedule, total_steps, armijo_c)
        self.verify, self.check_forward = verify, check_forward
        self.stats: SurrogateStats | None = None
        super().__init__(params, {"lr": eta, "inner_steps": inner_steps, "tol": tol})

    def _check_settings(self, group: dict[str, Any]) -> None:
        nonnegative("lr", group["lr"])
        whole("inner_steps", group["inner_steps"])
        nonnegative("tol", group["tol"])

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        target_loss: TargetLoss | None = None,
        *,
        batch_size: int | None = None,
        index: Tensor | None = None,
    ) -> Any:
        """One expensive call and its inner loop; returns the mean loss at the outputs before.

        Args:
            closure: ``forward``, or without ``target_loss`` a closure that gives (outputs, target_loss).
            target_loss: see the class.
            batch_size: b, if the target loss gives the mean of b losses as one number.
            index: place of each example in the data [b], for "adagrad_diagonal".
        """
        _protocol.require_closure(self._name, closure, self.protocols)
        assert closure is not None
        z, target_loss, outputs = self._first(closure, target_loss)
        require(
            z.numel() > 0,
            f"{self._name}.step got outputs of shape {tuple(z.shape)}; a batch needs an example.",
        )
        require(
            bool(reached(z, self._all_params())),
            f"{self._name}.step got outputs without a graph to the parameters; compute them from the model with grad "
            "enabled.",
        )
        group, memory = self.param_groups[0], self._memory()
        if not memory:
            memory.update(step=0, calls=0, forwards=0)
            if self.check_forward:
                _require_same(z, outputs)
        memory["step"] += 1
        memory["calls"] += 1
        at = expensive(target_loss, z, batch_size)

        def value(targets: Tensor) -> float:
            memory["calls"] += 1
            return float(_losses(target_loss(targets), len(targets), batch_size)[0].mean())

        loss = at.losses.mean().to(z.dtype)
        if group["lr"] == 0:
            return loss
        eta = self.target_step.eta(group["lr"], at, memory, value, index)
        surrogate = Surrogate(at, eta, self.divergence)
        vector = Vector(reached(z, self._all_params()))
        start = vector.read()
        with torch.enable_grad():
            done = self._descend(vector, outputs, surrogate, z, memory, group)
        memory["forwards"] += 1 + done.forwards
        if not torch.isfinite(torch.tensor(done.value)):
            vector.write(start)
            raise InputError(
                f"the surrogate became {done.value} after {done.steps} inner steps; the inner optimizer diverged, so "
                "give it a smaller rate."
            )
        violated = self._violated(value, outputs, done, memory) if self.verify else None
        size = float(torch.as_tensor(eta).mean())
        self.stats = SurrogateStats(
            memory["calls"],
            memory["forwards"],
            done.steps,
            size,
            float(at.losses.mean()),
            done.value,
            violated,
        )
        return loss

    def _first(
        self, closure: Callable[[], Any], target_loss: TargetLoss | None
    ) -> tuple[Tensor, TargetLoss, Callable[[], Tensor]]:
        """Outputs with graph, the target loss, and how to have outputs again."""
        params = self._all_params()
        if target_loss is None:
            z, target_loss = _protocol.outputs_and_loss(self._name, params, closure, self.protocols)
            return z, target_loss, lambda: closure()[0]
        z, _ = _protocol.outputs_and_loss(
            self._name, params, lambda: (closure(), target_loss), self.protocols
        )
        return z, target_loss, closure

    def _descend(
        self,
        vector: Vector,
        outputs: Callable[[], Tensor],
        surrogate: Surrogate,
        z: Tensor,
        memory: dict[str, Any],
        group: dict[str, Any],
    ) -> Inner:
        if isinstance(self.inner, str):
            return armijo_descent(vector, outputs, surrogate, z, memory, group["inner_steps"], group["tol"])
        return run_inner(self.inner, vector, outputs, surrogate, z, group["inner_steps"])

    @staticmethod
    def _violated(
        value: Callable[[Tensor], float], outputs: Callable[[], Tensor], done: Inner, memory: dict[str, Any]
    ) -> bool:
        with torch.no_grad():
            z = outputs()
        memory["forwards"] += 1
        slack = 100 * torch.finfo(wide_dtype(z)).eps * max(1.0, abs(done.value))
        return value(z.to(wide_dtype(z))) > done.value + slack


def expensive(target_loss: TargetLoss, z: Tensor, batch_size: int | None = None) -> Target:
    """Call the target loss once at z; its own gradient, or autograd's, of the sum of the losses."""
    with torch.enable_grad():
        leaf = z.detach().to(wide_dtype(z)).requires_grad_()
        losses, g, scale = _losses(target_loss(leaf), len(z), batch_size)
        if g is None:
            require(
                losses.requires_grad,
                "target_loss gave losses without a graph and no gradient; give (losses, gradient).",
            )
            g = torch.autograd.grad(losses.sum(), leaf)[0] * scale
    require(
        g.shape == z.shape,
        f"target_loss gave a gradient of shape {tuple(g.shape)}; it must be shaped as the outputs, {tuple(z.shape)}.",
    )
    finite("the gradient of the target loss", g)
    return Target(
        leaf.detach().clone(), finite("losses", losses.detach()).to(leaf.dtype), g.detach().to(leaf.dtype)
    )


def _losses(found: Any, size: int, batch_size: int | None) -> tuple[Tensor, Tensor | None, float]:
    """Losses [b] (or a mean, [1]), a gradient if one was given, and what autograd's is to be multiplied by."""
    losses, g = found if isinstance(found, tuple) else (found, None)
    require(
        isinstance(losses, Tensor),
        f"target_loss gave {type(losses).__name__}; it must give losses ({size},).",
    )
    if losses.numel() == 1 and losses.ndim == 0:
        require(
            batch_size is not None,
            f"target_loss gave one number for {size} examples; give per-example losses ({size},), or pass batch_size "
            "for a mean.",
        )
        return losses[None], g, float(batch_size or 1)
    require(
        losses.shape == (size,),
        f"target_loss gave losses of shape {tuple(losses.shape)}; it must be one for each example, ({size},).",
    )
    return losses, g, 1.0


def _require_same(z: Tensor, outputs: Callable[[], Tensor]) -> None:
    with torch.no_grad():
        again = outputs()
    require(
        torch.equal(again, z.detach()),
        "forward gave other outputs at the same parameters; it must be deterministic (model.eval()).",
    )
