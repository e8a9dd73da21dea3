r"""GNS: regularised Newton steps with one self-tuned radius, for exact and approximate Hessians.

"Gradient-Normalized Smoothness for Optimization with Approximate Hessians", ICLR 2026, arXiv 2506.13710.

With |h|^2 = h.B h, |g|_*^2 = g.B^{-1} g and any symmetric H(x), the radius gamma says how far the linear model of the
gradient is trusted, relative to the gradient:

    lambda = |g(x)|_* / gamma,    x+ = x - (H(x) + lambda B)^{-1} g(x),

and a trial is accepted if f(x) - f(x+) >= |g(x+)|_*^2 / (8 lambda). Then gamma doubles for the next iteration; else
it is halved and the same H tried again (Algorithm 1). For H >= 0 a step is never longer than gamma. The one number
adapts to the class: gamma = |g| / L for an L-Lipschitz gradient and H = 0 (gradient descent), sqrt(|g| / L2) for a
Lipschitz Hessian, 1 / M for quasi-self-concordant f, where the rate is linear from the start.

Readings and differences from the released code: the division is by gamma itself, not gamma + 1e-8, so that a step for
H = 0 has length gamma; a matrix that is not positive definite is a rejected trial (the code leaves the search and
applies the step before); when every trial fails nothing moves (the code moves).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from gradmatch.core.checks import InputError, finite, nonnegative, one_of, positive, require, whole
from gradmatch.core.problem import twice_differentiable
from gradmatch.core.shifted import SOLVERS, LowRank, Matrix, Metric, Shifted, Solver, shifted
from gradmatch.optim import _matrices, _protocol
from gradmatch.optim._regularised import Objective, Point, Result, Step, minimize, search
from gradmatch.optim._vector import Vector, VectorOptimizer

__all__ = ["GradNormInfo", "GradNormSmooth", "LowRank", "Result", "minimize_gns"]

Curvature = Literal["hessian", "ggn", "fisher", "empirical_fisher", "diagonal", "rank_one", "none"]
CURVATURES: tuple[Curvature, ...] = get_args(Curvature)
OF_OUTPUTS = ("ggn", "fisher", "empirical_fisher", "diagonal")
DENSE_LIMIT = 5000


@dataclass(frozen=True)
class _GradNorm:
    """The rule above."""

    least: float = 1e-9

    def damping(self, scale: float, norm: float, g: Tensor, system: Shifted, metric: Metric) -> float:
        """lambda = |g|_* / gamma."""
        return norm / scale

    def accepts(self, damping: float, before: Point, after: Point, metric: Metric) -> bool:
        """The functional decrease."""
        return before.value - after.value >= metric.dual2(after.gradient) / (8 * damping)

    def relaxed(self, scale: float) -> float:
        """2 gamma."""
        return max(2 * scale, self.least)

    def tightened(self, scale: float) -> float:
        """gamma / 2."""
        return scale / 2


def exact_hessian(f: Objective) -> Callable[[Tensor], Tensor]:
    """x -> the Hessian [P, P] of ``f`` by torch.func."""

    def value(x: Tensor) -> Any:
        found = f(x)
        return found[0] if isinstance(found, tuple) else found

    def hessian(x: Tensor) -> Tensor:
        with twice_differentiable():
            found: Tensor = torch.func.hessian(value)(x)
        return (found + found.T) / 2

    return hessian


def minimize_gns(
    f: Objective,
    x0: Float[Tensor, " P"],
    *,
    hess: Literal["exact"] | Callable[[Tensor], Matrix] | None = "exact",
    metric: Tensor | None = None,
    gamma0: float = 1.0,
    gamma_min: float = 1e-9,
    max_trials: int = 40,
    solver: Solver = "auto",
    tol_grad: float = 0.0,
    f_star: float | None = None,
    tol: float = 1e-8,
    max_iter: int = 1000,
) -> Result:
    """Minimise a smooth function of a vector.

    Args:
        f: x [P] -> the value, or (value, gradient [P]). In float32 the decrease of the last iterations cannot be seen.
        x0: where to start.
        hess: "exact" (torch.func of ``f``), None for H = 0, or x -> H: a matrix [P, P], a diagonal [P],
            :class:`LowRank` rows or a linear operator.
        metric: B, None for the identity, a diagonal [P] or a matrix [P, P].
        gamma0, gamma_min, max_trials: 1, 1e-9 and 40, as released.
        solver: see :mod:`gradmatch.core.shifted`.
        tol_grad: ends when the dual norm of the gradient is under it.
        f_star, tol: ends when f - f_star < tol, where the minimum is known.
        max_iter: most iterations.

    Raises:
        InputError: f or gradient not finite at x0, an H that is not symmetric or a B that is not positive definite.

    >>> result = minimize_gns(lambda x: ((x - 3) ** 4).sum(), torch.zeros(2, dtype=torch.float64), tol_grad=1e-9)
    >>> result.status, result.x.round(decimals=2)
    ('converged', tensor([3., 3.], dtype=torch.float64))
    """
    positive("gamma0", gamma0)
    positive("gamma_min", gamma_min)
    if isinstance(hess, str):
        one_of("hess", hess, ("exact",))
        hess = exact_hessian(f)
    return minimize(
        f, x0, _GradNorm(gamma_min), gamma0, hess=hess, metric=metric, solver=solver, tol_grad=tol_grad,
        f_star=f_star, tol=tol, max_iter=max_iter, max_trials=max_trials,
    )  # fmt: skip


@dataclass(frozen=True)
class GradNormInfo:
    """What the last step did.

    Attributes:
        gamma: radius for the next step.
        damping: the last trial's lambda.
        trials: systems solved.
        decrease: of f; 0 if nothing moved.
        grad_norm: dual norm of the gradient before the step.
        status: "stepped", "converged" (grad_norm at most tol_grad), "stalled" (no trial was accepted) or "still" (the
            groups' lr is 0).
    """

    gamma: float
    damping: float
    trials: int
    decrease: float
    grad_norm: float
    status: Literal["stepped", "converged", "stalled", "still"]


class GradNormSmooth(VectorOptimizer):
    """GNS for a model's parameters, on a full batch; see the module.

    The closure is evaluated several times a step and must be deterministic (checked once): it returns the loss, or for
    "ggn", "fisher", "empirical_fisher" and "diagonal" (outputs, loss_of_outputs) with per-example losses [n].

    Groups hold an ``lr`` of 1, by which every trial step is multiplied: schedulers and Hugging Face's Trainer want one.

    Args:
        params: parameters; groups may not differ in their settings.
        curvature: "hessian"; "ggn"; "fisher" (the same matrix: losses are read as likelihoods in natural parameters,
            for which the two are equal); "empirical_fisher", without the part of weight decay; "diagonal" of "ggn";
            "rank_one", ((power - 2) / (power f)) g g^T, the paper's Fisher term of losses |u|^power / power; "none";
            or x [P] -> H as for :func:`minimize_gns`.
        metric: B over all parameters that are not frozen, strung together in their order.
        gamma0, gamma_min, max_trials: as for :func:`minimize_gns`.
        solver: see :mod:`gradmatch.core.shifted`; "cg" never builds a matrix ("hessian", "ggn", "fisher").
        tol_grad: a gradient of at most this dual norm ends the step without moving.
        weight_decay: c of a term c / 2 |x|^2 that is added to the loss, its gradient and (c I) the curvature.
        power: of "rank_one".

    Attributes:
        info: what the last step did, a :class:`GradNormInfo`.

    Raises:
        InputError: see :func:`minimize_gns`; a closure of the wrong kind or whose value changes from call to call;
            more than 5,000 parameters without solver="cg" or a curvature that is of low rank.

    >>> model = torch.nn.Linear(3, 2).double()
    >>> x, y = torch.randn(20, 3, dtype=torch.float64), torch.arange(20) % 2
    >>> optimizer = GradNormSmooth(model.parameters(), curvature="ggn", weight_decay=1e-3)
    >>> losses = lambda z: torch.nn.functional.cross_entropy(z, y, reduction="none")
    >>> for _ in range(20):
    ...     loss = optimizer.step(lambda: (model(x), losses))
    >>> optimizer.info.grad_norm < 1e-8
    True
    """

    protocols = ("loss closure", "output closure")

    def __init__(
        self,
        params: Iterable[Any],
        *,
        curvature: Curvature | Callable[[Tensor], Matrix] = "hessian",
        metric: Tensor | None = None,
        gamma0: float = 1.0,
        gamma_min: float = 1e-9,
        max_trials: int = 40,
        solver: Solver = "auto",
        tol_grad: float = 0.0,
        weight_decay: float = 0.0,
        power: float = 4.0,
    ) -> None:
        if not callable(curvature):
            one_of("curvature", curvature, CURVATURES)
        self.curvature, self.solver, self.metric = (
            curvature,
            one_of("solver", solver, SOLVERS),
            Metric(metric),
        )
        self.info: GradNormInfo | None = None
        self.protocols = ("output closure",) if curvature in OF_OUTPUTS else ("loss closure",)  # type: ignore[misc, assignment]
        settings = {"gamma0": gamma0, "gamma_min": gamma_min, "max_trials": max_trials, "tol_grad": tol_grad}
        super().__init__(params, {"lr": 1.0, **settings, "weight_decay": weight_decay, "power": power})

    def _check_settings(self, group: dict[str, Any]) -> None:
        nonnegative("lr", group["lr"])
        positive("gamma0", group["gamma0"])
        positive("gamma_min", group["gamma_min"])
        whole("max_trials", group["max_trials"])
        nonnegative("tol_grad", group["tol_grad"])
        nonnegative("weight_decay", group["weight_decay"])
        require(group["power"] > 2, f"power is {group['power']!r}; it must be above 2.")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One iteration; returns the loss before it (with weight decay's part)."""
        _protocol.require_closure(self._name, closure, self.protocols)
        assert closure is not None
        group, params = self.param_groups[0], [p for p in self._all_params() if p.requires_grad]
        loss, outputs, losses = self._evaluated(closure)
        used = torch.autograd.grad(loss, params, allow_unused=True, retain_graph=True)
        vector = Vector([p for p, g in zip(params, used, strict=True) if g is not None])
        require(bool(vector.params), f"{self._name}.step got a loss without a graph to the parameters.")
        if self.metric.b is not None:
            require(
                len(vector.params) == len(params),
                "metric spans all parameters that are not frozen, and the loss depends on some alone; leave the "
                "others out.",
            )
            self.metric.fits(vector.size)
        at = self._point(vector, loss, [g for g in used if g is not None])
        finite("the gradient", at.gradient)
        norm = self.metric.dual2(at.gradient) ** 0.5
        memory = self._memory()
        if not memory:
            memory.update(step=0, gamma=float(group["gamma0"]))
            self._require_same(closure, loss)
        memory["step"] += 1
        if norm <= group["tol_grad"] or norm == 0 or group["lr"] == 0:
            status: Any = "still" if group["lr"] == 0 else "converged"
            self.info = GradNormInfo(memory["gamma"], 0.0, 0, 0.0, norm, status)
            return torch.as_tensor(at.value, dtype=loss.dtype, device=loss.device)
        matrix = self._matrix(vector, at, loss, outputs, losses)
        system = shifted(matrix, self.metric, vector.size, ridge=group["weight_decay"], solver=self.solver)
        rule = _GradNorm(group["gamma_min"])
        tried = search(
            lambda x: self._trial(vector, x, closure), at, system, self.metric, rule, memory["gamma"],
            group["max_trials"], float(group["lr"]),
        )  # fmt: skip
        self._settle(vector, at, tried, norm, memory)
        return torch.as_tensor(at.value, dtype=loss.dtype, device=loss.device)

    def _settle(self, vector: Vector, at: Point, tried: Step, norm: float, memory: dict[str, Any]) -> None:
        """Leave the parameters at the accepted point, or where they were."""
        if tried.point is None:
            vector.write(at.x)
            warnings.warn(
                f"{self._name} accepted none of {tried.trials} trials and moved nothing; the decrease may be under "
                "what the loss's floating type can show, or the closure is not deterministic.",
                stacklevel=4,
            )
            self.info = GradNormInfo(memory["gamma"], tried.damping, tried.trials, 0.0, norm, "stalled")
            return
        memory["gamma"] = tried.scale
        decrease = at.value - tried.point.value
        self.info = GradNormInfo(tried.scale, tried.damping, tried.trials, decrease, norm, "stepped")

    # --- the loss ------------------------------------------------------------------------------------------

    def _evaluated(self, closure: Callable[[], Any]) -> tuple[Tensor, Tensor | None, Any]:
        """(loss with graph, outputs, losses of outputs) where the parameters are."""
        params = self._all_params()
        with twice_differentiable():
            if self.protocols[0] == "loss closure":
                return _protocol.loss_with_graph(self._name, params, closure, self.protocols), None, None
            outputs, losses = _protocol.outputs_and_loss(self._name, params, closure, self.protocols)
            with torch.enable_grad():
                return finite("loss", losses(outputs).mean()), outputs, losses

    def _require_same(self, closure: Callable[[], Any], loss: Tensor) -> None:
        with torch.no_grad():
            found = closure()
            again = found[1](found[0]).mean() if isinstance(found, tuple) else found
        if not torch.equal(again.detach(), loss.detach()):
            raise InputError(
                f"closure gave {float(loss.detach()):.9g} and then {float(again):.9g} at the same parameters; "
                f"{self._name} needs a deterministic full-batch closure (model.eval(), the same data)."
            )

    def _point(self, vector: Vector, loss: Tensor, blocks: list[Tensor]) -> Point:
        decay, x = self.param_groups[0]["weight_decay"], vector.read()
        value, gradient = float(loss.detach()), vector.flat(blocks).detach()
        if decay:
            value, gradient = value + decay / 2 * float(x @ x), gradient + decay * x
        return Point(x, value, gradient)

    def _trial(self, vector: Vector, x: Tensor, closure: Callable[[], Any]) -> Point:
        vector.write(x)
        with torch.enable_grad():
            found = closure()
            loss = found[1](found[0]).mean() if isinstance(found, tuple) else found
        grads = torch.autograd.grad(loss, vector.params)
        return self._point(vector, loss, list(grads))

    # --- the curvature -------------------------------------------------------------------------------------

    def _matrix(self, vector: Vector, at: Point, loss: Tensor, outputs: Tensor | None, losses: Any) -> Matrix:
        """H at the point, without weight decay's part."""
        kind, dense = self.curvature, self.solver != "cg"
        if callable(kind):
            return kind(at.x)
        if kind == "none":
            return None
        if kind == "rank_one":
            power, value = self.param_groups[0]["power"], float(loss.detach())
            require(value >= 0, f'loss is {value:.3g}; curvature="rank_one" is of losses |u|^power / power.')
            own = at.gradient - self.param_groups[0]["weight_decay"] * at.x
            return LowRank(own[None] * ((power - 2) / (power * value)) ** 0.5) if value > 0 else None
        small = kind == "diagonal" or (
            kind != "hessian" and outputs is not None and len(outputs) * 4 < vector.size
        )
        require(
            vector.size <= DENSE_LIMIT or not dense or small,
            f'{vector.size} parameters and curvature="{kind}"; a matrix is built for at most {DENSE_LIMIT}, so pass '
            'solver="cg" or a curvature of low rank.',
        )
        if kind == "hessian":
            return _matrices.hessian(vector, loss, dense)
        assert outputs is not None
        if kind == "diagonal":
            return _matrices.gauss_newton_diagonal(vector, outputs, losses)
        if kind == "empirical_fisher":
            return _matrices.empirical_fisher(vector, outputs, losses)
        return _matrices.gauss_newton(vector, outputs, losses, dense)
