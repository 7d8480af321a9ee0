"""Quantized networks in ONNX: integers in the file, and the same answers from a runtime that computes in integers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from quantizable import Blocks, images, with_statistics

from sepconv.quantize import quantize
from sepconv.runs import onnx_file
from sepconv.runs.onnx_file import export_onnx

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def quantized() -> Any:
    torch.manual_seed(0)
    return quantize(with_statistics(Blocks()), images(), skip=("classifier",))[0]


@pytest.fixture(scope="module")
def path(quantized: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = export_onnx(quantized, (3, 16, 16), tmp_path_factory.mktemp("onnx") / "model.onnx")
    assert found.checked_with.startswith("onnxruntime")
    assert found.convolutions == 6
    return found.path


def test_weights_and_biases_are_integers(path: Path) -> None:
    graph = onnx.load(path).graph
    kinds = {one.name: onnx.TensorProto.DataType.Name(one.data_type) for one in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    convs = [node for node in graph.node if node.op_type == "Conv"]
    for conv in convs:
        stored = [kinds.get(makers[name].input[0]) for name in conv.input[1:]]
        assert stored == ["INT8", "INT32"]
        assert makers[conv.input[0]].op_type == "DequantizeLinear"
    assert not any(name.endswith("weight") and kind == "FLOAT" for name, kind in kinds.items() if "class" not in name)


@torch.inference_mode()
def test_a_runtime_answers_the_same_in_integers(quantized: Any, path: Path, tmp_path: Path) -> None:
    options = runtime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    nodes = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert nodes["QLinearConv"] == 4  # all but those in front of the sum and of what was skipped
    if not torch.cpu._is_vnni_supported():  # its products of uint8 and int8 saturate at 16 bits
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    x = images(64, seed=2)
    have, want = torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), quantized(x)
    assert (have - want).square().sum() < 1e-4 * (want - want.mean(0)).square().sum()


def test_what_the_file_says_is_checked(quantized: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what a runtime makes of it, whose products saturate where the processor has none of its own."""
    monkeypatch.setattr(onnx_file, "QUANTIZED_TOLERANCE", 1e-7)
    assert export_onnx(quantized, (3, 16, 16), tmp_path / "model.onnx").checked_with


def test_other_answers_are_refused(quantized: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "QUANTIZED_TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="export_onnx: ONNX Runtime's outputs differ from PyTorch's by "):
        export_onnx(quantized, (3, 16, 16), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()
