"""Images of another size: nearest, bilinear and bicubic, for channels_last images.

Which rows and columns a pixel is made of, and with which weights, is computed once for a size and read from tables: the
kernel is the same for every scale and alignment. Numbers of one kind are moved as they are by "nearest".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.kernels.case import Case, ResizeDetail
from sepconv.kernels.halide import edges
from sepconv.kernels.halide.edges import Edges, Kinds
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.buffers import Buffer, buffer, pixels
from sepconv.kernels.halide.jit.machine_code import Bound
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.schedule import machine

_TAPS = {"nearest": 1, "nearest-exact": 1, "bilinear": 2, "bicubic": 4}
MODES = tuple(_TAPS)
_TABLES = 4
# Of the cubic convolution, as PyTorch has it.
_SHARPNESS = -0.75


class ResizeSpec(NamedTuple):
    """All that the code of one kernel depends on. ``short``: fewer channels than a vector has lanes."""

    taps: int
    kinds: Kinds
    moved: bool
    lanes: int
    short: bool


def build(spec: ResizeSpec) -> tuple[Any, list[Any]]:
    """The pipeline; arguments: tasks per thread, x, rows and columns that are read, their weights, the scales."""
    share = hl.Param(hl.Int(32), "share")
    ends = Edges(spec.kinds)
    x = ends.image(0, 4, "x")
    places = [hl.ImageParam(hl.Int(32), 2, name) for name in ("rows", "columns")]
    weights = [hl.ImageParam(hl.Float(32), 2, name) for name in ("row_weights", "column_weights")]
    c, column, row, n = (hl.Var(name) for name in ("c", "column", "row", "n"))

    def place(axis: int, tap: int, at: Any) -> Any:
        # Halide cannot know what a table holds.
        return hl.clamp(places[axis][tap, at], 0, x.dim(2 - axis).extent() - 1)

    def mixed(axis: int, at: Any, value: Callable[[Any], Any]) -> Any:
        if spec.taps == 1:
            return value(place(axis, 0, at))
        parts = [weights[axis][tap, at] * value(place(axis, tap, at)) for tap in range(spec.taps)]
        return sum(parts[1:], parts[0])

    out = hl.Func("resize")

    def value(at: Any, y: Any) -> Any:
        return x[c, at, y, n] if spec.moved else ends.count(0, x[c, at, y, n])

    result = mixed(0, row, lambda y: mixed(1, column, lambda at: value(at, y)))
    out[c, column, row, n] = result if spec.moved else ends.write(ends.value(0, result))

    task = hl.Var("task")
    out.vectorize(c, spec.lanes, hl.TailStrategy.GuardWithIf if spec.short else hl.TailStrategy.ShiftInwards)
    runtime.share(out.fuse(row, n, task), task, share)
    for param in (x, *places, *weights, out.output_buffer()):
        for d in range(param.dimensions()):
            param.dim(d).set_min(0)
        param.dim(0).set_stride(1)
    for table in (*places, *weights):
        table.dim(0).set_extent(spec.taps)
        table.dim(1).set_stride(spec.taps)
    return out, [share, x, *places, *weights, *([] if spec.moved else ends.params)]


class ResizePlan(NamedTuple):
    """The kernel, and for rows and columns the sizes of both images with the scale that was asked for."""

    spec: ResizeSpec
    share: int
    detail: ResizeDetail
    sizes: tuple[tuple[int, int], tuple[int, int]]

    @property
    def variant(self) -> tuple[object, ...]:
        """What packed tables depend on."""
        return self.detail, self.sizes


def plan(case: Case) -> ResizePlan:
    """The kernel and its tables for such tensors."""
    detail = case.detail
    assert isinstance(detail, ResizeDetail)
    (_, channels, *before), (images, _, *after) = case.x.shape, case.result.shape
    taps, kinds = _TAPS[detail.mode], edges.kinds(case)
    moved = taps == 1 and edges.moved(kinds)
    lanes = edges.wide(kinds).lanes if moved else machine.host().lanes
    lanes = lanes if channels >= lanes else machine.host().lanes
    spec = ResizeSpec(taps, kinds, moved, lanes, channels < lanes)
    sizes = ((before[0], after[0]), (before[1], after[1]))
    return ResizePlan(spec, runtime.per_thread(after[0] * images, case.threads), detail, sizes)


def supports(case: Case) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    if not case.result.elements or not case.x.elements:
        return "the result is empty"
    reason = edges.unsuitable(case)
    if reason:
        return reason
    for outline in (case.x, case.result):
        if outline.shape[1] > 1 and outline.stride[1] != 1:
            return f"the kernel is for channels_last images (strides {outline.stride})"
    return ""


def slower(case: Case) -> str:
    """Where memory is given never; functions of single tensors are PyTorch's."""
    return "" if case.bound else "single operations on tensors are PyTorch's"


