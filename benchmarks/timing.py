"""What the benchmarks share: the time of several calls in one run."""

import statistics
import time
from collections.abc import Callable


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
