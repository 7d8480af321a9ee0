"""PyTorch's own kernels behind the signatures of ours: they run everywhere, and where ours do not win.

PyTorch's convolutions pad both ends of a dimension alike, so asymmetric padding is done on the tensor first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sepconv.activations import ACTIVATIONS
from sepconv.kernels.case import Geometry, ResizeDetail, Window
from sepconv.kernels.layout import is_channels_last, new_output

Padding = Sequence[tuple[int, int]]
HAS_BF16 = torch.cpu._is_avx512_bf16_supported()
"""Elsewhere PyTorch multiplies matrices of bfloat16 one number at a time."""
_MANY_CHANNELS, _MANY_PIXELS = 96, 225
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _symmetric(x: Tensor, padding: Padding) -> tuple[Tensor, list[int]]:
    """The tensor and the padding that PyTorch can do itself."""
    if all(low == high for low, high in padding):
        return x, [low for low, _ in padding]
    amounts = [amount for pair in reversed(padding) for amount in pair]
    return F.pad(x, amounts), [0] * len(padding)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    activation: str = "",
    groups: int = 1,
) -> Tensor:
    x, amounts = _symmetric(x, geometry.padding)
    y: Tensor = CONV[len(amounts)](x, weight, bias, geometry.stride, amounts, geometry.dilation, groups)
    return ACTIVATIONS[activation].function(y)


def window(x: Tensor, over: Window, geometry: Geometry, ceil: bool) -> Tensor:
    """The mean or the maximum of every window; with ``ceil`` the last may reach beyond the padding."""
    stride, padding, dilation = geometry
    amounts = [low for low, _ in padding]
    if over.shares:
        rows, columns = over.shares
        return (F.adaptive_avg_pool2d if over.mean else F.adaptive_max_pool2d)(x, (rows, columns))
    if over.mean:
        return F.avg_pool2d(x, over.size, stride, amounts, ceil, over.counts_padding, over.divisor or None)
    return F.max_pool2d(x, over.size, stride, amounts, dilation, ceil)


def shuffle(x: Tensor, other: Tensor | None, parts: int) -> Tensor:
    """The channels of ``x``, or of both images, the first of every part before the second of every part."""
    whole = x if other is None else torch.cat([x, other], 1)
    return whole.unflatten(1, (parts, -1)).transpose(1, 2).flatten(1, 2)


def depthwise_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, activation: str = ""
) -> Tensor:
    return conv(x, weight, bias, geometry, activation, groups=x.shape[1])


def depthwise_symbolic(
    dims: int, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, activation: str
) -> Any:
    """:func:`depthwise_forward` of what only stands for tensors; all else is as PyTorch's functions take it."""
    return ACTIVATIONS[activation].function(CONV[dims](x, weight, bias, stride, padding, dilation, x.shape[-dims - 1]))


def pointwise_symbolic(
    dims: int, x: Any, weight: Any, bias: Any, stride: Any, activation: str, residual: Any = None
) -> Any:
    """:func:`pointwise_forward` of what only stands for tensors."""
    y = CONV[dims](x, weight, bias, stride)
    return ACTIVATIONS[activation].function(y if residual is None else y + residual)


def prepare_grad_input(input_size: Sequence[int], geometry: Geometry) -> Callable[[Tensor, Tensor], Tensor]:
    """The gradient of a depthwise convolution's input, by grad_output and weight; all else is decided here."""
    padding = geometry.padding
    symmetric = all(low == high for low, high in padding)
    size, amounts = list(input_size), [low for low, _ in padding]
    if not symmetric:
        size[2:] = [s + low + high for s, (low, high) in zip(size[2:], padding, strict=True)]
        amounts = [0] * len(padding)
    options = _backward_options(geometry, amounts, size[1], [True, False, False])

    def run(grad_output: Tensor, weight: Tensor) -> Tensor:
        # PyTorch chooses its kernel by the layout of x too, whose values it does not read; nor is the memory touched.
        grad: Tensor = _BACKWARD(grad_output, new_output(grad_output, size[1], size[2:]), weight, *options)[0]
        if not symmetric:
            for d, (low, _) in enumerate(padding):
                grad = grad.narrow(2 + d, low, input_size[2 + d])
        return grad

    return run


