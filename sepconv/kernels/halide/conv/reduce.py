"""Sums, means, maxima and minima along any dimensions of a tensor.

Dimensions that lie in memory alike become one. Where numbers side by side are kept (the pixels of a channels_last image
are reduced) each vector holds as many results; where they are reduced (its channels are) a vector is folded in the end.
A sum over several dimensions is one of sums, so that rounding grows slowly. One kernel serves all sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.kernels.axes import ReduceDetail, kept
from sepconv.kernels.case import Case, Outline
from sepconv.kernels.halide import edges
from sepconv.kernels.halide.conv.folds import FOLDS, RowFold
from sepconv.kernels.halide.edges import Edges, Kinds
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.buffers import CODES, Buffer
from sepconv.kernels.halide.jit.machine_code import Bound
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.schedule import machine
from sepconv.kernels.halide.schedule.gemm import channel_lanes

# Further dimensions of each kind that the kernel has besides the one side by side.
_MORE = 2
# Vectors of results kept in registers at once.
_MOST_VECTORS = 8
# Dimensions are not made one where a sum would have more numbers than this.
_LONGEST_SUM = 1024
# Numbers whose extremes cost more than a call of PyTorch, which looks for NaN in another way.
_MANY = 1 << 14


class ReduceSpec(NamedTuple):
    """All that the code of one kernel depends on.

    ``vectors`` of ``lanes`` results at once; none where what lies side by side is reduced.
    """

    what: str
    kinds: Kinds
    lanes: int = 0
    vectors: int = 0


def build(spec: ReduceSpec) -> tuple[Any, list[Any]]:
    """The pipeline; arguments: tasks per thread, how many numbers are made one, x, the scales.

    x is what lies side by side, two dimensions that are reduced, two that are kept.
    """
    share, count = hl.Param(hl.Int(32), "share"), hl.Param(hl.Float(32), "count")
    ends = Edges(spec.kinds)
    x = ends.image(0, 1 + 2 * _MORE, "x")
    out = (_columns if spec.vectors else _rows)(spec, x, ends, (share, count))
    for param in (x, out.output_buffer()):
        for d in range(param.dimensions()):
            param.dim(d).set_min(0)
    x.dim(0).set_stride(1)
    out.output_buffer().dim(0).set_stride(1 if spec.vectors else hl.Expr())
    return out, [share, count, x, *ends.params]


def _result(spec: ReduceSpec, folded: Any, count: Any, ends: Edges) -> Any:
    return ends.write(folded / count if spec.what == "mean" else folded)


def _columns(spec: ReduceSpec, x: Any, ends: Edges, params: tuple[Any, Any]) -> Any:
    """Results side by side, each of numbers that lie apart."""
    (share, count), fold = params, FOLDS[spec.what]
    i, t, u, s = (hl.Var(name) for name in ("i", "t", "u", "s"))
    along, down = (hl.RDom([hl.Range(0, x.dim(d).extent())], f"r{d}") for d in (1, 2))
    line, total, out = hl.Func("line"), hl.Func("total"), hl.Func("reduce")
    line[i, s, t, u] = fold.nothing()
    line[i, s, t, u] = fold.both(line[i, s, t, u], ends.read(0, x[i, along.x, s, t, u]))
    total[i, t, u] = fold.nothing()
    total[i, t, u] = fold.both(total[i, t, u], line[i, down.x, t, u])
    out[i, t, u] = _result(spec, total[i, t, u], count, ends)

    block, task, width = hl.Var("block"), hl.Var("task"), spec.lanes * spec.vectors
    out.split(i, block, i, width, hl.TailStrategy.ShiftInwards).vectorize(i, spec.lanes).unroll(i)
    runtime.share(out.fuse(block, t, task).fuse(task, u, task), task, share)
    for func, reduction, level in ((total, down, hl.LoopLevel(out, task)), (line, along, None)):
        func.compute_at(level) if level is not None else func.compute_at(total, down.x)
        func.bound_extent(i, width).vectorize(i, spec.lanes).unroll(i)
        func.update().reorder(i, reduction.x).vectorize(i, spec.lanes).unroll(i)
    return out


def _rows(spec: ReduceSpec, x: Any, ends: Edges, params: tuple[Any, Any]) -> Any:
    """Results of numbers side by side."""
    (share, count), (t, u) = params, (hl.Var(name) for name in ("t", "u"))
    sizes = [x.dim(d).extent() for d in range(1 + _MORE)]
    found = RowFold("folded", FOLDS[spec.what], (t, u), sizes, lambda *at: ends.read(0, x[tuple([*at, t, u])]))
    out, task = hl.Func("reduce"), hl.Var("task")
    out[t, u] = _result(spec, found.value, count, ends)
    runtime.share(out.fuse(t, u, task), task, share)
    for func in found.funcs:
        func.compute_at(out, task)
    return out


class _Dimension(NamedTuple):
    """Some dimensions as one: ``step`` in x and in the result, which is 0 of what is reduced."""

    reduced: bool
    size: int
    step: int
    out: int


class _View(NamedTuple):
    """How x is seen: what lies side by side, what else is reduced and what else is kept."""

    inner: _Dimension
    reduced: list[_Dimension]
    kept: list[_Dimension]

    @property
    def readable(self) -> bool:
        apart = self.inner.size > 1 and (self.inner.step != 1 or self.inner.out not in (0, 1))
        return not apart and max(len(self.reduced), len(self.kept)) <= _MORE


def _detail(case: Case) -> ReduceDetail:
    if not isinstance(case.detail, ReduceDetail):
        raise TypeError(f"a reduction has dimensions, got {case}")
    return case.detail


def _view(x: Outline, out: Outline, dims: Sequence[int]) -> _View:
    """The fewest dimensions, but for sums that would be long."""
    apart = _merged(x, out, dims, _LONGEST_SUM)
    return apart if apart.readable else _merged(x, out, dims, x.elements)


def _merged(x: Outline, out: Outline, dims: Sequence[int], longest: int) -> _View:
    steps = dict.fromkeys(range(len(x.shape)), 0)
    squeezed = len(out.shape) < len(x.shape)
    for i, d in enumerate(kept(x.shape, dims)):
        steps[d] = out.stride[i if squeezed else d]
    found: list[_Dimension] = []
    for d in sorted((d for d, size in enumerate(x.shape) if size > 1), key=lambda d: (x.stride[d], -d)):
        now = _Dimension(d in dims, x.shape[d], x.stride[d], steps[d])
        last = found[-1] if found else None
        if last is not None and _follows(now, last) and not (now.reduced and last.size * now.size > longest):
            found[-1] = last._replace(size=last.size * now.size)
        else:
            found.append(now)
    inner, *rest = found or [_Dimension(True, 1, 1, 0)]
    return _View(inner, [part for part in rest if part.reduced], [part for part in rest if not part.reduced])


def _follows(now: _Dimension, last: _Dimension) -> bool:
    together = now.step == last.step * last.size and now.out == last.out * last.size
    return now.reduced == last.reduced and together


def unreadable(x: Outline, out: Outline, dims: Sequence[int]) -> str:
    """Why x cannot be read as it lies, in a sentence; the empty string if it can."""
    view = _view(x, out, dims)
    if view.readable:
        return ""
    return f"the kernel reduces {_MORE} dimensions that lie apart, beside numbers side by side (strides {x.stride})"


class ReducePlan(NamedTuple):
    """The kernel for such tensors, how both are seen, and the numbers it is called with."""

    spec: ReduceSpec
    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    written: tuple[tuple[int, ...], tuple[int, ...]]
    numbers: tuple[int, float]

    @property
    def variant(self) -> str:
        """What packed weights depend on besides their numbers."""
        return "no weights"


def plan(case: Case) -> ReducePlan:
    """The kernel and its schedule for such tensors."""
    detail = _detail(case)
    inner, reduced, others = _view(case.x, case.result, detail.dims)
    none = _Dimension(True, 1, 0, 0)
    folded, left = ([*parts, *[none] * (_MORE - len(parts))] for parts in (reduced, others))
    seen = [inner._replace(step=1), *folded, *left]
    spec, results = ReduceSpec(detail.what, edges.kinds(case)), prod(part.size for part in left)
    if not inner.reduced:
        lanes = channel_lanes(machine.host(), inner.size)
        spec = spec._replace(lanes=lanes, vectors=min(_MOST_VECTORS, inner.size // lanes))
        results *= -(-inner.size // (lanes * spec.vectors))
    written = left if inner.reduced else [inner._replace(out=1), *left]
    count = prod(case.x.shape[d] for d in detail.dims)
    return ReducePlan(
        spec,
        tuple(part.size for part in reversed(seen)),
        tuple(part.step for part in reversed(seen)),
        (tuple(part.size for part in reversed(written)), tuple(part.out for part in reversed(written))),
        (runtime.per_thread(results, case.threads), float(count)),
    )


def supports(case: Case) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    if not case.result.elements or not case.x.elements:
        return "the tensor is empty"
    return edges.unsuitable(case) or unreadable(case.x, case.result, _detail(case).dims)


def slower(case: Case) -> str:
    """Why PyTorch's is expected to be faster, in a sentence; the empty string if it is not."""
    if not case.bound:
        return "single operations on tensors are PyTorch's"
    detail = _detail(case)
    along = detail.what in ("amax", "amin") and _view(case.x, case.result, detail.dims).inner.reduced
    if along and case.x.elements > _MANY:
        return f"extremes of many numbers side by side are faster in PyTorch, got {case.x.elements} numbers"
    return ""


def describe(case: Case) -> dict[str, Any]:
    """The schedule in words and numbers."""
    found = plan(case)
    return {**found.spec._asdict(), "sizes": found.sizes}


def pack(found: ReducePlan, weights: Sequence[Tensor | None]) -> list[Buffer]:
    """There are none, but scales."""
    return edges.pack(found.spec.kinds, weights)


def bind(found: ReducePlan, x: Tensor, packed: list[Buffer], residual: Tensor | None, out: Tensor) -> Bound:
    """The call that fills ``out`` from what is then in ``x``."""
    kernel = runtime.compiled(("reduce", found.spec), lambda: build(found.spec))
    read = Buffer(found.sizes, found.steps, x.data_ptr(), CODES[x.dtype], x)
    written = Buffer(*found.written, out.data_ptr(), CODES[out.dtype], out)
    return kernel.bind(*found.numbers, read, *packed, written)


def prepare(case: Case) -> Callable[..., Tensor]:
    """Tensors of this size and these strides."""
    found, result = plan(case), case.result

    def run(x: Tensor, *scales: Tensor) -> Tensor:
        out = torch.empty_strided(result.shape, result.stride, dtype=result.dtype)
        bind(found, x, pack(found, scales), None, out)()
        return out

    return run
