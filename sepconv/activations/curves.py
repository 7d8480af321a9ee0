"""What activations are made of in Halide, of the module ``halide`` and float32 expressions."""

from __future__ import annotations

from typing import Any

# 2**f for f from -1/2 to 1/2 but for the last, which is 1: the polynomial of least relative error, 9e-8.
_POWERS = (0.00132647145, 0.00967151392, 0.05550733954, 0.24022242427, 0.69314700365)
_LOG2_E = 1.4426950408889634


def limit(hl: Any, x: Any, low: float, high: float) -> Any:
    """clamp, but NaN stays NaN."""
    return hl.select(x < hl.f32(low), hl.f32(low), hl.select(x > hl.f32(high), hl.f32(high), x))


def exp_of_minus(hl: Any, x: Any) -> Any:
    """exp(-x); Halide's exp is wrong for NaN and minus infinity. exp(89) is already infinite in float32.

    NaN is told by its bits: ``hl.is_nan`` and comparisons with itself are simplified away, ``strict_float`` or not.
    """
    number = (hl.reinterpret(hl.UInt(32), x) & hl.u32(0x7FFFFFFF)) <= hl.u32(0x7F800000)
    return hl.select(number, hl.exp(-limit(hl, x, -89.0, 104.0)), x)


def exponential(hl: Any, x: Any) -> Any:
    """exp(x) in Halide, with PyTorch's results for NaN and infinities."""
    return exp_of_minus(hl, -x)


def logistic(hl: Any, x: Any) -> Any:
    """``1 / (1 + exp(-x))`` as ``e / (1 + e)`` with ``e = exp(x)``, to 5e-7 of itself from -12 on; 0 below -88.

    Sums and products alone, which are not strict: two of them are one instruction. A division of whole vectors takes
    as long as a dozen.
    """
    near = hl.strict_float(limit(hl, x, -88.1, 60.0))
    # Rounded from a product of its own: one that is used twice would not be one instruction with the difference.
    power = hl.round(near * hl.f32(1.4427))
    fraction, curve = near * hl.f32(_LOG2_E) - power, hl.f32(_POWERS[0])
    for factor in (*_POWERS[1:], 1.0):
        curve = curve * fraction + hl.f32(factor)
    exp = curve * hl.reinterpret(hl.Float(32), (hl.cast(hl.Int(32), power) + 127) << 23)
    return exp * _inverse(hl, hl.f32(1.0) + exp)


def _inverse(hl: Any, x: Any) -> Any:
    """1 / x for x from 1 to 2**100: within a twentieth from its bits, then Newton's steps of three terms and of two."""
    guess = hl.reinterpret(hl.Float(32), hl.i32(0x7EF311C3) - hl.reinterpret(hl.Int(32), x))
    lack = hl.f32(1.0) - x * guess
    better = guess + guess * (lack + lack * lack)
    return better + better * (hl.f32(1.0) - x * better)
