"""Depthwise convolution on CPUs in float32: forward, gradient of the input and of the filters.

Images may hold numbers of 16 bits (see ``numbers``); filters, their gradient and biases are float32.

Tensors are (N, C, ...) with one to three spatial dimensions, weights (C*M, 1, ...); output channel c*M + m depends on
input channel c alone. Contiguous and channels_last tensors are read in place, views included; others are copied once.
The result has the layout of the first tensor. Padding is one (low, high) pair per spatial dimension.

``which`` names a pass, and with it the two tensors that are read and the size of the third:

    "forward"      x, weight
    "grad_input"   grad_output, weight      size of x
    "grad_weight"  grad_output, x           size of weight
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sepconv.kernels.halide.conv import depthwise_choice
from sepconv.kernels.halide.conv.depthwise_call import (
    Gather,
    WeightGradient,
    filters,
    no_bias,
    planes,
    reads_in_place,
)
from sepconv.kernels.halide.conv.depthwise_choice import PASSES
from sepconv.kernels.halide.conv.depthwise_plan import Plan, Problem, plan, problem
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.buffers import buffer
from sepconv.kernels.halide.numbers import KINDS
from sepconv.kernels.layout import is_channels_last

Padding = Sequence[tuple[int, int]]

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
# Below this many channels a vector of channels is mostly empty.
_LEAST_CHANNELS = 4


def supports(
    which: str,
    first: Tensor,
    second: Tensor,
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    activation: str = "",
) -> str:
    """Why this kernel cannot do it, in a sentence; the empty string if it can."""
    if which not in PASSES:
        raise ValueError(f"depthwise.supports: which must be one of {PASSES} but is {which!r}")
    second_dtypes = (first.dtype,) if which == "grad_weight" else runtime.FLOAT32
    return (
        runtime.missing()
        or runtime.unsuitable(first, dtypes=tuple(KINDS))
        or runtime.unsuitable(second, dtypes=second_dtypes)
    )


def slower(
    which: str,
    first: Tensor,
    second: Tensor,
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    activation: str = "",
    size: Sequence[int] | None = None,
    bound: bool = False,
) -> str:
    """Why PyTorch's kernel is expected to be faster, in a sentence; the empty string if this one is.

    ``bound``: as for :func:`bind`, the result goes to memory that is given.
    """
    return depthwise_choice.slower(_pose(which, first, second, stride, padding, dilation, activation, size), bound)


def describe(
    which: str,
    first: Tensor,
    second: Tensor,
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    activation: str = "",
    size: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The schedule in words and numbers: layout, loop sizes, and tensors that have to be copied first."""
    p = _pose(which, first, second, stride, padding, dilation, activation, size)
    images = (first, second) if which == "grad_weight" else (first,)
    copies = sum(not reads_in_place(tensor, p.channels_last) for tensor in images)
    layout = "channels_last" if p.channels_last else "contiguous"
    known = {"layout": layout, "numbers": p.numbers, "copied_tensors": copies}
    return known | plan(p, torch.get_num_threads()).description()


def _pose(
    which: str,
    first: Tensor,
    second: Tensor,
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    activation: str = "",
    size: Sequence[int] | None = None,
    bias: bool = False,
) -> Problem:
    """The problem behind the arguments; a size that is not given is the smallest that fits, with M = 1."""
    if which == "forward":
        image, weight = tuple(first.shape), tuple(second.shape)
        output = (image[0], weight[0], *_output_sizes(image[2:], weight[2:], stride, padding, dilation))
    elif which == "grad_input":
        output, weight = tuple(first.shape), tuple(second.shape)
        image = tuple(size) if size else (*output[:2], *_image_sizes(output, weight, stride, padding, dilation))
    else:
        output, image = tuple(first.shape), tuple(second.shape)
        weight = tuple(size) if size else (output[1], 1, *_filter_sizes(output, image, stride, padding, dilation))
    channels_last = image[1] >= _LEAST_CHANNELS and is_channels_last(second if which == "grad_weight" else first)
    low, numbers = tuple([amount for amount, _ in padding]), KINDS[first.dtype]
    walk = (tuple(stride), low, tuple(dilation))
    return problem(which, channels_last, image, output, weight, *walk, bias, activation, numbers)


