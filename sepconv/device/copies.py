"""Kernels for what PyTorch does around a network in this process: copies into other strides, and images of bytes."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from sepconv.kernels.case import Outline
from sepconv.kernels.halide import edges, numbers
from sepconv.kernels.halide.conv.elementwise import in_rows
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.buffers import CODES, UINT8, Buffer
from sepconv.kernels.halide.jit.machine_code import Bound
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.schedule.gemm import channel_lanes


class _CopySpec(NamedTuple):
    """All that the code of one copy depends on. ``lanes``: numbers moved at once, 0 where they lie apart."""

    dims: int
    kind: str
    lanes: int


def copy_call(source: Tensor, target: Tensor) -> Bound:
    """The call that copies numbers to other places, in as few dimensions as they lie in."""
    found, kind = in_rows([Outline.of(source)], Outline.of(target)), numbers.KINDS[source.dtype]
    together = found.size[-1] > 1 and all(steps[-1] == 1 for steps in found.steps)
    lanes = channel_lanes(edges.wide((kind,)), found.size[-1]) if together else 0
    spec = _CopySpec(len(found.size), kind, lanes)
    kernel = runtime.compiled(("copy", spec), partial(_build_copy, spec))
    views = zip((source, target), found.steps, strict=True)
    return kernel.bind(*[Buffer(found.size, steps, x.data_ptr(), CODES[x.dtype], x) for x, steps in views])


def _buffer(view: Tensor) -> Buffer:
    return Buffer(tuple(view.shape), view.stride(), view.data_ptr(), CODES[view.dtype], view)


def _build_copy(spec: _CopySpec) -> tuple[Any, list[Any]]:
    x, out = hl.ImageParam(numbers.halide_type(spec.kind), spec.dims, "x"), hl.Func("copy")
    at = [hl.Var(f"i{d}") for d in range(spec.dims)]
    out[at] = x[at]
    _any_strides(x, out, spec.dims)
    if spec.lanes:
        out.vectorize(at[0], spec.lanes, hl.TailStrategy.ShiftInwards)
        x.dim(0).set_stride(1)
        out.output_buffer().dim(0).set_stride(1)
    return out, [x]


def _any_strides(x: Any, out: Any, dims: int) -> None:
    x.dim(0).set_stride(hl.Expr())
    out.output_buffer().dim(0).set_stride(hl.Expr())
    for d in range(dims):
        x.dim(d).set_min(0)
        out.output_buffer().dim(d).set_min(0)


def normalise_call(pixels: Tensor, factors: tuple[Tensor, Tensor], image: Tensor, reverse: bool) -> Bound:
    """The call that fills ``image``, (N, C, H, W) of float32, with ``pixels * scale + shift`` of bytes (N, H, W, C).

    ``factors``: scale and shift of each channel, in the order of the image; ``reverse``: that of the pixels is another.
    """
    kernel = runtime.compiled(("normalise",), _build_normalise)
    seen = pixels.permute(0, 3, 1, 2)
    n, c, h, w = seen.stride()
    strides, first = ((n, -c, h, w), pixels.shape[3] - 1) if reverse else ((n, c, h, w), 0)
    given = Buffer(tuple(seen.shape), strides, seen.data_ptr() + first, UINT8, seen)
    return kernel.bind(given, *map(_buffer, factors), _buffer(image))


def _build_normalise() -> tuple[Any, list[Any]]:
    x, out = hl.ImageParam(hl.UInt(8), 4, "x"), hl.Func("normalise")
    scale, shift = hl.ImageParam(hl.Float(32), 1, "scale"), hl.ImageParam(hl.Float(32), 1, "shift")
    scale.dim(0).set_min(0)
    shift.dim(0).set_min(0)
    at = [hl.Var(name) for name in ("x", "y", "c", "n")]
    out[at] = hl.cast(hl.Float(32), x[at]) * scale[at[2]] + shift[at[2]]
    _any_strides(x, out, 4)
    return out, [x, scale, shift]
