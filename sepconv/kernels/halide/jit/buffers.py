"""Memory as Halide's kernels take it: the C structure ``halide_buffer_t`` over a tensor or an array. No copies.

Small layers run for some microseconds, and a call needs half a dozen of these: they are packed in one go.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sepconv.kernels.layout import array, pixel_step

_WHOLE, _NATURAL, _FLOATING = 0, 1, 2  # halide_type_code_t
FLOAT32, FLOAT16 = _FLOATING | 32 << 8, _FLOATING | 16 << 8
UINT32, BITS16, UINT8 = _NATURAL | 32 << 8, _NATURAL | 16 << 8, _NATURAL | 8 << 8
"""Halide's codes for kinds of numbers, with their bits."""
_CODES = {np.dtype(name): _WHOLE | bits << 8 for name, bits in (("int8", 8), ("int16", 16), ("int32", 32))}
_CODES |= {np.dtype("float32"): FLOAT32, np.dtype("uint32"): UINT32, np.dtype("uint8"): UINT8}
CODES = {torch.float32: FLOAT32, torch.bfloat16: BITS16, torch.float16: FLOAT16, torch.uint8: UINT8}
"""How a buffer of a tensor's numbers is called. Halide would round a NaN of bfloat16, so that we use the bits."""
# Eight bytes each: device, its interface, host, flags, type and dimensions, place of the dims, padding.
_HEAD, HOST_AT, _HOST = 56, 16, struct.Struct("16xQ")
_DIMENSION, _RANGE = 16, struct.Struct("ii")


@lru_cache(maxsize=16)
def _form(dims: int) -> tuple[Any, Any]:
    """Memory for a buffer, and how it is filled: the head, then from, extent, stride and flags of each dimension."""
    form = struct.Struct(f"QQQQQQQ{4 * dims}i")
    return ctypes.c_char * form.size, form.pack_into


class Buffer:
    """Sizes and steps of an array, the last dimension first, and the address where it lies at the moment."""

    __slots__ = ("_holds", "_memory", "address", "code", "shape", "strides")

    def __init__(
        self, shape: Sequence[int], strides: Sequence[int], host: int, code: int = FLOAT32, holds: Any = None
    ) -> None:
        """``strides`` in elements; ``holds`` is kept alive as long as the buffer."""
        self.shape, self.strides, self.code, self._holds = shape, strides, code, holds
        make, pack = _form(len(shape))
        self._memory = make()
        self.address = ctypes.addressof(self._memory)
        dims: list[int] = []
        for extent, stride in zip(shape[::-1], strides[::-1], strict=True):
            dims += (0, extent, stride, 0)
        kind = code | 1 << 16 | len(shape) << 32
        pack(self._memory, 0, 0, 0, host, 0, kind, self.address + _HEAD, 0, *dims)

    @property
    def host(self) -> int:
        """The address of its first number."""
        return int(_HOST.unpack_from(self._memory, 0)[0])

    @property
    def host_at(self) -> int:
        """Where that address stands."""
        return self.address + HOST_AT

    @property
    def extent_bytes(self) -> int:
        """From its first number to the end of its last, those in between included."""
        if 0 in self.shape:
            return 0
        last = sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True))
        return (last + 1) * (self.code >> 8 & 0xFF) // 8

    def dimensions(self) -> list[int]:
        """From, extent, stride and flags of each dimension, the first of Halide's first."""
        return list(struct.unpack_from(f"{4 * len(self.shape)}i", self._memory, _HEAD))

    def move(self, host: int) -> None:
        """Point at other memory, of the same sizes and steps."""
        _HOST.pack_into(self._memory, 0, host)

    def extents(self) -> list[tuple[int, int]]:
        """From and extent of each dimension, the first of Halide's first: as they stand in the structure now."""
        return [_RANGE.unpack_from(self._memory, _HEAD + d * _DIMENSION) for d in range(len(self.shape))]


def buffer(source: Tensor | np.ndarray[Any, Any], shape: Sequence[int] | None = None) -> Buffer:
    """A buffer over the memory of a tensor or an array: (N, C, H, W) -> x, y, c, n. Any strides.

    ``shape`` splits dimensions or adds some of size 1.
    """
    values = array(source) if isinstance(source, Tensor) else source
    if shape is not None:
        values = values.reshape(shape)
    return Buffer(values.shape, steps(values), values.ctypes.data, _CODES[values.dtype], values)


def dense(shape: Sequence[int], host: int, holds: Any = None) -> Buffer:
    """A buffer over float32 numbers without gaps."""
    return Buffer(shape, [prod(shape[d + 1 :]) for d in range(len(shape))], host, FLOAT32, holds)


def pixels(image: Tensor) -> Buffer:
    """(N, C, H, W) as (N, H, W, C), whatever lies side by side in memory."""
    n, c, h, w = image.shape
    by_image, by_channel, by_row, by_column = image.stride()
    # The step of a single channel says nothing; kernels for channels_last images expect neighbours.
    strides = (by_image, by_row, by_column, 1 if c == 1 else by_channel)
    return Buffer((n, h, w, c), strides, image.data_ptr(), CODES[image.dtype], image)


def check_pixels(what: str, out: Tensor, residual: Tensor | None = None) -> list[Tensor]:
    """``residual``, if there is one, and ``out``: images in the order in which kernels take them.

    Raises:
        ValueError: their pixels do not lie evenly spaced in memory, each one's channels side by side.
    """
    # A copy of what is added would hold what is there now, for ever.
    images = {"out": out} if residual is None else {"residual": residual, "out": out}
    for name, image in images.items():
        if not pixel_step(image.shape, image.stride()):
            raise ValueError(
                f"{what}: {name} must be channels_last, or channels of such an image, got {image.stride()}"
            )
    return list(images.values())


def steps(values: np.ndarray[Any, Any]) -> list[int]:
    """Strides in elements; those of single elements, which say nothing, as they are where there are no gaps."""
    size, shape = values.itemsize, values.shape
    if 1 not in shape:
        return [step // size for step in values.strides]
    if values.flags.c_contiguous:
        return [prod(shape[d + 1 :]) for d in range(len(shape))]
    if values.flags.f_contiguous:
        return [prod(shape[:d]) for d in range(len(shape))]
    return [step // size for step in values.strides]


class Arguments(NamedTuple):
    """What a kernel is called with: buffers and numbers, and where the block lies that ``entry`` reads."""

    given: tuple[Any, ...]
    address: int
    holds: Any


def arguments(kernel: int, *given: Buffer | int | float) -> Arguments:
    """Buffers, whole numbers (32 bits) and other numbers (float32), ready for any number of calls of the kernel."""
    held = [item if isinstance(item, Buffer) else _number(item) for item in given]
    make, pack = _pointers(2 + len(held))
    memory = make()
    pack(memory, 0, kernel, len(held), *[item.address for item in held])
    return Arguments(given, ctypes.addressof(memory), (memory, held))


@lru_cache(maxsize=32)
def _pointers(count: int) -> tuple[Any, Any]:
    form = struct.Struct(f"{count}Q")
    return ctypes.c_char * form.size, form.pack_into


class _Number(NamedTuple):
    value: Any
    address: int


@lru_cache(maxsize=4096, typed=True)
def _number(value: int | float) -> _Number:
    """Kernels only read them, so that equal ones can be the same."""
    held = ctypes.c_int32(value) if isinstance(value, int) else ctypes.c_float(value)
    return _Number(held, ctypes.addressof(held))
