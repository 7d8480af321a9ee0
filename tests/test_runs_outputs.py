"""The main job without classes: outputs of any structure are learnt, compared and told of."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_run import sepconv
from page_parts import Page
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from sepconv.leaves import Inputs
from sepconv.runs import compare, latency, run_folder
from sepconv.runs.compare import confusions
from sepconv.runs.judge import is_worse, measured
from sepconv.runs.onnx_file import export_onnx, missing

CODE = """
import torch
from torch import nn

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(2, 8, 5, padding=2), nn.ReLU(), nn.Conv1d(8, 8, 5, padding=2), nn.ReLU())
        self.wave, self.level = nn.Conv1d(8, 2, 3, padding=1), nn.Linear(8, 3)

    def forward(self, left, right):
        y = self.body(torch.stack([left, right], 1))
        return {"wave": 100 * self.wave(y), "level": self.level(y.mean(2))}

def pair():
    torch.manual_seed(0)
    return Pair()

def mask():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1)
    return nn.Sequential(*layers, nn.Sigmoid())

class Restless(nn.Sequential):
    def forward(self, x):
        y = super().forward(x if x.sum() < 1e9 else -x)
        return y + 1e-3 * torch.randn_like(y)

def restless():
    torch.manual_seed(0)
    return Restless(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))

def strict():
    class Strict(nn.Conv2d):
        def forward(self, x):
            assert x.shape[-1] == 224
    return Strict(3, 4, 3)

def once(network, seen=[]):
    seen.append(network)
    if len(seen) > 2:
        raise RuntimeError("too often")
    return 0.5

def grey(network):
    return {"grey": network(torch.full((1, 3, 8, 8), 0.5)).mean()}

def broken(network):
    raise RuntimeError("no such thing")
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of the user's; times are not measured, nor is anything exported."""
    name = f"nets_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(latency, "latency_ms", partial(latency.latency_ms, seconds=0.0))
    monkeypatch.setattr(compare, "limits", lambda threads: {})
    monkeypatch.setattr(run_folder.onnx_file, "missing", lambda: "onnx is not here")
    return name


def write_pairs(folder: Path, count: int) -> None:
    folder.mkdir()
    random = torch.Generator().manual_seed(0)
    for i in range(count):
        sample = {name: torch.randn(23, generator=random) for name in ("left", "right")}
        save_file(sample, folder / f"{i}.safetensors")


