"""Running a program: on rows of weights, and as a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradmatch.core import checks
from gradmatch.optim._base import OptimizerBase
from gradmatch.optim._parts import Numbers, State, wide_dtype
from gradmatch.optim._program import RESULT, Program, Statement
from gradmatch.optim._program_functions import FUNCTIONS, Layout


class Machine:
    """A program ready to run on weights (..., P) that belong to the parameter tensors of ``layout``.

    Statements that do not matter are left out.

    >>> from gradmatch.optim import programs
    >>> step = Machine(programs.momentum(0.5), Layout([2]))
    >>> w, g = torch.zeros(2), torch.tensor([1.0, -2.0])
    >>> update, (m,) = step(w, g, 0.1, [torch.ones(2)])
    >>> update.tolist()
    [0.15000000596046448, -0.15000000596046448]
    """

    def __init__(self, program: Program, layout: Layout) -> None:
        program.kinds()
        self.program = program.trimmed()
        self.states = self.program.states
        self._lines = [(s.target, *_ready(s, layout)) for s in self.program.body]

    def __call__(
        self, w: Tensor, g: Tensor, lr: float, states: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """One step: the update to be subtracted from ``w``, and the living states after it."""
        values: dict[str, Any] = {"w": w, "g": g, "lr": _scalar(lr)}
        values.update(zip(self.states, states, strict=True))
        for target, run, arguments in self._lines:
            values[target] = run(*[values[a] if isinstance(a, str) else a for a in arguments])
        return values[RESULT], [values[name] for name in self.states]


def _ready(statement: Statement, layout: Layout) -> tuple[Callable[..., Tensor], list[Any]]:
    """The function of a statement, and its arguments as names and values."""
    function = FUNCTIONS[statement.function]
    arguments: list[Any] = [a if isinstance(a, str) else _scalar(a) for a in statement.arguments]
    return function.run, [*arguments, layout] if function.by_tensor else arguments


def _scalar(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


class ProgramOptimizer(OptimizerBase):
    """Any program of the search as a torch optimizer.

    Weights, gradients and states of a group are put into one row for a step, so that ``global_norm`` and ``dot`` see
    all of them and ``norm`` each parameter alone. State tensors are "s1", "s2", ... in the program's order.

    Args:
        params: parameters, named parameters or groups.
        program: as a :class:`Program` or its source.
        lr: what the program reads as ``lr``.
        maximize: ascend.

    Raises:
        InputError: a program that fails abstract execution, lr below 0, or an update that is not finite.

    >>> from gradmatch.optim import programs
    >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> optimizer = ProgramOptimizer([w], programs.lion(weight_decay=0.0), lr=0.1)
    >>> w.square().sum().backward()
    >>> optimizer.step()
    >>> [round(x, 3) for x in w.tolist()]
    [0.9, -1.9]
    """

    def __init__(
        self, params: Iterable[Any], program: Program | str, lr: float = 1e-3, *, maximize: bool = False
    ) -> None:
        self.program = (Program.parse(program) if isinstance(program, str) else program).trimmed()
        self.program.kinds()
        self.buffers = tuple(f"s{k}" for k, _ in enumerate(self.program.states, 1))  # type: ignore[misc]
        super().__init__(params, {"lr": lr, "maximize": maximize})

    def _check(self, group: dict[str, Any]) -> None:
        checks.nonnegative("lr", group["lr"])
        checks.require(not group["flat"], "flat=True; a program puts weights into one row by itself.")

    def _step_tensors(self, params: Sequence[Tensor], group: dict[str, Any]) -> None:
        gradients = {p: p.grad for p in params if p.grad is not None}
        own = list(gradients)
        if not own:
            return
        held = [self._counted(p, g, group) for p, g in gradients.items()]
        w, g = _row(own), _row(list(gradients.values()))
        states = [_row([s[name] for s in held]) for name in self.buffers]
        machine = Machine(self.program, Layout([p.numel() for p in own], w.device))
        update, after = machine(w, g.neg() if group["maximize"] else g, float(group["lr"]), states)
        checks.finite("update of the program", update)
        _spread(w - update, own)
        for name, row in zip(self.buffers, after, strict=True):
            _spread(row, [s[name] for s in held])

    def _numbers(self, group: dict[str, Any], counts: State) -> Numbers:
        return {}


def _row(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers in one vector, in float32 where they are of half precision."""
    return torch.cat([t.detach().reshape(-1).to(wide_dtype(t)) for t in tensors])


def _spread(row: Tensor, tensors: Sequence[Tensor]) -> None:
    """The reverse of :func:`_row`, in place."""
    parts = torch.split_with_sizes(row, [t.numel() for t in tensors])
    torch._foreach_copy_(list(tensors), [part.view_as(t) for part, t in zip(parts, tensors, strict=True)])
