"""A group as kernels know it: a case, and the constants that are packed for it. Weights need not be made for a case."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sepconv.compile.axes import Gathered, MatrixProduct, Reduced, Softmaxed
from sepconv.compile.groups import (
    ComputedGroup,
    Convolution,
    Elementwise,
    GroupNormed,
    Pool,
    Resize,
    RowNorm,
    SeparableGroup,
    Shuffle,
    WindowPool,
    rounds_inside,
)
from sepconv.compile.numbers import NumberType
from sepconv.compile.quantized import later, quantized_constants
from sepconv.compile.store import Constant, QuantizedConstant
from sepconv.kernels import axes, case
from sepconv.kernels.case import Case, Outline


class WeightNumbers(NamedTuple):
    """In which numbers a kernel takes weights and biases."""

    weight: torch.dtype
    bias: torch.dtype


_PLAIN, _WHOLE = WeightNumbers(torch.float32, torch.float32), WeightNumbers(torch.int8, torch.int32)
# By the numbers of the image: what kernels may want, tried in this order.
_WANTED = {
    torch.uint8: (_WHOLE,),
    torch.bfloat16: (
        WeightNumbers(torch.bfloat16, torch.float32),
        _PLAIN,
        WeightNumbers(torch.bfloat16, torch.bfloat16),
    ),
}


def is_quantized(group: Convolution | SeparableGroup) -> bool:
    """Whether its weights are whole numbers, and the model rounds what lies between two convolutions."""
    if isinstance(group, SeparableGroup):
        return is_quantized(group.depthwise) and is_quantized(group.pointwise) and group.between is not None
    return isinstance(group.weight, QuantizedConstant)


def cases_of(group: ComputedGroup, read: Sequence[Outline], out: Outline) -> list[Case]:
    """A group on such tensors, with its weights in each kind of numbers that a kernel may take them in."""
    if not isinstance(group, (Convolution, SeparableGroup)):
        return [_without_weights(group, read, out).into(out)]
    wanted = _WANTED.get(torch.uint8 if rounds_inside(group) else read[0].dtype, (_PLAIN,))
    if _WHOLE in wanted and not is_quantized(group):
        return []
    return [_with_weights(group, read, numbers).into(out) for numbers in wanted]


def _with_weights(group: Convolution | SeparableGroup, read: Sequence[Outline], numbers: WeightNumbers) -> Case:
    x, residual = read[0], read[1] if len(read) > 1 else None
    if isinstance(group, SeparableGroup):
        first = _with_weights(group.depthwise, [x], numbers)
        return case.separable(first, _with_weights(group.pointwise, [first.y, *read[1:]], numbers))
    end = group.epilogue
    weight = Outline.contiguous_of(group.weight.shape, numbers.weight)
    bias = None if end.bias is None else Outline.contiguous_of(end.bias.shape, numbers.bias)
    if group.kind == "depthwise":
        return case.depthwise(x, weight, bias, group.geometry, end.activation)
    if group.kind in ("normal", "grouped"):
        return case.normal(x, weight, bias, residual, group.geometry, end.activation)
    return case.pointwise(x, weight, bias, residual, end.activation)


def _without_weights(group: ComputedGroup, read: Sequence[Outline], out: Outline) -> Case:
    x, other = read[0], read[1] if len(read) > 1 else None
    if isinstance(group, Elementwise):
        return case.elementwise(read, out, group.expression)
    if isinstance(group, GroupNormed):
        return case.group_norm(x, out, group.detail)
    if isinstance(group, Resize):
        return case.resize(x, out, group.detail)
    if isinstance(group, RowNorm):
        return case.row_norm(x, out, *group.detail)
    if isinstance(group, WindowPool):
        return case.window(x, out, group.geometry, group.window)
    if isinstance(group, Shuffle):
        return case.shuffle(x, other, out, group.parts)
    if isinstance(group, Reduced):
        return axes.reduce(x, out, group.detail)
    if isinstance(group, Softmaxed):
        return axes.softmax(x, out, group.kind)
    if isinstance(group, Gathered):
        return axes.gather(x, out, group.detail)
    if isinstance(group, MatrixProduct):
        return axes.product(x, read[1], out)
    if isinstance(group, Pool):
        return case.pool(x, Outline.contiguous_of(x.shape[:2], x.dtype), group.what)
    raise TypeError(f"{group} is no group without weights")


def constants_of(group: ComputedGroup, known: Case, numbers: Sequence[NumberType]) -> tuple[Constant | None, ...]:
    """What is packed for a case, in the order in which its kernel takes it; ``numbers``: of what is read, then of the
    result."""
    if isinstance(group, (Convolution, SeparableGroup)) and known.quantized:
        return quantized_constants(group, numbers)
    if isinstance(group, SeparableGroup):
        assert known.then is not None
        first, second = _stored(group.depthwise, known), _stored(group.pointwise, known.then)
        return first[0], second[0], first[1], second[1]
    if isinstance(group, Convolution):
        return _stored(group, known)
    if all(number.storage is not torch.uint8 for number in numbers):
        return group.constants
    return (*group.constants, _table(numbers))


def _stored(conv: Convolution, known: Case) -> tuple[Constant | None, Constant | None]:
    """Weight and bias in the numbers of the case."""
    bias = None if known.bias is None else known.bias.dtype
    return _cast(conv.weight, known.weight.dtype), _cast(conv.epilogue.bias, bias)


def _cast(constant: Constant | None, dtype: torch.dtype | None) -> Constant | None:
    if constant is None or dtype is None or constant.number.storage is dtype:
        return constant
    return later(("as", str(dtype), constant.key), partial(_as, constant, dtype))


def _as(constant: Constant, dtype: torch.dtype) -> Tensor:
    return constant.tensor.to(dtype)


def _table(numbers: Sequence[NumberType]) -> Constant:
    """Scale and zero point of every tensor, one row each."""
    rows = tuple((number.scale or 1.0, float(number.zero_point)) for number in numbers)
    return later(("numbers", rows), lambda: torch.tensor(rows, dtype=torch.float32))
