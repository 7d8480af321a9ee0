"""Gradients of activations in Halide, for passes that compute them where they read.

A kink's are PyTorch's: nothing comes through at the limits themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, reduce
from operator import and_
from typing import Any

from sepconv.activations import ACTIVATIONS, half_and_odd
from sepconv.kernels.halide.jit.runtime import hl


def missing(activation: str) -> str:
    """Why there is none of it in Halide, in a sentence; the empty string if there is."""
    if ACTIVATIONS[activation].limits is not None or _curve(activation):
        return ""
    return f"the kernel has no derivative of {activation}"


def told_by_result(activation: str) -> bool:
    """Whether :func:`backward` may be given the activation's result instead of x."""
    return ACTIVATIONS[activation].limits is not None


def backward(activation: str, grad: Any, x: Any) -> Any:
    """``grad`` times the derivative at x, both float32 expressions."""
    limits = ACTIVATIONS[activation].limits
    if limits is not None:
        return _between(grad, x, *limits)
    curve = _curve(activation)
    assert curve is not None
    return curve(grad, x)


def _curve(activation: str) -> Callable[[Any, Any], Any] | None:
    family, _, parameters = activation.partition("(")
    if family == "leaky_relu":
        return partial(_leaky_relu, float(parameters.rstrip(")") or 0.01))
    return _CURVES.get(activation)


def _between(grad: Any, x: Any, low: float, high: float) -> Any:
    """Not a product: infinity times 0 would be NaN."""
    inside = [x > hl.f32(low)] if low > -math.inf else []
    inside += [x < hl.f32(high)] if high < math.inf else []
    return hl.select(reduce(and_, inside), grad, hl.f32(0.0)) if inside else grad


def _hardswish(grad: Any, x: Any) -> Any:
    curve = grad * (hl.f32(1.0 / 3.0) * x + hl.f32(0.5))
    return hl.strict_float(hl.select(x <= hl.f32(-3.0), hl.f32(0.0), hl.select(x < hl.f32(3.0), curve, grad)))


def _sigmoid(grad: Any, x: Any) -> Any:
    s = ACTIVATIONS["sigmoid"].expression(hl, x)
    return grad * (s * (hl.f32(1.0) - s))


def _silu(grad: Any, x: Any) -> Any:
    s = ACTIVATIONS["sigmoid"].expression(hl, x)
    return grad * (s * (hl.f32(1.0) + x * (hl.f32(1.0) - s)))


def _leaky_relu(below: float, grad: Any, x: Any) -> Any:
    return hl.strict_float(hl.select(x > hl.f32(0.0), grad, grad * hl.f32(below)))


def _hardsigmoid(grad: Any, x: Any) -> Any:
    return _between(grad * hl.f32(1.0 / 6.0), x, -3.0, 3.0)


def _tanh(grad: Any, x: Any) -> Any:
    t = ACTIVATIONS["tanh"].expression(hl, x)
    return grad * (hl.f32(1.0) - t * t)


# See ``half_and_odd``: exact to 2e-8, in float32 to 4e-7; beyond the limits the slope is 0 or 1 within 4e-8.
_GELU_LIMIT = 6.0
_GELU = (
    *(0.117897762, -0.0593428004, 0.046057626, -0.0423660252, 0.0445582295, -0.0509287551, 0.058663735),
    *(-0.0643632671, 0.0670375177, -0.0655670745, 0.0539107428, -0.0367183554, 0.0323721496, -0.0325284467),
    *(0.0150121396, 0.00136276884, 0.00246295493, -0.00682359691, 0.00263603665),
)


def _gelu(grad: Any, x: Any) -> Any:
    """The normal distribution and x times its density: 1/2 and an odd function, which costs a quarter of both."""
    return grad * half_and_odd(hl, _GELU_LIMIT, _GELU, x)


def _gelu_tanh(grad: Any, x: Any) -> Any:
    """Of ``x * s(u)`` with the sigmoid s and ``u = 2 sqrt(2 / pi) (x + 0.044715 x**3)``; beyond 12 it is 0 or 1."""
    near = hl.strict_float(hl.select(x < hl.f32(-12.0), hl.f32(-12.0), hl.select(x > hl.f32(12.0), hl.f32(12.0), x)))
    factor, square = 2.0 * math.sqrt(2.0 / math.pi), near * near
    u = near * (hl.f32(factor) + hl.f32(0.044715 * factor) * square)
    s, rest = (ACTIVATIONS["sigmoid"].expression(hl, value) for value in (u, -u))
    inner = near * (hl.f32(factor) + hl.f32(3.0 * 0.044715 * factor) * square)
    return grad * (s * (hl.f32(1.0) + inner * rest))


_CURVES: dict[str, Callable[[Any, Any], Any]] = {
    "silu": _silu,
    "sigmoid": _sigmoid,
    "hardswish": _hardswish,
    "hardsigmoid": _hardsigmoid,
    "tanh": _tanh,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}
