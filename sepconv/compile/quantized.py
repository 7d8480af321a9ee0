"""What a convolution of whole numbers is given besides images: weights, biases, scales and zero points."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sepconv.compile.groups import Convolution, SeparableGroup
from sepconv.compile.numbers import FLOAT32, NumberType
from sepconv.compile.store import Constant, QuantizedConstant

_MOST = 2**31 - 1


class _Constants(NamedTuple):
    """Of one convolution."""

    weight: Constant
    bias: Constant | None
    scale: Constant
    numbers: Constant


def quantized_constants(
    group: Convolution | SeparableGroup, numbers: Sequence[NumberType]
) -> tuple[Constant | None, ...]:
    """``numbers``: of x, of the residual if there is one, and of the result."""
    x, *residual, y = numbers
    if isinstance(group, Convolution):
        return _constants(group, x, residual, y)
    assert group.between is not None
    first = _constants(group.depthwise, x, (), group.between)
    second = _constants(group.pointwise, group.between, residual, y)
    return tuple(part for pair in zip(first, second, strict=True) for part in pair)


def _constants(conv: Convolution, x: NumberType, residual: Sequence[NumberType], y: NumberType) -> _Constants:
    weight, bias = conv.weight, conv.epilogue.bias
    x = conv.reads or x
    if not isinstance(weight, QuantizedConstant) or x.scale is None:
        raise TypeError(f"no whole numbers in {conv.name}")
    scale = later(("scale", weight.key, x.scale), partial(_scale, weight, x.scale))
    if bias is not None:
        bias = later(("whole bias", bias.key, weight.key, x.scale), partial(_bias, bias, weight, x.scale))
    return _Constants(weight.whole, bias, scale, _numbers(x, residual[0] if residual else FLOAT32, y))


def _scale(weight: QuantizedConstant, x: float) -> Tensor:
    return (weight.scale.tensor.double() * x).float()


def _bias(bias: Constant, weight: QuantizedConstant, x: float) -> Tensor:
    """In steps of the sums."""
    steps = (bias.tensor.double() / (weight.scale.tensor.double() * x)).round()
    return steps.clamp(-_MOST, _MOST).nan_to_num(0.0).to(torch.int32)


def _numbers(x: NumberType, residual: NumberType, y: NumberType) -> Constant:
    """Zero point of x; zero point and scale of the residual; 1 / scale and zero point of y; 1 / scale of x."""
    numbers = (
        float(x.zero_point),
        *((float(residual.zero_point), residual.scale) if residual.scale is not None else (0.0, 0.0)),
        *((y.inverse, float(y.zero_point)) if y.scale is not None else (0.0, 0.0)),
        x.inverse,
    )
    return later(("numbers", numbers), lambda: torch.tensor(numbers, dtype=torch.float32))


def later(key: Hashable, make: Callable[[], Tensor]) -> Constant:
    """A constant that is made when it is packed."""
    return Constant(make(), key, make)
