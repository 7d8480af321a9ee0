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
from sepconv.kernels.halide.schedule import quantized as schedule
from sepconv.kernels.halide.schedule.quantized import FilterTile

# Longer filters stay loops: in straight-line code they would take seconds to compile.
_MOST_TAPS = 32


class FilterSpec8(NamedTuple):
    """What the code depends on. Pairs are (y, x).

    Attributes:
        channels: of the result, with all multiples.
        group: rows that one instruction adds up.
        groups: so many hold the rows that are read.
        apart: rows between two of them.
        vector: channels of one register of sums.
        way: one of ``product.ways()``, without tiles.
    """

    channels: int
    multiplier: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    group: int
    groups: int
    apart: int
    vector: int
    tile: FilterTile
    way: str

    @property
    def step(self) -> int:
        """Rows of the image between two groups of output rows."""
        return self.tile.rows * self.stride[0]

    @property
    def number_type(self) -> Any:
        return product.row_type(self.way)


def spec(case: Case, way: str) -> FilterSpec8:
    """For a depthwise case, multiplied in one of ``product.ways()``."""
    group = 2 if way == product.PAIRS else 4
    channels, (height, width) = case.weight.shape[0], case.kernel_size
    (stride_y, stride_x), (dilation_y, dilation_x) = case.geometry.stride, case.geometry.dilation
    size, groups = (case.y.shape[2], case.y.shape[3]), -(-height // group)
    shared = 1 if dilation_y > 1 else (groups * group - height) // stride_y + 1
    column_bytes = 4 * groups * (size[1] * stride_x + width)
    tile = schedule.filter_tile(machine.host(), channels, size, shared, column_bytes)
    return FilterSpec8(
        channels, channels // case.x.shape[1], (height, width), (stride_y, stride_x), (dilation_y, dilation_x), group,
        groups, dilation_y if tile.rows == 1 else 1, min(tile.lanes, machine.host().lanes), tile, way,
    )  # fmt: skip


def weight_param(given: FilterSpec8, name: str = "weight") -> Any:
    """Row of a group, channel, column, group, output row."""
    weight = hl.ImageParam(hl.Int(8) if given.group == 4 else hl.Int(16), 5, name)
    stride = 1
    for d, extent in enumerate((given.group, given.channels, given.kernel_size[1], given.groups, given.tile.rows)):
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
    beside[i, c, column, j, part, n] = product.in_row(
        given.number_type, hl.select((at >= 0) & (at < width), hl.likely(inside), zero)
    )

    tap = hl.RDom([hl.Range(0, extent) for extent in (given.group, given.kernel_size[1], given.groups)], "tap")
    read = beside[tap.x, c, column * given.stride[1] + tap.y * given.dilation[1], tap.z, part, n]
    sums[c, column, within, part, n] = bias[c]
    sums[c, column, within, part, n] += hl.cast(hl.Int(32), read) * hl.cast(
        hl.Int(32), weight[tap.x, c, tap.y, tap.z, within]
    )
    return Filtered(sums, beside, tap)


def arrange(given: FilterSpec8, stages: Filtered) -> None:
    """What lies inside of the stages, after compute_at."""
    sums, tap = stages.sums, stages.tap
    c, column, within, part, n = sums.args()
    for stage in (sums, stages.beside):
        stage.bound_extent(part, 1).bound_extent(n, 1)
    tile, lanes = given.tile, given.vector
    sums.store_in(hl.MemoryType.Register)
    sums.bound_extent(c, tile.lanes).bound_extent(column, tile.columns).bound_extent(within, tile.rows)
    sums.vectorize(c, lanes).unroll(c).unroll(column).unroll(within)
    vector, lane = hl.Var("vector"), hl.Var("lane")
    update = sums.update().split(c, vector, lane, lanes)
    update.reorder(tap.x, lane, vector, column, within, tap.y, tap.z).atomic().vectorize(tap.x).vectorize(lane)
    update.unroll(vector).unroll(column).unroll(within)
    if given.kernel_size[1] * given.groups <= _MOST_TAPS:
        update.unroll(tap.y).unroll(tap.z)

    beside = stages.beside
    i, c, column, j, part, n = beside.args()
    beside.bound(i, 0, given.group).bound_extent(c, tile.block).bound(j, 0, given.groups)
    beside.reorder_storage(i, c, column, j, part, n).reorder(i, c, column, j, part, n)
    beside.unroll(i).vectorize(c, tile.lanes).never_partition_all().partition(column, hl.Partition.Always)


def pack(given: FilterSpec8, weight: Tensor) -> Buffer:
    """``weight``: (C*M, 1, kH, kW), int8."""
    height, width = given.kernel_size
    filters = weight.detach().reshape(given.channels, height, width)
    slots = weight.new_zeros(given.tile.rows, given.groups * given.group, width, given.channels)
    for within in range(given.tile.rows):
        first = within * given.stride[0]
        slots[within, first : first + height] = filters.permute(1, 2, 0)
    packed = slots.view(given.tile.rows, given.groups, given.group, width, given.channels).permute(0, 1, 3, 4, 2)
    return buffer(packed.to(torch.int8 if given.group == 4 else torch.int16).contiguous())