def _output_sizes(
    image: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Padding, dilation: Sequence[int]
) -> list[int]:
    return [
        (size + low + high - d * (k - 1) - 1) // s + 1
        for size, k, s, (low, high), d in zip(image, kernel, stride, padding, dilation, strict=True)
    ]


def _image_sizes(
    output: Sequence[int], weight: Sequence[int], stride: Sequence[int], padding: Padding, dilation: Sequence[int]
) -> list[int]:
    return [
        max(1, (size - 1) * s + d * (k - 1) + 1 - low - high)
        for size, k, s, (low, high), d in zip(output[2:], weight[2:], stride, padding, dilation, strict=True)
    ]


def _filter_sizes(
    output: Sequence[int], image: Sequence[int], stride: Sequence[int], padding: Padding, dilation: Sequence[int]
) -> list[int]:
    return [
        max(0, have + low + high - want * s) // d + 1
        for have, want, s, (low, high), d in zip(image[2:], output[2:], stride, padding, dilation, strict=True)
    ]


def prepare_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    activation: str = "",
) -> Gather:
    """``F.conv2d(x, weight, bias, stride, padding, dilation, groups=C)``, then the activation.

    For all tensors of these sizes and strides: call the result with x, weight and bias.
    """
    p = _pose("forward", x, weight, stride, padding, dilation, activation, bias=bias is not None)
    return Gather(p, x, weight, bias, (x.shape[0], weight.shape[0], *p.output[: p.dims][::-1]))


def bind(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    activation: str,
    out: Tensor,
) -> Callable[[], None]:
    """The call of the forward pass that fills ``out`` from what is then in ``x``: for repeated use of the same memory.

    ``x`` and ``out`` are both contiguous, or both channels_last images.
    """
    channels_last = x.dim() == 4 and not (x.is_contiguous() and out.is_contiguous())
    layout = _FORMATS[x.dim()] if channels_last else torch.contiguous_format
    if not (x.is_contiguous(memory_format=layout) and out.is_contiguous(memory_format=layout)):
        raise ValueError(f"depthwise.bind: x and out must have one layout, got {x.stride()} and {out.stride()}")
    low = tuple([low for low, _ in padding])
    p = problem(
        "forward", channels_last, tuple(x.shape), tuple(out.shape), tuple(weight.shape), tuple(stride), low,
        tuple(dilation), bias is not None, activation,
    )  # fmt: skip
    return bind_plan(plan(p, torch.get_num_threads()), p, x, weight, bias, out)


def bind_plan(
    chosen: Plan, p: Problem, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor
) -> Callable[[], None]:
    """:func:`bind` with the plan that is given."""
    return runtime.compiled(chosen.key, chosen.build).bind(
        buffer(x, planes(tuple(x.shape), 1)),
        buffer(weight, filters(tuple(weight.shape), p.multiplier)),
        no_bias() if bias is None else buffer(bias, (-1, p.multiplier)),
        *chosen.arguments,
        buffer(out, planes(tuple(out.shape), p.multiplier)),
    )


def prepare_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
) -> Gather:
    """Gradient with respect to x, of shape ``input_size``: call the result with grad_output and weight."""
    p = _pose("grad_input", grad_output, weight, stride, padding, dilation, size=input_size)
    return Gather(p, grad_output, weight, None, tuple(input_size))


def prepare_grad_weight(
    grad_output: Tensor,
    x: Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
) -> WeightGradient:
    """Gradient with respect to the filters, contiguous: call the result with grad_output and x."""
    p = _pose("grad_weight", grad_output, x, stride, padding, dilation, size=weight_size)
    return WeightGradient(p, grad_output, x, tuple(weight_size))