def describe(case: Case) -> dict[str, Any]:
    """The schedule in words and numbers."""
    found = plan(case)
    return {"taps": found.spec.taps, "rows_per_thread": found.share}


def pack(found: ResizePlan, weights: Sequence[Tensor | None]) -> list[Buffer]:
    """The tables of rows and columns, and the scales where numbers are not only moved."""
    axes = [
        _table(found.detail.mode, found.detail.align_corners, scale, *sizes)
        for scale, sizes in zip(found.detail.scales, found.sizes, strict=True)
    ]
    tables = [buffer(axis.places.numpy()) for axis in axes] + [buffer(axis.weights) for axis in axes]
    scales = edges.pack_moved if found.spec.moved else edges.pack
    return tables + scales(found.spec.kinds, weights)


class _Table(NamedTuple):
    """For each pixel along an axis those that it is made of, (size, taps), and their weights."""

    places: Tensor
    weights: Tensor


def _table(mode: str, align_corners: bool, scale: float | None, before: int, after: int) -> _Table:
    """As PyTorch computes them, in float32."""
    at, taps = torch.arange(after, dtype=torch.float32), _TAPS[mode]
    step = torch.tensor(before / after if scale is None or scale <= 0 else 1 / scale, dtype=torch.float32)
    if taps == 1:
        source = (at + 0.5) * step if mode == "nearest-exact" else at * step
        places = source.floor().int().clamp(0, before - 1)[:, None]
        return _Table(places.contiguous(), torch.ones(after, 1))
    if align_corners:
        source = at * torch.tensor((before - 1) / (after - 1) if after > 1 else 0.0, dtype=torch.float32)
    else:
        source = (at + 0.5) * step - 0.5
    first = source.floor()
    part = source - first
    weights = torch.stack([1 - part, part] if taps == 2 else _cubic(part), 1)
    offsets = torch.arange(taps) - (taps // 2 - 1)
    places = (first[:, None].int() + offsets.int()).clamp(0, before - 1)
    return _Table(places.int().contiguous(), weights.contiguous())


def _cubic(part: Tensor) -> list[Tensor]:
    a = _SHARPNESS

    def near(x: Tensor) -> Tensor:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: Tensor) -> Tensor:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    return [far(part + 1), near(part), near(1 - part), far(2 - part)]


def bind(found: ResizePlan, x: Tensor, packed: list[Buffer], residual: Tensor | None, out: Tensor) -> Bound:
    """The call that fills ``out`` from what is then in ``x``; both are channels_last."""
    spec = found.spec._replace(moved=found.spec.moved and len(packed) == _TABLES)
    kernel = runtime.compiled(("resize", spec), lambda: build(spec))
    return kernel.bind(found.share, pixels(x), *packed, pixels(out))


def prepare(case: Case) -> Callable[..., Tensor]:
    """Images of this size brought to another."""
    found, result = plan(case), case.result

    def run(x: Tensor, *scales: Tensor) -> Tensor:
        out = torch.empty_strided(result.shape, result.stride, dtype=result.dtype)
        bind(found, x, pack(found, scales), None, out)()
        return out

    return run
