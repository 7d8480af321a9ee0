"""The benchmark suites: verify before time, the record's format, and tables that follow from records."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import cli_run
import pytest
import torch

from sepconv.bench import blocks, operations, run, tables
from sepconv.bench.operations import OpCase
from sepconv.kernels.triton import events
from sepconv.system.timing import Timing, interleaved, summary

SMALL = OpCase(1, 8, (7, 5), (3, 3))


def test_cases_are_as_many_and_as_different_as_promised() -> None:
    assert len(operations.CASES) >= 24
    assert len({case.name for case in operations.CASES}) == len(operations.CASES)
    assert {len(case.image) for case in operations.CASES} == {1, 2, 3}
    assert {case.dilation for case in operations.CASES} == {1, 2, 4}
    assert {case.multiplier for case in operations.CASES} == {1, 2, 4}


def test_blocks_come_from_the_models() -> None:
    found = blocks.blocks()
    assert sum(n for block, n in found.items() if block.network == "v1") == 13
    assert sum(n for block, n in found.items() if block.network == "v2") == 17
    v1 = sum(block.macs * n for block, n in found.items() if block.network == "v1")
    # 1x1 and depthwise multiply-adds of Table 2 of arXiv:1704.04861, exactly recomputed.
    assert v1 == 539_492_352 + 17_385_984


def test_a_case_is_verified_timed_and_recorded() -> None:
    found = list(operations.run_case(SMALL, 1, 0.0))
    assert {(r.contender, r.pass_) for r in found} == {
        (name, which) for name in ("torch-nchw", "torch-nhwc", "sepconv") for which in operations.PASSES
    }
    assert all(r.median_ms > 0 and 0 <= r.max_error <= 1 and r.macs == 8 * 35 * 9 for r in found)


def test_numbers_of_16_bits_are_verified_and_recorded_apart() -> None:
    found = list(operations.run_case(SMALL, 1, 0.0, torch.bfloat16))
    assert {r.suite for r in found} == {"ops-bfloat16"}
    assert all(r.max_error <= 1 for r in found if r.contender == "sepconv")
    assert all(r.max_error > 0 for r in found)
    in_float32 = list(operations.run_case(SMALL, 1, 0.0))
    assert [2 * r.bytes for r in found] == [r.bytes for r in in_float32]


def test_a_gpu_is_timed_by_events_and_pytorchs_error_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Here the CPU is called a GPU."""
    make = operations.make_tensors
    monkeypatch.setattr(operations, "make_tensors", lambda case, form, dtype, device: make(case, form, dtype))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    asked = []

    def timed(calls: dict[str, Any], seconds: float, device: torch.device) -> dict[str, Timing]:
        asked.append((sorted(calls), device))
        return {name: Timing(1.0, 1.0, 1.0, 7) for name in calls}

    monkeypatch.setattr(events, "interleaved", timed)
    inexact = operations.pytorchs

    def in_few_digits(case: OpCase, t: operations.Tensors) -> dict[str, Any]:
        calls = inexact(case, t)
        return calls if t.x.dtype is torch.float64 else {**calls, "forward": lambda: calls["forward"]() * 1.001}

    monkeypatch.setattr(operations, "pytorchs", in_few_digits)
    found = list(operations.run_case(SMALL, 1, 0.0, device="cuda"))
    assert {r.suite for r in found} == {"ops-cuda"}
    assert (
        asked == [(sorted(["torch-nchw", "sepconv-nchw", "torch-nhwc", "sepconv-nhwc"]), torch.device("cuda", 0))] * 3
    )
    assert max(r.max_error for r in found if r.contender == "torch-nchw") > 1
    # The whole suite: its file and its tables, on a machine that may have no Halide.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(operations, "CASES", [SMALL])
    monkeypatch.setattr(run, "fma_peak_gflops", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Imaginary 1000")
    written = tmp_path / "ops.json"
    ran = cli_run.sepconv("bench", "ops", "--device", "cuda", "--seconds", 0.001, "--json", written)
    assert ran.code == 0, ran.err
    assert "Summary of ops.json three passes, over PyTorch's" in " ".join(ran.out.split())
    assert SMALL.name in str(tables.operations(tables.read(written), 1))
    assert "over PyTorch's better layout" in " ".join(str(tables.operations_summary(tables.read(written))).split())
    assert all(r.max_error <= 1 for r in found if r.contender == "sepconv")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_none_is_measured(tmp_path: Path) -> None:
    ran = cli_run.sepconv("bench", "ops", "--device", "cuda", "--json", tmp_path / "ops.json")
    ran.failed_with(2, "there is no GPU that this PyTorch can use; sepconv doctor says what is missing")
    assert not list(tmp_path.iterdir())


def test_a_wrong_result_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = operations.ours

    def wrong(case: OpCase, t: operations.Tensors) -> dict[str, object]:
        calls = right(case, t)
        return {**calls, "grad_input": lambda: calls["grad_input"]() * 1.001}

    monkeypatch.setattr(operations, "ours", wrong)
    with pytest.raises(ValueError, match=r"bench ops: sepconv-nchw, .*, grad_input: .* times the bound"):
        list(operations.run_case(SMALL, 1, 0.0))
    block = blocks.Block("v1", 8, 8, 7, 1, "relu6")
    monkeypatch.setattr(blocks, "ours", lambda block, t: blocks.pytorchs(block, t) + 0.01)
    with pytest.raises(ValueError, match="bench blocks: sepconv-nchw"):
        list(blocks.run_block(block, 1, 1, 0.0))


def test_contenders_take_turns() -> None:
    seen: list[str] = []
    found = interleaved({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 0.0)
    assert set(found) == {"a", "b"}
    assert found["a"].samples == found["b"].samples >= 7
    changes = sum(x != y for x, y in pairwise(seen))
    assert changes >= 2 * found["a"].samples - 1


def test_summary_is_the_median_and_the_middle() -> None:
    found = summary([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found.median_ms, found.low_ms, found.high_ms, found.samples) == (3.0, 2.0, 4.0, 5)


def test_suite_writes_a_file_whose_tables_follow_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "CASES", [SMALL, replace(SMALL, kernel=(1, 7))])
    path = tmp_path / "ops.json"
    run.run("ops", [1], 0.001, "", path, "sepconv bench ops", lambda *_: None)
    content = tables.read(path)
    assert content["machine"]["fma_peak_gflops"]["1"] > 1
    assert {row["kernel"] for row in content["records"]} <= {"halide", "torch"}
    table = str(tables.operations(content, 1))
    assert table.count("\n") == 4
    assert "| 1x8x7x5 k1x7 |" in table
    assert str(tables.operations_summary(content)).count("\n") == 3


def test_block_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = blocks.Block("v1", 8, 16, 7, 1, "relu6")
    monkeypatch.setattr(blocks, "blocks", lambda: blocks.Counter({block: 2}))
    path = tmp_path / "blocks.json"
    run.run("blocks", [1], 0.001, "", path, "sepconv bench blocks", lambda *_: None)
    content = tables.read(path)
    assert content["counts"] == {"v1 8-16 7px b1": 2, "v1 8-16 7px b8": 2}
    assert {row["contender"] for row in content["records"]} == {
        "torch-nchw", "torch-nhwc", "sepconv", "sepconv-bound"
    }  # fmt: skip
    assert "v1 8-16 7px b8" in str(tables.blocks(content, 1))
    assert "functions, 1 thread(s)" in str(tables.blocks_summary(content))


def test_speedup_is_over_the_better_layout() -> None:
    assert tables.speedup({"torch-nchw": 4.0, "torch-nhwc": 3.0, "sepconv": 1.5}) == 2.0
    rows = [
        {"threads": 1, "case": "c", "pass": "forward", "contender": "sepconv", "median_ms": ms} for ms in (2.0, 1.0)
    ]
    assert tables.best_times(rows) == {(1, "c", "forward"): {"sepconv": 1.0}}


def test_all_passes_together_are_of_one_layout() -> None:
    """Nobody changes the layout of a network between its forward and its backward pass."""
    times = {("sepconv", "nchw"): (1.0, 7.0), ("sepconv", "nhwc"): (4.0, 2.0), ("torch-nchw", "nchw"): (9.0, 9.0)}
    rows = [
        {"threads": 1, "case": "c", "pass": which, "contender": contender, "layout": layout, "median_ms": ms}
        for (contender, layout), pair in times.items()
        for which, ms in zip(("forward", "grad_input"), pair, strict=True)
    ]
    summary = str(tables.operations_summary({"records": rows}))
    assert "| 1 | 3.00 | 3.00 | 6.36 | 4.50 (c, grad input) |" in summary


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (
            "suite must be one of ops, ops-bfloat16, ops-cuda, ops-cuda-bfloat16, blocks, got 'all'",
            ("all", [1], 1.0, ""),
        ),
        ("threads must be positive", ("ops", [0], 1.0, "")),
        ("no case has 'zebra' in its name", ("ops", [1], 1.0, "zebra")),
    ],
)
def test_wrong_arguments(tmp_path: Path, message: str, arguments: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match=message):
        run.run(*arguments, tmp_path / "x.json", "", lambda *_: None)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    for text in ("{", json.dumps({"records": []})):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"broken\.json is no benchmark file"):
            tables.read(path)


def test_replace_between_markers() -> None:
    text = "a\n<!-- t -->\nold\n<!-- /t -->\nb\n"
    assert tables.replace_between(text, "t", "new\n") == "a\n<!-- t -->\nnew\n<!-- /t -->\nb\n"
    with pytest.raises(ValueError, match="must each occur once"):
        tables.replace_between(text, "u", "")


def test_peak_is_measured_at_the_asked_thread_count() -> None:
    before = torch.get_num_threads()
    assert run.fma_peak_gflops(1, repeats=2) > 1
    assert torch.get_num_threads() == before
