"""Programs of the optimizer search: straight-line functions of weights, gradient and state (arXiv 2302.06675).

    def train(w, g, lr, m):
        c = interp(g, m, 0.9)
        m = interp(g, m, 0.99)
        s = sign(c)
        update = mul(s, lr)
        return update, m

Every statement calls one function of the table on variables and constants. State starts at zero, and the host does
``w <- w - update``. A program is checked by abstract execution, which knows kinds (tensor or scalar) and no numbers.
"""

from __future__ import annotations

import ast
import hashlib
import keyword
from dataclasses import dataclass, replace
from typing import NoReturn

from gradmatch.core.checks import InputError, one_of, require
from gradmatch.optim._program_functions import FUNCTIONS, SCALAR, TENSOR

INPUTS = ("w", "g", "lr")
RESULT = "update"
Argument = str | float


@dataclass(frozen=True)
class Statement:
    """``target = function(*arguments)``; an argument is a variable's name or a constant."""

    target: str
    function: str
    arguments: tuple[Argument, ...]

    def __str__(self) -> str:
        return f"{self.target} = {self.function}({', '.join(map(_shown, self.arguments))})"


def _shown(argument: Argument) -> str:
    return argument if isinstance(argument, str) else repr(argument)


@dataclass(frozen=True)
class Program:
    """An update rule: names of its state variables, and its statements.

    >>> program = Program.parse("def train(w, g, lr):\\n    update = mul(g, lr)\\n    return update")
    >>> len(program.body), program.states
    (1, ())
    """

    states: tuple[str, ...]
    body: tuple[Statement, ...]

    @classmethod
    def parse(cls, source: str) -> Program:
        """A program from its source; checked.

        Raises:
            InputError: not of the form above, an unknown function, a variable read before it is assigned, no return
                line, or another one than "return update, " and the states.
        """
        try:
            tree = ast.parse(source)
        except SyntaxError as error:
            raise InputError(f"program has a syntax error in line {error.lineno}: {error.msg}.") from error
        if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
            _malformed("it must be one function, def train(w, g, lr, ...)")
        function = tree.body[0]
        assert isinstance(function, ast.FunctionDef)
        names = tuple(a.arg for a in function.args.args)
        if names[:3] != INPUTS or function.args.defaults or function.args.vararg or function.args.kwonlyargs:
            _malformed(f"its arguments are ({', '.join(names)}); they must be w, g, lr and the states' names")
        *lines, last = function.body
        if not isinstance(last, ast.Return):
            _malformed("it has no return line")
        assert isinstance(last, ast.Return)
        states = names[3:]
        wanted = ", ".join((RESULT, *states))
        found = ast.unparse(last.value).strip("()") if last.value is not None else ""
        if found != wanted:
            _malformed(f"its last line is 'return {found}'; it must be 'return {wanted}'")
        program = cls(states, tuple(_statement(line) for line in lines))
        program.kinds()
        return program

    def to_source(self, name: str = "train") -> str:
        """The program as the source that :meth:`parse` reads."""
        lines = [f"def {name}({', '.join((*INPUTS, *self.states))}):"]
        lines += [f"    {statement}" for statement in self.body]
        return "\n".join([*lines, f"    return {', '.join((RESULT, *self.states))}", ""])

    def __str__(self) -> str:
        return self.to_source()

    def __len__(self) -> int:
        return len(self.body)

    # --- abstract execution --------------------------------------------------------------------------------

    def kinds(self, upto: int | None = None) -> dict[str, str]:
        """Kind ("tensor" or "scalar") of every variable after the first ``upto`` statements; default all, and checked.

        Raises:
            InputError: a statement that cannot run, or an update or state that is no tensor at the end.
        """
        found = {"w": TENSOR, "g": TENSOR, "lr": SCALAR, **dict.fromkeys(self.states, TENSOR)}
        for number, s in enumerate(self.body[:upto], 1):
            where = f"program line {number}, {str(s)!r},"
            if s.function not in FUNCTIONS:
                one_of(f"{where} function", s.function, sorted(FUNCTIONS))
            for a in s.arguments:
                require(
                    not isinstance(a, str) or a in found, f"{where} reads {a!r}, which is not assigned yet."
                )
            kinds = [found[a] if isinstance(a, str) else SCALAR for a in s.arguments]
            kind = FUNCTIONS[s.function].kind(kinds)
            if kind is None:
                takes = ", ".join(FUNCTIONS[s.function].takes)
                raise InputError(f"{where} has arguments ({', '.join(kinds)}); it takes ({takes}).")
            found[s.target] = kind
        if upto is None:
            for name in (RESULT, *self.states):
                require(name in found, f"program never assigns {name!r}, which it returns.")
                require(
                    found[name] == TENSOR,
                    f"program ends with a scalar in {name!r}; it must stay a tensor shaped as the weights.",
                )
        return found

    def valid(self) -> bool:
        """Whether abstract execution passes."""
        try:
            self.kinds()
        except InputError:
            return False
        return True

    # --- what matters --------------------------------------------------------------------------------------

    def live(self) -> tuple[tuple[str, ...], tuple[bool, ...]]:
        """The states on which the update depends, now or in later steps, and whether each statement matters."""
        states: set[str] = set()
        while True:
            needed, kept = {RESULT, *states}, [False] * len(self.body)
            for i in range(len(self.body) - 1, -1, -1):
                s = self.body[i]
                if s.target in needed:
                    kept[i] = True
                    needed.discard(s.target)
                    needed.update(a for a in s.arguments if isinstance(a, str))
            read = {s for s in self.states if s in needed}
            if read <= states:
                return tuple(s for s in self.states if s in states), tuple(kept)
            states |= read

    def trimmed(self) -> Program:
        """The program without statements and states that do not matter."""
        states, kept = self.live()
        return Program(states, tuple(s for s, keep in zip(self.body, kept, strict=True) if keep))

    def fingerprint(self) -> str:
        """A hash of what the program computes, whatever its names, dead code and the order of independent lines.

        Inputs hash by their position, a statement by its function and the hashes of its arguments (in any order where
        they commute), a program by its update and living states. Equal hashes mean equal results, not the reverse.
        """
        own = self.trimmed()
        places = {name: _hash("input", name) for name in INPUTS}
        places |= {name: _hash("state", str(k)) for k, name in enumerate(own.states)}
        for s in own.body:
            parts = [places[a] if isinstance(a, str) else _hash("constant", repr(a)) for a in s.arguments]
            if FUNCTIONS[s.function].commutes:
                parts.sort()
            places[s.target] = _hash(s.function, *parts)
        return _hash(*(places[name] for name in (RESULT, *own.states)))

    def replaced(self, position: int, statement: Statement) -> Program:
        """With another statement at a position."""
        return replace(self, body=(*self.body[:position], statement, *self.body[position + 1 :]))


def _hash(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()


def _malformed(why: str) -> NoReturn:
    raise InputError(f"program is malformed: {why}.")


def _statement(line: ast.stmt) -> Statement:
    if (
        not isinstance(line, ast.Assign)
        or len(line.targets) != 1
        or not isinstance(line.targets[0], ast.Name)
    ):
        _malformed(f"line {line.lineno}, {ast.unparse(line)!r}, is not 'name = function(...)'")
    call = line.value
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.keywords:
        _malformed(f"line {line.lineno}, {ast.unparse(line)!r}, is not 'name = function(...)'")
    return Statement(line.targets[0].id, call.func.id, tuple(_argument(a) for a in call.args))


def _argument(node: ast.expr) -> Argument:
    if isinstance(node, ast.Name) and not keyword.iskeyword(node.id):
        return node.id
    try:
        value = float(ast.literal_eval(node))
    except (ValueError, TypeError, SyntaxError) as error:
        raise InputError(
            f"program is malformed: {ast.unparse(node)!r} in line {node.lineno} is neither a name nor a number."
        ) from error
    return value
