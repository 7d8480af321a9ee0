"""What the tests of the kernels share: calls, views, poisoned outputs, and double-precision truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sepconv.kernels.halide.conv import depthwise, pointwise, separable

MARGIN = 64


def image(shape: tuple[int, ...], channels_last: bool) -> Tensor:
    """Random numbers, as a view of the middle channels of a larger image."""
    whole = torch.randn(shape[0], shape[1] + 3, *shape[2:])
    if channels_last:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        whole = whole.contiguous(memory_format=formats[len(shape)])
    return whole[:, 1 : 1 + shape[1]]


def poisoned(like: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """An output full of NaN inside a larger memory full of NaN, and the check that nothing was written beside it."""
    memory = torch.full((like.numel() + 2 * MARGIN,), torch.nan)
    out = memory.as_strided(like.shape, like.stride(), MARGIN)

    def check() -> None:
        margins = torch.cat([memory[:MARGIN], memory[-MARGIN:]])
        assert bool(margins.isnan().all())

    return out, check


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


def magnitude(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double().abs() for tensor in tensors]


def depthwise_forward(x: Tensor, weight: Tensor, bias: Tensor | None, *walk: Any) -> Tensor:
    return depthwise.prepare_forward(x, weight, bias, *walk)(x, weight, bias)


def depthwise_grad_input(grad: Tensor, weight: Tensor, *size_and_walk: Any) -> Tensor:
    return depthwise.prepare_grad_input(grad, weight, *size_and_walk)(grad, weight)


def depthwise_grad_weight(grad: Tensor, x: Tensor, *size_and_walk: Any) -> Tensor:
    return depthwise.prepare_grad_weight(grad, x, *size_and_walk)(grad, x)


def pointwise_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "", residual: Tensor | None = None
) -> Tensor:
    return pointwise.Prepared(x, weight, activation, residual is not None)(x, weight, bias, residual)


def separable_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    between: str,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    activation: str,
    *walk: Any,
    residual: Tensor | None = None,
) -> Tensor:
    found = separable.plan_for(x, weight, between, pointwise_weight, activation, *walk, residual is not None)
    ready = separable.Prepared(found, x, weight, pointwise_weight)
    return ready(x, weight, pointwise_weight, bias, pointwise_bias, residual)
