"""Sums, products and activations number by number: each tensor is read once and the result written once.

Neighbouring dimensions that lie in memory alike for all tensors become one. What is left are rows: a number along a row
is a vector's, and a tensor that has one number for all of a row (a gate per channel of a contiguous image, a factor per
pixel of a channels_last one) gives that. One kernel serves all sizes, batches and layouts.

Every tensor has numbers of its own kind: an expression that is its only tensor converts from one to another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.kernels.case import Case, Outline
from sepconv.kernels.expression import Expression
from sepconv.kernels.halide import edges
from sepconv.kernels.halide.edges import Edges, Kinds
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.buffers import CODES, Buffer, buffer
from sepconv.kernels.halide.jit.machine_code import Bound
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.schedule import machine

SEVERAL = True
_DIMS = 4
# A row is no longer than this where it could be several: rows are what threads share.
_LONGEST_ROW = 8192


class ElementwiseSpec(NamedTuple):
    """All that the code of one kernel depends on.

    ``spread``: for each tensor, whether it has one number for all of a row. ``short``: rows may be less than a vector.
    """

    expression: Expression
    kinds: Kinds
    spread: tuple[bool, ...]
    short: bool


def build(spec: ElementwiseSpec) -> tuple[Any, list[Any]]:
    """The pipeline; arguments: rows per task, tasks per thread, the tensors, the numbers, the scales."""
    rows, share = (hl.Param(hl.Int(32), name) for name in ("rows", "share"))
    ends = Edges(spec.kinds)
    tensors = [ends.image(i, _DIMS, f"x{i}") for i in range(spec.expression.tensors)]
    numbers = hl.ImageParam(hl.Float(32), 1, "numbers")
    i, r, s, t = (hl.Var(name) for name in ("i", "r", "s", "t"))
    stored = [x[0 if spread else i, r, s, t] for x, spread in zip(tensors, spec.spread, strict=True)]
    read = [ends.read(k, number) for k, number in enumerate(stored)]
    constants = [numbers[k] for k in range(spec.expression.numbers)]
    out = hl.Func("elementwise")
    out[i, r, s, t] = ends.write(spec.expression.in_halide(hl, read, constants))

    chunk, task = hl.Var("chunk"), hl.Var("task")
    tail = hl.TailStrategy.GuardWithIf if spec.short else hl.TailStrategy.ShiftInwards
    out.vectorize(i, machine.host().lanes, tail)
    out.split(r, chunk, r, rows, hl.TailStrategy.GuardWithIf).fuse(chunk, s, task).fuse(task, t, task)
    runtime.share(out, task, share)
    for param in (*tensors, numbers, out.output_buffer()):
        for d in range(param.dimensions()):
            param.dim(d).set_min(0)
        param.dim(0).set_stride(1)
    return out, [rows, share, *tensors, numbers, *ends.params]


class Rows(NamedTuple):
    """Tensors seen as rows: one size for all, and the steps of each, the result's last; the row's dimension last."""

    size: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]


def in_rows(tensors: Sequence[Outline], out: Outline) -> Rows:
    """The fewest dimensions that say how these tensors, broadcast, and the result lie in memory."""
    spread = [_broadcast(tensor, out.shape) for tensor in tensors]
    all_steps = [*spread, out.stride]
    order = sorted((d for d, size in enumerate(out.shape) if size != 1), key=lambda d: (-out.stride[d], d))
    size: list[int] = []
    steps: list[list[int]] = [[] for _ in all_steps]
    for d in reversed(order):
        merged = bool(size) and all(known[d] == own[0] * size[0] for known, own in zip(all_steps, steps, strict=True))
        if merged and (len(size) > 1 or size[0] * out.shape[d] <= _LONGEST_ROW):
            size[0] *= out.shape[d]
        else:
            size.insert(0, out.shape[d])
            for known, own in zip(all_steps, steps, strict=True):
                own.insert(0, known[d])
    if not size:
        size, steps = [1], [[1] for _ in all_steps]
    return Rows(tuple(size), tuple(map(tuple, steps)))


def _broadcast(tensor: Outline, shape: Sequence[int]) -> tuple[int, ...]:
    """The steps of a tensor along the dimensions of the result, 0 where it is the same for all."""
    missing = len(shape) - len(tensor.shape)
    own = zip(tensor.shape, tensor.stride, shape[missing:], strict=True)
    return (*[0] * missing, *[0 if size == 1 and whole != 1 else step for size, step, whole in own])


class ElementwisePlan(NamedTuple):
    """The kernel for such tensors, and how they are seen."""

    spec: ElementwiseSpec
    rows: Rows
    numbers: tuple[int, int]

    @property
    def variant(self) -> str:
        """What packed numbers depend on besides themselves."""
        return "numbers"


def plan(case: Case) -> ElementwisePlan:
    """The kernel and its schedule for such tensors."""
    found, expression = _rows(case), case.detail
    assert isinstance(expression, Expression)
    short = found.size[-1] < machine.host().lanes
    spread = tuple(found.size[-1] != 1 and steps[-1] == 0 for steps in found.steps[:-1])
    spec = ElementwiseSpec(expression, edges.kinds(case), spread, short)
    size = (*[1] * (_DIMS - len(found.size)), *found.size)
    steps = tuple((*[0] * (_DIMS - len(own)), *own) for own in found.steps)
    groups = size[0] * size[1]
    rows = size[2] if groups >= case.threads else runtime.per_thread(size[2], case.threads)
    share = runtime.per_thread(-(-size[2] // rows) * groups, case.threads)
    return ElementwisePlan(spec, Rows(size, steps), (rows, share))


def _rows(case: Case) -> Rows:
    return in_rows((case.x, *case.others), case.result)


def supports(case: Case) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    if not case.result.elements:
        return "the result is empty"
    reason = edges.unsuitable(case)
    return reason or unreadable((case.x, *case.others), case.result)


def unreadable(tensors: Sequence[Outline], out: Outline) -> str:
    """Why the tensors cannot be read row by row, in a sentence; the empty string if they can."""
    found = in_rows(tensors, out)
    if len(found.size) > _DIMS:
        return f"the tensors lie in memory in {len(found.size)} dimensions that cannot be one, the kernel has {_DIMS}"
    if found.size[-1] > 1 and any(steps[-1] not in (0, 1) for steps in found.steps):
        return "what lies side by side in the result does not in a tensor that is read"
    return ""


def slower(case: Case) -> str:
    """Where memory is given never; else PyTorch's operations are as fast for tensors that fit into the cache."""
    return "" if case.bound else "single operations on tensors are PyTorch's"


