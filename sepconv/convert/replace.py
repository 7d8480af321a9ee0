"""Putting layers in a normal convolution's place: what every form of them has in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sepconv.layers import (
    PointwiseConv1d,
    PointwiseConv2d,
    PointwiseConv3d,
    SeparableConv1d,
    SeparableConv2d,
    SeparableConv3d,
)

Pointwise = PointwiseConv1d | PointwiseConv2d | PointwiseConv3d
SeparableLayer = SeparableConv1d | SeparableConv2d | SeparableConv3d

_POINTWISE: dict[int, type[Pointwise]] = {1: PointwiseConv1d, 2: PointwiseConv2d, 3: PointwiseConv3d}
_SEPARABLE: dict[int, type[SeparableLayer]] = {1: SeparableConv1d, 2: SeparableConv2d, 3: SeparableConv3d}


def empty_pointwise(conv: _ConvNd, out_channels: int) -> Pointwise:
    """A pointwise layer without bias on the input of ``conv``; its weight is yet to be set."""
    layer = _POINTWISE[len(conv.kernel_size)](
        conv.in_channels, out_channels, bias=False, device=conv.weight.device, dtype=conv.weight.dtype
    )
    return layer.train(conv.training)


def empty_separable(conv: _ConvNd, in_channels: int, depth_multiplier: int, has_bias: bool = False) -> SeparableLayer:
    """A separable layer with the arguments, dtype, device and mode of ``conv``; its weights are yet to be set.

    Args:
        has_bias: it has one even where ``conv`` has none.
    """
    return _SEPARABLE[len(conv.kernel_size)](
        in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        has_bias or conv.bias is not None,
        conv.padding_mode,
        conv.weight.device,
        conv.weight.dtype,
        depth_multiplier=depth_multiplier,
        depthwise_bias=False,
    ).train(conv.training)


def fill(layer: SeparableLayer, filters: Tensor, columns: Tensor, conv: _ConvNd, shift: Tensor | None) -> None:
    """Set the weights of a separable layer in the place of ``conv``; ``shift`` (O,) is added to the bias."""
    bias = columns.new_zeros(len(columns)) if conv.bias is None else conv.bias.detach().double()
    with torch.no_grad():
        layer.depthwise.weight.copy_(filters.reshape(layer.depthwise.weight.shape))
        layer.pointwise.weight.copy_(columns.reshape(layer.pointwise.weight.shape))
        if layer.pointwise.bias is not None:
            layer.pointwise.bias.copy_(bias if shift is None else bias + shift)


def like(conv: _ConvNd, layer: Any) -> nn.Module:
    """The layer in the mode and memory format of ``conv``, trainable where that is."""
    layer.train(conv.training).requires_grad_(conv.weight.requires_grad)
    if conv.weight.is_contiguous(memory_format=torch.channels_last) and not conv.weight.is_contiguous():
        layer.to(memory_format=torch.channels_last)
    done: nn.Module = layer
    return done


def replace(model: nn.Module, names: Sequence[str], new: nn.Module) -> None:
    """Register ``new`` under every name that the old module had."""
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
