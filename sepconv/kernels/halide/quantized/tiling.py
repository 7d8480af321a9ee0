"""An image cut into tiles of whole rows, whose pixels are numbered through; what is made of one stays in the cache."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.buffers import CODES, Buffer
from sepconv.kernels.layout import pixel_step


class RowTiles(NamedTuple):
    """What one call computes: so many tiles of so many groups of rows each, from a group on.

    ``rows``: of a tile; ``share``: tiles of one thread.
    """

    tiles: int
    parts: int
    first: int
    rows: int
    share: int


class Size(NamedTuple):
    """Of the result: images, rows, columns."""

    images: int
    height: int
    width: int


def cut(size: Size, group: int, pixels: int, threads: int) -> tuple[RowTiles, ...]:
    """Tiles of about so many pixels, the last one smaller; rows go in groups. Threads get a tile each, if they can."""
    parts = -(-size.height // group)
    most = max(1, -(-pixels // (size.width * group)))
    if threads > size.images:
        most = min(most, -(-parts // -(-threads // size.images)))
    each = -(-parts // -(-parts // most))
    whole, left = divmod(size.height, each * group)
    calls = []
    if whole:
        calls.append(RowTiles(whole, each, 0, each * group, runtime.per_thread(size.images * whole, threads)))
    if left:
        calls.append(RowTiles(1, -(-left // group), whole * each, left, runtime.per_thread(size.images, threads)))
    return tuple(calls)


def view(image: Tensor, call: RowTiles, group: int = 0) -> Buffer:
    """(N, O, Ho, Wo) from the first row of a call on as (N, tile, pixel in tile, O), or with (O / group, group)."""
    images, outputs, height, width = image.shape
    step = pixel_step(image.shape, image.stride())
    skipped = (height - call.rows) * width * step if call.first else 0
    each, steps = ((outputs // group, group), (group, 1)) if group else ((outputs,), (1,))
    shape = (images, call.tiles, call.rows * width, *each)
    strides = (height * width * step, call.rows * width * step, step, *steps)
    return Buffer(shape, strides, image.data_ptr() + skipped * image.element_size(), CODES[image.dtype], image)
