"""The script that somebody with a GPU runs once: what it writes down, of proofs that are told."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from benchmarks import gpu
from sepconv.bench import operations
from sepconv.bench.operations import OpCase
from sepconv.kernels.case import Case
from sepconv.kernels.halide.jit import code_cache
from sepconv.kernels.triton import depthwise
from sepconv.kernels.triton.events import Times
from sepconv.kernels.triton.proof import Verdict

_SMALL = OpCase(1, 8, (7, 5), (3, 3))


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Twice as fast as PyTorch in channels_last, half as fast else; PyTorch's layouts take 1 and 2 ms."""

    def verdict(case: Case) -> Verdict:
        last = case.given[0].channels_last
        return Verdict(0, Times(1.0, 1.0) if last else Times(2.0, 2.0), Times(2.0, 2.0) if last else Times(1.0, 1.0))

    make = operations.make_tensors
    monkeypatch.setattr(operations, "make_tensors", lambda case, form, dtype, device: make(case, form, dtype))
    monkeypatch.setattr(depthwise, "supports", lambda case: "")
    monkeypatch.setattr(depthwise, "verdict", verdict)
    return list(gpu.rows(_SMALL, "bfloat16", 1000.0))


def test_every_pass_and_layout_is_written_down(rows: list[dict[str, Any]]) -> None:
    assert [(row["layout"], row["pass"]) for row in rows] == [
        (layout, which) for layout in ("nchw", "nhwc") for which in operations.PASSES
    ]
    assert [row["used"] for row in rows] == [False] * 3 + [True] * 3
    assert rows[0]["reason"] == "it takes 2.0000 ms on this device, PyTorch's kernel 1.0000 ms"
    moved = 2 * (8 * 35 * 2 + 8 * 9)
    assert rows[0]["bytes"] == moved
    assert rows[0]["share_of_copy"] == round(moved / 2.0 / 1e6 / 1000, 3)


def test_losses_count_and_pytorchs_better_layout(rows: list[dict[str, Any]]) -> None:
    """Ours in channels_last takes as long as PyTorch's contiguous kernel: nothing was won."""
    assert gpu.summary(rows) == {"bfloat16": 1.0}
    for row in rows:
        row["ours_ms"] /= 4
        row["used"] = True
    assert gpu.summary(rows) == {"bfloat16": 4.0}


def test_a_layout_without_times_of_all_passes_is_left_out(rows: list[dict[str, Any]]) -> None:
    """Else it would be the fastest of them."""
    [last] = [row for row in rows if (row["layout"], row["pass"]) == ("nhwc", "grad_weight")]
    last["torch_ms"] = last["ours_ms"] = 0.0
    assert gpu.summary(rows) == {"bfloat16": 1.0}


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize(("minutes", "left"), [("9", 0), ("0", None)])
def test_one_command_leaves_a_record(
    minutes: str, left: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a device that is pretended; what was measured is written after each case."""
    saved: dict[str, Any] = {}
    monkeypatch.setattr("sys.argv", ["gpu.py", "--dtypes", "bfloat16", "--minutes", minutes])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Imaginary 1000/S")
    monkeypatch.setattr(depthwise, "missing", lambda: "")
    monkeypatch.setattr(gpu, "copy_gigabytes_per_second", lambda device: 1000.0)
    monkeypatch.setattr(operations, "CASES", [_SMALL])
    monkeypatch.setattr(gpu, "save", lambda name, record: saved.update(record, name=name))
    monkeypatch.setenv(code_cache.VARIABLE, "")
    gpu.main()
    if left is None:
        assert saved == {}
        assert "1 of 1 cases are left after 0 minutes" in capsys.readouterr().out
    else:
        assert (saved["name"], saved["cases_left"], len(saved["records"])) == ("gpu-imaginary-1000-s", left, 6)
        assert saved["geometric_means"] == {"bfloat16": 1.0}
        json.dumps(saved, allow_nan=False)


@pytest.mark.parametrize(("option", "value"), [("--dtypes", "float8"), ("--match", "nothing like it")])
def test_what_it_does_not_know_is_said(option: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["gpu.py", option, value])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(depthwise, "missing", lambda: "")
    with pytest.raises(SystemExit):
        gpu.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="there is no GPU that this PyTorch can use"):
        gpu.main()
