"""Classes of a data set and outputs of a network: found by name, or refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sepconv.data import load
from sepconv.runs.classes import matched, names_of, read_classes

DIGITS = load("digits")


def test_labels_become_the_outputs_of_their_names() -> None:
    names = [f"other {i}" for i in range(3)] + [str(9 - i) for i in range(10)]
    found = matched(DIGITS, names, 13)
    assert found.classes == names
    assert torch.equal(found.train.labels, 12 - DIGITS.train.labels)
    assert torch.equal(found.test.labels, 12 - DIGITS.test.labels)
    assert found.train.images is DIGITS.train.images


def test_a_split_for_validation_is_moved_too() -> None:
    names = [str(9 - i) for i in range(10)]
    found = matched(replace(DIGITS, val=DIGITS.test), names, 10)
    assert found.val is not None
    assert torch.equal(found.val.labels, 9 - DIGITS.test.labels)


def test_nothing_changes_without_names_or_with_the_same() -> None:
    assert matched(DIGITS, [], 10) is DIGITS
    assert matched(DIGITS, DIGITS.classes, 10) is DIGITS
    assert matched(DIGITS, ["a", "b"], 10) is DIGITS


def test_a_class_that_no_output_has() -> None:
    names = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "nine"]
    with pytest.raises(ValueError, match=r"digits has the class '9', but the 10 outputs .* are 0, 1, 2, .*--classes"):
        matched(DIGITS, names, 10)


def test_names_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("tench\ngoldfish \n\n")
    assert read_classes(tmp_path / "names.txt") == ["tench", "goldfish"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*names.txt"),
        (b"", "must have the name of one class in every line"),
        (b"a\n\nb\n", "in every line"),
        (b"a\nb\na\n", "has the class 'a' twice"),
        (b"\xff\xfe\n", "cannot read"),
    ],
)
def test_files_without_names(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_classes(tmp_path / "names.txt")


def test_other_models_have_no_names() -> None:
    assert names_of("vgg_small", ["0"]) == []
