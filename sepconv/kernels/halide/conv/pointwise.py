"""Pointwise (1x1) convolution: a matrix product with packed weights, bias, residual and activation in one pass.

channels_last: pixels x channels times channels x output channels; output channels fill the vectors.
contiguous: output channels x channels times channels x pixels; pixels fill the vectors.
The number of pixels is not compiled in: one kernel serves every image size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.kernels.case import Case, Outline
from sepconv.kernels.halide.activated import activated
from sepconv.kernels.halide.conv.gemm import (
    bias_param,
    in_streams,
    in_terms,
    keep_in_registers,
    keep_terms,
    loaded_together,
    packed,
    packed_param,
    ragged,
    split_outputs,
)
from sepconv.kernels.halide.jit import packing, runtime
from sepconv.kernels.halide.jit.buffers import Buffer, buffer
from sepconv.kernels.halide.jit.calls import KernelCall, PackedCalls, Strided
from sepconv.kernels.halide.jit.machine_code import Bound
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.schedule import machine, tuned
from sepconv.kernels.halide.schedule.gemm import Tile, pointwise_alternatives, pointwise_schedule, streams
from sepconv.kernels.layout import like

# Measured on Zen 4: a call costs 6 us more than PyTorch's and gains 3 us in a million multiply-adds, half of that where
# channels have to be gathered; and reading the weights once more, to see whether they changed, costs as much as is
# gained on a dozen pixels.
_LEAST_MACS, _LEAST_MACS_CONTIGUOUS = 3_000_000, 6_000_000
_LEAST_PIXELS = 40
# Measured on Granite Rapids, forward and both gradients: 0.45 to 0.94 of PyTorch's speed on contiguous images and on
# fewer pixels; as fast on more, where one pass is saved if a residual or an activation follows.
_LEAST_TRAINED_PIXELS = 8192


class PointwiseSpec(NamedTuple):
    """All that the code of one kernel depends on.

    ``channels`` are None, and up to the weights, but where they are read in several runs, whose addresses then differ
    by a number that is compiled in. ``out_channels`` are None where their blocks are whole.
    """

    channels_last: bool
    channels: int | None
    out_channels: int | None
    tile: Tile
    guard: bool
    parallel: str
    activation: str
    residual: bool
    streams: int = 1


def build(spec: PointwiseSpec) -> tuple[Any, list[Any]]:
    """The pipeline; arguments: chunk, share, x, packed weights, bias, [residual]."""
    return _build_channels_last(spec) if spec.channels_last else _build_contiguous(spec)


def _result(spec: PointwiseSpec, sums: Any, o: Any, index: list[Any]) -> tuple[Any, list[Any]]:
    """Bias, residual and activation on top of the sums, and the parameters they need."""
    bias = bias_param("bias", spec.out_channels)
    if not spec.residual:
        return activated(spec.activation, sums + bias[o]), [bias]
    residual = hl.ImageParam(hl.Float(32), len(index), "residual")
    _strides(residual, spec, spec.out_channels)
    return activated(spec.activation, sums + bias[o] + residual[tuple(index)]), [bias, residual]


def _strides(param: Any, spec: PointwiseSpec, channels: int | None) -> None:
    """Channel, pixel where channels_last, else pixel, channel, image."""
    for d in range(param.dimensions()):
        param.dim(d).set_min(0)
    param.dim(0).set_stride(1)
    if channels is not None:
        param.dim(0 if spec.channels_last else 1).set_extent(channels)


def _build_channels_last(spec: PointwiseSpec) -> tuple[Any, list[Any]]:
    tile, chunk, share = spec.tile, hl.Param(hl.Int(32), "chunk"), hl.Param(hl.Int(32), "share")
    x = hl.ImageParam(hl.Float(32), 2, "x")  # channel, pixel
    weight = packed_param("weight", *tile.panels, spec.channels, spec.out_channels)
    o, p = hl.Var("o"), hl.Var("p")
    channels, by_lane = spec.channels or weight.dim(1).extent(), tile.terms > 1
    k, channel = in_terms(channels, tile.terms) if by_lane else in_streams(channels, spec.streams)

    sums, out = hl.Func("sums"), hl.Func("pointwise")
    sums[o, p] = hl.f32(0.0)
    scalars = loaded_together(x, [hl.Var("c"), p]) if by_lane else x
    sums[o, p] += packed(weight, tile.panels[0], o, channel) * scalars[channel, p]
    out[o, p], extra = _result(spec, sums[o, p], o, [o, p])

    block, o_in, group, step, p_in = (hl.Var(name) for name in ("block", "o_in", "group", "step", "p_in"))
    split_outputs(out, o, (block, o_in), tile.wide, spec.out_channels)
    out.split(p, step, p_in, tile.scalars, hl.TailStrategy.ShiftInwards)
    out.split(step, group, step, chunk, hl.TailStrategy.GuardWithIf)
    if spec.parallel == "channels":
        runtime.share(out.reorder(o_in, p_in, step, group, block), block, share)
    else:
        runtime.share(out.reorder(o_in, p_in, step, block, group), group, share)
    out.vectorize(o_in, tile.lanes).unroll(o_in).unroll(p_in)
    sums.compute_at(out, step)
    keep_in_registers(sums, o, p, [k[0], k[1]], tile)
    sums.update().unroll(k[0])
    if by_lane:
        keep_terms(scalars, p, sums, k[1], tile)

    _strides(x, spec, spec.channels)
    _strides(out.output_buffer(), spec, spec.out_channels)
    return out, [chunk, share, x, weight, *extra]


def _build_contiguous(spec: PointwiseSpec) -> tuple[Any, list[Any]]:
    tile, chunk, share = spec.tile, hl.Param(hl.Int(32), "chunk"), hl.Param(hl.Int(32), "share")
    x = hl.ImageParam(hl.Float(32), 3, "x")  # pixel, channel, image
    weight = packed_param("weight", tile.scalars, tile.scalars, spec.channels, spec.out_channels)
    o, p, n = hl.Var("o"), hl.Var("p"), hl.Var("n")
    k = hl.RDom([hl.Range(0, weight.dim(1).extent())], "k")
    source = x
    if spec.guard:  # fewer pixels than one tile: zeros beyond them
        unbounded = hl.Range(hl.Expr(), hl.Expr())
        pixels = hl.Range(0, x.dim(0).extent())
        source = hl.BoundaryConditions.constant_exterior(x, hl.f32(0.0), [pixels, unbounded, unbounded])

    # Channels lie a whole image apart; a panel of few pixels and all channels is gathered once, next to one another.
    panel, sums, out = hl.Func("panel"), hl.Func("sums"), hl.Func("pointwise")
    panel[p, o, n] = source[p, o, n]
    sums[p, o, n] = hl.f32(0.0)
    sums[p, o, n] += panel[p, k.x, n] * packed(weight, tile.scalars, o, k.x)
    out[p, o, n], extra = _result(spec, sums[p, o, n], o, [p, o, n])

    block, o_in, group, step, p_in = (hl.Var(name) for name in ("block", "o_in", "group", "step", "p_in"))
    task = hl.Var("task")
    tail = hl.TailStrategy.GuardWithIf if spec.guard else hl.TailStrategy.ShiftInwards
    split_outputs(out, o, (block, o_in), tile.scalars, spec.out_channels)
    out.split(p, step, p_in, tile.wide, tail)
    out.split(step, group, step, chunk, hl.TailStrategy.GuardWithIf)
    runtime.share(out.reorder(p_in, o_in, block, step, group, n).fuse(group, n, task), task, share)
    out.vectorize(p_in, tile.lanes).unroll(p_in).unroll(o_in)
    panel.compute_at(out, step).bound_extent(p, tile.wide).vectorize(p, tile.lanes).unroll(p)
    sums.compute_at(out, block)
    keep_in_registers(sums, p, o, [k.x], tile)
    sums.bound_extent(o, tile.scalars)

    _strides(x, spec, spec.channels)
    _strides(out.output_buffer(), spec, spec.out_channels)
    return out, [chunk, share, x, weight, *extra]


class PointwisePlan(NamedTuple):
    """The kernel for one input: x is read as (pixel, channel) where channels_last, else as (image, channel, pixel).

    ``chunk``: register tiles of pixels in one group; ``share``: groups, or blocks of output channels, of one thread.
    """

    spec: PointwiseSpec
    chunk: int
    share: int
    x_view: tuple[tuple[int, ...], tuple[int, ...]]
    out_size: tuple[int, ...]

    @property
    def panels(self) -> tuple[int, int]:
        """Output channels in one panel of packed weights, and in one block of panels."""
        tile = self.spec.tile
        return tile.panels if self.spec.channels_last else (tile.scalars, tile.scalars)

    @property
    def variant(self) -> tuple[int, int]:
        """What packed weights depend on besides their numbers."""
        return self.panels


@lru_cache(maxsize=4096)
def _matrix(shape: tuple[int, ...], stride: tuple[int, ...], channels_last: bool) -> Any:
    """Size and strides with the pixels in one dimension, by PyTorch's own rule for views; None where they cannot be."""
    x = torch.empty_strided(shape, stride, device="meta")
    pixels = prod(shape[2:])
    try:
        view = x.movedim(1, -1).view(shape[0] * pixels, shape[1]) if channels_last else x.view(*shape[:2], pixels)
    except RuntimeError:
        return None
    strides = [1 if size == 1 else step for size, step in zip(view.shape, view.stride(), strict=True)]
    return (tuple(view.shape), tuple(strides)) if strides[-1] == 1 else None


