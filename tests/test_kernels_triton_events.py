"""The timer of a GPU, as far as it goes without one: events that are told how far apart they are."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from sepconv.kernels.triton import events
from sepconv.kernels.triton.events import Times
from sepconv.system import timing


class _Event:
    """Each lasts a millisecond longer than the one before."""

    made = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        _Event.made += 1
        self.number, self.recorded = _Event.made, False

    def record(self) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded

    def elapsed_time(self, end: _Event) -> float:
        assert self.recorded
        assert end.recorded
        return float(end.number - self.number)


def test_events_stand_around_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timer as far as it goes without a device: every contender as often as the others, caches flushed before."""
    counts, flushed, flush = {"torch": 0, "0": 0}, [], events._flush

    def noted(device: torch.device) -> SimpleNamespace:
        memory = flush(device)
        return SimpleNamespace(zero_=lambda: flushed.append(memory.zero_().numel()))

    monkeypatch.setattr(events, "_SMALLEST_FLUSH", 2**10)
    monkeypatch.setattr(events, "_flush", noted)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=2**11))
    monkeypatch.setattr(timing, "seconds", lambda call: call() or 0.02)
    calls = {name: lambda name=name: counts.__setitem__(name, counts[name] + 1) for name in counts}
    found = events.measure(calls, torch.device("cpu"), 5)
    assert found == {name: Times(1.0, 1.0) for name in counts}
    assert counts["torch"] == counts["0"] == 1 + 5 + 3 * events.IN_A_ROW
    assert flushed == [2**12] * events._FLUSHES * 2 * 5, "twice what the caches hold, before each call"
    told = events.interleaved(calls, 0.0, torch.device("cpu"))
    assert {name: (one.median_ms, one.samples) for name, one in told.items()} == dict.fromkeys(counts, (1.0, 7))


def test_long_calls_are_timed_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else PyTorch's slowest kernels, half a second each, would be called for minutes."""
    done: list[str] = []
    monkeypatch.setattr(events, "_SMALLEST_FLUSH", 2**10)
    monkeypatch.setattr(_Event, "elapsed_time", lambda start, end: 500.0)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=2**11))
    monkeypatch.setattr(timing, "seconds", lambda call: call() or 0.5)
    found = events.measure({"torch": lambda: done.append("torch")}, torch.device("cpu"), budget=0.0)
    assert found == {"torch": Times(500.0, 500.0)}
    assert len(done) == 1 + 3 + 3
