"""Putting a separable layer in a normal convolution's place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sepconv.convert.factor import balance
from sepconv.convert.graph import Site
from sepconv.convert.passes import Hooks
from sepconv.layers import SeparableConv1d, SeparableConv2d, SeparableConv3d

_SEPARABLE: dict[int, Any] = {1: SeparableConv1d, 2: SeparableConv2d, 3: SeparableConv3d}


def empty_separable(conv: _ConvNd, depth_multiplier: int, bias: bool) -> nn.Module:
    """A separable layer with the arguments, dtype, device and mode of ``conv``; its weights are yet to be set."""
    layer: nn.Module = _SEPARABLE[len(conv.kernel_size)](
        conv.in_channels,
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


def separable(conv: _ConvNd, filters: Tensor, columns: Tensor, shift: Tensor | None = None) -> nn.Module:
    """The separable layer of given factors; ``shift`` is added to the bias.

    Shape:
        filters: (C, M, k), columns: (O, C, M), shift: (O,)
    """
    filters, columns = balance(filters, columns)
    layer: Any = empty_separable(conv, filters.shape[1], conv.bias is not None or shift is not None)
    bias = torch.zeros_like(columns[:, 0, 0]) if conv.bias is None else conv.bias.detach().double()
    with torch.no_grad():
        layer.depthwise.weight.copy_(filters.reshape(layer.depthwise.weight.shape))
        layer.pointwise.weight.copy_(columns.reshape(layer.pointwise.weight.shape))
        if layer.pointwise.bias is not None:
            layer.pointwise.bias.copy_(bias if shift is None else bias + shift)
    for ours in layer.parameters():
        ours.requires_grad_(conv.weight.requires_grad)
    if any(p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in [conv.weight]):
        layer.to(memory_format=torch.channels_last)
    return layer


def replace(model: nn.Module, names: Sequence[str], new: nn.Module) -> None:
    """Register ``new`` under every name that the old module had."""
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)


def check_runs(model: nn.Module, sites: Sequence[Site], example: Any) -> None:
    """Make sure that the model calls every new layer, and asks it for nothing that only a normal convolution has.

    Raises:
        ValueError: it does not; the message names the layer to skip.
    """
    called: set[nn.Module] = set()
    with Hooks() as hooks, torch.no_grad():
        for site in sites:
            hooks.after(model.get_submodule(site.name), lambda module, *_: called.add(module))
        try:
            model(example)
        except AttributeError as error:
            raise ValueError(
                f"convert: the model reads what only a normal convolution has ({error}); name that convolution in skip"
            ) from error
    for site in sites:
        if model.get_submodule(site.name) not in called:
            raise ValueError(f"convert: the model calls {site.name} by another way than its name; name it in skip")
