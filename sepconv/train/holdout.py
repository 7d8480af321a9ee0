"""Images set aside, on which choices are made: the test images are then looked at once, in the end."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sepconv.data import Data, LoaderSplit, SampleData, Samples
from sepconv.data.augment import generator

SHARE = 10
"""One of so many training images is held out."""

MOST = 2000
LEAST = 20
"""Fewer images than these say too little: then none is held out."""


@dataclass(frozen=True)
class Choices:
    """What a job may look at before it ends: training images, and others held out in the place of test images.

    Args:
        data: of too few images none is held out, and the training images stand in both places.
        held_out: how many are.
    """

    data: Data | SampleData
    held_out: int

    @classmethod
    def of(cls, data: Data | SampleData) -> Choices:
        """The split for validation where the data set has one, else some of the training images."""
        if data.val is not None and len(data.val) >= LEAST:
            return cls(_tested_on(data, data.val), len(data.val))
        held = hold_out(data)
        return cls(_tested_on(data, data.train), 0) if held is None else cls(held, len(held.test))

    @property
    def note(self) -> str:
        if self.held_out:
            return ""
        few = f"The {len(self.data.train)} training {self.data.items} are too few to hold any out"
        if not self.data.classes:
            return f"{few}: the error of each step is that on all of them."
        return f"{few}: the accuracy of each step is that on all of them, and a distilled network is kept in any case."

    def curve(self, record: dict[str, Any]) -> dict[str, Any]:
        """A record of the training's log, with what it calls test images under the name of what they are."""
        rest = {key: value for key, value in record.items() if not key.startswith("test_")}
        seen = {f"held_out_{key[5:]}": value for key, value in record.items() if key.startswith("test_")}
        return {**rest, **seen} if self.held_out else rest


def _tested_on(data: Data | SampleData, samples: Samples) -> Data | SampleData:
    return replace(data, test=samples)  # type: ignore[arg-type]


def hold_out(data: Data | SampleData) -> Data | SampleData | None:
    """The data as learning may see it: fewer training images, and the others in the place of the test images.

    Which ones follows from the labels alone, so that every process, every resumed run and every seed has the same.
    All classes give the same share, and keep one image at least. None where there are too few images, or a loader's.
    """
    if isinstance(data.train, LoaderSplit):
        return None
    labels = data.train.labels
    count = min(len(labels) // SHARE, MOST)
    shuffled = torch.randperm(len(labels), generator=generator(0))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    first = torch.ones(len(labels), dtype=torch.bool)
    first[1:] = labels[by_class].diff() != 0
    spare = by_class[~first]
    if min(count, len(spare)) < LEAST:
        return None
    count = min(count, len(spare))
    held = spare[torch.arange(count) * len(spare) // count].sort().values
    parts = {"train": data.train.subset(_others(held, len(labels))), "test": data.train.subset(held)}
    return replace(data, **parts)  # type: ignore[arg-type]


def _others(chosen: Tensor, total: int) -> Tensor:
    rest = torch.ones(total, dtype=torch.bool)
    rest[chosen] = False
    return rest.nonzero().flatten()
