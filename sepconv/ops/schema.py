"""The operators ``torch.ops.sepconv.*``: schema, shape (fake) and kernel of each; derivatives are in ``autograd``.

In a schema ``stride`` and ``dilation`` have one entry per spatial dimension, ``padding`` has two (low, high); nowhere
else is a geometry flat. Shapes are checked before, by the public functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sepconv.kernels import case
from sepconv.kernels.case import Case, Geometry
from sepconv.kernels.layout import new_output
from sepconv.ops.call import compute

LIBRARY = torch.library.Library("sepconv", "DEF")
_GEOMETRY = "SymInt[] stride, SymInt[] padding, SymInt[] dilation"


def flat(geometry: Geometry) -> tuple[tuple[int, ...], list[int], tuple[int, ...]]:
    """Stride, padding and dilation as the operators take them."""
    return geometry.stride, [amount for pair in geometry.padding for amount in pair], geometry.dilation


def geometry_of(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Geometry:
    """The other way round."""
    return Geometry(tuple(stride), tuple(zip(padding[::2], padding[1::2], strict=True)), tuple(dilation))


def describe_separable(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    depthwise_activation: str,
    activation: str,
) -> Case:
    first = case.depthwise(x, depthwise_weight, depthwise_bias, geometry, depthwise_activation)
    return case.separable(first, case.pointwise(first.y, pointwise_weight, pointwise_bias, residual, activation))


def _define(name: str, schema: str, kernel: Callable[..., Tensor], fake: Callable[..., Tensor]) -> Any:
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
    return getattr(torch.ops.sepconv, name).default


def _sizes(x: Tensor, weight: Tensor, *geometry: Sequence[int]) -> Sequence[int]:
    return geometry_of(*geometry).output_size(x.shape[2:], weight.shape[2:])


def _run_depthwise(x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, act: str) -> Tensor:
    return compute(case.depthwise, (x, weight, bias), geometry_of(stride, padding, dilation), act)


def _fake_depthwise(x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, act: str) -> Tensor:
    return new_output(x, weight.shape[0], _sizes(x, weight, stride, padding, dilation))


def _run_grad_input(grad: Tensor, weight: Tensor, size: Sequence[int], *geometry: Any) -> Tensor:
    return compute(case.depthwise_grad_input, (grad, weight), tuple(size), geometry_of(*geometry))


def _fake_grad_input(grad: Tensor, weight: Tensor, size: Sequence[int], *geometry: Any) -> Tensor:
    return new_output(grad, size[1], size[2:])


def _run_grad_weight(grad: Tensor, x: Tensor, size: Sequence[int], *geometry: Any) -> Tensor:
    return compute(case.depthwise_grad_weight, (grad, x), tuple(size), geometry_of(*geometry))


def _fake_grad_weight(grad: Tensor, x: Tensor, size: Sequence[int], *geometry: Any) -> Tensor:
    return x.new_empty(size)


def _run_pointwise(x: Tensor, weight: Tensor, bias: Any, residual: Any, activation: str) -> Tensor:
    return compute(case.pointwise, (x, weight, bias, residual), activation)


def _fake_pointwise(x: Tensor, weight: Tensor, bias: Any, residual: Any, activation: str) -> Tensor:
    return new_output(x, weight.shape[0], x.shape[2:])


def _run_separable(*arguments: Any) -> Tensor:
    tensors, geometry, activations = arguments[:6], arguments[6:9], arguments[9:]
    return compute(describe_separable, tensors, geometry_of(*geometry), *activations)


def _fake_separable(*arguments: Any) -> Tensor:
    x, depthwise_weight, pointwise_weight = arguments[:3]
    return new_output(x, pointwise_weight.shape[0], _sizes(x, depthwise_weight, *arguments[6:9]))


DEPTHWISE = _define(
    "depthwise_conv",
    f"Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}, str activation",
    _run_depthwise,
    _fake_depthwise,
)
GRAD_INPUT = _define(
    "depthwise_conv_grad_input",
    f"Tensor grad_output, Tensor weight, SymInt[] input_size, {_GEOMETRY}",
    _run_grad_input,
    _fake_grad_input,
)
GRAD_WEIGHT = _define(
    "depthwise_conv_grad_weight",
    f"Tensor grad_output, Tensor x, SymInt[] weight_size, {_GEOMETRY}",
    _run_grad_weight,
    _fake_grad_weight,
)
POINTWISE = _define(
    "pointwise_conv",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation",
    _run_pointwise,
    _fake_pointwise,
)
SEPARABLE = _define(
    "separable_conv",
    "Tensor x, Tensor depthwise_weight, Tensor pointwise_weight, Tensor? depthwise_bias, Tensor? pointwise_bias, "
    f"Tensor? residual, {_GEOMETRY}, str depthwise_activation, str activation",
    _run_separable,
    _fake_separable,
)
