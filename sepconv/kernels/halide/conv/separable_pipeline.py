"""The pipeline of the separable kernel: what it computes, and how its loops are arranged.

A tile of a few output rows is filtered into a scratch array that stays in the cache, pixel after pixel, and the
matrix product reads it there: the depthwise result never reaches memory. Pixels are numbered through the tile, so
that narrow images fill the register tiles too. Image size, rows per tile and batch are not compiled in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sepconv.kernels.halide.activated import activated
from sepconv.kernels.halide.conv.gemm import (
    bias_param,
    dense,
    in_streams,
    in_terms,
    keep_in_registers,
    keep_terms,
    loaded_together,
    packed,
    packed_param,
    split_outputs,
)
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.schedule.gemm import Tile

# Longer filter rows stay loops: unrolled they would take seconds to compile.
UNROLLED_TAPS = 7
_FEW = 128
# Filters of so many taps stay in registers, of 32, while one vector of channels of a row is computed.
_HELD_TAPS = 9


class SeparableSpec(NamedTuple):
    """All that the code of one kernel depends on. Pairs are (y, x).

    ``channels`` are those of :func:`known`, and up to the weights where they are None; ``room`` is that of
    :func:`room`; ``out_channels`` are None where their blocks are whole.
    """

    channels: int | None
    room: int
    multiplier: int
    out_channels: int | None
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    tile: Tile
    columns: int
    depthwise_lanes: int
    parallel: str
    depthwise_activation: str
    activation: str
    residual: bool
    streams: int = 1
    copied: int = 0


def room(channels: int) -> int:
    """Numbers from one pixel of the scratch array to the next; a few more than channels, the same for many of these.

    So one kernel serves them all, and still knows its addresses. Never a multiple of a large power of two, at which
    pixels would displace each other from the cache; few channels have no room to waste.
    """
    step = 128 if channels > 256 else 64
    return channels if channels <= _FEW else -(-(channels - 16) // step) * step + 16


def known(channels: int, streams: int) -> int | None:
    """Channels that a kernel is compiled for: few of them, or those that it reads in several runs; else None."""
    return channels if channels <= _FEW or streams > 1 else None


class _Inputs:
    """The pipeline's parameters, in the order in which the compiled kernel takes them."""

    def __init__(self, spec: SeparableSpec) -> None:
        height, width = spec.kernel_size
        depth = None if spec.channels is None else spec.channels * spec.multiplier
        names = ("width", "rows", "first_row", "share", "top", "left")
        self.width, self.rows, self.first_row, self.share, self.top, self.left = (
            hl.Param(hl.Int(32), name) for name in names
        )
        self.x = self._image("x", 4, spec.channels)  # channel, column, row, image
        self.taps = hl.ImageParam(hl.Float(32), 4, "taps")  # channel, multiplier, column, row
        dense(self.taps, spec.channels, spec.multiplier, width, height)
        self.channels = spec.channels or self.taps.dim(0).extent()
        self.depthwise_bias = hl.ImageParam(hl.Float(32), 2, "depthwise_bias")  # channel, multiplier
        dense(self.depthwise_bias, spec.channels, spec.multiplier)
        self.weight = packed_param("weight", *spec.tile.panels, depth, spec.out_channels)
        self.bias = bias_param("bias", spec.out_channels)
        self.residual = self._image("residual", 4, spec.out_channels)  # like the output: channel, pixel, tile, image
        numbers = [self.width, self.rows, self.first_row, self.share, self.top, self.left]
        images = [self.x, self.taps, self.depthwise_bias, self.weight, self.bias]
        self.arguments = numbers + images + [self.residual] * spec.residual

    @staticmethod
    def _image(name: str, dims: int, channels: int | None) -> Any:
        param = hl.ImageParam(hl.Float(32), dims, name)
        _channels_innermost(param, channels)
        return param


def _channels_innermost(param: Any, channels: int | None) -> None:
    for d in range(param.dimensions()):
        param.dim(d).set_min(0)
    param.dim(0).set_stride(1)
    if channels is not None:
        param.dim(0).set_extent(channels)