def write_images(folder: Path, count: int) -> None:
    folder.mkdir()
    random = torch.Generator().manual_seed(0)
    for i in range(count):
        pixels = torch.randint(0, 256, (4, 4, 3), generator=random, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((13, 13)).save(folder / f"{i}.png")


def test_samples_of_several_inputs_and_outputs(code: str, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", 260)
    out = tmp_path / "out"
    options = ("--budget", "1/2", "--epochs", 2, "--batch-size", 52, "--calibration-images", 60)
    ran = sepconv("convert", f"{code}:pair", "--data", tmp_path / "pairs", *options, "--out", out)
    assert ran.code == 0, ran.err
    record = json.loads((out / "result.json").read_text())
    assert (record["task"], record["classes"], record["preprocessing"]) == ("outputs", [], None)
    assert (record["held_out_images"], record["test_images"]) == (20, 52)
    assert [stage["name"] for stage in record["stages"]] == ["closed form", "converted", "distilled"]
    errors = [stage["error"] for stage in record["stages"]]
    assert errors[1] < errors[0]
    assert record["kept"] == ("converted" if errors[2] > errors[1] else "distilled")
    assert [row["name"] for row in record["closeness"]["outputs"]] == ["wave", "level"]
    assert record["closeness"]["relative_error"] == pytest.approx(min(errors[1:]), rel=0.5)
    assert set(record["curves"][0]) >= {"train_loss", "held_out_error"}
    assert record["normal"]["macs"] > record["separable"]["macs"]
    # No word of accuracy, on the console, in the record or on the page.
    page = Page(out / "report.html")
    assert "accuracy" not in (ran.out + ran.err + json.dumps(record) + page.text).lower()
    assert "Relative error of all outputs on 52 test samples" in ran.out
    assert "Output error of 20 samples held out" in ran.out
    assert "Error of the outputs through the stages" in page.text
    assert "A network, looked at on pairs, had its normal convolutions replaced" in page.text
    assert ("table", {"class": "numbers", "data-outputs": None}) in page.elements
    opened = sepconv("count", f"{code}:pair", "--weights", out / "model.safetensors", "--input", "23")
    opened.failed_with(2, "fails")


def test_images_without_classes_and_the_users_own_number(code: str, tmp_path: Path) -> None:
    write_images(tmp_path / "pictures", 30)
    out, plain = tmp_path / "out", ("--mean", "0,0,0", "--std", "1,1,1", "--epochs", 0, "--budget", "1/2")
    given = ("convert", f"{code}:mask", "--data", tmp_path / "pictures", *plain, "--out", out)
    sepconv(*given, "--metric-function", f"{code}:broken").failed_with(2, "broken fails on Sequential", "no such thing")
    sepconv(*given, "--metric-function", f"{code}:nothing").failed_with(2, "'nothing' does not exist")
    sepconv(*given, "--metric-function", "grey").failed_with(2, "package.module:function, got 'grey'")
    assert not out.exists()
    ran = sepconv(*given, "--metric-function", f"{code}:grey")
    assert ran.code == 0, ran.err
    record = json.loads((out / "result.json").read_text())
    (row,) = record["closeness"]["outputs"]
    assert row["psnr"] > 20
    assert 0 < record["normal"]["metrics"]["grey"] < 1
    assert "grey" in ran.out
    assert "dB" in ran.out
    page = Page(out / "report.html")
    assert f"PSNR {row['psnr']:.2f} dB" in page.text
    assert any(attributes.get("data-quantity") == "grey" for _, attributes in page.elements)
    assert json.loads((out / "explanation.json").read_text())["layers"]


@pytest.mark.filterwarnings("ignore:compile")
def test_what_cannot_be_measured_costs_no_conversion(code: str, tmp_path: Path) -> None:
    """This network looks at values, so it is counted as it computes, and adds noise, so that no two answers agree."""
    write_images(tmp_path / "pictures", 30)
    out, plain = tmp_path / "out", ("--mean", "0,0,0", "--std", "1,1,1", "--epochs", 0, "--budget", "1/2")
    ran = sepconv("convert", f"{code}:restless", "--data", tmp_path / "pictures", *plain, "--out", out)
    assert ran.code == 0, ran.err
    record = json.loads((out / "result.json").read_text())
    (note,) = (note for note in record["notes"] if note.startswith("latency_ms: "))
    assert "differs from" in note
    assert note in ran.out
    assert "untimed" not in record
    assert "Time of" not in ran.out
    assert record["separable"]["latency_ms"] == {}
    assert record["normal"]["macs"] == 13 * 13 * 9 * (3 * 8 + 8 * 4)
    assert "Multiplications" in Page(out / "report.html").text


def test_a_function_that_fails_in_the_end_costs_no_conversion(code: str, tmp_path: Path) -> None:
    write_images(tmp_path / "pictures", 30)
    out, plain = tmp_path / "out", ("--mean", "0,0,0", "--std", "1,1,1", "--epochs", 0, "--budget", "1/2")
    given = ("convert", f"{code}:mask", "--data", tmp_path / "pictures", *plain, "--out", out)
    sepconv(*given, "--metric-function", f"{code}:once").failed_with(2, "once fails on Sequential", "too often")
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "checkpoints"}
    ran = sepconv("count", f"{code}:mask", "--weights", out / "model.safetensors", "--json", "-")
    assert {row["kind"] for row in json.loads(ran.out)["layers"]} >= {"depthwise", "pointwise"}


@pytest.mark.parametrize("command", ["convert", "quantize", "train"])
def test_a_network_that_does_not_take_the_images_says_so(code: str, command: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        write_images(tmp_path / "pictures" / name, 3)
    options = ("--data", tmp_path / "pictures", "--out", tmp_path / "out")
    ran = sepconv(command, f"{code}:strict", *options)
    ran.failed_with(2, f"{command}: the model does not take images of shape (3, 13, 13): AssertionError")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "detection"], "--task must be classes or outputs, but got 'detection'"),
        (["--task", "classes"], "no labels: "),
        (["--output-weight", "boxes"], "--output-weight needs name=weight, such as boxes=2, but got 'boxes'"),
        (["--output-weight", "boxes=-1"], "but got 'boxes=-1'"),
        (["--output-weight", "boxes=2"], "output_weights names 'boxes', but the outputs of the network are ''"),
        (["--data-range", "0"], "data_range must be above 0 and finite, got 0.0"),
    ],
)
def test_wrong_options_are_one_line(code: str, tmp_path: Path, arguments: list[str], message: str) -> None:
    write_images(tmp_path / "pictures", 3)
    options = ("--mean", "0,0,0", "--std", "1,1,1", *arguments, "--out", tmp_path / "out")
    sepconv("convert", f"{code}:mask", "--data", tmp_path / "pictures", *options).failed_with(2, message)
    assert not (tmp_path / "out").exists()


