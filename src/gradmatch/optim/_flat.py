"""Flat storage of parameters with the state vectors beside it, and the spans of it that take one step together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from gradmatch.core.flat import FlatStorage
from gradmatch.optim._parts import State, wide_dtype


class _Owner(Protocol):
    """What a flat state asks of its optimizer."""

    state: Any
    counters: ClassVar[tuple[str, ...]]

    @property
    def prepares(self) -> bool: ...

    def _new_state(self, p: Tensor, group: dict[str, Any]) -> State: ...
    def _prepare(self, p: Tensor, s: State, group: dict[str, Any]) -> State: ...


class FlatState:
    """Flat storage and, for each state tensor by name, a vector [n] of which the parameters' states are views."""

    def __init__(self, storage: FlatStorage, buffers: Sequence[str]) -> None:
        self.storage = storage
        values = storage.values
        self.vectors = {name: torch.zeros_like(values, dtype=wide_dtype(values)) for name in buffers}
        self._views = {name: storage.views(vector) for name, vector in self.vectors.items()}
        self._steady: list[State] = []  # every parameter's state, while all count alike

    def take(self, state: Any) -> None:
        """Move the state there is into the vectors, and put views in its place."""
        self._steady = []
        for i, p in enumerate(self.storage.params):
            if p in state:
                self._into_views(i, state[p])

    def _into_views(self, i: int, s: State) -> None:
        for name, views in self._views.items():
            if name in s:
                s[name] = views[i].copy_(s[name])

    def spans(self, owner: _Owner, group: dict[str, Any]) -> Iterator[tuple[slice, State, State]]:
        """Count one update of every parameter that has a gradient; give the stretches of equal counters.

        Each is (place in the vectors, a state with its counters, vectors for this step only).
        """
        present = self.storage.collect()
        known = self._steady and owner.state.get(self.storage.params[0]) is self._steady[0]
        if known and all(present):
            for s in self._steady:
                s["step"] += 1
            yield slice(None), self._steady[0], {}
            return
        keys, extras = [], []
        for i, (p, there) in enumerate(zip(self.storage.params, present, strict=True)):
            extra, key = {}, None
            if there:
                s = owner.state[p]
                if not s:
                    s.update(dict.fromkeys(owner.counters, 0), **owner._new_state(p, group))
                    self._into_views(i, s)
                s["step"] += 1
                extra = owner._prepare(p, s, group)
                key = (*(s[name] for name in owner.counters), *extra)
            keys.append(key)
            extras.append(extra)
        alike = len(set(keys)) == 1 and keys[0] is not None and not owner.prepares
        self._steady = [owner.state[p] for p in self.storage.params] if alike else []
        for key, run in groupby(range(len(keys)), key=keys.__getitem__):
            if key is not None:
                own = list(run)
                at = self.storage.span(own[0], own[-1] + 1)
                extra = {name: self._joined([e.get(name) for e in extras])[at] for name in extras[own[0]]}
                yield at, owner.state[self.storage.params[own[0]]], extra

    def _joined(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """One vector [n] of a tensor for each parameter, zero where there is none."""
        first = next(t for t in tensors if t is not None)
        vector = torch.zeros_like(self.storage.values, dtype=first.dtype)
        for view, tensor in zip(self.storage.views(vector), tensors, strict=True):
            if tensor is not None:
                view.copy_(tensor)
        return vector
