"""Mutations of programs: insert, delete or modify a statement (arXiv 2302.06675, section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gradmatch.core.checks import refuse
from gradmatch.optim._program import INPUTS, RESULT, Argument, Program, Statement
from gradmatch.optim._program_functions import ANY, FUNCTIONS, SCALAR

LARGEST = 1e10
"""Constants are clipped to +- this."""
TRIES = 10_000
FRESH = 1.0


def mutate(
    program: Program,
    rng: np.random.Generator,
    functions: Sequence[str] = tuple(FUNCTIONS),
    max_len: int = 20,
    constants_only: bool = False,
) -> Program:
    """A program that differs in one statement and passes abstract execution.

    Insert, delete and modify are equally likely, insert only below ``max_len`` statements. A new statement has a
    random place, function, arguments of fitting kinds (a constant 1.0 among them where a scalar fits) and target (a
    new name, or half of the time a variable of the same kind). Modify changes one argument: a variable to another of
    its kind, a constant by a factor 2^N(0, 1). What fails abstract execution is tried again from ``program``.

    Args:
        rng: decides everything.
        constants_only: only multiply constants, to tune a program that was found.

    Raises:
        InputError: no valid mutation in 10,000 tries (a program without constants and ``constants_only``, say).
    """
    kinds = ["modify"] if constants_only else ["delete", "modify"]
    if len(program) < max_len and not constants_only:
        kinds.insert(0, "insert")
    for _ in range(TRIES):
        kind = kinds[rng.integers(len(kinds))]
        if kind == "insert":
            found = _insert(program, rng, functions)
        elif kind == "delete":
            found = _delete(program, rng)
        else:
            found = _modify(program, rng, constants_only)
        if found is not None and found.valid():
            return found
    refuse(f"program has no valid mutation in {TRIES} tries:\n{program}")


def _insert(program: Program, rng: np.random.Generator, functions: Sequence[str]) -> Program | None:
    at = int(rng.integers(len(program) + 1))
    function = FUNCTIONS[functions[int(rng.integers(len(functions)))]]
    kinds = program.kinds(at)
    arguments: list[Argument] = []
    for takes in function.takes:
        fitting: list[Argument] = [name for name, kind in kinds.items() if takes in (ANY, kind)]
        if takes in (ANY, SCALAR):
            fitting.append(FRESH)
        arguments.append(fitting[rng.integers(len(fitting))])
    own = function.kind([kinds[a] if isinstance(a, str) else SCALAR for a in arguments])
    same = [name for name, kind in program.kinds(len(program)).items() if kind == own]
    target = _new_name(program)
    if same and rng.random() < 0.5:
        target = same[rng.integers(len(same))]
    statement = Statement(target, function.name, tuple(arguments))
    return replace(program, body=(*program.body[:at], statement, *program.body[at:]))


def _new_name(program: Program) -> str:
    taken = {*INPUTS, RESULT, *program.states, *(s.target for s in program.body)}
    return next(name for k in range(1, len(taken) + 2) if (name := f"x{k}") not in taken)


def _delete(program: Program, rng: np.random.Generator) -> Program | None:
    if not len(program):
        return None
    at = int(rng.integers(len(program)))
    return replace(program, body=(*program.body[:at], *program.body[at + 1 :]))


def _modify(program: Program, rng: np.random.Generator, constants_only: bool) -> Program | None:
    places = [
        (i, k)
        for i, s in enumerate(program.body)
        for k, a in enumerate(s.arguments)
        if not (constants_only and isinstance(a, str))
    ]
    if not places:
        return None
    at, which = places[rng.integers(len(places))]
    statement = program.body[at]
    old: Argument = statement.arguments[which]
    new: Argument | None = None
    if isinstance(old, str):
        kinds = program.kinds(at)
        others = [name for name, kind in kinds.items() if kind == kinds[old] and name != old]
        if others:
            new = others[rng.integers(len(others))]
    else:
        new = float(np.clip(old * 2.0 ** rng.standard_normal(), -LARGEST, LARGEST))
    if new is None:
        return None
    arguments = (*statement.arguments[:which], new, *statement.arguments[which + 1 :])
    return program.replaced(at, replace(statement, arguments=arguments))
