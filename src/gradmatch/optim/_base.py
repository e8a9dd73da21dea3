"""What every optimizer here shares: a rule written once, run on single tensors, in blocks or on flat storage.

A subclass gives its rule in the words of a tensor (:meth:`OptimizerBase._rule`) and the numbers the rule needs
(:meth:`OptimizerBase._numbers`). The base finds parameters with a gradient, makes their state, and applies the rule

* ``foreach=False``: to one tensor after another;
* ``foreach=None`` or True: to lists of tensors in blocks that stay in cache (on a GPU, to whole lists);
* ``flat=True``: to vectors of which parameters, gradients and state are views; with ``compile=True`` as one kernel.

All paths give the same numbers. Hyper-parameters live in the groups alone, so schedulers work; state is tensors plus
counters (whole numbers), kept in float32 where parameters are of half precision; ``state_dict`` round trips are
bitwise. A parameter without gradient is left alone. As in torch, steps do not look for NaN in gradients.
"""

from __future__ import annotations

import warnings
from collections import ChainMap
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import itemgetter
from types import FunctionType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradmatch.core import checks
from gradmatch.core.flat import flat_storages
from gradmatch.core.foreach import TensorList, Tensors, blocks, each
from gradmatch.optim import _protocol
from gradmatch.optim._flat import FlatState
from gradmatch.optim._parts import Numbers, State, check_betas, refuse_sparse, scale_, wide_dtype

__all__ = ["Numbers", "OptimizerBase", "State", "check_betas", "scale_", "wide_dtype"]


