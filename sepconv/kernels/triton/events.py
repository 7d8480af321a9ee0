"""How long calls take on a GPU: each between two events, its caches flushed, and in a row as a network calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import NamedTuple

import torch

from sepconv.system import timing

ROUNDS = 20
SECONDS = 1.0
"""After them few rounds are enough: such long calls differ by little."""
IN_A_ROW = 20
_ROW = 20.0
"""Milliseconds on the device that calls in a row are to take: behind longer ones Python's time is hidden."""
_FEWEST = 3
_SMALLEST_FLUSH = 256 * 2**20
_FLUSHES = 4
"""To write so much so often takes the fastest devices 0.1 ms, longer than a call takes Python: none of that is between
the events."""


class Times(NamedTuple):
    """Of one call in milliseconds.

    Attributes:
        device: on the device alone, nothing of its tensors in the caches.
        call: one of many in a row, what Python takes for each included.
    """

    device: float
    call: float


def _flush(device: torch.device) -> torch.Tensor:
    """Memory that takes the place of all else in the caches when it is written."""
    caches = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    return torch.empty(max(_SMALLEST_FLUSH, 2 * caches), dtype=torch.int8, device=device)


Calls = Mapping[str, Callable[[], object]]


def _alone(calls: Calls, device: torch.device, rounds: int, fewest: int, budget: float) -> dict[str, list[float]]:
    """Milliseconds of every contender on the device alone; after ``fewest`` rounds none begins beyond the budget."""
    flush = _flush(device)

    def sample(name: str, call: Callable[[], object]) -> float:
        for _ in range(_FLUSHES):
            flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    for call in calls.values():
        call()
    return timing.in_turn(calls, rounds, fewest=fewest, budget=budget, sample=sample)


def _in_a_row(count: int, name: str, call: Callable[[], object]) -> float:
    def several() -> None:
        for _ in range(count):
            call()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return timing.seconds(several) * 1e3 / count


def measure(calls: Calls, device: torch.device, rounds: int = ROUNDS, budget: float = SECONDS) -> dict[str, Times]:
    """The medians of every contender, taken in turn."""
    with torch.cuda.device(device):
        alone = {name: median(found) for name, found in _alone(calls, device, rounds, _FEWEST, budget).items()}
        count = max(1, int(_ROW / max(*alone.values(), _ROW / IN_A_ROW)))
        sample = partial(_in_a_row, count)
        rows = timing.in_turn(calls, max(_FEWEST, rounds // 4), fewest=_FEWEST, budget=budget, sample=sample)
    return {name: Times(alone[name], median(rows[name])) for name in calls}


def interleaved(calls: Calls, budget: float, device: torch.device) -> dict[str, timing.Timing]:
    """As ``timing.interleaved``, of the device alone."""
    with torch.cuda.device(device):
        found = _alone(calls, device, timing.MOST, timing.FEWEST, budget)
    return {name: timing.summary(times) for name, times in found.items()}
