"""What becomes of the sums of a quantised convolution: scaled, with residual and activation, and quantised again.

Every step is rounded as ``reference.quantized_conv`` says, so that results are equal in every bit. x's zero point is
taken off with the bias: ``sum of (x - zero) * w`` is ``sum of x * w - zero * sum of w``, if padding holds the zero
point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.activations import ACTIVATIONS
from sepconv.kernels.case import Case
from sepconv.kernels.halide.conv.gemm import dense
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.buffers import Buffer, buffer
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.schedule import machine
from sepconv.kernels.halide.schedule import quantized as schedule
from sepconv.kernels.layout import pixel_step
from sepconv.reference import Quantized

KINDS = {torch.uint8: "uint8", torch.float32: "float32"}
"""Numbers of x, y and residual."""
# In the order in which kernels are given them.
_NAMES = (
    "low", "high", "inverse", "zero", "residual_zero", "residual_scale", "x_zero", "x_inverse",
    "least", "from_zero", "most", "x_from_zero",
)  # fmt: skip
# Added to a number of less than 22 bits it leaves the nearest whole one in the last bits, of two as near the even one.
# The bits of a larger sum are more, and those of a smaller one less, as signed numbers of 32 bits.
_ROUNDS = 1.5 * 2.0**23
_ROUNDS_BITS = 0x4B400000
_SMALLEST = -1e9


class Ending(NamedTuple):
    """What the code depends on.

    Attributes:
        residual: the kind of its numbers, "" where there is none.
        packs: whether numbers become bytes by instructions that cut off what is beyond a byte.
    """

    activation: str
    residual: str
    out: str
    packs: bool = False

    @classmethod
    def of(cls, case: Case) -> Ending:
        residual = "" if case.residual is None else KINDS[case.residual.dtype]
        return cls(case.activation, residual, KINDS[case.y.dtype], schedule.packs(machine.host()))

    @classmethod
    def in_the_middle(cls, activation: str) -> Ending:
        """Of what one convolution hands to the next of the same kernel."""
        return cls(activation, "", "uint8", schedule.packs(machine.host()))

    @property
    def limits(self) -> tuple[float, float] | None:
        """Between which the activation keeps its input and does nothing else, where that can be left to the rounding:
        a limit of float32 numbers, all of which are numbers, becomes one of bytes."""
        if self.out == "float32" or self.residual == "float32":
            return None
        return ACTIVATIONS[self.activation].limits if self.activation else (-math.inf, math.inf)


def halide_type(kind: str) -> Any:
    return {"float32": hl.Float(32), "uint8": hl.UInt(8)}[kind]


class Constants:
    """The parameters of a kernel that belong to its sums: bias, scale and numbers, as :func:`pack` makes them."""

    def __init__(self, outputs: int, prefix: str = "") -> None:
        self.bias = hl.ImageParam(hl.Int(32), 1, f"{prefix}bias")
        self.scale = hl.ImageParam(hl.Float(32), 1, f"{prefix}scale")
        self._numbers = hl.ImageParam(hl.Float(32), 1, f"{prefix}numbers")
        dense(self.bias, outputs)
        dense(self.scale, outputs)
        dense(self._numbers, len(_NAMES))
        self.parameters = [self.bias, self.scale, self._numbers]

    def number(self, name: str) -> Any:
        return self._numbers[_NAMES.index(name)]

    def byte(self, name: str) -> Any:
        return hl.cast(hl.UInt(8), self.number(name))

    def byte_of_bits(self, name: str) -> Any:
        """The byte that rounding has left in a number: it need not be converted again for every pixel."""
        return hl.cast(hl.UInt(8), hl.reinterpret(hl.Int(32), self.number(name)))


def finished(spec: Ending, sums: Any, o: Any, given: Constants, residual: Any = None) -> Any:
    """What is stored for the sums of output channel ``o``."""
    value = hl.cast(hl.Float(32), sums) * given.scale[o]
    if spec.residual == "uint8":
        value += (hl.cast(hl.Float(32), residual) - given.number("residual_zero")) * given.number("residual_scale")
    elif spec.residual:
        value += residual
    if spec.limits is None:
        value = ACTIVATIONS[spec.activation].expression(hl, value)
    if spec.out == "float32":
        return hl.strict_float(value)
    scaled = value * given.number("inverse")
    if spec.packs:
        packed = _packed(scaled, given.number("least"), given.number("from_zero"))
        unlimited = spec.limits is None or spec.limits[1] == math.inf
        return packed if unlimited else hl.min(packed, given.byte_of_bits("most"))
    if spec.residual == "float32":
        scaled = _without_nan(scaled)
    return _rounded(scaled, given.number("low"), given.number("high"), given.byte("zero"))


def _without_nan(value: Any) -> Any:
    return hl.select(value > hl.f32(_SMALLEST), value, hl.f32(_SMALLEST))


def _rounded(scaled: Any, low: Any, high: Any, zero: Any) -> Any:
    """The byte for a float32 number: the nearest whole one, not beyond ``low`` and ``high``, and the zero point."""
    # Strict are all steps up to here: each is rounded, and what is not a number may occur.
    bits = hl.reinterpret(hl.Int(32), hl.strict_float(scaled + hl.f32(_ROUNDS)))
    least, most = (hl.cast(hl.Int(32), limit) + hl.i32(_ROUNDS_BITS) for limit in (low, high))
    # The last byte of what was added for rounding is 0.
    return hl.cast(hl.UInt(8), hl.min(hl.max(bits, least), most)) + zero


def _packed(scaled: Any, least: Any, from_zero: Any) -> Any:
    """The same, not below ``least`` and with nothing above but the largest byte. Both are numbers whose bits are those
    that rounding leaves: of the lowest number, and of the one that is 0 as a byte."""
    # Of what is not a number no comparison holds: the processor's maximum takes the other one.
    moved = hl.strict_float(scaled + hl.f32(_ROUNDS))
    bits = hl.reinterpret(hl.Int(32), hl.select(hl.strict_float(moved > least), moved, least))
    return hl.saturating_cast(hl.UInt(8), bits - hl.reinterpret(hl.Int(32), from_zero))


def in_bytes(kind: str, value: Any, given: Constants, packs: bool) -> Any:
    """The byte for a number of x."""
    if kind == "uint8":
        return value
    if packs:
        # The lowest number is that of the byte 0.
        return _packed(value * given.number("x_inverse"), *[given.number("x_from_zero")] * 2)
    zero = given.number("x_zero")
    scaled = _without_nan(value * given.number("x_inverse"))
    return _rounded(scaled, -zero, hl.f32(255.0) - zero, given.byte("x_zero"))


def constants(tensors: Sequence[Tensor | None]) -> Quantized:
    """The constants of one convolution, which come in this order."""
    weight, bias, scale, numbers = tensors
    if weight is None or scale is None or numbers is None:
        raise TypeError("a quantised convolution has weight, scale and numbers")
    return Quantized(weight, bias, scale, numbers)


def pack(spec: Ending, of: Quantized, less: int = 0) -> list[Buffer]:
    """Copies of bias, scale and numbers for :class:`Constants`; what is summed is so much ``less`` than x."""
    x_zero, residual_zero, residual_scale, inverse, zero, *x_inverse = of.numbers.double().tolist()
    low, high = (_byte(limit * of.numbers[3], zero) for limit in spec.limits or (-math.inf, math.inf))
    given = {
        "low": low, "high": high,
        "inverse": inverse, "zero": zero, "residual_zero": residual_zero, "residual_scale": residual_scale,
        "x_zero": x_zero, "x_inverse": x_inverse[0] if x_inverse else 0.0,
        "least": _ROUNDS + low, "from_zero": _ROUNDS - zero, "most": _ROUNDS + high + zero,
        "x_from_zero": _ROUNDS - x_zero,
    }  # fmt: skip
    offset = (less - int(x_zero)) * of.weight.detach().long().flatten(1).sum(1)
    if of.bias is not None:
        offset += of.bias.detach().long()
    numbers = torch.tensor([given[name] for name in _NAMES])
    return [buffer(offset.int()), buffer(of.scale.detach().clone()), buffer(numbers)]


def _byte(limit: Tensor, zero: float) -> float:
    """The whole number that a limit of numbers becomes, before the zero point is added."""
    return limit.round().clamp(-zero, 255 - zero).item()


def unsuitable(case: Case, of: Sequence[torch.dtype] = (torch.uint8,)) -> str:
    """Why no kernel of this folder can compute a case, in a sentence; the empty string if one may. ``of``: the numbers
    that x may have."""
    if not case.quantized:
        return f"the kernel multiplies by weights of int8 but got {case.weight.dtype}"
    if not case.bound:
        return "the kernel is bound to memory by compile"
    if not case.result.elements:
        return "the result is empty"
    if case.which != "forward":
        return "there are no gradients of whole numbers"
    if case.x.dtype not in of:
        return f"the kernel reads bytes but got {case.x.dtype}"
    images = [image for image in (case.x, case.residual, case.result) if image is not None]
    weights = [case.weight] if case.bias is None else [case.weight, case.bias]
    return (
        runtime.missing()
        or runtime.unsuitable(*images, numbers=tuple(KINDS))
        or runtime.unsuitable(*weights, numbers=(torch.int8, torch.int32))
    )


def no_pixels(case: Case) -> str:
    """Why an image is not one of pixels with their channels side by side."""
    x = case.x
    if x.dims != 2:
        return f"the kernel is for images (N, C, H, W), got {x.dims} spatial dimensions"
    if x.shape[1] > 1 and (x.stride[1] != 1 or (x.stride[3] == 1 and x.shape[3] > 1)):
        return f"the kernel reads channels_last images only (strides {x.stride})"
    return no_pixels_written(case)


def no_pixels_written(case: Case) -> str:
    """Why the result is no image of pixels with their channels side by side."""
    if not pixel_step(case.result.shape, case.result.stride):
        return f"the kernel writes channels_last images only (strides {case.result.stride})"
    return ""


def prepare(case: Case) -> Callable[..., Tensor]:
    """
    Raises:
        TypeError: always: quantised convolutions are bound to memory.
    """
    raise TypeError(f"a quantised {case.op} convolution is bound to memory, not called")
