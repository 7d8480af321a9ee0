"""The record of C libraries: what is counted, what is compared, and the tables that are made of it."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from device_run import EXAMPLE, needs_program, small

import sepconv
from benchmarks import export, export_browser, export_instructions, export_ncnn, export_tables
from benchmarks.published.ncnn import Line, Weights
from sepconv.device import ExportedLibrary

SUMMED = """
int model_run(const float *input, float *output) {
  int i;
  float sum = 0;
  for (i = 0; i < MODEL_INPUT_SIZE; i++) sum += input[i];
  output[0] = sum;
  return 0;
}
"""


def library(folder: Path, target: str, size: int) -> ExportedLibrary:
    """A library that adds up its input, built by the C compiler."""
    folder.mkdir()
    header = f"enum {{ MODEL_INPUT_SIZE = {size}, MODEL_OUTPUT_SIZE = 1 }};\nint model_run(const float *, float *);\n"
    (folder / "model.h").write_text(header)
    (folder / "model.c").write_text(f'#include "model.h"\n{SUMMED}')
    subprocess.run(["gcc", "-O1", "-c", "model.c"], cwd=folder, check=True)
    subprocess.run(["ar", "rc", "libmodel.a", "model.o"], cwd=folder, check=True)
    return ExportedLibrary(folder, "model", target, "float32", ((size,),), ((1,),), 0, 0, 0, 0)


def test_instructions_are_those_of_one_call(tmp_path: Path) -> None:
    for tool in ("gcc", "ar", "qemu-x86_64"):
        needs_program(tool)
    few, many = (export_instructions.counted(library(tmp_path / str(n), "x86-64-linux", n)) for n in (1000, 3000))
    # A loop of some instructions a number; what a program does around it is in neither.
    assert 2000 <= many - few <= 16_000
    assert abs((many - few) - 2 * few) < 100


def test_targets_that_cannot_be_counted_are_named() -> None:
    assert export_instructions.missing("wasm-32") == "there is no emulator here"
    assert export_instructions.missing("arm-64-android") == "there is no emulator here"


def test_chromium_answers_as_pytorch_does(tmp_path: Path) -> None:
    if reason := export_browser.missing():
        pytest.skip(reason)
    found = sepconv.export_c(small(), EXAMPLE, tmp_path / "lib", target="wasm-32")
    times, answers = export_browser.measured(tmp_path, {"ours": found}, None, 0.05)
    expected = small()(export_browser.given(EXAMPLE.shape)).flatten()
    torch.testing.assert_close(answers["ours"], expected, rtol=1e-4, atol=1e-5)
    assert times["ours"]["calls"] >= 20
    ordered = [times["ours"][key] for key in ("low_ms", "median_ms", "high_ms")]
    assert ordered == sorted(ordered)


def test_what_fails_in_the_browser_is_said(tmp_path: Path) -> None:
    if reason := export_browser.missing():
        pytest.skip(reason)
    found = sepconv.export_c(small(), EXAMPLE, tmp_path / "lib", target="wasm-32")
    (tmp_path / "lib" / "model.wasm").write_bytes(b"\0asm")
    with pytest.raises(RuntimeError, match="WebAssembly"):
        export_browser.measured(tmp_path, {"ours": found}, None, 0.05)


def test_a_network_for_ncnn_has_the_layers_of_ours(tmp_path: Path) -> None:
    model = sepconv.models.MobileNetV1(0.25, num_classes=7)
    assert export_ncnn.write_model(model, tmp_path) == 7
    _, count, *texts = (tmp_path / "ncnn.param").read_text().splitlines()
    lines, weights = [Line.of(text) for text in texts], Weights((tmp_path / "ncnn.bin").read_bytes())
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    written = [line for line in lines if line.kind.startswith("Convolution")]
    assert count == f"{len(lines)} {len(lines)}"
    for line, conv in zip(written, convolutions, strict=True):
        sizes = (conv.out_channels, conv.kernel_size[0], conv.stride[0], conv.padding[0], conv.groups)
        assert sizes == tuple(line.whole(number, 1) for number in (0, 1, 3, 4, 7))
        assert conv.weight.numel() == line.whole(6)
        weights.tagged(line.whole(6))
        weights.plain(line.whole(0))
    weights.tagged(256 * 7)
    weights.plain(7)
    assert weights.left == 0
    with pytest.raises(ValueError, match="only MobileNet v1 is written in ncnn's format here, not MobileNetV2"):
        export_ncnn.write_model(sepconv.models.MobileNetV2(0.25), tmp_path)


def test_every_network_has_what_the_record_needs() -> None:
    for name in ("mobilenet_v1 0.5-160", "mobilenet_v2 1.0-224"):
        assert set(export.NETWORKS[name].targets) == {*export.ARM, export.BASELINE, export.SIMD, export.SCALAR}
        assert export.NETWORKS[name].precisions == ("float32", "int8")
    assert "int8" in export.NETWORKS["mobilenet_v1 0.25-128"].precisions
    assert "arm-64-linux" in export.NETWORKS["mobilenet_v1 0.25-128"].targets
    assert "float32" in export.NETWORKS["mobilenet_v1 1.0-224"].precisions


def test_what_is_absent_is_listed_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent: dict[str, str] = {}
    found = replace(ExportedLibrary(tmp_path, "m", "wasm-32", "float32", ((1,),), ((1,),), 0, 0, 0, 0))
    monkeypatch.setattr(export_browser, "missing", lambda: "there is no chromium here")
    assert export._browser(tmp_path, {export.SIMD: found}, small(), 0.1, absent) == {}
    assert export._instructions(found, absent) == {}
    assert absent == {"Chromium": "there is no chromium here", "instructions, wasm-32": "there is no emulator here"}


def row(target: str, **more: object) -> dict[str, object]:
    return {"network": "n", "precision": "int8", "target": target, "macs": 100, **more}


def test_tables_say_what_the_record_says() -> None:
    sizes = {"library_bytes": 1000, "code_bytes": 700, "weights_bytes": 300, "arena_bytes": 64}
    times = {"library_ms": {"median_ms": 1.1}, "compile_ms": {"median_ms": 1.0}, "over_compile": 1.1}
    browser = {"median_ms": 5.0, "over_ours": 1.25, "error": 0.004}
    rows = [
        row("x86-64-linux-avx2", **sizes, **times),
        row("x86-64-linux", **sizes, instructions=400),
        row("arm-64-linux", **sizes, instructions=200),
        row("onnxruntime-web", chromium=browser),
    ]
    record = {"machine": {"cpu": "C"}, "rows": rows, "onnxruntime_web": "9", "absent": {"b": "no b", "a": "no a"}}
    text = export_tables.table(record)
    for line in (
        "| n | int8 | x86-64-linux-avx2 | 1,000 | 700 | 300 | 64 |",
        "| n | int8 | x86-64-linux-avx2 | 1.100 | 1.000 | **1.10** |",
        "| n | int8 | arm-64-linux | 200 | 2.000 | 0.50 |",
        "| n | int8 | onnxruntime-web | 5.00 | 1.25 | 0.004 |",
        "onnxruntime-web 9 with one thread",
        "Absent: a: no a; b: no b.",
    ):
        assert line in text
