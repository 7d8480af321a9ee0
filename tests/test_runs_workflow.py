"""The main job's record says what is true of the networks it wrote, and no file is ever half-written."""

from __future__ import annotations

import errno
import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_run import converted_folder, trained_folder
from test_layers_borrowed import condition
from torch import nn

from sepconv import cost
from sepconv.data import Data, load
from sepconv.runs import onnx_file, run_folder, workflow
from sepconv.runs.compare import disagreements
from sepconv.runs.model_file import open_model
from sepconv.runs.training import train_model
from sepconv.runs.workflow import Job
from sepconv.system.progress import Step
from sepconv.train import Recipe, TrainingStopped, evaluate
from sepconv.train.holdout import Choices


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((converted_folder() / "result.json").read_text())
    return found


@pytest.fixture
def without_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "missing", lambda: "onnx is not here")


@pytest.fixture
def in_float32(without_onnx: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """To compile the networks once more, in every precision, takes seconds."""
    monkeypatch.setattr(workflow, "precisions", lambda *given: [])


@pytest.fixture
def unmeasured(in_float32: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the two networks only the accuracies: times take seconds."""

    def accuracies(normal: Any, separable: Any, plan: Any, judged: Any, data: Data, batch: int) -> dict[str, Any]:
        return {name: {"accuracy": found.score.accuracy} for name, found in judged.items()}

    monkeypatch.setattr(workflow.compare, "compare", accuracies)


@pytest.mark.parametrize(("name", "folder"), [("normal", trained_folder), ("separable", converted_folder)])
def test_record_repeats_the_written_network(record: dict[str, Any], name: str, folder: Any) -> None:
    model, card = open_model(str(folder()))
    data = load("digits")
    metrics = evaluate(model, data.test)
    found = cost.count(model, card.input_shape)
    said = record[name]
    assert said["accuracy"] == metrics.accuracy
    assert record["confusion"][name] == metrics.confusion.tolist()
    assert (said["conv_params"], said["params"], said["macs"]) == (found.conv_params, found.params, found.macs)


def test_budget_is_kept(record: dict[str, Any]) -> None:
    assert record["separable"]["conv_params"] <= record["budget"] * record["normal"]["conv_params"]


def test_layers_add_up_to_the_networks(record: dict[str, Any]) -> None:
    for side, name in enumerate(("normal", "separable")):
        assert sum(layer["params"][side] for layer in record["layers"]) >= record[name]["conv_params"]
        linear = 32 * 2 * 10
        assert sum(layer["macs"][side] for layer in record["layers"]) == record[name]["macs"] - linear
    kinds = {layer["kind"] for layer in record["layers"]}
    assert "separable" in kinds
    assert all(layer["reason"] for layer in record["layers"] if layer["kind"] == "normal")
    assert all(layer["ms"][0] > 0 and layer["ms"][1] > 0 for layer in record["layers"])
    assert all(ms > 0 for ms in record["other_ms"])
    assert all(record["machine"][name]["1"] > 0 for name in ("fma_peak_gflops", "memory_gb_per_s"))


def test_stages_end_with_the_accuracy_reported(record: dict[str, Any]) -> None:
    stages = {stage["name"]: stage["accuracy"] for stage in record["stages"]}
    assert list(stages) == ["original", "closed form", "converted", "distilled"]
    held = Choices.of(load("digits")).data.test
    for name, folder in (("original", trained_folder()), (record["kept"], converted_folder())):
        assert stages[name] == evaluate(open_model(str(folder))[0], held).accuracy
    assert record["kept"] == ("converted" if stages["converted"] > stages["distilled"] else "distilled")
    assert (record["held_out_images"], record["notes"]) == (len(held), [])
    assert {"held_out_accuracy", "held_out_loss"} < set(record["curves"][-1])
    assert not any(key.startswith("test") for key in record["curves"][-1])


def test_latency_is_of_both_contenders(record: dict[str, Any]) -> None:
    for name in ("normal", "separable"):
        assert set(record[name]["latency_ms"]) == {"torch", "sepconv"}
        assert all(ms > 0 for ms in record[name]["latency_ms"].values())
        assert record[name]["latency_batch"] == 2
    assert "normal" in record["normal"]["kernels"]
    assert "separable" in record["separable"]["kernels"]


def test_int8_is_made_where_it_is_asked_for(record: dict[str, Any]) -> None:
    *rows, last = record["precisions"]
    assert [(row["network"], row["precision"]) for row in rows] == [
        ("normal", "float32"),
        ("separable", "float32"),
        ("separable", "bfloat16"),
    ]
    assert (last["precision"], last["ms"], last["bytes"]) == ("int8", None, None)
    assert last["reason"] == "not asked for: --precision int8 makes it"
    assert "int8" not in record


def test_onnx_file_was_checked(record: dict[str, Any]) -> None:
    assert record["onnx"]["checked_with"].startswith("onnxruntime")
    assert record["onnx"]["max_error"] < 1e-4
    # A bottleneck is two more than the convolution it stands for.
    converted = sum(layer["kind"] == "separable" for layer in record["layers"])
    more = {"separable": 1, "bottleneck": 2}[record["form"]]
    assert record["onnx"]["convolutions"] == len(record["layers"]) + more * converted


def test_disagreements_are_the_images_with_two_answers() -> None:
    data = load("digits")

    class Always(nn.Module):
        def __init__(self, label: int) -> None:
            super().__init__()
            self.register_buffer("scores", torch.eye(10)[label])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scores.expand(len(x), 10)

    found = disagreements(Always(3), Always(5), data)
    assert found["disagreement_count"] == len(data.test)
    assert len(found["disagreements"]) == 24
    first = found["disagreements"][0]
    assert (first["normal"], first["separable"], first["label"]) == (3, 5, int(data.test.labels[0]))
    assert first["image"].startswith("data:image/png;base64,")
    assert disagreements(Always(3), Always(3), data)["disagreements"] == []


def test_original_network_is_left_as_it_was(tmp_path: Path, without_onnx: None) -> None:
    model, card = open_model(str(trained_folder()))
    model.train().stages[0].eval()
    model.stages[1].to(memory_format=torch.channels_last)
    next(model.parameters()).requires_grad_(False)
    before = condition(model)
    torch.manual_seed(5)
    random = torch.get_rng_state()
    steps: list[Step] = []
    recipe = Recipe(epochs=1, batch_size=256, lr=0.01)
    record = workflow.convert_model(
        model,
        card,
        load("digits"),
        Job(budget=0.5, recipe=recipe, calibration_images=100),
        tmp_path,
        on_progress=steps.append,
    )
    assert condition(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert [step.stage for step in steps if step.done == step.total and step.accuracy is None] == ["measure", "write"]
    assert steps[-1] == Step("write", 1, 1)
    assert record == json.loads((tmp_path / "result.json").read_text())
    assert record["onnx"] == {"written": False, "reason": "export_onnx: onnx is not here"}


def test_distillation_that_loses_accuracy_is_undone(tmp_path: Path, unmeasured: None) -> None:
    model, card = open_model(str(trained_folder()))
    data = load("digits")
    job = Job(budget=0.5, recipe=Recipe(epochs=1, batch_size=64, lr=3.0), calibration_images=100)
    record = workflow.convert_model(model, card, data, job, tmp_path)
    stages = {stage["name"]: stage["accuracy"] for stage in record["stages"]}
    assert stages["distilled"] < stages["converted"]
    assert record["kept"] == "converted"
    written, _ = open_model(str(tmp_path))
    assert evaluate(written, data.test).accuracy == record["separable"]["accuracy"]
    assert evaluate(written, Choices.of(data).data.test).accuracy == stages["converted"]


def test_no_choice_depends_on_the_test_images(tmp_path: Path, unmeasured: None) -> None:
    """With labels that make fools of both networks the same is written."""
    data = load("digits")
    fooled = replace(data, test=replace(data.test, labels=data.test.labels.roll(1)))
    found = []
    for name, images in (("one", data), ("other", fooled)):
        model, card = open_model(str(trained_folder()))
        job = Job(budget=0.5, recipe=Recipe(epochs=1, batch_size=64, lr=3.0), calibration_images=100)
        record = workflow.convert_model(model, card, images, job, tmp_path / name)
        found.append((record, open_model(str(tmp_path / name))[0].state_dict()))
    (one, weights), (other, same) = found
    assert [row["accuracy"] for row in one["stages"]] == [row["accuracy"] for row in other["stages"]]
    assert one["kept"] == other["kept"]
    assert all(torch.equal(value, same[key]) for key, value in weights.items())
    assert other["separable"]["accuracy"] < 0.3 < one["separable"]["accuracy"]


def few(data: Data, count: int) -> Data:
    return replace(data, train=data.train.subset(torch.arange(count)))


def test_too_few_images_to_hold_out_are_said_to_be(tmp_path: Path, unmeasured: None) -> None:
    model, card = open_model(str(trained_folder()))
    job = Job(budget=0.5, recipe=Recipe(epochs=1, batch_size=64, lr=3.0))
    record = workflow.convert_model(model, card, few(load("digits"), 150), job, tmp_path)
    stages = {stage["name"]: stage["accuracy"] for stage in record["stages"]}
    assert stages["distilled"] < stages["converted"]
    assert record["kept"] == "distilled"
    assert record["held_out_images"] == 0
    assert "The 150 training images are too few to hold any out" in record["notes"][0]
    assert not any("held_out" in key or "test" in key for key in record["curves"][-1])
    page = (tmp_path / "report.html").read_text()
    assert "too few to hold any out" in page
    assert "On the training images." in page


def test_distillation_that_gains_is_kept(tmp_path: Path, unmeasured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a conversion that has lost its classifier."""
    model, card = open_model(str(trained_folder()))
    convert = workflow.convert

    def forgetful(*arguments: Any, **settings: Any) -> Any:
        network, plan = convert(*arguments, **settings)
        nn.init.zeros_(network.get_submodule("classifier.1").weight)
        return network, plan

    monkeypatch.setattr(workflow, "convert", forgetful)
    job = Job(budget=0.5, recipe=Recipe(epochs=2, batch_size=64, lr=0.05), calibration_images=100)
    record = workflow.convert_model(model, card, load("digits"), job, tmp_path)
    stages = {stage["name"]: stage["accuracy"] for stage in record["stages"]}
    assert stages["converted"] < stages["distilled"]
    assert record["kept"] == "distilled"


def test_demo_does_the_whole_job(tmp_path: Path, without_onnx: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workflow, "DEMO_SETTINGS", {"width_mult": 0.25})
    monkeypatch.setattr(workflow, "DEMO_BUDGET", 1 / 4)
    monkeypatch.setattr(workflow, "DEMO_TRAINING", replace(workflow.DEMO_TRAINING, epochs=1))
    monkeypatch.setattr(workflow, "DEMO_DISTILLATION", replace(workflow.DEMO_DISTILLATION, epochs=1))
    record = workflow.demo(tmp_path, seed=3, command="sepconv demo --seed 3")
    assert record["separable"]["conv_params"] <= record["normal"]["conv_params"] / 4
    assert record["command"] == "sepconv demo --seed 3"
    assert record["kind"] == "demo"
    assert {row["phase"] for row in record["curves"]} == {"original", "distilled"}
    assert {row["precision"] for row in record["precisions"] if row["ms"]} == {"float32", "bfloat16", "int8"}
    compiled = record["precisions"][-1]
    assert "computed in" not in compiled["reason"]
    assert abs(compiled["accuracy"] - record["int8"]["quantized"]["accuracy"]) <= 1 / record["test_images"]
    assert {path.name for path in (tmp_path / "int8").iterdir()} == {"model.safetensors"}
    live = json.loads((tmp_path / "live.json").read_text())
    shown = [(row["name"], row["precision"]) for row in live["networks"]]
    assert shown == [("normal", "float32"), ("separable", "float32"), ("separable", "int8")]
    assert record["live"] == {"written": True, "bytes": sum(len(row["wasm"]) for row in live["networks"])}
    assert {path.name for path in tmp_path.iterdir()} == {
        "explanation.json",
        "live.json",
        "int8",
        "model.safetensors",
        "report.html",
        "result.json",
    }


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_demo_loses_at_most_a_point(tmp_path: Path, seed: int, without_onnx: None) -> None:
    record = workflow.demo(tmp_path, seed=seed)
    assert record["normal"]["accuracy"] > 0.96
    assert record["separable"]["accuracy"] >= record["normal"]["accuracy"] - 0.01
    assert record["separable"]["conv_params"] <= record["normal"]["conv_params"] / 7.5


def test_full_disk_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = run_folder.shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"the results need 96 MB but .* has 1 MB left"):
        workflow.demo(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_disk_that_fills_up_leaves_whole_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_float32: None
) -> None:
    """The disk is full when result.json is flushed: the network is there, nothing half-written beside it."""
    model, card = open_model(str(trained_folder()))
    flushes: list[int] = []
    flush = os.fsync

    def full(descriptor: int) -> None:
        flushes.append(descriptor)
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and b'"disagreements"' in _content(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*result\.json: No space left on device"):
        workflow.convert_model(model, card, load("digits"), Job(budget=0.5, recipe=None), tmp_path)
    assert flushes
    # What was fitted is kept, so that the same command goes on when there is room.
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "explanation.json", "checkpoints"}
    json.loads((tmp_path / "explanation.json").read_text())
    open_model(str(tmp_path))


def _content(descriptor: int) -> bytes:
    return Path(f"/proc/self/fd/{descriptor}").read_bytes()


def test_nan_loss_stops_and_writes_no_network(tmp_path: Path) -> None:
    model, card = open_model(str(trained_folder()))
    recipe = Recipe(epochs=2, batch_size=256, lr=1e30)
    with pytest.raises(TrainingStopped, match="step"):
        train_model(model, card, load("digits"), recipe, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
