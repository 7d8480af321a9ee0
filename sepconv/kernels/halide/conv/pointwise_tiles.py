"""Pointwise convolution of bfloat16 images on the processor's tiles (AMX): sums in float32, then bias, residual and
activation in the same pass.

Only for images whose pixels lie one after the other (channels_last, or rows of a matrix). The number of pixels is not
compiled in where it is 16 or more.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.activations import ACTIVATIONS
from sepconv.kernels.case import Case, Outline
from sepconv.kernels.halide import numbers
from sepconv.kernels.halide.conv.gemm import bias_param
from sepconv.kernels.halide.jit import amx, packing, runtime
from sepconv.kernels.halide.jit.buffers import BITS16, Buffer, buffer
from sepconv.kernels.halide.jit.calls import KernelCall, PackedCalls, Strided
from sepconv.kernels.halide.jit.machine_code import Bound
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.layout import like, pixel_step

_KIND = "bfloat16"
_DEEPEST = amx.ROW_BYTES // 2
_SHALLOWEST = 16
"""Channels in a step: fewer leave most of a tile empty."""
_WIDEST = 128
# Measured on Granite Rapids beside PyTorch's own product on tiles: to see whether the weights changed costs more than
# is gained on 28 x 28 pixels (0.9 times its speed; half on 7 x 7); from 56 x 56 on 1.1 to 1.2 times its speed is left.
# Steps of fewer channels than a tile is deep lose as much.
_LEAST_PIXELS = 1024
_LANES = 32


class TileSpec(NamedTuple):
    """All that the code of one kernel depends on. ``pixels``: in one part of the sums."""

    channels: int
    out_channels: int
    depth: int
    wide: int
    pixels: int
    activation: str
    residual: bool


class TilePlan(NamedTuple):
    """The kernel for one input; ``share``: parts of the pixels for one thread."""

    spec: TileSpec
    share: int
    pixels: int
    step: int

    @property
    def variant(self) -> tuple[str, int]:
        """What packed weights depend on besides their numbers."""
        return "tiles", self.spec.depth


def build(spec: TileSpec) -> tuple[Any, list[Any]]:
    """The pipeline; arguments: share, x, packed weights, bias, [residual]."""
    share = hl.Param(hl.Int(32), "share")
    x, weight = (hl.ImageParam(numbers.halide_type(_KIND), dims, name) for dims, name in ((2, "x"), (1, "weight")))
    bias, o, p = bias_param("bias", spec.out_channels), hl.Var("o"), hl.Var("p")
    sums, out = hl.Func("sums"), hl.Func("pointwise_tiles")
    steps = [hl.ExternFuncArgument(hl.Expr(count)) for count in (spec.channels // spec.depth, 2 * spec.depth)]
    given = [hl.ExternFuncArgument(x), hl.ExternFuncArgument(weight), *steps]
    sums.define_extern(amx.BF16.name, given, hl.Float(32), [o, p], hl.NameMangling.C)

    result, arguments = sums[o, p] + bias[o], [share, x, weight, bias]
    if spec.residual:
        residual = hl.ImageParam(numbers.halide_type(_KIND), 2, "residual")
        _rows(residual, spec.out_channels)
        result += numbers.read(_KIND, residual[o, p])
        arguments.append(residual)
    out[o, p] = numbers.write(_KIND, ACTIVATIONS[spec.activation].expression(hl, result))

    block, o_in, part, p_in = (hl.Var(name) for name in ("block", "o_in", "part", "p_in"))
    out.bound(o, 0, spec.out_channels)
    ragged = spec.out_channels % spec.wide
    out.split(o, block, o_in, spec.wide, hl.TailStrategy.GuardWithIf if ragged else hl.TailStrategy.RoundUp)
    out.split(p, part, p_in, spec.pixels, hl.TailStrategy.ShiftInwards)
    runtime.share(out.reorder(o_in, p_in, block, part).vectorize(o_in, min(_LANES, spec.wide)), part, share)
    sums.compute_at(out, block).align_bounds(o, amx.ROWS).bound_extent(p, spec.pixels)
    _rows(x, spec.channels)
    weight.dim(0).set_min(0)
    _rows(out.output_buffer(), spec.out_channels)
    return out, arguments


def _rows(param: Any, channels: int) -> None:
    param.dim(0).set_min(0).set_extent(channels).set_stride(1)
    param.dim(1).set_min(0)


def depth_of(channels: int) -> int:
    """Channels in one step of the product: an even divisor, as large as a tile is deep; 0 where none is worth it."""
    fits = (depth for depth in range(_DEEPEST, _SHALLOWEST - 1, -2) if channels % depth == 0)
    return next(fits, 0)


def plan(case: Case) -> TilePlan:
    """The kernel for such tensors."""
    channels, out_channels = case.x.shape[1], case.weight.shape[0]
    count = case.x.elements // channels
    # Fewer than 16 are one part; else whole tiles.
    pixels = next((size for size in (32, 16) if count >= size), count)
    wide = min(_WIDEST, -(-out_channels // amx.ROWS) * amx.ROWS)
    residual = case.residual is not None
    spec = TileSpec(channels, out_channels, depth_of(channels), wide, pixels, case.activation, residual)
    return TilePlan(spec, runtime.per_thread(-(-count // pixels), case.threads), count, _step(case.x))


def _step(image: Outline) -> int:
    """Numbers from one pixel to the next; 0 where they do not lie evenly spaced, channels side by side."""
    shape, stride = image.shape, image.stride
    if len(shape) > 4:
        return shape[1] if image.channels_last and Outline.dense(shape, image).stride == stride else 0
    missing = 4 - len(shape)
    return pixel_step((*shape, *(1,) * missing), (*stride, *(1,) * missing))


def supports(case: Case) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    given = (case.x, case.weight, *(part for part in (case.bias, case.residual) if part is not None))
    reason = runtime.missing() or runtime.unsuitable(*given, case.result, numbers=(torch.bfloat16,))
    reason = reason or amx.missing() or runtime.too_large(case.result.shape)
    if reason:
        return reason
    if not case.result.elements:
        return "the result is empty"
    if not depth_of(case.x.shape[1]):
        return f"{case.x.shape[1]} channels cannot be cut into equal steps that fill a tile"
    images = (case.x, case.result) if case.residual is None else (case.x, case.result, case.residual)
    if not all(map(_step, images)):
        return "the kernel on tiles reads images in channels_last"
    return ""


def slower(case: Case) -> str:
    """Why PyTorch's kernel is the faster one here; the empty string if it is not."""
    channels = case.x.shape[1]
    if case.bound:
        return ""
    if case.x.elements // channels < _LEAST_PIXELS:
        return f"comparing the packed weights costs more than is gained on {case.x.elements // channels} pixels"
    return f"{channels} channels fill no tile" if channels < _DEEPEST else ""


