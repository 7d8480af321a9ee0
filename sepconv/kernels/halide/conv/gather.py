"""Numbers from other places: padding of all kinds, turning, shifting, choosing.

Along each dimension a table says from where; a number that is from nowhere is a constant. What lies side by side stays
so in whole vectors, unless it is chosen itself. One kernel serves all of these and all sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.kernels.axes import GatherDetail, Places
from sepconv.kernels.case import Case, Outline
from sepconv.kernels.halide import edges
from sepconv.kernels.halide.edges import Edges, Kinds
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.buffers import CODES, Buffer, buffer
from sepconv.kernels.halide.jit.machine_code import Bound
from sepconv.kernels.halide.jit.runtime import hl

_DIMS = 4
# Numbers that cost more than a call of PyTorch where each is read by itself.
_MANY = 1 << 14


class PlacesSpec(NamedTuple):
    """All that the code of one kernel depends on.

    ``moved``: all numbers of the result are such of x, as they are stored. ``chosen``: not all of those side by side
    come in their order. ``short``: fewer of them than a vector has lanes.
    """

    kinds: Kinds
    moved: bool
    chosen: bool
    short: bool


def build(spec: PlacesSpec) -> tuple[Any, list[Any]]:
    """The pipeline; arguments: tasks per thread, the constant, x, a table for each dimension, the scales."""
    share, value = hl.Param(hl.Int(32), "share"), hl.Param(hl.Float(32), "value")
    ends = Edges(spec.kinds)
    x = ends.image(0, _DIMS, "x")
    tables = [hl.ImageParam(hl.Int(32), 1, f"places_{d}") for d in range(_DIMS)]
    at = [hl.Var(f"i{d}") for d in range(_DIMS)]
    places = [table[i] for table, i in zip(tables, at, strict=True)]
    # Halide cannot know what a table holds.
    read = [hl.clamp(place, 0, x.dim(d).extent() - 1) for d, place in enumerate(places)]
    if not spec.chosen:
        read[0] = at[0]
    out = hl.Func("gather")
    if spec.moved:
        out[at] = x[read]
    else:
        there = places[1 - spec.chosen :]
        inside = there[0] >= 0
        for place in there[1:]:
            inside = inside & (place >= 0)
        out[at] = ends.write(hl.select(inside, ends.read(0, x[read]), value))

    task = hl.Var("task")
    lanes = edges.wide(spec.kinds).lanes
    out.vectorize(at[0], lanes, hl.TailStrategy.GuardWithIf if spec.short else hl.TailStrategy.ShiftInwards)
    runtime.share(out.fuse(at[1], at[2], task).fuse(task, at[3], task), task, share)
    for param in (x, *tables, out.output_buffer()):
        for d in range(param.dimensions()):
            param.dim(d).set_min(0)
        param.dim(0).set_stride(1)
    return out, [share, value, x, *tables, *([] if spec.moved else ends.params)]


class GatherPlan(NamedTuple):
    """The kernel, how both tensors are seen, and the places along each dimension; the one side by side last."""

    spec: PlacesSpec
    share: int
    value: float
    places: tuple[Places, ...]
    x: tuple[tuple[int, ...], tuple[int, ...]]
    out: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def variant(self) -> tuple[object, ...]:
        """What packed tables depend on."""
        return (self.places,)


class _Dimension(NamedTuple):
    """Along one dimension: the sizes of x and of the result, the steps of both, and the places."""

    sizes: tuple[int, int]
    steps: tuple[int, int]
    places: Places | None


def _detail(case: Case) -> GatherDetail:
    if not isinstance(case.detail, GatherDetail):
        raise TypeError(f"numbers from other places have a table of them, got {case}")
    return case.detail


def _dimensions(x: Outline, out: Outline, detail: GatherDetail) -> list[_Dimension]:
    """The fewest, what lies side by side last; those that are taken as they are become one where they lie alike."""
    found: list[_Dimension] = []
    every = zip(x.shape, out.shape, x.stride, out.stride, detail.places, strict=True)
    for before, after, step, own, places in sorted(every, key=lambda part: (part[1] > 1, -part[3])):
        if places is None and after == 1:
            continue
        now, last = _Dimension((before, after), (step, own), places), found[-1] if found else None
        alike = last is not None and last.places is None and places is None
        if last is not None and alike and last.steps == (step * before, own * after):
            found[-1] = _Dimension((last.sizes[0] * before, last.sizes[1] * after), (step, own), None)
        else:
            found.append(now)
    return found


def _in_one_row(found: list[_Dimension], lanes: int) -> list[_Dimension]:
    """Where few numbers lie side by side they are chosen together with the dimension before: a longer row."""
    if len(found) < 2 or found[-1].sizes[1] >= lanes or found[-2].steps != found[-1].sizes:
        return found
    (*rest, outer, inner), taken = found, _places(found[-1])
    row = [-1 if at < 0 or i < 0 else at * inner.sizes[0] + i for at in _places(outer) for i in taken]
    sizes = outer.sizes[0] * inner.sizes[0], outer.sizes[1] * inner.sizes[1]
    return [*rest, _Dimension(sizes, (1, 1), tuple(row))]


def _places(dimension: _Dimension) -> Places:
    return tuple(range(dimension.sizes[1])) if dimension.places is None else dimension.places


def plan(case: Case) -> GatherPlan:
    """The kernel and its tables for such tensors."""
    detail, kinds = _detail(case), edges.kinds(case)
    found = _in_one_row(_dimensions(case.x, case.result, detail), edges.wide(kinds).lanes)
    found = [_Dimension((1, 1), (0, 0), None)] * (_DIMS - len(found)) + found
    inner = found[-1]
    found[-1] = inner._replace(steps=(1, 1))
    short = inner.sizes[1] < edges.wide(kinds).lanes
    spec = PlacesSpec(kinds, detail.moves and edges.moved(kinds), inner.places is not None, short)
    results = case.result.elements // max(inner.sizes[1], 1)
    (before, after), (steps, own) = (zip(*(part[i] for part in found), strict=True) for i in (0, 1))
    places = tuple(_places(part) for part in found)
    share = runtime.per_thread(results, case.threads)
    return GatherPlan(spec, share, detail.value, places, (tuple(before), tuple(steps)), (tuple(after), tuple(own)))


def supports(case: Case) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    if not case.result.elements or not case.x.elements:
        return "the tensor is empty"
    return edges.unsuitable(case) or unreadable(case.x, case.result, _detail(case))


def unreadable(x: Outline, out: Outline, detail: GatherDetail) -> str:
    """Why x cannot be read as it lies, in a sentence; the empty string if it can."""
    found = _dimensions(x, out, detail)
    if len(found) > _DIMS:
        return f"the tensors lie in memory in {len(found)} dimensions that cannot be one, the kernel has {_DIMS}"
    if found and any(size > 1 and step != 1 for size, step in zip(found[-1].sizes, found[-1].steps, strict=True)):
        return f"what lies side by side in the result does not in what is read (strides {x.stride})"
    return ""


def slower(case: Case) -> str:
    """Why PyTorch's is expected to be faster, in a sentence; the empty string if it is not."""
    if not case.bound:
        return "single operations on tensors are PyTorch's"
    if not _detail(case).moves and case.result.elements > _MANY and plan(case).spec.chosen:
        return "padding that reads few numbers side by side is faster in PyTorch"
    return ""


