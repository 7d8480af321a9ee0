"""The mean over all pixels of each channel: in front of a classifier, and in squeeze-and-excitation (channels_last).

Or the Euclidean length of each channel's pixels, as global response normalisation (ConvNeXt v2) asks for it.

Rows are summed first and then the sums of the rows, so that rounding grows with height plus width and not with the
number of pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.kernels.case import Case
from sepconv.kernels.halide import edges
from sepconv.kernels.halide.edges import Edges, Kinds
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.buffers import CODES, Buffer, pixels
from sepconv.kernels.halide.jit.machine_code import Bound
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.schedule import machine
from sepconv.kernels.halide.schedule.gemm import channel_lanes

# Sums kept in registers at once: enough to hide the latency of an addition.
_SUMS = 8


# More pixels of 8 bits could be more than a sum of 32 bits holds.
_MOST_COUNTED = 2**31 // 256


class PoolSpec(NamedTuple):
    """All that the code of one kernel depends on: how many channels are added up at once, ``vectors`` of ``lanes``
    numbers; ``length``: their squares."""

    lanes: int
    vectors: int
    length: bool
    kinds: Kinds


def build(spec: PoolSpec) -> tuple[Any, list[Any]]:
    """The pipeline; arguments: x as channel, column, row, image, the scales. The output is channel, image."""
    lanes, vectors, length, found = spec
    ends = Edges(found)
    x = ends.image(0, 4, "x")
    c, n, row = hl.Var("c"), hl.Var("n"), hl.Var("row")
    columns, rows = (hl.RDom([hl.Range(0, x.dim(d).extent())], f"r{d}") for d in (1, 2))
    row_sum, total, out = hl.Func("row_sum"), hl.Func("total"), hl.Func("pool")
    stored, none = x[c, columns.x, row, n], hl.f32(0.0) if length else ends.nothing(0)
    row_sum[c, row, n] = none
    row_sum[c, row, n] += _square(ends.read(0, stored)) if length else ends.addend(0, stored)
    total[c, n] = none
    total[c, n] += row_sum[c, rows.x, n]
    pixels = hl.cast(hl.Float(32), x.dim(1).extent() * x.dim(2).extent())
    out[c, n] = ends.write(hl.sqrt(total[c, n]) if length else ends.mean(0, total[c, n], pixels))

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
    return out, [x, *ends.params]


def _square(value: Any) -> Any:
    return value * value


class PoolPlan(NamedTuple):
    """The kernel for such tensors."""

    spec: PoolSpec

    @property
    def variant(self) -> str:
        """What packed weights depend on besides their numbers."""
        return "no weights"


def plan(case: Case) -> PoolPlan:
    """The kernel and its schedule for such tensors."""
    channels = case.x.shape[1]
    lanes = channel_lanes(machine.host(), channels)
    vectors = min(_SUMS, channels // lanes)
    return PoolPlan(PoolSpec(lanes, vectors, case.detail == "length", edges.kinds(case)))


def supports(case: Case) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    if case.bound and not case.result.elements:
        return "the result is empty"
    reason, pixels = edges.unsuitable(case), prod(case.x.shape[2:])
    if not reason and case.x.dtype is torch.uint8 and pixels > _MOST_COUNTED:
        return f"the kernel adds up at most {_MOST_COUNTED} pixels of 8 bits, got {pixels}"
    return reason


def slower(case: Case) -> str:
    """Never: where memory is given PyTorch's mean takes longer."""
    return ""


def describe(case: Case) -> dict[str, Any]:
    """The schedule in words and numbers."""
    return plan(case).spec._asdict()


def pack(found: PoolPlan, weights: Sequence[Tensor | None]) -> list[Buffer]:
    """There are none, but scales."""
    return edges.pack(found.spec.kinds, weights)


def bind(found: PoolPlan, x: Tensor, packed: list[Buffer], residual: Tensor | None, out: Tensor) -> Bound:
    """The call that fills ``out`` with the means of what is then in ``x``.

    Shape:
        x: (N, C, H, W), channels_last    ->    out: (N, C) or (N, C, 1, 1)
    """
    kernel = runtime.compiled(("pool", found.spec), lambda: build(found.spec))
    view = Buffer(out.shape[:2], out.stride()[:2], out.data_ptr(), CODES[out.dtype], out)
    return kernel.bind(pixels(x), *packed, view)


def prepare(case: Case) -> Callable[..., Tensor]:
    """The means of images of this size."""
    found, result = plan(case), case.result

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        out = torch.empty(result.shape, dtype=result.dtype)
        bind(found, x, pack(found, weights), None, out)()
        return out

    return run