def test_images_that_nobody_says_how_to_prepare_are_said_to_be(code: str, tmp_path: Path) -> None:
    write_images(tmp_path / "pictures", 3)
    given = ("convert", f"{code}:mask", "--data", tmp_path / "pictures", "--budget", "0.001", "--out", tmp_path / "out")
    ran = sepconv(*given)
    ran.failed_with(2, "cannot be reached")
    assert "Images by the statistics of pictures; for others give --mean and --std" in ran.out
    assert "Without classes nothing shows whether the network was trained on such images" in ran.out


def test_training_needs_labels(code: str, tmp_path: Path) -> None:
    write_images(tmp_path / "pictures", 3)
    ran = sepconv("train", f"{code}:mask", "--data", tmp_path / "pictures", "--out", tmp_path / "out")
    ran.failed_with(2, "no labels: ", "holds images but no subfolders")


def test_classes_of_data_can_be_left_out() -> None:
    assert is_worse({"accuracy": 0.5}, {"accuracy": 0.6})
    assert is_worse({"error": 0.6}, {"error": 0.5})
    assert not is_worse({"error": 0.5}, {"error": 0.5})


def test_the_users_own_numbers() -> None:
    network = nn.Dropout().train()
    seen = []

    def training(model: nn.Module) -> float:
        seen.append(model.training)
        return 0.25

    assert measured(training, network) == {"training": 0.25}
    assert seen == [False]
    assert network.training
    assert measured(lambda _: {"a": torch.tensor(2), 3: 4}, network) == {"a": 2.0, "3": 4.0}
    for wrong in (None, {"a": "b"}, {"a": float("nan")}, {"a": torch.ones(2)}):
        with pytest.raises(ValueError, match=r"metric_function: .* must give finite numbers by name, got '"):
            measured(lambda _, wrong=wrong: wrong, network)  # type: ignore[misc]


def test_matrices_hold_the_classes_that_occur_alone() -> None:
    matrix, other = torch.zeros(1000, 1000).long(), torch.zeros(1000, 1000).long()
    matrix[3, 3], matrix[3, 700], other[3, 5] = 4, 1, 5
    found = confusions({"normal": matrix, "separable": other}, [str(i) for i in range(1000)])
    assert found["confusion_classes"] == [3, 5, 700]
    assert found["confusion"] == {
        "normal": [[4, 0, 1], [0, 0, 0], [0, 0, 0]],
        "separable": [[0, 5, 0], [0] * 3, [0] * 3],
    }
    assert confusions({"normal": torch.eye(2).long()}, ["a", "b"]) == {"confusion": {"normal": [[1, 0], [0, 1]]}}


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Any]:
        y = self.conv(torch.stack([left, right], 1))
        return {"wave": y, "more": {"mean": y.mean(2)}}


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason="needs onnx")
def test_onnx_of_several_inputs_and_outputs(tmp_path: Path) -> None:
    import onnx

    example = Inputs.of({"left": torch.randn(1, 9), "right": torch.randn(1, 9)})
    found = export_onnx(Two(), example, tmp_path / "two.onnx")
    assert found.max_error is None or found.max_error < 1e-5
    graph = onnx.load(tmp_path / "two.onnx").graph
    assert [entry.name for entry in graph.input] == ["left", "right"]
    assert [entry.name for entry in graph.output] == ["wave", "more_mean"]
