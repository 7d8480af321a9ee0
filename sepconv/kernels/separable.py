"""Separable convolution: depthwise, activation, pointwise and activation in one pass over the image (channels_last).

A tile of a few output rows is filtered into a scratch array that stays in the cache, pixel after pixel, and the
matrix product reads it there: the depthwise result never reaches memory. Pixels are numbered through the tile, so
that narrow images fill the register tiles too. Image size, rows per tile and batch are not compiled in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.kernels import machine, packing, runtime
from sepconv.kernels.activations import activate
from sepconv.kernels.gemm import bias_param, dense, keep_in_registers, packed_param
from sepconv.kernels.layout import array, is_channels_last, like, new_output
from sepconv.kernels.runtime import hl
from sepconv.kernels.schedule_gemm import Tile, separable_schedule

Padding = Sequence[tuple[int, int]]

# Longer filter rows stay loops: unrolled they would take seconds to compile.
_UNROLLED_TAPS = 7


class Spec(NamedTuple):
    """All that the code of one kernel depends on. Pairs are (y, x)."""

    channels: int
    multiplier: int
    out_channels: int
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


class _Inputs:
    """The pipeline's parameters, in the order in which the compiled kernel takes them."""

    def __init__(self, spec: Spec) -> None:
        height, width = spec.kernel_size
        depth = spec.channels * spec.multiplier
        names = ("width", "rows", "first_row", "top", "left")
        self.width, self.rows, self.first_row, self.top, self.left = (hl.Param(hl.Int(32), name) for name in names)
        self.x = self._image("x", 4, spec.channels)  # channel, column, row, image
        self.taps = hl.ImageParam(hl.Float(32), 4, "taps")  # channel, multiplier, column, row
        dense(self.taps, spec.channels, spec.multiplier, width, height)
        self.depthwise_bias = hl.ImageParam(hl.Float(32), 2, "depthwise_bias")  # channel, multiplier
        dense(self.depthwise_bias, spec.channels, spec.multiplier)
        self.weight = packed_param("weight", spec.tile.wide, depth, spec.out_channels)
        self.bias = bias_param("bias", spec.out_channels)
        self.residual = self._image("residual", 4, spec.out_channels)  # like the output: channel, pixel, tile, image
        numbers = [self.width, self.rows, self.first_row, self.top, self.left]
        images = [self.x, self.taps, self.depthwise_bias, self.weight, self.bias]
        self.arguments = numbers + images + [self.residual] * spec.residual

    @staticmethod
    def _image(name: str, dims: int, channels: int) -> Any:
        param = hl.ImageParam(hl.Float(32), dims, name)
        channels_innermost(param, channels)
        return param


def channels_innermost(param: Any, channels: int) -> None:
    for d in range(param.dimensions()):
        param.dim(d).set_min(0)
    param.dim(0).set_stride(1).set_extent(channels)


