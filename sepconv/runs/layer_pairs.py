"""Which layers of a normal network and of its separable form belong together, and why the page cannot follow others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from sepconv.activations import name_of

REDUCE_VALUES = 200_000
"""Weights that the first convolution of a bottleneck may have: the page needs all of them for any of its outputs."""


def convolutions(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every two-dimensional convolution once, by its first name."""
    seen = set()
    for name, conv in model.named_modules(remove_duplicate=False):
        if isinstance(conv, nn.Conv2d) and conv not in seen:
            seen.add(conv)
            yield name, conv


def pairs_of(
    normal_model: nn.Module, separable_model: nn.Module
) -> tuple[dict[str, tuple[nn.Conv2d, Any]], dict[str, str]]:
    """Convolutions of the normal network with their separable layers, and why others are none the page can follow."""
    converted = dict(separable_model.named_modules(remove_duplicate=False))
    pairs, left_out = {}, {}
    for name, conv in convolutions(normal_model):
        if reason := _cannot_be_followed(conv, converted.get(name)):
            left_out[name] = reason
        else:
            pairs[name] = (conv, converted[name])
    return pairs, left_out


def _cannot_be_followed(conv: nn.Conv2d, layer: Any) -> str:
    """Why the page cannot show this pair; "" if it can."""
    reduce, layer = split(layer)
    depthwise, pointwise = getattr(layer, "depthwise", None), getattr(layer, "pointwise", None)
    if conv.groups != 1:
        return f"it has {conv.groups} groups"
    if isinstance(layer, nn.Sequential):
        return f"it became {len(layer)} modules in a row that the page does not know"
    if not (isinstance(depthwise, nn.Conv2d) and isinstance(pointwise, nn.Conv2d)):
        return "it is pointwise already" if set(conv.kernel_size) == {1} else "it stayed a normal convolution"
    if any(getattr(conv, name) != getattr(depthwise, name) for name in ("kernel_size", "stride", "dilation")):
        return "its separable form has another geometry"
    if conv.in_channels != (depthwise if reduce is None else reduce).in_channels:
        return "its separable form has another geometry"
    if reduce is not None and reduce.weight.numel() > REDUCE_VALUES:
        return f"the first convolution of its bottleneck has {reduce.weight.numel():,} weights, too many for a page"
    if (count := getattr(layer, "pointwise_layers", 1)) > 1:
        return f"it has {count} pointwise convolutions in a row; the page follows one"
    if activation_between(layer) is None:
        return f"the page cannot compute the {type(layer.activation).__name__} inside it"
    return ""


def split(layer: Any) -> tuple[Any, Any]:
    """The pointwise convolution that makes a bottleneck of the separable layer behind it, or None; and that layer."""
    if isinstance(layer, nn.Sequential) and len(layer) == 2 and _is_plain_pointwise(layer[0]):
        return layer[0], layer[1]
    return None, layer


def _is_plain_pointwise(conv: nn.Module) -> bool:
    """Whether padding before it and behind it is the same."""
    if not isinstance(conv, nn.Conv2d) or conv.bias is not None:
        return False
    return {conv.groups, *conv.kernel_size, *conv.stride} == {1} and set(conv.padding) == {0}


_DRAWN = ("", "relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh", "sigmoid")


def activation_between(layer: Any) -> str | None:
    """The name of what stands between depthwise and pointwise; None if it is not one of those the page knows."""
    name = name_of(getattr(layer, "activation", None))
    return name if name in _DRAWN else None
