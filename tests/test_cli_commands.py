"""Every command once on real input, what it prints, and how it is interrupted and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from cli_run import SMALL, converted_folder, heed_interrupts, trained_folder
from cli_run import sepconv as run
from safetensors.torch import load_file, save_file

import sepconv
from sepconv.cli import arguments, console, inspect, jobs
from sepconv.compile import CompiledModel, compile
from sepconv.data import load
from sepconv.data.augment import Augment
from sepconv.runs import onnx_file, png
from sepconv.runs.model_file import open_model
from sepconv.train import Mix

COMMANDS = ("demo", "convert", "quantize", "train", "count", "export", "predict", "doctor", "report")
_QUICKLY = ("--data", "digits", "--budget", "1/2", "--calibration-images", 64)


@pytest.fixture(scope="module")
def trained() -> Path:
    return trained_folder()


@pytest.fixture(scope="module")
def converted() -> Path:
    return converted_folder()


@pytest.fixture
def without_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the extra is not installed; the exporter takes seconds, too."""
    monkeypatch.setattr(onnx_file, "missing", lambda: "onnx is not here")


@pytest.fixture(scope="module")
def digit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A test image as a file, and its index."""
    folder = tmp_path_factory.mktemp("images")
    data = load("digits")
    (folder / "digit.png").write_bytes(png.encode(data.test.images.take(torch.tensor([7]))[0]))
    return folder / "digit.png", 7


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_of_the_command(command: str) -> None:
    ran = run(command, "--help")
    assert ran.code == 0
    assert f"Example: sepconv {command}" in ran.out
    for option in ("--json", "--quiet", "--debug"):
        assert option in ran.out


def test_help_names_every_command() -> None:
    out = run("--help").out
    for command in (*COMMANDS, "bench", "--version", "--install-completion"):
        assert command in out


@pytest.mark.parametrize("threads", ["two", "0", "1,,2", "-1"])
def test_wrong_thread_counts_are_quoted(tmp_path: Path, threads: str) -> None:
    for suite in ("ops", "network"):
        ran = run("bench", suite, "--threads", threads, "--json", tmp_path / "x.json")
        ran.failed_with(2, f"--threads must be positive whole numbers such as 1,2, but got '{threads}'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments_", [(), ("bench",)])
def test_no_arguments_show_the_help(arguments_: tuple[str, ...]) -> None:
    ran = run(*arguments_)
    assert ran.code == 2
    assert "Usage: sepconv" in ran.out + ran.err
    assert "sepconv: " not in ran.err


def test_version() -> None:
    assert run("--version").out == f"sepconv {sepconv.__version__}\n"


def test_train_writes_a_network_that_opens_again(trained: Path) -> None:
    record = json.loads((trained / "result.json").read_text())
    assert record == json.loads((trained / "copy.json").read_text())
    assert record["command"].startswith("sepconv train vgg_small --data digits")
    assert [row["epoch"] for row in record["curves"]] == [1, 2, 3]
    assert record["normal"]["accuracy"] == record["curves"][-1]["test_accuracy"] > 0.5
    assert "vgg_small" in (trained / "report.html").read_text()
    _, card = open_model(str(trained))
    assert card.settings == {"in_channels": 1, "num_classes": 10, "width_mult": 0.25}
    assert card.input_shape == (1, 8, 8)
    assert card.classes == [str(i) for i in range(10)]


def test_convert_writes_what_the_main_job_promises(converted: Path) -> None:
    names = {path.name for path in converted.iterdir()}
    assert names == {"explanation.json", "model.onnx", "model.safetensors", "report.html", "result.json"}
    record = json.loads((converted / "result.json").read_text())
    assert record["separable"]["conv_params"] <= record["normal"]["conv_params"] / 4
    assert [stage["name"] for stage in record["stages"]] == ["original", "closed form", "converted", "distilled"]


def test_convert_without_training_or_onnx_shows_a_table(trained: Path, tmp_path: Path, without_onnx: None) -> None:
    ran = run("convert", trained, *_QUICKLY, "--epochs", 0, "--out", tmp_path)
    assert ran.code == 0, ran.err
    record = json.loads((tmp_path / "result.json").read_text())
    row = next(line for line in ran.out.splitlines() if line.startswith("convolution weights"))
    assert f"{record['normal']['conv_params']:,}" in row
    assert f"{record['separable']['conv_params']:,}" in row
    assert "distilled" not in ran.out
    assert "No model.onnx: export_onnx: onnx is not here" in ran.out
    assert not (tmp_path / "model.onnx").exists()
    assert [line for line in ran.out.splitlines() if len(line) > 80 and not line.startswith("Written")] == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [((), 0.02), (("--form", "separable"), 0.05), (("--lr", 0.3), 0.3), (("--lr", 0.3, "--form", "separable"), 0.3)],
)
def test_learning_rate_of_the_distillation_follows_the_form(
    options: tuple[Any, ...], expected: float, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs_seen: list[Any] = []

    def noted(model: Any, card: Any, data: Any, job: Any, *rest: Any, **settings: Any) -> None:
        jobs_seen.append(job)
        raise ValueError("enough")

    monkeypatch.setattr(jobs, "convert_model", noted)
    run("convert", trained, "--data", "digits", *options, "--out", tmp_path)
    assert [job.recipe.lr for job in jobs_seen] == [expected]


def test_predict_answers_as_the_network_does(converted: Path, digit: tuple[Path, int], tmp_path: Path) -> None:
    path, index = digit
    ran = run("predict", converted, path, "--json", tmp_path / "answer.json")
    assert ran.code == 0, ran.err
    (answer,) = json.loads((tmp_path / "answer.json").read_text())
    model, card = open_model(str(converted))
    images = load("digits").test.images.take(torch.tensor([index]))
    with torch.no_grad():
        probabilities = model(card.normalise(images)).softmax(1)[0]
    best = int(probabilities.argmax())
    assert answer["image"] == str(path)
    assert answer["classes"][0] == str(best)
    assert answer["probabilities"][0] == pytest.approx(float(probabilities[best]), abs=1e-5)
    assert len(answer["classes"]) == 3


def test_predict_compiled_answers_alike_by_kernels_of_ours(
    converted: Path, digit: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[CompiledModel] = []

    def watched(*arguments: Any, **options: Any) -> CompiledModel:
        made.append(compile(*arguments, **options))
        return made[-1]

    monkeypatch.setattr("sepconv.runs.predict.compile", watched)
    answers = []
    for extra in ((), ("--compiled",), ("--precision", "float32")):
        assert run("predict", converted, digit[0], digit[0], *extra, "--json", tmp_path / "answer.json").code == 0
        answers.append(json.loads((tmp_path / "answer.json").read_text()))
    assert len(made) == 2
    assert made[0].explain().reason == ""
    assert any(group.kernel == "halide" for group in made[0].explain().groups)
    for plain, *others in zip(*answers, strict=True):
        for compiled in others:
            assert plain["classes"] == compiled["classes"]
            assert plain["probabilities"] == pytest.approx(compiled["probabilities"], abs=1e-4)
    refused = run("predict", converted, digit[0], "--precision", "half")
    refused.failed_with(2, "precision must be one of float32, bfloat16 or None, got 'half'")


def test_predict_takes_classes_from_a_data_set(trained: Path, digit: tuple[Path, int], tmp_path: Path) -> None:
    bare = tmp_path / "bare.safetensors"

    save_file(load_file(trained / "model.safetensors"), bare)
    settings = ("--set", "width_mult=0.25", "--set", "in_channels=1", "--weights", bare)
    run("predict", "vgg_small", *settings, digit[0]).failed_with(2, "--data")
    assert run("predict", "vgg_small", *settings, "--data", "digits", digit[0]).code == 0


def test_export_and_count_take_the_converted_folder(converted: Path, tmp_path: Path) -> None:
    ran = run("export", converted, "--onnx", tmp_path / "deep" / "small.onnx", "--json", "-")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["max_error"] < 1e-4
    shape = onnxruntime.InferenceSession(tmp_path / "deep" / "small.onnx").get_inputs()[0].shape
    assert shape[1:] == [1, 8, 8]
    counted = json.loads(run("count", converted, "--json", "-").out)
    record = json.loads((converted / "result.json").read_text())
    assert counted["conv_params"] == record["separable"]["conv_params"]
    assert counted["macs"] == record["separable"]["macs"]


def test_weights_of_a_converted_network_bring_their_structure(converted: Path) -> None:
    weights = converted / "model.safetensors"
    named = json.loads(run("count", "vgg_small", "--weights", weights, "--json", "-").out)
    assert named == json.loads(run("count", converted, "--json", "-").out)


def test_count_of_mobilenet_v1_is_the_papers() -> None:
    ran = run("count", "mobilenet_v1", "--input", "3x224x224", "--json", "-")
    record = json.loads(ran.out)
    assert record["macs"] == 568_740_352
    assert record["params"] == 4_231_976
    assert ran.err == ""


def test_tables_fit_80_columns_and_hold_no_control_characters() -> None:
    ran = run("count", "mobilenet_v1_normal", "--input", "3x224x224")
    assert "\x1b" not in ran.out
    assert max(map(len, ran.out.splitlines())) <= 80
    assert "4,867,293,184" in ran.out


def test_report_writes_the_page_again(converted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(converted, tmp_path / "run")
    page = folder / "report.html"
    page.unlink()
    ran = run("report", folder)
    assert ran.code == 0, ran.err
    assert str(page) in ran.out
    assert page.stat().st_size > 10_000


def test_doctor_lists_kernels_and_packages(tmp_path: Path) -> None:
    ran = run("doctor", "--json", tmp_path / "doctor.json")
    assert ran.code == 0
    assert "separable_conv" in ran.out
    assert "onnxruntime" in ran.out
    assert json.loads((tmp_path / "doctor.json").read_text())["versions"]["sepconv"] == sepconv.__version__


def test_quiet_prints_nothing(tmp_path: Path) -> None:
    ran = run("train", *SMALL, "--epochs", 1, "--out", tmp_path, "--quiet")
    assert (ran.code, ran.out, ran.err) == (0, "", "")


def _end_at(wanted: object, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call of a method of an object like this one ends the command."""
    original = getattr(type(wanted), method)

    def seen(self: object, *given: Any) -> Any:
        if self == wanted:
            raise ValueError("seen")
        return original(self, *given)

    monkeypatch.setattr(type(wanted), method, seen)


