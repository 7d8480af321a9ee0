"""Products of two computed matrices, one pair of each batch.

A tile of the result stays in registers: rows of the first matrix by neighbouring columns of the second, which is read
in whole vectors. Matrices are not packed, as they are new in every call. One kernel serves all sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.kernels.case import Case
from sepconv.kernels.halide import edges
from sepconv.kernels.halide.edges import Edges, Kinds
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.buffers import CODES, Buffer
from sepconv.kernels.halide.jit.machine_code import Bound
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.schedule import machine
from sepconv.kernels.halide.schedule.gemm import channel_lanes

SEVERAL = True
# Of a tile: vectors of columns, and rows for each number of vectors so that sums fill most of the registers.
_MOST_VECTORS, _ROWS = 4, 6
_FEW_REGISTERS, _MOST_OF_FEW, _FEW_ROWS = 16, 3, 4
# More multiply-adds than this are faster in PyTorch, whose matrices are packed.
_FEW_MACS = 40_000_000


class ProductSpec(NamedTuple):
    """All that the code of one kernel depends on: tiles of ``rows`` by ``vectors`` of ``lanes`` numbers."""

    kinds: Kinds
    lanes: int
    vectors: int
    rows: int


def build(spec: ProductSpec) -> tuple[Any, list[Any]]:
    """The pipeline; arguments: tasks per thread, the first as column, row, matrix, the second, the scales."""
    share, ends = hl.Param(hl.Int(32), "share"), Edges(spec.kinds)
    first, second = (ends.image(i, 3, name) for i, name in enumerate(("first", "second")))
    n, m, b = (hl.Var(name) for name in ("n", "m", "b"))
    depth = hl.RDom([hl.Range(0, first.dim(0).extent())], "depth")
    sums, out = hl.Func("sums"), hl.Func("product")
    sums[n, m, b] = hl.f32(0.0)
    sums[n, m, b] += ends.read(0, first[depth.x, m, b]) * ends.read(1, second[n, depth.x, b])
    out[n, m, b] = ends.write(sums[n, m, b])

    columns, rows, task, width = hl.Var("columns"), hl.Var("rows"), hl.Var("task"), spec.lanes * spec.vectors
    out.split(n, columns, n, width, hl.TailStrategy.ShiftInwards)
    out.split(m, rows, m, spec.rows, hl.TailStrategy.ShiftInwards)
    out.reorder(n, m, rows, columns, b).vectorize(n, spec.lanes).unroll(n).unroll(m)
    runtime.share(out.fuse(columns, b, task), task, share)
    sums.compute_at(out, rows).bound_extent(n, width).bound_extent(m, spec.rows)
    sums.vectorize(n, spec.lanes).unroll(n).unroll(m)
    sums.update().reorder(n, m, depth.x).vectorize(n, spec.lanes).unroll(n).unroll(m)
    for param in (first, second, out.output_buffer()):
        for d in range(3):
            param.dim(d).set_min(0)
        param.dim(0).set_stride(1)
    first.dim(0).set_stride(hl.Expr())
    return out, [share, first, second, *ends.params]


class ProductPlan(NamedTuple):
    """The kernel for such matrices. ``share``: columns of tiles of one thread."""

    spec: ProductSpec
    share: int

    @property
    def variant(self) -> str:
        """What packed weights depend on besides their numbers."""
        return "no weights"


def plan(case: Case) -> ProductPlan:
    """The kernel and its schedule for such matrices."""
    batch, rows, columns = case.result.shape
    host = machine.host()
    lanes = channel_lanes(host, columns)
    few = host.registers <= _FEW_REGISTERS
    vectors = _vectors(columns, lanes, _MOST_OF_FEW if few else _MOST_VECTORS)
    most = _FEW_ROWS if few and vectors == _MOST_OF_FEW else _ROWS
    spec = ProductSpec(edges.kinds(case), lanes, vectors, min(most, rows))
    return ProductPlan(spec, runtime.per_thread(-(-columns // (lanes * vectors)) * batch, case.threads))


def _vectors(columns: int, lanes: int, most: int) -> int:
    """As many as leave few columns to be computed twice; with more of them what is read serves more sums."""
    fitting = range(min(most, columns // lanes), 0, -1)
    return min(fitting, key=lambda count: -(-columns // (lanes * count)) * (count + 0.5))


def supports(case: Case) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    if not case.result.elements or not case.x.elements:
        return "a matrix is empty"
    reason, [second] = edges.unsuitable(case), case.others
    if not reason and any(outline.stride[2] != 1 < outline.shape[2] for outline in (second, case.result)):
        return f"the numbers of a row of the second matrix do not lie side by side (strides {second.stride})"
    return reason


def slower(case: Case) -> str:
    """Why PyTorch's product is expected to be faster, in a sentence; the empty string if it is not."""
    if not case.bound:
        return "single operations on tensors are PyTorch's"
    macs = case.result.elements * case.x.shape[2]
    return (
        f"products of more than {_FEW_MACS} multiply-adds are faster in PyTorch, got {macs}" if macs > _FEW_MACS else ""
    )


def describe(case: Case) -> dict[str, Any]:
    """The schedule in words and numbers."""
    return plan(case).spec._asdict()


def pack(found: ProductPlan, weights: Sequence[Tensor | None]) -> list[Buffer]:
    """There are none, but scales."""
    return edges.pack(found.spec.kinds, weights)


def _buffer(x: Tensor) -> Buffer:
    return Buffer(tuple(x.shape), x.stride(), x.data_ptr(), CODES[x.dtype], x)


def bind(found: ProductPlan, x: Tensor, packed: list[Buffer], others: Sequence[Tensor], out: Tensor) -> Bound:
    """The call that fills ``out`` from what is then in ``x`` and in the only one of ``others``."""
    kernel = runtime.compiled(("product", found.spec), lambda: build(found.spec))
    return kernel.bind(found.share, *map(_buffer, (x, *others)), *packed, _buffer(out))


def prepare(case: Case) -> Callable[..., Tensor]:
    """Matrices of these sizes and strides."""
    found, result = plan(case), case.result

    def run(x: Tensor, other: Tensor, *scales: Tensor) -> Tensor:
        out = torch.empty_strided(result.shape, result.stride, dtype=result.dtype)
        bind(found, x, pack(found, scales), [other], out)()
        return out

    return run
