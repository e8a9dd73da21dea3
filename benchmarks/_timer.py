"""One timer for all races: A B A B in one process, ratios of neighbours, and a check that both did the same."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_RESULTS: list[dict[str, Any]] = []
_FAILED: list[str] = []


def race(
    name: str,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    *,
    peer: str = "peer",
    rounds: int = 5,
    warmup: int = 1,
    check: Callable[[Any, Any], object] | None = None,
    target: float | None = None,
) -> dict[str, Any]:
    """Time ``ours`` against ``theirs``, alternating, and print the ratio theirs / ours with its spread.

    ``check(a, b)`` gets both results of the first round and must raise (assert) if they differ.
    """
    for _ in range(warmup):
        a, b = ours(), theirs()
    if warmup == 0:
        a = b = None
    pairs = []
    for k in range(rounds):
        (t_ours, a), (t_theirs, b) = _timed(ours), _timed(theirs)
        pairs.append((t_ours, t_theirs))
        if k == 0 and check is not None:
            _check(name, check, a, b)
    ratios = [theirs_s / ours_s for ours_s, theirs_s in pairs]
    figures = {
        "race": name,
        "peer": peer,
        "ours_ms": 1e3 * statistics.median(p[0] for p in pairs),
        "theirs_ms": 1e3 * statistics.median(p[1] for p in pairs),
        "ratio": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
        "target": target,
        "checked": check is not None,
    }
    goal = (
        "" if target is None else f"  target {target:g}x {'met' if figures['ratio'] >= target else 'MISSED'}"
    )
    print(
        f"{name}: ours {figures['ours_ms']:.1f} ms, {peer} {figures['theirs_ms']:.1f} ms, ratio "
        f"{figures['ratio']:.2f}x ({min(ratios):.2f}..{max(ratios):.2f}){goal}",
        flush=True,
    )
    _RESULTS.append(figures)
    return figures


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def _check(name: str, check: Callable[[Any, Any], object], a: Any, b: Any) -> None:
    try:
        check(a, b)
    except AssertionError as error:
        _FAILED.append(name)
        print(f"{name}: DIFFERENT RESULTS: {error}", flush=True)


def figure(name: str, **values: Any) -> None:
    """Record and print a figure that is no ratio of times (peak memory, say)."""
    _RESULTS.append({"race": name, **values})
    print(
        f"{name}: "
        + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
    )


def missing(peer: str, why: str) -> None:
    """Say that a peer could not be raced; it is never skipped in silence."""
    _RESULTS.append({"race": peer, "peer": peer, "missing": why})
    print(f"{peer}: MISSING ({why})", flush=True)


def main(run: Callable[[], object]) -> None:
    """Entry point of a race file: ``--json FILE`` keeps the figures; exit 1 if any two results differed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    options = parser.parse_args()
    run()
    if options.json is not None:
        options.json.write_text(json.dumps(_RESULTS, indent=2) + "\n")
    sys.exit(1 if _FAILED else 0)
