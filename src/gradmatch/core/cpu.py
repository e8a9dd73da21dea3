"""Two settings of the C library and the thread pool that decide how fast small networks train on a CPU."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the next allocation instead of giving it back to the system.

    Activations of tens of megabytes are otherwise mapped, zeroed page by page and unmapped at every operation.
    Process-wide, for programs and worker processes, not for library code. Returns whether it took effect (Linux
    with glibc, and ``GRADMATCH_KEEP_MEMORY`` not "0").
    """
    if not sys.platform.startswith("linux") or os.environ.get("GRADMATCH_KEEP_MEMORY") == "0":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library: nothing to set
        return False
    return all(
        mallopt(option, value) == 1
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 * 2**20))
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run a block with ``count`` compute threads of PyTorch, then as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
