"""``torch.ops.sepconv.fake_quantize``: numbers on a grid of integers, kept in floating point. It marks quantisation.

What is between such operators may be computed in integers. Gradients go straight through the rounding, and stop where a
number is outside of the range.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sepconv.ops.schema import LIBRARY

LOW, HIGH = 0, 255
"""Of activations."""

MOST = 127
"""Of weights, on both sides of zero."""


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, low: int, high: int) -> Tensor:
    """``(clamp(round(x / scale) + zero_point, low, high) - zero_point) * scale``, ties to the even number.

    The division is a multiplication by the float32 number nearest to ``1 / scale``. NaN stays NaN.

    Args:
        scale: above 0, float32.
        zero_point: int32; the integer that stands for 0.
        axis: -1 where scale and zero point are single numbers, else the dimension of x along which there are as many.

    Shape:
        x: any    scale, zero_point: () or (x.shape[axis],)    ->    like x
    """
    result: Tensor = FAKE_QUANTIZE(x, scale, zero_point, axis, low, high)
    return result


def integers(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """The integers of numbers, in floating point and whatever their size."""
    inverse = along(scale.float().reciprocal(), axis, x.dim())
    return x.float().mul(inverse).round_().add_(along(zero_point, axis, x.dim()))


def along(numbers: Tensor, axis: int, dims: int) -> Tensor:
    """As many dimensions as that, so that they spread over the others."""
    if axis < 0:
        return numbers.reshape(())
    return numbers.reshape([-1 if dim == axis else 1 for dim in range(dims)])


def _run(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, low: int, high: int) -> Tensor:
    zero = along(zero_point, axis, x.dim())
    steps = integers(x, scale, zero_point, axis).clamp_(low, high).sub_(zero)
    return steps.mul_(along(scale.float(), axis, x.dim())).to(x.dtype)


def _fake(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, low: int, high: int) -> Tensor:
    return torch.empty_like(x)


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, zero_point = ctx.saved_tensors
    axis, low, high = ctx.options
    found = integers(x, scale, zero_point, axis)
    return (grad * ((found >= low) & (found <= high)), None, None, None, None, None)


LIBRARY.define(
    "fake_quantize(Tensor x, Tensor scale, Tensor zero_point, int axis, int low, int high) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.impl("fake_quantize", _run, "CompositeExplicitAutograd")
torch.library.register_fake("sepconv::fake_quantize", _fake, lib=LIBRARY)
torch.library.register_autograd("sepconv::fake_quantize", _backward, setup_context=_set_up, lib=LIBRARY)
FAKE_QUANTIZE = torch.ops.sepconv.fake_quantize.default
