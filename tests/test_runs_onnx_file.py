"""ONNX files give PyTorch's outputs at any batch size, from plain nodes, and are never left half-made or unchecked."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from sepconv.layers import SeparableConv2d
from sepconv.runs import onnx_file
from sepconv.runs.onnx_file import export_onnx


def _network() -> nn.Module:
    """Fused, normed and padded separable layers, in training mode as a user may leave them."""
    return nn.Sequential(
        SeparableConv2d(3, 7, 3, padding=1, activation="relu6", depth_multiplier=2),
        SeparableConv2d(7, 5, (3, 1), stride=2, norm="batch", activation="hardswish"),
        SeparableConv2d(5, 6, 3, padding=1, padding_mode="reflect", bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, onnx_file.Exported]:
    torch.manual_seed(1)
    network = _network()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network, export_onnx(network, (3, 13, 11), tmp_path_factory.mktemp("onnx") / "network.onnx")


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_outputs_are_pytorchs_at_any_batch(exported: tuple[nn.Module, onnx_file.Exported], batch: int) -> None:
    network, file = exported
    x = torch.randn(batch, 3, 13, 11)
    (found,) = onnxruntime.InferenceSession(file.path).run(None, {"images": x.numpy()})
    with torch.no_grad():
        expected = network.eval()(x)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_file_is_described_and_holds_standard_nodes_only(exported: tuple[nn.Module, onnx_file.Exported]) -> None:
    _, file = exported
    graph = onnx.load(file.path).graph
    assert {node.domain for node in graph.node} == {""}
    assert sum(node.op_type == "Conv" for node in graph.node) == file.convolutions == 6
    assert file.size == file.path.stat().st_size
    assert file.checked_with == f"onnxruntime {onnxruntime.__version__}"
    assert file.max_error is not None
    assert 0 <= file.max_error < 1e-4


def test_model_is_left_in_its_mode(
    exported: tuple[nn.Module, onnx_file.Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, file = exported
    monkeypatch.setattr(onnx_file, "_to_proto", lambda model, example: onnx.load(file.path))
    network.train()
    export_onnx(network, (3, 13, 11), file.path)
    assert network.training


def test_wrong_file_is_not_written(
    exported: tuple[nn.Module, onnx_file.Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that the exporter got wrong are found by running the file."""
    network, file = exported

    def spoilt(model: nn.Module, example: Any) -> Any:
        proto = onnx.load(file.path)
        bias = next(i for i in proto.graph.initializer if list(i.dims) == [4])
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(0.01), bias.name))
        return proto

    monkeypatch.setattr(onnx_file, "_to_proto", spoilt)
    with pytest.raises(ValueError, match=r"ONNX Runtime's outputs differ from PyTorch's by 0\.01, more than"):
        export_onnx(network, (3, 13, 11), tmp_path / "wrong.onnx")
    assert list(tmp_path.iterdir()) == []


def test_without_onnxruntime_the_file_is_marked_unchecked(
    exported: tuple[nn.Module, onnx_file.Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, file = exported
    monkeypatch.setattr(onnx_file, "_to_proto", lambda model, example: onnx.load(file.path))
    _hide(monkeypatch, "onnxruntime")
    found = export_onnx(network, (3, 13, 11), tmp_path / "a.onnx")
    assert (found.checked_with, found.max_error) == ("", None)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_package_is_named_with_its_remedy(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _hide(monkeypatch, package)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {package}: pip install 'sepconv\[onnx\]'"):
        export_onnx(nn.Identity(), (3, 5, 5), tmp_path / "a.onnx")


def test_network_that_cannot_be_exported_is_a_value_error(tmp_path: Path) -> None:
    class Undecided(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"does not take inputs of shape \(2, 1, 8, 8\): Given groups=1"):
        export_onnx(nn.Conv2d(3, 4, 3), (1, 8, 8), tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="export_onnx: PyTorch cannot export Undecided"):
        export_onnx(Undecided(), (3, 5, 5), tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def _hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None if name == package else find(name))
