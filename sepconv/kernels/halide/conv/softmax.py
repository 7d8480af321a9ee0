"""Softmax and its logarithm along rows: numbers side by side in memory, row after row.

The largest number of a row is found first, so that no exponential is infinite; exponentials are computed once and kept
in the cache. One kernel serves all sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.kernels.case import Case
from sepconv.kernels.expression import logarithm
from sepconv.kernels.halide import edges
from sepconv.kernels.halide.conv import rownorm
from sepconv.kernels.halide.conv.elementwise import Rows
from sepconv.kernels.halide.conv.folds import LARGEST, SUM, RowFold
from sepconv.kernels.halide.edges import Edges, Kinds
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.buffers import CODES, Buffer
from sepconv.kernels.halide.jit.machine_code import Bound
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.schedule import machine

_ROW_DIMS = 3


class SoftmaxSpec(NamedTuple):
    """All that the code of one kernel depends on. ``short``: rows may be less than a vector."""

    kind: str
    kinds: Kinds
    short: bool


def build(spec: SoftmaxSpec) -> tuple[Any, list[Any]]:
    """The pipeline; arguments: rows per task, tasks per thread, x, the scales."""
    rows, share = (hl.Param(hl.Int(32), name) for name in ("rows", "share"))
    ends, lanes = Edges(spec.kinds), machine.host().lanes
    x = ends.image(0, 1 + _ROW_DIMS, "x")
    c, row = hl.Var("c"), [hl.Var(name) for name in ("r", "s", "t")]
    sizes, inside = [x.dim(0).extent()], tuple([c, *row])

    def value(i: Any) -> Any:
        return ends.read(0, x[tuple([i, *row])])

    largest = RowFold("largest", LARGEST, row, sizes, value)
    power, out = hl.Func("power"), hl.Func(spec.kind)
    power[inside] = _exponential(value(c) - largest.value)
    total = RowFold("total", SUM, row, sizes, lambda i: power[tuple([i, *row])])
    last = hl.Func("last")
    if spec.kind == "softmax":
        last[tuple(row)] = hl.f32(1.0) / total.value
        out[inside] = ends.write(power[inside] * last[tuple(row)])
    else:
        last[tuple(row)] = hl.strict_float(logarithm(hl, total.value))
        out[inside] = ends.write(hl.strict_float(value(c) - largest.value - last[tuple(row)]))

    (r, s, t), chunk, task = row, hl.Var("chunk"), hl.Var("task")
    tail = hl.TailStrategy.GuardWithIf if spec.short else hl.TailStrategy.ShiftInwards
    out.vectorize(c, lanes, tail)
    out.split(r, chunk, r, rows, hl.TailStrategy.GuardWithIf).fuse(chunk, s, task).fuse(task, t, task)
    runtime.share(out, task, share)
    for func in (*largest.funcs, *total.funcs, last):
        func.compute_at(out, r)
    power.compute_at(out, r).vectorize(c, lanes, hl.TailStrategy.GuardWithIf)
    for param in (x, out.output_buffer()):
        for d in range(param.dimensions()):
            param.dim(d).set_min(0)
        param.dim(0).set_stride(1)
    return out, [rows, share, x, *ends.params]


def _exponential(x: Any) -> Any:
    """exp(x) of numbers that are not positive, within 2e-7 (Cephes), by sums and products of which two are one
    instruction."""
    low = hl.strict_float(x < hl.f32(-87.3))
    power = hl.round(x * hl.f32(1.44269504))
    part = (x - power * hl.f32(0.693359375)) + power * hl.f32(2.12194440e-4)
    curve = hl.f32(1.9875691500e-4)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0):
        curve = curve * part + hl.f32(factor)
    scale = hl.reinterpret(hl.Float(32), (hl.cast(hl.Int(32), power) + 127) << 23)
    return hl.select(low, hl.f32(0.0), curve * scale)


class SoftmaxPlan(NamedTuple):
    """The kernel for such tensors, and how they are seen."""

    spec: SoftmaxSpec
    rows: Rows
    numbers: tuple[int, int]

    @property
    def variant(self) -> str:
        """What packed weights depend on besides their numbers."""
        return "rows"


def plan(case: Case) -> SoftmaxPlan:
    """The kernel and its schedule for such tensors."""
    rows, numbers = rownorm.seen(case)
    short = case.x.shape[-1] < machine.host().lanes
    return SoftmaxPlan(SoftmaxSpec(str(case.detail), edges.kinds(case), short), rows, numbers)


def supports(case: Case) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    return rownorm.supports(case)


def slower(case: Case) -> str:
    """Where memory is given never; functions of single tensors are PyTorch's."""
    return "" if case.bound else "single operations on tensors are PyTorch's"


def describe(case: Case) -> dict[str, Any]:
    """The schedule in words and numbers."""
    found = plan(case)
    return {"rows": found.rows.size, "rows_per_task": found.numbers[0]}


def pack(found: SoftmaxPlan, weights: Sequence[Tensor | None]) -> list[Buffer]:
    """There are none, but scales."""
    return edges.pack(found.spec.kinds, weights)


def bind(found: SoftmaxPlan, x: Tensor, packed: list[Buffer], residual: Tensor | None, out: Tensor) -> Bound:
    """The call that fills ``out`` from what is then in ``x``."""
    kernel = runtime.compiled(("softmax", found.spec), lambda: build(found.spec))
    read, written = [
        Buffer(found.rows.size, steps, tensor.data_ptr(), CODES[tensor.dtype], tensor)
        for tensor, steps in zip((x, out), found.rows.steps, strict=True)
    ]
    return kernel.bind(*found.numbers, read, *packed, written)


def prepare(case: Case) -> Callable[..., Tensor]:
    """Rows of these sizes and strides."""
    found, result = plan(case), case.result

    def run(x: Tensor, *scales: Tensor) -> Tensor:
        out = torch.empty_strided(result.shape, result.stride, dtype=result.dtype)
        bind(found, x, pack(found, scales), None, out)()
        return out

    return run
