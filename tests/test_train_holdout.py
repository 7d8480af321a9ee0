"""Images held out from the training images: the same for everybody, of all classes, and never learned from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from distributed_run import random_data
from torch import Tensor

from sepconv.data import Data
from sepconv.train.holdout import LEAST, Choices, hold_out


def of_labels(labels: Tensor) -> Data:
    """A data set whose images say who they are."""
    data = random_data(len(labels), 7)
    images: Any = data.train.images
    images.tensor[:, 0, 0, 0] = torch.arange(len(labels)) // 256
    images.tensor[:, 0, 0, 1] = torch.arange(len(labels)) % 256
    return replace(data, train=replace(data.train, labels=labels))


def names(data: Data, split: str) -> list[int]:
    images: Any = getattr(data, split).images
    return (256 * images.tensor[:, 0, 0, 0].long() + images.tensor[:, 0, 0, 1]).tolist()


def test_a_tenth_of_each_class_is_held_out_and_nothing_else_is_lost() -> None:
    labels = torch.arange(1003) % 10
    held = hold_out(of_labels(labels))
    assert held is not None
    assert sorted(names(held, "train") + names(held, "test")) == list(range(1003))
    assert len(held.test) == 100
    assert held.test.labels.bincount().tolist() == pytest.approx([10] * 10, abs=1)
    assert torch.equal(labels[names(held, "test")], held.test.labels)
    assert torch.equal(labels[names(held, "train")], held.train.labels)
    again = hold_out(of_labels(labels))
    assert again is not None
    assert names(again, "test") == names(held, "test")


def test_at_most_two_thousand_and_no_class_whole() -> None:
    held = hold_out(of_labels(torch.arange(30_000) % 300))
    assert held is not None
    assert len(held.test) == 2000
    rare = hold_out(of_labels(torch.cat([torch.zeros(400, dtype=torch.long), torch.arange(1, 61)])))
    assert rare is not None
    assert len(rare.test) == 46
    assert not rare.test.labels.any()
    assert len(rare.train.labels.unique()) == 61


@pytest.mark.parametrize("count", [10 * LEAST - 1, 5])
def test_of_too_few_none_is_held_out_and_that_is_said(count: int) -> None:
    data = of_labels(torch.arange(count) % 5)
    choices = Choices.of(data)
    assert choices.held_out == 0
    assert names(choices.data, "train") == names(choices.data, "test") == list(range(count))
    assert f"The {count} training images are too few to hold any out" in choices.note
    assert choices.curve({"train_loss": 1.0, "test_loss": 2.0, "test_accuracy": 0.5}) == {"train_loss": 1.0}
    assert Choices.of(of_labels(torch.arange(10 * LEAST) % 5)).held_out == LEAST
    assert hold_out(of_labels(torch.arange(10 * LEAST))) is None


def test_curves_call_the_held_out_images_what_they_are() -> None:
    choices = Choices.of(of_labels(torch.arange(400) % 5))
    record = {"epoch": 1, "test_loss": 2.0, "test_accuracy": 0.5}
    assert choices.note == ""
    assert choices.curve(record) == {"epoch": 1, "held_out_loss": 2.0, "held_out_accuracy": 0.5}


def test_a_split_for_validation_is_what_choices_are_made_on() -> None:
    data = of_labels(torch.arange(400) % 10)
    with_val = replace(data, val=data.train.subset(torch.arange(40)))
    choices = Choices.of(with_val)
    assert choices.held_out == 40
    assert choices.data.test is with_val.val
    assert choices.data.train is data.train  # nothing is taken from it
    few = Choices.of(replace(data, val=data.train.subset(torch.arange(LEAST - 1))))
    assert few.held_out == 40
    assert len(few.data.train) == 360
