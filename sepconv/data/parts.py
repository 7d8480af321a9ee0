"""What every source of images becomes: images and labels of a training and perhaps other splits."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sepconv.data.images import EncodedImages, TensorImages


@dataclass(frozen=True)
class Part:
    """Images and int64 labels (N,) of one split."""

    images: TensorImages | EncodedImages
    labels: Tensor

    def subset(self, indices: Tensor) -> Part:
        return Part(self.images.subset(indices), self.labels[indices])

    def without_labels(self) -> Part:
        """As if all were of one class."""
        return Part(self.images, torch.zeros_like(self.labels))


@dataclass(frozen=True)
class Source:
    """A data set as it was found.

    Attributes:
        classes: their names, none where there are no labels.
        test: None where the source has no test split.
        val: images set apart from both, where there is such a split beside a test split.
        notes: what was left out and which split serves for what, one line each.
    """

    name: str
    classes: list[str]
    train: Part
    test: Part | None
    val: Part | None = None
    notes: tuple[str, ...] = ()

    def without_labels(self) -> Source:
        test, val = (None if part is None else part.without_labels() for part in (self.test, self.val))
        return replace(self, classes=[], train=self.train.without_labels(), test=test, val=val)


def readable(name: str) -> str:
    r"""A name as text that every file can hold: what no encoding has, such as bytes of an old one, as its code.

    Example:
        >>> readable("caf\udce9")
        'caf\\xe9'
    """
    return re.sub("[\ud800-\udfff]", _code, name)


def _code(surrogate: re.Match[str]) -> str:
    """Python writes the byte 0x80 in a name as U+DC80, and so on."""
    code = ord(surrogate[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"
