"""Channel shuffle of channels_last images: the k-th channels of several parts of an image come to lie side by side.

Each vector of a part is read once and the vectors of all parts are interleaved in registers. Sizes are not compiled in.
Numbers of one kind are moved as they are.
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
from sepconv.kernels.halide.jit.buffers import CODES, Buffer, check_pixels, pixels
from sepconv.kernels.halide.jit.machine_code import Bound
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.schedule.gemm import channel_lanes
from sepconv.kernels.layout import pixel_step

# Numbers that are interleaved at once, over those of a vector.
_MOST_VECTORS = 4


class ShuffleSpec(NamedTuple):
    """All that the code of one kernel depends on: ``lanes`` channels of each of ``parts`` at once.

    ``whole``: all parts are one image's.
    """

    parts: int
    lanes: int
    kinds: Kinds
    moved: bool
    whole: bool


def build(spec: ShuffleSpec) -> tuple[Any, list[Any]]:
    """The pipeline; arguments: rows of a thread, the parts as channel, column, row, image, the scales. The output is
    part, channel of the part, column, row, image."""
    share = hl.Param(hl.Int(32), "share")
    ends, images = Edges(spec.kinds), [0 if spec.whole else i for i in range(spec.parts)]
    parts = [ends.image(image, 4, f"part_{i}") for i, image in enumerate(images)]
    g, c, column, row, n = (hl.Var(name) for name in ("g", "c", "column", "row", "n"))
    read, out = hl.Func("read"), hl.Func("shuffle")
    stored = [part[c, column, row, n] for part in parts]
    if not spec.moved:
        stored = [ends.write(ends.read(image, number)) for image, number in zip(images, stored, strict=True)]
    read[c, g, column, row, n] = hl.mux(g, stored)
    out[g, c, column, row, n] = read[c, g, column, row, n]

    block, task = hl.Var("block"), hl.Var("task")
    out.bound(g, 0, spec.parts).split(c, block, c, spec.lanes, hl.TailStrategy.ShiftInwards)
    out.reorder(g, c, block, column, row, n).vectorize(g).vectorize(c)
    runtime.share(out.fuse(row, n, task), task, share)
    read.compute_at(out, block).bound_extent(c, spec.lanes).bound_extent(g, spec.parts).vectorize(c).unroll(g)
    for param in parts:
        param.dim(0).set_stride(1)
        for d in range(4):
            param.dim(d).set_min(0)
    result = out.output_buffer()
    result.dim(0).set_extent(spec.parts).set_stride(1)
    result.dim(1).set_stride(spec.parts)
    for d in range(5):
        result.dim(d).set_min(0)
    return out, [share, *parts, *([] if spec.moved else ends.params)]


class ShufflePlan(NamedTuple):
    """The kernel for one input. ``share``: rows of one thread."""

    spec: ShuffleSpec
    share: int

    @property
    def variant(self) -> str:
        """What packed weights depend on besides their numbers."""
        return "no weights"


def _parts(case: Case) -> int:
    if not isinstance(case.detail, int):
        raise TypeError(f"a shuffle has a number of parts, got {case}")
    return case.detail


def plan(case: Case) -> ShufflePlan:
    """The kernel and its schedule for such tensors."""
    images, channels, rows, _ = case.y.shape
    parts, kinds = _parts(case), edges.kinds(case)
    lanes = channel_lanes(edges.wide(kinds), channels // parts)
    spec = ShuffleSpec(parts, lanes, kinds, edges.moved(kinds), case.residual is None)
    return ShufflePlan(spec, runtime.per_thread(images * rows, case.threads))


def supports(case: Case) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    if not case.result.elements:
        return "the result is empty"
    reason = edges.unsuitable(case)
    if reason:
        return reason
    for image in (*case.given, case.y):
        if not pixel_step(image.shape, image.stride):
            return f"the kernel reads and writes channels_last images only (strides {image.stride})"
    return runtime.too_large(case.result.shape)


def slower(case: Case) -> str:
    """Why PyTorch's copy is expected to be faster, in a sentence; the empty string if it is not."""
    if _parts(case) > _MOST_VECTORS:
        return f"at most {_MOST_VECTORS} parts are interleaved in registers, got {_parts(case)}"
    return ""


def describe(case: Case) -> dict[str, Any]:
    """The schedule in words and numbers."""
    return plan(case).spec._asdict()


def pack(found: ShufflePlan, weights: Sequence[Tensor | None]) -> list[Buffer]:
    """There are none, but scales where numbers are not only moved."""
    return edges.pack_moved(found.spec.kinds, weights)


def bind(found: ShufflePlan, x: Tensor, packed: list[Buffer], residual: Tensor | None, out: Tensor) -> Bound:
    """The call that fills ``out`` from the channels that are then in ``x``, or one by one from ``x`` and ``residual``.

    All are channels_last images, or channels of such.
    """
    [result] = check_pixels("shuffle.bind", out)
    count = found.spec.parts
    parts = x.chunk(count, 1) if residual is None else (x, residual)
    n, channels, h, w = result.shape
    by_image, _, by_row, by_column = result.stride()
    view = Buffer(
        (n, h, w, channels // count, count),
        (by_image, by_row, by_column, count, 1),
        out.data_ptr(),
        CODES[out.dtype],
        out,
    )
    spec = found.spec._replace(moved=found.spec.moved and not packed)
    kernel = runtime.compiled(("shuffle", spec), lambda: build(spec))
    return kernel.bind(found.share, *map(pixels, parts), *packed, view)


def prepare(case: Case) -> Callable[..., Tensor]:
    """The shuffle of images of this size."""
    found, result = plan(case), case.result

    def run(x: Tensor, other: Tensor | None = None, *scales: Tensor) -> Tensor:
        out = torch.empty(result.shape, dtype=result.dtype, memory_format=torch.channels_last)
        bind(found, x, pack(found, scales), other, out)()
        return out

    return run