def prepare_grad_weight(
    weight_size: Sequence[int], channels: int, geometry: Geometry
) -> Callable[[Tensor, Tensor], Tensor]:
    """The gradient of a depthwise convolution's filters, by grad_output and x; all else is decided here."""
    padding = geometry.padding
    symmetric = all(low == high for low, high in padding)
    amounts = [low if symmetric else 0 for low, _ in padding]
    options = _backward_options(geometry, amounts, channels, [False, True, False])
    size = tuple(weight_size)

    def run(grad_output: Tensor, x: Tensor) -> Tensor:
        padded = x if symmetric else _symmetric(x, padding)[0]
        grad: Tensor = _BACKWARD(grad_output, padded, grad_output.new_empty(size), *options)[1]
        return grad

    return run


def convolution_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Those of x and weight of any convolution, where they are needed."""
    padded, amounts = _symmetric(x, geometry.padding)
    options = _backward_options(geometry, amounts, x.shape[1] // max(1, weight.shape[1]), [*need, False])
    grad_x, grad_weight, _ = _BACKWARD(grad, padded, weight, *options)
    if grad_x is not None and padded is not x:
        for d, (low, _) in enumerate(geometry.padding):
            grad_x = grad_x.narrow(2 + d, low, x.shape[2 + d])
    return grad_x, grad_weight


_BACKWARD = torch.ops.aten.convolution_backward.default


def _backward_options(geometry: Geometry, padding: list[int], groups: int, mask: list[bool]) -> tuple[object, ...]:
    """What follows grad_output, x and weight."""
    return None, list(geometry.stride), padding, list(geometry.dilation), False, [0] * len(padding), groups, mask


def pointwise_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "",
    residual: Tensor | None = None,
    stride: Sequence[int] | int = 1,
) -> Tensor:
    y: Tensor = CONV[x.dim() - 2](x, weight, bias, stride)
    return ACTIVATIONS[activation].function(y if residual is None else y + residual)


def pointwise_bf16(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "",
    residual: Tensor | None = None,
    stride: Sequence[int] | int = 1,
) -> Tensor:
    """:func:`pointwise_forward` of numbers with 16 bits: by a product of matrices where PyTorch's is faster.

    The product of channels_last images wins with many channels, that of contiguous ones with many pixels.
    """
    (outputs, inputs), pixels = weight.shape[:2], x[0, 0].numel() if len(x) else 0
    steps = [stride] if isinstance(stride, int) else stride
    if not (x.is_cpu and x.dtype is torch.bfloat16 and set(steps) == {1} and HAS_BF16):
        return pointwise_forward(x, weight, bias, activation, residual, stride)
    matrix = weight.flatten(1)
    if is_channels_last(x) and min(inputs, outputs) >= _MANY_CHANNELS:
        y = F.linear(x.movedim(1, -1), matrix, bias).movedim(-1, 1)
    elif x.is_contiguous() and pixels >= max(_MANY_PIXELS, outputs):
        # Broadcast weights have a gradient for each image before it is summed: as large as the result if not smaller.
        weights, flat = matrix.expand(len(x), -1, -1), x.flatten(2)
        y = torch.bmm(weights, flat) if bias is None else torch.baddbmm(bias[:, None], weights, flat)
        y = y.unflatten(2, x.shape[2:])
    else:
        return pointwise_forward(x, weight, bias, activation, residual, stride)
    return ACTIVATIONS[activation].function(y if residual is None else y + residual)


def resize(x: Tensor, size: Sequence[int], detail: ResizeDetail) -> Tensor:
    """An image of another size; both it and the scale may be given, which F.interpolate does not allow."""
    operation = _RESIZES[detail.mode]
    options = (detail.align_corners,) if detail.mode in ("bilinear", "bicubic") else ()
    y: Tensor = operation(x, size, *options, *detail.scales)
    return y


_RESIZES = {
    "nearest": torch.ops.aten.upsample_nearest2d.default,
    "nearest-exact": torch.ops.aten._upsample_nearest_exact2d.default,
    "bilinear": torch.ops.aten.upsample_bilinear2d.default,
    "bicubic": torch.ops.aten.upsample_bicubic2d.default,
}
