"""Grouped convolution with few channels in a group: the vector of sums holds several groups (channels_last).

The inputs of one vector's groups are copied, with their padding, row by row into an array in which the k-th channels of
all these groups lie side by side. A step of the sum then reads a run as short as there are groups in a vector, repeats
it for each output channel of a group, and multiplies it with a vector of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.kernels.case import Case
from sepconv.kernels.halide import numbers
from sepconv.kernels.halide.activated import activated
from sepconv.kernels.halide.conv import normal
from sepconv.kernels.halide.conv.gemm import bias_param, dense
from sepconv.kernels.halide.conv.normal import MOST_UNROLLED, ConvolutionCall
from sepconv.kernels.halide.jit import packing, runtime
from sepconv.kernels.halide.jit.buffers import Buffer, buffer, check_pixels, pixels
from sepconv.kernels.halide.jit.machine_code import Bound
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.numbers import ConvNumbers
from sepconv.kernels.halide.schedule import machine
from sepconv.kernels.halide.schedule.normal import grouped_schedule


class GroupedSpec(NamedTuple):
    """All that the code of one kernel depends on. Channels are those of one group; pairs are (y, x)."""

    lanes: int
    channels: int
    out_channels: int
    groups: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    columns: int
    activation: str
    residual: bool
    edges: ConvNumbers = ConvNumbers()

    @property
    def together(self) -> int:
        """Groups in a vector."""
        return self.lanes // self.out_channels

    @property
    def vectors(self) -> int:
        return self.groups // self.together


def build(spec: GroupedSpec) -> tuple[Any, list[Any]]:
    """The pipeline; arguments: rows in a task, tasks of a thread, top and left padding, x, packed weights, bias,
    [residual]."""
    rows, share, top, left = (hl.Param(hl.Int(32), name) for name in ("rows", "share", "top", "left"))
    x = hl.ImageParam(numbers.halide_type(spec.edges.x), 4, "x")
    x.dim(0).set_extent(spec.channels * spec.groups).set_stride(1)
    for d in range(4):
        x.dim(d).set_min(0)
    height, width = spec.kernel_size
    weight = hl.ImageParam(hl.Float(32), 3, "weight")
    dense(weight, spec.lanes, spec.channels * height * width, spec.vectors)
    c, g, j, v, column, row, n = (hl.Var(name) for name in ("c", "g", "j", "v", "column", "row", "n"))
    here = [v, column, row, n]
    read, in_order = _in_order(spec, x, (top, left), c, here)

    k = hl.RDom([hl.Range(0, extent) for extent in (spec.channels, width, height)], "k")
    at = [column * spec.stride[1] + k.y * spec.dilation[1], row * spec.stride[0] + k.z * spec.dilation[0], n]
    sums, out = hl.Func("sums"), hl.Func("grouped")
    sums[[g, j, *here]] = hl.f32(0.0)
    sums[[g, j, *here]] += (
        weight[g + spec.together * j, k.x + spec.channels * (k.y + width * k.z), v]
        * in_order[[g + spec.together * k.x, v, *at]]
    )
    bias = bias_param("bias", spec.out_channels * spec.groups)
    value = sums[[c // spec.out_channels, c % spec.out_channels, *here]] + bias[c + v * spec.lanes]
    extra = [bias]
    if spec.residual:
        residual = hl.ImageParam(numbers.halide_type(spec.edges.residual), 5, "residual")
        _fix(residual, spec)
        value, extra = value + numbers.read(spec.edges.residual, residual[[c, *here]]), [bias, residual]
    out[[c, *here]] = numbers.write(spec.edges.y, activated(spec.activation, value))
    _fix(out.output_buffer(), spec)
    task = _schedule_out(spec, out, rows, share)
    _schedule_sums(spec, sums.compute_at(out, hl.Var("step")), k)

    taken = spec.channels * spec.together
    in_order.store_at(out, task).compute_at(out, row).bound_extent(c, taken).vectorize(c)
    in_order.reorder_storage(c, column, row, v, n)
    read.compute_at(in_order, column).bound_extent(c, taken).vectorize(c)
    return out, [rows, share, top, left, x, weight, *extra]


def _in_order(spec: GroupedSpec, x: Any, before: tuple[Any, Any], c: Any, here: list[Any]) -> tuple[Any, Any]:
    """The channels of a vector's groups with their padding, as they lie in the image, and those with one number in
    their group side by side."""
    v, column, row, n = here
    unbounded = hl.Range(hl.Expr(), hl.Expr())
    image = [hl.Range(0, x.dim(d).extent()) for d in (1, 2)]
    zero = numbers.zero(spec.edges.x)
    outside = hl.BoundaryConditions.constant_exterior(x, zero, [unbounded, *image, unbounded])
    read, in_order = hl.Func("read"), hl.Func("in_order")
    pixel = outside[c + v * (spec.channels * spec.together), column - before[1], row - before[0], n]
    read[[c, *here]] = numbers.read(spec.edges.x, pixel)
    in_order[[c, *here]] = read[[(c % spec.together) * spec.channels + c // spec.together, *here]]
    return read, in_order


def _schedule_out(spec: GroupedSpec, out: Any, rows: Any, share: Any) -> Any:
    """Loops: vector of groups, rows of a task, steps of columns; returns the loop over tasks."""
    c, v, column, row, n = out.args()
    step, column_in, group, task = (hl.Var(name) for name in ("step", "column_in", "group", "task"))
    out.bound(c, 0, spec.lanes).bound(v, 0, spec.vectors)
    out.split(column, step, column_in, spec.columns, hl.TailStrategy.ShiftInwards)
    out.split(row, group, row, rows, hl.TailStrategy.GuardWithIf)
    # The number of vectors is compiled in: as the remainder of a task it would make Halide store all of them.
    out.reorder(c, column_in, step, row, group, v, n).fuse(group, v, task).fuse(task, n, task)
    runtime.share(out, task, share)
    out.vectorize(c).unroll(column_in).never_partition([step, row, task])
    return task


def _schedule_sums(spec: GroupedSpec, sums: Any, k: Any) -> None:
    g, j, _, column, *_ = sums.args()
    sums.bound_extent(g, spec.together).bound_extent(j, spec.out_channels)
    sums.update().reorder(g, j, column, k.x, k.y, k.z)
    for stage in (sums, sums.update()):
        stage.reorder(g, j, column).unroll(column)
        for var, extent in ((g, spec.together), (j, spec.out_channels)):
            if extent > 1:  # the compiler takes a minute over vectors of single numbers
                stage.vectorize(var)
    sums.update().unroll(k.x, next(count for count in range(MOST_UNROLLED, 0, -1) if spec.channels % count == 0))


def _fix(image: Any, spec: GroupedSpec) -> None:
    """Channel in the vector, vector, column, row, image."""
    image.dim(0).set_extent(spec.lanes).set_stride(1)
    image.dim(1).set_extent(spec.vectors).set_stride(spec.lanes)
    for d in range(5):
        image.dim(d).set_min(0)


class GroupedPlan(NamedTuple):
    """The kernel for one input, and the numbers it is called with."""

    spec: GroupedSpec
    numbers: tuple[int, int, int, int]

    @property
    def variant(self) -> tuple[int, int]:
        """What packed weights depend on besides their numbers."""
        return self.spec.lanes, self.spec.groups


def _lanes(case: Case) -> int:
    """Numbers of the vector that whole groups fill, 0 if there is none."""
    most, outputs = machine.host().lanes, case.weight.shape[0] // case.groups
    lengths = (most, most // 2)
    return next((n for n in lengths if n % outputs == 0 and case.groups % (n // outputs) == 0), 0)


def plan(case: Case) -> GroupedPlan:
    """The kernel and its schedule for such tensors."""
    (stride, ((top, _), (left, _)), dilation), groups = case.geometry, case.groups
    channels, (height, width) = case.weight.shape[1], case.kernel_size
    images, outputs, rows, columns = case.y.shape
    lanes = _lanes(case)
    reach = stride[0], dilation[0] * (height - 1)
    wide = (columns - 1) * stride[1] + dilation[1] * (width - 1) + 1
    vectors = outputs // lanes
    row_bytes = 4 * channels * (lanes * groups // outputs) * wide
    found = grouped_schedule(machine.host(), (rows, columns), reach, row_bytes, images * vectors, case.threads)
    spec = GroupedSpec(
        lanes, channels, outputs // groups, groups, (height, width), (stride[0], stride[1]), (dilation[0], dilation[1]),
        found.columns, case.activation, case.residual is not None, numbers.edges(case),
    )  # fmt: skip
    tasks = images * vectors * -(-rows // found.rows)
    return GroupedPlan(spec, (found.rows, runtime.per_thread(tasks, case.threads), top, left))


def supports(case: Case) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    reason = normal.supports(case)
    if reason:
        return reason
    groups, outputs = case.groups, case.weight.shape[0] // case.groups
    if groups == 1 or not _lanes(case):
        lanes = machine.host().lanes
        return f"{groups} groups of {outputs} output channels do not fill vectors of {lanes} or {lanes // 2} numbers"
    return ""


def slower(case: Case) -> str:
    """Never: where whole groups fill a vector PyTorch's kernel takes longer."""
    return ""


