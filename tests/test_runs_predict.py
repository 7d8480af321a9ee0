"""Predictions for files and folders of images, and what the commands say of folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_run import sepconv as run
from test_data_dataset import png, write_images

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


def test_training_says_what_was_left_out_and_what_is_for_what(tmp_path: Path) -> None:
    for split in ("Train", "Test", "val"):
        write_images(tmp_path / "set" / split, {"cat": [png(1, (8, 8))] * 2, "dog": [png(2, (8, 8))] * 2})
    (tmp_path / "set" / "Train" / "cat" / "x.heic").touch()
    words = ("vgg_small", "--data", tmp_path / "set", "--set", "width_mult=0.25", "--epochs", 1)
    ran = run("train", *words, "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert f"{tmp_path / 'set'}: 12 images, 1 ignored: .heic 1\n" in ran.out
    assert "Train/ (4 images) is for training, Test/ (4) for testing; val/ (4) is kept apart from both\n" in ran.out
