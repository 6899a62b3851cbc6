"""What the benchmarks share: the time of several calls in one run."""

import ctypes
import statistics
import sys
import time
from collections.abc import Callable


def keep_freed_memory() -> None:
    """Have glibc keep freed memory, for every library in this process.

    Otherwise it may give a large array, such as a dense gradient, back to the system after each step. In some
    runs, and not in others, the next step then spends more time in page faults than in its own work.
    """
    if sys.platform == "linux":
        glibc = ctypes.CDLL(None)
        # M_TRIM_THRESHOLD, M_MMAP_MAX and M_ARENA_MAX of malloc.h. A second arena would give back a heap that
        # is empty, whatever the threshold is.
        for parameter, value in ((-1, 2**31 - 1), (-4, 0), (-8, 1)):
            if not glibc.mallopt(parameter, value):
                raise RuntimeError(f"mallopt({parameter}, {value}) failed.")


def alternate(calls: list[Callable[[], object]], seconds: float) -> list[float]:
    """Median time of each call, taken in turn so that a busy machine slows them alike."""
    for call in calls:
        for _ in range(3):
            call()
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, kept in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            kept.append(time.perf_counter() - start)
    return [statistics.median(kept) for kept in times]
