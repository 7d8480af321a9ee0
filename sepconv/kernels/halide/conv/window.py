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
from sepconv.kernels.halide import edges
from sepconv.kernels.halide.edges import Edges, Kinds
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
    """All that the code of one kernel depends on. ``mean``: the average, else the maximum.

    ``moved``: of numbers as they are stored, which must have no NaN. ``shares``: windows of an adaptive pool.
    """

    mean: bool
    lanes: int
    vectors: int
    kinds: Kinds
    moved: bool
    shares: bool = False


class _Axis:
    """The window along one dimension: parameters of the kernel."""

    names = ("kernel", "stride", "dilation", "before", "low", "high")

    def __init__(self, axis: str) -> None:
        self.params = [hl.Param(hl.Int(32), f"{name}_{axis}") for name in self.names]
        self.kernel, self.stride, self.dilation, self.before, self.low, self.high = self.params

    def first(self, at: Any) -> Any:
        return at * self.stride - self.before

    def end(self, at: Any, size: Any) -> Any:
        """Of what a window may look at, in an image of that size."""
        return size

    def count(self, at: Any) -> Any:
        """How many numbers of the window an average divides by."""
        start = self.first(at)
        return hl.min(start + self.kernel, self.high) - hl.max(start, self.low)


class _Shares(_Axis):
    """The image shared out: ``stride`` is its size and ``before`` the number of results. Neighbours may overlap."""

    def first(self, at: Any) -> Any:
        return at * self.stride / self.before

    def end(self, at: Any, size: Any) -> Any:
        return ((at + 1) * self.stride + self.before - 1) / self.before

    def count(self, at: Any) -> Any:
        return self.end(at, self.stride) - self.first(at)


def build(spec: WindowSpec) -> tuple[Any, list[Any]]:
    """The pipeline; arguments: output rows in a task, tasks of a thread, divisor of the average (0: the count), then of
    either axis, y first, what ``_Axis`` names; x as channel, column, row, image; the scales."""
    rows, share, divisor = (hl.Param(hl.Int(32), name) for name in ("rows", "share", "divisor"))
    y, x_axis = [(_Shares if spec.shares else _Axis)(name) for name in ("y", "x")]
    ends = Edges(spec.kinds)
    x = ends.image(0, 4, "x")
    c, column, row, n = (hl.Var(name) for name in ("c", "column", "row", "n"))
    at = [c, column, row, n]

    def first(place: list[Any]) -> Any:
        if spec.moved:
            return x[place]
        return ends.addend(0, x[place]) if spec.mean else ends.read(0, x[place])

    how = _Pooling(spec.mean, spec.moved, ends.nothing(0))
    along, taps_x = _pooled("along", how, x_axis, first, at, 1, x.dim(1).extent())
    lines = hl.Func("lines")
    lines[at] = how.value(along[at])
    down, taps_y = _pooled("down", how, y, lambda place: lines[place], at, 2, x.dim(2).extent())
    out = hl.Func("window")
    value = how.value(down[at])
    if spec.mean:
        count = hl.select(divisor > 0, divisor, y.count(row) * x_axis.count(column))
        value = ends.mean(0, value, hl.cast(hl.Float(32), count))
    out[at] = value if spec.moved else ends.write(value)

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
    return out, [rows, share, divisor, *y.params, *x_axis.params, x, *([] if spec.moved else ends.params)]


def _by_blocks(spec: WindowSpec, func: Any, along: tuple[Any, Any]) -> None:
    """A block of channels after the other; all pixels of a row in between."""
    block, c = hl.Var("block"), func.args()[0]
    func.split(c, block, c, spec.lanes * spec.vectors, hl.TailStrategy.ShiftInwards)
    func.reorder(c, along[0], block, along[1]).vectorize(c, spec.lanes).unroll(c)
    func.never_partition_all()