def _reads_channels_last(x: Outline) -> bool:
    return x.channels_last or (prod(x.shape[2:]) == 1 and x.stride[1] == 1)


def _view(x: Outline) -> Any:
    return _matrix(x.shape, x.stride, _reads_channels_last(x))


def plan(case: Case) -> PointwisePlan:
    """The kernel and its schedule for such tensors."""
    x, out_channels, threads = case.x, case.weight.shape[0], case.threads
    channels_last, x_view = _reads_channels_last(x), _view(x)
    if x_view is None:
        raise ValueError(f"pointwise.plan: the pixels of x do not lie evenly spaced in memory, strides {x.stride}")
    channels = x.shape[1]
    images, pixels = (1, x_view[0][0]) if channels_last else (x.shape[0], prod(x.shape[2:]))
    usual = pointwise_schedule(machine.host(), channels_last, channels, out_channels, pixels, images, threads)
    residual = case.residual is not None
    schedule = tuned.choose(
        "pointwise",
        (x.shape, x.stride, x.channels_last, out_channels, case.activation, residual, threads),
        usual,
        lambda: pointwise_alternatives(machine.host(), channels_last, usual, pixels if channels_last else out_channels),
        case,
    )
    tile = schedule.tile
    guard = not channels_last and pixels < tile.wide
    runs = streams(machine.host(), channels, out_channels) if channels_last else 1
    depth = channels if runs > 1 else None
    outputs = ragged(out_channels, tile.wide if channels_last else tile.scalars)
    spec = PointwiseSpec(channels_last, depth, outputs, tile, guard, schedule.parallel, case.activation, residual, runs)
    size = (pixels, out_channels) if channels_last else (images, out_channels, pixels)
    groups = -(-pixels // (schedule.chunk * (tile.scalars if channels_last else tile.wide))) * images
    passes = -(-out_channels // tile.wide) if schedule.parallel == "channels" else groups
    return PointwisePlan(spec, schedule.chunk, runtime.per_thread(passes, threads), x_view, size)


def supports(case: Case) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    if case.bound and not case.result.elements:
        return "the result is empty"
    reason = runtime.missing() or runtime.unsuitable(*case.given, case.result) or runtime.too_large(case.result.shape)
    if reason:
        return reason
    x = case.x
    if case.bound and len(x.shape) == 4 and x.shape[1] == 1 and case.weight.shape[0] > 1:
        return "with one input channel both layouts look the same to the kernel"
    if x.elements and _view(x) is None:
        return f"the pixels of x do not lie evenly spaced in memory (strides {x.stride}); x.contiguous() would"
    for image in (case.result, case.residual) if case.bound else ():
        if image is not None and _matrix(image.shape, image.stride, _reads_channels_last(x)) is None:
            return f"x and the result lie in memory in different orders (strides {image.stride})"
    return ""


def slower(case: Case) -> str:
    """Why PyTorch's kernel is the faster one here; the empty string if it is not.

    What a call costs, and the comparison of weights, do not count where both are bound to memory.
    """
    if case.bound:
        return ""
    pixels = case.x.elements // case.x.shape[1]
    macs = pixels * case.weight.elements
    if macs < (_LEAST_MACS if case.x.channels_last else _LEAST_MACS_CONTIGUOUS):
        return f"{macs:,} multiply-adds take less time than calling this kernel and comparing its packed weights"
    if pixels < _LEAST_PIXELS:
        return f"comparing the packed weights costs more than is gained on {pixels} pixels"
    return ""


def slower_trained(case: Case) -> str:
    """Why PyTorch's operation is the faster one where a layer is trained, whose forward pass this is; "" if not."""
    if supports(case):
        return ""
    if not case.x.channels_last:
        return "forward and back PyTorch's kernels take less time on contiguous tensors"
    pixels = case.x.elements // case.x.shape[1]
    if pixels < _LEAST_TRAINED_PIXELS:
        return f"forward and back PyTorch's kernels take less time for {pixels} pixels"
    return "" if case.activation or case.residual else "forward and back PyTorch's kernels take no more time"


def describe(case: Case) -> dict[str, Any]:
    """The schedule in words and numbers."""
    found = plan(case)
    layout = "channels_last" if found.spec.channels_last else "contiguous"
    return {
        "layout": layout,
        **found.spec.tile._asdict(),
        "chunk": found.chunk,
        "parallel": found.spec.parallel,
        "streams": found.spec.streams,
    }


def pack(found: PointwisePlan, weights: Sequence[Tensor | None]) -> list[Buffer]:
    """Copies of weight and bias as the kernel of this plan takes them."""
    weight, bias = weights
    assert weight is not None
    tensors = (packing.pack(weight, *found.panels), packing.pack_bias(bias, weight))
    return [buffer(tensor) for tensor in tensors]


def bind(found: PointwisePlan, x: Tensor, packed: list[Buffer], residual: Tensor | None, out: Tensor) -> Bound:
    """The call that fills ``out`` from what is then in ``x`` and ``residual``: for repeated use of the same memory.

    ``found`` comes from :func:`plan`, ``packed`` from :func:`pack`; ``out`` and ``residual`` have the layout of ``x``,
    or are channels of a larger image that has it.
    """
    source = Buffer(*found.x_view, x.data_ptr(), holds=x)
    images = {"out": out} if residual is None else {"residual": residual, "out": out}
    views = [_result_view(found, name, image) for name, image in images.items()]
    kernel = runtime.compiled(("pointwise", found.spec), lambda: build(found.spec))
    return kernel.bind(found.chunk, found.share, source, *packed, *views)


def _result_view(found: PointwisePlan, name: str, image: Tensor) -> Buffer:
    view = _matrix(tuple(image.shape), image.stride(), found.spec.channels_last)
    if view is None or view[0] != found.out_size:  # a copy would hold what is there now, for ever
        raise ValueError(f"pointwise.bind: {name} must have the layout of x, got strides {image.stride()}")
    shape, strides = view
    return Buffer(shape, strides, image.data_ptr(), holds=image)


class PointwiseCall:
    """``activation(F.conv2d(x, weight, bias) + residual)`` for all tensors of these sizes and strides, weights 1x1."""

    def __init__(self, case: Case) -> None:
        result = case.result
        self.shape, self.dtype, self.memory_format = result.shape, result.dtype, case.x.memory_format
        self._calls = None
        if result.elements:
            self.found = plan(case)
            variant = ("pointwise", *self.found.panels, case.weight.shape)
            self._calls = PackedCalls(variant, partial(pack, self.found), self._prepare)

    def _prepare(self, packed: list[Any]) -> list[tuple[KernelCall, int]]:
        found, spec = self.found, self.found.spec
        size = found.out_size
        image = Strided(size, tuple([prod(size[d + 1 :]) for d in range(len(size))]))
        images = [image] * (2 if spec.residual else 1)
        given = (found.chunk, found.share, Strided(*found.x_view), *packed, *images)
        return [(KernelCall(("pointwise", spec), partial(build, spec), given), 0)]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        out = torch.empty(self.shape, dtype=self.dtype, memory_format=self.memory_format)
        if self._calls is not None:
            if residual is None:
                self._calls((weight, bias), x.data_ptr(), out.data_ptr())
            else:
                added = like(residual, out)
                self._calls((weight, bias), x.data_ptr(), added.data_ptr(), out.data_ptr())
        return out


prepare = PointwiseCall
