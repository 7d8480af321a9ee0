"""Max and average pooling of channels_last images over windows of any size, stride, padding and dilation.

A task takes a few output rows. Each input row under them is first pooled along the row, into an array that stays in the
cache, and then these rows are pooled down the columns: a window of k x k pixels costs 2k steps and not k*k. Sizes of
image and window are not compiled in, so that all pools of a network share one kernel or two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.kernels.case import Case, Window
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.buffers import Buffer, check_pixels, pixels
from sepconv.kernels.halide.jit.machine_code import Bound
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.schedule import machine
from sepconv.kernels.halide.schedule.gemm import channel_lanes
from sepconv.kernels.layout import pixel_step

# Vectors of results kept in registers at once.
_VECTORS = 4
# Share of L2 for the rows of a task that are pooled along the row.
_ROWS_SHARE = 4
_NOT_FINITE = 0x7F800000


class WindowSpec(NamedTuple):
    """All that the code of one kernel depends on. ``mean``: the average, else the maximum."""

    mean: bool
    lanes: int
    vectors: int


class _Axis:
    """The window along one dimension: parameters of the kernel."""

    names = ("kernel", "stride", "dilation", "before", "low", "high")

    def __init__(self, axis: str) -> None:
        self.params = [hl.Param(hl.Int(32), f"{name}_{axis}") for name in self.names]
        self.kernel, self.stride, self.dilation, self.before, self.low, self.high = self.params

    def first(self, at: Any) -> Any:
        return at * self.stride - self.before

    def count(self, at: Any) -> Any:
        """How many numbers of the window an average divides by."""
        start = self.first(at)
        return hl.min(start + self.kernel, self.high) - hl.max(start, self.low)


def build(spec: WindowSpec) -> tuple[Any, list[Any]]:
    """The pipeline; arguments: output rows in a task, tasks of a thread, divisor of the average (0: the count), then of
    either axis, y first, what ``_Axis`` names; x as channel, column, row, image."""
    rows, share, divisor = (hl.Param(hl.Int(32), name) for name in ("rows", "share", "divisor"))
    y, x_axis = _Axis("y"), _Axis("x")
    x = hl.ImageParam(hl.Float(32), 4, "x")
    c, column, row, n = (hl.Var(name) for name in ("c", "column", "row", "n"))
    at = [c, column, row, n]

    along, taps_x = _pooled("along", spec, x_axis, x, at, 1, x.dim(1).extent())
    lines = hl.Func("lines")
    lines[at] = _value(spec, along[at])
    down, taps_y = _pooled("down", spec, y, lines, at, 2, x.dim(2).extent())
    out = hl.Func("window")
    value = _value(spec, down[at])
    if spec.mean:
        count = hl.select(divisor > 0, divisor, y.count(row) * x_axis.count(column))
        value = value / hl.cast(hl.Float(32), count)
    out[at] = value

    group, task = hl.Var("group"), hl.Var("task")
    out.split(row, group, row, rows, hl.TailStrategy.GuardWithIf)
    _by_blocks(spec, out, along=(column, row))
    runtime.share(out.fuse(group, n, task), task, share)
    lines.compute_at(out, task)
    _by_blocks(spec, lines, along=(column, row))
    for func, taps, user in ((along, taps_x, lines), (down, taps_y, out)):
        func.compute_at(user, column).bound_extent(c, spec.lanes * spec.vectors)
        func.vectorize(c, spec.lanes).unroll(c)
        func.update().reorder(c, taps.x).vectorize(c, spec.lanes).unroll(c)
    for param in (x, out.output_buffer()):
        for d in range(4):
            param.dim(d).set_min(0)
        param.dim(0).set_stride(1)
    return out, [rows, share, divisor, *y.params, *x_axis.params, x]


def _by_blocks(spec: WindowSpec, func: Any, along: tuple[Any, Any]) -> None:
    """A block of channels after the other; all pixels of a row in between."""
    block, c = hl.Var("block"), func.args()[0]
    func.split(c, block, c, spec.lanes * spec.vectors, hl.TailStrategy.ShiftInwards)
    func.reorder(c, along[0], block, along[1]).vectorize(c, spec.lanes).unroll(c)
    func.never_partition_all()


def _pooled(name: str, spec: WindowSpec, axis: _Axis, source: Any, at: list[Any], d: int, size: Any) -> tuple[Any, Any]:
    """Sums or maxima of ``source`` along dimension ``d``, and the reduction; pixels outside the image are left out."""
    taps = hl.RDom([hl.Range(0, axis.kernel)], f"taps_{name}")
    place = axis.first(at[d]) + taps.x * axis.dilation
    taps.where((place >= 0) & (place < size))
    read = source[[*at[:d], hl.clamp(place, 0, size - 1), *at[d + 1 :]]]
    pooled = hl.Func(name)
    if spec.mean:
        pooled[at] = hl.f32(0.0)
        pooled[at] += read
    else:
        # Vector units drop NaN from a maximum: the largest bits without sign tell whether there was one.
        pooled[at] = (hl.f32(float("-inf")), hl.i32(0))
        pooled[at] = (hl.max(pooled[at][0], read), hl.max(pooled[at][1], _bits(read)))
    return pooled, taps


def _bits(number: Any) -> Any:
    return hl.reinterpret(hl.Int(32), number) & hl.i32(0x7FFFFFFF)


def _value(spec: WindowSpec, pooled: Any) -> Any:
    if spec.mean:
        return pooled
    nan = hl.reinterpret(hl.Float(32), hl.i32(0x7FC00000))
    return hl.select(pooled[1] > hl.i32(_NOT_FINITE), nan, pooled[0])


class WindowPlan(NamedTuple):
    """The kernel for one input, and the numbers it is called with."""

    spec: WindowSpec
    numbers: tuple[int, ...]

    @property
    def variant(self) -> str:
        """What packed weights depend on besides their numbers."""
        return "no weights"


def plan(case: Case) -> WindowPlan:
    """The kernel and its schedule for such tensors."""
    (_, channels, *image), (images, _, out_rows, columns) = case.x.shape, case.y.shape
    (stride, padding, dilation), over = case.geometry, _window(case)
    lanes = channel_lanes(machine.host(), channels)
    spec = WindowSpec(over.mean, lanes, min(_VECTORS, channels // lanes))
    fitting = machine.host().l2_bytes // _ROWS_SHARE // (4 * channels * columns)
    rows = max(1, min(out_rows, (fitting - dilation[0] * (over.size[0] - 1)) // stride[0]))
    if images < case.threads:
        rows = min(rows, -(-out_rows // case.threads))
    numbers = [rows, runtime.per_thread(images * -(-out_rows // rows), case.threads), over.divisor]
    for d, extent in enumerate(image):
        low, high = padding[d]
        counted = (-low, extent + high) if over.counts_padding else (0, extent)
        numbers += [over.size[d], stride[d], dilation[d], low, *counted]
    return WindowPlan(spec, tuple(numbers))


def _window(case: Case) -> Window:
    if not isinstance(case.detail, Window):
        raise TypeError(f"a pool over windows has one, got {case}")
    return case.detail


def supports(case: Case) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    if not case.result.elements:
        return "the result is empty"
    reason = runtime.missing() or runtime.unsuitable(case.x, case.y)
    if reason:
        return reason
    for image in (case.x, case.y):
        if not pixel_step(image.shape, image.stride):
            return f"the kernel reads and writes channels_last images only (strides {image.stride})"
    return runtime.too_large(case.result.shape)


def slower(case: Case) -> str:
    """Never: PyTorch takes several times as long. (But for the mean of windows of 2x2 side by side: two thirds.)"""
    return ""


def describe(case: Case) -> dict[str, Any]:
    """The schedule in words and numbers."""
    found = plan(case)
    return {**found.spec._asdict(), "rows": found.numbers[0]}


def pack(found: WindowPlan, weights: Sequence[Tensor | None]) -> list[Buffer]:
    """There are none."""
    return []


def bind(found: WindowPlan, x: Tensor, packed: list[Buffer], residual: Tensor | None, out: Tensor) -> Bound:
    """The call that fills ``out`` with the pools of what is then in ``x``; both are channels_last."""
    [result] = check_pixels("window.bind", out)
    kernel = runtime.compiled(("window", found.spec), lambda: build(found.spec))
    return kernel.bind(*found.numbers, pixels(x), pixels(result))


def prepare(case: Case) -> Callable[[Tensor], Tensor]:
    """The pools of images of this size."""
    found, shape = plan(case), case.result.shape

    def run(x: Tensor) -> Tensor:
        out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        bind(found, x, [], None, out)()
        return out

    return run
