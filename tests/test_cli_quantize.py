"""`sepconv quantize` and `convert --precision int8` on a trained network: what they write, print and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_run import sepconv as run
from cli_run import trained_folder

from sepconv.data import load
from sepconv.quantize import is_quantized
from sepconv.runs import onnx_file, png
from sepconv.runs.model_file import open_model

_QUICKLY = ("--data", "digits", "--calibration-images", 64)


@pytest.fixture(autouse=True)
def _without_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter takes seconds."""
    monkeypatch.setattr(onnx_file, "missing", lambda: "onnx is not here")


@pytest.fixture(scope="module")
def trained() -> Path:
    return trained_folder()


@pytest.fixture(scope="module")
def quantized(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "network"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(onnx_file, "missing", lambda: "onnx is not here")
        ran = run("quantize", trained, *_QUICKLY, "--epochs", 1, "--skip", "classifier.1", "--out", out)
    assert ran.code == 0, ran.err
    assert "1/3" in next(line for line in ran.out.splitlines() if line.startswith("bytes of weights"))
    assert "points" in next(line for line in ran.out.splitlines() if line.startswith("accuracy"))
    assert "classifier.1 stays in float32: skipped" in ran.out
    return out


def test_the_record_says_what_was_done(quantized: Path) -> None:
    record = json.loads((quantized / "result.json").read_text())
    assert record["kind"] == "quantize"
    assert [stage["name"] for stage in record["stages"]] == ["original", "quantized", "fine-tuned"]
    assert record["plan"]["left"] == ["classifier.1"]
    assert record["quantized"]["accuracy"] > record["normal"]["accuracy"] - 0.02
    assert record["held_out_images"] > 0
    assert {path.name for path in quantized.iterdir()} == {"model.safetensors", "result.json"}


def test_other_commands_take_the_folder(quantized: Path, tmp_path: Path) -> None:
    network, _ = open_model(str(quantized))
    assert is_quantized(network)
    (tmp_path / "digit.png").write_bytes(png.encode(load("digits").test.images.take(torch.tensor([7]))[0]))
    ran = run("predict", quantized, tmp_path / "digit.png", "--json", "-")
    assert ran.code == 0, ran.err
    assert run("count", quantized).code == 0


def test_the_folder_of_another_run_is_refused(trained: Path, quantized: Path, tmp_path: Path) -> None:
    ran = run("convert", trained, "--data", "digits", "--out", quantized)
    ran.failed_with(2, f"convert: {quantized} holds what sepconv quantize wrote: give another --out")
    ran = run("convert", trained, "--data", "digits", "--precision", "int4", "--out", tmp_path)
    ran.failed_with(2, "--precision must be float32 or int8, but got 'int4'")


def test_the_folder_of_integers_is_no_input_and_nobody_elses(trained: Path, quantized: Path, tmp_path: Path) -> None:
    beside = tmp_path / "out" / "int8"
    beside.mkdir(parents=True)
    weights = beside / "model.safetensors"
    weights.write_bytes((trained / "model.safetensors").read_bytes())
    before, options = weights.read_bytes(), ("--data", "digits", "--epochs", 0, "--precision", "int8")
    ran = run("convert", trained, "--weights", weights, *options, "--out", tmp_path / "out")
    ran.failed_with(2, f"--out {weights} would overwrite the input {weights}")
    ran = run("convert", trained, *options, "--out", tmp_path / "out")
    ran.failed_with(2, f"{beside} holds what sepconv train wrote: give another --out")
    ran = run("demo", "--out", tmp_path / "out")
    ran.failed_with(2, f"{beside} holds what sepconv train wrote: give another --out")
    assert weights.read_bytes() == before
    ran = run("convert", quantized, "--data", "digits", "--epochs", 0, "--out", tmp_path / "other")
    ran.failed_with(2, "convert: the model is quantized: convert the one that it was made of")


@pytest.mark.slow
def test_convert_writes_a_quantized_network_beside_the_other(trained: Path, tmp_path: Path) -> None:
    options = ("--budget", "1/2", "--epochs", 0, "--precision", "int8")
    ran = run("convert", trained, *_QUICKLY, *options, "--out", tmp_path)
    assert ran.code == 0, ran.err
    assert "With 8-bit integers: accuracy " in ran.out
    record = json.loads((tmp_path / "result.json").read_text())
    beside, _ = open_model(str(tmp_path / "int8"))
    whole, _ = open_model(str(tmp_path))
    assert is_quantized(beside)
    assert not is_quantized(whole)
    assert record["int8"]["quantized"]["accuracy"] > record["separable"]["accuracy"] - 0.02
    rows = {(row["network"], row["precision"]): row for row in record["precisions"]}
    whole, short, bytes_ = (rows["separable", name] for name in ("float32", "bfloat16", "int8"))
    assert next(iter(rows)) == ("normal", "float32")
    assert all(row["ms"] > 0 for row in rows.values())
    assert whole["accuracy"] == record["separable"]["accuracy"]
    assert abs(short["accuracy"] - whole["accuracy"]) < 0.02
    # The compiled network of integers answers as the one in PyTorch that it was made of.
    assert abs(bytes_["accuracy"] - record["int8"]["quantized"]["accuracy"]) <= 1 / record["test_images"]
    assert bytes_["bytes"] < 0.27 * whole["bytes"]
    assert 0.5 * whole["bytes"] < short["bytes"] < 0.54 * whole["bytes"]
    assert "In fewer bits, by sepconv.compile" in ran.out