def describe(case: Case) -> dict[str, Any]:
    """The schedule in words and numbers."""
    found = plan(case)
    return {"lanes": found.spec.lanes, "columns": found.spec.columns, "rows": found.numbers[0]}


def pack(found: GroupedPlan, weights: Sequence[Tensor | None]) -> list[Buffer]:
    """Copies of weight and bias as the kernel of this plan takes them."""
    weight, bias = weights
    assert weight is not None
    spec = found.spec
    # (vector, group, output, channel, y, x) -> (vector, y, x, channel, output, group)
    whole = (
        weight.detach()
        .float()
        .reshape(spec.vectors, spec.together, spec.out_channels, spec.channels, *spec.kernel_size)
    )
    panels = whole.permute(0, 4, 5, 3, 2, 1).reshape(spec.vectors, -1, spec.lanes)
    panels = panels.clone(memory_format=torch.contiguous_format)
    return [buffer(panels), buffer(packing.pack_bias(bias, weight).float())]


def bind(found: GroupedPlan, x: Tensor, packed: list[Buffer], residual: Tensor | None, out: Tensor) -> Bound:
    """The call that fills ``out`` from what is then in ``x`` and ``residual``: for repeated use of the same memory.

    ``found`` comes from :func:`plan`, ``packed`` from :func:`pack`; ``out`` and ``residual`` are channels_last, or some
    channels of such images.
    """
    images = check_pixels("grouped.bind", out, residual)
    kernel = runtime.compiled(("grouped", found.spec), lambda: build(found.spec))
    views = [normal.in_parts(image, found.spec.lanes) for image in images]
    return kernel.bind(*found.numbers, pixels(x), *packed, *views)


def prepare(case: Case) -> ConvolutionCall[GroupedPlan]:
    """``activation(F.conv2d(x, weight, bias, ...) + residual)`` for all tensors of these sizes and strides."""
    return ConvolutionCall("grouped", case, plan(case), pack, bind)
