"""What becomes of programs after a search: scored on larger tasks, and made shorter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from gradmatch.core import checks
from gradmatch.optim._program import Program
from gradmatch.optim._program_tasks import Task, seeded_tasks


def simplify(program: Program, task: Task, tol: float = 0.0) -> Program:
    """Drop what does not help: dead code first, then, greedily, every statement without which ``task`` is no worse.

    A statement is dropped as it is, or with one of its arguments put in its place; where none can go alone, pairs are
    tried (a double negation, say). The score may rise by ``tol`` in all.

    Args:
        program: what a search found.
        task: preferably a larger one than the search had.
        tol: how much worse the result may be, in the task's units.
    """
    own = program.trimmed()
    limit = float(task(own)) + checks.nonnegative("tol", tol)
    while True:
        one_less = _without_one(own)
        best = _best(one_less, task, limit)
        if best is None:
            best = _best([q for p in one_less for q in _without_one(p)], task, limit)
        if best is None:
            return own
        own = best


def _best(candidates: Iterable[Program], task: Task, limit: float) -> Program | None:
    """The one of least score if that is within the limit; those that compute the same are scored once."""
    different = {p.fingerprint(): p for p in candidates}
    scored = [(float(task(p)), p) for p in different.values()]
    found = min(scored, key=lambda own: own[0], default=None)
    return None if found is None or not found[0] <= limit else found[1]


def _without_one(program: Program) -> list[Program]:
    """Every valid program with one statement less, by dropping it or by putting an argument in its place."""
    found = []
    for i, s in enumerate(program.body):
        rest = replace(program, body=(*program.body[:i], *program.body[i + 1 :]))
        for p in (rest, *(_renamed(rest, i, s.target, a) for a in s.arguments if a != s.target)):
            if p.valid() and len(own := p.trimmed()) < len(program):
                found.append(own)
    return found


def _renamed(program: Program, start: int, name: str, value: str | float) -> Program:
    """From ``start`` on, ``value`` wherever ``name`` was read, until ``name`` or ``value`` is assigned anew."""
    body = list(program.body)
    for i in range(start, len(body)):
        s = body[i]
        body[i] = replace(s, arguments=tuple(value if a == name else a for a in s.arguments))
        if s.target in (name, value):
            break
    return replace(program, body=tuple(body))


def funnel(
    candidates: Iterable[Program], tasks: Sequence[Task], keep: Sequence[int]
) -> list[list[tuple[Program, float]]]:
    """Score programs on task after task, larger each time, and keep fewer.

    Args:
        candidates: programs, of one search or many.
        tasks: in the order of their size.
        keep: how many go on after each.

    Returns:
        for each task its ranking, best first, of those that reached it.
    """
    checks.same_length("tasks", tasks, "keep", keep)
    seeded_tasks(tasks)
    own, table = list(candidates), []
    checks.require(bool(own), "candidates is empty; a funnel needs at least one program.")
    for task, most in zip(tasks, keep, strict=True):
        ranked = sorted(((p, float(task(p))) for p in own), key=lambda found: found[1])
        table.append(ranked)
        own = [p for p, _ in ranked[: checks.whole("keep", most)]]
    return table
