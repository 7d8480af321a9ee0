"""Whether arguments fit a kernel: asked once when they are bound.

Halide could ask in every call, but its questions are a good part of the code to compile. Strides are not asked about:
who makes the buffers sees to them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

from sepconv.kernels.buffers import Arguments, Buffer, arguments


class _Argument(ctypes.Structure):
    """``halide_filter_argument_t``."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("kind", ctypes.c_int32),
        ("dimensions", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("defaults", ctypes.c_void_p * 5),
    ]


class _Metadata(ctypes.Structure):
    """``halide_filter_metadata_t``."""

    _fields_ = [
        ("version", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("arguments", ctypes.POINTER(_Argument)),
    ]


_METADATA = ctypes.CFUNCTYPE(ctypes.POINTER(_Metadata))


class Parameter(NamedTuple):
    """What a kernel takes in one place; numbers have no dimensions."""

    name: str
    is_buffer: bool
    dimensions: int
    code: int


def parameters(address: int) -> list[Parameter]:
    """The kernel's parameters, by its function of that address."""
    found = _METADATA(address)().contents
    given = [found.arguments[i] for i in range(found.count)]
    return [Parameter(a.name.decode(), a.kind > 0, a.dimensions, a.code | a.bits << 8) for a in given]


def check(takes: list[Parameter], run: Callable[[int], Any], prepared: Arguments) -> None:
    """
    Raises:
        RuntimeError: there are more or fewer arguments, of another kind, or the kernel would read or write beyond one.
    """
    if len(prepared.given) != len(takes):
        _refuse(f"it takes {len(takes)}, got {len(prepared.given)}")
    for wanted, item in zip(takes, prepared.given, strict=True):
        if isinstance(item, Buffer) != wanted.is_buffer:
            _refuse(f"bad kind of {wanted.name}, got {type(item).__name__}")
        if isinstance(item, Buffer):
            if len(item.shape) != wanted.dimensions:
                _refuse(f"bad dimensions of {wanted.name}: {wanted.dimensions}, got {len(item.shape)}")
            if item.code != wanted.code:
                _refuse(f"bad type of {wanted.name}")
    # Given buffers without memory, a kernel computes nothing and writes into them what it would need.
    asked = [Buffer(a.shape, a.strides, 0, a.code) if isinstance(a, Buffer) else a for a in prepared.given]
    question = arguments(*asked)
    run(question.address)
    for wanted, item in zip(takes, asked, strict=True):
        if isinstance(item, Buffer):
            for d, ((start, extent), has) in enumerate(zip(item.extents(), item.shape[::-1], strict=True)):
                if extent > 0 and (start < 0 or start + extent > has):
                    place = f"{start} to {start + extent} of {has} in dimension {d}"
                    _refuse(f"access out of bounds of {wanted.name}: {place}")


def _refuse(reason: str) -> None:
    raise RuntimeError(f"a kernel refused its arguments: {reason}")
