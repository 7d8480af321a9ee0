"""In which numbers a network is computed: what may be asked for, and why it is not so on this machine."""

from __future__ import annotations

from collections.abc import Iterable

from sepconv.compile.numbers import BFLOAT16 as NUMBERS_OF_16_BITS
from sepconv.compile.numbers import NumberType
from sepconv.kernels.halide.conv import tiles

FLOAT32, BFLOAT16, INT8 = "float32", "bfloat16", "int8"
PRECISIONS = (FLOAT32, BFLOAT16)


def checked_precision(precision: object, caller: str = "compile") -> str:
    """The precision that is meant; None means float32.

    Raises:
        TypeError: it is no name.
        ValueError: it is none that can be asked for.
    """
    if precision is None:
        return FLOAT32
    if not isinstance(precision, str):
        raise TypeError(f"{caller}: precision must be a name or None, got {type(precision).__name__}")
    if precision == INT8:
        raise ValueError(f"{caller}: int8 is not asked for by precision; give the model that sepconv.quantize returned")
    if precision not in PRECISIONS:
        raise ValueError(f"{caller}: precision must be one of {', '.join(PRECISIONS)} or None, got {precision!r}")
    return precision


def precision_of(numbers: Iterable[NumberType]) -> str:
    """The precision of a network with values of these types: that of the fewest bits."""
    found = set(numbers)
    if any(number.scale is not None for number in found):
        return INT8
    return BFLOAT16 if NUMBERS_OF_16_BITS in found else FLOAT32


def missing(precision: str) -> str:
    """Why this machine does not compute in it, in a sentence; "" if it does."""
    reason = tiles.missing() if precision == BFLOAT16 else ""
    return f"no products of {precision} here: {reason}" if reason else ""
