"""Rows brought to one mean and deviation (LayerNorm), or to one length: numbers side by side in memory, row after row.

A channels_last image is rows of channels. Each row is read from memory once: what it is compared with is known before
it has left the first cache. Sums are those of one vector's lanes, added in the end; deviations are summed around the
mean, so that nothing cancels. One kernel serves all sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.kernels.case import Case, Outline, RowNormDetail
from sepconv.kernels.halide import edges
from sepconv.kernels.halide.conv.elementwise import Rows, in_rows
from sepconv.kernels.halide.edges import Edges, Kinds
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.buffers import CODES, Buffer, buffer
from sepconv.kernels.halide.jit.machine_code import Bound
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.schedule import machine

_ROW_DIMS = 3


class RowNormSpec(NamedTuple):
    """All that the code of one kernel depends on. ``short``: rows may be less than a vector."""

    kind: str
    kinds: Kinds
    short: bool


def build(spec: RowNormSpec) -> tuple[Any, list[Any]]:
    """The pipeline; arguments: rows per task, tasks per thread, epsilon, x, weight, bias, the scales."""
    rows, share = (hl.Param(hl.Int(32), name) for name in ("rows", "share"))
    eps, lanes = hl.Param(hl.Float(32), "eps"), machine.host().lanes
    ends = Edges(spec.kinds)
    x = ends.image(0, 1 + _ROW_DIMS, "x")
    weight, bias = (hl.ImageParam(hl.Float(32), 1, name) for name in ("weight", "bias"))
    c, row = hl.Var("c"), [hl.Var(name) for name in ("r", "s", "t")]
    numbers = x.dim(0).extent()
    count = hl.cast(hl.Float(32), numbers)

    def value(i: Any) -> Any:
        return ends.read(0, x[tuple([i, *row])])

    def count_of(i: Any) -> Any:
        return ends.count(0, x[tuple([i, *row])])

    # Where some arithmetic must keep its order, sums are not put in another by the compiler.
    in_pairs = bool(ends.params)

    out, scale = hl.Func("row_norm"), hl.Func("scale")
    inner: list[Any] = []
    if spec.kind == "layer":
        mean = row_sum(inner, "mean", row, numbers, in_pairs, count_of) / count
        squares = row_sum(inner, "squares", row, numbers, in_pairs, lambda i: _square(count_of(i) - mean))
        variance = ends.scaled(0, ends.scaled(0, squares / count))
        scale[tuple(row)] = ends.scaled(0, hl.f32(1.0) / hl.sqrt(variance + eps))
        out[tuple([c, *row])] = ends.write((count_of(c) - mean) * scale[tuple(row)] * weight[c] + bias[c])
    else:
        length = hl.sqrt(row_sum(inner, "squares", row, numbers, in_pairs, lambda i: _square(value(i))))
        # A length that is NaN makes all of the row NaN.
        scale[tuple(row)] = hl.strict_float(hl.select(length < eps, eps, length))
        out[tuple([c, *row])] = ends.write(value(c) / scale[tuple(row)])

    r, s, t = row
    chunk, task = hl.Var("chunk"), hl.Var("task")
    out.vectorize(c, lanes, hl.TailStrategy.GuardWithIf if spec.short else hl.TailStrategy.ShiftInwards)
    out.split(r, chunk, r, rows, hl.TailStrategy.GuardWithIf).fuse(chunk, s, task).fuse(task, t, task)
    runtime.share(out, task, share)
    for func in (*inner, scale):
        func.compute_at(out, r)
    for param in (x, weight, bias, out.output_buffer()):
        for d in range(param.dimensions()):
            param.dim(d).set_min(0)
        param.dim(0).set_stride(1)
    return out, [rows, share, eps, x, weight, bias, *ends.params]


def _square(value: Any) -> Any:
    return value * value


def row_sum(
    funcs: list[Any], name: str, row: list[Any], numbers: Any, in_pairs: bool, value: Callable[[Any], Any]
) -> Any:
    """The sum of ``value(i)`` along a row, by vectors and then what is left; its funcs are added to the list.

    ``in_pairs``: the lanes of the vector are added as this says, not as the compiler likes.
    """
    lanes = machine.host().lanes
    lane, place = hl.Var("lane"), tuple(row)
    vectors = hl.RDom([hl.Range(0, numbers / lanes)], f"{name}_vectors")
    across = hl.RDom([hl.Range(0, lanes)], f"{name}_lanes")
    rest = hl.RDom([hl.Range(0, numbers % lanes)], f"{name}_rest")
    part, total = hl.Func(f"{name}_parts"), hl.Func(name)
    inside = tuple([lane, *row])
    part[inside] = hl.f32(0.0)
    part[inside] += value(lane + lanes * vectors.x)
    total[place] = _in_pairs([part[tuple([i, *row])] for i in range(lanes)]) if in_pairs else hl.f32(0.0)
    if not in_pairs:
        total[place] += part[tuple([across.x, *row])]
        total.update(0).atomic().vectorize(across.x)
    total[place] += value(numbers / lanes * lanes + rest.x)
    part.bound_extent(lane, lanes).vectorize(lane).update().vectorize(lane)
    total.update(0 if in_pairs else 1).unscheduled()
    funcs += [part, total]
    return total[place]


def _in_pairs(terms: list[Any]) -> Any:
    half = len(terms) // 2
    return terms[0] if not half else _in_pairs(terms[:half]) + _in_pairs(terms[half:])


class RowNormPlan(NamedTuple):
    """The kernel for such tensors, and how they are seen."""

    spec: RowNormSpec
    rows: Rows
    numbers: tuple[int, int, float]

    @property
    def variant(self) -> str:
        """What packed weights depend on besides their numbers."""
        return "rows"


def _rows(case: Case) -> Rows:
    """The rows alone, without the dimension along them."""
    x, out = (Outline(o.shape[:-1], o.stride[:-1]) for o in (case.x, case.result))
    return in_rows([x], out)


def seen(case: Case) -> tuple[Rows, tuple[int, int]]:
    """Rows with their length at the end, and the rows of a task and tasks of a thread."""
    found, length = _rows(case), case.x.shape[-1]
    missing = _ROW_DIMS - len(found.size)
    size = (*[1] * missing, *found.size)
    steps = tuple((*[0] * missing, *own, 1) for own in found.steps)
    groups = size[0] * size[1]
    rows = size[2] if groups >= case.threads else runtime.per_thread(size[2], case.threads)
    share = runtime.per_thread(-(-size[2] // rows) * groups, case.threads)
    return Rows((*size, length), steps), (rows, share)


def plan(case: Case) -> RowNormPlan:
    """The kernel and its schedule for such tensors."""
    (rows, numbers), detail = seen(case), case.detail
    assert isinstance(detail, RowNormDetail)
    spec = RowNormSpec(detail.kind, edges.kinds(case), case.x.shape[-1] < machine.host().lanes)
    return RowNormPlan(spec, rows, (*numbers, detail.eps))


def supports(case: Case) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    if not case.result.elements:
        return "the result is empty"
    reason = edges.unsuitable(case)
    if reason:
        return reason
    if any(outline.stride[-1] != 1 and outline.shape[-1] > 1 for outline in (case.x, case.result)):
        return f"the numbers of a row do not lie side by side (strides {case.x.stride})"
    dims = len(_rows(case).size)
    return (
        f"the rows lie in {dims} dimensions that cannot be one, the kernel has {_ROW_DIMS}" if dims > _ROW_DIMS else ""
    )


def slower(case: Case) -> str:
    """Where memory is given never; functions of single tensors are PyTorch's."""
    return "" if case.bound else "single operations on tensors are PyTorch's"


