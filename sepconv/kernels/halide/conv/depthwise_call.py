"""Depthwise kernels made ready for tensors of fixed sizes and strides, to be called with one after the other."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sepconv.kernels.case import Case, Outline
from sepconv.kernels.halide.conv.depthwise_plan import DepthwiseProblem, plan
from sepconv.kernels.halide.jit.buffers import buffer
from sepconv.kernels.halide.jit.calls import KernelCall, Strided
from sepconv.kernels.halide.numbers import CODES

Sizes = tuple[int, ...]

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def planes(shape: Sizes, multiplier: int) -> Sizes:
    """(N, C*M, ...) as the kernels read it: (n, c, m, z, y, x)."""
    n, channels, *space = shape
    return (n, channels // multiplier, multiplier, *(1,) * (3 - len(space)), *space)


def filters(shape: Sizes, multiplier: int) -> Sizes:
    """(C*M, 1, ...) as the kernels read it: (c, m, z, y, x)."""
    channels, _, *space = shape
    return (channels // multiplier, multiplier, *(1,) * (3 - len(space)), *space)


def plane_layout(shape: Sizes, stride: Sizes, multiplier: int, numbers: str) -> Strided:
    """:func:`planes` with strides. Those of single elements say nothing; the kernels expect them as without gaps."""
    sizes = planes(shape, multiplier)
    image, channel, *space = stride
    if sizes[-1] == 1:
        space[-1] = 1
    across = channel if multiplier > 1 else 1
    return Strided(
        sizes,
        (image, channel * multiplier if sizes[1] > 1 else multiplier, across, *(1,) * (3 - len(space)), *space),
        CODES[numbers],
    )


def _filter_layout(weight: Outline, multiplier: int) -> Strided:
    """:func:`filters` with strides."""
    channel, _, *space = weight.stride
    strides = (channel * multiplier, channel, *(1,) * (3 - len(space)), *space)
    return Strided(filters(weight.shape, multiplier), strides)


def _bias_layout(bias: Outline, multiplier: int) -> Strided:
    (step,) = bias.stride
    return Strided((bias.shape[0] // multiplier, multiplier), (step * multiplier, step))


@lru_cache(maxsize=1)
def no_bias() -> Any:
    return buffer(torch.zeros(1), (1, 1))


def reads_in_place(image: Outline, channels_last: bool) -> bool:
    """Whether the dimension that vectors run along lies side by side in memory."""
    if image.shape[-1] == 1 and not channels_last:
        return image.contiguous  # the stride of a single element says nothing
    return image.stride[1 if channels_last else -1] == 1


class _Image:
    """How one image tensor comes before the kernel: in place, or copied once into the layout ``memory_format``."""

    def __init__(self, outline: Outline, p: DepthwiseProblem, multiplier: int) -> None:
        self.memory_format = _memory_format(outline.shape, p)
        self.copied = not reads_in_place(outline, p.channels_last)
        stride = outline.stride
        if self.copied:
            stride = torch.empty(outline.shape, memory_format=self.memory_format, device="meta").stride()
        self.layout = plane_layout(outline.shape, stride, multiplier, p.numbers)

    def read(self, tensor: Tensor) -> Tensor:
        return tensor.clone(memory_format=self.memory_format) if self.copied else tensor


def _memory_format(shape: Sizes, p: DepthwiseProblem) -> torch.memory_format:
    return _FORMATS[len(shape)] if p.channels_last else torch.contiguous_format


class Gather:
    """The forward pass, or the gradient of the input: each pixel of the result gathers its terms."""

    def __init__(self, case: Case) -> None:
        found, source, result = plan(case), case.given[0], case.result
        p, forward = found.problem, case.which == "forward"
        self.shape, self.memory_format, self.dtype = result.shape, _memory_format(result.shape, p), result.dtype
        # What was computed in contiguous form returns to the layout of the source: images of very few channels.
        self.returned = _FORMATS[len(self.shape)] if not p.channels_last and source.channels_last else None
        self.image = _Image(source, p, 1 if forward else p.multiplier)
        self.call = None
        if result.elements:
            out = torch.empty(self.shape, memory_format=self.memory_format, device="meta").stride()
            arguments = (
                self.image.layout,
                _filter_layout(case.weight, p.multiplier),
                no_bias() if case.bias is None else _bias_layout(case.bias, p.multiplier),
                *found.arguments,
                plane_layout(self.shape, out, p.multiplier if forward else 1, p.numbers),
            )
            self.call = KernelCall(found.key, found.build, arguments)

    def __call__(self, source: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = torch.empty(self.shape, dtype=self.dtype, memory_format=self.memory_format)
        if self.call is not None:
            source = self.image.read(source)
            if bias is None:
                self.call(source.data_ptr(), weight.data_ptr(), out.data_ptr())
            else:
                self.call(source.data_ptr(), weight.data_ptr(), bias.data_ptr(), out.data_ptr())
        return out if self.returned is None else out.contiguous(memory_format=self.returned)


class WeightGradient:
    """The gradient of the filters, float32 whatever the images hold: each tap of a filter sums over all pixels."""

    def __init__(self, case: Case) -> None:
        found, result = plan(case), case.result.to(torch.float32)
        p, self.shape = found.problem, result.shape
        self.grad_image, self.image = _Image(case.y, p, p.multiplier), _Image(case.x, p, 1)
        self.call = None
        if case.y.elements:
            arguments = (
                self.image.layout,
                self.grad_image.layout,
                *found.arguments,
                _filter_layout(result, p.multiplier),
            )
            self.call = KernelCall(found.key, found.build, arguments)

    def __call__(self, grad_output: Tensor, x: Tensor) -> Tensor:
        if self.call is None:
            return torch.zeros(self.shape, dtype=torch.float32)
        grad_output, x = self.grad_image.read(grad_output), self.image.read(x)
        out = torch.empty(self.shape, dtype=torch.float32)
        self.call(x.data_ptr(), grad_output.data_ptr(), out.data_ptr())
        return out
