"""The installed wheel beside the newest PyTorch, torchvision and timm (`make test-newest`)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sepconv

pytestmark = pytest.mark.slow

torchvision = pytest.importorskip("torchvision", reason="only in the environment of make test-newest")
timm = pytest.importorskip("timm", reason="only in the environment of make test-newest")


def test_it_is_the_wheel_that_is_tested() -> None:
    """With what is no Python code: the mark of its types, and the parts of the report."""
    package = Path(sepconv.__file__).parent
    assert package.parent.name == "site-packages"
    assert files("sepconv").joinpath("py.typed").is_file()
    assert {path.suffix for path in (package / "report" / "assets").iterdir()} == {".html", ".css", ".js"}


def _largest_error(model: nn.Module, x: Tensor) -> float:
    """Of the compiled network, relative to the largest score."""
    with torch.no_grad():
        expected, found = model(x), sepconv.compile(model, x)(x)
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_compile_torchvision(name: str) -> None:
    model = torchvision.models.get_model(name, weights=None).eval()
    assert _largest_error(model, torch.randn(2, 3, 96, 96)) < 1e-4


@pytest.mark.parametrize("name", ["mobilenetv1_100", "mobilenetv2_050", "mobilenetv3_small_050", "convnext_atto"])
def test_compile_timm(name: str) -> None:
    model = timm.create_model(name, pretrained=False).eval()
    assert _largest_error(model, torch.randn(2, 3, 96, 96)) < 1e-4


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small"])
def test_backend_of_torch_compile(name: str) -> None:
    model = torchvision.models.get_model(name, weights=None).eval()
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="sepconv")(x), model(x), rtol=1e-4, atol=1e-4)


def test_nothing_of_mobilenet_is_left_to_pytorch() -> None:
    model = timm.create_model("mobilenetv2_050", pretrained=False).eval()
    groups = sepconv.compile(model, torch.randn(1, 3, 96, 96)).explain().groups
    assert {group.kernel for group in groups} == {"halide"}


def _of_torchvision() -> nn.Module:
    return torchvision.models.DenseNet(8, (3, 3), 16, num_classes=10)


def _of_timm() -> nn.Module:
    return timm.create_model("test_resnet", pretrained=False, num_classes=10)


@pytest.mark.parametrize("make", [_of_torchvision, _of_timm])
def test_convert(make: Callable[[], nn.Module]) -> None:
    """Half of the weights without any training, and scores of the same shape."""
    model, images = make().eval(), torch.randn(32, 3, 64, 64)
    separable, plan = sepconv.convert(model, images, budget=1 / 2)
    before, after = (sepconv.count(network, (3, 64, 64)).conv_params for network in (model, separable))
    assert after <= before / 2
    assert sum(layer.rank > 0 for layer in plan.layers) > 3
    assert separable(images).shape == model(images).shape
    assert bool(separable(images).isfinite().all())


def _command(*words: str, folder: Path) -> str:
    """What the installed command prints; nothing that it depends on may warn."""
    program = Path(sys.executable).with_name("sepconv")
    done = subprocess.run([program, *words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


def test_commands(tmp_path: Path) -> None:
    assert "halide" in _command("doctor", folder=tmp_path)
    assert "3,504,872" in _command("count", "timm/mobilenetv2_100", "--input", "3x224x224", folder=tmp_path)


def test_demo(tmp_path: Path) -> None:
    _command("demo", "--out", "demo", folder=tmp_path)
    assert "made separable" in (tmp_path / "demo" / "report.html").read_text()
    _command("export", "demo", "--onnx", "demo.onnx", folder=tmp_path)
