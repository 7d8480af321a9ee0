"""Normal convolution of channels_last images, in groups or not: bias, residual and activation in the same pass.

Each task copies the padded input rows under a few output rows into the cache. The sums over taps and channels are then
the matrix product of the pointwise kernel, of a tile of output channels by neighbouring columns. Where nothing is
padded the image is read in place.

Weights of a block of output channels that the cache cannot keep would come from beyond it for every tile. Such sums are
made in runs of input channels: all tiles of a task by the weights of one run, then by those of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from sepconv.kernels.case import Case
from sepconv.kernels.halide import numbers
from sepconv.kernels.halide.activated import activated
from sepconv.kernels.halide.conv.gemm import bias_param, keep_in_registers, packed, packed_param
from sepconv.kernels.halide.jit import packing, runtime
from sepconv.kernels.halide.jit.buffers import CODES, Buffer, buffer, check_pixels, pixels
from sepconv.kernels.halide.jit.machine_code import Bound
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.numbers import ConvNumbers
from sepconv.kernels.halide.schedule import machine
from sepconv.kernels.halide.schedule.gemm import Tile
from sepconv.kernels.halide.schedule.normal import NormalSchedule, NormalShape, normal_schedule
from sepconv.kernels.layout import like, pixel_step

# Channels in straight-line code: more take the compiler longer and are no faster.
MOST_UNROLLED = 4
# Bytes between numbers that take each other's place in the cache: columns of an image must not lie so far apart.
_SAME_SET = 4096
NUMBERS = (torch.float32, torch.bfloat16)
"""Of images, each by itself, and of weights; the products are those of float32."""
# Fewer output channels in a group waste most of a vector.
_LEAST_OUTPUTS = 4


class _Planned(Protocol):
    @property
    def variant(self) -> Hashable: ...


P = TypeVar("P", bound=_Planned)
Pack = Callable[[P, Sequence[Tensor | None]], list[Buffer]]
Bind = Callable[[P, Tensor, list[Buffer], Tensor | None, Tensor], Bound]


class NormalSpec(NamedTuple):
    """All that the code of one kernel depends on. Channels are those of one group; pairs are (y, x).

    ``step``: numbers between two columns of an image that is read in place, 0 where it is copied. ``run``: channels
    whose products are summed up before those of the next ones.
    """

    channels: int
    out_channels: int
    groups: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    tile: Tile
    activation: str
    residual: bool
    step: int
    run: int
    edges: ConvNumbers = ConvNumbers()


def build(spec: NormalSpec) -> tuple[Any, list[Any]]:
    """The pipeline; arguments: rows per task, blocks per task, tasks per thread, top and left padding, x, packed
    weights, bias, [residual]."""
    arguments = tuple(hl.Param(hl.Int(32), name) for name in ("rows", "blocks", "share", "top", "left"))
    x = _image("x", spec.edges.x, spec.channels * spec.groups)
    if spec.step:
        x.dim(1).set_stride(spec.step)
    (height, width), tile = spec.kernel_size, spec.tile
    depth = spec.channels * height * width
    weight = packed_param("weight", *tile.panels, depth, spec.groups * _whole(spec))
    o, g, column, row, n = (hl.Var(name) for name in ("o", "g", "column", "row", "n"))
    source = x if spec.step else _padded(spec, x, arguments[3], arguments[4])

    dims = (o, g, column, row, n)
    first, k = _reduction(spec)
    out = hl.Func("normal")
    if spec.dilation[0] > 1 and not spec.step:
        # Of taps so far apart many lie above or below the image.
        above = row * spec.stride[0] + k.z * spec.dilation[0] - arguments[3]
        k.where((above >= 0) & (above < x.dim(2).extent()))
    input_channel = k.x if first is None else k.x + spec.run * first
    pixel = source[
        input_channel + spec.channels * g,
        column * spec.stride[1] + k.y * spec.dilation[1],
        row * spec.stride[0] + k.z * spec.dilation[0],
        n,
    ]
    term = input_channel + spec.channels * (k.y + width * k.z)
    factor = packed(weight, tile.lanes, o + g * _whole(spec), term)
    product = factor * (numbers.read(spec.edges.x, pixel) if spec.step else pixel)
    sums = _Sums.of(spec, dims, first, k, product)
    bias = bias_param("bias", spec.out_channels * spec.groups)
    value, extra = sums.whole[dims] + bias[o + g * spec.out_channels], [bias]
    if spec.residual:
        residual = hl.ImageParam(numbers.halide_type(spec.edges.residual), 5, "residual")
        _fix(residual, spec)
        added = numbers.read(spec.edges.residual, residual[dims])
        value, extra = value + added, [bias, residual]
    out[dims] = numbers.write(spec.edges.y, activated(spec.activation, value))

    _fix(out.output_buffer(), spec)
    _schedule(spec, arguments[:3], out, sums, dims)
    if not spec.step:
        _schedule_padded(spec, source, out)
    return out, [*arguments, x, weight, *extra]


def _reduction(spec: NormalSpec) -> tuple[Any, Any]:
    """The number of a run of channels, None where there is one; and channels of a run, columns and rows of a filter."""
    first = hl.Var("run") if spec.run < spec.channels else None
    return first, hl.RDom([hl.Range(0, extent) for extent in (spec.run, *reversed(spec.kernel_size))], "k")


class _Sums(NamedTuple):
    """``tile``: what is summed up in registers, over ``k``; ``whole``: over all ``runs`` of it, or the same."""

    tile: Any
    whole: Any
    k: Any
    runs: Any

    @classmethod
    def of(cls, spec: NormalSpec, dims: tuple[Any, ...], first: Any, k: Any, product: Any) -> _Sums:
        tile = hl.Func("sums")
        if first is None:
            tile[dims] = hl.f32(0.0)
            tile[dims] += product
            return cls(tile, tile, k, None)
        part = (*dims, first)
        tile[part] = hl.f32(0.0)
        tile[part] += product
        whole, runs = hl.Func("whole"), hl.RDom([hl.Range(0, spec.channels // spec.run)], "runs")
        whole[dims] = hl.f32(0.0)
        part = (*dims, runs.x)
        whole[dims] += tile[part]
        return cls(tile, whole, k, runs.x)


def _whole(spec: NormalSpec) -> int:
    """Output channels of a group in whole blocks, as the weights are packed."""
    return -(-spec.out_channels // spec.tile.wide) * spec.tile.wide


def _image(name: str, kind: str, channels: int) -> Any:
    """Channel, column, row, image; the channels of a pixel side by side."""
    x = hl.ImageParam(numbers.halide_type(kind), 4, name)
    x.dim(0).set_extent(channels).set_stride(1)
    for d in range(4):
        x.dim(d).set_min(0)
    return x


def _fix(image: Any, spec: NormalSpec) -> None:
    """Channel, group, column, row, image."""
    image.dim(0).set_extent(spec.out_channels).set_stride(1)
    image.dim(1).set_extent(spec.groups).set_stride(spec.out_channels)
    for d in range(5):
        image.dim(d).set_min(0)


def _padded(spec: NormalSpec, x: Any, top: Any, left: Any) -> Any:
    """``padded[c, column, row, n] = x[c, column - left, row - top, n]`` in float32, zeros around the image."""
    c, column, row, n = (hl.Var(name) for name in ("c", "column", "row", "n"))
    unbounded = hl.Range(hl.Expr(), hl.Expr())
    image = [hl.Range(0, x.dim(1).extent()), hl.Range(0, x.dim(2).extent())]
    zero = numbers.zero(spec.edges.x)
    outside = hl.BoundaryConditions.constant_exterior(x, zero, [unbounded, *image, unbounded])
    padded = hl.Func("padded")
    padded[c, column, row, n] = numbers.read(spec.edges.x, outside[c, column - left, row - top, n])
    return padded


def _schedule_padded(spec: NormalSpec, padded: Any, out: Any) -> None:
    lanes = machine.host().lanes
    padded.compute_at(out, hl.Var("task"))
    channels = spec.channels * spec.groups
    if 4 * channels % _SAME_SET == 0:
        padded.align_storage(padded.args()[0], channels + lanes)
    if channels >= lanes:
        whole = channels % lanes == 0
        padded.vectorize(padded.args()[0], lanes, hl.TailStrategy.RoundUp if whole else hl.TailStrategy.GuardWithIf)


def _schedule(spec: NormalSpec, walk: tuple[Any, ...], out: Any, sums: _Sums, dims: tuple[Any, ...]) -> None:
    rows, blocks, share = walk
    tile, (o, g, column, row, n) = spec.tile, dims
    names = ("block", "o_in", "part", "step", "column_in", "group", "task")
    block, o_in, part, step, column_in, group, task = (hl.Var(name) for name in names)
    ragged = spec.out_channels % tile.wide
    out.bound(o, 0, spec.out_channels).bound(g, 0, spec.groups)
    out.split(o, block, o_in, tile.wide, hl.TailStrategy.GuardWithIf if ragged else hl.TailStrategy.RoundUp)
    out.split(column, step, column_in, tile.scalars, hl.TailStrategy.ShiftInwards)
    out.split(row, group, row, rows, hl.TailStrategy.GuardWithIf)
    out.reorder(o_in, column_in, step, row, block, g, group, n).fuse(block, g, block)
    out.split(block, part, block, blocks, hl.TailStrategy.GuardWithIf)
    out.fuse(part, group, task).fuse(task, n, task)
    runtime.share(out, task, share)
    out.vectorize(o_in, tile.lanes).unroll(o_in).unroll(column_in)
    out.never_partition([step, row, block, task])

    if sums.runs is None:
        sums.tile.compute_at(out, step)
    else:
        _schedule_runs(spec, sums, dims, sums.whole.compute_at(out, block))
    keep_in_registers(sums.tile, o, column, [sums.k.x, sums.k.y, sums.k.z], tile)
    sums.tile.update().unroll(sums.k.x, next(n for n in range(MOST_UNROLLED, 0, -1) if spec.run % n == 0))


def _schedule_runs(spec: NormalSpec, sums: _Sums, dims: tuple[Any, ...], whole: Any) -> None:
    """All tiles of a block by one run of channels after the other; rows end with a tile that is not whole."""
    (o, g, column, row, n), lanes = dims, spec.tile.lanes
    step, column_in = hl.Var("step_of_run"), hl.Var("column_in_run")
    whole.bound_extent(o, spec.tile.wide).vectorize(o, lanes).unroll(o)
    update = whole.update()
    update.split(column, step, column_in, spec.tile.scalars, hl.TailStrategy.RoundUp)
    update.reorder(o, column_in, step, row, sums.runs, g, n)
    update.vectorize(o, lanes).unroll(o).unroll(column_in)
    update.never_partition([step, row])
    sums.tile.compute_at(whole, step)


class NormalPlan(NamedTuple):
    """The kernel for one input, and the numbers it is called with."""

    spec: NormalSpec
    numbers: tuple[int, int, int, int, int]

    @property
    def variant(self) -> tuple[int, int, int]:
        """What packed weights depend on besides their numbers."""
        return (*self.spec.tile.panels, self.spec.groups)


def _padding(case: Case) -> tuple[int, ...]:
    return tuple(amount for pair in case.geometry.padding for amount in pair)


def plan(case: Case) -> NormalPlan:
    """The kernel and its schedule for such tensors."""
    (stride, ((top, _), (left, _)), dilation), groups = case.geometry, case.groups
    channels, (height, width) = case.weight.shape[1], case.kernel_size
    images, _, rows, columns = case.y.shape
    shape = NormalShape(
        channels, case.weight.shape[0] // groups, groups, height * width, max(images, 1), rows, columns,
        row_bytes=4 * channels * groups * stride[0] * ((columns - 1) * stride[1] + dilation[1] * (width - 1) + 1),
        copied=any(_padding(case)),
    )  # fmt: skip
    found: NormalSchedule = normal_schedule(machine.host(), shape, case.threads)
    spec = NormalSpec(
        channels, shape.out_channels, groups, (height, width), (stride[0], stride[1]), (dilation[0], dilation[1]),
        found.tile, case.activation, case.residual is not None, 0 if shape.copied else case.x.stride[3],
        found.run, numbers.edges(case),
    )  # fmt: skip
    blocks = -(-(groups * -(-shape.out_channels // found.tile.wide)) // found.parts)
    tasks = shape.images * -(-rows // found.rows) * found.parts
    return NormalPlan(spec, (found.rows, blocks, runtime.per_thread(tasks, case.threads), top, left))


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
    if x.stride[1] != 1 or (x.shape[1] > 1 and x.stride[3] == 1 and x.shape[3] > 1):
        return f"the kernel reads channels_last images only (strides {x.stride})"
    if not pixel_step(case.result.shape, case.result.stride):
        return f"the kernel writes channels_last images only (strides {case.result.stride})"
    return runtime.too_large(case.result.shape)


def slower(case: Case) -> str:
    """Why PyTorch's kernel is expected to be faster, in a sentence; the empty string if this one is."""
    outputs = case.weight.shape[0] // case.groups
    if case.groups > 1 and outputs < _LEAST_OUTPUTS <= case.weight.shape[1]:
        return f"groups of less than {_LEAST_OUTPUTS} output channels are faster in PyTorch's kernel, got {outputs}"
    return ""


