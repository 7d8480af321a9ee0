"""Time several calls against one another: interleaved in one process, medians of many samples."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

FEWEST, MOST = 7, 200
SETTLE = 0.010


@dataclass(frozen=True)
class Timing:
    """How long one call takes: the median, and the range that holds the middle 60 %."""

    median_ms: float
    low_ms: float
    high_ms: float
    samples: int


def summary(times_ms: list[float]) -> Timing:
    ordered = sorted(times_ms)
    low, high = ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]
    return Timing(round(statistics.median(ordered), 5), round(low, 5), round(high, 5), len(ordered))


def interleaved(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Timing]:
    """Call all contenders in turn until the time is up, so that whatever else the machine does meets them alike.

    A sample of a short call is the mean of several calls in a row (2 ms or so), or the clock would be measured. Before
    each sample its contender runs untimed for 10 ms: the idle workers of another contender's thread pool spin for a
    while and would take the cores from it.
    """
    repeats = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, min(200, int(2e-3 / max(time.perf_counter() - start, 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for sample in range(MOST):
        if sample >= FEWEST and time.perf_counter() > end:
            break
        for name, call in calls.items():
            n = repeats[name]
            _settle(call)
            start = time.perf_counter()
            for _ in range(n):
                call()
            times[name].append((time.perf_counter() - start) * 1e3 / n)
    return {name: summary(found) for name, found in times.items()}


def _settle(call: Callable[[], object]) -> None:
    end = time.perf_counter() + SETTLE
    call()
    while time.perf_counter() < end:
        call()
