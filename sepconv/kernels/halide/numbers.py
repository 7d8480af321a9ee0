"""Kinds of numbers in which kernels read and write images; whatever the kind, they compute in float32.

Numbers of 16 bits take half the way to memory and back; at the edge of a kernel a conversion is an instruction or two.
"""

from __future__ import annotations

from typing import Any

import torch

from sepconv.kernels.halide.jit.buffers import BITS8, BITS16, FLOAT16, FLOAT32
from sepconv.kernels.halide.jit.runtime import hl

CODES = {"float32": FLOAT32, "bfloat16": BITS16, "float16": FLOAT16, "uint8": BITS8}
"""Kind -> how a buffer of such numbers is called. Halide would round a NaN of bfloat16, so that we use the bits."""
DTYPES: dict[str, torch.dtype] = {kind: getattr(torch, kind) for kind in CODES}
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}


def halide_type(kind: str) -> Any:
    return {"float32": hl.Float(32), "bfloat16": hl.UInt(16), "float16": hl.Float(16), "uint8": hl.UInt(8)}[kind]


def read(kind: str, stored: Any) -> Any:
    """The value in float32."""
    if kind != "bfloat16":
        return hl.cast(hl.Float(32), stored)
    return hl.reinterpret(hl.Float(32), hl.cast(hl.UInt(32), stored) << hl.u32(16))


def write(kind: str, value: Any) -> Any:
    """What is stored for a value in float32: the nearest number of the kind, of two as near the even one."""
    if kind != "bfloat16":
        return hl.cast(halide_type(kind), value)
    bits = hl.reinterpret(hl.UInt(32), value)
    nearest = (bits + hl.u32(0x7FFF) + ((bits >> hl.u32(16)) & hl.u32(1))) >> hl.u32(16)
    # Rounded up, the last NaN would become 0.
    number = (bits & hl.u32(0x7FFFFFFF)) <= hl.u32(0x7F800000)
    return hl.cast(hl.UInt(16), hl.select(number, nearest, hl.u32(0x7FC0)))