def build(spec: Spec) -> tuple[Any, list[Any]]:
    """The pipeline; arguments as listed in _Inputs. The output is channel, pixel in tile, tile, image."""
    inputs = _Inputs(spec)
    c, m, o, q, t, n = (hl.Var(name) for name in ("c", "m", "o", "q", "t", "n"))
    column, row = hl.Var("column"), hl.Var("row")

    filtered, tap = _filter(spec, inputs, c, m, column, row, n)
    # One row of the tile after the other; q numbers its pixels. The last vector of channels overlaps the one before.
    lanes = spec.depthwise_lanes
    vectors = -(-spec.channels // lanes)
    steps = (inputs.width + spec.columns - 1) // spec.columns
    place = hl.RDom([hl.Range(0, e) for e in (lanes, spec.columns, vectors, steps, inputs.rows)], "place")
    lane, column_in, vector, step, row_in = (place[i] for i in range(5))
    x, y = step * spec.columns + column_in, inputs.first_row + t * inputs.rows + row_in
    place.where(hl.likely(x < inputs.width))
    channel = hl.min(vector * lanes, spec.channels - lanes) + lane
    hidden = hl.Func("hidden")
    hidden[c, m, q, t, n] = hl.undef(hl.Float(32))
    hidden[channel, m, x + inputs.width * row_in, t, n] = activate(
        filtered[channel, m, x, y, n] + inputs.depthwise_bias[channel, m], spec.depthwise_activation
    )

    k = hl.RDom([hl.Range(0, spec.channels), hl.Range(0, spec.multiplier)], "k")
    wide = spec.tile.wide
    sums, out = hl.Func("sums"), hl.Func("separable")
    sums[o, q, t, n] = hl.f32(0.0)
    sums[o, q, t, n] += inputs.weight[o % wide, k.x + spec.channels * k.y, o // wide] * hidden[k.x, k.y, q, t, n]
    value = sums[o, q, t, n] + inputs.bias[o]
    if spec.residual:
        value = value + inputs.residual[o, q, t, n]
    out[o, q, t, n] = activate(value, spec.activation)

    channels_innermost(out.output_buffer(), spec.out_channels)
    task = _schedule_product(spec, out, sums, (o, q, t, n), k)
    _schedule_filter(spec, out, hidden, filtered, (c, m, column), place, tap, task)
    return out, inputs.arguments


def _filter(spec: Spec, inputs: _Inputs, c: Any, m: Any, column: Any, row: Any, n: Any) -> tuple[Any, Any]:
    """The depthwise sums. Columns outside the image read as zero; rows outside it are left out of the sum."""
    unbounded = hl.Range(hl.Expr(), hl.Expr())
    columns = hl.Range(0, inputs.x.dim(1).extent())
    padded = hl.BoundaryConditions.constant_exterior(inputs.x, hl.f32(0.0), [unbounded, columns, unbounded, unbounded])
    height = inputs.x.dim(2).extent()
    tap = hl.RDom([hl.Range(0, spec.kernel_size[1]), hl.Range(0, spec.kernel_size[0])], "tap")
    y = row * spec.stride[0] + tap.y * spec.dilation[0] - inputs.top
    x = column * spec.stride[1] + tap.x * spec.dilation[1] - inputs.left
    tap.where(y >= 0)
    tap.where(y < height)

    filtered = hl.Func("filtered")
    filtered[c, m, column, row, n] = hl.f32(0.0)
    filtered[c, m, column, row, n] += inputs.taps[c, m, tap.x, tap.y] * padded[c, x, hl.clamp(y, 0, height - 1), n]
    return filtered, tap


def _schedule_product(spec: Spec, out: Any, sums: Any, dims: tuple[Any, ...], k: Any) -> Any:
    """Loops: image, tile, block of output channels, step of pixels; returns the loop that makes one tile."""
    tile, (o, q, t, n) = spec.tile, dims
    block, o_in, step, q_in, task = (hl.Var(name) for name in ("block", "o_in", "step", "q_in", "task"))
    ragged = spec.out_channels % tile.wide
    out.bound(o, 0, spec.out_channels)
    out.split(o, block, o_in, tile.wide, hl.TailStrategy.GuardWithIf if ragged else hl.TailStrategy.RoundUp)
    out.split(q, step, q_in, tile.scalars, hl.TailStrategy.ShiftInwards)
    out.reorder(o_in, q_in, step, block, t, n).vectorize(o_in, tile.lanes).unroll(o_in).unroll(q_in)
    if spec.parallel == "rows":
        out.fuse(t, n, task).parallel(task)
        out.never_partition([task, step, block])
    else:
        out.parallel(block)
        out.never_partition([t, n, step, block])
    sums.compute_at(out, step)
    keep_in_registers(sums, o, q, [k.x, k.y], tile)
    return task if spec.parallel == "rows" else t


def _schedule_filter(
    spec: Spec, out: Any, hidden: Any, filtered: Any, dims: tuple[Any, ...], place: Any, tap: Any, task: Any
) -> None:
    """A few neighbouring pixels at once, whose overlapping taps are loaded once; channels in vectors inside them."""
    c, m, column = dims
    lane, column_in, vector, step, row_in = (place[i] for i in range(5))
    hidden.compute_at(out, task)
    fill = hidden.update()
    # Each result has a place of its own, which Halide cannot see; where vectors overlap they hold the same values.
    fill.allow_race_conditions().reorder(lane, column_in, vector, m, step, row_in)
    fill.vectorize(lane).unroll(column_in).never_partition([row_in, vector])
    if spec.parallel == "channels":
        fill.parallel(row_in)

    filtered.compute_at(hidden, vector).bound_extent(c, spec.depthwise_lanes).bound_extent(column, spec.columns)
    filtered.vectorize(c).unroll(column)
    taps = filtered.update()
    taps.reorder(c, column, tap.x, tap.y).vectorize(c).unroll(column)
    if spec.kernel_size[1] <= _UNROLLED_TAPS:
        taps.unroll(tap.x)


class Plan(NamedTuple):
    """The kernel for one input, and what each call of it computes: (rows per tile, first row, number of tiles)."""

    spec: Spec
    size: tuple[int, int]
    before: tuple[int, int]
    calls: tuple[tuple[int, int, int], ...]


@lru_cache(maxsize=4096)
def plan(
    shape: tuple[int, ...],
    depthwise_shape: tuple[int, ...],
    out_channels: int,
    stride: tuple[int, int],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, int],
    activations: tuple[str, str],
    residual: bool,
    threads: int,
) -> Plan:
    """The kernel and its schedule for an input of such a shape; pairs are depthwise first, then pointwise."""
    images, channels, height, width = shape
    multiplier = depthwise_shape[0] // channels
    kernel_size = (depthwise_shape[2], depthwise_shape[3])
    ends = zip((height, width), padding, kernel_size, stride, dilation, strict=True)
    out_height, out_width = ((size + sum(pads) - d * (k - 1) - 1) // s + 1 for size, pads, k, s, d in ends)
    size = (out_height, out_width)
    schedule = separable_schedule(machine.host(), channels, multiplier, out_channels, max(images, 1), size, threads)
    spec = Spec(
        channels, multiplier, out_channels, kernel_size, stride, dilation, schedule.tile, schedule.columns,
        schedule.depthwise_lanes, schedule.parallel, *activations, residual,
    )  # fmt: skip
    tiles, left = divmod(size[0], schedule.rows)
    calls = [(schedule.rows, 0, tiles)] + [(left, tiles * schedule.rows, 1)] * (left > 0)
    return Plan(spec, size, (padding[0][0], padding[1][0]), tuple(calls))


def plan_for(
    x: Tensor,
    depthwise_weight: Tensor,
    depthwise_activation: str,
    pointwise_weight: Tensor,
    activation: str,
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    residual: bool = False,
) -> Plan:
    """:func:`plan` for tensors."""
    return plan(
        x.shape,
        depthwise_weight.shape,
        pointwise_weight.shape[0],
        (stride[0], stride[1]),
        ((padding[0][0], padding[0][1]), (padding[1][0], padding[1][1])),
        (dilation[0], dilation[1]),
        (depthwise_activation, activation),
        residual,
        torch.get_num_threads(),
    )


def supports(
    x: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    depthwise_activation: str,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    activation: str,
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    residual: Tensor | None = None,
) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    given = (x, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, residual)
    reason = runtime.missing() or runtime.unsuitable(*[tensor for tensor in given if tensor is not None])
    if reason:
        return reason
    if x.dim() != 4:
        return f"the fused kernel is for images (N, C, H, W), got {x.dim() - 2} spatial dimensions"
    if not is_channels_last(x):
        return "contiguous layout: the fused kernel reads channels_last images only"
    if x.stride(1) != 1:
        return f"the channels of a pixel must lie next to one another, got strides {x.stride()}"
    return ""


def slower(
    x: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    depthwise_activation: str,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    activation: str,
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    residual: Tensor | None = None,
) -> str:
    """Why PyTorch's kernels are the faster ones here; the empty string if they are not."""
    return ""


def describe(
    x: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    depthwise_activation: str,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    activation: str,
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    residual: Tensor | None = None,
) -> dict[str, Any]:
    """The schedule that ``forward`` uses for these arguments."""
    found = plan_for(
        x, depthwise_weight, depthwise_activation, pointwise_weight, activation, stride, padding, dilation,
        residual is not None,
    )  # fmt: skip
    spec = found.spec
    rows = [rows for rows, _, _ in found.calls]
    return {
        **spec.tile._asdict(),
        "rows": rows,
        "columns": spec.columns,
        "depthwise_lanes": spec.depthwise_lanes,
        "parallel": spec.parallel,
    }


def pack(
    found: Plan,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
) -> list[Any]:
    """Copies of the weights as the kernel of this plan takes them."""
    multiplier = found.spec.multiplier
    tensors = (
        _pack_taps(depthwise_weight, multiplier),
        _pack_taps(packing.pack_bias(depthwise_bias, depthwise_weight), multiplier),
        packing.pack(pointwise_weight, found.spec.tile.wide, multiplier),
        packing.pack_bias(pointwise_bias, pointwise_weight),
    )
    return [runtime.buffer(tensor) for tensor in tensors]


def _pack_taps(weight: Tensor, multiplier: int) -> Tensor:
    """(C*M, 1, kH, kW) -> (kH, kW, M, C); a bias (C*M,) -> (M, C)."""
    filters = weight.detach().reshape(-1, multiplier, *weight.shape[2:])
    return filters.movedim((0, 1), (-1, -2)).clone(memory_format=torch.contiguous_format)


def bind(found: Plan, x: Tensor, packed: list[Any], residual: Tensor | None, out: Tensor) -> Callable[[], None]:
    """The call that fills ``out`` from what is then in ``x`` and ``residual``: for repeated use of the same memory.

    ``found`` comes from :func:`plan`, ``packed`` from :func:`pack`, ``out`` is ``new_output(x, O, found.size)``.
    """
    if not out.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"separable.bind: out must be channels_last without gaps, got strides {out.stride()}")
    kernel = runtime.compiled(("separable", found.spec), lambda: build(found.spec))
    images = [out] if residual is None else [like(residual, out), out]
    inputs = [*found.before, hl.Buffer(array(x).transpose(0, 2, 3, 1)), *packed]
    views = [array(image).transpose(0, 2, 3, 1) for image in images]
    calls = [
        partial(kernel, found.size[1], rows, first, *inputs, *[_tiles(view, rows, first, tiles) for view in views])
        for rows, first, tiles in found.calls
    ]
    return calls[0] if len(calls) == 1 else partial(_one_after_the_other, calls)


def _one_after_the_other(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _tiles(image: Any, rows: int, first: int, tiles: int) -> Any:
    """(N, Ho, Wo, O) -> image, tile, pixel in tile, channel."""
    images, _, width, channels = image.shape
    part = image[:, first : first + tiles * rows]
    return hl.Buffer(part.reshape(images, tiles, rows * width, channels))


def forward(
    x: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    depthwise_activation: str,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    activation: str,
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    residual: Tensor | None = None,
) -> Tensor:
    """Depthwise, then 1x1 convolution, with the activations and the residual of ``sepconv.separable_conv2d``.

    Shape:
        x: (N, C, H, W)    depthwise_weight: (C*M, 1, kH, kW)    pointwise_weight: (O, C*M, 1, 1)
        residual: (N, O, Ho, Wo)    ->    (N, O, Ho, Wo)
    """
    found = plan_for(
        x, depthwise_weight, depthwise_activation, pointwise_weight, activation, stride, padding, dilation,
        residual is not None,
    )  # fmt: skip
    out = new_output(x, pointwise_weight.shape[0], found.size)
    if out.numel():
        weights = (depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias)
        variant = ("separable", found.spec.tile.wide, depthwise_weight.shape, pointwise_weight.shape)
        packed = packing.remembered(weights, variant, lambda: pack(found, *weights))
        bind(found, x, packed, residual, out)()
    return out