def describe(case: Case) -> dict[str, Any]:
    """The schedule in words and numbers."""
    spec = plan(case).spec
    return {"layout": "channels_last", "tiles": "AMX", "depth": spec.depth, "wide": spec.wide, "pixels": spec.pixels}


def pack(found: TilePlan, weights: Sequence[Tensor | None]) -> list[Buffer]:
    """Copies of weight and bias as the kernel takes them; the bias in float32."""
    weight, bias = weights
    assert weight is not None
    tiles = packing.pack_tiles(weight, found.spec.depth).flatten()
    offset = torch.zeros(len(weight)) if bias is None else bias.detach().float().clone()
    return [Buffer(tiles.shape, (1,), tiles.data_ptr(), BITS16, tiles), buffer(offset)]


def bind(found: TilePlan, x: Tensor, packed: list[Buffer], residual: Tensor | None, out: Tensor) -> Bound:
    """The call that fills ``out`` from what is then in ``x`` and ``residual``: for repeated use of the same memory."""
    images = [out] if residual is None else [residual, out]
    views = [_view(found, image) for image in images]
    kernel = runtime.compiled(("pointwise_tiles", found.spec), lambda: build(found.spec))
    return kernel.bind(found.share, _view(found, x), *packed, *views)


def _view(found: TilePlan, image: Tensor) -> Buffer:
    step = _step(Outline.of(image))
    if not step:
        raise ValueError(f"pointwise_tiles.bind: an image must be channels_last, got strides {image.stride()}")
    return Buffer((found.pixels, image.shape[1]), (step, 1), image.data_ptr(), BITS16, image)


class TileCall:
    """``activation(F.conv2d(x, weight, bias) + residual)`` for all tensors of these sizes and strides, weights 1x1."""

    def __init__(self, case: Case) -> None:
        result = case.result
        self.shape, self.memory_format = result.shape, case.x.memory_format
        self.found = plan(case)
        self._step = _step(result)
        self._calls = PackedCalls((*self.found.variant, case.weight.shape), partial(pack, self.found), self._prepare)

    def _prepare(self, packed: list[Any]) -> list[tuple[KernelCall, int]]:
        found, spec = self.found, self.found.spec
        out = Strided((found.pixels, spec.out_channels), (self._step, 1), BITS16)
        x = Strided((found.pixels, spec.channels), (found.step, 1), BITS16)
        given = (found.share, x, *packed, *([out] * (2 if spec.residual else 1)))
        return [(KernelCall(("pointwise_tiles", spec), partial(build, spec), given), 0)]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        out = torch.empty(self.shape, dtype=torch.bfloat16, memory_format=self.memory_format)
        images = (out,) if residual is None else (like(residual, out), out)
        self._calls((weight, bias), x.data_ptr(), *(image.data_ptr() for image in images))
        return out


prepare = TileCall
