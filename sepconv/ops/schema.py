"""The operators ``torch.ops.sepconv.*``: schema, shape (fake) and kernel of each; derivatives are in ``gradients``.

``stride`` and ``dilation`` have one entry per spatial dimension, ``padding`` has two (low, high). Shapes are checked
before, by the public functions in ``ops``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sepconv.kernels.case import Geometry
from sepconv.kernels.layout import new_output
from sepconv.ops import dispatch

LIBRARY = torch.library.Library("sepconv", "DEF")
_GEOMETRY = "SymInt[] stride, SymInt[] padding, SymInt[] dilation"


Flat = tuple[tuple[int, ...], list[int], tuple[int, ...]]


def flat(geometry: Geometry) -> Flat:
    """Stride, padding and dilation as the operators take them."""
    return geometry.stride, [amount for pair in geometry.padding for amount in pair], geometry.dilation


def geometry_of(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Geometry:
    """The other way round."""
    return Geometry(tuple(stride), tuple(zip(padding[::2], padding[1::2], strict=True)), tuple(dilation))


def _define(name: str, schema: str, kernel: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    def run(*arguments: Any) -> Tensor:
        if forward_ad._current_level >= 0:  # its result would have no tangent
            raise RuntimeError(
                f"torch.ops.sepconv.{name} has no forward-mode derivative: call the functions of sepconv, which then "
                "go through PyTorch's operators, and transform before torch.compile instead of after"
            )
        return kernel(*arguments)

    LIBRARY.define(f"{name}({schema}) -> Tensor")
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sepconv::{name}", fake, lib=LIBRARY)


def _sizes(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> list[int]:
    return list(geometry_of(stride, padding, dilation).output_size(x.shape[2:], weight.shape[2:]))


def _fake_depthwise(
    x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, activation: str
) -> Tensor:
    return new_output(x, weight.shape[0], _sizes(x, weight, stride, padding, dilation))


def _fake_grad_input(grad_output: Tensor, weight: Tensor, input_size: Sequence[int], *geometry: Any) -> Tensor:
    return new_output(grad_output, input_size[1], input_size[2:])


def _fake_grad_weight(grad_output: Tensor, x: Tensor, weight_size: Sequence[int], *geometry: Any) -> Tensor:
    return x.new_empty(weight_size)


def _fake_pointwise(x: Tensor, weight: Tensor, bias: Any, residual: Any, activation: str) -> Tensor:
    return new_output(x, weight.shape[0], x.shape[2:])


def _fake_separable(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Any,
    pointwise_bias: Any,
    residual: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    depthwise_activation: str,
    activation: str,
) -> Tensor:
    return new_output(x, pointwise_weight.shape[0], _sizes(x, depthwise_weight, stride, padding, dilation))


_define(
    "depthwise_conv",
    f"Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}, str activation",
    dispatch.depthwise_forward,
    _fake_depthwise,
)
_define(
    "depthwise_conv_grad_input",
    f"Tensor grad_output, Tensor weight, SymInt[] input_size, {_GEOMETRY}",
    dispatch.depthwise_grad_input,
    _fake_grad_input,
)
_define(
    "depthwise_conv_grad_weight",
    f"Tensor grad_output, Tensor x, SymInt[] weight_size, {_GEOMETRY}",
    dispatch.depthwise_grad_weight,
    _fake_grad_weight,
)
_define(
    "pointwise_conv",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation",
    dispatch.pointwise_forward,
    _fake_pointwise,
)
_define(
    "separable_conv",
    "Tensor x, Tensor depthwise_weight, Tensor pointwise_weight, Tensor? depthwise_bias, Tensor? pointwise_bias, "
    f"Tensor? residual, {_GEOMETRY}, str depthwise_activation, str activation",
    dispatch.separable_forward,
    _fake_separable,
)
DEPTHWISE = torch.ops.sepconv.depthwise_conv.default
POINTWISE = torch.ops.sepconv.pointwise_conv.default
SEPARABLE = torch.ops.sepconv.separable_conv.default
GRAD_INPUT = torch.ops.sepconv.depthwise_conv_grad_input.default
GRAD_WEIGHT = torch.ops.sepconv.depthwise_conv_grad_weight.default