def describe(case: Case) -> dict[str, Any]:
    """The schedule in words and numbers."""
    found = plan(case)
    return {"rows": found.rows.size, "spread": found.spec.spread, "rows_per_task": found.numbers[0]}


def pack(found: ElementwisePlan, numbers: Sequence[Tensor | None]) -> list[Buffer]:
    """The constant numbers, one that is not read where there are none; and the scales."""
    [known] = edges.constants(found.spec.kinds, numbers)
    constants = torch.zeros(1) if known is None or not known.numel() else known.detach().float().contiguous()
    return [buffer(constants), *edges.pack(found.spec.kinds, numbers)]


def _buffer(tensor: Tensor, size: tuple[int, ...], steps: tuple[int, ...], spread: bool) -> Buffer:
    if spread:
        size, steps = (*size[:-1], 1), (*steps[:-1], 1)
    return Buffer(size, steps, tensor.data_ptr(), CODES[tensor.dtype], tensor)


def bind(found: ElementwisePlan, x: Tensor, packed: list[Buffer], others: Sequence[Tensor], out: Tensor) -> Bound:
    """The call that fills ``out`` from what is then in ``x`` and ``others``."""
    kernel = runtime.compiled(("elementwise", found.spec), lambda: build(found.spec))
    views = zip((x, *others, out), found.rows.steps, (*found.spec.spread, False), strict=True)
    *read, written = [_buffer(tensor, found.rows.size, steps, spread) for tensor, steps, spread in views]
    return kernel.bind(*found.numbers, *read, *packed, written)


def prepare(case: Case) -> Callable[..., Tensor]:
    """The expression for tensors of these sizes and strides; constant numbers and scales follow the tensors."""
    found, result, count = plan(case), case.result, len(case.others)

    def run(x: Tensor, *rest: Tensor) -> Tensor:
        out = torch.empty_strided(result.shape, result.stride, dtype=result.dtype)
        bind(found, x, pack(found, rest[count:]), rest[:count], out)()
        return out

    return run