def test_augmentation_reaches_both_trainings(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _end_at(Augment(flip=True, crop_padding=1, cutout=3), "draw", monkeypatch)
    wanted = ("--flip", "--crop-padding", 1, "--cutout", 3, "--epochs", 1, "--quiet")
    for begin in (("train", *SMALL), ("convert", trained, *_QUICKLY)):
        run(*begin, *wanted, "--out", tmp_path / begin[0]).failed_with(2, "seen")


def test_mixing_reaches_both_trainings(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _end_at(Mix(mixup=0.2, cutmix=1.0), "__call__", monkeypatch)
    for begin in (("train", *SMALL), ("convert", trained, *_QUICKLY)):
        wanted = ("--mixup", 0.2, "--cutmix", 1, "--epochs", 1, "--quiet", "--out", tmp_path / begin[0])
        run(*begin, *wanted).failed_with(2, "seen")


def test_own_network_is_trained_and_opened_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from sepconv.models import VGGSmall\ndef net(classes):\n    return VGGSmall(0.1, classes, 1)\n"
    (tmp_path / "ownnet.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "out"
    ran = run("train", "ownnet:net", "--set", "classes=10", "--data", "digits", "--epochs", 1, "--out", out)
    assert ran.code == 0, ran.err
    hint = f"ownnet:net --weights {out}/model.safetensors"
    assert hint in ran.out
    assert json.loads(run("count", *hint.split(), "--json", "-").out)["model"] == "ownnet:net"
    run("count", out).failed_with(2, hint)


def test_own_function_as_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from torch import nn\ndef net(width=4):\n    return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU())\n"
    (tmp_path / "mynets.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    ran = run("count", "mynets:net", "--set", "width=6", "--input", "1x5x5", "--json", "-")
    assert json.loads(ran.out)["macs"] == 6 * 9 * 9


@pytest.mark.parametrize(
    ("text", "value"),
    [("a=1", 1), ("a=0.5", 0.5), ("a=(1, 2)", (1, 2)), ("a=None", None), ("a=projection", "projection"), ("a==", "=")],
)
def test_settings_are_literals_or_text(text: str, value: object) -> None:
    assert arguments.parse_settings([text]) == {"a": value}


def test_debug_shows_the_error() -> None:
    with pytest.raises(ValueError, match="unknown model"):
        run("count", "nonsense", "--input", "1x8x8", "--debug")


def test_progress_is_lines_where_there_is_no_terminal(trained: Path, tmp_path: Path) -> None:
    ran = run("train", *SMALL, "--epochs", 1, "--out", tmp_path)
    assert "\x1b" not in ran.err
    assert "\r" not in ran.err
    assert any(line.startswith("train 22/22 loss") and "accuracy" in line for line in ran.err.splitlines())


def _stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C when the training has done so many steps."""

    def interrupt(self: object, now: console.Step) -> None:
        if now.stage in ("train", "distil") and now.done > step:
            raise KeyboardInterrupt

    monkeypatch.setattr(console._Lines, "__call__", interrupt)


def test_interrupted_training_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments_ = ("train", *SMALL, "--epochs", 3)
    assert run(*arguments_, "--out", whole).code == 0
    with monkeypatch.context() as patch:
        _stop_after(patch, 50)
        ran = run(*arguments_, "--out", parts)
    ran.failed_with(130, "checkpoint-00002.pt", "to go on: sepconv train", "--resume")
    assert not (parts / "model.safetensors").exists()
    assert run(*arguments_, "--out", parts, "--resume").code == 0
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.slow
def test_interrupted_conversion_goes_on(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_onnx: None
) -> None:
    arguments_ = ("convert", trained, "--data", "digits", "--epochs", 2, "--batch-size", 64, "--budget", "1/3")
    with monkeypatch.context() as patch:
        _stop_after(patch, 30)
        run(*arguments_, "--out", tmp_path).failed_with(130, "checkpoints/checkpoint-00001.pt", "--resume")
    ran = run(*arguments_, "--out", tmp_path, "--resume")
    assert ran.code == 0, ran.err
    record = json.loads((tmp_path / "result.json").read_text())
    assert [row["epoch"] for row in record["curves"]] == [1, 2]


def test_interrupt_before_the_first_checkpoint_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stop_after(monkeypatch, 3)
    run("train", *SMALL, "--epochs", 2, "--out", tmp_path).failed_with(130, "there is no checkpoint")


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a process")
def test_control_c_from_outside(tmp_path: Path) -> None:
    settings = (*map(str, SMALL), "--epochs", "500", "--threads", "1")
    command = [sys.executable, "-m", "sepconv", "train", *settings, "--out", str(tmp_path)]

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts) as process:
        end = time.monotonic() + 300
        while not list(tmp_path.glob("checkpoint-*.pt")) and time.monotonic() < end and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "to go on: sepconv train" in err
    assert "Traceback" not in err


def test_the_record_of_a_benchmark_holds_what_took_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands = []
    monkeypatch.setattr(inspect.network, "run", lambda *given: commands.append(given[-2]))
    monkeypatch.setattr(inspect, "_finish", lambda *given: None)
    for words in ((), ("--match", "v1 1", "--contenders", "sepconv,openvino", "--no-footprints")):
        inspect.app(["bench", "network", "--json", str(tmp_path / "n.json"), *words], standalone_mode=False)
    assert commands == [
        "sepconv bench network --threads 1 --seconds 3",
        "sepconv bench network --threads 1 --seconds 3 --match 'v1 1' --contenders sepconv,openvino --no-footprints",
    ]
