"""Pointwise (1x1) convolution: a matrix product with packed weights, bias, residual and activation in one pass.

channels_last: pixels x channels times channels x output channels; output channels fill the vectors.
contiguous: output channels x channels times channels x pixels; pixels fill the vectors.
The number of pixels is not compiled in: one kernel serves every image size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.activations import ACTIVATIONS
from sepconv.kernels.halide.conv.gemm import bias_param, in_streams, keep_in_registers, packed, packed_param
from sepconv.kernels.halide.jit import packing, runtime
from sepconv.kernels.halide.jit.buffers import Buffer, buffer, dense
from sepconv.kernels.halide.jit.calls import Call, Layout, PackedCalls
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.schedule import machine, tuned
from sepconv.kernels.halide.schedule.gemm import Tile, pointwise_alternatives, pointwise_schedule, streams
from sepconv.kernels.layout import alike, is_channels_last, like

# Measured on Zen 4: a call costs 6 us more than PyTorch's and gains 3 us in a million multiply-adds, half of that where
# channels have to be gathered; and reading the weights once more, to see whether they changed, costs as much as is
# gained on a dozen pixels.
_LEAST_MACS, _LEAST_MACS_CONTIGUOUS = 3_000_000, 6_000_000
_LEAST_PIXELS = 40

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


class Spec(NamedTuple):
    """All that the code of one kernel depends on."""

    channels_last: bool
    channels: int
    out_channels: int
    tile: Tile
    guard: bool
    parallel: str
    activation: str
    residual: bool
    streams: int = 1


def build(spec: Spec) -> tuple[Any, list[Any]]:
    """The pipeline; arguments: chunk, share, x, packed weights, bias, [residual]."""
    return _build_channels_last(spec) if spec.channels_last else _build_contiguous(spec)


def _result(spec: Spec, sums: Any, o: Any, index: list[Any]) -> tuple[Any, list[Any]]:
    """Bias, residual and activation on top of the sums, and the parameters they need."""
    bias = bias_param("bias", spec.out_channels)
    activate = ACTIVATIONS[spec.activation].expression
    if not spec.residual:
        return activate(hl, sums + bias[o]), [bias]
    residual = hl.ImageParam(hl.Float(32), len(index), "residual")
    _strides(residual, spec, spec.out_channels)
    return activate(hl, sums + bias[o] + residual[tuple(index)]), [bias, residual]


def _strides(param: Any, spec: Spec, channels: int) -> None:
    """Channel, pixel where channels_last, else pixel, channel, image."""
    for d in range(param.dimensions()):
        param.dim(d).set_min(0)
    param.dim(0).set_stride(1)
    param.dim(0 if spec.channels_last else 1).set_extent(channels)


def _build_channels_last(spec: Spec) -> tuple[Any, list[Any]]:
    tile, chunk, share = spec.tile, hl.Param(hl.Int(32), "chunk"), hl.Param(hl.Int(32), "share")
    x = hl.ImageParam(hl.Float(32), 2, "x")  # channel, pixel
    weight = packed_param("weight", *tile.panels, spec.channels, spec.out_channels)
    o, p = hl.Var("o"), hl.Var("p")
    k, channel = in_streams(spec.channels, spec.streams)

    sums, out = hl.Func("sums"), hl.Func("pointwise")
    sums[o, p] = hl.f32(0.0)
    sums[o, p] += packed(weight, tile.lanes, o, channel) * x[channel, p]
    out[o, p], extra = _result(spec, sums[o, p], o, [o, p])

    block, o_in, group, step, p_in = (hl.Var(name) for name in ("block", "o_in", "group", "step", "p_in"))
    ragged = spec.out_channels % tile.wide
    out.bound(o, 0, spec.out_channels)
    out.split(o, block, o_in, tile.wide, hl.TailStrategy.GuardWithIf if ragged else hl.TailStrategy.RoundUp)
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

    _strides(x, spec, spec.channels)
    _strides(out.output_buffer(), spec, spec.out_channels)
    return out, [chunk, share, x, weight, *extra]


def _build_contiguous(spec: Spec) -> tuple[Any, list[Any]]:
    tile, chunk, share = spec.tile, hl.Param(hl.Int(32), "chunk"), hl.Param(hl.Int(32), "share")
    x = hl.ImageParam(hl.Float(32), 3, "x")  # pixel, channel, image
    weight = packed_param("weight", tile.scalars, tile.scalars, spec.channels, spec.out_channels)
    o, p, n = hl.Var("o"), hl.Var("p"), hl.Var("n")
    k = hl.RDom([hl.Range(0, spec.channels)], "k")
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
    ragged = spec.out_channels % tile.scalars
    tail = hl.TailStrategy.GuardWithIf if spec.guard else hl.TailStrategy.ShiftInwards
    out.bound(o, 0, spec.out_channels)
    out.split(o, block, o_in, tile.scalars, hl.TailStrategy.GuardWithIf if ragged else hl.TailStrategy.RoundUp)
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


class Plan(NamedTuple):
    """The kernel for one input: x is read as (pixel, channel) where channels_last, else as (image, channel, pixel).

    ``chunk``: register tiles of pixels in one group; ``share``: groups, or blocks of output channels, of one thread.
    """

    spec: Spec
    chunk: int
    share: int
    x_view: tuple[tuple[int, ...], tuple[int, ...]]
    out_size: tuple[int, ...]

    @property
    def panels(self) -> tuple[int, int]:
        """Output channels in one panel of packed weights, and in one block of panels."""
        tile = self.spec.tile
        return tile.panels if self.spec.channels_last else (tile.scalars, tile.scalars)


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


@lru_cache(maxsize=4096)
def plan_strided(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    channels_last: bool,
    out_channels: int,
    activation: str,
    residual: bool,
    threads: int,
) -> Plan | None:
    """The kernel and its schedule for such an input; None where its pixels cannot be numbered."""
    images, channels, *sizes = shape
    channels_last = channels_last or (prod(sizes) == 1 and stride[1] == 1)
    x_view = _matrix(shape, stride, channels_last)
    if x_view is None:
        return None
    images, pixels = (1, x_view[0][0]) if channels_last else (images, prod(sizes))
    usual = pointwise_schedule(machine.host(), channels_last, channels, out_channels, pixels, images, threads)
    schedule = tuned.choose(
        "pointwise",
        (shape, stride, channels_last, out_channels, activation, residual, threads),
        usual,
        lambda: pointwise_alternatives(machine.host(), channels_last, usual, pixels if channels_last else out_channels),
    )
    tile = schedule.tile
    guard = not channels_last and pixels < tile.wide
    runs = streams(machine.host(), channels, out_channels) if channels_last else 1
    spec = Spec(channels_last, channels, out_channels, tile, guard, schedule.parallel, activation, residual, runs)
    size = (pixels, out_channels) if channels_last else (images, out_channels, pixels)
    groups = -(-pixels // (schedule.chunk * (tile.scalars if channels_last else tile.wide))) * images
    passes = -(-out_channels // tile.wide) if schedule.parallel == "channels" else groups
    return Plan(spec, schedule.chunk, runtime.per_thread(passes, threads), x_view, size)


def plan(x: Tensor, out_channels: int, activation: str = "", residual: bool = False) -> Plan:
    """The kernel and its schedule for such an input."""
    threads = torch.get_num_threads()
    found = plan_strided(x.shape, x.stride(), is_channels_last(x), out_channels, activation, residual, threads)
    if found is None:
        raise ValueError(f"pointwise.plan: the pixels of x do not lie evenly spaced in memory, strides {x.stride()}")
    return found


def supports(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "", residual: Tensor | None = None
) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    given = [tensor for tensor in (x, weight, bias, residual) if tensor is not None]
    reason = runtime.missing() or runtime.unsuitable(*given)
    reason = reason or runtime.too_large((x.shape[0], weight.shape[0], *x.shape[2:]))
    if not reason and x.numel():
        shape, stride = x.shape, x.stride()
        if plan_strided(shape, stride, is_channels_last(x), weight.shape[0], "", False, 1) is None:
            reason = f"the pixels of x do not lie evenly spaced in memory (strides {stride}); x.contiguous() would"
    return reason


def slower(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "", residual: Tensor | None = None) -> str:
    """Why PyTorch's kernel is the faster one here; the empty string if it is not."""
    pixels = x.numel() // x.shape[1]
    macs = pixels * weight.numel()
    if macs < (_LEAST_MACS if is_channels_last(x) else _LEAST_MACS_CONTIGUOUS):
        return f"{macs:,} multiply-adds take less time than calling this kernel and comparing its packed weights"
    if pixels < _LEAST_PIXELS:
        return f"comparing the packed weights costs more than is gained on {pixels} pixels"
    return ""


