"""What ``import gradmatch`` and the start of its program add to ``import torch``, in fresh processes.

Target: under 0.3 s. Each figure is a difference of neighbours, alternating, with the files read before once.
"""

from __future__ import annotations

import statistics
import subprocess
import sys

from _timer import figure, main

ROUNDS, TARGET = 7, 0.3
BASE = "import torch"
PARTS = {
    "import gradmatch": "import torch, gradmatch",
    "import gradmatch.data and its names": "import torch\nfrom gradmatch.data import DCC, FTD, TESLA, DQ, AutoDistill",
    "import gradmatch.cli": "import torch, gradmatch.cli",
}
_CLOCK = "import time; began = time.perf_counter()\n{}\nprint(time.perf_counter() - began)"


def seconds(code: str) -> float:
    """Seconds that ``code`` takes in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _CLOCK.format(code)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def run() -> None:
    """Time every part beside torch alone."""
    for code in (BASE, *PARTS.values()):
        seconds(code)
    for name, code in PARTS.items():
        added = [seconds(code) - seconds(BASE) for _ in range(ROUNDS)]
        middle = statistics.median(added)
        figure(
            f"{name}, added to torch",
            seconds=middle,
            low=min(added),
            high=max(added),
            target=TARGET,
            met=str(middle < TARGET),
        )


if __name__ == "__main__":
    main(run)