class _Pooling(NamedTuple):
    """A sum, or a maximum: of numbers as they are stored, or of float32 with what tells whether one was NaN.

    ``nothing``: the sum of no numbers.
    """

    mean: bool
    moved: bool
    nothing: Any

    @property
    def start(self) -> Any:
        if self.mean:
            return self.nothing
        return hl.u8(0) if self.moved else (hl.f32(float("-inf")), hl.i32(0))

    def more(self, pooled: Any, read: Any) -> Any:
        if self.mean:
            return pooled + read
        if self.moved:
            return hl.max(pooled, read)
        # Vector units drop NaN from a maximum: the largest bits without sign tell whether there was one.
        return hl.max(pooled[0], read), hl.max(pooled[1], _bits(read))

    def value(self, pooled: Any) -> Any:
        if self.mean or self.moved:
            return pooled
        nan = hl.reinterpret(hl.Float(32), hl.i32(0x7FC00000))
        return hl.select(pooled[1] > hl.i32(_NOT_FINITE), nan, pooled[0])


def _pooled(
    name: str, how: _Pooling, axis: _Axis, source: Callable[[list[Any]], Any], at: list[Any], d: int, size: Any
) -> tuple[Any, Any]:
    """Sums or maxima of ``source`` along dimension ``d``, and the reduction; pixels outside the image are left out."""
    taps = hl.RDom([hl.Range(0, axis.kernel)], f"taps_{name}")
    place = axis.first(at[d]) + taps.x * axis.dilation
    taps.where((place >= 0) & (place < axis.end(at[d], size)))
    pooled = hl.Func(name)
    pooled[at] = how.start
    pooled[at] = how.more(pooled[at], source([*at[:d], hl.clamp(place, 0, size - 1), *at[d + 1 :]]))
    return pooled, taps


def _bits(number: Any) -> Any:
    return hl.reinterpret(hl.Int(32), number) & hl.i32(0x7FFFFFFF)


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
    kinds = edges.kinds(case)
    moved = not over.mean and set(kinds) == {edges.COUNTED}
    lanes = channel_lanes(edges.wide(kinds) if moved else machine.host(), channels)
    spec = WindowSpec(over.mean, lanes, min(_VECTORS, channels // lanes), kinds, moved, bool(over.shares))
    fitting = machine.host().l2_bytes // _ROWS_SHARE // (4 * channels * columns)
    rows = max(1, min(out_rows, (fitting - dilation[0] * (over.size[0] - 1)) // stride[0]))
    if images < case.threads:
        rows = min(rows, -(-out_rows // case.threads))
    numbers = [rows, runtime.per_thread(images * -(-out_rows // rows), case.threads), over.divisor]
    for d, extent in enumerate(image):
        low, high = padding[d]
        counted = (-low, extent + high) if over.counts_padding else (0, extent)
        walk = (extent, 1, over.shares[d]) if over.shares else (stride[d], dilation[d], low)
        numbers += [over.size[d], *walk, *counted]
    return WindowPlan(spec, tuple(numbers))


def _window(case: Case) -> Window:
    if not isinstance(case.detail, Window):
        raise TypeError(f"a pool over windows has one, got {case}")
    return case.detail


def supports(case: Case) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    if not case.result.elements:
        return "the result is empty"
    reason = edges.unsuitable(case)
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
    """There are none, but scales where numbers are not only moved."""
    return (edges.pack_moved if found.spec.moved else edges.pack)(found.spec.kinds, weights)


def bind(found: WindowPlan, x: Tensor, packed: list[Buffer], residual: Tensor | None, out: Tensor) -> Bound:
    """The call that fills ``out`` with the pools of what is then in ``x``; both are channels_last."""
    [result] = check_pixels("window.bind", out)
    spec = found.spec
    if spec.moved and packed:
        spec = spec._replace(moved=False, vectors=1)
    kernel = runtime.compiled(("window", spec), lambda: build(spec))
    return kernel.bind(*found.numbers, pixels(x), *packed, pixels(result))


def prepare(case: Case) -> Callable[..., Tensor]:
    """The pools of images of this size."""
    found, result = plan(case), case.result

    def run(x: Tensor, *scales: Tensor) -> Tensor:
        out = torch.empty(result.shape, dtype=result.dtype, memory_format=torch.channels_last)
        bind(found, x, pack(found, scales), None, out)()
        return out

    return run
