"""Separable convolution: depthwise, activation, pointwise and activation in one pass over the image (channels_last).

``plan`` chooses the kernel, ``pack`` brings weights into its order, ``bind`` ties it to memory; ``prepare`` gives a
function for images of one size, with the packed weights remembered. How the kernel works is written in
``separable_pipeline``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.kernels.case import Case, Outline
from sepconv.kernels.halide.conv.gemm import ragged
from sepconv.kernels.halide.conv.separable_pipeline import UNROLLED_TAPS, SeparableSpec, build, known, room
from sepconv.kernels.halide.jit import packing, runtime
from sepconv.kernels.halide.jit.buffers import Buffer, buffer, check_pixels, pixels
from sepconv.kernels.halide.jit.calls import KernelCall, PackedCalls, Strided
from sepconv.kernels.halide.jit.machine_code import Bound, Chain
from sepconv.kernels.halide.schedule import machine, tuned
from sepconv.kernels.halide.schedule.gemm import copied_together, separable_alternatives, separable_schedule, streams
from sepconv.kernels.layout import like, pixel_step

Sizes = tuple[int, ...]


class SeparablePlan(NamedTuple):
    """The kernel for one input, and what each call of it computes: (rows per tile, first row, number of tiles).

    ``share``: tiles, or blocks of output channels, of one thread in each of the calls.
    """

    spec: SeparableSpec
    size: tuple[int, int]
    before: tuple[int, int]
    calls: tuple[tuple[int, int, int], ...]
    share: tuple[int, ...]

    @property
    def variant(self) -> tuple[int, int, int]:
        """What packed weights depend on besides their numbers."""
        return self.spec.multiplier, *self.spec.tile.panels


def _pair(values: Sequence[int]) -> tuple[int, int]:
    first, second = values
    return first, second


def plan(case: Case) -> SeparablePlan:
    """The kernel and its schedule for such tensors."""
    then = case.then
    assert then is not None
    images, channels, _, _ = case.x.shape
    multiplier, out_channels = case.weight.shape[0] // channels, then.weight.shape[0]
    stride, dilation = _pair(case.geometry.stride), _pair(case.geometry.dilation)
    before = _pair([low for low, _ in case.geometry.padding])
    size, residual, threads = _pair(case.y.shape[2:]), then.residual is not None, case.threads
    usual = separable_schedule(
        machine.host(), channels, multiplier, out_channels, max(images, 1), size, stride[0] * stride[1], threads
    )
    activations = (case.activation, then.activation)
    schedule = tuned.choose(
        "separable",
        (case.x.shape, case.weight.shape, out_channels, *case.geometry, activations, residual, threads),
        usual,
        lambda: separable_alternatives(machine.host(), usual, size),
        case,
    )
    runs = streams(machine.host(), channels, multiplier * out_channels)
    outputs = ragged(out_channels, schedule.tile.wide)
    spec = SeparableSpec(
        known(channels, runs), room(channels), multiplier, outputs, _pair(case.kernel_size), stride, dilation,
        schedule.tile, schedule.columns, schedule.depthwise_lanes, schedule.parallel, *activations, residual, runs,
        copied_together(machine.host(), channels),
    )  # fmt: skip
    tiles, left = divmod(size[0], schedule.rows)
    calls = [(schedule.rows, 0, tiles)] + [(left, tiles * schedule.rows, 1)] * (left > 0)
    blocks = -(-out_channels // schedule.tile.wide)
    passes = [images * tiles if schedule.parallel == "rows" else blocks for _, _, tiles in calls]
    share = tuple(runtime.per_thread(count, threads) for count in passes)
    return SeparablePlan(spec, size, before, tuple(calls), share)


def supports(case: Case) -> str:
    """Why this kernel cannot run, in a sentence; the empty string if it can."""
    if case.bound and not case.result.elements:
        return "the result is empty"
    reason = runtime.missing() or runtime.unsuitable(*case.given, case.result)
    if reason:
        return reason
    x = case.x
    if x.dims != 2:
        return f"the fused kernel is for images (N, C, H, W), got {x.dims} spatial dimensions"
    if not case.bound and not x.channels_last:
        return "contiguous layout: the fused kernel reads channels_last images only"
    if x.stride[1] != 1:
        return f"the channels of a pixel must lie next to one another, got strides {x.stride}"
    return runtime.too_large(case.result.shape)


def slower(case: Case) -> str:
    """Why two kernels, depthwise and pointwise, are faster with such filters; the empty string if they are not."""
    columns = case.kernel_size[1]
    if columns > UNROLLED_TAPS:
        return f"filters wider than {UNROLLED_TAPS} columns are faster in the depthwise kernel, got {columns} columns"
    return ""


def describe(case: Case) -> dict[str, Any]:
    """The schedule in words and numbers."""
    found = plan(case)
    spec = found.spec
    return {
        **spec.tile._asdict(),
        "rows": [rows for rows, _, _ in found.calls],
        "columns": spec.columns,
        "depthwise_lanes": spec.depthwise_lanes,
        "streams": spec.streams,
        "parallel": spec.parallel,
    }


def pack(found: SeparablePlan, weights: Sequence[Tensor | None]) -> list[Buffer]:
    """Copies of the weights as the kernel of this plan takes them."""
    multiplier = found.spec.multiplier
    depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias = weights
    assert depthwise_weight is not None
    assert pointwise_weight is not None
    tensors = (
        pack_taps(depthwise_weight, multiplier),
        pack_taps(packing.pack_bias(depthwise_bias, depthwise_weight), multiplier),
        packing.pack(pointwise_weight, *found.spec.tile.panels, multiplier),
        packing.pack_bias(pointwise_bias, pointwise_weight),
    )
    return [buffer(tensor) for tensor in tensors]


def pack_taps(weight: Tensor, multiplier: int) -> Tensor:
    """(C*M, 1, kH, kW) -> (kH, kW, M, C); a bias (C*M,) -> (M, C)."""
    filters = weight.detach().reshape(-1, multiplier, *weight.shape[2:])
    return filters.movedim((0, 1), (-1, -2)).clone(memory_format=torch.contiguous_format)


def bind(found: SeparablePlan, x: Tensor, packed: list[Buffer], residual: Tensor | None, out: Tensor) -> Bound | Chain:
    """The call that fills ``out`` from what is then in ``x`` and ``residual``: for repeated use of the same memory.

    ``found`` comes from :func:`plan`, ``packed`` from :func:`pack`, ``out`` is ``layout.new_output(x, O, found.size)``.
    """
    images = check_pixels("separable.bind", out, residual)
    kernel = runtime.compiled(("separable", found.spec), lambda: build(found.spec))
    inputs: list[Buffer | int] = [*found.before, pixels(x), *packed]
    calls = []
    for (rows, first, tiles), share in zip(found.calls, found.share, strict=True):
        views = []
        for image in images:
            step = pixel_step(image.shape, image.stride())
            shape, strides, skipped = _tiles(tuple(image.shape), step, (rows, first, tiles))
            views.append(Buffer(shape, strides, image.data_ptr() + skipped, holds=image))
        calls.append(kernel.bind(found.size[1], rows, first, share, *inputs, *views))
    return calls[0] if len(calls) == 1 else Chain(calls)


def _tiles(shape: Sizes, step: int, call: tuple[int, int, int]) -> tuple[Sizes, Sizes, int]:
    """(N, O, Ho, Wo), whose pixels lie ``step`` numbers apart, from a row on, as (N, tile, pixel in tile, O): sizes,
    strides, bytes before it."""
    images, channels, height, width = shape
    (rows, first, tiles), row = call, width * step
    return (images, tiles, rows * width, channels), (height * row, rows * row, step, 1), 4 * first * row


class SeparableCall:
    """The operation for all tensors of these sizes and strides."""

    def __init__(self, case: Case) -> None:
        result = case.result
        self.shape, self.dtype, self.memory_format = result.shape, result.dtype, case.x.memory_format
        self.found = plan(case)
        self._x = _pixels(case.x)
        assert case.then is not None
        panels = self.found.spec.tile.panels
        variant = ("separable", *panels, case.weight.shape, case.then.weight.shape)
        self._calls = PackedCalls(variant, partial(pack, self.found), self._prepare) if result.elements else None

    def _prepare(self, packed: list[Any]) -> list[tuple[KernelCall, int]]:
        found, calls = self.found, []
        for (rows, first, tiles), share in zip(found.calls, found.share, strict=True):
            shape, strides, skipped = _tiles(self.shape, self.shape[1], (rows, first, tiles))
            images = [Strided(shape, strides)] * (2 if found.spec.residual else 1)
            given = (found.size[1], rows, first, share, *found.before, self._x, *packed, *images)
            calls.append((KernelCall(("separable", found.spec), partial(build, found.spec), given), skipped))
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
        out = torch.empty(self.shape, dtype=self.dtype, memory_format=self.memory_format)
        if self._calls is not None:
            weights = (depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias)
            if residual is None:
                self._calls(weights, x.data_ptr(), out.data_ptr())
            else:
                added = like(residual, out)
                self._calls(weights, x.data_ptr(), added.data_ptr(), out.data_ptr())
        return out


def _pixels(x: Outline) -> Strided:
    """(N, C, H, W) as (N, H, W, C); the step of a single channel says nothing, and the kernel expects neighbours."""
    n, c, h, w = x.shape
    by_image, by_channel, by_row, by_column = x.stride
    return Strided((n, h, w, c), (by_image, by_row, by_column, 1 if c == 1 else by_channel))


prepare = SeparableCall
