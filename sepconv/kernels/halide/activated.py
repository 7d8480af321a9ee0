"""The activation that ends a kernel, in the fewest instructions of the machine that it is made for."""

from __future__ import annotations

import math
from typing import Any

from sepconv.activations import ACTIVATIONS
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.schedule import machine


def activated(name: str, value: Any) -> Any:
    """The activation of that name of a float32 expression.

    Where the maximum of a number and NaN is NaN, two instructions clamp; elsewhere comparisons have to keep it.
    """
    record = ACTIVATIONS[name]
    if record.limits is None or not machine.host().extremes_keep_nan:
        return record.expression(hl, value)
    low, high = record.limits
    if low > -math.inf:
        value = hl.max(value, hl.f32(low))
    if high < math.inf:
        value = hl.min(value, hl.f32(high))
    return hl.strict_float(value) if name else value
