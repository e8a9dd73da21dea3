"""Gradient averages that keep only what examples agree on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.core.gradients import group_gradients, per_example_gradients
from gradmatch.core.problem import Problem

__all__ = ["RobustGradient", "median", "winsorised_mean"]

Method = Literal["median", "rm3", "winsor"]
METHODS: tuple[Method, ...] = ("median", "rm3", "winsor")


class RobustGradient:
    """Step any optimizer with an average of gradients that suppresses what few examples want.

    ==========  ========================================================================================
    "median"    M3 (arXiv 2003.07422): the batch is cut into ``groups`` micro-batches (an odd number);
                entry by entry the median of their mean gradients
    "rm3"       the median of the gradients of this batch and the two before it, at no extra cost; the
                first two steps take their own gradient
    "winsor"    entry by entry, the ``c`` smallest and the ``c`` largest values of the batch are replaced
                by the next ones before averaging; c = 0 is the mean
    ==========  ========================================================================================

    The combined gradient is put into ``.grad`` of the optimizer's parameters, then the optimizer steps; parameters that
    are frozen, or that the problem does not select, get none and stay as they are. A median of skewed gradients is
    shorter than their mean, so compare at tuned learning rates.

    Args:
        optimizer: any ``torch.optim.Optimizer``.
        method, c, groups: as above; the paper's c = 2 belongs to batches of 50, groups = 3 to M3.

    Raises:
        InputError: an even number of groups or fewer than 3, c below 0.

    >>> net = nn.Linear(3, 2)
    >>> robust = RobustGradient(torch.optim.SGD(net.parameters(), 0.1), "winsor", c=1)
    >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
    >>> robust.step(Problem(net, "cross_entropy", (x, y)))
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, method: Method = "median", *, c: int = 1, groups: int = 3
    ) -> None:
        self.optimizer, self.method = optimizer, checks.one_of("method", method, METHODS)
        self.c, self.groups = checks.whole("c", c, least=0), checks.whole("groups", groups)
        checks.require(
            method != "median" or (groups >= 3 and groups % 2 == 1),
            f"groups is {groups}; a median needs an odd number of at least 3.",
        )
        self.before: list[Tensor] = []

    @property
    def params(self) -> list[nn.Parameter]:
        """The optimizer's parameters in order."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self, source: Problem | Callable[[int], Tensor]) -> float | None:
        """Combine the gradients of one batch and step; gives the mean loss of the batch where it was computed.

        Args:
            source: a :class:`~gradmatch.core.problem.Problem` of the batch (model, per-example loss, data), whose
                gradients are taken in one go, without the loss itself; or a function that gives the mean loss of
                micro-batch i (a number with its graph; do not call ``backward``), called for i = 0..groups-1, or once
                for "rm3".

        Raises:
            InputError: 2 c not below the number of gradients, micro-batches that do not divide the batch, a loss that
                is not one number with a graph.
        """
        params, loss = [p for p in self.params if p.requires_grad], None
        checks.require(
            bool(params), "optimizer has no parameter that requires grad; there is nothing to step."
        )
        if isinstance(source, Problem):
            rows, params = self._of_problem(source, params)
        else:
            rows, loss = self._of_calls(source, params)
        flat = self._combined(rows)
        for p in self.params:
            p.grad = None  # without a gradient even weight decay leaves a parameter alone
        at = 0
        for p in params:
            p.grad = flat[at : at + p.numel()].view_as(p).to(p.dtype)
            at += p.numel()
        self.optimizer.step()
        return loss

    def _of_problem(self, problem: Problem, params: list[nn.Parameter]) -> tuple[Tensor, list[nn.Parameter]]:
        """Gradients to combine, and those of ``params`` that the problem differentiates in."""
        own = {id(p): name for name, p in problem.live_params().items()}
        strange = sum(id(p) not in own for p in params)
        checks.require(
            not strange, f"problem lacks {strange} of the optimizer's parameters; it must have them all."
        )
        if self.method == "winsor":
            rows = per_example_gradients(problem)
        else:
            count = self.groups if self.method == "median" else 1
            checks.require(
                problem.n % count == 0,
                f"groups is {count}, which does not divide the batch of {problem.n}.",
            )
            rows = group_gradients(problem, torch.arange(count).repeat_interleave(problem.n // count))
        columns = problem.space.slices
        chosen = [p for p in params if own[id(p)] in columns]
        names = [own[id(p)] for p in chosen]
        if names != list(problem.space.names):
            rows = torch.cat([rows[:, columns[name]] for name in names], 1)
        return rows, chosen

    def _of_calls(self, closure: Callable[[int], Tensor], params: list[nn.Parameter]) -> tuple[Tensor, float]:
        rows, losses = [], []
        for number in range(1 if self.method == "rm3" else self.groups):
            with torch.enable_grad():
                loss = closure(number)
            checks.require(
                isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad,
                "the function given to step must return the mean loss of one micro-batch as a tensor with its graph, "
                "without calling backward.",
            )
            grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
            rows.append(torch.cat([g.flatten() for g in grads]))
            losses.append(float(loss.detach()))
        return checks.finite("gradients", torch.stack(rows)), sum(losses) / len(losses)

    def _combined(self, rows: Tensor) -> Tensor:
        if self.method == "winsor":
            return winsorised_mean(rows, self.c)
        if self.method == "median":
            return median(rows)
        now = rows[0]
        found = median(torch.stack([*self.before, now])) if len(self.before) == 2 else now
        self.before = [*self.before, now][-2:]
        return found

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state and the gradients that "rm3" remembers."""
        return {"optimizer": self.optimizer.state_dict(), "before": list(self.before)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.before = list(state["before"])


def median(rows: Tensor) -> Tensor:
    """Median of every column of [k, P], k odd."""
    if len(rows) == 3:
        a, b, c = rows
        return torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c))
    return rows.contiguous().median(0).values  # torch's selection is wrong on rows that share memory


_COLUMNS = 2**14  # so that the running extremes of a piece stay in the cache


def winsorised_mean(rows: Tensor, c: int) -> Tensor:
    """Mean of every column of [b, P] after its c smallest and c largest values are replaced by the next ones.

    The (c + 1) smallest and largest are kept while rows go by: 4 (c + 1) minima and maxima an entry, which for small c
    beats selecting or sorting along columns.

    Raises:
        InputError: 2 c not below b.
    """
    checks.require(
        0 <= 2 * c < len(rows),
        f"c is {c} for {len(rows)} gradients; winsorising needs 2 c below their number.",
    )
    if c == 0:
        return rows.mean(0)
    return torch.cat([_winsorised(piece, c) for piece in torch.split(rows, _COLUMNS, 1)])


def _winsorised(rows: Tensor, c: int) -> Tensor:
    low = [torch.full_like(rows[0], torch.inf) for _ in range(c + 1)]  # ascending
    high = [torch.full_like(rows[0], -torch.inf) for _ in range(c + 1)]  # descending
    for row in rows:
        down = up = row
        for j in range(c + 1):
            low[j], down = torch.minimum(low[j], down), torch.maximum(low[j], down)
            high[j], up = torch.maximum(high[j], up), torch.minimum(high[j], up)
    return rows.clamp(low[c], high[c]).mean(0)
