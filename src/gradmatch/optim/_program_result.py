"""What a program search found, and its file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from gradmatch.core.store import read_json, write_json
from gradmatch.optim._program import Program


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        best: the fittest program, as it was found; see :func:`simplify`.
        fitness: its score, lower is better.
        initial: the score of the program at the start.
        history: the score of every mutation in turn, infinite for those that failed.
        hits: how many of them were scored before, by fingerprint.
        top: up to 50 different programs with their scores, best first.
    """

    best: Program
    fitness: float
    initial: float
    history: tuple[float, ...]
    hits: int
    top: tuple[tuple[Program, float], ...]

    @property
    def hit_rate(self) -> float:
        """Share of mutations that needed no run."""
        return self.hits / len(self.history) if self.history else 0.0

    def best_so_far(self) -> list[float]:
        """The best score after every mutation."""
        return list(accumulate([self.initial, *self.history], min))[1:]

    def save(self, path: str | Path) -> Path:
        """Write as JSON, programs as their source and infinity as null."""
        return write_json(
            path,
            {
                "best": self.best.to_source(),
                "fitness": _plain(self.fitness),
                "initial": _plain(self.initial),
                "history": [_plain(x) for x in self.history],
                "hits": self.hits,
                "top": [[p.to_source(), _plain(x)] for p, x in self.top],
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> SearchResult:
        """Read what :meth:`save` wrote."""
        found = read_json(path)
        return cls(
            Program.parse(found["best"]),
            _number(found["fitness"]),
            _number(found["initial"]),
            tuple(_number(x) for x in found["history"]),
            int(found["hits"]),
            tuple((Program.parse(p), _number(x)) for p, x in found["top"]),
        )


def _plain(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _number(x: float | None) -> float:
    return math.inf if x is None else float(x)
