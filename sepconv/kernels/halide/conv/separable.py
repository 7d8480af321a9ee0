"""Separable convolution: depthwise, activation, pointwise and activation in one pass over the image (channels_last).

``plan`` chooses the kernel, ``pack`` brings weights into its order, ``bind`` ties it to memory; ``prepare`` gives a
function for images of one size, with the packed weights remembered. How the kernel works is written in
``separable_pipeline``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.kernels.halide.conv.separable_pipeline import UNROLLED_TAPS, Spec, build
from sepconv.kernels.halide.jit import packing, runtime
from sepconv.kernels.halide.jit.buffers import Buffer, buffer, pixels
from sepconv.kernels.halide.jit.calls import Call, Layout, PackedCalls
from sepconv.kernels.halide.jit.machine_code import Chain
from sepconv.kernels.halide.schedule import machine, tuned
from sepconv.kernels.halide.schedule.gemm import separable_alternatives, separable_schedule, streams
from sepconv.kernels.layout import alike, is_channels_last, like

Padding = Sequence[tuple[int, int]]
Sizes = tuple[int, ...]


class Plan(NamedTuple):
    """The kernel for one input, and what each call of it computes: (rows per tile, first row, number of tiles).

    ``share``: tiles, or blocks of output channels, of one thread in each of the calls.
    """

    spec: Spec
    size: tuple[int, int]
    before: tuple[int, int]
    calls: tuple[tuple[int, int, int], ...]
    share: tuple[int, ...]


@lru_cache(maxsize=4096)
def plan(
    shape: tuple[int, ...],
    depthwise_shape: tuple[int, ...],
    out_channels: int,
    stride: tuple[int, int],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, int],
    activations: tuple[str, str],
    residual: bool,
    threads: int,
) -> Plan:
    """The kernel and its schedule for an input of such a shape; pairs are depthwise first, then pointwise."""
    images, channels, height, width = shape
    multiplier = depthwise_shape[0] // channels
    kernel_size = (depthwise_shape[2], depthwise_shape[3])
    ends = zip((height, width), padding, kernel_size, stride, dilation, strict=True)
    out_height, out_width = ((size + sum(pads) - d * (k - 1) - 1) // s + 1 for size, pads, k, s, d in ends)
    size = (out_height, out_width)
    usual = separable_schedule(
        machine.host(), channels, multiplier, out_channels, max(images, 1), size, stride[0] * stride[1], threads
    )
    schedule = tuned.choose(
        "separable",
        (shape, depthwise_shape, out_channels, stride, padding, dilation, activations, residual, threads),
        usual,
        lambda: separable_alternatives(machine.host(), usual, size),
    )
    spec = Spec(
        channels, multiplier, out_channels, kernel_size, stride, dilation, schedule.tile, schedule.columns,
        schedule.depthwise_lanes, schedule.parallel, *activations, residual,
        streams(machine.host(), channels, multiplier * out_channels),
    )  # fmt: skip
    tiles, left = divmod(size[0], schedule.rows)
    calls = [(schedule.rows, 0, tiles)] + [(left, tiles * schedule.rows, 1)] * (left > 0)
    blocks = -(-out_channels // schedule.tile.wide)
    passes = [images * tiles if schedule.parallel == "rows" else blocks for _, _, tiles in calls]
    share = tuple(runtime.per_thread(count, threads) for count in passes)
    return Plan(spec, size, (padding[0][0], padding[1][0]), tuple(calls), share)


def plan_for(
    x: Tensor,
    depthwise_weight: Tensor,
    depthwise_activation: str,
    pointwise_weight: Tensor,
    activation: str,
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    residual: bool = False,
) -> Plan:
    """:func:`plan` for tensors."""
    return plan(
        x.shape,
        depthwise_weight.shape,
        pointwise_weight.shape[0],
        (stride[0], stride[1]),
        ((padding[0][0], padding[0][1]), (padding[1][0], padding[1][1])),
        (dilation[0], dilation[1]),
        (depthwise_activation, activation),
        residual,
        torch.get_num_threads(),
    )


def supports(
    x: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    depthwise_activation: str,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    activation: str,
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    residual: Tensor | None = None,
) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    given = (x, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, residual)
    reason = runtime.missing() or runtime.unsuitable(*[tensor for tensor in given if tensor is not None])
    if reason:
        return reason
    if x.dim() != 4:
        return f"the fused kernel is for images (N, C, H, W), got {x.dim() - 2} spatial dimensions"
    if not is_channels_last(x):
        return "contiguous layout: the fused kernel reads channels_last images only"
    if x.stride(1) != 1:
        return f"the channels of a pixel must lie next to one another, got strides {x.stride()}"
    size = plan_for(
        x, depthwise_weight, depthwise_activation, pointwise_weight, activation, stride, padding, dilation
    ).size
    return runtime.too_large((x.shape[0], pointwise_weight.shape[0], *size))


def slower(kernel_size: Sequence[int]) -> str:
    """Why two kernels, depthwise and pointwise, are faster with such filters; the empty string if they are not."""
    columns = kernel_size[1]
    if columns > UNROLLED_TAPS:
        return f"filters wider than {UNROLLED_TAPS} columns are faster in the depthwise kernel, got {columns} columns"
    return ""


def describe(
    x: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    depthwise_activation: str,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    activation: str,
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    residual: Tensor | None = None,
) -> dict[str, Any]:
    """The schedule that ``forward`` uses for these arguments."""
    found = plan_for(
        x, depthwise_weight, depthwise_activation, pointwise_weight, activation, stride, padding, dilation,
        residual is not None,
    )  # fmt: skip
    spec = found.spec
    rows = [rows for rows, _, _ in found.calls]
    return {
        **spec.tile._asdict(),
        "rows": rows,
        "columns": spec.columns,
        "depthwise_lanes": spec.depthwise_lanes,
        "streams": spec.streams,
        "parallel": spec.parallel,
    }


def pack(
    found: Plan,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
) -> list[Any]:
    """Copies of the weights as the kernel of this plan takes them."""
    multiplier = found.spec.multiplier
    tensors = (
        _pack_taps(depthwise_weight, multiplier),
        _pack_taps(packing.pack_bias(depthwise_bias, depthwise_weight), multiplier),
        packing.pack(pointwise_weight, *found.spec.tile.panels, multiplier),
        packing.pack_bias(pointwise_bias, pointwise_weight),
    )
    return [buffer(tensor) for tensor in tensors]


def _pack_taps(weight: Tensor, multiplier: int) -> Tensor:
    """(C*M, 1, kH, kW) -> (kH, kW, M, C); a bias (C*M,) -> (M, C)."""
    filters = weight.detach().reshape(-1, multiplier, *weight.shape[2:])
    return filters.movedim((0, 1), (-1, -2)).clone(memory_format=torch.contiguous_format)


def bind(found: Plan, x: Tensor, packed: list[Any], residual: Tensor | None, out: Tensor) -> Callable[[], None]:
    """The call that fills ``out`` from what is then in ``x`` and ``residual``: for repeated use of the same memory.

    ``found`` comes from :func:`plan`, ``packed`` from :func:`pack`, ``out`` is ``layout.new_output(x, O, found.size)``.
    """
    if not out.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"separable.bind: out must be channels_last without gaps, got strides {out.stride()}")
    kernel = runtime.compiled(("separable", found.spec), lambda: build(found.spec))
    if residual is not None and not alike(residual, out):  # a copy would hold what is there now, for ever
        raise ValueError(f"separable.bind: residual must lie in memory like out, got strides {residual.stride()}")
    images = [out] if residual is None else [residual, out]
    inputs = [*found.before, pixels(x), *packed]
    calls = []
    for (rows, first, tiles), share in zip(found.calls, found.share, strict=True):
        shape, strides, skipped = _tiles(tuple(out.shape), rows, first, tiles)
        views = [Buffer(shape, strides, image.data_ptr() + skipped, holds=image) for image in images]
        calls.append(kernel.bind(found.size[1], rows, first, share, *inputs, *views))
    return calls[0] if len(calls) == 1 else Chain(calls)


def _tiles(shape: Sizes, rows: int, first: int, tiles: int) -> tuple[Sizes, Sizes, int]:
    """(N, O, Ho, Wo), channels_last without gaps, from a row on, as (N, tile, pixel in tile, O): sizes, strides, bytes
    before it."""
    images, channels, height, width = shape
    row = width * channels
    return (images, tiles, rows * width, channels), (height * row, rows * row, channels, 1), 4 * first * row


class Prepared:
    """The operation for all tensors of these sizes and strides."""

    def __init__(self, found: Plan, x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor) -> None:
        """``found`` comes from :func:`plan_for`."""
        self.found = found
        self.shape = (x.shape[0], pointwise_weight.shape[0], *found.size)
        self.memory_format = torch.channels_last if is_channels_last(x) else torch.contiguous_format
        image = pixels(x)
        self._x = Layout(tuple(image.shape), tuple(image.strides))
        variant = ("separable", *found.spec.tile.panels, depthwise_weight.shape, pointwise_weight.shape)
        self._calls = PackedCalls(variant, partial(pack, found), self._prepare)

    def _prepare(self, packed: list[Any]) -> list[tuple[Call, int]]:
        found, calls = self.found, []
        for (rows, first, tiles), share in zip(found.calls, found.share, strict=True):
            shape, strides, skipped = _tiles(self.shape, rows, first, tiles)
            images = [Layout(shape, strides)] * (2 if found.spec.residual else 1)
            given = (found.size[1], rows, first, share, *found.before, self._x, *packed, *images)
            calls.append((Call(("separable", found.spec), partial(build, found.spec), given), skipped))
        return calls

    def __call__(
        self,
        x: Tensor,
        depthwise_weight: Tensor,
        pointwise_weight: Tensor,
        depthwise_bias: Tensor | None = None,
        pointwise_bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        out = torch.empty(self.shape, dtype=torch.float32, memory_format=self.memory_format)
        if out.numel():
            weights = (depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias)
            if residual is None:
                self._calls(weights, x.data_ptr(), out.data_ptr())
            else:
                added = like(residual, out)
                self._calls(weights, x.data_ptr(), added.data_ptr(), out.data_ptr())
        return out
