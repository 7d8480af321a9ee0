"""The one timer: contenders called in turn, so that whatever else the machine does meets them alike.

What is told of a contender is the median of many samples and the range that holds the middle 60 %.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

FEWEST, MOST = 7, 200
SETTLE = 0.010

Call = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)


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


def seconds(call: Call, repeats: int = 1) -> float:
    """Mean time of ``repeats`` calls in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def in_turn(
    calls: Mapping[Name, Call],
    rounds: int,
    *,
    fewest: int = 0,
    budget: float = math.inf,
    sample: Callable[[Name, Call], float] = lambda name, call: seconds(call),
) -> dict[Name, list[float]]:
    """Seconds of every contender in each round.

    Args:
        rounds: at most; after ``fewest`` of them no other begins once ``budget`` seconds are over.
        sample: measures one contender once; the time of one call unless given.
    """
    times: dict[Name, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + budget
    for done in range(rounds):
        if done >= fewest and time.perf_counter() > end:
            break
        for name, call in calls.items():
            times[name].append(sample(name, call))
    return times


def interleaved(calls: Mapping[str, Call], budget: float) -> dict[str, Timing]:
    """Samples of all contenders until ``budget`` seconds are over.

    A sample of a short call is the mean of several calls in a row (2 ms or so), or the clock would be measured. Before
    each sample its contender runs untimed for 10 ms: the idle workers of another contender's thread pool spin for a
    while and would take the cores from it.
    """
    repeats = {}
    for name, call in calls.items():
        seconds(call, 3)
        repeats[name] = max(1, min(200, int(2e-3 / max(seconds(call), 1e-7))))

    def sample(name: str, call: Call) -> float:
        _settle(call)
        return seconds(call, repeats[name])

    times = in_turn(calls, MOST, fewest=FEWEST, budget=budget, sample=sample)
    return {name: summary([value * 1e3 for value in found]) for name, found in times.items()}


def _settle(call: Call) -> None:
    end = time.perf_counter() + SETTLE
    call()
    while time.perf_counter() < end:
        call()
