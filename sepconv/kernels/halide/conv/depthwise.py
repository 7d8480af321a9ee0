"""Depthwise convolution on CPUs in float32: forward, gradient of the input and of the filters.

Images may hold numbers of 16 bits (see ``numbers``), in memory that is given each image of its own kind; filters, their
gradient and biases are float32, or copied to it.

Tensors are (N, C, ...) with one to three spatial dimensions, weights (C*M, 1, ...); output channel c*M + m depends on
input channel c alone. Contiguous and channels_last tensors are read in place, views included; others are copied once.
The result has the layout of the first tensor that is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sepconv.kernels.case import PASSES, Case, Outline
from sepconv.kernels.halide.conv import depthwise_choice, depthwise_plan
from sepconv.kernels.halide.conv.depthwise_call import (
    Gather,
    WeightGradient,
    filters,
    no_bias,
    plane_layout,
    reads_in_place,
)
from sepconv.kernels.halide.conv.depthwise_plan import DepthwisePlan
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.buffers import Buffer, buffer
from sepconv.kernels.halide.jit.machine_code import Bound
from sepconv.kernels.halide.numbers import KINDS
from sepconv.kernels.layout import pixel_step


def supports(case: Case) -> str:
    """Why this kernel cannot do it, in a sentence; the empty string if it can."""
    if case.which not in PASSES:
        raise ValueError(f"depthwise.supports: which must be one of {PASSES} but is {case.which!r}")
    if case.bound and not case.result.elements:
        return "the result is empty"
    image, other = case.given[:2]
    kinds = tuple(kind for kind in KINDS if kind.is_floating_point)
    of_filters = (image.dtype,) if case.which == "grad_weight" else (*runtime.FLOAT32, image.dtype)
    return (
        runtime.missing()
        or runtime.unsuitable(image, case.result, numbers=kinds)
        or runtime.unsuitable(other, numbers=kinds if case.bound else of_filters)
    )


def slower(case: Case) -> str:
    """Why PyTorch's kernel is expected to be faster, in a sentence; the empty string if this one is."""
    return depthwise_choice.slower(depthwise_plan.problem(case), case.bound)


def slower_trained(case: Case) -> str:
    """The same of the whole of a layer that is trained, whose forward pass this is."""
    if supports(case) or any(low != high for low, high in case.geometry.padding):
        return ""
    return depthwise_choice.slower_trained(depthwise_plan.problem(case))


def describe(case: Case) -> dict[str, Any]:
    """The schedule in words and numbers: layout, loop sizes, and tensors that have to be copied first."""
    found = plan(case)
    p = found.problem
    images = (case.y, case.x) if case.which == "grad_weight" else case.given[:1]
    copies = sum(not reads_in_place(outline, p.channels_last) for outline in images)
    layout = "channels_last" if p.channels_last else "contiguous"
    return {
        "layout": layout,
        "numbers": p.numbers,
        "written": p.written,
        "copied_tensors": copies,
    } | found.description()


def plan(case: Case) -> DepthwisePlan:
    """The kernel and its schedule for such tensors."""
    return depthwise_plan.plan(case)


def prepare(case: Case) -> Callable[..., Tensor]:
    """``F.conv2d(x, weight, bias, stride, padding, dilation, groups=C)``, then the activation, or one of its gradients.

    The gradient of the filters is contiguous.
    """
    numbers = case.x.dtype
    if case.which == "grad_weight":
        gradient = WeightGradient(case)
        return gradient if numbers is torch.float32 else lambda grad, x: gradient(grad, x).to(numbers)
    gather = Gather(_with_single_filters(case))
    if case.weight.dtype is torch.float32:
        return gather
    return lambda image, weight, bias=None: gather(image, weight.float(), None if bias is None else bias.float())


def _with_single_filters(case: Case) -> Case:
    def single(outline: Outline) -> Outline:
        return outline.to(torch.float32)

    return replace(case, weight=single(case.weight), bias=None if case.bias is None else single(case.bias))


def pack(found: DepthwisePlan, weights: Sequence[Tensor | None]) -> list[Buffer]:
    """Weight and bias in float32: where they lie, if they are, since this kernel reads them so."""
    weight, bias = weights
    assert weight is not None
    multiplier = found.problem.multiplier
    return [
        buffer(weight.float(), filters(tuple(weight.shape), multiplier)),
        no_bias() if bias is None else buffer(bias.float(), (-1, multiplier)),
    ]


def bind(found: DepthwisePlan, x: Tensor, packed: list[Buffer], residual: Tensor | None, out: Tensor) -> Bound:
    """The call of the forward pass that fills ``out`` from what is then in ``x``: for repeated use of the same memory.

    ``x`` and ``out`` are both contiguous, or both channels_last images or channels of such.
    """
    p = found.problem
    if not all(_readable(image, p.channels_last) for image in (x, out)):
        raise ValueError(f"depthwise.bind: x and out must have one layout, got {x.stride()} and {out.stride()}")
    kernel = runtime.compiled(found.key, found.build)
    return kernel.bind(_planes(x, 1), *packed, *found.arguments, _planes(out, p.multiplier))


def _planes(image: Tensor, multiplier: int) -> Buffer:
    layout = plane_layout(tuple(image.shape), image.stride(), multiplier, KINDS[image.dtype])
    return Buffer(layout.shape, layout.stride, image.data_ptr(), layout.code, image)


def _readable(image: Tensor, channels_last: bool) -> bool:
    return pixel_step(image.shape, image.stride()) > 0 if channels_last else image.is_contiguous()
