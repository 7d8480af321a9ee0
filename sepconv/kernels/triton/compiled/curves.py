"""The activations in Triton, in float32, with PyTorch's results for NaN and infinities."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _limit(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    """Near 0 by a polynomial (Cephes), as the quotient loses its digits there."""
    square = x * x
    term = -5.70498872745e-3
    term = term * square + 2.06390887954e-2
    term = term * square - 5.37397155531e-2
    term = term * square + 1.33314422036e-1
    term = term * square - 3.33332819422e-1
    curve = 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0
    return tl.where((x > -0.625) & (x < 0.625), x + x * square * term, curve)


@triton.jit
def _softplus(x, beta, threshold):
    """``log(1 + e)`` with the digits of a small e, which the sum has lost, brought back."""
    z = x * beta
    e = tl.exp(_limit(z, -104.0, threshold))
    whole = 1.0 + e
    lost = whole - 1.0
    curve = tl.where(lost > 0.0, tl.log(whole) * (e / tl.where(lost > 0.0, lost, 1.0)), e) / beta
    return tl.where(z > threshold, x, curve)


@triton.jit
def _mish(x):
    """With ``e = exp(x)``, ``tanh(log(1 + e))`` is ``e (e + 2) / (e (e + 2) + 2)``, which is 1 from x = 20 on."""
    e = tl.exp(_limit(x, -104.0, 20.0))
    part = e * (e + 2.0)
    return x * (part / (part + 2.0))


@triton.jit
def apply(x, NAME: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    if NAME == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    elif NAME == "relu6":
        x = _limit(x, 0.0, 6.0)
    elif NAME == "silu":
        x = x * _sigmoid(x)
    elif NAME == "hardswish":
        x = x * _limit(x + 3.0, 0.0, 6.0) * (1.0 / 6.0)
    elif NAME == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "sigmoid":
        x = _sigmoid(x)
    elif NAME == "hardsigmoid":
        x = _limit(x + 3.0, 0.0, 6.0) * (1.0 / 6.0)
    elif NAME == "tanh":
        x = _tanh(x)
    elif NAME == "gelu_tanh":
        x = x * _sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    elif NAME == "mish":
        x = _mish(x)
    elif NAME == "leaky_relu":
        x = tl.where(x < 0.0, x * FIRST, x)
    elif NAME == "elu":
        # exp(x) - 1 is tanh(x / 2) * (exp(x) + 1), which keeps its digits near 0.
        x = tl.where(x > 0.0, x, FIRST * _tanh(x * 0.5) * (tl.exp(x) + 1.0))
    elif NAME == "softplus":
        x = _softplus(x, FIRST, SECOND)
    elif NAME == "clamp":
        x = _limit(x, FIRST, SECOND)
    return x
