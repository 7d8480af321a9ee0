"""Putting a separable layer in a normal convolution's place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sepconv.convert.bottleneck import Factors
from sepconv.convert.factor import balance
from sepconv.layers import (
    PointwiseConv1d,
    PointwiseConv2d,
    PointwiseConv3d,
    SeparableConv1d,
    SeparableConv2d,
    SeparableConv3d,
)

_POINTWISE: dict[int, Any] = {1: PointwiseConv1d, 2: PointwiseConv2d, 3: PointwiseConv3d}
_SEPARABLE: dict[int, Any] = {1: SeparableConv1d, 2: SeparableConv2d, 3: SeparableConv3d}


def empty_separable(conv: _ConvNd, in_channels: int, depth_multiplier: int, bias: bool) -> nn.Module:
    """A separable layer with the arguments, dtype, device and mode of ``conv``; its weights are yet to be set."""
    layer: nn.Module = _SEPARABLE[len(conv.kernel_size)](
        in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        bias,
        conv.padding_mode,
        conv.weight.device,
        conv.weight.dtype,
        depth_multiplier=depth_multiplier,
        depthwise_bias=False,
    )
    return layer.train(conv.training)


def empty_bottleneck(conv: _ConvNd, channels: int, bias: bool) -> nn.Module:
    """A pointwise layer to ``channels``, then a separable one; the weights are yet to be set.

    The first has no bias, so that a padding of zeros stays one.
    """
    factory = {"device": conv.weight.device, "dtype": conv.weight.dtype}
    reduce = _POINTWISE[len(conv.kernel_size)](conv.in_channels, channels, bias=False, **factory)
    return nn.Sequential(reduce, empty_separable(conv, channels, 1, bias)).train(conv.training)


def separable(conv: _ConvNd, filters: Tensor, columns: Tensor, shift: Tensor | None = None) -> nn.Module:
    """The separable layer of given factors; ``shift`` is added to the bias.

    Shape:
        filters: (C, M, k), columns: (O, C, M), shift: (O,)
    """
    filters, columns = balance(filters, columns)
    layer = empty_separable(conv, conv.in_channels, filters.shape[1], conv.bias is not None or shift is not None)
    _set(layer, filters, columns, conv, shift)
    return _as(conv, layer)


def bottleneck(conv: _ConvNd, factors: Factors, shift: Tensor | None = None) -> nn.Module:
    """The bottleneck of given factors; ``shift`` (O,) is added to the bias."""
    expand, reduce, filters = factors
    layer: Any = empty_bottleneck(conv, len(filters), conv.bias is not None or shift is not None)
    with torch.no_grad():
        layer[0].weight.copy_(reduce.T.reshape(layer[0].weight.shape))
    _set(layer[1], filters, expand, conv, shift)
    return _as(conv, layer)


def _set(layer: Any, filters: Tensor, columns: Tensor, conv: _ConvNd, shift: Tensor | None) -> None:
    """Fill in the weights of a separable layer in the place of ``conv``."""
    bias = columns.new_zeros(len(columns)) if conv.bias is None else conv.bias.detach().double()
    with torch.no_grad():
        layer.depthwise.weight.copy_(filters.reshape(layer.depthwise.weight.shape))
        layer.pointwise.weight.copy_(columns.reshape(layer.pointwise.weight.shape))
        if layer.pointwise.bias is not None:
            layer.pointwise.bias.copy_(bias if shift is None else bias + shift)


def _as(conv: _ConvNd, layer: Any) -> nn.Module:
    """The layer in the memory format of ``conv``, trainable where that is."""
    layer.requires_grad_(conv.weight.requires_grad)
    if conv.weight.is_contiguous(memory_format=torch.channels_last) and not conv.weight.is_contiguous():
        layer.to(memory_format=torch.channels_last)
    done: nn.Module = layer
    return done


def replace(model: nn.Module, names: Sequence[str], new: nn.Module) -> None:
    """Register ``new`` under every name that the old module had."""
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
