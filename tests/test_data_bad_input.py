"""What users get wrong: one line that says what, the right exit code, and nothing half-written."""

from __future__ import annotations

import errno
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from cli_run import SMALL, sepconv, trained_folder
from safetensors.torch import load_file, save_file
from torch import nn

from sepconv import models
from sepconv.runs import png
from sepconv.system import files
from sepconv.train import checkpoint

DIGITS = ("--data", "digits")
NO_TRAINING = ("--epochs", 0)


@pytest.fixture(scope="module")
def trained() -> Path:
    return trained_folder()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of eight images each."""
    for name, level in (("bright", 200), ("dark", 40)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8):
            pixels = torch.full((3, 8, 8), level + i, dtype=torch.uint8)
            (tmp_path / "photos" / name / f"{i}.png").write_bytes(png.encode(pixels))
    return tmp_path / "photos"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("nonsense",), ("No such command", "nonsense", "--help")),
        (("count",), ("MODEL",)),
        (("count", "vgg_small", "--nonsense"), ("--nonsense",)),
        (("train", "vgg_small", *DIGITS), ("--out",)),
        (("convert", "vgg_small", "--epochs", "many", *DIGITS), ("--epochs",)),
        (("convert", "vgg_small", "--epochs", -1, *DIGITS), ("--epochs",)),
        (("predict", "vgg_small"), ("IMAGES",)),
    ],
)
def test_mistyped_command_line(arguments: tuple[object, ...], parts: tuple[str, ...]) -> None:
    sepconv(*arguments).failed_with(2, *parts)


@pytest.mark.parametrize("command", ["count", "train", "convert", "export", "predict"])
def test_unknown_model(command: str, tmp_path: Path) -> None:
    extra = {
        "count": ("--input", "1x8x8"),
        "train": (*DIGITS, "--out", tmp_path),
        "convert": (*DIGITS, "--out", tmp_path),
        "export": ("--onnx", tmp_path / "a.onnx"),
        "predict": (tmp_path / "a.png",),
    }
    sepconv(command, "vgg_smal", *extra[command]).failed_with(2, "unknown model 'vgg_smal'", "did you mean vgg_small")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "settings", "parts"),
    [
        ("vgg_small", "width=2", ("no setting 'width'", "width_mult")),
        ("vgg_small", "width_mult", ("--set needs key=value", "'width_mult'")),
        ("vgg_small", "width_mult=wide", ("width_mult must be a positive number", "'wide'")),
        ("vgg_small", "width_mult=-1", ("width_mult must be a positive number",)),
        ("no_such_module:net", "a=1", ("cannot import 'no_such_module'",)),
        ("sepconv.models:nothing", "a=1", ("'nothing' does not exist",)),
        ("sepconv.cost:count", "a=1", ("no setting 'a'",)),
        ("timm/no_such_net", "a=1", ("timm",)),
    ],
)
def test_wrong_setting(model: str, settings: str, parts: tuple[str, ...]) -> None:
    sepconv("count", model, "--set", settings, "--input", "3x16x16").failed_with(2, *parts)


@pytest.mark.parametrize("shape", ["3x0x8", "3,8,8", "axb", "", "-3x8x8"])
def test_wrong_shape(shape: str) -> None:
    sepconv("count", "vgg_small", "--input", shape).failed_with(2, "--input needs positive sizes", "3x224x224")


def test_shape_that_the_model_cannot_take() -> None:
    sepconv("count", "vgg_small", "--input", "3x4x4").failed_with(2, "at least 8x8 pixels")
    sepconv("count", "vgg_small").failed_with(2, "give --input")


class TestWeights:
    SETTINGS = ("--set", "width_mult=0.25", "--set", "in_channels=1")

    def _convert(self, weights: Path, out: Path, *parts: str) -> None:
        settings = (*self.SETTINGS, "--weights", weights)
        sepconv("convert", "vgg_small", *settings, *DIGITS, "--out", out).failed_with(2, str(weights), *parts)
        assert not out.exists()

    def test_missing(self, tmp_path: Path) -> None:
        self._convert(tmp_path / "none.safetensors", tmp_path / "out", "No such file")

    def test_folder(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        self._convert(tmp_path / "folder", tmp_path / "out", "Is a directory")

    @pytest.mark.parametrize("kept", [0, 5, 100, 0.5, -1])
    def test_truncated(self, trained: Path, tmp_path: Path, kept: float) -> None:
        content = (trained / "model.safetensors").read_bytes()
        end = int(kept * len(content)) if isinstance(kept, float) else kept
        (tmp_path / "cut.safetensors").write_bytes(content[:end])
        self._convert(tmp_path / "cut.safetensors", tmp_path / "out", "truncated")

    @pytest.mark.parametrize("how", ["torch.save", "pickle"])
    def test_code_in_a_pickle_never_runs(self, tmp_path: Path, how: str) -> None:
        trap = _Trap(tmp_path / "ran")
        path = tmp_path / "weights.pt"
        if how == "pickle":
            path.write_bytes(pickle.dumps(trap))
        else:
            torch.save(trap, path)
        self._convert(path, tmp_path / "out", "would run code", "torch.save(model.state_dict()")
        assert not (tmp_path / "ran").exists()

    def test_of_another_architecture(self, tmp_path: Path) -> None:
        path = tmp_path / "other.safetensors"
        save_file(models.create("resnet20", in_channels=1).state_dict(), path)
        self._convert(path, tmp_path / "out", "does not fit VGGSmall", "stages.0.0.0.weight", "blocks.0.first.0.weight")

    def test_of_another_width(self, trained: Path, tmp_path: Path) -> None:
        path = tmp_path / "narrow.safetensors"
        save_file(load_file(trained / "model.safetensors"), path)
        ran = sepconv("count", "vgg_small", "--set", "in_channels=1", "--weights", path, "--input", "1x8x8")
        ran.failed_with(2, "stages.0.0.0.weight is (8, 1, 3, 3) in the file and (32, 1, 3, 3) in the model")

    def test_damaged_description(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        save_file({"a": torch.zeros(1)}, path, metadata={"sepconv": '{"model": '})
        sepconv("count", path).failed_with(2, "description", str(path), "damaged")

    def test_folder_without_a_network(self, tmp_path: Path) -> None:
        sepconv("count", tmp_path).failed_with(2, "has no model.safetensors")

    def test_trained_network_takes_no_settings(self, trained: Path) -> None:
        sepconv("count", trained, "--set", "width_mult=1").failed_with(2, "is a trained network already")


class _Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


class TestImages:
    def _train(self, data: object, out: Path, *parts: str) -> None:
        sepconv("train", "vgg_small", "--data", data, "--epochs", 1, "--out", out).failed_with(2, *parts)
        assert not out.exists()

    def test_missing(self, tmp_path: Path) -> None:
        self._train(tmp_path / "none", tmp_path / "out", "no such file or folder", str(tmp_path / "none"))

    def test_empty(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        self._train(tmp_path / "empty", tmp_path / "out", "no images in", str(tmp_path / "empty"))

    def test_one_class(self, photos: Path, tmp_path: Path) -> None:
        shutil.rmtree(photos / "dark")
        self._train(photos, tmp_path / "out", "only one class (bright)")

    def test_broken_image_is_named_or_left_out(self, photos: Path, tmp_path: Path) -> None:
        broken = photos / "dark" / "broken.jpg"
        broken.write_bytes(b"\xff\xd8\xff no picture")
        self._train(photos, tmp_path / "out", "broken image", str(broken))
        arguments = ("--data", photos, "--epochs", 1, "--set", "width_mult=0.25", "--out", tmp_path / "out")
        ran = sepconv("train", "vgg_small", *arguments, "--skip-broken")
        assert ran.code == 0, ran.err
        assert f"Broken images left out: 1 ({broken})" in ran.out

    def test_prediction_of_what_is_no_image(self, trained: Path, tmp_path: Path) -> None:
        (tmp_path / "note.png").write_text("no picture")
        sepconv("predict", trained, tmp_path / "note.png").failed_with(2, "broken image", "note.png")
        sepconv("predict", trained, tmp_path / "none.png").failed_with(2, "no such file", "none.png")

    def test_network_for_other_images(self, trained: Path, photos: Path, tmp_path: Path) -> None:
        arguments = ("convert", trained, "--data", photos, *NO_TRAINING, "--out", tmp_path / "out")
        sepconv(*arguments).failed_with(2, "the class 'bright'", "outputs of the network are 0, 1, 2", "--classes FILE")

    def test_network_for_fewer_classes(self, tmp_path: Path) -> None:
        code = ("convert", "vgg_small", "--set", "num_classes=4", *DIGITS, *NO_TRAINING, "--out", tmp_path / "out")
        sepconv(*code).failed_with(2, "10 classes", "(2, 4)")
        assert not (tmp_path / "out").exists()
        arguments = ("--set", "num_classes=4", "--set", "width_mult=0.25", "--epochs", 1, "--out", tmp_path / "out")
        sepconv("train", "vgg_small", *DIGITS, *arguments).failed_with(2, "10 classes", "(2, 4)")


class TestBudget:
    @pytest.mark.parametrize("budget", ["0", "-0.5", "-1/8", "1.01", "9/8", "1/0", "much", "nan", "inf", ""])
    def test_out_of_range(self, trained: Path, tmp_path: Path, budget: str) -> None:
        out = tmp_path / "out"
        ran = sepconv("convert", trained, *DIGITS, f"--budget={budget}", "--out", out)
        ran.failed_with(2, "--budget must be above 0 and at most 1", repr(budget))
        assert not out.exists()

    def test_unreachable_says_what_is_reachable(self, trained: Path, tmp_path: Path) -> None:
        ran = sepconv("convert", trained, *DIGITS, "--budget", "1/1000", *NO_TRAINING, "--out", tmp_path)
        ran.failed_with(2, "budget", "smallest")
        assert list(tmp_path.iterdir()) == []

    def test_unknown_form(self, trained: Path, tmp_path: Path) -> None:
        ran = sepconv("convert", trained, *DIGITS, "--form", "tucker", "--out", tmp_path)
        ran.failed_with(2, "form", "bottleneck", "tucker")

    def test_unknown_metric(self, trained: Path, tmp_path: Path) -> None:
        ran = sepconv("convert", trained, *DIGITS, "--metric", "flops", *NO_TRAINING, "--out", tmp_path)
        ran.failed_with(2, "metric", "conv_params", "flops")

    def test_unknown_module_to_skip(self, trained: Path, tmp_path: Path) -> None:
        ran = sepconv("convert", trained, *DIGITS, "--skip", "stem", *NO_TRAINING, "--out", tmp_path)
        ran.failed_with(2, "skip", "'stem'")

    @pytest.mark.filterwarnings("default:the original is right on")
    def test_no_convertible_convolution(self, tmp_path: Path) -> None:
        model = ("test_data_bad_input:pointwise_net", "--set", "classes=10")
        ran = sepconv("convert", *model, *DIGITS, *NO_TRAINING, "--out", tmp_path)
        ran.failed_with(2, "convert", "already pointwise")
        assert list(tmp_path.iterdir()) == []


def pointwise_net(classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class TestDisk:
    def test_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        out = tmp_path / "file" / "out"
        sepconv("train", *SMALL, "--out", out).failed_with(1, f"cannot write to the folder {out}")
        sepconv("demo", "--out", out).failed_with(1, f"cannot write to the folder {out}")

    def test_json_file_that_cannot_be_made_is_found_first(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        out = tmp_path / "out"
        ran = sepconv("train", *SMALL, "--out", out, "--json", tmp_path / "file" / "a.json")
        ran.failed_with(1, "cannot write to the folder")
        assert not out.exists()

    def test_full_disk_during_training(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The second checkpoint finds the disk full: the first is whole and nothing is half-written."""
        flush = files.os.fsync

        def full(descriptor: int) -> None:
            if "checkpoint-00002" in Path(f"/proc/self/fd/{descriptor}").readlink().name:
                raise OSError(errno.ENOSPC, "No space left on device")
            flush(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", full)
            ran = sepconv("train", *SMALL, "--epochs", 3, "--out", tmp_path)
        ran.failed_with(1, "cannot write", "checkpoint-00002.pt", "No space left on device")
        assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-00001.pt", "log.jsonl"}
        checkpoint.read(tmp_path / "checkpoint-00001.pt")
        again = sepconv("train", *SMALL, "--epochs", 3, "--out", tmp_path, "--resume")
        assert again.code == 0, again.err


class TestTraining:
    def test_nan_loss_stops_and_names_the_step(self, tmp_path: Path) -> None:
        ran = sepconv("train", *SMALL, "--epochs", 3, "--lr", 1e30, "--out", tmp_path)
        ran.failed_with(1, "step")
        assert "model.safetensors" not in {path.name for path in tmp_path.iterdir()}

    def test_folder_of_an_earlier_run(self, trained: Path, tmp_path: Path) -> None:
        shutil.copytree(trained, tmp_path / "run")
        sepconv("train", *SMALL, "--epochs", 3, "--out", tmp_path / "run").failed_with(
            2, "checkpoints of an earlier run"
        )

    def test_resuming_another_run(self, trained: Path, tmp_path: Path) -> None:
        shutil.copytree(trained, tmp_path / "run")
        ran = sepconv("train", *SMALL, "--epochs", 4, "--lr", 0.05, "--out", tmp_path / "run", "--resume")
        ran.failed_with(2, "of another run", "epochs")

    @pytest.mark.parametrize(
        ("option", "parts"),
        [
            (("--lr", "0"), ("lr must be above 0",)),
            (("--epochs", "0"), ("epochs must be at least 1",)),
            (("--crop-padding", "9"), ("crop_padding 9 is wider than the images of shape (1, 8, 8)",)),
            (("--crop-padding", "1000000000"), ("wider than the images",)),
            (("--optimizer", "adam"), ("optimizer must be one of sgd, adamw, rmsprop", "'adam'")),
            (("--mixed-precision", "fp16"), ("fp16 needs a GPU",)),
        ],
    )
    def test_wrong_recipe(self, tmp_path: Path, option: tuple[str, str], parts: tuple[str, ...]) -> None:
        sepconv("train", *SMALL, *option, "--out", tmp_path / "out").failed_with(2, *parts)


def test_report_of_a_folder_without_a_result(tmp_path: Path) -> None:
    sepconv("report", tmp_path).failed_with(2, "result.json")
    (tmp_path / "result.json").write_text("{")
    sepconv("report", tmp_path).failed_with(2, "result.json")
    assert not (tmp_path / "report.html").exists()


def test_defect_is_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from sepconv.cli import inspect

    def broken() -> None:
        raise KeyError("lost")

    monkeypatch.setattr(inspect, "doctor", broken)
    sepconv("doctor").failed_with(1, "KeyError: 'lost'", "--debug")
