"""Images brought to one mean and deviation for each group of channels (GroupNorm), channels_last.

Rows are summed first, all channels side by side, then the sums of the rows, then those of a group's channels; so are
the squares around the mean. What is left for the image itself is a factor and a shift for each channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.kernels.case import Case, GroupNormDetail
from sepconv.kernels.halide import edges
from sepconv.kernels.halide.edges import Edges, Kinds
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.buffers import Buffer, buffer, pixels
from sepconv.kernels.halide.jit.machine_code import Bound
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.schedule import machine


class GroupNormSpec(NamedTuple):
    """All that the code of one kernel depends on. ``short``: fewer channels than a vector has lanes."""

    kinds: Kinds
    short: bool


def build(spec: GroupNormSpec) -> tuple[Any, list[Any]]:
    """The pipeline; arguments: channels of a group, tasks per thread, epsilon, x, weight, bias, the scales."""
    per_group, share = hl.Param(hl.Int(32), "per_group"), hl.Param(hl.Int(32), "share")
    eps = hl.Param(hl.Float(32), "eps")
    ends = Edges(spec.kinds)
    x = ends.image(0, 4, "x")  # channel, column, row, image
    weight, bias = (hl.ImageParam(hl.Float(32), 1, name) for name in ("weight", "bias"))
    c, column, row, n = (hl.Var(name) for name in ("c", "column", "row", "n"))
    tail = hl.TailStrategy.GuardWithIf if spec.short else hl.TailStrategy.ShiftInwards
    count = hl.cast(hl.Float(32), per_group * x.dim(1).extent() * x.dim(2).extent())

    def value(*at: Any) -> Any:
        return ends.count(0, x[at])

    sums = _of_groups("sums", x, per_group, tail, value)
    mean = _each("mean", lambda g: sums[g, n] / count, c, n, per_group)
    squares = _of_groups("squares", x, per_group, tail, lambda *at: _square(value(*at) - mean[at[0], at[3]]))

    def factor(g: Any) -> Any:
        variance = ends.scaled(0, ends.scaled(0, squares[g, n] / count))
        return ends.scaled(0, hl.f32(1.0) / hl.sqrt(variance + eps))

    scale = _each("scale", factor, c, n, per_group)

    out, task = hl.Func("group_norm"), hl.Var("task")
    normed = (value(c, column, row, n) - mean[c, n]) * (scale[c, n] * weight[c]) + bias[c]
    out[c, column, row, n] = ends.write(normed)
    out.vectorize(c, machine.host().lanes, tail)
    runtime.share(out.fuse(row, n, task), task, share)
    for param in (x, weight, bias, out.output_buffer()):
        for d in range(param.dimensions()):
            param.dim(d).set_min(0)
        param.dim(0).set_stride(1)
    return out, [per_group, share, eps, x, weight, bias, *ends.params]


def _square(value: Any) -> Any:
    return value * value


def _of_groups(name: str, x: Any, per_group: Any, tail: Any, value: Callable[..., Any]) -> Any:
    """The sum over each group of channels and all pixels."""
    c, row, g, n = (hl.Var(name) for name in ("c", "row", "g", "n"))
    columns, rows = (hl.RDom([hl.Range(0, x.dim(d).extent())], f"{name}_r{d}") for d in (1, 2))
    members = hl.RDom([hl.Range(0, per_group)], f"{name}_members")
    of_row, of_channel, of_group = (hl.Func(f"{name}_of_{what}") for what in ("row", "channel", "group"))
    of_row[c, row, n] = hl.f32(0.0)
    of_row[c, row, n] += value(c, columns.x, row, n)
    of_channel[c, n] = hl.f32(0.0)
    of_channel[c, n] += of_row[c, rows.x, n]
    of_group[g, n] = hl.f32(0.0)
    of_group[g, n] += of_channel[g * per_group + members.x, n]
    lanes = machine.host().lanes
    for func, reduction in ((of_row, columns), (of_channel, rows)):
        func.compute_root().vectorize(c, lanes, tail)
        func.update().reorder(c, reduction.x).vectorize(c, lanes, hl.TailStrategy.GuardWithIf)
    runtime.parallel(of_row.update(), row)
    of_group.compute_root()
    return of_group


def _each(name: str, value: Callable[[Any], Any], c: Any, n: Any, per_group: Any) -> Any:
    """What is known of each group, for each of its channels."""
    g, of_group, of_channel = hl.Var("g"), hl.Func(f"{name}_of_group"), hl.Func(name)
    of_group[g, n] = value(g)
    of_channel[c, n] = of_group[c / per_group, n]
    of_group.compute_root()
    of_channel.compute_root()
    return of_channel


class GroupNormPlan(NamedTuple):
    """The kernel for such tensors, and the numbers it is called with."""

    spec: GroupNormSpec
    numbers: tuple[int, int, float]

    @property
    def variant(self) -> str:
        """What packed weights depend on besides their numbers."""
        return "channels"


def plan(case: Case) -> GroupNormPlan:
    """The kernel and its schedule for such tensors."""
    detail, (images, channels, rows, _) = case.detail, case.x.shape
    assert isinstance(detail, GroupNormDetail)
    share = runtime.per_thread(images * rows, case.threads)
    spec = GroupNormSpec(edges.kinds(case), channels < machine.host().lanes)
    return GroupNormPlan(spec, (channels // detail.groups, share, detail.eps))


def supports(case: Case) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    if not case.result.elements:
        return "the result is empty"
    reason = edges.unsuitable(case)
    if reason:
        return reason
    if case.x.dims != 2:
        return f"the kernel is for images (N, C, H, W), got {case.x.dims} spatial dimensions"
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
    return {"channels_of_a_group": found.numbers[0], "rows_per_thread": found.numbers[1]}


def pack(found: GroupNormPlan, weights: Sequence[Tensor | None]) -> list[Buffer]:
    """Factor and shift of each channel, and the scales."""
    constants, kinds = edges.constants(found.spec.kinds, weights), found.spec.kinds
    given = [buffer(known.detach().float().contiguous()) for known in constants if known is not None]
    return [*given, *edges.pack(kinds, weights)]


def bind(found: GroupNormPlan, x: Tensor, packed: list[Buffer], residual: Tensor | None, out: Tensor) -> Bound:
    """The call that fills ``out`` from what is then in ``x``; both are channels_last."""
    kernel = runtime.compiled(("group_norm", found.spec), lambda: build(found.spec))
    return kernel.bind(*found.numbers, pixels(x), *packed, pixels(out))


def prepare(case: Case) -> Callable[..., Tensor]:
    """Images of these sizes and strides, with a weight and a bias for each channel."""
    found, result = plan(case), case.result

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        out = torch.empty_strided(result.shape, result.stride, dtype=result.dtype)
        bind(found, x, pack(found, weights), None, out)()
        return out

    return run
