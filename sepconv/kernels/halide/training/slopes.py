"""Gradients of activations in Halide, for passes that compute them where they read.

A kink's are PyTorch's: nothing comes through at the limits themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, reduce
from operator import and_
from typing import Any

from sepconv.activations import ACTIVATIONS, exponential
from sepconv.kernels.halide.jit.runtime import hl


def missing(activation: str) -> str:
    """Why there is none of it in Halide, in a sentence; the empty string if there is."""
    if ACTIVATIONS[activation].limits is not None or _curve(activation):
        return ""
    return f"the kernel has no derivative of {activation}"


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


def _gelu(grad: Any, x: Any) -> Any:
    """The normal distribution and x times its density; beyond 6 deviations it is 0 or 1, and erf and exp are not."""
    near = hl.select(x < hl.f32(-6.0), hl.f32(-6.0), hl.select(x > hl.f32(6.0), hl.f32(6.0), x))
    share = hl.f32(0.5) * (hl.f32(1.0) + hl.erf(near * hl.f32(0.5**0.5)))
    density = hl.f32((2 * math.pi) ** -0.5) * exponential(hl, hl.f32(-0.5) * near * near)
    return hl.strict_float(grad * (share + near * density))


_CURVES: dict[str, Callable[[Any, Any], Any]] = {
    "silu": _silu,
    "sigmoid": _sigmoid,
    "hardswish": _hardswish,
    "hardsigmoid": _hardsigmoid,
    "tanh": _tanh,
    "gelu": _gelu,
}
