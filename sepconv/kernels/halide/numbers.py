"""Kinds of numbers in which kernels read and write images; whatever the kind, they compute in float32.

Numbers of 16 and of 8 bits take less of the way to memory and back; at the edge of a kernel a conversion is a few
instructions. A number of 8 bits is a number of steps: it stands for ``(q - zero) * scale``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from sepconv.kernels.halide.jit.buffers import OF_TENSORS
from sepconv.kernels.halide.jit.runtime import hl

DTYPES: dict[str, torch.dtype] = {str(dtype).removeprefix("torch."): dtype for dtype in OF_TENSORS}
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
CODES = {kind: OF_TENSORS[dtype] for kind, dtype in DTYPES.items()}


_WHOLE = 1.5 * 2.0**23
"""Its last bit is 1 and its last eight bits are zeros."""


class Steps(NamedTuple):
    """How numbers of 8 bits count, in Halide's float32: of a tensor that is written ``scale`` is 1 over its scale."""

    scale: Any
    zero: Any


def halide_type(kind: str) -> Any:
    return {"float32": hl.Float(32), "bfloat16": hl.UInt(16), "float16": hl.Float(16), "uint8": hl.UInt(8)}[kind]


def read(kind: str, stored: Any, steps: Steps | None = None) -> Any:
    """The value in float32."""
    if steps is not None:
        return hl.strict_float((hl.cast(hl.Float(32), stored) - steps.zero) * steps.scale)
    if kind != "bfloat16":
        return hl.cast(hl.Float(32), stored)
    return hl.reinterpret(hl.Float(32), hl.cast(hl.UInt(32), stored) << hl.u32(16))


def write(kind: str, value: Any, steps: Steps | None = None) -> Any:
    """What is stored for a value in float32: the nearest number of the kind, of two as near the even one."""
    if steps is not None:
        return _counted(value, steps)
    if kind != "bfloat16":
        return hl.cast(halide_type(kind), value)
    bits = hl.reinterpret(hl.UInt(32), value)
    nearest = (bits + hl.u32(0x7FFF) + ((bits >> hl.u32(16)) & hl.u32(1))) >> hl.u32(16)
    # Rounded up, the last NaN would become 0.
    number = (bits & hl.u32(0x7FFFFFFF)) <= hl.u32(0x7F800000)
    return hl.cast(hl.UInt(16), hl.select(number, nearest, hl.u32(0x7FC0)))


def _counted(value: Any, steps: Steps) -> Any:
    """The nearest of 0 to 255 steps, of two as near the even one; 0 of NaN, for which no comparison holds.

    A sum with ``_WHOLE`` has no bits behind the point: it is rounded, sooner than by the instruction for that.
    """
    count, low, high = value * steps.scale, hl.f32(0.0) - steps.zero, hl.f32(255.0) - steps.zero
    least = hl.select(count > low, count, low)
    bounded = hl.select(least < high, least, high)
    whole = hl.reinterpret(hl.Int(32), hl.strict_float(bounded + hl.f32(_WHOLE)))
    return hl.cast(hl.UInt(8), whole + hl.cast(hl.Int(32), steps.zero))
