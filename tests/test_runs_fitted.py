"""Work that was done is not done again and not replaced: a fitted network is kept, results are refused or returned."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_run import converted_folder, sepconv, trained_folder
from torch import nn

from sepconv.data import Data, load
from sepconv.runs import fitted, onnx_file, workflow
from sepconv.runs.model_file import open_model
from sepconv.runs.quantized import QuantizationJob, quantize_model
from sepconv.runs.run_folder import CHECKPOINTS, RESULT, owned
from sepconv.runs.training import train_model
from sepconv.runs.workflow import Job
from sepconv.system.files import LOCK
from sepconv.train import Recipe

JOB = Job(budget=0.5, recipe=None, calibration_images=100)


@pytest.fixture(scope="module", autouse=True)
def _runs() -> None:
    """Made whole, before measurements are left out."""
    trained_folder(), converted_folder()


@pytest.fixture(autouse=True)
def _unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither times nor an ONNX file, which take seconds."""

    def accuracies(normal: Any, separable: Any, plan: Any, judged: Any, data: Data, batch: int) -> dict[str, Any]:
        return {name: {"accuracy": found.score.accuracy} for name, found in judged.items()}

    monkeypatch.setattr(workflow.compare, "compare", accuracies)
    monkeypatch.setattr(workflow, "precisions", lambda *given: [])
    monkeypatch.setattr(workflow.layer_data, "collect", lambda *given, **how: {})
    monkeypatch.setattr(workflow, "write_report", lambda out: None)
    monkeypatch.setattr(onnx_file, "missing", lambda: "onnx is not here")


class Stopped(KeyboardInterrupt):
    pass


def _convert(out: Path, job: Job = JOB, **changed: Any) -> dict[str, Any]:
    model, card = open_model(str(trained_folder()))
    given = {"model": model, "card": card, "data": load("digits"), **changed}
    return workflow.convert_model(given["model"], given["card"], given["data"], job, out)


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a conversion that was killed as soon as its network was fitted."""

    def stop(*given: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(workflow, "_distil", stop)
        with pytest.raises(Stopped):
            _convert(tmp_path)
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == [fitted.FILE]
    return tmp_path


@pytest.fixture
def no_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **how: Any) -> None:
        raise AssertionError("a network was fitted again")

    monkeypatch.setattr(workflow, "convert", refuse)


class TestInterrupted:
    def test_goes_on_with_the_network_that_was_fitted(self, interrupted: Path, no_fit: None) -> None:
        state, described = _kept(interrupted)
        record = _convert(interrupted)
        written, _ = open_model(str(interrupted))
        assert {key: value.tolist() for key, value in written.state_dict().items()} == {
            key.removeprefix("network."): value.tolist() for key, value in state.items() if key.startswith("network.")
        }
        assert record["stages"][1:] == described["stages"]
        assert not (interrupted / CHECKPOINTS).exists()

    def test_is_the_same_as_undisturbed(self, interrupted: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        whole = tmp_path_factory.mktemp("whole")
        job = replace(JOB, recipe=Recipe(epochs=1, batch_size=256, lr=0.01))
        _convert(whole, job)
        _convert(interrupted, job)
        expected, found = (open_model(str(folder))[0].state_dict() for folder in (whole, interrupted))
        assert all(torch.equal(value, found[key]) for key, value in expected.items())

    def test_of_another_kind_is_refused_before_the_work(self, interrupted: Path, no_fit: None) -> None:
        model, card = open_model(str(trained_folder()))
        data = load("digits")
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)
        for message, changed in (
            (r"\(budget is 0.5 there and 0.25 here\)", {"job": replace(JOB, budget=0.25)}),
            (r"its weights are others", {"model": model, "card": card}),
            (r"its images are others", {"job": replace(JOB, seed=1)}),
            (r"held_out is", {"data": replace(data, train=data.train.subset(torch.arange(1000)))}),
        ):
            before = (interrupted / CHECKPOINTS / fitted.FILE).read_bytes()
            with pytest.raises(ValueError, match=rf"interrupted .*{message}.*: use another folder"):
                _convert(interrupted, **changed)
            assert (interrupted / CHECKPOINTS / fitted.FILE).read_bytes() == before

    def test_of_code_that_computes_something_else(self, interrupted: Path, no_fit: None) -> None:
        model, card = open_model(str(trained_folder()))
        model.register_forward_hook(lambda module, given, answer: answer * 1.1)
        with pytest.raises(ValueError, match="a network that answered otherwise: use another folder"):
            _convert(interrupted, model=model, card=card)

    def test_damaged_it_is_fitted_again(self, interrupted: Path) -> None:
        path = interrupted / CHECKPOINTS / fitted.FILE
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.warns(UserWarning, match=r"fitted\.safetensors is damaged .*: the conversion begins anew"):
            _convert(interrupted)

    def test_another_command_does_not_take_the_folder(self, interrupted: Path) -> None:
        ran = sepconv("train", "vgg_small", "--data", "digits", "--out", interrupted)
        ran.failed_with(2, "holds what sepconv convert wrote")
        (interrupted / CHECKPOINTS / fitted.FILE).write_bytes(b"mine")
        ran = sepconv("convert", trained_folder(), "--data", "digits", "--out", interrupted)
        ran.failed_with(2, "has files that no run of sepconv wrote, checkpoints")

    def test_without_room_for_it_the_run_goes_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(path: Path) -> Any:
            raise OSError(errno.ENOSPC, f"cannot write {path}: No space left on device")

        monkeypatch.setattr(fitted, "replacing", full)
        with pytest.warns(UserWarning, match="the fitted network is not kept, should the run be interrupted: .*space"):
            record = _convert(tmp_path)
        assert record["kept"] == "converted"


def _kept(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    found = fitted._read(folder / CHECKPOINTS / fitted.FILE)
    assert found is not None
    return found[1], found[0]


class _Shared(nn.Module):
    """Half precision, tied layers, and a layer in training mode: all of it comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.again = self.first
        self.second = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
        self.last = nn.Conv2d(8, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.again(self.first(x))))


