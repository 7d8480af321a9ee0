"""What the programs for GPUs are made for: plain data, which the compiler takes as it is. Nothing here imports Triton.

Every convolution has three spatial dimensions here: depth, rows and columns, those that a tensor lacks of size 1.
"""

from __future__ import annotations

from typing import NamedTuple

Triple = tuple[int, int, int]


class View(NamedTuple):
    """A tensor (N, C, depth, rows, columns): its sizes without N, and the steps in memory."""

    channels: int
    depth: int
    rows: int
    columns: int
    of_image: int
    of_channel: int
    of_depth: int
    of_row: int
    of_column: int


class FilterSteps(NamedTuple):
    """From one filter to the next, and from one tap to the next; and over how many planes of taps a tile goes, which
    a compiler that knew it would write out one by one."""

    of_filter: int
    of_tap: int
    planes: int


class Patch(NamedTuple):
    """What one program computes at a time: so many channels of so many places, each some rows below each other.

    A thread has all ``deep`` rows of a place, so that a number of the image that it has read serves several taps.
    """

    channels: int
    places: int
    columns: int
    deep: int
    warps: int


class Taps(NamedTuple):
    """How a filter's taps are taken: so many rows and columns of them without a loop.

    In a gradient of filters one program has so many of them, and others have the rest.
    """

    rows: int
    columns: int


class Schedule(NamedTuple):
    """What may be chosen of a program."""

    tile: Patch
    taps: Taps


class Specialization(NamedTuple):
    """What a program is compiled for.

    Attributes:
        transposed: whether it is the gradient of the input, which is gathered phase by phase of the stride.
        skip: from one tap to the next that meets the same phase, 1 where there are none.
        advance: from what one such tap reads to what the next does.
        parameters: of the activation.
        pixelwise: whether the channels of a pixel lie side by side in what is written, else pixels do.
        unit: a number that divides all steps and the channels, where channels lie side by side: so many numbers are
            read at once.
        wide: whether offsets need 64 bits.
    """

    kernel: Triple
    stride: Triple
    low: Triple
    dilation: Triple
    multiplier: int
    transposed: bool
    skip: Triple
    advance: Triple
    activation: str
    parameters: tuple[float, float]
    has_bias: bool
    pixelwise: bool
    unit: int
    wide: bool
    tile: Patch
    taps: Taps


class Shares(NamedTuple):
    """Of a gradient of filters: how many programs share the images, and how many tiles each walks over."""

    images: int
    shares: int
    tiles: int