def describe(case: Case) -> dict[str, Any]:
    """The schedule in words and numbers."""
    found = plan(case)
    return {**found.spec._asdict(), "sizes": found.out[0]}


def pack(found: GatherPlan, weights: Sequence[Tensor | None]) -> list[Buffer]:
    """A table for each dimension, and the scales where numbers are not only moved."""
    tables = [buffer(torch.tensor(places, dtype=torch.int32).numpy()) for places in reversed(found.places)]
    return tables + (edges.pack_moved if found.spec.moved else edges.pack)(found.spec.kinds, weights)


def bind(found: GatherPlan, x: Tensor, packed: list[Buffer], residual: Tensor | None, out: Tensor) -> Bound:
    """The call that fills ``out`` from what is then in ``x``."""
    spec = found.spec._replace(moved=found.spec.moved and len(packed) == _DIMS)
    kernel = runtime.compiled(("gather", spec), lambda: build(spec))
    read, written = (
        Buffer(*seen, tensor.data_ptr(), CODES[tensor.dtype], tensor)
        for seen, tensor in ((found.x, x), (found.out, out))
    )
    return kernel.bind(found.share, found.value, read, *packed, written)


def prepare(case: Case) -> Callable[..., Tensor]:
    """Tensors of this size and these strides."""
    found, result = plan(case), case.result

    def run(x: Tensor, *scales: Tensor) -> Tensor:
        out = torch.empty_strided(result.shape, result.stride, dtype=result.dtype)
        bind(found, x, pack(found, scales), None, out)()
        return out

    return run
