"""Separable convolution in bfloat16: depthwise, activation, pointwise on tiles and activation in one pass.

A tile of a few output rows is filtered in float32, rounded once into a scratch array that stays in the cache, and
multiplied there. x, residual and result are bfloat16 or float32, each by itself. Where all is even, numbers of bfloat16
are read and written in pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from sepconv.kernels.case import Case
from sepconv.kernels.halide import numbers
from sepconv.kernels.halide.conv import pair_filter, tile_rows, tiles
from sepconv.kernels.halide.conv.separable_pipeline import UNROLLED_TAPS
from sepconv.kernels.halide.conv.tile_rows import RowsPlan, Walk
from sepconv.kernels.halide.conv.tiles import Product
from sepconv.kernels.halide.jit.buffers import Buffer
from sepconv.kernels.halide.jit.machine_code import Bound, Chain
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.numbers import PAIRS
from sepconv.kernels.halide.schedule.tiles import TilesSchedule


class FilterSpec(NamedTuple):
    """All that the code of one kernel depends on. Pairs of sizes are (y, x).

    ``numbers``: the kind of x; ``hidden``: that of the scratch array; ``activation``: of the depthwise results.
    """

    channels: int
    multiplier: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    lanes: int
    columns: int
    activation: str
    numbers: str
    hidden: str
    product: Product
    parallel: str = "rows"


def build(spec: FilterSpec) -> tuple[Any, list[Any]]:
    """The pipeline; arguments: those of ``Walk``, x, taps, depthwise bias, packed weights, bias, [residual]."""
    walk, parts = Walk(spec.numbers, spec.channels), numbers.parts(spec.hidden)
    stored, (taps, bias) = spec.channels // parts, pair_filter.params(spec)
    filtered, tap = pair_filter.sums(spec, walk.x, taps, (walk.top, walk.left))

    # One row of the tile after the other; q numbers its pixels. The last vector of channels overlaps the one before.
    vectors, steps = -(-stored // spec.lanes), (walk.width + spec.columns - 1) // spec.columns
    sizes = (spec.lanes, spec.columns, vectors, spec.multiplier, steps, walk.rows)
    place = hl.RDom([hl.Range(0, size) for size in sizes], "place")
    lane, column_in, vector, m, step, row_in = (place[i] for i in range(6))
    column = step * spec.columns + column_in
    place.where(hl.likely(column < walk.width))
    channel = hl.min(vector * spec.lanes, stored - spec.lanes) + lane
    written = pair_filter.written(spec, filtered, bias, [channel, m, column, walk.row(row_in), walk.n])
    hidden, k = hl.Func("hidden"), hl.Var("k")
    hidden[k, walk.q, walk.t, walk.n] = hl.undef(numbers.halide_type(spec.hidden))
    hidden[channel + stored * m, column + walk.width * row_in, walk.t, walk.n] = written
    tile_rows.zeros_behind(spec, hidden)

    out, parameters = tile_rows.finish(spec, walk, hidden)
    fill = hidden.update()
    # Each result has a place of its own, which Halide cannot see; where vectors overlap they hold the same values.
    fill.allow_race_conditions().reorder(lane, column_in, vector, m, step, row_in)
    fill.vectorize(lane).unroll(column_in).never_partition([row_in, vector])
    tile_rows.fill_in_parallel(spec, fill, row_in)
    pair_filter.schedule(spec, filtered.compute_at(hidden, vector), tap)
    return out, [*walk.numbers, walk.x, taps, bias, *parameters]


def plan(case: Case) -> RowsPlan:
    """The kernel and its schedule for such tensors."""
    then, channels, (stride, _, dilation) = case.then, case.x.shape[1], case.geometry
    assert then is not None
    multiplier = case.weight.shape[0] // channels
    kind, hidden = pair_filter.kinds(case.x, tiles.multiplied(PAIRS) if channels % 2 == 0 else tiles.KIND)
    lanes = pair_filter.lanes_of(channels // numbers.parts(hidden))

    def spec(sizes: TilesSchedule) -> FilterSpec:
        height, width = case.kernel_size
        return FilterSpec(
            channels, multiplier, (height, width), (stride[0], stride[1]), (dilation[0], dilation[1]), lanes,
            pair_filter.columns_of(case.y.shape[3], stride[1], width), case.activation, kind, hidden,
            tiles.product(then, channels * multiplier, sizes), sizes.parallel,
        )  # fmt: skip

    return tile_rows.plan(case, channels * multiplier, spec)


def supports(case: Case) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    reason = tiles.unsuitable(case)
    if reason:
        return reason
    x = case.x
    if not case.bound:
        return "the fused kernel on tiles writes to memory that is given"
    if x.dims != 2:
        return f"the fused kernel is for images (N, C, H, W), got {x.dims} spatial dimensions"
    if x.stride[1] != 1:
        return f"the channels of a pixel must lie next to one another, got strides {x.stride}"
    return ""


def slower(case: Case) -> str:
    """Why two kernels, depthwise and pointwise, are faster with such filters; the empty string if they are not."""
    columns = case.kernel_size[1]
    if columns > UNROLLED_TAPS:
        return f"filters wider than {UNROLLED_TAPS} columns are faster in the depthwise kernel, got {columns} columns"
    return ""


def describe(case: Case) -> dict[str, Any]:
    """The schedule in words and numbers."""
    found = plan(case)
    spec: FilterSpec = found.spec
    return {
        "unit": tiles.unit(),
        "numbers": [spec.numbers, spec.hidden, spec.product.numbers],
        "rows": [rows for rows, _, _ in found.calls],
        "pixels": found.pixels,
        "wide": spec.product.wide,
        "depth": spec.product.depth,
        "parallel": spec.parallel,
        "depthwise_lanes": spec.lanes,
    }


def pack(found: RowsPlan, weights: Sequence[Tensor | None]) -> list[Buffer]:
    """Copies of the weights as the kernel of this plan takes them."""
    depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias = weights
    assert depthwise_weight is not None
    assert pointwise_weight is not None
    spec: FilterSpec = found.spec
    rows = pointwise_weight.detach().reshape(len(pointwise_weight), -1, spec.multiplier).transpose(1, 2).flatten(1)
    return [*pair_filter.pack(spec, depthwise_weight, depthwise_bias), *tiles.pack(spec.product, rows, pointwise_bias)]


def bind(found: RowsPlan, x: Tensor, packed: list[Buffer], residual: Tensor | None, out: Tensor) -> Bound | Chain:
    """The call that fills ``out`` from what is then in ``x`` and ``residual``: for repeated use of the same memory."""
    return tile_rows.bind("separable_tiles", build, found, (x, residual, out), packed)
