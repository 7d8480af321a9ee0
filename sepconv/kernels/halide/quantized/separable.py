"""Separable convolution of bytes in one pass: depthwise, quantised to bytes, then the product (channels_last).

A few output rows are filtered into a scratch array that stays in the cache, pixel after pixel, and the product reads
them there. Image size, rows per tile and batch are not compiled in.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

from torch import Tensor

from sepconv.kernels.case import Case
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.buffers import Buffer, check_pixels, pixels
from sepconv.kernels.halide.jit.machine_code import Bound, Chain
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.quantized import epilogue, filters, product, tiling
from sepconv.kernels.halide.quantized.depthwise import channels_inside
from sepconv.kernels.halide.quantized.epilogue import Constants, Ending
from sepconv.kernels.halide.quantized.filters import Filtered, FilterSpec8
from sepconv.kernels.halide.quantized.product import ByteProduct
from sepconv.kernels.halide.quantized.tiling import RowTiles, Size
from sepconv.kernels.halide.schedule.quantized import SEPARABLE_PIXELS


class SeparableSpec8(NamedTuple):
    """All that the code of one kernel depends on."""

    filter: FilterSpec8
    between: Ending
    product: ByteProduct
    epilogue: Ending


class SeparablePlan8(NamedTuple):
    """The kernel for one input; ``before``: padding (top, left)."""

    spec: SeparableSpec8
    width: int
    before: tuple[int, int]
    calls: tuple[RowTiles, ...]

    @property
    def variant(self) -> tuple[FilterSpec8, ByteProduct, tuple[Ending, Ending]]:
        """What packed weights depend on besides their numbers."""
        return self.spec.filter, self.spec.product, (self.spec.between, self.spec.epilogue)


def build(spec: SeparableSpec8) -> tuple[Any, list[Any]]:
    """The pipeline; arguments: width, groups of rows per tile, first group, tiles per thread, top and left padding, x,
    filters, weights, bias, scale and numbers of both, [residual]. The output is channel, pixel in tile, tile, image."""
    names = ("width", "parts", "first", "share", "top", "left")
    width, parts, first, share, top, left = (hl.Param(hl.Int(32), name) for name in names)
    given, multiply = spec.filter, spec.product
    x = channels_inside(hl.ImageParam(hl.UInt(8), 4, "x"), given.channels // given.multiplier)
    taps, weight = filters.weight_param(given, "taps"), product.weight_param(multiply)
    inner, outer = Constants(given.channels, "depthwise_"), Constants(multiply.outputs)
    stages = filters.filtered(given, x, [taps, inner.bias], (top, left), inner.byte("x_zero"))
    at = [hl.Var(name) for name in ("o", "q", "t", "n")]
    hidden, place = _hidden(spec, stages, inner, (width, parts, first), at[1:])

    sums, k = product.sums_of(multiply, hidden, weight, at, outer.bias)
    arguments, residual = [x, taps, weight, *inner.parameters, *outer.parameters], None
    if spec.epilogue.residual:
        added = hl.ImageParam(epilogue.halide_type(spec.epilogue.residual), 4, "residual")
        arguments.append(channels_inside(added, multiply.outputs))
        residual = added[at]
    out = hl.Func("separable8")
    whole = product.whole_sums(multiply, sums, at, outer.bias)
    out[at] = epilogue.finished(spec.epilogue, whole, at[0], outer, residual)
    channels_inside(out.output_buffer(), multiply.outputs)

    task = _schedule_product(spec, share, out, sums, k)
    hidden.compute_at(out, task)
    _schedule_hidden(spec, hidden, place, stages)
    return out, [width, parts, first, share, top, left, *arguments]


def _hidden(spec: SeparableSpec8, stages: Filtered, inner: Constants, walk: tuple[Any, ...], at: list[Any]) -> Any:
    """The bytes between the two convolutions, ``hidden[channel, pixel in tile, tile, image]``, and the loops that make
    them. The last vectors of channels and columns overlap those before; rows below the image are made and not read."""
    (width, parts, first), (q, t, n), given, tile = walk, at, spec.filter, spec.filter.tile
    vectors, steps = -(-given.channels // tile.block), (width + tile.columns - 1) // tile.columns
    extents = (tile.lanes, tile.columns, tile.rows, steps, tile.block // tile.lanes, vectors, parts)
    place = hl.RDom([hl.Range(0, extent) for extent in extents], "place")
    lane, column_in, within, step, vector, block, part_in = (place[i] for i in range(7))
    channel = hl.min(block * tile.block, given.channels - tile.block) + vector * tile.lanes + lane
    column = hl.min(step * tile.columns, width - tile.columns) + column_in
    part = first + t * parts + part_in
    k, hidden = hl.Var("k"), hl.Func("hidden")
    hidden[k, q, t, n] = hl.undef(spec.product.row_type)
    made = epilogue.finished(spec.between, stages.sums[channel, column, within, part, n], channel, inner)
    hidden[channel, column + width * (part_in * tile.rows + within), t, n] = product.in_row(spec.product.row_type, made)
    return hidden, place


def _schedule_product(spec: SeparableSpec8, share: Any, out: Any, sums: Any, k: Any) -> Any:
    """Loops: tile, block of output channels, step of pixels; returns the loop that makes one tile."""
    multiply, (o, q, t, n) = spec.product, out.args()
    block, o_in, step, q_in, task = (hl.Var(name) for name in ("block", "o_in", "step", "q_in", "task"))
    ragged = multiply.outputs % multiply.wide
    out.bound(o, 0, multiply.outputs)
    out.split(o, block, o_in, multiply.wide, hl.TailStrategy.GuardWithIf if ragged else hl.TailStrategy.RoundUp)
    out.split(q, step, q_in, multiply.tall, hl.TailStrategy.ShiftInwards)
    out.reorder(o_in, q_in, step, block, t, n).fuse(t, n, task).never_partition([task, step, block])
    out.vectorize(o_in, product.stored_together(multiply, spec.epilogue.out))
    runtime.share(out, task, share)
    product.arrange(multiply, sums.compute_at(out, step), k, [o, q])
    return task


def _schedule_hidden(spec: SeparableSpec8, hidden: Any, place: Any, stages: Filtered) -> None:
    lane, column_in, within, step, vector, block, part_in = (place[i] for i in range(7))
    hidden.bound_extent(hidden.args()[0], max(spec.product.whole, spec.filter.channels))
    fill = hidden.update()
    # Each result has a place of its own, which Halide cannot see; where vectors overlap they hold the same values.
    fill.allow_race_conditions().reorder(lane, column_in, within, step, vector, block, part_in)
    fill.vectorize(lane).unroll(column_in).unroll(within).never_partition([step, vector, block, part_in])
    stages.sums.compute_at(hidden, step)
    stages.beside.compute_at(hidden, block)
    filters.arrange(spec.filter, stages)


def plan(case: Case) -> SeparablePlan8:
    """The kernel and its schedule for such tensors."""
    return planned(case, product.best(case.weight.shape[0], prod(case.y.shape[2:])))


def planned(case: Case, way: str) -> SeparablePlan8:
    """The kernel that multiplies in one of ``product.ways()``."""
    then = case.then
    assert then is not None
    given = filters.spec(case.first, product.QUADS if way == product.TILES else way)
    size, outputs = Size(then.y.shape[0], *then.y.shape[2:]), then.y.shape[1]
    calls = tiling.cut(size, given.tile.rows, SEPARABLE_PIXELS, case.threads)
    multiply = product.product(way, given.channels, outputs, min(call.rows for call in calls) * size.width)
    spec = SeparableSpec8(given, Ending.in_the_middle(case.activation), multiply, Ending.of(then))
    (top, _), (before, _) = case.geometry.padding
    return SeparablePlan8(spec, size.width, (top, before), calls)


def supports(case: Case) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    then = case.then
    assert then is not None
    return epilogue.unsuitable(case) or epilogue.unsuitable(then) or epilogue.no_pixels(case)


def slower(case: Case) -> str:
    """Never: what lies between is never written to memory."""
    return ""


def describe(case: Case) -> dict[str, Any]:
    """The schedule in words and numbers."""
    found = plan(case)
    return {
        "layout": "channels_last",
        **product.describe(found.spec.product),
        "rows": [call.rows for call in found.calls],
        "depthwise_lanes": found.spec.filter.tile.lanes,
    }


def pack(found: SeparablePlan8, weights: Sequence[Tensor | None]) -> list[Buffer]:
    """Copies of filters, weights, biases, scales and numbers as the kernel takes them."""
    spec, (first, second) = found.spec, (epilogue.constants(weights[half::2]) for half in (0, 1))
    packed = [filters.pack(spec.filter, first.weight), product.pack(spec.product, second.weight)]
    less = product.less(spec.product.way)
    return [*packed, *epilogue.pack(spec.between, first, less), *epilogue.pack(spec.epilogue, second, less)]


def bind(found: SeparablePlan8, x: Tensor, packed: list[Buffer], residual: Tensor | None, out: Tensor) -> Bound | Chain:
    """The call that fills ``out`` from what is then in ``x`` and ``residual``: for repeated use of the same memory."""
    images = check_pixels("separable.bind", out, residual)
    spec = found.spec
    kernel = product.compiled(spec.product, ("separable8", spec), lambda: build(spec))
    calls = []
    for call in found.calls:
        views = [tiling.view(image, call) for image in images]
        numbers = (found.width, call.parts, call.first, call.share, *found.before)
        calls.append(kernel.bind(*numbers, pixels(x), *packed, *views))
    return calls[0] if len(calls) == 1 else Chain(calls)


prepare = epilogue.prepare