def describe(case: Case) -> dict[str, Any]:
    """The schedule in words and numbers."""
    found = plan(case)
    return {"rows": found.rows.size, "rows_per_task": found.numbers[0]}


def pack(found: RowNormPlan, weights: Sequence[Tensor | None]) -> list[Buffer]:
    """Factor and shift of each number of a row, 1 and 0 where there are none; and the scales."""
    constants, kinds = edges.constants(found.spec.kinds, weights), found.spec.kinds
    length = found.rows.size[-1]
    usual = torch.ones(length), torch.zeros(length)
    given = [own if known is None else known.detach() for known, own in zip(constants, usual, strict=True)]
    return [*[buffer(tensor.float().contiguous()) for tensor in given], *edges.pack(kinds, weights)]


def bind(found: RowNormPlan, x: Tensor, packed: list[Buffer], residual: Tensor | None, out: Tensor) -> Bound:
    """The call that fills ``out`` from what is then in ``x``."""
    kernel = runtime.compiled(("row_norm", found.spec), lambda: build(found.spec))
    read, written = [
        Buffer(found.rows.size, steps, tensor.data_ptr(), CODES[tensor.dtype], tensor)
        for tensor, steps in zip((x, out), found.rows.steps, strict=True)
    ]
    return kernel.bind(*found.numbers, read, *packed, written)


def prepare(case: Case) -> Callable[..., Tensor]:
    """Rows of these sizes and strides, with or without weight and bias."""
    found, result = plan(case), case.result

    def run(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *scales: Tensor) -> Tensor:
        out = torch.empty_strided(result.shape, result.stride, dtype=result.dtype)
        bind(found, x, pack(found, (weight, bias, *scales)), None, out)()
        return out

    return run
