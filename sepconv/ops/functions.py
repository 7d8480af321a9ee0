"""The public functions: depthwise, pointwise and separable convolution in 1, 2 and 3 dimensions."""

from __future__ import annotations

from torch import Tensor

from sepconv.ops import convolutions
from sepconv.ops.geometry import Padding, Size


def depthwise_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    *,
    activation: str | None = None,
) -> Tensor:
    """Depthwise convolution of a signal; see :func:`depthwise_conv2d`.

    Shape:
        x: (N, C, L)    weight: (C*M, 1, k)    ->    (N, C*M, Lo)
    """
    return convolutions.depthwise_conv(1, x, weight, bias, (stride, padding, dilation), activation)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    *,
    activation: str | None = None,
) -> Tensor:
    """Depthwise convolution: every channel under its own M filters, nothing added across channels.

    Equivalent to ``F.conv2d(x, weight, bias, stride, padding, dilation, groups=C)``, then the activation.

    Args:
        padding: pixels on each side, or "same" (stride 1; an odd amount has its larger half at the end) or "valid".
        activation: None or one of ``sepconv.activations.NAMES`` ("relu", "elu(0.5)"), computed in the same pass.

    Shape:
        x: (N, C, H, W)    weight: (C*M, 1, kH, kW)    bias: (C*M,)    ->    (N, C*M, Ho, Wo)
        Ho = (H + 2*padding - dilation*(kH-1) - 1) // stride + 1; output channel c*M + m depends on input channel c
        alone.

    Raises:
        ValueError, TypeError: a shape, dtype, device or argument does not fit; the message says which.

    Example:
        >>> import torch
        >>> depthwise_conv2d(torch.ones(1, 2, 5, 5), torch.ones(2, 1, 3, 3), padding=1)[0, 0, 0, :3]
        tensor([4., 6., 6.])

    Reference: Sifre 2014; Howard et al. 2017, arXiv:1704.04861.
    """
    return convolutions.depthwise_conv(2, x, weight, bias, (stride, padding, dilation), activation)


def depthwise_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    *,
    activation: str | None = None,
) -> Tensor:
    """Depthwise convolution of a volume; see :func:`depthwise_conv2d`.

    Shape:
        x: (N, C, D, H, W)    weight: (C*M, 1, kD, kH, kW)    ->    (N, C*M, Do, Ho, Wo)
    """
    return convolutions.depthwise_conv(3, x, weight, bias, (stride, padding, dilation), activation)


def pointwise_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Pointwise convolution of a signal; see :func:`pointwise_conv2d`.

    Shape:
        x: (N, C, L)    weight: (O, C, 1)    ->    (N, O, Lo)
    """
    return convolutions.pointwise_conv(1, x, weight, bias, stride, activation, residual)


def pointwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Pointwise (1x1) convolution: the same linear layer on the channel vector of every pixel.

    Equivalent to ``activation(F.conv2d(x, weight, bias, stride) + residual)``.

    Args:
        activation: None or one of ``sepconv.activations.NAMES`` ("relu", "elu(0.5)"), computed in the same pass.
        residual: a tensor of the output's shape, added before the activation.

    Shape:
        x: (N, C, H, W)    weight: (O, C, 1, 1)    bias: (O,)    ->    (N, O, Ho, Wo),  Ho = (H - 1) // stride + 1

    Raises:
        ValueError, TypeError: a shape, dtype, device or argument does not fit; the message says which.

    Example:
        >>> import torch
        >>> pointwise_conv2d(torch.ones(1, 3, 2, 2), torch.ones(1, 3, 1, 1)).flatten()
        tensor([3., 3., 3., 3.])
    """
    return convolutions.pointwise_conv(2, x, weight, bias, stride, activation, residual)


def pointwise_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Pointwise convolution of a volume; see :func:`pointwise_conv2d`.

    Shape:
        x: (N, C, D, H, W)    weight: (O, C, 1, 1, 1)    ->    (N, O, Do, Ho, Wo)
    """
    return convolutions.pointwise_conv(3, x, weight, bias, stride, activation, residual)


def separable_conv1d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    *,
    depthwise_activation: str | None = None,
    activation: str | None = None,
) -> Tensor:
    """Depthwise separable convolution of a signal; see :func:`separable_conv2d`.

    Shape:
        x: (N, C, L)    weights: (C*M, 1, k) and (O, C*M, 1)    ->    (N, O, Lo)
    """
    weights, biases = (depthwise_weight, pointwise_weight), (depthwise_bias, pointwise_bias)
    given = (stride, padding, dilation)
    return convolutions.separable_conv(1, x, weights, biases, given, depthwise_activation, activation)


def separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    *,
    depthwise_activation: str | None = None,
    activation: str | None = None,
) -> Tensor:
    """Depthwise separable convolution: a depthwise convolution, then a pointwise one.

    Equivalent to ``F.conv2d(F.conv2d(x, depthwise_weight, groups=C), pointwise_weight)`` with a bias and an
    activation after each. In training the result in the middle is computed again in the backward pass instead of kept.

    Shape:
        x: (N, C, H, W)    depthwise_weight: (C*M, 1, kH, kW)    pointwise_weight: (O, C*M, 1, 1)    ->    (N, O, Ho,
        Wo)

    Cost: C*M*kH*kW*Ho*Wo + C*M*O*Ho*Wo multiply-adds an image, M*(1/O + 1/(kH*kW)) of the normal convolution.

    Raises:
        ValueError, TypeError: a shape, dtype, device or argument does not fit; the message says which.

    Example:
        >>> import torch
        >>> x, depthwise, pointwise = torch.ones(1, 2, 4, 4), torch.ones(2, 1, 3, 3), torch.ones(5, 2, 1, 1)
        >>> separable_conv2d(x, depthwise, pointwise).shape
        torch.Size([1, 5, 2, 2])

    Reference: Sifre 2014; Howard et al. 2017, arXiv:1704.04861.
    """
    weights, biases = (depthwise_weight, pointwise_weight), (depthwise_bias, pointwise_bias)
    given = (stride, padding, dilation)
    return convolutions.separable_conv(2, x, weights, biases, given, depthwise_activation, activation)


def separable_conv3d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    *,
    depthwise_activation: str | None = None,
    activation: str | None = None,
) -> Tensor:
    """Depthwise separable convolution of a volume; see :func:`separable_conv2d`.

    Shape:
        x: (N, C, D, H, W)    weights: (C*M, 1, kD, kH, kW) and (O, C*M, 1, 1, 1)    ->    (N, O, Do, Ho, Wo)
    """
    weights, biases = (depthwise_weight, pointwise_weight), (depthwise_bias, pointwise_bias)
    given = (stride, padding, dilation)
    return convolutions.separable_conv(3, x, weights, biases, given, depthwise_activation, activation)
