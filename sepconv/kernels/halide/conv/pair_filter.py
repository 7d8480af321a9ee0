"""The depthwise sums of kernels that write bfloat16: in float32, a few neighbouring pixels of some channels at a time.

Where pairs of channels fill vectors, the even and the odd ones are vectors of their own, as they lie in words.
Zeros stand to both sides of an image's rows; rows outside of it are left out of the sums.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from sepconv.activations import ACTIVATIONS
from sepconv.kernels.case import Outline
from sepconv.kernels.halide import numbers
from sepconv.kernels.halide.conv import tiles
from sepconv.kernels.halide.conv.gemm import dense
from sepconv.kernels.halide.conv.separable import pack_taps
from sepconv.kernels.halide.conv.separable_pipeline import UNROLLED_TAPS
from sepconv.kernels.halide.jit import packing
from sepconv.kernels.halide.jit.buffers import Buffer, buffer
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.numbers import PAIRS
from sepconv.kernels.halide.schedule import machine
from sepconv.kernels.halide.schedule.gemm import channel_lanes

# Neighbouring pixels that share the loads of a filter. Seven leave nothing over in rows of 7 to 112 pixels; where taps
# of neighbours overlap little, or are many, so many take more than they spare.
_USUAL, _SEVEN = 4, 7
_WIDEST_FILTER, _SHORT_ROW = 5, 14

# Time of a vector of single numbers over that of half as many pairs (Granite Rapids).
_SINGLE_COST = 1.25

Pair = tuple[int, int]


class Filter(Protocol):
    """What the sums depend on. ``numbers``: the kind of x; ``hidden``: the kind that is written."""

    @property
    def channels(self) -> int: ...
    @property
    def multiplier(self) -> int: ...
    @property
    def kernel_size(self) -> Pair: ...
    @property
    def stride(self) -> Pair: ...
    @property
    def dilation(self) -> Pair: ...
    @property
    def lanes(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def activation(self) -> str: ...
    @property
    def numbers(self) -> str: ...
    @property
    def hidden(self) -> str: ...


def columns_of(width: int, stride: int, taps: int) -> int:
    """Pixels at a time in rows of so many; ``stride`` and ``taps`` along them."""
    overlap = taps <= _WIDEST_FILTER and (stride == 1 or width <= _SHORT_ROW)
    return min(width, _SEVEN if overlap and width % _SEVEN == 0 else _USUAL)


def kinds(x: Outline, written: str) -> tuple[str, str]:
    """The kinds in which x is read and the result, ``written``, is stored: in pairs where they fill vectors better."""
    channels = x.shape[1]
    if written == PAIRS and _vectors(channels // 2) <= _SINGLE_COST / 2 * _vectors(channels):
        return tiles.kind_of(x), PAIRS
    return tiles.kind_of(x, pairs=False), tiles.KIND if written == PAIRS else written


def _vectors(count: int) -> int:
    return -(-count // lanes_of(count))


def lanes_of(count: int) -> int:
    """Lanes of the vectors of so many channels, or pairs of them."""
    return channel_lanes(machine.host(), count)


def params(spec: Filter) -> tuple[Any, Any]:
    """Taps and bias, as :func:`pack` lays them: channel, part of a pair, multiplier, [column, row]."""
    parts = numbers.parts(spec.hidden)
    taps, bias = hl.ImageParam(hl.Float(32), 5, "taps"), hl.ImageParam(hl.Float(32), 3, "depthwise_bias")
    dense(taps, spec.channels // parts, parts, spec.multiplier, *reversed(spec.kernel_size))
    dense(bias, spec.channels // parts, parts, spec.multiplier)
    return taps, bias


def pack(spec: Filter, weight: Tensor, bias: Tensor | None) -> list[Buffer]:
    """Weight and bias, each NaN the usual one."""
    parts, multiplier = numbers.parts(spec.hidden), spec.multiplier
    filters = [pack_taps(t, multiplier) for t in (weight, packing.pack_bias(bias, weight))]
    return [buffer(tiles.usual(t.unflatten(-1, (-1, parts)).transpose(-1, -2))) for t in filters]


def sums(spec: Filter, image: Any, taps: Any, before: tuple[Any, Any]) -> tuple[Any, Any]:
    """The sums by channel, part, multiplier, column, row and image, and their taps; ``before``: padding above, to the
    left."""
    c, part, m, column, row, n = (hl.Var(name) for name in ("c", "part", "m", "column", "row", "n"))
    unbounded, columns = hl.Range(hl.Expr(), hl.Expr()), hl.Range(0, image.dim(1).extent())
    zero = numbers.zero(spec.numbers)
    padded = hl.BoundaryConditions.constant_exterior(image, zero, [unbounded, columns, unbounded, unbounded])
    tap = hl.RDom([hl.Range(0, size) for size in reversed(spec.kernel_size)], "tap")
    y = row * spec.stride[0] + tap.y * spec.dilation[0] - before[0]
    x = column * spec.stride[1] + tap.x * spec.dilation[1] - before[1]
    height = image.dim(2).extent()
    tap.where(y >= 0)
    tap.where(y < height)
    channel = c if spec.numbers == spec.hidden else numbers.parts(spec.hidden) * c + part
    filtered, here = hl.Func("filtered"), [c, part, m, column, row, n]
    filtered[here] = hl.f32(0.0)
    pixel = padded[channel, x, hl.clamp(y, 0, height - 1), n]
    filtered[here] += taps[c, part, m, tap.x, tap.y] * numbers.read(spec.numbers, pixel, part)
    return filtered, tap


def written(spec: Filter, filtered: Any, bias: Any, at: list[Any]) -> Any:
    """What is stored for the sums ``at`` channel, multiplier, column, row and image."""
    channel, m, *pixel = at
    values = [
        ACTIVATIONS[spec.activation].expression(hl, filtered[[channel, part, m, *pixel]] + bias[channel, part, m])
        for part in range(numbers.parts(spec.hidden))
    ]
    return numbers.write(spec.hidden, *values, quiet=tiles.quiet(spec.activation, spec.numbers))


def schedule(spec: Filter, filtered: Any, tap: Any) -> None:
    """All in registers; overlapping taps of neighbouring pixels are loaded once."""
    c, part, _, column, _, _ = filtered.args()
    filtered.bound_extent(c, spec.lanes).bound_extent(part, numbers.parts(spec.hidden))
    filtered.bound_extent(column, spec.columns)
    filtered.update().reorder(c, part, column, tap.x, tap.y)
    for stage in (filtered.reorder(c, part, column), filtered.update()):
        stage.vectorize(c).unroll(part).unroll(column)
    if spec.kernel_size[1] <= UNROLLED_TAPS:
        filtered.update().unroll(tap.x)
