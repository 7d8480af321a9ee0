"""From an operator's arguments to the kernel that computes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sepconv.kernels import case
from sepconv.kernels.backends import Choice, choose
from sepconv.kernels.case import Geometry
from sepconv.kernels.layout import memory_format
from sepconv.ops.explain import note_choice


def as_output(y: Tensor, x: Tensor) -> Tensor:
    """Give PyTorch's result the layout that ``layout.new_output`` promises; no copy where it has it already."""
    return y.contiguous(memory_format=memory_format(x))


def _geometry(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Geometry:
    return Geometry(tuple(stride), tuple(zip(padding[::2], padding[1::2], strict=True)), tuple(dilation))


def _run(choice: Choice, *tensors: Tensor | None) -> Tensor:
    y = choice(*tensors)
    note_choice(choice)
    return y


def depthwise_choice(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Choice:
    """``options`` here and below: what follows the tensors in the operator's schema (see ``operators``)."""
    *walk, activation = options
    return choose(case.depthwise(x, weight, bias, _geometry(*walk), activation))


def depthwise_forward(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    return _run(depthwise_choice(x, weight, bias, *options), x, weight, bias)


def depthwise_grad_input(grad_output: Tensor, weight: Tensor, size: Sequence[int], *walk: Any) -> Tensor:
    return _run(choose(case.depthwise_grad_input(grad_output, weight, size, _geometry(*walk))), grad_output, weight)


def depthwise_grad_weight(grad_output: Tensor, x: Tensor, size: Sequence[int], *walk: Any) -> Tensor:
    return _run(choose(case.depthwise_grad_weight(grad_output, x, size, _geometry(*walk))), grad_output, x)


def pointwise_choice(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Choice:
    return choose(case.pointwise(x, weight, bias, residual, activation))


def pointwise_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    return _run(pointwise_choice(x, weight, bias, residual, activation), x, weight, bias, residual)


def separable_choice(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    residual: Tensor | None,
    *options: Any,
) -> Choice:
    *walk, between, activation = options
    first = case.depthwise(x, depthwise_weight, depthwise_bias, _geometry(*walk), between)
    second = case.pointwise(first.y, pointwise_weight, pointwise_bias, residual, activation)
    return choose(case.separable(first, second))


def separable_forward(x: Tensor, *weights_and_options: Any) -> Tensor:
    return _run(separable_choice(x, *weights_and_options), x, *weights_and_options[:5])
