"""Passes over images in training made ready for tensors of fixed sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sepconv.kernels.case import Outline
from sepconv.kernels.halide.jit.calls import KernelCall, Strided
from sepconv.kernels.halide.numbers import CODES, KINDS
from sepconv.kernels.halide.schedule import training as schedule
from sepconv.kernels.halide.schedule.machine import host
from sepconv.kernels.halide.training import finish
from sepconv.kernels.halide.training.depthwise_calls import (
    channels_last_steps,
    prologue_addresses,
    rows_layout,
    unsuitable,
    vector_layout,
)
from sepconv.kernels.halide.training.finish import FinishSpec
from sepconv.kernels.layout import pixel_step
from sepconv.kernels.prologue import InputGradients, Prologue, StageCase, Statistics


def supports(case: StageCase) -> str:
    """Why these kernels cannot compute it, in a sentence; the empty string if they can."""
    return unsuitable(case, case.x, case.y)


def spec_of(case: StageCase) -> FinishSpec:
    what = case.op if case.which == "forward" else "gradients" if case.op == "finish" else f"{case.op} gradients"
    channels = case.x.shape[1]
    lanes = schedule.lanes_of(channels, host())
    return FinishSpec(what, KINDS[case.x.dtype], lanes, channels % lanes == 0, case.prologue or "", case.residual)


def length(case: StageCase) -> int:
    n, channels, height, width = case.x.shape
    return schedule.pixels_of_run(channels, n * height * width)


def describe(case: StageCase) -> dict[str, Any]:
    """The schedule in words and numbers."""
    spec = spec_of(case)
    return {"numbers": spec.numbers, "lanes": spec.lanes, "pixels_of_a_run": length(case)}


class Pixels:
    """An image as pixel after pixel, copied where they do not lie so."""

    def __init__(self, outline: Outline) -> None:
        self.stride = outline.stride
        if not pixel_step(outline.shape, outline.stride):
            self.stride = channels_last_steps(outline.shape)
        self.layout = _pixels(outline.shape, self.stride, outline.dtype)

    def read(self, tensor: Tensor) -> Tensor:
        if tensor.stride() == self.stride:
            return tensor
        return torch.empty_strided(tensor.shape, self.stride, dtype=tensor.dtype).copy_(tensor)


def _pixels(shape: Sequence[int], stride: Sequence[int], numbers: torch.dtype) -> Strided:
    n, channels, height, width = shape
    return Strided((n * height * width, channels), (pixel_step(shape, stride), 1), CODES[KINDS[numbers]])


def _call(case: StageCase, images: Sequence[Pixels], results: Sequence[Strided]) -> KernelCall:
    spec, channels = spec_of(case), case.x.shape[1]
    vectors = [vector_layout(channels)] * (0 if case.op == "statistics" else 3)
    given = [length(case), *[image.layout for image in images], *vectors, *results]
    return KernelCall((spec.what, spec), partial(finish.build, spec), given)


def result_of(case: StageCase) -> Strided:
    return _pixels(case.x.shape, channels_last_steps(case.x.shape), case.x.dtype)


def prepare(case: StageCase) -> Callable[..., Tensor]:
    """See ``stages.finish``."""
    image, shape, numbers = Pixels(case.x), case.x.shape, case.x.dtype
    added = Pixels(case.y)
    call = _call(case, [image, *([added] if case.residual else [])], [result_of(case)])

    def run(x: Tensor, prologue: Prologue, residual: Tensor | None = None) -> Tensor:
        held = [image.read(x), *([] if residual is None else [added.read(residual)])]
        given = [tensor.data_ptr() for tensor in held]
        given += prologue_addresses(prologue, held)
        out = torch.empty(shape, dtype=numbers, memory_format=torch.channels_last)
        call(*given, out.data_ptr())
        return out

    return run


def prepare_gradients(case: StageCase) -> Callable[..., InputGradients]:
    """See ``stages.finish_gradients``."""
    grads, images = Pixels(case.y), Pixels(case.x)
    shape, channels, numbers = case.x.shape, case.x.shape[1], case.x.dtype
    call = _call(case, [grads, images], [result_of(case), rows_layout(2, channels)])

    def run(grad: Tensor, x: Tensor, prologue: Prologue) -> InputGradients:
        held = [grads.read(grad), images.read(x)]
        given = [tensor.data_ptr() for tensor in held]
        given += prologue_addresses(prologue, held)
        out = torch.empty(shape, dtype=numbers, memory_format=torch.channels_last)
        sums = torch.empty(2, channels)
        call(*given, out.data_ptr(), sums.data_ptr())
        return InputGradients(out, *sums.unbind())

    return run


def prepare_statistics(case: StageCase) -> Callable[..., Statistics]:
    """See ``stages.statistics``."""
    image, channels = Pixels(case.x), case.x.shape[1]
    call = _call(case, [image], [rows_layout(2, channels)])

    def run(x: Tensor) -> Statistics:
        x = image.read(x)
        moments = torch.empty(2, channels)
        call(x.data_ptr(), moments.data_ptr())
        return Statistics(*moments.unbind())

    return run
