"""Pointwise convolution of bfloat16 images on the processor's tiles (AMX): sums in float32, then bias, residual and
activation in the same pass.

Only for images whose pixels lie one after the other (channels_last, or rows of a matrix); x, residual and result may be
float32, each by itself. Images of bfloat16 are multiplied where they lie; of float32, or where the channels do not fill
equal steps, a part of the pixels is first brought into the cache, rounded. The number of pixels is not compiled in.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.kernels.case import Case, Outline
from sepconv.kernels.halide import numbers
from sepconv.kernels.halide.conv import tiles
from sepconv.kernels.halide.conv.tiles import Product
from sepconv.kernels.halide.jit import amx, runtime
from sepconv.kernels.halide.jit.buffers import Buffer
from sepconv.kernels.halide.jit.calls import KernelCall, PackedCalls, Strided
from sepconv.kernels.halide.jit.machine_code import Bound
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.numbers import KINDS, PAIRS
from sepconv.kernels.halide.schedule import machine
from sepconv.kernels.halide.schedule.gemm import channel_lanes
from sepconv.kernels.halide.schedule.tiles import TilesSchedule, in_vectors, pixels_of, shared_wide, wide_of
from sepconv.kernels.layout import like, pixel_step

_DEEPEST = amx.ROW_BYTES // 2
_SHALLOWEST = 16
"""Channels in a step where an image is multiplied in place: fewer leave most of a tile empty."""
# Measured on Granite Rapids beside PyTorch's own product on tiles: to see whether the weights changed costs more than
# is gained on 28 x 28 pixels (0.9 times its speed; half on 7 x 7); from 56 x 56 on 1.1 to 1.2 times its speed is left.
# Steps of fewer channels than a tile is deep lose as much.
_LEAST_PIXELS = 1024


class TileSpec(NamedTuple):
    """All that the code of one kernel depends on.

    ``numbers``: the kind of x; ``hidden``: that of its copy, "" where it is multiplied in place; ``parallel``: whether
    threads share out pixels ("rows") or channels.
    """

    channels: int
    numbers: str
    hidden: str
    parallel: str
    product: Product


class TilePlan(NamedTuple):
    """The kernel for one input: so many ``pixels``, in one ``part`` of the sums; ``share``: parts for one thread."""

    spec: TileSpec
    share: int
    part: int
    pixels: int

    @property
    def variant(self) -> tuple[Any, ...]:
        """What packed weights depend on besides their numbers."""
        return self.spec.product.variant


def build(spec: TileSpec) -> tuple[Any, list[Any]]:
    """The pipeline; arguments: share, pixels, x, packed weights, bias, [residual]."""
    share, pixels = (hl.Param(hl.Int(32), name) for name in ("share", "pixels"))
    x, o, p = hl.ImageParam(numbers.halide_type(spec.numbers), 2, "x"), hl.Var("o"), hl.Var("p")
    tiles.rows(x, spec.channels // numbers.parts(spec.numbers))
    source = _copied(spec, x, p) if spec.hidden else x
    out, sums, parameters = tiles.build(spec.product, source, [o, p])
    inner, block, part = tiles.schedule(spec.product, out, sums, pixels)
    if spec.parallel == "channels":
        runtime.share(out.reorder(*inner, part, block), block, share)
    else:
        runtime.share(out.reorder(*inner, block, part), part, share)
    if spec.hidden:
        source.compute_at(out, part).bound_extent(source.args()[0], spec.product.whole // numbers.parts(spec.hidden))
    return out, [share, pixels, x, *parameters]


def _copied(spec: TileSpec, x: Any, p: Any) -> Any:
    """``hidden[k, p]``: the channels of x in bfloat16, then zeros."""
    parts, k = numbers.parts(spec.hidden), hl.Var("k")
    stored, whole = spec.channels // parts, spec.product.whole // parts
    lanes = channel_lanes(machine.host(), stored)
    place = hl.RDom([hl.Range(0, lanes), hl.Range(0, -(-stored // lanes))], "place")
    channel = hl.min(place.y * lanes, stored - lanes) + place.x
    of_parts = [channel] * parts if spec.numbers == spec.hidden else [parts * channel + part for part in range(parts)]
    values = [numbers.read(spec.numbers, x[at, p], part) for part, at in enumerate(of_parts)]
    hidden = hl.Func("hidden")
    hidden[k, p] = hl.undef(numbers.halide_type(spec.hidden))
    hidden[channel, p] = numbers.write(spec.hidden, *values, quiet=tiles.quiet("", spec.numbers))
    hidden.update().allow_race_conditions().reorder(place.x, place.y, p).vectorize(place.x)
    if whole > stored:
        behind = hl.RDom([hl.Range(0, whole - stored)], "behind")
        hidden[stored + behind.x, p] = numbers.zero(spec.hidden)
        hidden.update(1).unscheduled()
    return hidden


def depth_of(channels: int) -> int:
    """Channels in one step of the product: an even divisor, as large as a tile is deep; 0 where none is worth it."""
    fits = (depth for depth in range(_DEEPEST, _SHALLOWEST - 1, -2) if channels % depth == 0)
    return next(fits, 0)


def plan(case: Case) -> TilePlan:
    """The kernel for such tensors."""
    channels, out_channels, threads = case.x.shape[1], case.weight.shape[0], case.threads
    count, depth = case.x.elements // channels, depth_of(channels)
    on_tiles, hidden, steps = tiles.unit() == "AMX", "", (channels // depth, depth) if depth else None
    kind = KINDS[case.x.dtype]
    if kind != tiles.KIND or not (depth if on_tiles else channels % 2 == 0):
        pairs = channels % 2 == 0 and on_tiles
        hidden, steps, kind = PAIRS if pairs else tiles.KIND, None, tiles.kind_of(case.x, pairs=pairs)
    elif not on_tiles:
        steps = 1, channels
    together = tiles.together(case)
    sizes = TilesSchedule(1, pixels_of(-(-count // threads)), wide_of(out_channels, together))
    if threads > 1 and out_channels > together and case.weight.elements > case.x.elements and not hidden:
        wide = shared_wide(out_channels, together, threads)
        sizes = TilesSchedule(1, pixels_of(count), wide, parallel="channels")
    if not on_tiles:
        sizes = in_vectors(sizes, out_channels, together, sizes.pixels)
    blocks, pixels = -(-out_channels // sizes.wide), sizes.pixels
    passes = blocks if sizes.parallel == "channels" else -(-count // pixels)
    spec = TileSpec(channels, kind, hidden, sizes.parallel, tiles.product(case, channels, sizes, steps))
    return TilePlan(spec, runtime.per_thread(passes, threads), pixels, count)


def _step(image: Outline) -> int:
    """Numbers from one pixel to the next; 0 where they do not lie evenly spaced, channels side by side."""
    shape, stride = image.shape, image.stride
    if len(shape) > 4:
        return shape[1] if image.channels_last and Outline.dense(shape, image).stride == stride else 0
    missing = 4 - len(shape)
    return pixel_step((*shape, *(1,) * missing), (*stride, *(1,) * missing))


def supports(case: Case) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    reason = tiles.unsuitable(case)
    if reason:
        return reason
    if not case.result.elements:
        return "the result is empty"
    images = (case.x, case.result) if case.residual is None else (case.x, case.result, case.residual)
    if not all(map(_step, images)):
        return "the kernel on tiles reads images in channels_last"
    return ""


def slower(case: Case) -> str:
    """Why PyTorch's kernel is the faster one here; the empty string if it is not."""
    channels = case.x.shape[1]
    if case.bound:
        return ""
    if tiles.unit() != "AMX":
        return "without tiles PyTorch's product of bfloat16 is expected to be as fast as one that compares its weights"
    if case.x.elements // channels < _LEAST_PIXELS:
        return f"comparing the packed weights costs more than is gained on {case.x.elements // channels} pixels"
    return f"{channels} channels fill no tile" if channels < _DEEPEST else ""