def build(spec: SeparableSpec) -> tuple[Any, list[Any]]:
    """The pipeline; arguments as listed in _Inputs. The output is channel, pixel in tile, tile, image."""
    inputs = _Inputs(spec)
    c, m, o, q, t, n = (hl.Var(name) for name in ("c", "m", "o", "q", "t", "n"))
    column, row = hl.Var("column"), hl.Var("row")

    padded = _padded(inputs) if spec.copied else None
    filtered, tap = _filter(spec, inputs, padded, (c, m, column, row, n))
    # One row of the tile after the other; q numbers its pixels. The last vector of channels overlaps the one before.
    lanes = spec.depthwise_lanes
    vectors = (inputs.channels + lanes - 1) // lanes
    steps = (inputs.width + spec.columns - 1) // spec.columns
    walk = (steps, vectors) if spec.copied else (vectors, steps)
    place = hl.RDom([hl.Range(0, e) for e in (lanes, spec.columns, *walk, inputs.rows)], "place")
    lane, column_in, vector, step, row_in = _walk(spec, place)
    x, y = step * spec.columns + column_in, inputs.first_row + t * inputs.rows + row_in
    place.where(hl.likely(x < inputs.width))
    channel = hl.min(vector * lanes, inputs.channels - lanes) + lane
    hidden = hl.Func("hidden")
    hidden[c, m, q, t, n] = hl.undef(hl.Float(32))
    hidden[channel, m, x + inputs.width * row_in, t, n] = activated(
        spec.depthwise_activation, filtered[channel, m, x, y, n] + inputs.depthwise_bias[channel, m]
    )

    by_lane = spec.tile.terms > 1
    if by_lane:
        k, channel = in_terms(inputs.channels, spec.tile.terms, spec.multiplier)
    else:
        k, channel = in_streams(inputs.channels, spec.streams, spec.multiplier)
    sums, out = hl.Func("sums"), hl.Func("separable")
    sums[o, q, t, n] = hl.f32(0.0)
    weight = packed(inputs.weight, spec.tile.panels[0], o, channel + inputs.channels * k[2])
    scalars = loaded_together(hidden, [c, m, q, t, n]) if by_lane else hidden
    sums[o, q, t, n] += weight * scalars[channel, k[2], q, t, n]
    value = sums[o, q, t, n] + inputs.bias[o]
    if spec.residual:
        value = value + inputs.residual[o, q, t, n]
    out[o, q, t, n] = activated(spec.activation, value)

    _channels_innermost(out.output_buffer(), spec.out_channels)
    task = _schedule_product(spec, inputs.share, out, sums, (o, q, t, n), k)
    if by_lane:
        keep_terms(scalars, q, sums, k[1], spec.tile)
    if padded is not None:
        _schedule_padded(spec, padded.compute_at(out, task))
    _schedule_filter(spec, out, hidden, filtered, (c, m, column), place, tap, task)
    return out, inputs.arguments


def _walk(spec: SeparableSpec, place: Any) -> tuple[Any, ...]:
    """Lane, column, vector, step of columns and row of a depthwise result, by the order in which they are computed."""
    lane, column_in, first, second, row_in = (place[i] for i in range(5))
    return lane, column_in, *((second, first) if spec.copied else (first, second)), row_in


def _padded(inputs: _Inputs) -> Any:
    """``padded[c, column, row, n] = x[c, column - left, row - top, n]``, zeros around the image."""
    c, column, row, n = (hl.Var(name) for name in ("c", "column", "row", "n"))
    unbounded, image = hl.Range(hl.Expr(), hl.Expr()), [hl.Range(0, inputs.x.dim(d).extent()) for d in (1, 2)]
    outside = hl.BoundaryConditions.constant_exterior(inputs.x, hl.f32(0.0), [unbounded, *image, unbounded])
    padded = hl.Func("padded")
    padded[c, column, row, n] = outside[c, column - inputs.left, row - inputs.top, n]
    return padded


def _schedule_padded(spec: SeparableSpec, padded: Any) -> None:
    c, part = padded.args()[0], hl.Var("part")
    padded.bound_storage(c, spec.room).split(c, part, c, spec.copied * spec.depthwise_lanes, hl.TailStrategy.RoundUp)
    padded.vectorize(c, spec.depthwise_lanes).unroll(c)


