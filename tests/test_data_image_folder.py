"""Image folders as people have them: splits of many names, hidden files, links; what is left out is counted."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
import pytest
import torch
from test_data_dataset import parquet, png, write_images

from sepconv.data import BrokenImage, load
from sepconv.data.splits import split_at_beginning, splits_among

TWO = {"cat": [png(1), png(2)], "dog": [png(3), png(4)]}


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Train", "Test"),
        ("training", "testing"),
        ("TRAIN", "VAL"),
        ("train", "valid"),
        ("Training", "Validation"),
        ("train", "dev"),
        ("training_set", "test_set"),
        ("Train Images", "Test Images"),
        ("seg_train", "seg_test"),
        ("train2017", "val2017"),
    ],
)
def test_splits_are_known_by_their_names(tmp_path: Path, train: str, test: str) -> None:
    write_images(tmp_path / train, TWO)
    write_images(tmp_path / test, {"cat": [png(5)], "dog": [png(6)]})
    data = load(tmp_path)
    assert data.classes == ["cat", "dog"]
    assert (len(data.train), len(data.test), data.val) == (4, 2, None)
    assert data.test.images.take(torch.arange(2))[:, 0, 0, 0].tolist() == [5, 6]
    assert data.notes == (f"{train}/ (4 images) is for training, {test}/ (2) for testing",)


@pytest.mark.parametrize("val", ["val", "Validation", "dev"])
def test_of_three_splits_the_third_is_kept_apart(tmp_path: Path, val: str) -> None:
    write_images(tmp_path / "train", TWO)
    write_images(tmp_path / "test", {"cat": [png(5)], "dog": [png(6)]})
    write_images(tmp_path / val, {"cat": [png(7)], "dog": [png(8), png(9)]})
    data = load(tmp_path)
    assert (len(data.train), len(data.test)) == (4, 2)
    assert data.val is not None
    assert data.val.images.take(torch.arange(3))[:, 0, 0, 0].tolist() == [7, 8, 9]
    assert (data.val.labels.tolist(), data.val.mean) == ([0, 1, 1], data.train.mean)
    assert f"{val}/ (3) is kept apart from both" in data.notes[0]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["cat/a", "dog/a", "val/a"], r"val looks like a split but there is no training split.*another name"),
        (["Test/cat", "Test/dog"], "Test looks like a split but there is no training split"),
        (["Train/cat", "Train/dog"], r"Train looks like a training split but .* give \S*Train itself"),
        (["bus/a", "car/a", "train/a"], r"looks like a training split .*if it is a class, give it another name"),
        (["train/cat", "Train/cat", "test/cat"], "2 train splits, Train and train: one is the most"),
        (["train/cat", "train/dog", "val/cat", "dev/dog"], "2 val splits, dev and val"),
        (["train/cat", "train/dog", "test"], r"no images in \S*test \(1 ignored: images outside the class folders 1\)"),
        (["train/cat", "train/train", "test/cat"], "train/train looks like a split, and .*test has no such class"),
        (["cat/train", "cat/test", "dog/train", "dog/test"], "cat holds splits and is no class"),
    ],
)
def test_what_looks_like_a_split_is_never_a_class(tmp_path: Path, folders: list[str], message: str) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "x.png").write_bytes(png(1))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_names_that_only_resemble_splits_are_classes(tmp_path: Path) -> None:
    names = ["bullet_train", "contest", "device", "test1", "test2", "trainer"]
    assert load(write_images(tmp_path, {name: [png(1), png(2)] for name in names})).classes == names
    assert splits_among(["trainer", "value", "developer", "steam train", "crash_test"]) == {}
    stems = ("train-0", "testset", "Validation", "devices")
    assert [split_at_beginning(stem) for stem in stems] == ["train", "test", "val", None]


def test_a_class_may_be_called_train_within_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_images(tmp_path / split, {"bus": [png(1)], "train": [png(2)]})
    assert load(tmp_path).classes == ["bus", "train"]


def test_hidden_names_are_passed_over_and_counted(tmp_path: Path) -> None:
    write_images(tmp_path, {**TWO, "__MACOSX": [png(5)], ".git": [png(5)]})
    for folder in (".ipynb_checkpoints", "@eaDir"):
        write_images(tmp_path / "cat", {folder: [png(6)]})
    (tmp_path / "cat" / "._00.png").write_bytes(png(7))
    (tmp_path / "cat" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "labels.csv").touch()
    (tmp_path / "dog" / "notes").touch()
    data = load(tmp_path)
    assert (data.classes, len(data.train) + len(data.test)) == (["cat", "dog"], 4)
    assert data.notes == (f"{tmp_path}: 4 images, 8 ignored: hidden 6, .csv 1, without suffix 1",)


def test_everything_beside_the_classes_is_counted(tmp_path: Path) -> None:
    write_images(tmp_path / "train", TWO)
    write_images(tmp_path / "test", TWO)
    write_images(tmp_path, {"extra": [png(1)]})
    (tmp_path / "train" / "stray.png").write_bytes(png(1))
    (tmp_path / "test" / "cat" / "a.HEIC").touch()
    (tmp_path / "README.md").touch()
    first, second = load(tmp_path).notes
    assert first.startswith(f"{tmp_path}: 8 images, 4 ignored: ")
    assert set(first.split("ignored: ")[1].split(", ")) == {
        "extra/ 1",
        "images outside the class folders 1",
        ".heic 1",
        ".md 1",
    }
    assert second.startswith("train/ (4 images)")


def test_classes_that_differ_in_case_alone_are_two_and_said_to_be(tmp_path: Path) -> None:
    data = load(write_images(tmp_path, {**TWO, "Cat": [png(5), png(6)]}))
    assert data.classes == ["Cat", "cat", "dog"]
    assert data.notes == ("2 classes differ from another in case alone: Cat, cat",)


def test_a_clean_folder_has_nothing_to_say(tmp_path: Path) -> None:
    assert load(write_images(tmp_path, TWO)).notes == ()


def test_links_are_followed_and_circles_come_to_an_end(tmp_path: Path) -> None:
    write_images(tmp_path / "elsewhere", {"more": [png(9), png(10)]})
    root = write_images(tmp_path / "photos", TWO)
    (root / "cat" / "linked").symlink_to(tmp_path / "elsewhere" / "more")
    (root / "cat" / "itself").symlink_to(root / "cat")
    (root / "cat" / "above").symlink_to(tmp_path)
    (root / "dog" / "knot").symlink_to(root / "dog" / "knot")
    (root / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "bird").symlink_to(tmp_path / "elsewhere" / "more")
    data = load(root)
    assert data.classes == ["bird", "cat", "dog"]
    assert torch.bincount(torch.cat([data.train.labels, data.test.labels])).tolist() == [2, 4, 2]
    assert data.notes == (f"{root}: 8 images, 4 ignored: folders linked again 2, broken links 2",)


def test_subfolders_of_a_class_belong_to_it_in_the_order_of_their_paths(tmp_path: Path) -> None:
    write_images(tmp_path, {"cat/b": [png(2)], "cat/a/x.png": [png(1)], "cat/c": [png(3)], "dog": [png(9)] * 2})
    train = load(tmp_path, test_fraction=0.01).train
    assert len(train) == 3
    both = load(tmp_path).train.images.take(torch.arange(3))[:, 0, 0, 0].tolist()
    assert sorted(both) == both


@pytest.mark.parametrize("name", ["d[x]", "s*r", "q?x", "new\nline", "-dash", ":cat:", "a b", "caf\udce9", "\u05d0"])
def test_any_name_of_a_folder_works(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_images(tmp_path / name, {name: [png(1), png(2)], "dog": [png(3), png(4)]})
    data = load(tmp_path / name)
    assert len(data.train) == len(data.test) == 2
    "".join([data.name, *data.classes]).encode("utf-8")
    (tmp_path / "set" / name).mkdir(parents=True)
    parquet(tmp_path / "set" / name / "train.parquet", [0, 1, 0, 1])
    (tmp_path / "set" / name / "test.parquet").write_bytes((tmp_path / "set" / name / "train.parquet").read_bytes())
    for source in (tmp_path / "set" / name, f"{tmp_path}/set/{name}/*.parquet"):
        assert (len(load(source).train), len(load(source).test)) == (4, 4)


def test_a_stray_parquet_file_is_ignored(tmp_path: Path) -> None:
    write_images(tmp_path, TWO)
    parquet(tmp_path / "cat" / "table.parquet", [0, 1, 0, 1])
    data = load(tmp_path)
    assert data.classes == ["cat", "dog"]
    assert data.notes == (f"{tmp_path}: 4 images, 1 ignored: .parquet 1",)


def test_a_stray_image_is_no_reason_to_leave_parquet_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    root = write_images(tmp_path / "set", {"assets": [png(1)]})
    for split in ("train", "test", "validation"):
        (root / split).mkdir()
        parquet(root / split / "0000.parquet", [0, 1, 0, 1])
    data = load(root)
    assert (len(data.train), len(data.test), data.val and len(data.val)) == (4, 4, 4)
    assert data.notes == (
        f"{root}: 3 parquet files, 1 ignored: .png 1",
        "train (4 images) is for training, test (4) for testing; val (4) is kept apart from both",
    )


def test_what_cannot_be_read_is_a_broken_image(tmp_path: Path) -> None:
    write_images(tmp_path, TWO)
    (tmp_path / "cat" / "empty.png").touch()
    with pytest.raises(BrokenImage, match=r"cat/empty.png \(the file is empty; skip_broken"):
        load(tmp_path)
    assert load(tmp_path, skip_broken=True).skipped == (str(tmp_path / "cat" / "empty.png"),)


def test_a_file_that_may_not_be_read_is_a_broken_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, {"cat": [png(1)] * 4, "dog": [png(2)] * 4})
    read_bytes = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path.parts[-2:] == ("cat", "01.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(BrokenImage, match=r"cat/01.png \(Permission denied; skip_broken"):
        load(tmp_path)
    assert load(tmp_path, skip_broken=True, test_fraction=0.3).skipped == (str(tmp_path / "cat" / "01.png"),)


def test_a_pipe_with_the_name_of_an_image_is_not_read(tmp_path: Path) -> None:
    write_images(tmp_path, TWO)
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    assert load(tmp_path).notes == (f"{tmp_path}: 4 images, 1 ignored: no regular files 1",)


def test_no_images_says_what_there_is(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.heic").touch()
    with pytest.raises(ValueError, match=r"no images in \S+ \(2 ignored: .heic 2\)"):
        load(tmp_path)


def test_one_folder_too_high_says_which_to_give(tmp_path: Path) -> None:
    write_images(tmp_path / "archive", TWO)
    with pytest.raises(ValueError, match=r"only one class \(archive\).* give \S+archive"):
        load(tmp_path)


def test_images_without_classes(tmp_path: Path) -> None:
    """Loose images; in splits, in which there may be folders; or of any data set whose classes are left out."""
    for place, count in {"flat": 10, "split/train": 3, "split/test": 2, "split/val": 1}.items():
        (tmp_path / place / "empty").mkdir(parents=True)
        for i in range(count):
            (tmp_path / place / f"{i}.png").write_bytes(png(i))
    flat, split = load(tmp_path / "flat"), load(tmp_path / "split")
    assert (flat.classes, flat.num_classes, len(flat.train), len(flat.test), flat.val) == ([], 0, 8, 2, None)
    assert split.val is not None
    assert (split.classes, len(split.train), len(split.test), len(split.val)) == ([], 3, 2, 1)
    assert "test/ (2) for testing" in split.notes[0]
    write_images(tmp_path / "sorted", TWO)
    with_classes, without = load(tmp_path / "sorted"), load(tmp_path / "sorted", labelled=False)
    assert (with_classes.classes, without.classes) == (["cat", "dog"], [])
    assert len(without.train) + len(without.test) == 4
    assert not without.train.labels.any()
    assert load("digits", labelled=False).classes == []
    with pytest.raises(ValueError, match=r"no images in \S*flat \(.*outside the class folders 10\): expected one subf"):
        load(tmp_path / "flat", labelled=True)
