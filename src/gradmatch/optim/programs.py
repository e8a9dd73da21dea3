"""Known optimizers as programs of the search.

>>> from gradmatch.optim import programs
>>> programs.sgd().to_source().splitlines()[1].strip()
'update = mul(g, lr)'
"""

from __future__ import annotations

from dataclasses import replace

from gradmatch.optim._program import Argument, Program

ADAMW = """
def train(w, g, lr, m, v):
    m = interp(g, m, 0.9)
    g2 = square(g)
    v = interp(g2, v, 0.999)
    r = sqrt(v)
    s = add(r, 1e-08)
    q = div(m, s)
    d = mul(w, 0.01)
    u = add(q, d)
    update = mul(u, lr)
    return update, m, v
"""
LION = """
def train(w, g, lr, m):
    c = interp(g, m, 0.9)
    m = interp(g, m, 0.99)
    s = sign(c)
    d = mul(w, 0.01)
    u = add(s, d)
    update = mul(u, lr)
    return update, m
"""
MOMENTUM = """
def train(w, g, lr, m):
    h = mul(m, 0.9)
    m = add(h, g)
    update = mul(m, lr)
    return update, m
"""
SGD = """
def train(w, g, lr):
    update = mul(g, lr)
    return update
"""


def adamw(weight_decay: float = 0.01) -> Program:
    """AdamW without bias correction, where searches start.

    The published one divides by sqrt(v) alone, which is 0 / 0 for a weight that never sees a gradient; here 1e-8 is
    added to it, one statement more.
    """
    return _with_decay(Program.parse(ADAMW), weight_decay)


def lion(beta1: float = 0.9, beta2: float = 0.99, weight_decay: float = 0.01) -> Program:
    """Lion, as the search ended after simplification."""
    program = _with_decay(Program.parse(LION), weight_decay)
    first, second, *rest = program.body
    changed = (
        replace(first, arguments=("g", "m", float(beta1))),
        replace(second, arguments=("g", "m", float(beta2))),
    )
    return replace(program, body=(*changed, *rest))


def momentum(beta: float = 0.9) -> Program:
    """SGD with momentum: m <- beta m + g, update lr m."""
    program = Program.parse(MOMENTUM)
    return program.replaced(0, replace(program.body[0], arguments=("m", float(beta))))


def sgd() -> Program:
    """Plain gradient descent."""
    return Program.parse(SGD)


def _with_decay(program: Program, weight_decay: float) -> Program:
    place = next(i for i, s in enumerate(program.body) if s.arguments == ("w", 0.01))
    arguments: tuple[Argument, ...] = ("w", float(weight_decay))
    return program.replaced(place, replace(program.body[place], arguments=arguments))
