"""The functions that programs of the search are made of.

A value is a tensor (..., P), all weights in one row, or a scalar: (..., 1), or one float64 for what comes from
constants and the learning rate. Functions of numbers map over tensors and broadcast scalars; ``norm`` is taken of each
parameter tensor alone and stands at every place of it, ``global_norm``, ``dot`` and ``cosine_sim`` are taken over all
weights.

>>> float(FUNCTIONS["interp"].run(torch.tensor(1.0), torch.tensor(3.0), torch.tensor(0.25)))
1.5
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TENSOR, SCALAR, ANY = "tensor", "scalar", "any"


class Layout:
    """Which parameter tensor each of P weights belongs to.

    Attributes:
        index: number of the tensor, long [P].
        count: number of tensors.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.count = len(sizes)
        self.index = torch.repeat_interleave(torch.arange(self.count), torch.tensor(sizes)).to(device)


@dataclass(frozen=True)
class Function:
    """One function of the table.

    Attributes:
        name: as written in a program.
        run: of its arguments, and of the layout too if ``by_tensor``.
        takes: for each argument "any", "tensor" or "scalar".
        gives: "tensor", "scalar", or "any": a tensor if an argument is one.
        commutes: whether both arguments may change places.
    """

    name: str
    run: Callable[..., Tensor]
    takes: tuple[str, ...]
    gives: str = ANY
    commutes: bool = False
    by_tensor: bool = False

    def kind(self, kinds: Sequence[str]) -> str | None:
        """Kind of the result for arguments of these kinds, or None if they do not fit."""
        if len(kinds) != len(self.takes):
            return None
        if any(wanted not in (ANY, kind) for wanted, kind in zip(self.takes, kinds, strict=True)):
            return None
        if self.gives != ANY:
            return self.gives
        return TENSOR if TENSOR in kinds else SCALAR


def _norm(x: Tensor, layout: Layout) -> Tensor:
    sums = x.new_zeros((*x.shape[:-1], layout.count)).index_add_(-1, layout.index, x.square())
    return sums.sqrt()[..., layout.index]


def _global_norm(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True).sqrt()


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1, keepdim=True)


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    return _dot(x, y) / (_global_norm(x) * _global_norm(y))


def _clip(x: Tensor, most: Tensor) -> Tensor:
    return x * (most / _global_norm(x)).clamp(max=1.0)


def _interp(x: Tensor, y: Tensor, a: Tensor) -> Tensor:
    """(1 - a) x + a y: the weight belongs to the second argument."""
    if a.ndim == 0 and x.shape == y.shape:
        return torch.lerp(y, x, float(1 - a))  # 1 - 0.999 in single precision would be off by 1e-5
    return x + a * (y - x)


def _constant(value: float) -> Callable[[], Tensor]:
    return lambda: torch.tensor(value, dtype=torch.float64)


def _table() -> dict[str, Function]:
    one: dict[str, Callable[[Tensor], Tensor]] = {
        "abs": torch.abs,
        "sign": torch.sign,
        "square": torch.square,
        "sqrt": lambda x: x.abs().sqrt(),
        "cube": lambda x: x * x * x,
        "cbrt": lambda x: x.sign() * x.abs().pow(1 / 3),
        "exp": torch.exp,
        "exp2": torch.exp2,
        "exp10": lambda x: torch.pow(10.0, x),
        "expm1": torch.expm1,
        "log": lambda x: x.abs().log(),
        "log2": lambda x: x.abs().log2(),
        "log10": lambda x: x.abs().log10(),
        "log1p": lambda x: (1 + x).abs().log(),
        "sin": torch.sin,
        "cos": torch.cos,
        "tan": torch.tan,
        "arcsin": torch.arcsin,
        "arccos": torch.arccos,
        "arctan": torch.arctan,
        "sinh": torch.sinh,
        "cosh": torch.cosh,
        "tanh": torch.tanh,
        "arcsinh": torch.arcsinh,
        "arccosh": torch.arccosh,
        "arctanh": torch.arctanh,
        "reciprocal": torch.reciprocal,
        "negative": torch.neg,
    }
    two: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "add": torch.add,
        "sub": torch.sub,
        "mul": torch.mul,
        "div": torch.div,
        "power": torch.pow,
    }
    found = [Function(name, run, (ANY,)) for name, run in one.items()]
    found += [Function(name, run, (ANY, ANY), commutes=name in ("add", "mul")) for name, run in two.items()]
    found += [
        Function("interp", _interp, (ANY, ANY, ANY)),
        Function("norm", _norm, (TENSOR,), TENSOR, by_tensor=True),
        Function("global_norm", _global_norm, (TENSOR,), SCALAR),
        Function("dot", _dot, (TENSOR, TENSOR), SCALAR, commutes=True),
        Function("cosine_sim", _cosine, (TENSOR, TENSOR), SCALAR, commutes=True),
        Function("clip_by_global_norm", _clip, (TENSOR, SCALAR), TENSOR),
        Function("pi", _constant(math.pi), (), SCALAR),
        Function("e", _constant(math.e), (), SCALAR),
        Function("eps", _constant(1e-8), (), SCALAR),
    ]
    return {f.name: f for f in found}


FUNCTIONS: dict[str, Function] = _table()
"""All functions by name."""
