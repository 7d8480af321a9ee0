"""The shape rule: what a convolution's arguments must be, and how large its output is.

Everything that can be wrong with an argument is found here, once, before any kernel runs. Public functions, fake
kernels, layers and the cost model all ask this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

from torch import Tensor

from sepconv.kernels.case import Geometry

Size = int | Sequence[int]
Padding = Size | str


def positive(name: str, argument: str, value: Any) -> int:
    """A positive integer of any kind, such as NumPy's, as Python's own: those of eight bits overflow in products."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}: {argument} must be a positive integer, got {value!r}")
    return int(value)


def as_tuple(name: str, argument: str, value: Size, dims: int, least: int) -> tuple[int, ...]:
    """Repeat a number once per spatial dimension, or check a sequence of them."""
    items: tuple[Any, ...] = tuple(value) if isinstance(value, Sequence) else (value,) * dims
    if len(items) == 1:
        items *= dims
    if len(items) != dims or any(
        isinstance(i, bool) or not hasattr(i, "__index__") or getattr(i, "ndim", 0) for i in items
    ):
        raise ValueError(f"{name}: {argument} must be an integer or {dims} integers, got {value!r}")
    if any(i < least for i in items):
        raise ValueError(f"{name}: {argument} must be at least {least}, got {value!r}")
    return tuple(int(i) for i in items)


def same_padding(kernel_size: Sequence[int], dilation: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The padding that keeps the size at stride 1; an odd amount has its larger half at the end, as in PyTorch."""
    totals = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
    return tuple((total // 2, total - total // 2) for total in totals)


def resolve(
    name: str, dims: int, kernel_size: Sequence[int], stride: Size, padding: Padding, dilation: Size
) -> Geometry:
    """Turn the arguments of ``F.conv2d`` into a :class:`Geometry`, or say what is wrong with them."""
    strides = as_tuple(name, "stride", stride, dims, 1)
    dilations = as_tuple(name, "dilation", dilation, dims, 1)
    if not isinstance(padding, str):
        amounts = as_tuple(name, "padding", padding, dims, 0)
        return Geometry(strides, tuple((a, a) for a in amounts), dilations)
    if padding == "valid":
        return Geometry(strides, ((0, 0),) * dims, dilations)
    if padding != "same":
        raise ValueError(f"{name}: padding must be integers, 'same' or 'valid', got {padding!r}")
    if any(s != 1 for s in strides):
        raise ValueError(f"{name}: padding='same' needs stride 1, got stride {stride!r}")
    return Geometry(strides, same_padding(kernel_size, dilations), dilations)


def check_tensors(name: str, dims: int, x: Tensor, **others: Tensor | None) -> None:
    """Floating tensors of one dtype on one device; x has channels, and mostly a batch, before its pixels."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: x must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: x must have a floating dtype, got {x.dtype}")
    if x.dim() not in (dims + 1, dims + 2):
        sizes = ("L",) if dims == 1 else ("D", "H", "W")[3 - dims :]
        letters = ", ".join(("C", *sizes))
        raise ValueError(f"{name}: x must have shape (N, {letters}) or ({letters}), got {tuple(x.shape)}")
    for argument, tensor in others.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {argument} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name}: {argument} is {tensor.dtype} but x is {x.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: {argument} is on {tensor.device} but x is on {x.device}")


def check_bias(name: str, argument: str, bias: Tensor | None, channels: int) -> None:
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"{name}: {argument} must have shape ({channels},), got {tuple(bias.shape)}")


def check_depthwise(name: str, dims: int, x: Tensor, weight: Tensor, argument: str = "weight") -> None:
    """The weight of a depthwise convolution: (C*M, 1, *kernel)."""
    channels = x.shape[1]
    if weight.dim() != dims + 2 or weight.shape[1] != 1:
        raise ValueError(
            f"{name}: {argument} must have shape (C*M, 1, {', '.join(['k'] * dims)}), got {tuple(weight.shape)}"
        )
    if channels == 0 or weight.shape[0] == 0 or weight.shape[0] % channels:
        raise ValueError(
            f"{name}: {argument} has {weight.shape[0]} filters, which is no multiple of the {channels} channels "
            f"of x (x.shape = {tuple(x.shape)})"
        )
    if 0 in weight.shape:
        raise ValueError(f"{name}: {argument} has an empty filter (shape {tuple(weight.shape)})")


def check_pointwise(name: str, dims: int, channels: int, x: Tensor, weight: Tensor, argument: str = "weight") -> None:
    """The weight of a pointwise convolution: (O, C, 1, 1), one 1 per spatial dimension."""
    if weight.dim() != dims + 2 or any(k != 1 for k in weight.shape[2:]) or weight.shape[0] == 0:
        raise ValueError(
            f"{name}: {argument} must have shape (O, C, {', '.join(['1'] * dims)}), got {tuple(weight.shape)}"
        )
    if weight.shape[1] != channels:
        raise ValueError(
            f"{name}: {argument} has {weight.shape[1]} input channels but receives {channels} "
            f"(x.shape = {tuple(x.shape)})"
        )


def check_residual(name: str, residual: Tensor | None, expected: tuple[int, ...]) -> None:
    if residual is not None and tuple(residual.shape) != expected:
        raise ValueError(f"{name}: residual must have shape {expected}, got {tuple(residual.shape)}")


def check_output(name: str, x: Tensor, kernel_size: Sequence[int], geometry: Geometry) -> tuple[int, ...]:
    """The output size, which must not be empty; the batch may be."""
    sizes = geometry.output_size(x.shape[2:], kernel_size)
    if any(size < 1 for size in sizes) or 0 in x.shape[2:]:
        raise ValueError(
            f"{name}: the filter ({'x'.join(map(str, kernel_size))}, dilation {geometry.dilation}) does not fit into "
            f"the padded image (x.shape = {tuple(x.shape)}, padding = {geometry.padding})"
        )
    return sizes
