"""Depthwise convolution of channels_last images that reads x where it lies, without a padded copy in the cache.

x and the result are bfloat16 or float32, each by itself; bfloat16 is written in pairs where these fill vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from sepconv.kernels.case import Case
from sepconv.kernels.halide import numbers
from sepconv.kernels.halide.conv import pair_filter, tiles
from sepconv.kernels.halide.conv.separable_pipeline import UNROLLED_TAPS
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.buffers import Buffer
from sepconv.kernels.halide.jit.machine_code import Bound
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.layout import pixel_step


class DirectSpec(NamedTuple):
    """All that the code of one kernel depends on. Pairs of sizes are (y, x).

    ``numbers``: the kind of x; ``hidden``: that of the result.
    """

    channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    lanes: int
    columns: int
    activation: str
    numbers: str
    hidden: str
    multiplier: int = 1


class DirectPlan(NamedTuple):
    """The kernel for one input; ``before``: padding above and to the left; ``share``: rows of one thread."""

    spec: DirectSpec
    before: tuple[int, int]
    share: int

    @property
    def variant(self) -> str:
        """What packed weights depend on besides their numbers."""
        return self.spec.hidden


def build(spec: DirectSpec) -> tuple[Any, list[Any]]:
    """The pipeline; arguments: share, top and left padding, x, taps, bias."""
    share, top, left = (hl.Param(hl.Int(32), name) for name in ("share", "top", "left"))
    x = hl.ImageParam(numbers.halide_type(spec.numbers), 4, "x")  # channel, column, row, image
    tiles.rows(x, spec.channels // numbers.parts(spec.numbers))
    taps, bias = pair_filter.params(spec)
    filtered, tap = pair_filter.sums(spec, x, taps, (top, left))
    c, column, row, n = (hl.Var(name) for name in ("c", "column", "row", "n"))
    out = hl.Func("depthwise_direct")
    out[c, column, row, n] = pair_filter.written(spec, filtered, bias, [c, 0, column, row, n])

    stored = spec.channels // numbers.parts(spec.hidden)
    tiles.rows(out.output_buffer(), stored)
    vector, lane, step, column_in, task = (hl.Var(name) for name in ("vector", "lane", "step", "column_in", "task"))
    out.bound(c, 0, stored).split(c, vector, lane, spec.lanes, hl.TailStrategy.ShiftInwards)
    out.split(column, step, column_in, spec.columns, hl.TailStrategy.ShiftInwards)
    out.reorder(lane, column_in, vector, step, row, n).fuse(row, n, task).never_partition([task, vector])
    runtime.share(out.vectorize(lane).unroll(column_in), task, share)
    pair_filter.schedule(spec, filtered.compute_at(out, vector), tap)
    return out, [share, top, left, x, taps, bias]


def plan(case: Case) -> DirectPlan:
    """The kernel for such tensors."""
    (images, channels), (_, _, rows, columns) = case.x.shape[:2], case.y.shape
    (stride, ((top, _), (left, _)), dilation), (height, width) = case.geometry, case.kernel_size
    kind, written = pair_filter.kinds(case.x, tiles.kind_of(case.result))
    lanes = pair_filter.lanes_of(channels // numbers.parts(written))
    spec = DirectSpec(
        channels, (height, width), (stride[0], stride[1]), (dilation[0], dilation[1]), lanes,
        pair_filter.columns_of(columns, stride[1], width), case.activation, kind,
        written,
    )  # fmt: skip
    return DirectPlan(spec, (top, left), runtime.per_thread(images * rows, case.threads))


def supports(case: Case) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    if case.which != "forward" or not case.bound:
        return "the direct kernel writes forward results to memory that is given"
    if not case.result.elements:
        return "the result is empty"
    reason = runtime.missing() or runtime.unsuitable(*case.given, case.result, numbers=tiles.DTYPES)
    if reason:
        return reason
    if case.x.dims != 2 or case.weight.shape[0] != case.x.shape[1]:
        return "the direct kernel is for images (N, C, H, W) and one filter for each channel"
    if not pixel_step(case.result.shape, case.result.stride) or case.x.stride[1] != 1:
        return f"the direct kernel reads and writes channels_last images only (strides {case.x.stride})"
    return ""


def slower(case: Case) -> str:
    """Why the kernel behind it is the better one, in a sentence; the empty string if it is not."""
    columns = case.kernel_size[1]
    if columns > UNROLLED_TAPS:
        return f"filters wider than {UNROLLED_TAPS} columns are faster where x is copied first, got {columns} columns"
    return ""


def describe(case: Case) -> dict[str, Any]:
    """The schedule in words and numbers."""
    spec = plan(case).spec
    return {
        "layout": "channels_last",
        "numbers": spec.numbers,
        "written": spec.hidden,
        "lanes": spec.lanes,
        "columns": spec.columns,
    }


def pack(found: DirectPlan, weights: Sequence[Tensor | None]) -> list[Buffer]:
    """Copies of weight and bias as the kernel takes them."""
    weight, bias = weights
    assert weight is not None
    return pair_filter.pack(found.spec, weight, bias)


def bind(found: DirectPlan, x: Tensor, packed: list[Buffer], residual: Tensor | None, out: Tensor) -> Bound:
    """The call that fills ``out`` from what is then in ``x``: for repeated use of the same memory."""
    spec = found.spec
    tiles.check("depthwise_direct.bind", out)
    kernel = runtime.compiled(("depthwise_direct", spec), lambda: build(spec))
    return kernel.bind(
        found.share, *found.before, tiles.pixels(x, spec.numbers), *packed, tiles.pixels(out, spec.hidden)
    )
