"""What the tests of the kernels of bytes share: random constants, poisoned memory, and the truth."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sepconv import reference
from sepconv.kernels.case import Case, Geometry
from sepconv.kernels.halide.quantized import product
from sepconv.reference import Quantized

LAST = torch.channels_last
WAYS = product.ways()
MARGIN = 64
POISON = 77


class Point(NamedTuple):
    """What the numbers of one convolution look like."""

    x_zero: int = 117
    zero: int = 13
    residual_zero: int = 99
    spread: float = 64.0
    power_of_two: bool = False


def bytes_of(shape: tuple[int, ...], margin: int = 0, extreme: bool = False) -> Tensor:
    """Random bytes, or 0 and 255 alone, as channels of a larger channels_last image."""
    whole = torch.randint(0, 256, (shape[0], shape[1] + 2 * margin, *shape[2:]), dtype=torch.uint8)
    if extreme:
        whole = (whole & 1) * 255
    return whole.contiguous(memory_format=LAST)[:, margin : margin + shape[1]]


def constants(weight_shape: tuple[int, ...], point: Point, bias: bool = True, extreme: bool = False) -> Quantized:
    """Scales under which results are spread over about ``point.spread`` bytes; powers of two make them often ties."""
    outputs, terms = weight_shape[0], prod(weight_shape[1:])
    weight = torch.randint(-127, 128, weight_shape, dtype=torch.int8)
    if extreme:
        weight = (weight.sign() + (weight == 0)) * 127
    scale, inverse = (torch.rand(outputs) + 0.5) / (200 * terms**0.5), point.spread / 40
    if point.power_of_two:
        scale, inverse = torch.full((outputs,), 2.0**-9), 2.0
    numbers = [point.x_zero, point.residual_zero, 0.25 if point.power_of_two else 0.0173, inverse, point.zero]
    offset = torch.randint(-5000, 5000, (outputs,), dtype=torch.int32) if bias else None
    return Quantized(weight, offset, scale, torch.tensor(numbers))


def truth(
    x: Tensor,
    given: Quantized,
    geometry: Geometry,
    activation: str = "",
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.uint8,
) -> Tensor:
    """``reference.quantized_conv`` with PyTorch's sums, which are exact in float64 and take no time."""
    if x.dtype is torch.float32:
        x = reference.quantize(x, given.numbers[5], given.numbers[0])
    padded = F.pad(x.double() - given.numbers[0], [amount for pair in reversed(geometry.padding) for amount in pair])
    groups = x.shape[1] // given.weight.shape[1]
    sums = F.conv2d(padded, given.weight.double(), None, geometry.stride, 0, geometry.dilation, groups)
    return reference.after_sums(sums.long(), given, activation, residual, dtype)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, beside: int = 0) -> tuple[Tensor, Callable[[], None]]:
    """An output full of poison, some channels of a larger image between margins, and the check that nothing was written
    beside it."""
    images, channels, height, width = shape
    step = channels + 2 * beside
    value = POISON if dtype is torch.uint8 else torch.nan
    memory = torch.full((images * height * width * step + 2 * MARGIN,), value, dtype=dtype)
    strides = (height * width * step, 1, width * step, step)
    out = memory.as_strided(shape, strides, MARGIN + beside)

    def check() -> None:
        out.fill_(value)
        same = memory == value if dtype is torch.uint8 else memory.isnan()
        assert bool(same.all())

    return out, check


def exact(
    kernel: Any,
    case: Case,
    tensors: tuple[Tensor, list[Tensor | None], Tensor | None],
    wanted: Tensor,
    way: str,
    beside: int = 0,
) -> None:
    """Bind the kernel of a module of ``halide.quantized`` that multiplies in one way, run it twice, compare every bit.

    ``tensors``: x, constants, residual; ``beside``: channels of the image that it writes to, on both sides of its own.
    """
    x, given, residual = tensors
    out, untouched = poisoned(tuple(wanted.shape), wanted.dtype, beside)
    case = case.into(out)
    assert kernel.supports(case) == ""
    found = kernel.planned(case, way)
    run = kernel.bind(found, x, kernel.pack(found, given), residual, out)
    for _ in range(2):
        run()
        differ = out != wanted
        assert not differ.any(), f"{int(differ.sum())} of {differ.numel()} differ: {found}"
    untouched()
