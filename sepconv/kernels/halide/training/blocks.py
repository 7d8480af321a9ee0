"""An image of pixels times channels in blocks of pixels, each small enough to stay in the cache between two passes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from sepconv.kernels.case import Outline
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.calls import Strided
from sepconv.kernels.halide.numbers import KINDS, PAIRS, codes
from sepconv.kernels.halide.numbers import parts as parts_of
from sepconv.kernels.halide.schedule import machine
from sepconv.kernels.halide.schedule.gemm import channel_lanes
from sepconv.kernels.halide.training import slopes
from sepconv.kernels.halide.training.rows import PART, TOGETHER, PassSpec
from sepconv.kernels.layout import pixel_step
from sepconv.kernels.prologue import Deviation, StageCase

DTYPES = (torch.float32, torch.bfloat16)
# Measured on Granite Rapids, forward and back: 0.7 of PyTorch's speed with 8 thousand numbers, as fast with 40;
# in bfloat16 PyTorch's calls cost more, and ours are always the faster ones.
_LEAST_NUMBERS = 32768
_OF_SUMS = ("sums", "moments", "level")
_OF_PARTS = ("total", "level total", "merge")


class PixelRows(NamedTuple):
    """Pixels as rows of channels; ``step``: numbers from one pixel to the next."""

    pixels: int
    channels: int
    step: int

    @classmethod
    def of(cls, image: Outline) -> PixelRows:
        """``step`` is 0 where pixels do not lie evenly spaced, the channels of each side by side."""
        step = pixel_step(image.shape, image.stride) if image.dims == 2 else 0
        return cls(image.elements // max(1, image.shape[1]), image.shape[1], step)

    @classmethod
    def dense(cls, pixels: int, channels: int) -> PixelRows:
        return cls(pixels, channels, channels)

    def view(self, tensor: Tensor) -> Tensor:
        return tensor.as_strided((self.pixels, self.channels), (self.step, 1))

    def layout(self, kind: str) -> Strided:
        """``kind`` of numbers (see :func:`kind_of`), pairs among them."""
        halves = parts_of(kind)
        return Strided((self.pixels, self.channels // halves), (self.step // halves, 1), codes(kind))


class Slab(NamedTuple):
    """Pixels that go through together."""

    start: int
    size: int

    def of(self, rows: Tensor) -> Tensor:
        """Its own, of those of all pixels."""
        return rows if self.size == len(rows) else rows[self.start : self.start + self.size]

    def first(self, rows: Tensor) -> Tensor:
        """As many, of the memory that is for every block."""
        return rows if self.size == len(rows) else rows[: self.size]


def blocks(pixels: int, pixel_bytes: int, most_bytes: int) -> list[Slab]:
    """Equal ones of whole parts, of no more bytes unless a part has; the last is what is left."""
    count = max(1, -(-pixels * pixel_bytes // most_bytes))
    size = parts(-(-pixels // count)) * PART
    starts = list(range(0, pixels, size))
    if len(starts) > 1 and pixels - starts[-1] < TOGETHER:
        starts.pop()
    ends = [*starts[1:], pixels]
    return [Slab(start, end - start) for start, end in zip(starts, ends, strict=True)]


def alike(blocks: Sequence[Slab]) -> list[tuple[Slab, int]]:
    """Neighbours of one size: the first of them, and how many they are."""
    groups = [list(group) for _, group in groupby(blocks, lambda block: block.size)]
    return [(group[0], len(group)) for group in groups]


def parts(pixels: int) -> int:
    """Of sums over so many pixels."""
    return -(-pixels // PART)


def kind_of(dtype: torch.dtype, *images: PixelRows) -> str:
    """How passes read and write such rows: in pairs where each pixel of all of them has whole ones."""
    even = all(rows.channels % 2 == 0 and rows.step % 2 == 0 for rows in images)
    return PAIRS if dtype is torch.bfloat16 and even else KINDS[dtype]


def spec(what: str, kind: str, channels: int, activation: str = "") -> PassSpec:
    """The code of a pass."""
    stored = channels // parts_of(kind)
    lanes = channel_lanes(machine.host(), stored)
    vectors = 2 if what in _OF_SUMS and stored >= 2 * lanes and kind != PAIRS else 1
    if what in _OF_PARTS and kind != PAIRS:
        kind = "float32"
    return PassSpec(what, kind, activation, lanes, vectors)


def numbers(pixels: int, block: Slab, threads: int) -> dict[str, Strided | int]:
    """What passes over a block are called with besides tensors."""
    shares = -(-block.size // TOGETHER), parts(block.size)
    share, parts_share = [runtime.per_thread(passes, threads) for passes in shares]
    return {"share": share, "y_share": share, "parts_share": parts_share, "pixels": pixels}


def sums(pixels: int, block: Slab, channels: int, kind: str) -> dict[str, Strided | int]:
    """The layouts of what is summed up in parts: of a block, of all pixels, and the two numbers of each channel."""
    halves = parts_of(kind)
    stored = channels // halves
    own, every = [
        Strided((parts(count), 2, halves, stored), (2 * channels, channels, stored, 1))
        for count in (block.size, pixels)
    ]
    return {"parts": own, "all_parts": every, "result": Strided((2, channels), (channels, 1))}


def part_bytes(channels: int) -> int:
    return 2 * channels * torch.float32.itemsize


def vectors(channels: int, *names: str) -> dict[str, Strided | int]:
    return {name: Strided((channels,), (1,)) for name in names}


def vector(values: Tensor) -> Tensor:
    """As passes read it."""
    return values if values.dtype is torch.float32 and values.is_contiguous() else values.float().contiguous()


def factors(weight: Tensor, out_channels: int, channels: int, dtype: torch.dtype) -> Tensor:
    """The weight (O, C, 1, 1) as a matrix."""
    matrix = weight.view(out_channels, channels)
    return matrix if matrix.dtype is dtype else matrix.to(dtype)


def unsuitable(case: StageCase) -> str:
    """Why passes over rows cannot be made of these tensors, in a sentence; the empty string if they can."""
    assert case.weight is not None
    given = (case.x, case.y, case.weight)
    reason = runtime.missing() or runtime.unsuitable(*given, numbers=DTYPES) or runtime.too_large(case.y.shape)
    if reason:
        return reason
    if case.x.dtype is not case.y.dtype:
        return f"x is {case.x.dtype} but y is {case.y.dtype}"
    if case.x.dims != 2:
        return f"the kernel is for images of two dimensions, not of {case.x.dims}"
    if not PixelRows.of(case.x).step:
        return f"the pixels of x do not lie evenly spaced, channels side by side (strides {case.x.stride})"
    if case.prologue is not None and slopes.missing(case.prologue):
        return slopes.missing(case.prologue)  # forward, too: the way back is by the same passes
    few = min(PixelRows.of(image).pixels for image in (case.x, case.y))
    return f"{few} pixels are fewer than the kernel takes together" if few < TOGETHER else ""


def unsuitable_forward(case: StageCase) -> str:
    """The same where the result is not given."""
    reason = unsuitable(case)
    if not reason and not PixelRows.of(case.y).step:
        reason = f"x and the result lie in memory in different orders (strides {case.y.stride})"
    return reason


def slower(case: StageCase) -> str:
    """Why so small a pointwise stage is PyTorch's, both ways; the empty string if it is not."""
    numbers = case.x.elements + case.y.elements
    if case.x.dtype is torch.float32 and numbers < _LEAST_NUMBERS:
        return f"calling passes for {numbers:,} numbers costs more than the passes that are saved"
    return ""


PROLOGUE, DEVIATION = ("mean", "scale", "bias"), ("y_mean", "offset", "slope")


def place(places: dict[str, int], names: Sequence[str], values: Iterable[Tensor]) -> list[Tensor]:
    """Add the addresses of vectors; what is returned must live as long as they are used."""
    held = [vector(value) for value in values]
    for name, value in zip(names, held, strict=True):
        places[name] = value.data_ptr()
    return held


def place_deviation(places: dict[str, int], deviation: Deviation) -> list[Tensor]:
    """The same, with the addresses of its image and vectors."""
    y = dense(deviation.y)
    places["y"] = y.data_ptr()
    return [y, *place(places, DEVIATION, deviation[1:])]


def dense(image: Tensor) -> Tensor:
    """In the layout in which results of ours lie."""
    return image.contiguous(memory_format=torch.channels_last)
