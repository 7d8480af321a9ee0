"""Which input position each filter tap reads, along one dimension.

A convolution and its input gradient are the same sum; they differ in the positions only:

    forward       out[x] = sum_k w[k] * in[x*stride + k*dilation - low]
    grad_input    in[x]  = sum_k w[k] * out[(x + low - k*dilation) / stride]     where that is a whole number

In the second, which taps count depends on x modulo the stride alone, so positions are sorted into ``stride`` phases,
and within one phase both sums have the form

    result[q*phases + phase] = sum_j w[first + j*skip] * source[q*step + base + offset + j*advance]
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """The taps that positions ``q*phases + phase`` read; ``count`` may be 0."""

    first: int
    skip: int
    count: int
    offset: int
    advance: int


def forward_taps(size: int, dilation: int) -> tuple[Phase, ...]:
    """A single phase; ``step`` is the stride and ``base`` is minus the low padding."""
    return (Phase(0, 1, size, 0, dilation),)


def transposed_taps(size: int, stride: int, dilation: int, low: int) -> tuple[Phase, ...]:
    """One phase per remainder; ``step`` is 1 and ``base`` is ``low // stride``. Only ``low % stride`` matters here."""
    return tuple(_transposed_phase(size, stride, dilation, low % stride + phase) for phase in range(stride))


def _transposed_phase(size: int, stride: int, dilation: int, shifted: int) -> Phase:
    common = math.gcd(dilation, stride)
    taps = [k for k in range(size) if (shifted - k * dilation) % stride == 0]
    first = taps[0] if taps else 0
    return Phase(first, stride // common, len(taps), (shifted - first * dilation) // stride, -dilation // common)
