"""`sepconv convert` on a network that was trained elsewhere: it sees its images as it knows them, and says how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_run import sepconv, trained_folder
from safetensors.torch import load_file

from sepconv.data import load
from sepconv.runs import judge, run_folder, workflow

DIGITS = ("--data", "digits")
NO_TRAINING = ("--epochs", 0)


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled in other precisions, nor exported: both take longer than what is looked at here."""
    monkeypatch.setattr(workflow, "precisions", lambda *given: [])
    monkeypatch.setattr(run_folder.onnx_file, "missing", lambda: "onnx is not here")


def test_the_networks_own_preparation_counts(tmp_path: Path) -> None:
    ran = sepconv("convert", trained_folder(), *DIGITS, "--budget", 0.5, *NO_TRAINING, "--out", tmp_path)
    assert ran.code == 0, ran.err
    assert "Images as vgg_small has them:" in ran.out
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["preprocessing"]["source"] == "vgg_small"


@pytest.mark.filterwarnings("default:the original is right on")
def test_a_wrong_preparation_is_suspected(tmp_path: Path) -> None:
    wrong = ("--mean", "9", "--std", "0.01")
    ran = sepconv("convert", trained_folder(), *DIGITS, *wrong, "--budget", 0.5, *NO_TRAINING, "--out", tmp_path)
    assert ran.code == 0, ran.err
    assert "Images as what was typed has them:\n" in ran.out
    assert "\n  mean 9, deviation 0.01\n" in ran.out
    assert "sepconv: warning: the original is right on " in ran.err
    assert "the preparation of its images right?" in ran.err


def test_a_state_dict_of_pytorch_with_classes_in_another_order(tmp_path: Path) -> None:
    """The same network as a checkpoint, its outputs turned round and named in a file: the same accuracy."""
    card = json.loads((trained_folder() / "result.json").read_text())
    tensors = load_file(trained_folder() / "model.safetensors")
    last = [name for name in tensors if tensors[name].shape[:1] == (10,)]
    tensors.update({name: tensors[name].flip(0) for name in last})
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}}, tmp_path / "w.pth")
    (tmp_path / "names").write_text("\n".join(str(9 - i) for i in range(10)))
    given = ("vgg_small", "--set", "width_mult=0.25", "--weights", tmp_path / "w.pth", "--classes", tmp_path / "names")
    ran = sepconv("convert", *given, *DIGITS, "--budget", 0.9, *NO_TRAINING, "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "Images by the statistics of digits; " in ran.out
    assert "for others give --mean and --std:" in ran.out
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert record["normal"]["accuracy"] == pytest.approx(card["normal"]["accuracy"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mean", "0.5"), "--mean and --std go together"),
        (("--mean", "a", "--std", "1"), "--mean needs 1 or 3 numbers"),
        (("--crop", "2"), "--crop must be above 0 and at most 1"),
        (("--interpolation", "cubic"), "interpolation must be one of nearest, bilinear, bicubic"),
        (("--classes", "none"), "cannot read none"),
    ],
)
def test_options_that_cannot_be(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    ran = sepconv("convert", trained_folder(), *DIGITS, *options, *NO_TRAINING, "--out", tmp_path / "out")
    ran.failed_with(2, message)
    assert not (tmp_path / "out").exists()


def test_names_of_another_number_of_outputs(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("0\n1\n2\n")
    given = (trained_folder(), *DIGITS, "--classes", tmp_path / "names", *NO_TRAINING, "--out", tmp_path / "out")
    sepconv("convert", *given).failed_with(2, "3 classes are named but the network has 10 outputs")


@pytest.mark.parametrize(("right", "suspect"), [(0.1, True), (0.18, True), (0.21, False), (0.9, False)])
def test_what_is_near_chance(right: float, suspect: bool) -> None:
    split = load("digits").train
    assert bool(judge.near_chance(right, split.labels)) == suspect
