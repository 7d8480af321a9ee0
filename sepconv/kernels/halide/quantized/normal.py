"""Normal convolution of bytes, in groups or not, of few channels or many, with all that follows in one pass.

The input rows under a few output rows are copied into the cache, padded and, if they are float32, quantised. From there
all that one output pixel reads is laid in a row, which makes the convolution a product of rows and weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.kernels.case import Case, Outline
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.buffers import CODES, Buffer, check_pixels, pixels
from sepconv.kernels.halide.jit.machine_code import Bound, Chain
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.quantized import epilogue, product, tiling
from sepconv.kernels.halide.quantized.epilogue import Constants, Ending
from sepconv.kernels.halide.quantized.product import ByteProduct
from sepconv.kernels.halide.quantized.tiling import RowTiles, Size
from sepconv.kernels.halide.schedule.quantized import row_pixels

# Numbers that are copied at a time.
_COPIED = 64
# Channels that are copied in straight-line code.
_FEW = 4


class NormalSpec8(NamedTuple):
    """All that the code of one kernel depends on. Channels are those of one group; pairs are (y, x).

    Attributes:
        reads: the kind of x's numbers.
        lies: how x does: "dense", pixel by pixel without gaps; "pixels", with gaps; or "planes", channel by channel.
    """

    channels: int
    groups: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    product: ByteProduct
    epilogue: Ending
    reads: str
    lies: str

    @property
    def runs(self) -> tuple[int, int, int]:
        """What a pixel reads of one input row: so many runs of numbers side by side, the numbers of each, and how many
        are copied."""
        return _runs(self.channels, self.groups, self.kernel_size[1], self.dilation[1])


def _runs(channels: int, groups: int, width: int, dilation: int) -> tuple[int, int, int]:
    if groups == 1 and dilation == 1:
        return 1, channels * width, -(-channels * width // 4) * 4
    return width, channels, channels


class NormalPlan8(NamedTuple):
    """The kernel for one input; ``before``: padding (top, left)."""

    spec: NormalSpec8
    width: int
    before: tuple[int, int]
    calls: tuple[RowTiles, ...]

    @property
    def variant(self) -> tuple[ByteProduct, Ending, tuple[int, int, int]]:
        """What packed weights depend on besides their numbers."""
        return self.spec.product, self.spec.epilogue, self.spec.runs


def build(spec: NormalSpec8) -> tuple[Any, list[Any]]:
    """The pipeline; arguments: width, rows per tile, first row, tiles per thread, top and left padding, x, weights,
    bias, scale, numbers, [residual]. The output is channel, group, pixel in tile, tile, image."""
    names = ("width", "parts", "first", "share", "top", "left")
    width, count, first, share, top, left = (hl.Param(hl.Int(32), name) for name in names)
    multiply, x = spec.product, _image(spec)
    weight, given = product.weight_param(multiply), Constants(multiply.outputs * spec.groups)
    o, g, q, t, n = at = [hl.Var(name) for name in ("o", "g", "q", "t", "n")]
    padded = _padded(spec, x, given, (top, left))
    rows, place = _rows(spec, padded, (width, count, first), [g, t, n])
    wide = hl.Var("wide")
    sums, k = product.sums_of(multiply, rows, weight, [wide, q, g, t, n])
    value = sums[o + g * multiply.padded_outputs, q, g, t, n] + given.bias[o + g * multiply.outputs]
    arguments, residual = [x, weight, *given.parameters], None
    if spec.epilogue.residual:
        added = hl.ImageParam(epilogue.halide_type(spec.epilogue.residual), 5, "residual")
        arguments.append(_grouped(spec, added))
        residual = added[at]
    out = hl.Func("normal8")
    out[at] = epilogue.finished(spec.epilogue, value, o + g * multiply.outputs, given, residual)
    _grouped(spec, out.output_buffer())
    _schedule(spec, share, out, (sums, k, wide), (padded, rows, place))
    return out, [width, count, first, share, top, left, *arguments]


def _image(spec: NormalSpec8) -> Any:
    """Number in a row, row, image where dense; else channel, column, row, image."""
    kind, channels = epilogue.halide_type(spec.reads), spec.channels * spec.groups
    x = hl.ImageParam(kind, 3 if spec.lies == "dense" else 4, "x")
    for d in range(x.dimensions()):
        x.dim(d).set_min(0)
    x.dim(0).set_stride(hl.Expr() if spec.lies == "planes" else 1)
    if spec.lies != "dense":
        x.dim(0).set_extent(channels)
        x.dim(1).set_stride(1 if spec.lies == "planes" else hl.Expr())
    return x


def _grouped(spec: NormalSpec8, image: Any) -> Any:
    """Channel, group, pixel in tile, tile, image."""
    for d in range(5):
        image.dim(d).set_min(0)
    image.dim(0).set_extent(spec.product.outputs).set_stride(1)
    image.dim(1).set_extent(spec.groups).set_stride(spec.product.outputs)
    return image


def _padded(spec: NormalSpec8, x: Any, given: Constants, before: tuple[Any, Any]) -> Any:
    """``padded[c + channels * column, row, n] = x[c, column - left, row - top, n]`` in bytes, x's zero point around the
    image."""
    (top, left), channels, height = before, spec.channels * spec.groups, x.dim(x.dimensions() - 2).extent()
    number, row, n = (hl.Var(name) for name in ("number", "row", "n"))
    dense = spec.lies == "dense"
    across = hl.RDom([hl.Range(0, x.dim(d).extent() if dense or d else channels) for d in range(1 if dense else 2)])
    across.where((row >= top) & (row - top < height))
    at = [across[d] for d in range(1 if dense else 2)]
    value = x[[*at, hl.clamp(row - top, 0, height - 1), n]]
    padded = hl.Func("padded")
    padded[number, row, n] = given.byte("x_zero")
    place = at[0] if dense else at[0] + channels * at[1]
    padded[place + channels * left, row, n] = epilogue.in_bytes(spec.reads, value, given, spec.epilogue.packs)
    return padded


def _rows(spec: NormalSpec8, padded: Any, walk: tuple[Any, ...], at: list[Any]) -> tuple[Any, Any]:
    """``rows[k, pixel in tile, group, tile, image]``: all that a pixel reads, the runs of each input row in turn."""
    (width, count, first), (g, t, n), (runs, _, copied) = walk, at, spec.runs
    lanes = min(copied, _COPIED)
    extents = (lanes, -(-copied // lanes), runs, spec.kernel_size[0], width, count)
    place = hl.RDom([hl.Range(0, extent) for extent in extents], "place")
    lane, part, run, tap, column, row = (place[i] for i in range(6))
    # The last part overlaps the one before.
    number = hl.min(part * lanes, copied - lanes) + lane
    across = column * spec.stride[1]
    source = number + spec.channels * (g + spec.groups * (across + run * spec.dilation[1]))
    down = (first + t * count + row) * spec.stride[0] + tap * spec.dilation[0]
    k, q, rows = hl.Var("k"), hl.Var("q"), hl.Func("rows")
    rows[k, q, g, t, n] = hl.undef(spec.product.row_type)
    rows[number + copied * (run + runs * tap), column + width * row, g, t, n] = product.in_row(
        spec.product.row_type, padded[source, down, n]
    )
    return rows, place


def _schedule(
    spec: NormalSpec8, share: Any, out: Any, product_stages: tuple[Any, ...], copies: tuple[Any, ...]
) -> None:
    (sums, k, wide), (padded, rows, place), multiply = product_stages, copies, spec.product
    o, g, q, t, n = out.args()
    block, o_in, step, q_in, task = (hl.Var(name) for name in ("block", "o_in", "step", "q_in", "task"))
    ragged = multiply.outputs % multiply.wide
    out.bound(o, 0, multiply.outputs).bound(g, 0, spec.groups)
    out.split(o, block, o_in, multiply.wide, hl.TailStrategy.GuardWithIf if ragged else hl.TailStrategy.RoundUp)
    out.split(q, step, q_in, multiply.tall, hl.TailStrategy.ShiftInwards)
    out.reorder(o_in, q_in, step, block, g, t, n).fuse(t, n, task).never_partition([task, g, step, block])
    out.vectorize(o_in, product.stored_together(multiply, spec.epilogue.out))
    runtime.share(out, task, share)
    product.arrange(multiply, sums.compute_at(out, step), k, [wide, q])

    rows.compute_at(out, g).bound_extent(rows.args()[0], max(multiply.whole, multiply.terms))
    lane, part, run, tap, column, row = (place[i] for i in range(6))
    fill = rows.update().allow_race_conditions().reorder(lane, part, run, tap, column, row).vectorize(lane)
    if max(1, spec.runs[2] // _COPIED) * spec.runs[0] * spec.kernel_size[0] <= 16:
        fill.unroll(part).unroll(run).unroll(tap)
    _schedule_padded(spec, padded.compute_at(out, task))


def _schedule_padded(spec: NormalSpec8, padded: Any) -> None:
    """Where x is not dense, few channels are brought side by side as vectors of columns are stored."""
    number, row, n = padded.args()
    channels, guard = spec.channels * spec.groups, hl.TailStrategy.GuardWithIf
    lanes = spec.product.lanes * (1 if spec.reads == "float32" else 4)
    padded.vectorize(number, 4 * spec.product.lanes, guard)
    whole, lane = hl.RVar("whole"), hl.RVar("lane")
    update, (first, *across) = padded.update().allow_race_conditions(), padded.rvars(0)
    if spec.lies == "planes" or (across and channels <= _FEW):
        update.split(across[0], whole, lane, lanes, guard).reorder(first, lane, whole, row, n).vectorize(lane)
        if channels <= _FEW:
            update.unroll(first)
        return
    if across:
        lanes = next(width for width in (lanes, lanes // 2, lanes // 4, 1) if width <= channels)
    update.split(first, whole, lane, lanes, guard).reorder(lane, whole, *across, row, n).vectorize(lane)


def _lies(x: Outline) -> str:
    """Steps along a size of 1 say nothing."""
    channels = x.shape[1]
    if channels > 1 and x.shape[3] > 1 and x.stride[3] == 1:
        return "planes"
    columns = x.shape[3] == 1 or x.stride[3] == channels
    return "dense" if columns and (channels == 1 or x.stride[1] == 1) else "pixels"


def plan(case: Case) -> NormalPlan8:
    """The kernel for such tensors."""
    return planned(case, product.best(case.weight.elements // case.weight.shape[0], case.y.elements))


def planned(case: Case, way: str) -> NormalPlan8:
    """The kernel that multiplies in one of ``product.ways()``."""
    x, weight, groups = case.x, case.weight, case.groups
    (stride_y, stride_x), ((top, _), (left, _)), (dilation_y, dilation_x) = case.geometry
    channels, (height, width) = weight.shape[1], case.kernel_size
    runs, _, copied = _runs(channels, groups, width, dilation_x)
    terms = runs * copied * height
    size = Size(case.y.shape[0], *case.y.shape[2:])
    calls = tiling.cut(size, 1, row_pixels(terms), case.threads)
    multiply = product.product(way, terms, weight.shape[0] // groups, min(call.rows for call in calls) * size.width)
    spec = NormalSpec8(
        channels, groups, (height, width), (stride_y, stride_x), (dilation_y, dilation_x),
        multiply._replace(groups=groups), Ending.of(case), epilogue.KINDS[x.dtype], _lies(x),
    )  # fmt: skip
    return NormalPlan8(spec, size.width, (top, left), calls)


def supports(case: Case) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    reason = epilogue.unsuitable(case, tuple(epilogue.KINDS))
    if reason or case.x.dims != 2:
        return reason or f"the kernel is for images (N, C, H, W), got {case.x.dims} spatial dimensions"
    if _lies(case.x) == "pixels" and case.x.shape[1] > 1 and case.x.stride[1] != 1:
        return f"neither the channels of a pixel nor the pixels of a row lie side by side (strides {case.x.stride})"
    return epilogue.no_pixels_written(case)


def slower(case: Case) -> str:
    """Never: PyTorch computes such layers in float32."""
    return ""


def describe(case: Case) -> dict[str, Any]:
    """The schedule in words and numbers."""
    found = plan(case)
    return {**product.describe(found.spec.product), "rows": [call.rows for call in found.calls]}


def pack(found: NormalPlan8, weights: Sequence[Tensor | None]) -> list[Buffer]:
    """Copies of weight, bias, scale and numbers as the kernel takes them."""
    given, spec = epilogue.constants(weights), found.spec
    runs, length, copied = spec.runs
    rows = given.weight.permute(0, 2, 3, 1).reshape(len(given.weight), spec.kernel_size[0], runs, length)
    padded = torch.nn.functional.pad(rows, (0, copied - length))
    ending = epilogue.pack(spec.epilogue, given, product.less(spec.product.way))
    return [product.pack(spec.product, padded.flatten(1)), *ending]


def bind(found: NormalPlan8, x: Tensor, packed: list[Buffer], residual: Tensor | None, out: Tensor) -> Bound | Chain:
    """The call that fills ``out`` from what is then in ``x`` and ``residual``: for repeated use of the same memory."""
    images, spec = check_pixels("normal.bind", out, residual), found.spec
    kernel = product.compiled(spec.product, ("normal8", spec), lambda: build(spec))
    calls = []
    for call in found.calls:
        views = [tiling.view(image, call, spec.product.outputs) for image in images]
        numbers = (found.width, call.parts, call.first, call.share, *found.before)
        calls.append(kernel.bind(*numbers, _view(spec, x), *packed, *views))
    return calls[0] if len(calls) == 1 else Chain(calls)


def _view(spec: NormalSpec8, x: Tensor) -> Buffer:
    if spec.lies != "dense":
        return pixels(x)
    n, c, h, w = x.shape
    by_image, _, by_row, _ = x.stride()
    return Buffer((n, h, w * c), (by_image, by_row, 1), x.data_ptr(), CODES[x.dtype], x)


prepare = epilogue.prepare