def test_every_kind_of_network_is_kept_as_it_is(tmp_path: Path) -> None:
    from sepconv import convert
    from sepconv.leaves import Inputs

    model = _Shared().bfloat16()
    model.last.train(False)
    images = Inputs((torch.randn(80, 8, 12, 12),))
    separable, plan = convert(model, images, 0.5)
    images = images.to(torch.device("cpu"), torch.bfloat16)
    identity = fitted.identity_of(model, images, {}, repeatable=True)
    fitted.keep(tmp_path, fitted.Fitted(separable, plan, []), model, images, identity)
    found = fitted.find(tmp_path, model, images, identity)
    assert found is not None
    assert found.plan == plan
    assert str(found.network) == str(separable)
    assert [(n, m.training) for n, m in found.network.named_modules()] == [
        (n, m.training) for n, m in separable.named_modules()
    ]
    for (name, old), (other, new) in zip(separable.named_parameters(), found.network.named_parameters(), strict=True):
        assert (name, old.dtype, old.requires_grad) == (other, new.dtype, new.requires_grad)
        assert torch.equal(old, new)


class _Answer(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.network(x)}


def test_what_cannot_be_is_found_out_before_the_work(tmp_path: Path, no_fit: None) -> None:
    model, card = open_model(str(trained_folder()))
    message = r"convert: the model's output is dict .*; without classes \(--task outputs\) any outputs are compared"
    with pytest.raises(ValueError, match=message):
        _convert(tmp_path, model=_Answer(model))
    model.requires_grad_(False)
    recipe = Recipe(epochs=1)
    with pytest.raises(ValueError, match="convert: all parameters of the network are frozen, so it cannot learn"):
        _convert(tmp_path, replace(JOB, recipe=recipe), model=model)
    with pytest.raises(ValueError, match="quantize: all parameters of the network are frozen, so it cannot learn"):
        quantize_model(model, card, load("digits"), QuantizationJob(recipe=recipe), tmp_path)


def test_two_runs_do_not_share_a_folder(tmp_path: Path, no_fit: None) -> None:
    out = tmp_path / "a" / "b"
    with owned(out, "convert"):
        message = "{}: another process is writing to .*/b: give another --out, or wait"
        with pytest.raises(ValueError, match=message.format("convert")):
            _convert(out)
        model, card = open_model(str(trained_folder()))
        with pytest.raises(ValueError, match=message.format("quantize")):
            quantize_model(model, card, load("digits"), QuantizationJob(), out)
        with pytest.raises(ValueError, match=message.format("train")):
            train_model(model, card, load("digits"), Recipe(epochs=1), out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_killed_run_gives_its_folder_free(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        with owned(tmp_path, "convert"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / LOCK).exists()
    with owned(tmp_path, "convert"):
        pass
    assert list(tmp_path.iterdir()) == []


class TestFinished:
    def test_is_not_replaced(self, tmp_path: Path) -> None:
        out = shutil.copytree(converted_folder(), tmp_path / "out")
        before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
        ran = sepconv("convert", trained_folder(), "--data", "digits", "--budget", "1/2", "--epochs", 0, "--out", out)
        ran.failed_with(2, f"convert: {out} holds results of an earlier run: resume it, or use another folder")
        assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before

    def test_neither_is_a_training_without_its_checkpoints(self, tmp_path: Path) -> None:
        out = shutil.copytree(trained_folder(), tmp_path / "out")
        command = ("train", "vgg_small", "--data", "digits", "--out", out)
        sepconv(*command).failed_with(2, f"train: {out} holds checkpoints of an earlier run: resume it, or use another")
        for path in out.glob("checkpoint-*"):
            path.unlink()
        sepconv(*command).failed_with(2, f"train: {out} holds results of an earlier run: resume it, or use another")
        ran = sepconv(*command, "--resume")
        ran.failed_with(2, f"train: {out} holds results of a run without its checkpoints: use another folder")

    def test_resumed_it_is_shown_again(self, tmp_path: Path, no_fit: None) -> None:
        out = shutil.copytree(converted_folder(), tmp_path / "out")
        record = json.loads((out / RESULT).read_text())
        command = ("convert", trained_folder(), "--data", "digits", "--epochs", 1, "--batch-size", 64, "--batch", 2)
        before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
        ran = sepconv(*command, "--budget", "1/4", "--out", out, "--resume", "--json", tmp_path / "r.json")
        assert ran.code == 0, ran.err
        assert json.loads((tmp_path / "r.json").read_text()) == record
        assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
        ran = sepconv(*command, "--budget", "1/2", "--out", out, "--resume")
        ran.failed_with(2, "holds results of another run (conversion.budget is 0.25 there and 0.5 here)")

    def test_nor_is_a_quantized_network(self, tmp_path: Path) -> None:
        model, card = open_model(str(trained_folder()))
        data, job = load("digits"), QuantizationJob(calibration_images=32)
        record = quantize_model(model, card, data, job, tmp_path)
        with pytest.raises(
            ValueError, match=r"quantize: .* holds results of an earlier run: resume it, or use another"
        ):
            quantize_model(model, card, data, job, tmp_path)
        assert quantize_model(model, card, data, job, tmp_path, resume=True) == json.loads(json.dumps(record))
        with pytest.raises(ValueError, match=r"holds results of another run \(skip is"):
            quantize_model(model, card, data, replace(job, skip=("classifier.1",)), tmp_path, resume=True)
