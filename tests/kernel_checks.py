"""What the tests of the kernels share: calls, views, poisoned outputs, and double-precision truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sepconv.kernels import case
from sepconv.kernels.case import Case, Geometry
from sepconv.kernels.halide.conv import depthwise, pointwise

MARGIN, POISON = 64, 173


def image(shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers, as a view of the middle channels of a larger image."""
    size = (shape[0], shape[1] + 3, *shape[2:])
    whole = torch.randn(size).to(dtype) if dtype.is_floating_point else torch.randint(0, 256, size, dtype=dtype)
    if channels_last:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        whole = whole.contiguous(memory_format=formats[len(shape)])
    return whole[:, 1 : 1 + shape[1]]


def poisoned(like: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """An output full of NaN inside a larger memory full of NaN, and the check that nothing was written beside it.

    Numbers without NaN are all ``POISON``.
    """
    poison = torch.nan if like.is_floating_point() else POISON
    memory = torch.full((like.numel() + 2 * MARGIN,), poison, dtype=like.dtype)
    out = memory.as_strided(like.shape, like.stride(), MARGIN)

    def check() -> None:
        margins = torch.cat([memory[:MARGIN], memory[-MARGIN:]])
        assert bool((margins.isnan() if like.is_floating_point() else margins == POISON).all())

    return out, check


def stored_as(values: Tensor, dtype: torch.dtype, steps: tuple[float, float]) -> Tensor:
    """What is stored for float32 values, by the definition: each product rounded to float32, as float64 holds it."""
    if dtype is not torch.uint8:
        return values.to(dtype)
    inverse = torch.tensor(1 / torch.tensor(steps[0], dtype=torch.float32).double().item(), dtype=torch.float32)
    counts = (values.double() * inverse.double()).float().double().round() + steps[1]
    return torch.where(counts.isnan(), 0.0, counts.clamp(0, 255)).to(torch.uint8)


def value_of(stored: Tensor, steps: tuple[float, float]) -> Tensor:
    """The float32 value of a stored number, by the definition."""
    if stored.dtype is not torch.uint8:
        return stored.float()
    return ((stored.double() - steps[1]) * torch.tensor(steps[0], dtype=torch.float32).double()).float()


def whole_numbers(shape: tuple[int, ...], most: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers from -most to most, whose sums and products are exact."""
    return torch.randint(-most, most + 1, shape).to(dtype)


def within(whole: Tensor, first: int, channels: int) -> Tensor:
    """Some channels of an image that lies in channels_last."""
    return whole.contiguous(memory_format=torch.channels_last)[:, first : first + channels]


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


def magnitude(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double().abs() for tensor in tensors]


def depthwise_case(which: str, first: Tensor, second: Tensor, *walk: Any, size: Any = None, bias: Any = None) -> Case:
    """``walk``: stride, padding, dilation and in a forward pass the activation; ``size`` of the gradient."""
    geometry, activation = Geometry(*walk[:3]), walk[3:]
    if which == "forward":
        return case.depthwise(first, second, bias, geometry, *activation)
    make = case.depthwise_grad_input if which == "grad_input" else case.depthwise_grad_weight
    return make(first, second, size, geometry)


def depthwise_forward(x: Tensor, weight: Tensor, bias: Tensor | None, *walk: Any) -> Tensor:
    return depthwise.prepare(depthwise_case("forward", x, weight, *walk, bias=bias))(x, weight, bias)


def depthwise_grad_input(grad: Tensor, weight: Tensor, size: Any, *walk: Any) -> Tensor:
    return depthwise.prepare(depthwise_case("grad_input", grad, weight, *walk, size=size))(grad, weight)


def depthwise_grad_weight(grad: Tensor, x: Tensor, size: Any, *walk: Any) -> Tensor:
    return depthwise.prepare(depthwise_case("grad_weight", grad, x, *walk, size=size))(grad, x)


def pointwise_case(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "", residual: Tensor | None = None
) -> Case:
    return case.pointwise(x, weight, bias, residual, activation)


def pointwise_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "", residual: Tensor | None = None
) -> Tensor:
    prepared = pointwise.prepare(pointwise_case(x, weight, bias, activation, residual))
    return prepared(x, weight, bias, residual)


def separable_case(
    x: Tensor, first: tuple[Any, Any, str], second: tuple[Any, Any, str], walk: Any, residual: Tensor | None = None
) -> Case:
    """``first`` and ``second``: weight, bias and activation of the depthwise and of the pointwise convolution."""
    filtered = case.depthwise(x, *first[:2], Geometry(*walk), first[2])
    return case.separable(filtered, case.pointwise(filtered.y, *second[:2], residual, second[2]))