def describe(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "", residual: Tensor | None = None
) -> dict[str, Any]:
    """The schedule that ``forward`` uses for these arguments."""
    found = plan(x, weight.shape[0], activation, residual is not None)
    layout = "channels_last" if found.spec.channels_last else "contiguous"
    return {
        "layout": layout,
        **found.spec.tile._asdict(),
        "chunk": found.chunk,
        "parallel": found.spec.parallel,
        "streams": found.spec.streams,
    }


def pack(found: Plan, weight: Tensor, bias: Tensor | None) -> list[Any]:
    """Copies of weight and bias as the kernel of this plan takes them."""
    tensors = (packing.pack(weight, *found.panels), packing.pack_bias(bias, weight))
    return [buffer(tensor) for tensor in tensors]


def bind(found: Plan, x: Tensor, packed: list[Any], residual: Tensor | None, out: Tensor) -> Callable[[], None]:
    """The call that fills ``out`` from what is then in ``x`` and ``residual``: for repeated use of the same memory.

    ``found`` comes from :func:`plan`, ``packed`` from :func:`pack`, ``out`` is ``layout.new_output(x, O, sizes)``.
    """
    layout = _FORMATS[x.dim()] if is_channels_last(x) else torch.contiguous_format
    if not out.is_contiguous(memory_format=layout):
        raise ValueError(f"pointwise.bind: out must have the layout of x without gaps, got strides {out.stride()}")
    kernel = runtime.compiled(("pointwise", found.spec), lambda: build(found.spec))
    if residual is not None and not alike(residual, out):  # a copy would hold what is there now, for ever
        raise ValueError(f"pointwise.bind: residual must lie in memory like out, got strides {residual.stride()}")
    images = [out] if residual is None else [residual, out]
    source = Buffer(*found.x_view, x.data_ptr(), holds=x)
    views = [dense(found.out_size, image.data_ptr(), image) for image in images]
    return kernel.bind(found.chunk, found.share, source, *packed, *views)


