"""Activations as Halide expressions, with PyTorch's results for NaN and infinities.

Halide may compile ``max(x, 0)`` to 0 for NaN. Comparisons under ``strict_float`` keep NaN; only the activation is
strict, so the sums before it still compile to fused multiply-adds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sepconv.kernels.halide.jit.runtime import hl


def _limit(x: Any, low: float, high: float) -> Any:
    """clamp, but NaN stays NaN."""
    return hl.select(x < hl.f32(low), hl.f32(low), hl.select(x > hl.f32(high), hl.f32(high), x))


def _exp_of_minus(x: Any) -> Any:
    """exp(-x); Halide's exp is wrong for NaN and minus infinity. exp(89) is already infinite in float32.

    NaN is told by its bits: ``hl.is_nan`` and comparisons with itself are simplified away, ``strict_float`` or not.
    """
    number = (hl.reinterpret(hl.UInt(32), x) & hl.u32(0x7FFFFFFF)) <= hl.u32(0x7F800000)
    return hl.select(number, hl.exp(-_limit(x, -89.0, 104.0)), x)


def _gelu(x: Any) -> Any:
    """Halide's erf is NaN for infinities; erf(4) rounds to 1 in float32."""
    return hl.f32(0.5) * x * (hl.f32(1.0) + hl.erf(_limit(x * hl.f32(0.5**0.5), -6.0, 6.0)))


_EXPRESSIONS: dict[str, Callable[[Any], Any]] = {
    "relu": lambda x: hl.select(x < hl.f32(0.0), hl.f32(0.0), x),
    "relu6": lambda x: _limit(x, 0.0, 6.0),
    "silu": lambda x: x / (hl.f32(1.0) + _exp_of_minus(x)),
    "hardswish": lambda x: x * _limit(x + hl.f32(3.0), 0.0, 6.0) * hl.f32(1.0 / 6.0),
    "gelu": _gelu,
    "sigmoid": lambda x: hl.f32(1.0) / (hl.f32(1.0) + _exp_of_minus(x)),
}


def activate(x: Any, name: str) -> Any:
    """The expression of the named activation (the keys of ``reference.ACTIVATIONS``) applied to ``x``."""
    return x if name == "" else hl.strict_float(_EXPRESSIONS[name](x))
