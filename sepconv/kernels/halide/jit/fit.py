"""Whether arguments fit a kernel: asked once when they are bound.

Halide could ask in every call, but its questions are a good part of the code to compile. What it took for granted is
written down beside the code instead: sizes and strides that the pipeline fixed.
"""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sepconv.kernels.halide.jit.buffers import FLOAT32, Arguments, Buffer, arguments

_LARGEST = 2**31 - 1


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


Limits = list[list[list[int | None]]]
"""For each buffer and each of its dimensions, the first of Halide's first: extent and stride, where they are fixed."""


def limits(pipeline: Any, inputs: Sequence[Any]) -> Limits:
    """What the code of a pipeline takes for granted of its buffers, the results last.

    Raises:
        RuntimeError: it is something that could not be checked.
    """
    results = [buffer for func in pipeline.outputs() for buffer in func.output_buffers()]
    buffers = [item.parameter() for item in [*inputs, *results]]
    return [_limits(parameter) for parameter in buffers if parameter.is_buffer()]


def _limits(parameter: Any) -> list[list[int | None]]:
    dims = range(parameter.dimensions())
    starts = [_number(parameter.min_constraint(d)) for d in dims]
    if any(starts) or parameter.host_alignment() > parameter.type().bytes():
        raise RuntimeError(f"{parameter.name()} must start at 0 and may lie anywhere in memory")
    return [[_number(parameter.extent_constraint(d)), _number(parameter.stride_constraint(d))] for d in dims]


def _number(expression: Any) -> int | None:
    if not expression.defined():
        return None
    written = re.fullmatch(r"<.*: (-?\d+)>", str(expression))
    if written is None:
        raise RuntimeError(f"only numbers can be taken for granted, not {expression}")
    return int(written[1])


def written(found: Limits) -> bytes:
    return json.dumps(found).encode()


def read(line: bytes) -> Limits:
    """What :func:`written` wrote."""
    found: Limits = json.loads(line)
    return found


class Parameter(NamedTuple):
    """What a kernel takes in one place; numbers have no dimensions."""

    name: str
    is_buffer: bool
    dimensions: int
    code: int
    fixed: list[list[int | None]]


def parameters(address: int, fixed: Limits) -> list[Parameter]:
    """The kernel's parameters after the context, by its function of that address."""
    found, limits = _METADATA(address)().contents, iter(fixed)
    given = [found.arguments[i] for i in range(1, found.count)]
    return [
        Parameter(a.name.decode(), a.kind > 0, a.dimensions, a.code | a.bits << 8, next(limits) if a.kind else [])
        for a in given
    ]


def check(takes: list[Parameter], kernel: int, enter: Callable[[int], int], prepared: Arguments) -> None:
    """
    Raises:
        RuntimeError: there are more or fewer arguments, of another kind or with other strides than the kernel's, or it
            would read or write beyond one.
    """
    if len(prepared.given) != len(takes):
        _refuse(f"it takes {len(takes)}, got {len(prepared.given)}")
    for wanted, item in zip(takes, prepared.given, strict=True):
        _check_kind(wanted, item)
        if isinstance(item, Buffer):
            _check_limits(wanted, item)
    # Given buffers without memory, a kernel computes nothing and writes into them what it would need.
    asked = [Buffer(a.shape, a.strides, 0, a.code) if isinstance(a, Buffer) else a for a in prepared.given]
    question = arguments(kernel, *asked)
    if enter(question.address):
        _refuse("it does not say what it would need")
    for wanted, item in zip(takes, asked, strict=True):
        if isinstance(item, Buffer):
            _check_extents(wanted, item)


def _check_kind(wanted: Parameter, item: Any) -> None:
    if isinstance(item, Buffer) != wanted.is_buffer:
        _refuse(f"bad kind of {wanted.name}, got {type(item).__name__}")
    if isinstance(item, Buffer):
        if len(item.shape) != wanted.dimensions:
            _refuse(f"bad dimensions of {wanted.name}: {wanted.dimensions}, got {len(item.shape)}")
        if item.code != wanted.code:
            _refuse(f"bad type of {wanted.name}")
    elif isinstance(item, int) == (wanted.code == FLOAT32) or (isinstance(item, int) and abs(item) > _LARGEST):
        _refuse(f"bad number for {wanted.name}, got {item!r}")


def _check_limits(wanted: Parameter, item: Buffer) -> None:
    for d, (extent, stride) in enumerate(wanted.fixed):
        has, step = item.shape[-1 - d], item.strides[-1 - d]
        if extent is not None and has != extent:
            _refuse(f"bad extent of {wanted.name}: {extent}, got {has} in dimension {d}")
        # The step to the next of one element says nothing.
        if stride is not None and step != stride and has > 1:
            _refuse(f"bad stride of {wanted.name}: {stride}, got {step} in dimension {d}")


def _check_extents(wanted: Parameter, item: Buffer) -> None:
    for d, ((start, extent), has) in enumerate(zip(item.extents(), item.shape[::-1], strict=True)):
        if extent > 0 and (start < 0 or start + extent > has):
            place = f"{start} to {start + extent} of {has} in dimension {d}"
            _refuse(f"access out of bounds of {wanted.name}: {place}")


def _refuse(reason: str) -> None:
    raise RuntimeError(f"a kernel refused its arguments: {reason}")
