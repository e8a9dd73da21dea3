"""One timer for all races: A B A B in one process, ratios of neighbours, and a check that both did the same."""

from __future__ import annotations

import argparse
import ctypes
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
    unit: str = "ms",
    peak_memory: bool = False,
) -> dict[str, Any]:
    """Time ``ours`` against ``theirs``, alternating, and print the ratio theirs / ours with its spread.

    ``check(a, b)`` gets both results of the first round and must raise (assert) if they differ. ``unit`` is "ms"
    or "s"; ``peak_memory`` adds one run of each after the timed ones, of which the memory taken is reported.
    """
    for _ in range(warmup):
        ours(), theirs()
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
    if peak_memory:
        figures["ours_peak_mib"], figures["theirs_peak_mib"] = peak_mib(ours), peak_mib(theirs)
    _RESULTS.append(figures)
    print(_line(figures, 1e-3 if unit == "s" else 1.0, unit), flush=True)
    return figures


def _line(figures: dict[str, Any], scale: float, unit: str) -> str:
    low, high = figures["spread"]
    text = f"{figures['race']}: ours {figures['ours_ms'] * scale:.4g} {unit}, {figures['peer']} "
    text += (
        f"{figures['theirs_ms'] * scale:.4g} {unit}, ratio {figures['ratio']:.2f}x ({low:.2f}..{high:.2f})"
    )
    if figures["target"] is not None:
        met = "met" if figures["ratio"] >= figures["target"] else "MISSED"
        text += f", target {figures['target']:g}x {met}"
    if "ours_peak_mib" in figures:
        shown = [figures[k] for k in ("ours_peak_mib", "theirs_peak_mib")]
        text += ", peak memory " + " against ".join("unknown" if m is None else f"{m:.1f} MiB" for m in shown)
    return text if figures["checked"] else text + ", results not compared"


def peak_mib(work: Callable[[], Any]) -> float | None:
    """Memory in MiB that ``work`` took above what the process held before; None where Linux does not tell.

    The kernel's high-water mark is set back first, after freed memory is returned, so that repeats agree.
    """
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        work()
        return (_status("VmHWM") - before) / 1024
    except (OSError, AttributeError):
        return None


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


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
    shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
    print(f"{name}: {', '.join(shown)}", flush=True)


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