def describe(case: Case) -> dict[str, Any]:
    """The schedule in words and numbers."""
    found = plan(case)
    return {**found.spec.tile._asdict(), "rows": found.numbers[0], "blocks": found.numbers[1], "run": found.spec.run}


def pack(found: NormalPlan, weights: Sequence[Tensor | None]) -> list[Buffer]:
    """Copies of weight and bias as the kernel of this plan takes them."""
    weight, bias = weights
    assert weight is not None
    spec = found.spec
    rows = weight.detach().float().permute(0, 2, 3, 1).reshape(spec.groups, spec.out_channels, -1)
    panels = torch.cat([packing.pack(group, *spec.tile.panels) for group in rows])
    return [buffer(panels), buffer(packing.pack_bias(bias, weight).float())]


def in_parts(image: Tensor, channels: int) -> Buffer:
    """(N, C, H, W) as (N, H, W, C / channels, channels)."""
    n, whole, h, w = image.shape
    by_image, _, by_row, by_column = image.stride()
    strides = (by_image, by_row, by_column, channels, 1)
    shape = n, h, w, whole // channels, channels
    return Buffer(shape, strides, image.data_ptr(), CODES[image.dtype], image)


def bind(found: NormalPlan, x: Tensor, packed: list[Buffer], residual: Tensor | None, out: Tensor) -> Bound:
    """The call that fills ``out`` from what is then in ``x`` and ``residual``: for repeated use of the same memory.

    ``found`` comes from :func:`plan`, ``packed`` from :func:`pack`; ``out`` and ``residual`` are channels_last, or
    some channels of such images.
    """
    images = check_pixels("normal.bind", out, residual)
    kernel = runtime.compiled(("normal", found.spec), lambda: build(found.spec))
    return kernel.bind(
        *found.numbers, pixels(x), *packed, *[in_parts(image, found.spec.out_channels) for image in images]
    )


class ConvolutionCall(Generic[P]):
    """``activation(F.conv2d(x, weight, bias, ...) + residual)`` for all tensors of these sizes and strides, by a kernel
    that is called ``name``. ``found`` is its plan; ``pack`` and ``bind`` are its functions."""

    def __init__(self, name: str, case: Case, found: P, pack: Pack[P], bind: Bind[P]) -> None:
        self.found, self.pack, self.bind, result = found, pack, bind, case.result
        self.shape, self.dtype = result.shape, result.dtype
        self._variant = (name, found.variant, case.weight.shape)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        out = torch.empty(self.shape, dtype=self.dtype, memory_format=torch.channels_last)
        if out.numel():
            weights = (weight, bias)
            packed = packing.remembered(weights, self._variant, lambda: self.pack(self.found, weights))
            self.bind(self.found, x, packed, None if residual is None else like(residual, out), out)()
        return out


def prepare(case: Case) -> ConvolutionCall[NormalPlan]:
    """``activation(F.conv2d(x, weight, bias, ...) + residual)`` for all tensors of these sizes and strides."""
    return ConvolutionCall("normal", case, plan(case), pack, bind)
