"""Normal convolution of images with few channels: the first layer of a network, with its bias and activation.

Each task copies the padded input rows of a few output rows into the cache, one plane per channel, whatever the
image's layout. The sums over taps and channels are then the same product as in the pointwise kernel. The output is
always channels_last, the layout that the layers behind it read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from sepconv.kernels.case import Case, Outline
from sepconv.kernels.halide import numbers
from sepconv.kernels.halide.activated import activated
from sepconv.kernels.halide.conv.gemm import bias_param, keep_in_registers, packed, packed_param
from sepconv.kernels.halide.conv.normal import NUMBERS, ConvolutionCall
from sepconv.kernels.halide.jit import packing, runtime
from sepconv.kernels.halide.jit.buffers import Buffer, buffer, check_pixels, pixels
from sepconv.kernels.halide.jit.machine_code import Bound
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.numbers import ConvNumbers
from sepconv.kernels.halide.schedule import machine
from sepconv.kernels.halide.schedule.gemm import Tile, stem_schedule

MAX_CHANNELS = 4


class StemSpec(NamedTuple):
    """All that the code of one kernel depends on. Pairs are (y, x)."""

    channels_last: bool
    channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    tile: Tile
    activation: str
    edges: ConvNumbers = ConvNumbers()


def build(spec: StemSpec) -> tuple[Any, list[Any]]:
    """The pipeline; arguments: rows per task, tasks per thread, top and left padding, columns with the padding that is
    read, x, packed weights, bias."""
    names = ("rows", "share", "top", "left", "wide")
    rows, share, top, left, wide = (hl.Param(hl.Int(32), name) for name in names)
    x = hl.ImageParam(
        numbers.halide_type(spec.edges.x), 4, "x"
    )  # channel, column, row, image, in whatever order they lie in memory
    x.dim(0).set_min(0).set_extent(spec.channels).set_stride(1 if spec.channels_last else hl.Expr())
    x.dim(1).set_stride(hl.Expr() if spec.channels_last else 1)
    (height, width), tile = spec.kernel_size, spec.tile
    weight = packed_param("weight", *tile.panels, spec.channels * width * height, spec.out_channels)
    c, column, row, o, n = (hl.Var(name) for name in ("c", "column", "row", "o", "n"))

    padded = _padded(spec, x, top, left, wide, (column, row, c, n))

    k = hl.RDom([hl.Range(0, e) for e in (spec.channels, width, height)], "k")
    sums, out = hl.Func("sums"), hl.Func("conv")
    sums[o, column, row, n] = hl.f32(0.0)
    sums[o, column, row, n] += (
        packed(weight, tile.lanes, o, k.x + spec.channels * (k.y + width * k.z))
        * padded[column * spec.stride[1] + k.y, row * spec.stride[0] + k.z, k.x, n]
    )
    bias = bias_param("bias", spec.out_channels)
    value = activated(spec.activation, sums[o, column, row, n] + bias[o])
    out[o, column, row, n] = numbers.write(spec.edges.y, value)

    result = out.output_buffer()
    result.dim(0).set_min(0).set_extent(spec.out_channels).set_stride(1)
    for d in (1, 2, 3):
        result.dim(d).set_min(0)
    _schedule(spec, (rows, share), out, sums, padded, (o, column, row, n), k)
    return out, [rows, share, top, left, wide, x, weight, bias]


def _padded(spec: StemSpec, x: Any, top: Any, left: Any, wide: Any, at: tuple[Any, ...]) -> Any:
    """``padded[column, row, c, n] = x[c, column - left, row - top, n]`` in float32, ``wide`` columns, zeros around."""
    (column, row, c, n), (width, height) = at, (x.dim(1).extent(), x.dim(2).extent())
    padded = hl.Func("padded")
    if spec.channels_last:
        unbounded, image = hl.Range(hl.Expr(), hl.Expr()), [hl.Range(0, width), hl.Range(0, height)]
        zero = numbers.zero(spec.edges.x)
        outside = hl.BoundaryConditions.constant_exterior(x, zero, [unbounded, *image, unbounded])
        padded[at] = numbers.read(spec.edges.x, outside[c, column - left, row - top, n])
        return padded
    # Whole rows are copied in vectors; a clamped column would turn the loads at both ends into one for each number.
    inside = (row >= top) & (row - top < height)
    sizes = {"across": width, "before": left, "behind": hl.max(0, wide - left - width), "outside": wide}
    across, before, behind, outside = (hl.RDom([hl.Range(0, size)], name) for name, size in sizes.items())
    across.where(inside)
    outside.where(~inside)
    padded[at] = hl.undef(hl.Float(32))
    pixel = x[c, across.x, hl.clamp(row - top, 0, height - 1), n]
    padded[across.x + left, row, c, n] = numbers.read(spec.edges.x, pixel)
    for zeros, first in ((before, 0), (behind, left + width), (outside, 0)):
        padded[zeros.x + first, row, c, n] = hl.f32(0.0)
    return padded


def _schedule_padded(spec: StemSpec, padded: Any) -> None:
    column, row, c, n = padded.args()
    if spec.channels_last:
        padded.vectorize(column, spec.tile.lanes, hl.TailStrategy.RoundUp)
        return
    across, whole, lane = padded.rvars(0)[0], hl.RVar("whole"), hl.RVar("lane")
    copy = padded.update().allow_race_conditions()
    copy.split(across, whole, lane, spec.tile.lanes, hl.TailStrategy.Predicate)
    copy.reorder(lane, whole, row, c, n).vectorize(lane)
    for margin in (1, 2):
        # Down the rows: of a row's one or two zeros the compiler would make a call, which takes longer than they do.
        padded.update(margin).reorder(row, padded.rvars(margin)[0], c, n)
    padded.update(3).unscheduled()


def _schedule(
    spec: StemSpec, walk: tuple[Any, Any], out: Any, sums: Any, padded: Any, dims: tuple[Any, ...], k: Any
) -> None:
    rows, share = walk
    tile, (o, column, row, n) = spec.tile, dims
    block, o_in, step, column_in = (hl.Var(name) for name in ("block", "o_in", "step", "column_in"))
    group, task = hl.Var("group"), hl.Var("task")
    ragged = spec.out_channels % tile.wide
    out.bound(o, 0, spec.out_channels)
    out.split(o, block, o_in, tile.wide, hl.TailStrategy.GuardWithIf if ragged else hl.TailStrategy.RoundUp)
    out.split(column, step, column_in, tile.scalars, hl.TailStrategy.ShiftInwards)
    out.split(row, group, row, rows, hl.TailStrategy.GuardWithIf)
    runtime.share(out.reorder(o_in, column_in, step, row, block, group, n).fuse(group, n, task), task, share)
    out.vectorize(o_in, tile.lanes).unroll(o_in).unroll(column_in)
    out.never_partition([step, row, block, task])

    sums.compute_at(out, step)
    keep_in_registers(sums, o, column, [k.x, k.y, k.z], tile)
    sums.update().unroll(k.x)
    _schedule_padded(spec, padded.compute_at(out, task))


class StemPlan(NamedTuple):
    """The kernel for one input, its output size, and the numbers it is called with."""

    spec: StemSpec
    size: tuple[int, int]
    numbers: tuple[int, int, int, int, int]

    @property
    def variant(self) -> tuple[int, int]:
        """What packed weights depend on besides their numbers."""
        return self.spec.tile.panels


def _reads_channels_last(x: Outline) -> bool:
    one_pixel = x.shape[2] * x.shape[3] == 1  # then both strides may be 1, but columns have none
    return x.stride[1] == 1 and (one_pixel or x.stride[3] != 1)


def plan(case: Case) -> StemPlan:
    """The kernel and its schedule for such tensors."""
    images, channels, _, _ = case.x.shape
    out_channels, _, *kernel_size = case.weight.shape
    out_height, out_width = size = (case.y.shape[2], case.y.shape[3])
    stride, ((top, _), (left, _)) = case.geometry.stride, case.geometry.padding
    depth = channels * kernel_size[0] * kernel_size[1]
    row_bytes = 4 * channels * stride[0] * stride[1] * out_width
    schedule = stem_schedule(machine.host(), depth, out_channels, max(images, 1), size, row_bytes, case.threads)
    spec = StemSpec(
        _reads_channels_last(case.x), channels, out_channels, (kernel_size[0], kernel_size[1]), (stride[0], stride[1]),
        schedule.tile, case.activation, numbers.edges(case),
    )  # fmt: skip
    share = runtime.per_thread(images * -(-out_height // schedule.rows), case.threads)
    wide = (out_width - 1) * stride[1] + kernel_size[1]
    return StemPlan(spec, size, (schedule.rows, share, top, left, wide))


def supports(case: Case) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    if case.bound and not case.result.elements:
        return "the result is empty"
    reason = runtime.missing() or runtime.unsuitable(*case.given, case.result, numbers=NUMBERS)
    if reason:
        return reason
    x = case.x
    if x.dims != 2:
        return f"the kernel is for images (N, C, H, W), got {x.dims} spatial dimensions"
    if case.residual is not None or case.groups > 1 or set(case.geometry.dilation) != {1}:
        return "the kernel for normal convolutions has no dilation, groups and residual"
    if x.shape[1] > MAX_CHANNELS or case.weight.shape[1] != x.shape[1]:
        return f"the kernel is for images of at most {MAX_CHANNELS} channels and no groups, got {x.shape[1]} channels"
    if 1 not in (x.stride[1], x.stride[3]):
        return f"neither columns nor channels of x lie next to one another in memory (strides {x.stride})"
    return runtime.too_large(case.result.shape)


def slower(case: Case) -> str:
    """Never: PyTorch has no kernel of its own for few channels."""
    return ""


def describe(case: Case) -> dict[str, Any]:
    """The schedule in words and numbers."""
    found = plan(case)
    return {**found.spec.tile._asdict(), "rows": found.numbers[0]}


def pack(found: StemPlan, weights: Sequence[Tensor | None]) -> list[Buffer]:
    """Copies of weight and bias as the kernel of this plan takes them."""
    weight, bias = weights
    assert weight is not None
    rows = weight.detach().float().permute(0, 2, 3, 1).reshape(weight.shape[0], -1)
    tensors = (packing.pack(rows, *found.spec.tile.panels), packing.pack_bias(bias, weight).float())
    return [buffer(tensor) for tensor in tensors]


def bind(found: StemPlan, x: Tensor, packed: list[Buffer], residual: Tensor | None, out: Tensor) -> Bound:
    """The call that fills ``out``, a channels_last image, from what is then in ``x``: for repeated use of the same
    memory.

    ``found`` comes from :func:`plan`, ``packed`` from :func:`pack`.
    """
    check_pixels("conv.bind", out)
    kernel = runtime.compiled(("conv", found.spec), lambda: build(found.spec))
    return kernel.bind(*found.numbers, pixels(x), *packed, pixels(out))


def prepare(case: Case) -> ConvolutionCall[StemPlan]:
    """``activation(F.conv2d(x, weight, bias, stride))`` after padding, for all tensors of these sizes and strides."""
    return ConvolutionCall("conv", case, plan(case), pack, bind)