def _filter(spec: SeparableSpec, inputs: _Inputs, padded: Any, dims: tuple[Any, ...]) -> tuple[Any, Any]:
    """The depthwise sums, of ``padded`` where the input is copied.

    Else columns outside the image read as zero; rows outside it are left out of the sum.
    """
    c, m, column, row, n = dims
    filtered = hl.Func("filtered")
    filtered[dims] = hl.f32(0.0)
    tap = hl.RDom([hl.Range(0, spec.kernel_size[1]), hl.Range(0, spec.kernel_size[0])], "tap")
    if padded is not None:
        y, x = row * spec.stride[0] + tap.y * spec.dilation[0], column * spec.stride[1] + tap.x * spec.dilation[1]
        filtered[dims] += inputs.taps[c, m, tap.x, tap.y] * padded[c, x, y, n]
        return filtered, tap
    unbounded = hl.Range(hl.Expr(), hl.Expr())
    columns = hl.Range(0, inputs.x.dim(1).extent())
    padded = hl.BoundaryConditions.constant_exterior(inputs.x, hl.f32(0.0), [unbounded, columns, unbounded, unbounded])
    height = inputs.x.dim(2).extent()
    y = row * spec.stride[0] + tap.y * spec.dilation[0] - inputs.top
    x = column * spec.stride[1] + tap.x * spec.dilation[1] - inputs.left
    tap.where(y >= 0)
    tap.where(y < height)
    filtered[dims] += inputs.taps[c, m, tap.x, tap.y] * padded[c, x, hl.clamp(y, 0, height - 1), n]
    return filtered, tap


def _schedule_product(spec: SeparableSpec, share: Any, out: Any, sums: Any, dims: tuple[Any, ...], k: Any) -> Any:
    """Loops: image, tile, block of output channels, step of pixels; returns the loop that makes one tile."""
    tile, (o, q, t, n) = spec.tile, dims
    block, o_in, step, q_in, task = (hl.Var(name) for name in ("block", "o_in", "step", "q_in", "task"))
    split_outputs(out, o, (block, o_in), tile.wide, spec.out_channels)
    out.split(q, step, q_in, tile.scalars, hl.TailStrategy.ShiftInwards)
    out.reorder(o_in, q_in, step, block, t, n).vectorize(o_in, tile.lanes).unroll(o_in).unroll(q_in)
    if spec.parallel == "rows":
        out.fuse(t, n, task).never_partition([task, step, block])
        runtime.share(out, task, share)
    else:
        out.never_partition([t, n, step, block])
        runtime.share(out, block, share)
    sums.compute_at(out, step)
    keep_in_registers(sums, o, q, [k[0], k[1], k[2]], tile)
    sums.update().unroll(k[0])
    return task if spec.parallel == "rows" else t


def _schedule_filter(
    spec: SeparableSpec, out: Any, hidden: Any, filtered: Any, dims: tuple[Any, ...], place: Any, tap: Any, task: Any
) -> None:
    """A few neighbouring pixels at once, whose overlapping taps are loaded once; channels in vectors inside them."""
    c, m, column = dims
    lane, column_in, vector, step, row_in = _walk(spec, place)
    hidden.compute_at(out, task).bound_storage(c, spec.room)
    fill = hidden.update()
    # Each result has a place of its own, which Halide cannot see; where vectors overlap they hold the same values.
    walk = (step, vector, m) if spec.copied else (vector, m, step)
    fill.allow_race_conditions().reorder(lane, column_in, *walk, row_in)
    fill.vectorize(lane).unroll(column_in).never_partition([row_in, vector])
    if spec.parallel == "channels":
        runtime.parallel(fill, row_in)

    filtered.compute_at(hidden, walk[0]).bound_extent(c, spec.depthwise_lanes).bound_extent(column, spec.columns)
    filtered.vectorize(c).unroll(column)
    taps = filtered.update()
    taps.reorder(c, column, tap.x, tap.y).vectorize(c).unroll(column)
    if spec.kernel_size[1] <= UNROLLED_TAPS:
        taps.unroll(tap.x)
    if spec.copied and spec.kernel_size[0] * spec.kernel_size[1] <= _HELD_TAPS:
        taps.unroll(tap.y)
