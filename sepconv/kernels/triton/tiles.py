"""The tiles that are tried, from the shape of a case and the properties of the device: a few, the likeliest first.

A thread reads 16 bytes at once where channels lie side by side, and one number a thread where pixels do. What it keeps
in registers (sums, taps, one row of an image) stays below 255 of them; ``tests`` read that from the compiled code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sepconv.kernels.triton.forms import Patch, Schedule, Specialization, Taps

MOST = 4
"""So many tiles are tried: each is compiled, which takes a second or two."""
_MOST_UNROLLED = 27
"""Taps without a loop; where a tap is a number for each of several channels, a third of them."""
_REGISTERS = 255
_MOST_SUMS = 72
_MOST_PRODUCTS = 192
"""Of one number of an image for the rows of a place and of taps, times the channels of a thread."""


class Gpu(NamedTuple):
    """A device, as far as tiles depend on it: its processors, and the threads of a warp."""

    processors: int
    lanes: int


INTERPRETER = Gpu(2, 32)
"""Where Triton's programs are interpreted on a CPU."""


def gpu(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return INTERPRETER
    found = torch.cuda.get_device_properties(device)
    return Gpu(found.multi_processor_count, getattr(found, "warp_size", 32))


def _power(n: int) -> int:
    """The smallest power of two that is no smaller."""
    return 1 << max(0, n - 1).bit_length()


def options(form: Specialization, amd: bool = torch.version.hip is not None) -> dict[str, int]:
    """What a compiler is told besides the program.

    NVIDIA's stops at a number of registers of its own choice, and puts aside in memory what is beyond; of programs that
    read pixels one by one it is told that all may be used. Others need so many that its choice leaves room enough.
    """
    told = {"num_warps": form.tile.warps}
    return told if amd or form.pixelwise else told | {"maxnreg": _REGISTERS}


class Extent(NamedTuple):
    """What tiles are laid over, and under which filters: channels, rows and columns of each.

    ``vector``: so many channels are read at once; 0 where pixels lie side by side.
    """

    channels: int
    rows: int
    columns: int
    kernel_rows: int
    kernel_columns: int
    vector: int


def gathering(extent: Extent, lanes: int) -> list[Schedule]:
    """Of the result of a convolution, or of the gradient of its input."""
    rows = extent.kernel_rows if extent.kernel_rows <= 7 else 5
    most = _MOST_UNROLLED // 3 if extent.vector else _MOST_UNROLLED
    unrolled = rows == extent.kernel_rows and rows * extent.kernel_columns <= most
    taps = Taps(rows, extent.kernel_columns if unrolled else 1)
    tried = [(4, 1, 4), (2, 1, 4), (4, 2, 4), (8, 1, 4)] if extent.vector else _PIXELS
    return _distinct([Schedule(_tile(extent, lanes, *one), taps) for one in tried])


_PIXELS = [(4, 1, 4), (8, 1, 4), (2, 1, 4), (4, 1, 2)]


def of_filters(extent: Extent, lanes: int) -> list[Schedule]:
    """Of the gradient of filters: the rows that a thread has are all in the image or all outside of it."""
    each = max(1, extent.vector)
    tried = [(4, 1, 4), (2, 1, 4), (7, 1, 4), (1, 1, 4), (4, 2, 4), (2, 2, 4)]
    taps = _taps_of_sums(extent, each)
    deepest = _MOST_PRODUCTS // (taps.rows * each)
    fitting = [one for one in tried if extent.rows % one[0] == 0 and one[0] <= deepest][:MOST]
    return _distinct([Schedule(_tile(extent, lanes, *one), taps) for one in fitting])


def _taps_of_sums(extent: Extent, each: int) -> Taps:
    """As many taps as a thread can keep sums of."""
    most = min(25, _MOST_SUMS // each)
    rows = min(extent.kernel_rows, most if extent.kernel_rows <= most else 4)
    return Taps(rows, max(1, min(extent.kernel_columns, most // rows)))


def _tile(extent: Extent, lanes: int, deep: int, wide: int, warps: int) -> Patch:
    """``wide``: so many times the channels (or columns) of the narrowest tile whose reads fill a line of the cache."""
    deep = min(deep, _power(extent.rows)) if extent.rows < deep else deep
    across = _power(extent.columns)
    down = _power(-(-extent.rows // deep))
    threads = lanes * warps
    if extent.vector:
        channels = min(_power(extent.channels), 8 * wide * extent.vector)
        places = max(1, threads * extent.vector // channels)
        across = min(across, max(1, places // min(down, 2)))
        return Patch(channels, min(places, across * down), across, deep, warps)
    across = min(across, 64 * wide if down > 1 else threads * wide)
    places = min(across * down, threads * wide)
    return Patch(min(_power(extent.channels), max(1, threads // places)), places, across, deep, warps)


def _distinct(found: list[Schedule]) -> list[Schedule]:
    return list(dict.fromkeys(found))
