"""Predictions for files and folders of images, and what the commands say of folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_run import sepconv as run
from safetensors.torch import load_file, save_file
from test_data_dataset import png, write_images
from torch import Tensor, nn

from sepconv.runs import model_file
from sepconv.runs.model_file import Card
from sepconv.runs.predict import predict

CARD = Card(
    "vgg_small",
    {"width_mult": 0.25, "in_channels": 3, "num_classes": 2},
    input_shape=(3, 8, 8),
    classes=["cat", "dog"],
    mean=[0.5] * 3,
    std=[0.25] * 3,
)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that knows nothing but how images are prepared."""
    path = tmp_path_factory.mktemp("network") / model_file.FILE
    model_file.write(path, CARD.build(), CARD)
    return path.parent


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Seven names of which four are images, in an order that no listing has by itself."""
    root = write_images(tmp_path / "photos", {"b": [png(3)], "a/deep": [png(1)], ".hidden": [png(9)]})
    shutil.move(root / "b" / "00.png", root / "b" / "z.PNG")
    for name in ("c.jpeg", "-x.png"):
        (root / name).write_bytes(png(2))
    (root / "._c.jpeg").write_bytes(b"\0\5\x16\7")
    (root / "c.heic").touch()
    return root


def test_a_folder_stands_for_all_images_below_it(photos: Path) -> None:
    found = [Path(one.image) for one in predict(CARD.build(), CARD, [photos / "c.jpeg", photos])]
    assert found == [photos / name for name in ("c.jpeg", "-x.png", "a/deep/00.png", "b/z.PNG", "c.jpeg")]


def test_the_command_counts_what_it_leaves_out(network: Path, photos: Path, tmp_path: Path) -> None:
    ran = run("predict", network, photos, "--json", tmp_path / "answers.json")
    assert ran.code == 0, ran.err
    assert "4 images, 3 ignored: hidden 2, .heic 1" in ran.out
    assert len(json.loads((tmp_path / "answers.json").read_text())) == 4
    assert "ignored" not in run("predict", network, photos / "c.jpeg").out


def test_a_folder_without_images_is_named(network: Path, photos: Path) -> None:
    (photos / "none").mkdir()
    (photos / "none" / "a.txt").touch()
    run("predict", network, photos / "none").failed_with(2, "no images in", "none (1 ignored: .txt 1)")
    run("predict", network, photos / "gone").failed_with(2, "no such file or folder", "gone")


def test_names_that_begin_with_a_dash(network: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    assert "-x.png" in run("predict", network, "--", "-x.png").out
    run("predict", network, "-x.png").failed_with(2, "-x")


def test_broken_images_can_be_left_out(network: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "b" / "cut.png").write_bytes(png(4)[:-30])
    run("predict", network, photos).failed_with(2, "broken image", "cut.png")
    ran = run("predict", network, photos, "--skip-broken", "--json", tmp_path / "answers.json")
    assert ran.code == 0, ran.err
    assert f"Broken images left out: 1 ({photos / 'b' / 'cut.png'})" in ran.out
    whole = {one["image"]: one for one in json.loads((tmp_path / "answers.json").read_text())}
    assert len(whole) == 4
    alone = predict(CARD.build(), CARD, [photos / "b" / "z.PNG"])[0]
    assert list(whole) == [str(photos / name) for name in ("-x.png", "a/deep/00.png", "b/z.PNG", "c.jpeg")]
    assert len(alone.classes) == len(whole[str(photos / "b" / "z.PNG")]["classes"])
    ran = run("predict", network, photos / "b" / "cut.png", "--skip-broken")
    ran.failed_with(2, "all images are broken, such as", "cut.png")


def _images_of(folder: Path, pixels: int) -> Path:
    return write_images(folder, {"dog": [png(1, (pixels, pixels))] * 2, "ant": [png(2, (pixels, pixels))] * 2})


def test_names_of_the_network_come_before_those_of_the_data(network: Path, tmp_path: Path) -> None:
    """The data has them in the order of the alphabet, which need not be that of the outputs."""
    data, image = _images_of(tmp_path / "set", 8), tmp_path / "set" / "dog" / "00.png"
    by_data = json.loads(run("predict", network, image, "--data", data, "--json", "-").out)
    assert sorted(by_data[0]["classes"]) == ["cat", "dog"]
    bare = tmp_path / "bare.safetensors"
    save_file(CARD.build().state_dict(), bare)
    begin = ("predict", "vgg_small", "--weights", bare, "--set", "width_mult=0.25", "--set", "num_classes=2")
    named = json.loads(run(*begin, image, "--data", data, "--json", "-").out)
    assert sorted(named[0]["classes"]) == ["ant", "dog"]
    third = run("predict", "vgg_small", "--set", "num_classes=3", image, "--data", data, "--json", "-")
    assert sorted(json.loads(third.out)[0]["classes"]) == ["0", "1", "2"]
    (tmp_path / "names.txt").write_text("zebra\nyak\n")
    typed = run(*begin, image, "--data", data, "--classes", tmp_path / "names.txt", "--json", "-")
    assert sorted(json.loads(typed.out)[0]["classes"]) == ["yak", "zebra"]
    (tmp_path / "names.txt").write_text("zebra\nyak\ngnu\n")
    typed = run(*begin, image, "--data", data, "--classes", tmp_path / "names.txt")
    typed.failed_with(2, "3 classes are named but the network has 2 outputs")


def test_images_are_prepared_as_is_typed(network: Path, tmp_path: Path) -> None:
    """Without any data set, and in the place of what the card says."""
    image = tmp_path / "x.png"
    image.write_bytes(png(5, (9, 13)))
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(network / model_file.FILE), bare)
    begin = ("predict", "vgg_small", "--weights", bare, "--set", "width_mult=0.25", "--set", "num_classes=2")
    run(*begin, image).failed_with(2, "how images are prepared: give --mean, --std and --image-size, or --data")
    numbers = ("--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25")
    run(*begin, image, *numbers).failed_with(2, "do not say how images are prepared")
    typed, known = (
        json.loads(run(*words, image, "--json", "-").out)
        for words in ((*begin, *numbers, "--image-size", 8), ("predict", network))
    )
    assert typed[0]["probabilities"] == known[0]["probabilities"]
    assert typed[0]["classes"] == [str(["cat", "dog"].index(name)) for name in known[0]["classes"]]
    run(*begin, image, "--mean", "0", "--std", "1", "--image-size", 8).failed_with(
        2, "predict: the model does not take images of shape (1, 8, 8): Given groups=1"
    )
    larger = json.loads(run("predict", network, image, "--image-size", 16, "--json", "-").out)
    assert larger[0]["probabilities"] != known[0]["probabilities"]


class _Answers(nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        return self.answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.zeros(1, 2, 4, 4), r"predict: the network must give scores \(N, classes\), got \(1, 2, 4, 4\)"),
        ({"out": torch.zeros(1, 2)}, r"predict: the network must give scores \(N, classes\), got dict"),
        (torch.tensor([[0.0, float("nan")]]), r"predict: the scores of .*c\.jpeg hold NaN or infinity"),
    ],
)
def test_answers_that_are_no_scores(answer: Any, message: str, photos: Path) -> None:
    with pytest.raises(ValueError, match=message):
        predict(_Answers(answer), CARD, [photos / "c.jpeg"])


def test_weights_that_are_no_numbers_are_named(photos: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(2))
    network(torch.zeros(1, *CARD.input_shape))
    nn.init.constant_(network[1].bias, float("nan"))
    with pytest.raises(ValueError, match=r"hold NaN or infinity: so does its own 1\.bias"):
        predict(network, CARD, [photos / "c.jpeg"])


def test_training_says_what_was_left_out_and_what_is_for_what(tmp_path: Path) -> None:
    for split in ("Train", "Test", "val"):
        write_images(tmp_path / "set" / split, {"cat": [png(1, (8, 8))] * 2, "dog": [png(2, (8, 8))] * 2})
    (tmp_path / "set" / "Train" / "cat" / "x.heic").touch()
    words = ("vgg_small", "--data", tmp_path / "set", "--set", "width_mult=0.25", "--epochs", 1)
    ran = run("train", *words, "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert f"{tmp_path / 'set'}: 12 images, 1 ignored: .heic 1\n" in ran.out
    assert "Train/ (4 images) is for training, Test/ (4) for testing; val/ (4) is kept apart from both\n" in ran.out
