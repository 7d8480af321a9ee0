"""The mathematics of the library, written as it is defined, in plain PyTorch.

Every other file is tested against this one, in float64. It is slow on purpose: one loop for each word of the
definition, and no call to PyTorch's own convolutions; the curved activations are their formulas. The names and
letters are those of the README: N batch, C input channels, O output channels, M depth multiplier, k filter size, one
size per spatial dimension.

References: Sifre 2014 (PhD thesis, separable convolution); Howard et al. 2017, arXiv:1704.04861 (MobileNet).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "hardswish": lambda x: x * F.relu6(x + 3) / 6,
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "hardsigmoid": lambda x: F.relu6(x + 3) / 6,
    "tanh": torch.tanh,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "mish": lambda x: x * torch.tanh(torch.logaddexp(x, torch.zeros_like(x))),
    "leaky_relu": lambda x: torch.where(x < 0, 0.01 * x, x),
    "elu": lambda x: torch.where(x > 0, x, torch.expm1(x)),
    "softplus": lambda x: torch.where(x > 20, x, torch.log1p(torch.exp(x))),
    "clamp": lambda x: torch.clamp(x, -1, 1),
}


def filter_image(
    image: Tensor,
    kernel: Tensor,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> Tensor:
    """One image channel under one filter: the cross-correlation that deep learning calls convolution.

    Shape:
        image: (N, H, W)    kernel: (kH, kW)    ->    (N, Ho, Wo)
        Ho = (H + low + high - dilation*(kH-1) - 1) // stride + 1; likewise for 1 and 3 spatial dimensions.
    """
    amounts = [amount for pair in reversed(padding) for amount in pair]
    padded = F.pad(image, amounts)
    sizes = [
        (padded.shape[1 + d] - dilation[d] * (kernel.shape[d] - 1) - 1) // stride[d] + 1 for d in range(kernel.dim())
    ]
    result = image.new_zeros((image.shape[0], *sizes))
    for tap in itertools.product(*(range(k) for k in kernel.shape)):
        window = padded
        for d, position in enumerate(tap):
            start = position * dilation[d]
            window = window.narrow(1 + d, start, stride[d] * (sizes[d] - 1) + 1)
            window = window[(slice(None),) * (1 + d) + (slice(None, None, stride[d]),)]
        result = result + kernel[tap] * window
    return result


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> Tensor:
    """Normal convolution: one filter per input channel, the results added, once per output channel.

    Shape:
        x: (N, C, H, W)    weight: (O, C, kH, kW)    ->    (N, O, Ho, Wo)
    """
    maps = []
    for o in range(weight.shape[0]):
        filtered = [filter_image(x[:, c], weight[o, c], stride, padding, dilation) for c in range(weight.shape[1])]
        total = torch.stack(filtered).sum(0)
        maps.append(total if bias is None else total + bias[o])
    return torch.stack(maps, dim=1)


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> Tensor:
    """Depthwise convolution: every channel under its own M filters, nothing added across channels.

    Output channel c*M + m depends on input channel c alone.

    Shape:
        x: (N, C, H, W)    weight: (C*M, 1, kH, kW)    ->    (N, C*M, Ho, Wo)
    """
    multiplier = weight.shape[0] // x.shape[1]
    maps = []
    for o in range(weight.shape[0]):
        filtered = filter_image(x[:, o // multiplier], weight[o, 0], stride, padding, dilation)
        maps.append(filtered if bias is None else filtered + bias[o])
    return torch.stack(maps, dim=1)


def pointwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Pointwise convolution: the same linear layer applied to the channel vector of every pixel.

    Shape:
        x: (N, C, *)    weight: (O, C) or (O, C, 1, 1)    ->    (N, O, *)
    """
    pixels = x.movedim(1, -1)
    mixed = pixels @ weight.flatten(1).T
    return (mixed if bias is None else mixed + bias).movedim(-1, 1)


def separable_conv(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    depthwise_activation: str = "",
    activation: str = "",
) -> Tensor:
    """Depthwise separable convolution: a depthwise convolution, then a pointwise one.

    Shape:
        x: (N, C, H, W)    weights: (C*M, 1, kH, kW) and (O, C*M, 1, 1)    ->    (N, O, Ho, Wo)
    """
    hidden = depthwise_conv(x, depthwise_weight, depthwise_bias, stride, padding, dilation)
    hidden = ACTIVATIONS[depthwise_activation](hidden)
    return ACTIVATIONS[activation](pointwise_conv(hidden, pointwise_weight, pointwise_bias))


