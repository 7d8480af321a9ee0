"""Weights that take no memory while nobody reads them."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import randomise
from torch import Tensor, nn

from sepconv.compile import CompiledModel, compile
from sepconv.kernels.halide.jit import runtime

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="memory is given back on Linux"),
    pytest.mark.skipif(bool(runtime.missing()), reason=runtime.missing()),
]
CHANNELS = 192


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def network() -> nn.Module:
    return randomise(nn.Sequential(nn.Conv2d(8, CHANNELS, 1), nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 1)))


def resident(folder: Path) -> int:
    """Bytes in memory of the files of that folder, which have no names any more."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if not fields[0].endswith(":"):
            inside = str(folder) in line
        elif inside and fields[0] == "Rss:":
            total += int(fields[1]) * 1024
    return total


def same(fast: CompiledModel, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_packed_weights_leave_memory_and_come_back(folder: Path) -> None:
    model, x = network(), torch.randn(1, 8, 7, 9)
    fast = compile(model, x)
    same(fast, model, x)
    assert resident(folder) == 0
    large = next(fast._frozen[2].parameters())  # type: ignore[index]
    assert large.untyped_storage().filename is not None
    assert torch.equal(large, model[2].weight)  # type: ignore[index]
    assert resident(folder) >= large.nbytes
    same(fast, model, torch.randn(2, 8, 5, 11))
    assert resident(folder) == 0


def test_nothing_is_left_on_disk(folder: Path) -> None:
    compile(network(), torch.randn(1, 8, 7, 9))
    assert list(folder.iterdir()) == []


def test_weights_stay_in_memory_where_there_is_no_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    model, x = network(), torch.randn(1, 8, 7, 9)
    fast = compile(model, x)
    same(fast, model, x)
    assert all(parameter.untyped_storage().filename is None for parameter in fast._frozen.parameters())
    assert list(folder.iterdir()) == []


def test_the_callers_weights_stay_where_they_are(folder: Path) -> None:
    model = network()
    compile(model, torch.randn(1, 8, 7, 9))
    assert all(parameter.untyped_storage().filename is None for parameter in model.parameters())
