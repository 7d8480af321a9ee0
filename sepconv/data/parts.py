"""What every source of images becomes: images and labels of a training and perhaps other splits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sepconv.data.images import EncodedImages, TensorImages


@dataclass(frozen=True)
class Part:
    """Images and int64 labels (N,) of one split."""

    images: TensorImages | EncodedImages
    labels: Tensor

    def subset(self, indices: Tensor) -> Part:
        return Part(self.images.subset(indices), self.labels[indices])


@dataclass(frozen=True)
class Source:
    """A data set as it was found.

    Attributes:
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


def readable(name: str) -> str:
    """A name as text that every file can hold: bytes that are not UTF-8 as their hexadecimal codes.

    Example:
        >>> readable("caf\\udce9")
        'caf\\\\xe9'
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