class Prepared:
    """``activation(F.conv2d(x, weight, bias) + residual)`` for all tensors of these sizes and strides, weights 1x1."""

    def __init__(self, x: Tensor, weight: Tensor, activation: str = "", residual: bool = False) -> None:
        self.shape = (x.shape[0], weight.shape[0], *x.shape[2:])
        self.memory_format = _FORMATS[x.dim()] if is_channels_last(x) else torch.contiguous_format
        self._calls = None
        if 0 not in self.shape:
            self.found = plan(x, weight.shape[0], activation, residual)
            variant = ("pointwise", *self.found.panels, weight.shape)
            self._calls = PackedCalls(variant, partial(pack, self.found), self._prepare)

    def _prepare(self, packed: list[Any]) -> list[tuple[Call, int]]:
        found, spec = self.found, self.found.spec
        size = found.out_size
        image = Layout(size, tuple([prod(size[d + 1 :]) for d in range(len(size))]))
        images = [image] * (2 if spec.residual else 1)
        given = (found.chunk, found.share, Layout(*found.x_view), *packed, *images)
        return [(Call(("pointwise", spec), partial(build, spec), given), 0)]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        out = torch.empty(self.shape, dtype=torch.float32, memory_format=self.memory_format)
        if self._calls is not None:
            if residual is None:
                self._calls((weight, bias), x.data_ptr(), out.data_ptr())
            else:
                added = like(residual, out)
                self._calls((weight, bias), x.data_ptr(), added.data_ptr(), out.data_ptr())
        return out
