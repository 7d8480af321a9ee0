"""Batch norms in evaluation: a factor and a summand for each channel, and a convolution that does the same itself.

Computed in float64 whatever the numbers are: the variance of a dead channel is near eps, and a factor of hundreds
multiplies what float32 has rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scale_and_shift(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """With which the norm is ``x * scale + shift``, per channel.

    Shape:
        all tensors: (C,)    ->    (C,) and (C,), float64
    """
    scale = (variance.double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    shift = -(mean.double() * scale)
    return scale, shift if bias is None else bias.double() + shift


def scale_and_shift_of(norm: Any) -> tuple[Tensor, Tensor]:
    """The same of a batch norm that keeps statistics, without gradients."""
    with torch.no_grad():
        return scale_and_shift(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)


def fold(weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution and then ``scale`` and ``shift``, in float64.

    Shape:
        weight: (O, ...)    bias, scale, shift: (O,)    ->    the weight's and (O,)
    """
    column = scale.view(-1, *[1] * (weight.dim() - 1))
    return weight.double() * column, shift if bias is None else bias.double() * scale + shift
