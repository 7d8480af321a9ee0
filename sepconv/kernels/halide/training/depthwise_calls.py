"""Depthwise stages made ready for tensors of fixed sizes: which kernel, with which loops, over which memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from sepconv.kernels.case import Geometry, Outline
from sepconv.kernels.halide.conv.depthwise_call import filters, plane_layout
from sepconv.kernels.halide.conv.depthwise_gather import GatherSpec
from sepconv.kernels.halide.conv.depthwise_taps import Phase, forward_taps, transposed_taps
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.calls import KernelCall, Strided
from sepconv.kernels.halide.numbers import KINDS
from sepconv.kernels.halide.schedule import training as schedule
from sepconv.kernels.halide.schedule.depthwise import GatherTile, WeightTile, ceil_div
from sepconv.kernels.halide.schedule.machine import host
from sepconv.kernels.halide.training import depthwise, depthwise_gradients, slopes
from sepconv.kernels.halide.training.depthwise import DepthwiseStageSpec
from sepconv.kernels.halide.training.depthwise_gradients import DepthwiseGradientsSpec
from sepconv.kernels.prologue import Deviation, Prologue, StageCase, StageGradients, StageOutput

NUMBERS = (torch.float32, torch.bfloat16)
_WIDEST_FILTER, _LONGEST_STRIDE = 15, 2
_FEW_TAPS, _FEW_BYTES = 9, 5 * 1024 * 1024
_ONE_TAP = (Phase(0, 1, 1, 0, 1),)


def unsuitable(case: StageCase, *images: Outline) -> str:
    """Why the kernels of this folder cannot read such images, in a sentence; the empty string if they can."""
    reason = runtime.missing() or runtime.unsuitable(*images, numbers=NUMBERS)
    if reason:
        return reason
    shape, numbers = images[0].shape, images[0].dtype
    if any(image.dtype is not numbers for image in images):
        return "the kernel reads and writes images of one kind of numbers"
    if len(shape) != 4 or images[0].stride[1] != 1:
        return "the kernel is for channels_last images"
    if not images[0].elements or any(not image.elements for image in images):
        return "there is nothing to compute"
    if not schedule.lanes_of(shape[1], host()):
        return f"the kernel is for {schedule.LEAST_LANES} channels or more, got {shape[1]}"
    return slopes.missing(case.prologue) if case.prologue and case.which == "gradients" else ""


def supports(case: StageCase) -> str:
    """Why these kernels cannot compute it, in a sentence; the empty string if they can."""
    weight, geometry = _parts(case)
    if reason := unsuitable(case, case.x, case.y):
        return reason
    if weight.device.type != "cpu" or not weight.plain:
        return f"the kernel reads plain weights on the cpu, got {weight.device}"
    if weight.shape[0] != case.x.shape[1]:
        return "the kernel is for one filter per channel"
    if max(geometry.stride) > _LONGEST_STRIDE:
        return f"the kernel is for strides up to {_LONGEST_STRIDE}, got {geometry.stride}"
    if max(weight.shape[2:]) > _WIDEST_FILTER:
        return f"the kernel is for filters up to {_WIDEST_FILTER}, got {weight.shape[2:]}"
    return ""


def slower(case: StageCase) -> str:
    """Why PyTorch's kernels are expected to be as fast, in a sentence; the empty string if these are faster.

    With a norm before or statistics behind they save passes over memory that PyTorch's make.
    """
    weight, _ = _parts(case)
    if case.which == "forward" or case.prologue is not None or case.deviated or case.x.dtype is not torch.float32:
        return ""
    few = 4 * (case.x.elements + case.y.elements) <= _FEW_BYTES
    if few or not all(case.need[:2]) or prod(weight.shape[2:]) > _FEW_TAPS:
        return ""
    return "PyTorch computes both gradients of filters this small as fast"


def _parts(case: StageCase) -> tuple[Outline, Geometry]:
    assert case.weight is not None
    assert case.geometry is not None
    return case.weight, case.geometry


def _xy(values: Any) -> tuple[int, int]:
    y, x = values
    return x, y


def _reach(case: StageCase, d: int) -> int:
    """How far the taps of a filter lie apart."""
    weight, geometry = _parts(case)
    return geometry.dilation[d] * (weight.shape[2 + d] - 1)


def _strips(case: StageCase) -> schedule.Strips:
    """Forward there are a tile of x and one of the result; back one of grad, and of x and its gradient."""
    (batch, channels, *_), (_, _, height, width), geometry = case.x.shape, case.y.shape, _parts(case)[1]
    under = geometry.stride[0] * (width * geometry.stride[1] + _reach(case, 1))
    per_row = width + under if case.which == "forward" else width + _reach(case, 1) + 2 * under
    return schedule.strips(channels, batch, height, 4 * per_row, host())


def _gather(case: StageCase, found: schedule.Strips, transposed: bool) -> GatherSpec:
    weight, geometry = _parts(case)
    size, stride, dilation = _xy(weight.shape[2:]), _xy(geometry.stride), _xy(geometry.dilation)
    low = _xy([low for low, _ in geometry.padding])
    numbers = KINDS[case.x.dtype]
    if transposed:
        taps = [transposed_taps(size[d], stride[d], dilation[d], low[d]) for d in (0, 1)]
        width, step = ceil_div(case.x.shape[3], stride[0]), (1, 1, 1)
    else:
        taps = [forward_taps(size[d], dilation[d]) for d in (0, 1)]
        width, step = case.y.shape[3], (*stride, 1)
    columns = schedule.columns_of(width, len(taps[0]) * len(taps[1]), host())
    tile = GatherTile(found.lanes, found.block, columns, 1, schedule.unrolled_taps(columns))
    kind = (2, True, transposed, (*taps, _ONE_TAP), step)
    return GatherSpec(*kind, 1, case.bias, "", tile, numbers, False, numbers)


def _forward_spec(case: StageCase) -> tuple[DepthwiseStageSpec, int]:
    """And rows of a strip."""
    found = _strips(case)
    return DepthwiseStageSpec(_gather(case, found, False), case.prologue, case.statistics), found.rows


def _gradients_spec(case: StageCase) -> tuple[DepthwiseGradientsSpec, int]:
    weight, geometry = _parts(case)
    found, size = _strips(case), _xy(weight.shape[2:])
    taps = schedule.taps_in_registers(size, host())
    groups = WeightTile(found.lanes, found.block, *taps, 1, 1)
    walk = size, _xy(geometry.stride), _xy(geometry.dilation)
    gather = _gather(case, found, True)
    return DepthwiseGradientsSpec(gather, groups, *walk, case.prologue, case.deviated, case.need), found.rows


def describe(case: StageCase) -> dict[str, Any]:
    """The schedule in words and numbers."""
    if case.which == "forward":
        forward, rows = _forward_spec(case)
        return {"numbers": forward.gather.numbers, "rows": rows} | forward.gather.tile._asdict()
    gradients, rows = _gradients_spec(case)
    return {"numbers": gradients.gather.numbers, "rows": rows} | gradients.gather.tile._asdict()


@lru_cache(maxsize=256)
def channels_last_steps(shape: tuple[int, ...]) -> tuple[int, ...]:
    return Outline.channels_last_of(shape).stride


def image_layout(shape: tuple[int, ...], stride: tuple[int, ...], numbers: torch.dtype) -> Strided:
    """As the kernels read it."""
    return plane_layout(shape, (stride[0], 1, *stride[2:]), 1, KINDS[numbers])


class Image:
    """An image as a call gives it, copied where it does not lie as the kernel was made for."""

    def __init__(self, outline: Outline) -> None:
        self.stride = outline.stride
        if outline.stride[1] != 1:
            self.stride = channels_last_steps(outline.shape)
        self.layout = image_layout(outline.shape, self.stride, outline.dtype)

    def read(self, tensor: Tensor) -> Tensor:
        if tensor.stride() == self.stride:
            return tensor
        return torch.empty_strided(tensor.shape, self.stride, dtype=tensor.dtype).copy_(tensor)


def vector(tensor: Tensor) -> Tensor:
    """A number for each channel, as the kernels read them."""
    return tensor if tensor.dtype is torch.float32 and tensor.is_contiguous() else tensor.float().contiguous()


def vector_layout(channels: int) -> Strided:
    return Strided((channels,), (1,))


def rows_layout(rows: int, channels: int) -> Strided:
    """Several such vectors."""
    return Strided((rows, channels), (channels, 1))


def prologue_addresses(prologue: Prologue | None, held: list[Tensor]) -> list[int]:
    """Where its vectors lie; ``held`` keeps them there."""
    if prologue is None:
        return []
    return _addresses(prologue[:3], held)


def _addresses(vectors: tuple[Tensor, ...], held: list[Tensor]) -> list[int]:
    read = [vector(given) for given in vectors]
    held += read
    return [given.data_ptr() for given in read]


def _filter_layout(weight: Outline) -> Strided:
    channel, _, *space = weight.stride
    return Strided(filters(weight.shape, 1), (channel, channel, 1, *space))


def _single(weight: Tensor) -> Tensor:
    return weight if weight.dtype is torch.float32 else weight.float()


def prepare(case: StageCase) -> Callable[..., StageOutput]:
    """The forward pass; see ``stages.depthwise_stage``."""
    weight, geometry = _parts(case)
    spec, rows = _forward_spec(case)
    image, shape, channels, numbers = Image(case.x), case.y.shape, case.x.shape[1], case.x.dtype
    result = image_layout(shape, channels_last_steps(shape), numbers)
    vectors = [vector_layout(channels)] * (0 if case.prologue is None else 3)
    base = [-low for low in _xy([low for low, _ in geometry.padding])]
    moments = [rows_layout(2, channels)] * case.statistics
    none = torch.zeros(channels)
    given = [image.layout, _filter_layout(weight.to(torch.float32)), vector_layout(channels), *base, rows]
    call = KernelCall(("depthwise stage", spec), partial(depthwise.build, spec), [*given, *vectors, result, *moments])

    def run(x: Tensor, prologue: Prologue | None, weight: Tensor, bias: Tensor | None) -> StageOutput:
        x, weight = image.read(x), _single(weight)
        after = none if bias is None else vector(bias)
        held: list[Tensor] = []
        y = torch.empty(shape, dtype=numbers, memory_format=torch.channels_last)
        found = torch.empty(2, channels) if moments else None
        ends = (y.data_ptr(),) if found is None else (y.data_ptr(), found.data_ptr())
        norm = prologue_addresses(prologue, held)
        call(x.data_ptr(), weight.data_ptr(), after.data_ptr(), *norm, *ends)
        return StageOutput(y, None, None) if found is None else StageOutput(y, *found.unbind())

    return run


def prepare_gradients(case: StageCase) -> Callable[..., StageGradients]:
    """The backward pass; see ``stages.depthwise_stage_gradients``."""
    weight, _ = _parts(case)
    grads, images, size = Image(case.y), Image(case.x), weight.shape
    shape, channels, numbers, normed = case.x.shape, case.x.shape[1], case.x.dtype, case.prologue is not None
    ys = Image(Outline.channels_last_of(case.y.shape, numbers))
    call = _gradients_call(case, [grads, *([ys] if case.deviated else []), images])
    need_x, need_weight, need_bias = case.need
    of_weight = weight.dtype

    def run(
        grad: Tensor, deviation: Deviation | None, x: Tensor, prologue: Prologue | None, weight: Tensor
    ) -> StageGradients:
        held = [
            grads.read(grad),
            *([] if deviation is None else [ys.read(deviation.y)]),
            images.read(x),
            _single(weight),
        ]
        given = [tensor.data_ptr() for tensor in held]
        given += prologue_addresses(prologue, held)
        if deviation is not None:
            given += _addresses(deviation[1:], held)
        grad_x = torch.empty(shape, dtype=numbers, memory_format=torch.channels_last) if need_x else None
        sums = torch.empty(2, channels) if need_x and normed else None
        grad_weight = torch.empty(size) if need_weight else None
        grad_bias = torch.empty(channels) if need_bias else None
        results = [tensor for tensor in (grad_x, sums, grad_weight, grad_bias) if tensor is not None]
        call(*given, *[tensor.data_ptr() for tensor in results])
        total, away = (None, None) if sums is None else sums.unbind()
        if grad_weight is not None and of_weight is not torch.float32:
            grad_weight = grad_weight.to(of_weight)
        return StageGradients(grad_x, total, away, grad_weight, grad_bias)

    return run


def _gradients_call(case: StageCase, images: list[Image]) -> KernelCall:
    (weight, geometry), channels, numbers = _parts(case), case.x.shape[1], case.x.dtype
    spec, rows = _gradients_spec(case)
    low, stride = _xy([low for low, _ in geometry.padding]), spec.stride
    base = [low[d] // stride[d] for d in (0, 1)]
    strips = max(ceil_div(case.y.shape[2], rows), ceil_div(case.x.shape[2], rows * stride[1]))
    vectors = 3 * ((case.prologue is not None) + case.deviated)
    results: list[Strided] = []
    if case.need[0]:
        results.append(image_layout(case.x.shape, channels_last_steps(case.x.shape), numbers))
        results += [rows_layout(2, channels)] * (case.prologue is not None)
    if case.need[1]:
        height, width = weight.shape[2:]
        results.append(Strided((channels, height, width), (height * width, width, 1)))
    results += [rows_layout(1, channels)] * case.need[2]
    given = [image.layout for image in images] + [_filter_layout(weight.to(torch.float32))]
    counts = [*low, *base, rows, strips]
    arguments = [*given, *counts, *[vector_layout(channels)] * vectors, *results]
    return KernelCall(("depthwise gradients", spec), partial(depthwise_gradients.build, spec), arguments)
