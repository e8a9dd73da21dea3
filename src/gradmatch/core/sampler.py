"""Sampling: a times array, a step, three hooks a step, and an exact count of network calls.

A model is a callable ``(x, t, cond) -> Prediction`` with x (n, ...) and t (n,). A learned schedule is only another
``times`` array; guidance, reflection and straight-through gradients are hooks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core._dopri5 import Stretch, dopri5
from gradmatch.core.path import AffinePath, Path, Prediction, ResidualPath, Time

STEPS = ("euler", "heun", "ddim", "dopri5", "exponential")

Model = Callable[..., Prediction]
"""(x (n, ...), t (n,) or a number, cond) -> Prediction."""


class Network:
    """A module or function that returns a plain tensor, as a model.

    Args:
        forward: called as ``forward(x, t)``, or ``forward(x, t, cond)`` where a condition is given.
        kind: what the tensor is: "x0", "noise", "v", "velocity", "score" (or "posterior" on a simplex).

    >>> model = Network(lambda x, t: -x, "velocity")
    >>> model(torch.ones(2, 3), torch.zeros(2)).kind
    'velocity'
    """

    def __init__(self, forward: Callable[..., Tensor], kind: str) -> None:
        self.forward, self.kind = forward, kind

    def __call__(self, x: Tensor, t: Tensor, cond: Any = None) -> Prediction:
        return Prediction(self.kind, self.forward(x, t) if cond is None else self.forward(x, t, cond))


class Calls:
    """Counts how often networks see each example; a guided pair counts twice."""

    def __init__(self, examples: int) -> None:
        self.examples, self.everyone = examples, 0
        self.some = torch.zeros(0, dtype=torch.long)
        self.index: Tensor | None = None
        """The examples of the present batch, where they are not all."""

    def counted(self, model: Model) -> Model:
        """``model``, every call of it counted; a time given as a number becomes one for each example."""

        def call(x: Tensor, t: Time, cond: Any = None) -> Prediction:
            self._add(len(x))
            if not isinstance(t, Tensor):
                kind = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
                t = torch.full((len(x),), t, dtype=kind, device=x.device)
            return model(x, t, cond)

        return call

    def _add(self, rows: int) -> None:
        active = self.examples if self.index is None else len(self.index)
        if rows % active:
            checks.refuse(f"a model was called on {rows} rows; the batch has {active} examples.")
        if self.index is None:
            self.everyone += rows // active
            return
        if not len(self.some):
            self.some = torch.zeros(self.examples, dtype=torch.long)
        self.some[self.index.cpu()] += rows // active

    def total(self) -> Tensor:
        """Calls so far (n,)."""
        counts = torch.full((self.examples,), self.everyone, dtype=torch.long)
        return counts + self.some if len(self.some) else counts


@dataclass
class State:
    """Where the solver is. Hooks may change ``x``; ``counted`` adds another network's calls to the count."""

    x: Tensor
    path: Path
    model: Model
    cond: Any
    calls: Calls
    steps: int
    index: int = 0
    t: float = 0.0
    t_next: float = 0.0

    def counted(self, model: Model) -> Model:
        """``model`` with its calls counted as this run's."""
        return self.calls.counted(model)


class Hook:
    """What may happen around a step; override what is needed."""

    def wrap(self, model: Model, path: Path) -> Model:
        """The model to use in place of ``model``, for hooks that change how it is called."""
        return model

    def before_step(self, state: State) -> None:
        """Before the model is called at ``state.x``, ``state.t``."""

    def on_prediction(self, prediction: Prediction, x: Tensor, t: Time, state: State) -> Prediction:
        """After each call at (x, t); the prediction to go on with."""
        return prediction

    def after_step(self, state: State) -> None:
        """After ``state.x`` has gone to ``state.t_next``."""


@dataclass(frozen=True)
class Trajectory:
    """What a solver found.

    Attributes:
        x: the end points (n, ...).
        calls: network calls of each example (n,).
        times: (steps + 1,) float64.
        states: (steps + 1, n, ...) if recorded.
        predictions: what was predicted at the beginning of every step, if recorded (not with dopri5).
    """

    x: Tensor
    calls: Tensor
    times: Tensor
    states: Tensor | None = None
    predictions: tuple[Prediction, ...] = field(default=(), repr=False)


