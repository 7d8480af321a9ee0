"""The mean over all pixels of each channel: in front of a classifier, and in squeeze-and-excitation (channels_last).

Or the Euclidean length of each channel's pixels, as global response normalisation (ConvNeXt v2) asks for it.

Rows are summed first and then the sums of the rows, so that rounding grows with height plus width and not with the
number of pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.kernels.case import Case
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.buffers import Buffer, buffer, pixels
from sepconv.kernels.halide.jit.machine_code import Bound
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.schedule import machine
from sepconv.kernels.halide.schedule.gemm import channel_lanes

# Sums kept in registers at once: enough to hide the latency of an addition.
_SUMS = 8


def build(lanes: int, vectors: int, length: bool) -> tuple[Any, list[Any]]:
    """The pipeline; arguments: x as channel, column, row, image. The output is channel, image."""
    x = hl.ImageParam(hl.Float(32), 4, "x")
    c, n, row = hl.Var("c"), hl.Var("n"), hl.Var("row")
    columns, rows = (hl.RDom([hl.Range(0, x.dim(d).extent())], f"r{d}") for d in (1, 2))
    row_sum, total, out = hl.Func("row_sum"), hl.Func("total"), hl.Func("pool")
    row_sum[c, row, n] = hl.f32(0.0)
    value = x[c, columns.x, row, n]
    row_sum[c, row, n] += value * value if length else value
    total[c, n] = hl.f32(0.0)
    total[c, n] += row_sum[c, rows.x, n]
    pixels = hl.cast(hl.Float(32), x.dim(1).extent() * x.dim(2).extent())
    out[c, n] = hl.sqrt(total[c, n]) if length else total[c, n] / pixels

    block, task = hl.Var("block"), hl.Var("task")
    out.split(c, block, c, lanes * vectors, hl.TailStrategy.ShiftInwards).vectorize(c, lanes).unroll(c)
    runtime.parallel(out.fuse(block, n, task), task)
    for func, reduction, level in ((total, rows, hl.LoopLevel(out, task)), (row_sum, columns, None)):
        func.compute_at(level) if level is not None else func.compute_at(total, rows.x)
        func.bound_extent(c, lanes * vectors).vectorize(c, lanes).unroll(c)
        func.update().reorder(c, reduction.x).vectorize(c, lanes).unroll(c)
    for param in (x, out.output_buffer()):
        for d in range(param.dimensions()):
            param.dim(d).set_min(0)
        param.dim(0).set_stride(1)
    return out, [x]


class PoolPlan(NamedTuple):
    """How many channels are added up at once: ``vectors`` of ``lanes`` numbers; ``length``: their squares."""

    lanes: int
    vectors: int
    length: bool

    @property
    def variant(self) -> str:
        """What packed weights depend on besides their numbers."""
        return "no weights"


def plan(case: Case) -> PoolPlan:
    """The kernel and its schedule for such tensors."""
    channels = case.x.shape[1]
    lanes = channel_lanes(machine.host(), channels)
    return PoolPlan(lanes, min(_SUMS, channels // lanes), case.detail == "length")


def supports(case: Case) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    if case.bound and not case.result.elements:
        return "the result is empty"
    return runtime.missing() or runtime.unsuitable(case.x, case.y)


def slower(case: Case) -> str:
    """Never: where memory is given PyTorch's mean takes longer."""
    return ""


def describe(case: Case) -> dict[str, Any]:
    """The schedule in words and numbers."""
    return plan(case)._asdict()


def pack(found: PoolPlan, weights: Sequence[Tensor | None]) -> list[Buffer]:
    """There are none."""
    return []


def bind(found: PoolPlan, x: Tensor, packed: list[Buffer], residual: Tensor | None, out: Tensor) -> Bound:
    """The call that fills ``out`` with the means of what is then in ``x``.

    Shape:
        x: (N, C, H, W), channels_last    ->    out: (N, C) or (N, C, 1, 1)
    """
    kernel = runtime.compiled(("pool", *found), lambda: build(*found))
    return kernel.bind(pixels(x), buffer(out, out.shape[:2]))


def prepare(case: Case) -> Callable[[Tensor], Tensor]:
    """The means of images of this size."""
    found, shape = plan(case), case.result.shape

    def run(x: Tensor) -> Tensor:
        out = torch.empty(shape, dtype=x.dtype)
        bind(found, x, [], None, out)()
        return out

    return run
