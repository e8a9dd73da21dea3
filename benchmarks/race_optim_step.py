"""Every optimizer's step against public implementations, and against the machine's own copy bandwidth.

A step is bound by memory: each array that it must read or write is a pass over it. Peers and passes are in
``_optimizers.py``; ``race_lion.py`` and the others of their kind race one optimizer alone.
"""

from __future__ import annotations

from _optimizers import ENTRIES, race_entry
from _timer import main


def run() -> None:
    for entry in ENTRIES.values():
        race_entry(entry)


if __name__ == "__main__":
    main(run)
