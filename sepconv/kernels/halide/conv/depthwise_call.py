"""Depthwise kernels made ready for tensors of fixed sizes and strides, to be called with one after the other."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sepconv.kernels.halide.conv.depthwise_plan import Problem, plan
from sepconv.kernels.halide.jit.buffers import buffer
from sepconv.kernels.halide.jit.calls import Call, Layout
from sepconv.kernels.halide.numbers import CODES, DTYPES
from sepconv.kernels.layout import is_channels_last

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


def _plane_layout(shape: Sizes, stride: Sizes, multiplier: int, numbers: str) -> Layout:
    """:func:`planes` with strides. Those of single elements say nothing; the kernels expect them as without gaps."""
    sizes = planes(shape, multiplier)
    image, channel, *space = stride
    if sizes[-1] == 1:
        space[-1] = 1
    across = channel if multiplier > 1 else 1
    return Layout(
        sizes,
        (image, channel * multiplier if sizes[1] > 1 else multiplier, across, *(1,) * (3 - len(space)), *space),
        CODES[numbers],
    )


def _filter_layout(shape: Sizes, stride: Sizes, multiplier: int) -> Layout:
    """:func:`filters` with strides."""
    channel, _, *space = stride
    return Layout(filters(shape, multiplier), (channel * multiplier, channel, *(1,) * (3 - len(space)), *space))


def _bias_layout(bias: Tensor, multiplier: int) -> Layout:
    (step,) = bias.stride()
    return Layout((bias.shape[0] // multiplier, multiplier), (step * multiplier, step))


@lru_cache(maxsize=1)
def no_bias() -> Any:
    return buffer(torch.zeros(1), (1, 1))


def reads_in_place(tensor: Tensor, channels_last: bool) -> bool:
    """Whether the dimension that vectors run along lies side by side in memory."""
    if tensor.shape[-1] == 1 and not channels_last:
        return tensor.is_contiguous()  # the stride of a single element says nothing
    return tensor.stride(1 if channels_last else -1) == 1


class _Image:
    """How one image tensor comes before the kernel: in place, or copied once into the layout ``memory_format``."""

    def __init__(self, tensor: Tensor, p: Problem, multiplier: int) -> None:
        self.memory_format = _memory_format(tensor.shape, p)
        self.copied = not reads_in_place(tensor, p.channels_last)
        stride = tensor.stride()
        if self.copied:
            stride = torch.empty(tensor.shape, memory_format=self.memory_format, device="meta").stride()
        self.layout = _plane_layout(tuple(tensor.shape), stride, multiplier, p.numbers)

    def read(self, tensor: Tensor) -> Tensor:
        return tensor.clone(memory_format=self.memory_format) if self.copied else tensor


def _memory_format(shape: Sizes, p: Problem) -> torch.memory_format:
    return _FORMATS[len(shape)] if p.channels_last else torch.contiguous_format


class Gather:
    """The forward pass, or the gradient of the input: each pixel of the result gathers its terms."""

    def __init__(self, p: Problem, source: Tensor, weight: Tensor, bias: Tensor | None, shape: Sizes) -> None:
        forward = p.which == "forward"
        self.shape, self.memory_format, self.dtype = shape, _memory_format(shape, p), DTYPES[p.numbers]
        # What was computed in contiguous form returns to the layout of the source: images of very few channels.
        self.returned = _FORMATS[len(shape)] if not p.channels_last and is_channels_last(source) else None
        self.image = _Image(source, p, 1 if forward else p.multiplier)
        self.call = None
        if 0 not in shape:
            chosen = plan(p, torch.get_num_threads())
            out = torch.empty(shape, memory_format=self.memory_format, device="meta").stride()
            arguments = (
                self.image.layout,
                _filter_layout(tuple(weight.shape), weight.stride(), p.multiplier),
                no_bias() if bias is None else _bias_layout(bias, p.multiplier),
                *chosen.arguments,
                _plane_layout(shape, out, p.multiplier if forward else 1, p.numbers),
            )
            self.call = Call(chosen.key, chosen.build, arguments)

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
    """The gradient of the filters: each tap of a filter sums over all pixels."""

    def __init__(self, p: Problem, grad_output: Tensor, x: Tensor, shape: Sizes) -> None:
        self.shape = shape
        self.grad_image, self.image = _Image(grad_output, p, p.multiplier), _Image(x, p, 1)
        self.call = None
        if grad_output.numel():
            chosen = plan(p, torch.get_num_threads())
            out = torch.empty(shape, device="meta").stride()
            result = _filter_layout(shape, out, p.multiplier)
            arguments = (self.image.layout, self.grad_image.layout, *chosen.arguments, result)
            self.call = Call(chosen.key, chosen.build, arguments)

    def __call__(self, grad_output: Tensor, x: Tensor) -> Tensor:
        if self.call is None:
            return torch.zeros(self.shape, dtype=torch.float32)
        grad_output, x = self.grad_image.read(grad_output), self.image.read(x)
        out = torch.empty(self.shape, dtype=torch.float32)
        self.call(x.data_ptr(), grad_output.data_ptr(), out.data_ptr())
        return out