class OptimizerBase(Optimizer):
    """A ``torch.optim.Optimizer`` with a rule; see the module.

    Attributes:
        protocols: the ways in which this class can be stepped.
        buffers: names of the state tensors, each shaped as its parameter and zero at first.
        counters: names of whole numbers in the state; "step" counts the updates of a parameter.
    """

    protocols: ClassVar[tuple[_protocol.Protocol, ...]] = ("grad",)
    buffers: ClassVar[tuple[str, ...]] = ()
    counters: ClassVar[tuple[str, ...]] = ("step",)

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        """``defaults``: the hyper-parameters; maximize, foreach, flat and compile are added where missing."""
        switches = {"maximize": False, "foreach": None, "flat": False, "compile": False}
        self._flats: dict[int, list[FlatState]] = {}
        self._kernel: Callable[..., None] | None = None
        super().__init__(params, {**switches, **defaults})

    # --- what a subclass gives -----------------------------------------------------------------------------

    def _check(self, group: dict[str, Any]) -> None:
        """Refuse hyper-parameters of a group that are out of range."""

    def _numbers(self, group: dict[str, Any], counts: State) -> Numbers:
        """The floats that the rule needs, from a group and the counters of a state."""
        raise NotImplementedError

    def _rule(self, p: Tensors, g: Tensors, s: State, c: Numbers) -> None:
        """Update parameters ``p`` and their state ``s`` in place by gradients ``g``, which must not change.

        Each is a Tensor, or a TensorList of equally many. ``c`` are the numbers.
        """
        raise NotImplementedError

    def _new_state(self, p: Tensor, group: dict[str, Any]) -> State:
        """The state tensors of a parameter at its first step."""
        return {name: torch.zeros_like(p, dtype=wide_dtype(p)) for name in self.buffers}

    def _prepare(self, p: Tensor, s: State, group: dict[str, Any]) -> State:
        """Called before a parameter's update: may move counters; returns tensors the rule sees for this step only."""
        return {}

    def _whole(self, p: Tensor, group: dict[str, Any]) -> bool:
        """Whether this tensor must be updated in its own shape, not as part of a flat block."""
        return False

    def _update_whole(self, p: Tensor, g: Tensor, s: State, c: Numbers, group: dict[str, Any]) -> None:
        """Update one tensor for which ``_whole`` holds; here ``s`` is its whole state, with counters."""
        self._rule(p, g, s, c)

    def _gradients(self, closure: Callable[[], Any] | None) -> Any:
        """Run the closure, if any, as the class's protocol says; gradients are in place afterwards."""
        if closure is None:
            return None
        return _protocol.after_backward(self._name, self._all_params(), closure)

    @property
    def prepares(self) -> bool:
        """Whether the class looks at every parameter before its update."""
        return type(self)._prepare is not OptimizerBase._prepare

    def _shaped(self, group: dict[str, Any]) -> list[Tensor]:
        if type(self)._whole is OptimizerBase._whole:
            return []
        return [p for p in group["params"] if self._whole(p, group)]

    # --- torch.optim.Optimizer -----------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does, and check it.

        Raises:
            InputError: a hyper-parameter out of range, or parameters that are no real floating-point numbers.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for i, p in enumerate(group["params"]):
                checks.require(
                    p.is_floating_point() and p.layout is torch.strided,
                    f"parameter {i} is {p.dtype}, {p.layout}; {self._name} needs dense real floating-point numbers.",
                )
            checks.require(
                not group["compile"] or group["flat"],
                "compile=True with flat=False; a compiled rule runs on flat storage, so pass flat=True too.",
            )
            self._check(group)
            if group["flat"]:
                self._flats_of(len(self.param_groups) - 1)
        except checks.InputError:
            self.param_groups.pop()
            raise

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns the closure's loss. How to step this class is in ``protocols``."""
        loss = self._gradients(closure)
        with torch.no_grad():
            for k, group in enumerate(self.param_groups):
                params = group["params"]
                if group["flat"]:
                    for flat in self._flats_of(k):
                        self._step_flat(flat, group)
                    params = self._shaped(group)
                self._step_tensors(params, group)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; with ``flat=True`` gradients are zeroed in place and stay views."""
        if not any(group["flat"] for group in self.param_groups):
            super().zero_grad(set_to_none)
            return
        for k, group in enumerate(self.param_groups):
            rest = group["params"]
            if group["flat"]:
                for flat in self._flats_of(k):
                    flat.storage.zero_gradients()
                rest = self._shaped(group)
            for p in rest:
                p.grad = None if set_to_none or p.grad is None else torch.zeros_like(p.grad)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but state keeps the types it was saved in, and how to run (foreach, flat, compile) is kept."""
        running = [{name: group[name] for name in _RUNNING} for group in self.param_groups]
        super().load_state_dict(state_dict)
        order = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(order, self._all_params(), strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor):  # torch casts state to the parameter's type
                    self.state[p][name] = value.to(p.device, copy=True)
        for k, (group, own) in enumerate(zip(self.param_groups, running, strict=True)):
            group.update(own)
            for flat in self._flats.get(k, ()):
                flat.take(self.state)

    def __getstate__(self) -> dict[str, Any]:
        own = {k: v for k, v in vars(self).items() if not k.startswith("_optimizer_")}
        return {**own, **super().__getstate__(), "_flats": {}, "_kernel": None}

    # --- lists of tensors ----------------------------------------------------------------------------------

    def _step_tensors(self, params: Sequence[Tensor], group: dict[str, Any]) -> None:
        batches: dict[Any, _Batch] = {}
        prepares, shaped = self.prepares, set(map(id, self._shaped(group)))
        counts, extra = itemgetter(*self.counters), State()
        for p in params:
            g = p.grad
            if g is None:
                continue
            s = self._counted(p, g, group)
            if prepares:
                extra = self._prepare(p, s, group)
            if shaped and id(p) in shaped:
                work = partial(self._update_whole, group=group)
                seen: Any = ChainMap(s, extra) if extra else s
                self._apply(work, p, g, seen, self._numbers(group, s), group["maximize"])
                continue
            key = (p.dtype, p.device, counts(s), *extra)
            batch = batches.get(key)
            if batch is None:
                batch = batches[key] = _Batch([], [], [])
            batch.params.append(p)
            batch.gradients.append(g)
            batch.states.append({**s, **extra} if extra else s)
        for key, batch in batches.items():
            self._run(batch, (*self.buffers, *key[3:]), group)

    def _counted(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> State:
        """The state of a parameter with gradient ``g``, made if it has none, with one update more on its counter."""
        if g.layout is not torch.strided:
            refuse_sparse(self._name)
        s: State = self.state[p]
        if not s:
            s.update(dict.fromkeys(self.counters, 0), **self._new_state(p, group))
        s["step"] += 1
        return s

    def _run(self, batch: _Batch, names: Sequence[str], group: dict[str, Any]) -> None:
        c = self._numbers(group, batch.states[0])
        lists = [batch.params, batch.gradients, *([s[name] for s in batch.states] for name in names)]
        if group["foreach"] is False:
            rows: Iterable[Any] = zip(*lists, strict=True)
        elif batch.params[0].device.type == "cpu":
            rows = (map(TensorList, block) for block in blocks(lists))
        else:  # a GPU's cost is launches, not cache
            rows = [map(TensorList, lists)]
        for p, g, *rest in rows:
            self._apply(self._rule, p, g, dict(zip(names, rest, strict=True)), c, group["maximize"])

    @staticmethod
    def _apply(
        rule: Callable[..., None], p: Tensors, g: Tensors, s: State, c: Numbers, maximize: bool
    ) -> None:
        """The rule in float32 on parameters of half precision, and with the sign that ``maximize`` asks for."""
        first = p.tensors[0] if isinstance(p, TensorList) else p
        wide = wide_dtype(first)
        if maximize:
            g = g.neg()
        if first.dtype is wide:
            rule(p, g, s, c)
            return
        values = each(lambda t: t.to(wide), p)
        rule(values, each(lambda t: t.to(wide), g), s, c)
        p.copy_(values)

    # --- flat storage --------------------------------------------------------------------------------------

    def _flats_of(self, k: int) -> list[FlatState]:
        """Flat storage of a group, made when first asked for (a copied optimizer has none of its own)."""
        if k not in self._flats:
            group = self.param_groups[k]
            own = [p for p in group["params"] if not self._whole(p, group)]
            self._flats[k] = [FlatState(storage, self.buffers) for storage in flat_storages(own)]
            for flat in self._flats[k]:
                flat.take(self.state)
        return self._flats[k]

    def _step_flat(self, flat: FlatState, group: dict[str, Any]) -> None:
        for at, counts, extra in flat.spans(self, group):
            c = self._numbers(group, counts)
            p, g = flat.storage.values[at], flat.storage.gradients[at]
            s = {**{name: vector[at] for name, vector in flat.vectors.items()}, **extra}
            if group["compile"]:
                c = {k: torch.tensor(x, dtype=torch.float64) for k, x in c.items()}
                self._compiled(p, g, s, c, group["maximize"])
                continue
            for block in blocks([[p], [g], *([t] for t in s.values())]):
                p, g, *rest = (own[0] for own in block)
                self._apply(self._rule, p, g, dict(zip(s, rest, strict=True)), c, group["maximize"])

    def _compiled(self, *call: Any) -> None:
        """One kernel for the whole rule, where there is a compiler; else the rule, with a note."""
        if self._kernel is not None:
            self._kernel(*call)
            return
        plain = partial(_applied, self)
        try:
            code = _applied.__code__.replace()  # kernels are counted, and limited, by code object
            kernel = partial(torch.compile(FunctionType(code, globals()), fullgraph=True), self)
            kernel(*call)
            self._kernel = kernel
        except Exception as error:  # raised before anything ran: there is no kernel yet
            why = f"torch.compile failed with {type(error).__name__}; is there a C++ compiler?"
            warnings.warn(f"{self._name} runs uncompiled: {why}", stacklevel=4)
            self._kernel = plain
            plain(*call)


def _applied(owner: OptimizerBase, p: Tensor, g: Tensor, s: State, c: Numbers, maximize: bool) -> None:
    owner._apply(owner._rule, p, g, s, c, maximize)


_RUNNING = ("foreach", "flat", "compile")


class _Batch(NamedTuple):
    """Parameters of one type, device and count, with their gradients and states."""

    params: list[Tensor]
    gradients: list[Tensor]
    states: list[State]
