"""Normal convolution in bfloat16 on tiles: the windows of a few output rows are copied into the cache, each with taps
and channels in a row, and multiplied there like the pixels of a pointwise one.

x, residual and result are bfloat16 or float32, each by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from sepconv.kernels.case import Case
from sepconv.kernels.halide import numbers
from sepconv.kernels.halide.conv import tile_rows, tiles
from sepconv.kernels.halide.conv.separable_pipeline import UNROLLED_TAPS
from sepconv.kernels.halide.conv.tile_rows import RowsPlan, Walk
from sepconv.kernels.halide.conv.tiles import Product
from sepconv.kernels.halide.jit.buffers import Buffer
from sepconv.kernels.halide.jit.machine_code import Bound, Chain
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.numbers import PAIRS
from sepconv.kernels.halide.schedule import machine
from sepconv.kernels.halide.schedule.gemm import channel_lanes
from sepconv.kernels.halide.schedule.tiles import TilesSchedule
from sepconv.kernels.layout import pixel_step

# Runs of fewer channels take longer to copy than float32 products.
_LEAST_CHANNELS = 8


class WindowsSpec(NamedTuple):
    """All that the code of one kernel depends on. Pairs of sizes are (y, x).

    ``numbers``: the kind of x; ``hidden``: that of the scratch array.
    """

    channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    lanes: int
    numbers: str
    hidden: str
    product: Product
    parallel: str = "rows"


def build(spec: WindowsSpec) -> tuple[Any, list[Any]]:
    """The pipeline; arguments: those of ``Walk``, x, packed weights, bias, [residual]."""
    walk, parts = Walk(spec.numbers, spec.channels), numbers.parts(spec.hidden)
    stored, (height, width) = spec.channels // parts, spec.kernel_size
    sizes = (spec.lanes, -(-stored // spec.lanes), width, height, walk.width, walk.rows)
    place = hl.RDom([hl.Range(0, size) for size in sizes], "place")
    lane, vector, tap_x, tap_y, column, row_in = (place[i] for i in range(6))
    channel = hl.min(vector * spec.lanes, stored - spec.lanes) + lane
    at = [
        column * spec.stride[1] + tap_x * spec.dilation[1] - walk.left,
        walk.row(row_in) * spec.stride[0] + tap_y * spec.dilation[0] - walk.top,
        walk.n,
    ]
    hidden, k = hl.Func("hidden"), hl.Var("k")
    hidden[k, walk.q, walk.t, walk.n] = hl.undef(numbers.halide_type(spec.hidden))
    term, pixel = channel + stored * (tap_x + width * tap_y), column + walk.width * row_in
    hidden[term, pixel, walk.t, walk.n] = _read(spec, walk, channel, at)
    tile_rows.zeros_behind(spec, hidden)

    out, parameters = tile_rows.finish(spec, walk, hidden)
    fill = hidden.update()
    # Each number has a place of its own, which Halide cannot see; where vectors overlap they hold the same.
    fill.allow_race_conditions().reorder(lane, vector, tap_x, tap_y, column, row_in)
    fill.vectorize(lane).never_partition([row_in, tap_y, vector])
    tile_rows.fill_in_parallel(spec, fill, row_in)
    if width <= UNROLLED_TAPS:
        fill.unroll(tap_x)
    return out, [*walk.numbers, walk.x, *parameters]


def _read(spec: WindowsSpec, walk: Walk, channel: Any, at: list[Any]) -> Any:
    """What is stored of x at a column, row and image, zeros around it."""
    unbounded, parts = hl.Range(hl.Expr(), hl.Expr()), numbers.parts(spec.hidden)
    image = [hl.Range(0, walk.x.dim(d).extent()) for d in (1, 2)]
    zero = numbers.zero(spec.numbers)
    padded = hl.BoundaryConditions.constant_exterior(walk.x, zero, [unbounded, *image, unbounded])
    if spec.numbers == spec.hidden:
        return padded[[channel, *at]]
    values = [numbers.read(spec.numbers, padded[[parts * channel + part, *at]]) for part in range(parts)]
    return numbers.write(spec.hidden, *values, quiet=tiles.quiet("", spec.numbers))


def plan(case: Case) -> RowsPlan:
    """The kernel and its schedule for such tensors."""
    channels, (stride, _, dilation), (height, width) = case.x.shape[1], case.geometry, case.kernel_size
    pairs = channels % 2 == 0 and tiles.unit() == "AMX"
    kind, hidden = tiles.kind_of(case.x, pairs=pairs), PAIRS if pairs else tiles.KIND
    lanes, terms = channel_lanes(machine.host(), channels // numbers.parts(hidden)), channels * height * width

    def spec(sizes: TilesSchedule) -> WindowsSpec:
        return WindowsSpec(
            channels, (height, width), (stride[0], stride[1]), (dilation[0], dilation[1]), lanes, kind, hidden,
            tiles.product(case, terms, sizes), sizes.parallel,
        )  # fmt: skip

    return tile_rows.plan(case, terms, spec)


def supports(case: Case) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    reason = tiles.unsuitable(case)
    if reason:
        return reason
    x = case.x
    if not case.bound:
        return "the normal kernel on tiles writes to memory that is given"
    if x.dims != 2 or case.groups > 1:
        return f"the kernel is for images (N, C, H, W) in one group, got {case.groups} of {x.dims} spatial dimensions"
    if x.stride[1] != 1 or not pixel_step(case.result.shape, case.result.stride):
        return f"the kernel reads and writes channels_last images only (strides {x.stride})"
    return ""


def slower(case: Case) -> str:
    """Why products of float32 are faster, in a sentence; the empty string if they are not."""
    if case.x.shape[1] < _LEAST_CHANNELS:
        return f"windows of less than {_LEAST_CHANNELS} channels take longer to copy than to multiply"
    return ""


def describe(case: Case) -> dict[str, Any]:
    """The schedule in words and numbers."""
    found = plan(case)
    spec: WindowsSpec = found.spec
    return {
        "unit": tiles.unit(),
        "numbers": [spec.numbers, spec.hidden, spec.product.numbers],
        "rows": [rows for rows, _, _ in found.calls],
        "pixels": found.pixels,
        "wide": spec.product.wide,
        "depth": spec.product.depth,
        "parallel": spec.parallel,
    }


def pack(found: RowsPlan, weights: Sequence[Tensor | None]) -> list[Buffer]:
    """Copies of weight and bias as the kernel takes them."""
    weight, bias = weights
    assert weight is not None
    return tiles.pack(found.spec.product, weight.detach().permute(0, 2, 3, 1).flatten(1), bias)


def bind(found: RowsPlan, x: Tensor, packed: list[Buffer], residual: Tensor | None, out: Tensor) -> Bound | Chain:
    """The call that fills ``out`` from what is then in ``x`` and ``residual``: for repeated use of the same memory."""
    return tile_rows.bind("normal_tiles", build, found, (x, residual, out), packed)