class Quantized(NamedTuple):
    """The constants of a quantised convolution.

    Attributes:
        weight: int8, from -127 to 127; its zero point is 0.
        bias: int32, in units of the scale; or None.
        scale: of the sums, float32, one per output channel: x's scale times that of the channel's weights.
        numbers: float32: zero point of x, zero point and scale of the residual, 1 / scale and zero point of y; behind
            them 1 / scale of x where x is float32. Those that are not needed are 0.
    """

    weight: Tensor
    bias: Tensor | None
    scale: Tensor
    numbers: Tensor


def quantize(x: Tensor, inverse: Tensor, zero: Tensor) -> Tensor:
    """The uint8 number that stands for each float32 one: the nearest, of two as near the even one before the zero point
    is added; 0 for NaN."""
    return (torch.round(x * inverse) + zero).clamp(0, 255).nan_to_num(0).to(torch.uint8)


def quantized_conv(
    x: Tensor,
    given: Quantized,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    activation: str = "",
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.uint8,
) -> Tensor:
    """Quantised convolution of any number of groups: exact sums of whole numbers, then float32, rounded at each step.

    Padding counts as x's zero point, which is 0 in the sum. Sums beyond 32 bits wrap around. A float32 x is quantised
    first. ``dtype`` is that of y: uint8, or float32, which is not quantised.

    Shape:
        x: (N, C, H, W)    weight: (O, C / groups, kH, kW)    residual: like y    ->    (N, O, Ho, Wo)
    """
    zero, depth = given.numbers[0], given.weight.shape[1]
    whole = quantize(x, given.numbers[5], zero) if x.dtype is torch.float32 else x
    centred, weight, outputs = whole.long() - zero.long(), given.weight.long(), len(given.weight)
    sums = []
    for o in range(outputs):
        first = o // (outputs * depth // x.shape[1]) * depth
        filtered = [filter_image(centred[:, first + c], weight[o, c], stride, padding, dilation) for c in range(depth)]
        sums.append(torch.stack(filtered).sum(0))
    return after_sums(torch.stack(sums, dim=1), given, activation, residual, dtype)


def after_sums(
    sums: Tensor,
    given: Quantized,
    activation: str = "",
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.uint8,
) -> Tensor:
    """What a quantised convolution makes of its sums, whole numbers (N, O, Ho, Wo), before their bias."""
    _, residual_zero, residual_scale, inverse, y_zero = given.numbers[:5]
    each = (-1, *[1] * (sums.dim() - 2))
    total = sums if given.bias is None else sums + given.bias.long().view(each)
    value = total.int().float() * given.scale.view(each)
    if residual is not None:
        added = residual if residual.dtype is torch.float32 else (residual.float() - residual_zero) * residual_scale
        value = value + added
    value = ACTIVATIONS[activation](value)
    return value if dtype is torch.float32 else quantize(value, inverse, y_zero)


def max_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    size: Sequence[int],
) -> Tensor:
    """The maximum of the pixels of the image that each window looks at; ``size`` is that of the result.

    Shape:
        x: (N, C, H, W)    ->    (N, C, *size)
    """
    y = x.new_full((*x.shape[:2], *size), -math.inf)
    for at in itertools.product(*map(range, size)):
        rows, columns = (_under(kernel[d], stride[d], padding[d], dilation[d], at[d], x.shape[2 + d]) for d in (0, 1))
        pixels = [x[:, :, i, j] for i in rows for j in columns if i in range(x.shape[2]) and j in range(x.shape[3])]
        if pixels:
            y[:, :, at[0], at[1]] = torch.stack(pixels).amax(0)
    return y


def avg_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    size: Sequence[int],
    count_include_pad: bool = True,
    divisor: int = 0,
) -> Tensor:
    """The sum of the pixels of the image under each window, divided by ``divisor`` or, where that is 0, by the number
    of pixels, those of the padding included or not.

    Shape:
        x: (N, C, H, W)    ->    (N, C, *size)
    """
    y = x.new_zeros((*x.shape[:2], *size))
    for at in itertools.product(*map(range, size)):
        rows, columns = (_under(kernel[d], stride[d], padding[d], 1, at[d], x.shape[2 + d]) for d in (0, 1))
        pixels = [x[:, :, i, j] for i in rows for j in columns if i in range(x.shape[2]) and j in range(x.shape[3])]
        count = len(rows) * len(columns) if count_include_pad else len(pixels)
        y[:, :, at[0], at[1]] = torch.stack(pixels).sum(0) / (divisor or count)
    return y


def _under(kernel: int, stride: int, padding: tuple[int, int], dilation: int, at: int, size: int) -> list[int]:
    """The places along one dimension that a window looks at, those beyond the padding left out."""
    places = [at * stride - padding[0] + tap * dilation for tap in range(kernel)]
    return [place for place in places if place < size + padding[1]]