def describe(case: Case) -> dict[str, Any]:
    """The schedule in words and numbers."""
    found = plan(case)
    spec, product = found.spec, found.spec.product
    return {
        "layout": "channels_last",
        "unit": tiles.unit(),
        "depth": product.depth,
        "wide": product.wide,
        "pixels": found.part,
        "copied": bool(spec.hidden),
        "parallel": spec.parallel,
    }


def pack(found: TilePlan, weights: Sequence[Tensor | None]) -> list[Buffer]:
    """Copies of weight and bias as the kernel takes them; the bias in float32."""
    weight, bias = weights
    assert weight is not None
    return tiles.pack(found.spec.product, weight.detach().flatten(1), bias)


def bind(found: TilePlan, x: Tensor, packed: list[Buffer], residual: Tensor | None, out: Tensor) -> Bound:
    """The call that fills ``out`` from what is then in ``x`` and ``residual``: for repeated use of the same memory."""
    spec = found.spec
    views = [_view(found, out, spec.product.numbers)]
    if residual is not None:
        views.insert(0, _view(found, residual, spec.product.residual))
    kernel = runtime.compiled(("pointwise_tiles", spec), lambda: build(spec))
    return kernel.bind(found.share, found.part, _view(found, x, spec.numbers), *packed, *views)


def _view(found: TilePlan, image: Tensor, kind: str) -> Buffer:
    step = _step(Outline.of(image))
    if not step:
        raise ValueError(f"pointwise_tiles.bind: an image must be channels_last, got strides {image.stride()}")
    return tiles.view(image, kind, (found.pixels, image.shape[1]), (step, 1))


class TileCall:
    """``activation(F.conv2d(x, weight, bias) + residual)`` for all tensors of these sizes and strides, weights 1x1."""

    def __init__(self, case: Case) -> None:
        result = case.result
        self.shape, self.dtype, self.memory_format = result.shape, result.dtype, case.x.memory_format
        self.found = plan(case)
        self._steps = _step(case.x), _step(result)
        self._calls = PackedCalls((*self.found.variant, case.weight.shape), partial(pack, self.found), self._prepare)

    def _prepare(self, packed: list[Any]) -> list[tuple[KernelCall, int]]:
        found, spec = self.found, self.found.spec
        step, out_step = self._steps
        x = _layout(found.pixels, spec.channels, step, spec.numbers)
        kinds = [kind for kind in (spec.product.residual, spec.product.numbers) if kind]
        images = [_layout(found.pixels, spec.product.out_channels, out_step, kind) for kind in kinds]
        given = (found.share, found.part, x, *packed, *images)
        return [(KernelCall(("pointwise_tiles", spec), partial(build, spec), given), 0)]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        out = torch.empty(self.shape, dtype=self.dtype, memory_format=self.memory_format)
        images = (out,) if residual is None else (like(residual, out), out)
        self._calls((weight, bias), x.data_ptr(), *(image.data_ptr() for image in images))
        return out


def _layout(count: int, channels: int, step: int, kind: str) -> Strided:
    parts = numbers.parts(kind)
    return Strided((count, channels // parts), (step // parts, 1), numbers.codes(kind))


prepare = TileCall
