"""The methods of ``gradmatch distill``: which class, and with what settings at which budget."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from gradmatch.core import checks
from gradmatch.data import Distiller

METHODS = {
    "auto": "this library's own recipe",
    "dcc": "contrastive gradient matching",
    "dc": "gradient matching by class",
    "dsa": "dc with siamese augmentation",
    "dsac": "dcc with siamese augmentation",
    "ftd": "trajectory matching on flat experts",
    "tesla": "trajectory matching in constant memory",
}
BUDGETS = ("small", "full")
_EXPERTS = {"n_experts": 3, "epochs": 10, "lr": 0.1, "batch_size": 32}
_TRAJECTORY = {"steps": 300, "syn_steps": 20, "max_start_epoch": 8, "lr_lr": 1e-4, "lr_syn": 0.1}
SMALL: dict[str, dict[str, Any]] = {
    "auto": {"preset": "demo"},
    **{name: {"outer_loop": 10} for name in ("dcc", "dc", "dsa", "dsac")},
    "ftd": _TRAJECTORY | {"lr_img": 10.0, "ema_decay": 0.99},
    "tesla": _TRAJECTORY | {"lr_img": 3.0},
}
"""What a laptop can do; ``--budget full`` takes the classes' own defaults, the papers' (auto: ten minutes)."""


def distiller(
    method: str,
    *,
    per_class: int,
    steps: int | None = None,
    seed: int = 0,
    device: str | None = None,
    budget: str = "small",
    settings: Sequence[str] = (),
) -> Distiller:
    """The configured method.

    Args:
        settings: further options as "name=value" (value as JSON or a word), "experts.name=value" for those of
            the trajectory methods' experts.

    Raises:
        InputError: an unknown method or option, or a value that the method refuses.
    """
    checks.one_of("--method", method, METHODS)
    checks.one_of("--budget", budget, BUDGETS)
    kind = _class_of(method)
    own = parse_settings(settings, _options(kind))
    options = dict(SMALL[method]) if budget == "small" else {}
    options |= {"preset": "full"} if (method, budget) == ("auto", "full") else {}
    options |= {"method": method} if "method" in _options(kind) else {}
    if method in ("ftd", "tesla"):
        experts = (_EXPERTS if budget == "small" else {}) | own.pop("experts", {})
        options |= {"experts": experts} if experts else {}
    if steps is not None:
        own["steps"] = steps
    if "steps" in own:
        options.pop("outer_loop", None)
    options |= {"per_class": per_class, "seed": seed, "device": device} | own
    if method == "auto" and steps is not None and "refine_steps" not in own:
        options |= _phases(kind, options, steps)
    return kind(**options)


def _phases(kind: type[Any], options: dict[str, Any], steps: int) -> dict[str, int]:
    """``steps`` in all, shared over the two phases of the recipe as its preset shares them."""
    usual = kind(**{k: v for k, v in options.items() if k != "steps"})
    refine = round(checks.whole("--steps", steps, least=0) * usual.refine_steps / max(1, usual.steps))
    return {"steps": steps - refine, "refine_steps": refine}


def _class_of(method: str) -> type[Distiller]:
    from gradmatch import data

    name = {"auto": "AutoDistill", "ftd": "FTD", "tesla": "TESLA"}.get(method, "DCC")
    return getattr(data, name)  # type: ignore[no-any-return]


def _options(kind: type) -> set[str]:
    """Names of the constructor's options, those of its bases among them where it passes them on."""
    names: set[str] = set()
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        names |= {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
    return names


def parse_settings(settings: Sequence[str], known: set[str]) -> dict[str, Any]:
    """ "name=value" texts as a dictionary.

    >>> parse_settings(["lr_img=10", "experts.epochs=5", "augment=flip"], {"lr_img", "experts", "augment"})
    {'lr_img': 10, 'experts': {'epochs': 5}, 'augment': 'flip'}
    """
    found: dict[str, Any] = {}
    for text in settings:
        name, sign, value = text.partition("=")
        checks.require(bool(sign and name), f"--set is {text!r}; it must be name=value.")
        first, dot, rest = name.partition(".")
        checks.require(
            first in known and (not dot or first == "experts"),
            f"--set has no option {name!r} for this method; it may be one of {', '.join(sorted(known))}.",
        )
        checks.require(
            bool(dot) or first != "experts",
            f"--set is {text!r}; options of the experts are set one by one, as experts.epochs=5.",
        )
        if dot:
            found.setdefault(first, {})[rest] = _value(value)
        else:
            found[first] = _value(value)
    return found


def _value(text: str) -> Any:
    words = {"True": True, "False": False, "None": None}  # Python's, beside JSON's true, false and null
    try:
        return words[text] if text in words else json.loads(text)
    except json.JSONDecodeError:
        return text


def settings_of(method: Distiller) -> Mapping[str, Any]:
    """What decides the result, for reports."""
    return {k: v for k, v in method.describe().items() if v is not None}
