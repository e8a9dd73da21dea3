"""How small networks train fast on a CPU: freed memory that is kept, and threads that each train their own network."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

R = TypeVar("R")

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


def side_by_side(work: Callable[..., R], tasks: Sequence[tuple[Any, ...]]) -> list[R]:
    """``[work(*task) for task in tasks]``, in as many threads as PyTorch has, each with its share of those.

    For work that spends its time in operations of a few milliseconds, as small networks do: too little for two
    threads to share, enough to leave the interpreter free. The results do not depend on the number of threads
    provided that the tasks share nothing they change (a module is changed by ``functional_call``: give each its own).

    >>> side_by_side(lambda a, b: a + b, [(1, 2), (3, 4)])
    [3, 7]
    """
    count = min(len(tasks), torch.get_num_threads())
    if count < 2:
        return [work(*task) for task in tasks]
    share = torch.get_num_threads() // count

    def run(task: tuple[Any, ...]) -> R:
        with threads(share):
            return work(*task)

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count) as pool:
            futures = [pool.submit(run, task) for task in tasks]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(before)  # the count that new threads start with was set by the others
