"""Processes that were launched together are connected, and part while Python still runs."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from sepconv.train import processes as module


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is to be called in the end."""
    found: list[Any] = []

    def unregister(handler: Any) -> None:
        found[:] = [other for other in found if other != handler]

    monkeypatch.setattr(module, "atexit", SimpleNamespace(register=found.append, unregister=unregister))
    return found


def launch(monkeypatch: pytest.MonkeyPatch, launched: int, connected: int) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(launched))
    monkeypatch.setattr(module, "PartialState", lambda cpu: SimpleNamespace(num_processes=connected))


def test_processes_that_do_not_find_each_other_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, launched=4, connected=1)
    with pytest.raises(RuntimeError, match="train: 4 processes were launched but 1 are connected"):
        module.processes()


def test_one_process_has_nobody_to_part_from(monkeypatch: pytest.MonkeyPatch, registered: list[Any]) -> None:
    launch(monkeypatch, launched=1, connected=1)
    module.processes()
    assert registered == []


def test_the_connection_ends_before_python_does(monkeypatch: pytest.MonkeyPatch, registered: list[Any]) -> None:
    launch(monkeypatch, launched=2, connected=2)
    module.processes()
    module.processes()
    [leave] = registered
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    gc.disable()
    try:
        parallel: Any = DistributedDataParallel(nn.Linear(2, 2))
        parallel.itself, seen = parallel, ref(parallel)
        del parallel
        leave()
        # It holds the connection's threads.
        assert seen() is None
        assert not distributed.is_initialized()
    finally:
        gc.enable()
        if distributed.is_initialized():
            distributed.destroy_process_group()
    leave()
