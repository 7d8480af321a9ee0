"""What the operations of a captured network do to integers: PyTorch's names, by what becomes of the numbers."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

LAYERS = frozenset({"conv1d", "conv2d", "conv3d", "linear"})
"""Sums of products with weights: what is computed in integers."""

ACTIVATIONS = frozenset({
    "relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "silu", "gelu", "sigmoid", "tanh", "leaky_relu", "elu",
    "mish", "clamp", "clamp_min", "clamp_max", "softplus", "celu", "selu", "log_sigmoid", "hardshrink", "softshrink",
})  # fmt: skip
"""One number from one number: computed with the layer or the sum in front of them."""

MOVES = frozenset({
    "view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "slice", "select", "contiguous",
    "clone", "dropout", "feature_dropout", "alias", "detach", "expand", "split", "split_with_sizes", "chunk", "unbind",
    "channel_shuffle", "native_channel_shuffle", "pixel_shuffle", "pixel_unshuffle", "roll", "flip", "unflatten",
    "movedim", "swapaxes", "lift_fresh_copy", "view_as", "reshape_as", "expand_as", "numpy_T", "t",
})  # fmt: skip
"""The same numbers in other places."""

PADS = frozenset({"pad", "constant_pad_nd"})

CHOICES = frozenset({
    "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "upsample_nearest1d",
    "upsample_nearest2d", "upsample_nearest3d", "amax",
})  # fmt: skip
"""Some of the numbers: the range and the steps stay what they are."""

COMPUTED = frozenset({
    "add", "sub", "mul", "cat", "concat", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "mean", "upsample_bilinear2d", "upsample_bicubic2d", "minimum",
    "maximum", "batch_norm",
})  # fmt: skip
"""New numbers from numbers of a grid."""


def name_of(node: fx.Node) -> str:
    """Of the operation, as PyTorch calls it; empty for what is none."""
    if node.op != "call_function":
        return ""
    if node.target is operator.getitem:
        return "getitem"
    return node.target.overloadpacket.__name__ if isinstance(node.target, OpOverload) else ""


def argument(node: fx.Node, name: str) -> Any:
    """An argument of an operation by its name, with its default."""
    assert isinstance(node.target, OpOverload)
    for place, known in enumerate(node.target._schema.arguments):
        if known.name == name:
            given = node.args[place] if place < len(node.args) else known.default_value
            return node.kwargs.get(name, given)
    raise KeyError(f"{node.target} has no argument {name}")


def is_layer(node: fx.Node) -> bool:
    return name_of(node) in LAYERS


def is_activation(node: fx.Node) -> bool:
    return name_of(node) in ACTIVATIONS


def moves(node: fx.Node) -> bool:
    """Whether the result holds the numbers of the first argument, and maybe zeros."""
    name = name_of(node)
    if name in PADS:
        value = argument(node, "value")
        return (value is None or value == 0) and (name != "pad" or argument(node, "mode") == "constant")
    return name in MOVES or name == "getitem"


def computes(node: fx.Node) -> bool:
    """Whether our kernels know the operation, so that it may read and write integers."""
    return name_of(node) in COMPUTED | CHOICES | ACTIVATIONS


def keeps_steps(node: fx.Node) -> bool:
    return name_of(node) in CHOICES


def is_fraction(node: fx.Node) -> bool:
    """Whether the value is a tensor of floating point numbers."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def is_sum(node: fx.Node) -> bool:
    """Whether two tensors of the same shape are added."""
    if node.target is not torch.ops.aten.add.Tensor or argument(node, "alpha") != 1:
        return False
    both = node.args[:2]
    shapes = [one.meta["val"].shape for one in both if isinstance(one, fx.Node) and is_fraction(one)]
    return len(shapes) == 2 and list(map(str, shapes[0])) == list(map(str, shapes[1]))


def module_of(node: fx.Node) -> str:
    """The path of the module whose code called the operation."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return paths[-1] if paths else ""
