"""Kinds of numbers in which kernels read and write images; whatever the kind, they compute in float32.

Numbers of 16 bits take half the way to memory and back; at the edge of a kernel a conversion is an instruction or two.
Pairs of bfloat16 in words of 32 bits cost half of that again: no number has to move to another lane.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from sepconv.kernels.case import Case
from sepconv.kernels.halide.jit.buffers import BITS16, FLOAT16, FLOAT32, UINT8, UINT32
from sepconv.kernels.halide.jit.runtime import hl

CODES = {"float32": FLOAT32, "bfloat16": BITS16, "float16": FLOAT16, "uint8": UINT8}
"""Kind -> how a buffer of such numbers is called. Halide would round a NaN of bfloat16, so that we use the bits."""
DTYPES: dict[str, torch.dtype] = {kind: getattr(torch, kind) for kind in CODES}
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
PAIRS = "bfloat16 pairs"
"""Two neighbouring numbers of bfloat16 as one: the first in the low half."""
_HIGH = 0xFFFF0000


class ConvNumbers(NamedTuple):
    """Kinds of what a convolution reads and writes; ``residual`` counts only where there is one."""

    x: str = "float32"
    residual: str = "float32"
    y: str = "float32"


def edges(case: Case) -> ConvNumbers:
    residual = "float32" if case.residual is None else KINDS[case.residual.dtype]
    return ConvNumbers(KINDS[case.x.dtype], residual, KINDS[case.result.dtype])


def halide_type(kind: str) -> Any:
    known = {"float32": hl.Float(32), "bfloat16": hl.UInt(16), "float16": hl.Float(16), "uint8": hl.UInt(8)}
    return hl.UInt(32) if kind == PAIRS else known[kind]


def codes(kind: str) -> int:
    """How a buffer of what is stored is called."""
    return UINT32 if kind == PAIRS else CODES[kind]


def parts(kind: str) -> int:
    """Numbers in one that is stored."""
    return 2 if kind == PAIRS else 1


def zero(kind: str) -> Any:
    """A stored 0."""
    return hl.cast(halide_type(kind), 0)


def read(kind: str, stored: Any, part: Any = None) -> Any:
    """The value in float32; of a pair that of one ``part``."""
    if kind == PAIRS:
        word = hl.select(part == 0, stored << hl.u32(16), stored & hl.u32(_HIGH))
        return hl.reinterpret(hl.Float(32), word)
    if kind != "bfloat16":
        return hl.cast(hl.Float(32), stored)
    return hl.reinterpret(hl.Float(32), hl.cast(hl.UInt(32), stored) << hl.u32(16))


def write(kind: str, *values: Any, quiet: bool = False) -> Any:
    """What is stored for a value in float32, or for the two of a pair: the nearest number of the kind, of two as near
    the even one.

    ``quiet``: no NaN comes that has bits in the lower half; none does from bfloat16 and from arithmetic.
    """
    if kind == PAIRS:
        low, high = (_rounded(value, quiet) for value in values)
        return (low >> hl.u32(16)) | (high & hl.u32(_HIGH))
    if kind != "bfloat16":
        return hl.cast(halide_type(kind), values[0])
    return hl.cast(hl.UInt(16), _rounded(values[0], quiet) >> hl.u32(16))


def _rounded(value: Any, quiet: bool) -> Any:
    """A number of bfloat16 in the upper half, anything in the lower."""
    bits = hl.reinterpret(hl.UInt(32), value)
    nearest = bits + hl.u32(0x7FFF) + ((bits >> hl.u32(16)) & hl.u32(1))
    if quiet:
        return nearest
    # Rounded up, the last NaN would become 0.
    number = (bits & hl.u32(0x7FFFFFFF)) <= hl.u32(0x7F800000)
    return hl.select(number, nearest, hl.u32(0x7FC00000))
