"""Gradients of activations in Halide, for passes that compute them where they read.

A kink's are PyTorch's: nothing comes through at the limits themselves.
"""

from __future__ import annotations

import math
from functools import reduce
from operator import and_
from typing import Any

from sepconv.activations import ACTIVATIONS
from sepconv.kernels.halide.jit.runtime import hl


def missing(activation: str) -> str:
    """Why there is none of it in Halide, in a sentence; the empty string if there is."""
    if ACTIVATIONS[activation].limits is not None or activation in _CURVES:
        return ""
    return f"the kernel has no derivative of {activation}"


def backward(activation: str, grad: Any, x: Any) -> Any:
    """``grad`` times the derivative at x, both float32 expressions."""
    limits = ACTIVATIONS[activation].limits
    return _CURVES[activation](grad, x) if limits is None else _between(grad, x, *limits)


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


_CURVES = {"silu": _silu, "sigmoid": _sigmoid, "hardswish": _hardswish}
