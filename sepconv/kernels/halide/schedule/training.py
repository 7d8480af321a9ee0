"""Loop sizes of stages in training, by rule from sizes and machine, and never from threads: sums stay the same."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sepconv.kernels.halide.schedule import machine as machines
from sepconv.kernels.halide.schedule.depthwise import ceil_div
from sepconv.kernels.halide.schedule.machine import Machine

LEAST_LANES = 4
# Channels of a block in bytes: several cache lines, so that memory is read in long runs.
_BLOCK_BYTES = 512
# Bytes of a strip's tiles that are taken of a small cache, too.
_LEAST_ROOM = 256 * 1024
# Strips of a batch at least, where there are so many rows: a few for each thread.
_STRIPS = 16
_BODY = 128
# What a block takes of the second cache, beside what the product itself brings there. Measured on Granite Rapids: with
# a third of it a pointwise layer of 128 channels at 24 x 24 takes 0.8 of the time of the whole image at once.
_SHARE = 3
# PyTorch's product of bfloat16 brings weights into its own order in every call: dearer than the way to memory.
_WHOLE = 64 << 20
_RUN_BYTES = 64 * 1024


class Strips(NamedTuple):
    """How an image is cut: ``rows`` of results in a strip, ``block`` channels in ``lanes``."""

    rows: int
    block: int
    lanes: int


def lanes_of(channels: int, machine: Machine) -> int:
    """The longest vectors that channels fill; 0 where they are too few."""
    sizes = [lanes for lanes in (16, 8, LEAST_LANES) if lanes <= machine.lanes]
    return next((lanes for lanes in sizes if lanes <= channels), 0)


def block_of(channels: int, lanes: int) -> int:
    """Blocks of whole vectors; the last one is shifted to end with the last channel."""
    most = max(1, min(_BLOCK_BYTES // (4 * lanes), channels // lanes))
    vectors = ceil_div(channels, lanes)
    return lanes * min(range(1, most + 1), key=lambda n: (ceil_div(vectors, n) * (n + 0.5), -n))


def strips(channels: int, batch: int, height: int, row_bytes: int, machine: Machine) -> Strips:
    """``height``: rows of results; ``row_bytes``: in float32 what all tiles hold for one of them, of one channel.

    A quarter of the cache leaves room for what streams by: up to 1.3 times the speed of larger tiles on Granite Rapids.
    Of a small cache half is taken: rows that are read again at the seams of strips cost more (1.2 times on Zen 3).
    """
    lanes = lanes_of(channels, machine)
    block = block_of(channels, lanes)
    room = max(machine.l2_bytes // 4, min(machine.l2_bytes // 2, _LEAST_ROOM))
    most = max(1, room // (row_bytes * block))
    count = max(ceil_div(height, most), min(height, ceil_div(_STRIPS, max(1, batch))))
    return Strips(ceil_div(height, count), block, lanes)


def vectors_summed(block: int, lanes: int, machine: Machine) -> int:
    """Vectors of a block, of whose pixels two sums each stay in registers while these are added up."""
    vectors = block // lanes
    return max(n for n in range(1, machine.registers * 3 // 8 + 1) if vectors % n == 0)


def columns_of(width: int, phases: int, machine: Machine) -> int:
    """Results of one row and phase that registers hold."""
    room = min(machine.registers * 5 // 8 // phases, machine.registers // 2 - 1)
    sizes = [size for size in (1, 2, 3, 4, 6, 7, 8) if size <= max(1, room)]
    return min(sizes, key=lambda size: (ceil_div(width, size) * (size + 0.3), -size))


def unrolled_taps(columns: int) -> int:
    """Most taps in straight-line code."""
    return max(1, _BODY // columns)


def taps_in_registers(kernel: tuple[int, int], machine: Machine) -> tuple[int, int]:
    """The group of a filter's taps whose sums are kept in registers."""
    room = machine.registers * 5 // 8
    across = min(kernel[0], room)
    down = max(1, min(kernel[1], room // across))
    return ceil_div(kernel[0], ceil_div(kernel[0], across)), ceil_div(kernel[1], ceil_div(kernel[1], down))


def forward_block(dtype: torch.dtype, threads: int) -> int:
    """Bytes of a block of what the product reads and writes."""
    return _WHOLE if dtype is torch.bfloat16 else machines.host().l2_bytes // _SHARE * threads


def gradient_block(dtype: torch.dtype, threads: int) -> int:
    """The same of gradients: of what is between the passes."""
    return forward_block(dtype, threads)


def pixels_of_run(channels: int, pixels: int) -> int:
    """Pixels that are read twice while they are in the cache."""
    return max(1, min(_RUN_BYTES // (4 * channels), ceil_div(pixels, _STRIPS)))
