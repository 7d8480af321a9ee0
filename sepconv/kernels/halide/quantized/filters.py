"""Depthwise sums of bytes: each channel under its own filter, exact in 32 bits.

Rows of the image that one sum reads are laid side by side, four bytes of a channel (two numbers of 16 bits) at a time,
so that one instruction multiplies and adds them all (``product`` says which). A few output rows share what is laid side
by side, as far as they read the same rows; their filters are packed once for each place among these rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.kernels.case import Case
from sepconv.kernels.halide.jit.buffers import Buffer, buffer
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.quantized import product
from sepconv.kernels.halide.schedule import machine

_MOST_ROWS = 4
# Time for a channel in vectors of so many, over that in the widest: narrower ones take more instructions.
_VECTOR_COST = {4: 1.0, 2: 1.15, 1: 1.5}
# Sums that are kept in registers; their filters and what they multiply need some, too.
_SUMS = 12
# Longer filters stay loops: in straight-line code they would take seconds to compile.
_MOST_TAPS = 32


class FilterSpec8(NamedTuple):
    """What the code depends on. Pairs are (y, x).

    Attributes:
        channels: of the result, with all multiples.
        group: rows that one instruction adds up.
        groups: so many hold the rows that are read.
        rows: output rows that share them.
        apart: rows between two of them.
        block: channels for which rows are laid side by side before they are filtered.
        lanes: channels that are filtered together.
        columns: neighbouring pixels that are filtered together.
    """

    channels: int
    multiplier: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    group: int
    groups: int
    rows: int
    apart: int
    block: int
    lanes: int
    columns: int

    @property
    def step(self) -> int:
        """Rows of the image between two groups of output rows."""
        return self.rows * self.stride[0]

    @property
    def number_type(self) -> Any:
        return hl.UInt(8) if self.group == 4 else hl.Int(16)


def spec(case: Case, way: str) -> FilterSpec8:
    """For a depthwise case, multiplied in one of ``product.ways()``."""
    group = 2 if way == product.PAIRS else 4
    channels, (height, width) = case.weight.shape[0], case.kernel_size
    (stride_y, stride_x), (dilation_y, dilation_x) = case.geometry.stride, case.geometry.dilation
    size = case.y.shape[2:]
    groups = -(-height // group)
    rows = 1 if dilation_y > 1 else min(_MOST_ROWS, (groups * group - height) // stride_y + 1, size[0])
    lanes, block = _channels(channels, group, groups * (size[1] * stride_x + width))
    sums = max(1, lanes // machine.host().lanes) * rows
    columns = max(1, min(_SUMS * machine.host().registers // 32 // sums, 4, size[1]))
    return FilterSpec8(
        channels, channels // case.x.shape[1], (height, width), (stride_y, stride_x), (dilation_y, dilation_x), group,
        groups, rows, dilation_y if rows == 1 else 1, block, lanes, columns,
    )  # fmt: skip


def _channels(channels: int, group: int, columns: int) -> tuple[int, int]:
    """Channels in a vector of bytes, and in a block whose rows stay in the cache; the last block is shifted to end with
    the last channel."""
    whole = machine.host().lanes
    choices = [(-(-channels // (n * whole)) * n * cost, n * whole) for n, cost in _VECTOR_COST.items()]
    lanes = min([choice for choice in choices if choice[1] <= channels], default=(0.0, _power_of_two(channels)))[1]
    vectors = -(-channels // lanes)
    most = max(1, min(channels // lanes, machine.host().l1_bytes * 5 // 8 // (4 * lanes * columns)))
    many = min(range(1, most + 1), key=lambda n: (-(-vectors // n) * n, -n))
    return lanes, many * lanes


def _power_of_two(value: int) -> int:
    return 1 << (value.bit_length() - 1)


def weight_param(given: FilterSpec8, name: str = "weight") -> Any:
    """Row of a group, channel, column, group, output row."""
    weight = hl.ImageParam(hl.Int(8) if given.group == 4 else hl.Int(16), 5, name)
    stride = 1
    for d, extent in enumerate((given.group, given.channels, given.kernel_size[1], given.groups, given.rows)):
        weight.dim(d).set_min(0).set_extent(extent).set_stride(stride)
        stride *= extent
    return weight


class Filtered(NamedTuple):
    """The stages: ``sums[c, x, y % rows, y // rows, n]`` of ``beside[row of a group, c, x, group, y // rows, n]``."""

    sums: Any
    beside: Any
    tap: Any


def filtered(given: FilterSpec8, x: Any, weights: list[Any], before: tuple[Any, Any], zero: Any) -> Filtered:
    """``x``: channel, column, row, image; ``weights``: filters and bias; ``before``: rows and columns of padding, which
    reads as ``zero``."""
    weight, bias = weights
    i, c, column, j, within, part, n = (hl.Var(name) for name in ("i", "c", "column", "j", "within", "part", "n"))
    beside, sums = hl.Func("beside"), hl.Func("filtered")
    row = part * given.step + (j * given.group + i) * given.apart - before[0]
    at, (width, height) = column - before[1], (x.dim(1).extent(), x.dim(2).extent())
    value = x[c // given.multiplier, hl.clamp(hl.likely(at), 0, width - 1), hl.clamp(row, 0, height - 1), n]
    inside = hl.select((row >= 0) & (row < height), value, zero)
    beside[i, c, column, j, part, n] = hl.cast(
        given.number_type, hl.select((at >= 0) & (at < width), hl.likely(inside), zero)
    )

    tap = hl.RDom([hl.Range(0, extent) for extent in (given.group, given.kernel_size[1], given.groups)], "tap")
    read = beside[tap.x, c, column * given.stride[1] + tap.y * given.dilation[1], tap.z, part, n]
    sums[c, column, within, part, n] = bias[c]
    sums[c, column, within, part, n] += hl.cast(hl.Int(32), read) * hl.cast(
        hl.Int(32), weight[tap.x, c, tap.y, tap.z, within]
    )
    return Filtered(sums, beside, tap)


def schedule(given: FilterSpec8, stages: Filtered) -> None:
    """What lies inside of the stages, after compute_at."""
    sums, tap = stages.sums, stages.tap
    c, column, within, part, n = sums.args()
    for stage in (sums, stages.beside):
        stage.bound_extent(part, 1).bound_extent(n, 1)
    lanes = min(given.lanes, machine.host().lanes)
    sums.store_in(hl.MemoryType.Register)
    sums.bound_extent(c, given.lanes).bound_extent(column, given.columns).bound_extent(within, given.rows)
    sums.vectorize(c, lanes).unroll(c).unroll(column).unroll(within)
    vector, lane = hl.Var("vector"), hl.Var("lane")
    update = sums.update().split(c, vector, lane, lanes)
    update.reorder(tap.x, lane, vector, column, within, tap.y, tap.z).atomic().vectorize(tap.x).vectorize(lane)
    update.unroll(vector).unroll(column).unroll(within)
    if given.kernel_size[1] * given.groups <= _MOST_TAPS:
        update.unroll(tap.y).unroll(tap.z)

    beside = stages.beside
    i, c, column, j, part, n = beside.args()
    beside.bound(i, 0, given.group).bound_extent(c, given.block).bound(j, 0, given.groups)
    beside.reorder_storage(i, c, column, j, part, n).reorder(i, c, column, j, part, n)
    beside.unroll(i).vectorize(c, given.lanes).never_partition_all().partition(column, hl.Partition.Always)


def pack(given: FilterSpec8, weight: Tensor) -> Buffer:
    """``weight``: (C*M, 1, kH, kW), int8."""
    height, width = given.kernel_size
    filters = weight.detach().reshape(given.channels, height, width)
    slots = weight.new_zeros(given.rows, given.groups * given.group, width, given.channels)
    for within in range(given.rows):
        first = within * given.stride[0]
        slots[within, first : first + height] = filters.permute(1, 2, 0)
    packed = slots.view(given.rows, given.groups, given.group, width, given.channels).permute(0, 1, 3, 4, 2)
    return buffer(packed.to(torch.int8 if given.group == 4 else torch.int16).contiguous())
