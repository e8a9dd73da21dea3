"""English text that every Python brings along: help topics and docstrings of its standard library, about 2 MB."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from gradmatch.core import checks

_APART = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "ensurepip",
    "turtledemo",
    "pydoc_data",
    "site-packages",
    "dist-packages",
}
_SHORTEST = 20
_HOLDERS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Text:
    """Paragraphs to train on and held-out ones, and the SHA-256 of all: another Python has another text."""

    train: tuple[str, ...]
    held: tuple[str, ...]
    digest: str


def pydoc_text(held: float = 0.05, seed: int = 0) -> Text:
    """Paragraphs of at least 20 characters, each once, shuffled.

    Args:
        held: share of the paragraphs held out.
        seed: of the order.
    """
    share = checks.fraction("held", held, one=False)
    every = _paragraphs()
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed)).tolist()
    cut = max(1, round(share * len(every)))
    digest = hashlib.sha256("\n\n".join(every).encode()).hexdigest()
    return Text(tuple(every[i] for i in order[cut:]), tuple(every[i] for i in order[:cut]), digest)


@lru_cache(maxsize=1)
def _paragraphs() -> tuple[str, ...]:
    from pydoc_data.topics import topics

    found: dict[str, None] = {}
    for text in [*topics.values(), *_docstrings()]:
        for part in text.split("\n\n"):
            if len(part.strip()) >= _SHORTEST:
                found[part.strip("\n")] = None
    return tuple(found)


def _docstrings() -> Iterator[str]:
    """Read from the sources; nothing is imported."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        if _APART.isdisjoint(file.relative_to(root).parts):
            try:
                tree = ast.parse(file.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError, OSError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, _HOLDERS) and (text := ast.get_docstring(node)):
                    yield text
