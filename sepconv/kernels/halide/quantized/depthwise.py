"""Depthwise convolution of bytes, with all that follows in one pass (channels_last)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

from torch import Tensor

from sepconv.kernels.case import Case
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.buffers import Buffer, check_pixels, pixels
from sepconv.kernels.halide.jit.machine_code import Bound
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.quantized import epilogue, filters, product
from sepconv.kernels.halide.quantized.epilogue import Constants, Ending
from sepconv.kernels.halide.quantized.filters import FilterSpec8


class DepthwiseSpec8(NamedTuple):
    """All that the code of one kernel depends on."""

    filter: FilterSpec8
    epilogue: Ending
    way: str


class DepthwisePlan8(NamedTuple):
    """The kernel for one input, and the numbers it is called with."""

    spec: DepthwiseSpec8
    numbers: tuple[int, int, int]

    @property
    def variant(self) -> tuple[FilterSpec8, Ending]:
        """What packed weights depend on besides their numbers."""
        return self.spec.filter, self.spec.epilogue


def build(spec: DepthwiseSpec8) -> tuple[Any, list[Any]]:
    """The pipeline; arguments: tasks per thread, top and left padding, x, packed weights, bias, scale, numbers."""
    given = spec.filter
    share, top, left = (hl.Param(hl.Int(32), name) for name in ("share", "top", "left"))
    x = channels_inside(hl.ImageParam(hl.UInt(8), 4, "x"), given.channels // given.multiplier)
    weight, constants = filters.weight_param(given), Constants(given.channels)
    stages = filters.filtered(given, x, [weight, constants.bias], (top, left), constants.byte("x_zero"))
    c, column, row, n = (hl.Var(name) for name in ("c", "column", "row", "n"))
    out = hl.Func("depthwise8")
    sums = stages.sums[c, column, row % given.tile.rows, row // given.tile.rows, n]
    out[c, column, row, n] = epilogue.finished(spec.epilogue, sums, c, constants)
    channels_inside(out.output_buffer(), given.channels)

    names = ("block", "c_in", "vector", "step", "column_in", "part", "within", "task")
    block, c_in, vector, step, column_in, part, within, task = (hl.Var(name) for name in names)
    shift = hl.TailStrategy.ShiftInwards
    out.bound(c, 0, given.channels).split(c, block, c_in, given.tile.block, shift)
    out.split(c_in, vector, c_in, given.tile.lanes).split(column, step, column_in, given.tile.columns, shift)
    out.split(row, part, within, given.tile.rows, hl.TailStrategy.GuardWithIf)
    out.reorder(c_in, column_in, within, step, vector, block, part, n).fuse(part, n, task)
    runtime.share(out, task, share)
    out.vectorize(c_in).unroll(column_in).unroll(within).never_partition_all()
    stages.sums.compute_at(out, step)
    stages.beside.compute_at(out, block)
    filters.arrange(given, stages)
    return out, [share, top, left, x, weight, *constants.parameters]


def channels_inside(image: Any, channels: int) -> Any:
    """Channel, column, row, image; the channels of a pixel side by side."""
    image.dim(0).set_extent(channels).set_stride(1)
    for d in range(4):
        image.dim(d).set_min(0)
    return image


def plan(case: Case) -> DepthwisePlan8:
    """The kernel for such tensors."""
    return planned(case, product.best(prod(case.kernel_size), 0))


def planned(case: Case, way: str) -> DepthwisePlan8:
    """The kernel that multiplies in one of ``product.ways()`` without tiles."""
    given = filters.spec(case, way)
    (top, _), (left, _) = case.geometry.padding
    tasks = case.y.shape[0] * -(-case.y.shape[2] // given.tile.rows)
    spec = DepthwiseSpec8(given, Ending.of(case), way)
    return DepthwisePlan8(spec, (runtime.per_thread(tasks, case.threads), top, left))


def supports(case: Case) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    return epilogue.unsuitable(case) or epilogue.no_pixels(case) or _no_residual(case)


def _no_residual(case: Case) -> str:
    return "" if case.residual is None else "nothing is added to depthwise sums"


def slower(case: Case) -> str:
    """Never: PyTorch computes such layers in float32."""
    return ""


def describe(case: Case) -> dict[str, Any]:
    """The schedule in words and numbers."""
    spec = plan(case).spec
    return {"layout": "channels_last", "product": product.NAMES[spec.way], **spec.filter.tile._asdict()}


def pack(found: DepthwisePlan8, weights: Sequence[Tensor | None]) -> list[Buffer]:
    """Copies of weight, bias, scale and numbers as the kernel takes them."""
    given = epilogue.constants(weights)
    spec = found.spec
    return [filters.pack(spec.filter, given.weight), *epilogue.pack(spec.epilogue, given, product.less(spec.way))]


def bind(found: DepthwisePlan8, x: Tensor, packed: list[Buffer], residual: Tensor | None, out: Tensor) -> Bound:
    """The call that fills ``out`` from what is then in ``x``: for repeated use of the same memory."""
    check_pixels("depthwise.bind", out)
    spec = found.spec
    kernel = runtime.compiled(("depthwise8", spec), lambda: build(spec), old=spec.way == product.PAIRS)
    return kernel.bind(*found.numbers, pixels(x), *packed, pixels(out))


prepare = epilogue.prepare