class Solver:
    """Takes a batch along ``times`` by one kind of step.

    Args:
        times: strictly rising or falling, two or more; from noise to data unless you mean to invert.
        step: "euler" and "heun" (two calls; one at the last step to sigma = 0 unless the velocity is predicted)
            follow dx/dt; "ddim" and its name on a simplex, "exponential", are the path's exact step with the
            prediction held fixed; "dopri5" is adaptive, with every example's own step size, so that results do not
            depend on the batch: ``times`` are then only where it must stop.
        rtol, atol: error allowed a step by dopri5, in root mean square over an example; 1e-5.

    Raises:
        InputError: times or step as above not kept.

    >>> from gradmatch.core.path import LinearPath
    >>> model = Network(lambda x, t: torch.ones_like(x), "velocity")
    >>> found = Solver([1.0, 0.5, 0.0]).run(model, LinearPath(), torch.zeros(3, 2))
    >>> found.x[0].tolist(), found.calls.tolist()
    ([-1.0, -1.0], [2, 2, 2])
    """

    def __init__(
        self,
        times: Sequence[float] | Tensor,
        step: str = "euler",
        *,
        rtol: float = 1e-5,
        atol: float = 1e-5,
    ) -> None:
        self.times = as_times(times)
        self.step = checks.one_of("step", step, STEPS)
        self.rtol, self.atol = checks.positive("rtol", rtol), checks.positive("atol", atol)

    def run(
        self,
        model: Model,
        path: Path,
        x: Tensor,
        *,
        cond: Any = None,
        hooks: Sequence[Hook] = (),
        record: bool = False,
    ) -> Trajectory:
        """From ``x`` (n, ...) at the first time to the last, without gradients.

        Args:
            model: see :data:`Model`; it is counted.
            path: what its predictions mean.
            cond: given to every call: a tensor (n, ...) or a mapping of them.
            hooks: in order.
            record: keep every state and prediction.

        Raises:
            InputError: an empty or non-finite ``x``, a model that gives no ``Prediction`` of the shape of ``x``,
                or samples that are not finite.
        """
        checks.require(x.ndim > 0 and len(x) > 0, "x is empty; at least one example is needed.")
        checks.finite("x", x)
        adaptive = self.step == "dopri5"
        checks.require(
            not (adaptive and isinstance(path, ResidualPath)),
            "step is 'dopri5', which drops examples as they arrive; a residual path holds one end point for each. "
            "Use 'ddim', 'euler' or 'heun'.",
        )
        calls = Calls(len(x))
        network = calls.counted(model)
        for hook in hooks:
            network = hook.wrap(network, path)
        times = self.times.tolist()
        state = State(x, path, network, cond, calls, len(times) - 1)
        states, predictions = [x], list[Prediction]()
        stretch: Stretch | None = None
        with torch.no_grad():
            for state.index, (state.t, state.t_next) in enumerate(itertools.pairwise(times)):
                for hook in hooks:
                    hook.before_step(state)
                if adaptive:
                    stretch = self._adaptive(state, hooks, stretch if not hooks else None)
                else:
                    first = self._fixed(state, hooks)
                for hook in hooks:
                    hook.after_step(state)
                if record:
                    states.append(state.x)
                    predictions += [] if adaptive else [first]
        checks.finite("the sample", state.x)
        kept = torch.stack(states) if record else None
        return Trajectory(state.x, calls.total(), self.times, kept, tuple(predictions))

    def _fixed(self, state: State, hooks: Sequence[Hook]) -> Prediction:
        """One step of fixed size; gives the prediction at its beginning."""
        x, path, t, t_next = state.x, state.path, state.t, state.t_next
        first = predicted(state, hooks, x, t)
        if self.step in ("ddim", "exponential"):
            state.x = path.step(x, first, t, t_next)
            return first
        slope, h = path.velocity(x, first, t), t_next - t
        state.x = x + h * slope
        if self.step == "heun" and not (first.kind != "velocity" and _noiseless(path, t_next)):
            second = predicted(state, hooks, state.x, t_next)
            state.x = x + (h / 2) * (slope + path.velocity(state.x, second, t_next))
        return first

    def _adaptive(self, state: State, hooks: Sequence[Hook], stretch: Stretch | None) -> Stretch:
        def slope(x: Tensor, t: Tensor, index: Tensor) -> Tensor:
            state.calls.index = index
            at = x.to(state.x.dtype)
            said = predicted(state, hooks, at, t, part(state.cond, index, len(state.x)))
            return state.path.velocity(at, said, t).double()

        found = dopri5(slope, state.x, state.t, state.t_next, stretch, self.rtol, self.atol)
        state.x, state.calls.index = found.x.to(state.x.dtype), None
        return found


def as_times(times: Sequence[float] | Tensor) -> Tensor:
    """Times as float64 on the CPU, refused unless finite, two or more, strictly rising or falling."""
    found = torch.as_tensor(times, dtype=torch.float64).detach().cpu().flatten()
    checks.finite("times", found)
    steps = found.diff()
    checks.require(
        len(found) >= 2 and (bool((steps > 0).all()) or bool((steps < 0).all())),
        f"times has {len(found)} entries; it must be two or more, strictly rising or strictly falling.",
    )
    return found


def predicted(state: State, hooks: Sequence[Hook], x: Tensor, t: Time, cond: Any = None) -> Prediction:
    """What the model and then the hooks say at (x, t)."""
    said = state.model(x, t, state.cond if cond is None else cond)
    if not isinstance(said, Prediction):  # the sentences are not made unless they are needed
        checks.refuse(
            f"the model gave a {type(said).__name__}; it must give a Prediction (Network(module, kind) makes one)."
        )
    if said.tensor.shape != x.shape:
        checks.refuse(
            f"the model gave shape {tuple(said.tensor.shape)}; it must give that of x, {tuple(x.shape)}."
        )
    for hook in hooks:
        said = hook.on_prediction(said, x, t, state)
    return said


def part(cond: Any, index: Tensor, of: int) -> Any:
    """A condition for the examples at ``index`` out of ``of``."""
    if isinstance(cond, Mapping):
        return {k: part(v, index, of) for k, v in cond.items()}
    return cond[index] if isinstance(cond, Tensor) and cond.ndim > 0 and len(cond) == of else cond


def _noiseless(path: Path, t: float) -> bool:
    return (
        isinstance(path, AffinePath) and float(path.levels(torch.tensor(t, dtype=torch.float64)).sigma) == 0
    )
