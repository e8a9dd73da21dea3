"""Argument checks: bad input is refused before work starts, in one sentence.

Every check raises :class:`InputError`, whose message names the argument, what it got and what it needs.
The command line prints that sentence and exits with code 2. The module itself does not load torch, so that the
catalogue, which needs none, answers at once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from torch import Tensor


class InputError(ValueError):
    """An argument that cannot be worked with; the message is one sentence for the user."""


def refuse(message: str) -> NoReturn:
    """Raise :class:`InputError` with ``message``."""
    raise InputError(message)


def require(condition: bool, message: str) -> None:
    """Raise :class:`InputError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise InputError(message)


def one_of(name: str, value: Any, choices: Collection[Any]) -> Any:
    """Return ``value`` if it is among ``choices``."""
    if value not in choices:
        names = ", ".join(repr(c) for c in choices)
        raise InputError(f"{name} is {value!r}; it must be one of {names}.")
    return value


def number(name: str, value: Any) -> float:
    """Return ``value`` as a float if it is a finite number."""
    try:
        result = float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is {value!r}; it must be a number.") from error
    if not math.isfinite(result):
        raise InputError(f"{name} is {value!r}; it must be finite.")
    return result


def positive(name: str, value: Any) -> float:
    """Return ``value`` if it is a finite number above zero."""
    if number(name, value) <= 0:
        raise InputError(f"{name} is {value!r}; it must be above 0.")
    return float(value)


def nonnegative(name: str, value: Any) -> float:
    """Return ``value`` if it is a finite number of at least zero."""
    if number(name, value) < 0:
        raise InputError(f"{name} is {value!r}; it must be at least 0.")
    return float(value)


def whole(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """Return ``value`` as an int if it is a whole number in [least, most]."""
    bounds = f"at least {least}" if most is None else f"between {least} and {most}"
    if isinstance(value, bool) or number(name, value) != int(value):
        raise InputError(f"{name} is {value!r}; it must be a whole number, {bounds}.")
    if int(value) < least or (most is not None and int(value) > most):
        raise InputError(f"{name} is {value!r}; it must be {bounds}.")
    return int(value)


def fraction(name: str, value: Any, *, zero: bool = False, one: bool = True) -> float:
    """Return ``value`` if it lies in (0, 1], with the ends opened or closed by ``zero`` and ``one``."""
    x = number(name, value)
    if not (x > 0 or (zero and x == 0)) or not (x < 1 or (one and x == 1)):
        raise InputError(
            f"{name} is {value!r}; it must lie in {'[' if zero else '('}0, 1{']' if one else ')'}."
        )
    return x


def finite(name: str, tensor: Tensor) -> Tensor:
    """Return ``tensor`` if it has no NaN and no infinity; the message counts them otherwise."""
    if tensor.is_floating_point() and not _sum_is_finite(tensor) and not bool(tensor.isfinite().all()):
        bad = int((~tensor.isfinite()).sum())
        raise InputError(f"{name} has {bad} NaN or infinite values of {tensor.numel()}; it must be finite.")
    return tensor


def _sum_is_finite(tensor: Tensor) -> bool:
    """True proves that every entry is finite, in a tenth of the time of looking at each; False may be an overflow."""
    return tensor.element_size() > 1 and math.isfinite(float(tensor.detach().sum()))


def floating(name: str, tensor: Tensor) -> Tensor:
    """Return ``tensor`` if it is floating point, finite, and has an entry or more."""
    if not tensor.is_floating_point() or not tensor.numel():
        raise InputError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; it must be floating point and not empty."
        )
    return finite(name, tensor)


def same_length(name_a: str, a: Any, name_b: str, b: Any) -> None:
    """Refuse two sequences of different length."""
    if len(a) != len(b):
        raise InputError(
            f"{name_a} has {len(a)} entries and {name_b} has {len(b)}; they must be equally many."
        )


def labels(name: str, y: Tensor, classes: int | None = None) -> int:
    """Check class labels 0..C-1, each present, and return C.

    Labels must be whole numbers in one dimension. With ``classes`` given, each of 0..classes-1 must occur.
    """
    import torch

    if y.ndim != 1 or y.is_floating_point() or y.dtype == torch.bool:
        raise InputError(
            f"{name} is {y.dtype} of shape {tuple(y.shape)}; it must be whole numbers of shape (n,)."
        )
    if not len(y):
        raise InputError(f"{name} is empty; at least one example is needed.")
    count = int(y.max()) + 1 if classes is None else classes
    if int(y.min()) < 0 or int(y.max()) >= count:
        low, high = int(y.min()), int(y.max())
        raise InputError(f"{name} runs from {low} to {high}; it must be 0..{count - 1} for {count} classes.")
    missing = [c for c, k in enumerate(torch.bincount(y, minlength=count).tolist()) if k == 0]
    if missing:
        raise InputError(
            f"{name} has no sample of class {listing(missing)}; every class 0..{count - 1} needs one."
        )
    return count


def listing(items: Sequence[Any], most: int = 5) -> str:
    """The first ``most`` items in words, for an error message."""
    shown = ", ".join(str(i) for i in items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"
