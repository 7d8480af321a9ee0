"""What is computed of several tensors number by number, as plain data: sums, products, activations, in order.

An expression is a list of terms. The values that they take are numbered: the tensors first, then the constant numbers,
then the results of earlier terms. Its last term is the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.activations import ACTIVATIONS, exponential


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """An operation on one or two numbers that is no activation.

    Args:
        function: PyTorch's own.
        expression: the same in Halide: of the module ``halide`` and float32 expressions.
    """

    function: Callable[..., Tensor]
    expression: Callable[..., Any]


def is_nan(hl: Any, x: Any) -> Any:
    """By its bits: comparisons with itself are simplified away."""
    return (hl.reinterpret(hl.UInt(32), x) & hl.u32(0x7FFFFFFF)) > hl.u32(0x7F800000)


def _maximum(hl: Any, a: Any, b: Any) -> Any:
    return hl.select(is_nan(hl, a), a, hl.select(a > b, a, b))


def _minimum(hl: Any, a: Any, b: Any) -> Any:
    return hl.select(is_nan(hl, a), a, hl.select(a < b, a, b))


def _prelu(hl: Any, x: Any, slope: Any) -> Any:
    return hl.select(x > hl.f32(0.0), x, x * slope)


def logarithm(hl: Any, x: Any) -> Any:
    """log(x), with PyTorch's results for NaN and infinity."""
    return hl.select(is_nan(hl, x) | (x > hl.f32(3.4028235e38)), x, hl.log(x))


def _log1p(hl: Any, x: Any) -> Any:
    """With the digits of a small x, which the sum has lost, brought back."""
    whole = hl.f32(1.0) + x
    lost = whole - hl.f32(1.0)
    exact = (lost == hl.f32(0.0)) | (x > hl.f32(1e30))
    return hl.select(lost == hl.f32(0.0), x, logarithm(hl, whole) * hl.select(exact, hl.f32(1.0), x / lost))


def _power(hl: Any, x: Any, exponent: Any) -> Any:
    """Of numbers that are not negative; others give NaN, as they do for exponents that are no whole numbers."""
    return exponential(hl, logarithm(hl, x) * exponent)


def _sign(hl: Any, x: Any) -> Any:
    return hl.select(x > hl.f32(0.0), hl.f32(1.0), hl.select(x < hl.f32(0.0), hl.f32(-1.0), hl.f32(0.0)))


ARITHMETIC: dict[str, Arithmetic] = {
    "add": Arithmetic(torch.add, lambda hl, a, b: a + b),
    "sub": Arithmetic(torch.sub, lambda hl, a, b: a - b),
    "mul": Arithmetic(torch.mul, lambda hl, a, b: a * b),
    "div": Arithmetic(torch.div, lambda hl, a, b: a / b),
    "maximum": Arithmetic(torch.maximum, _maximum),
    "minimum": Arithmetic(torch.minimum, _minimum),
    "neg": Arithmetic(torch.neg, lambda hl, a: -a),
    "abs": Arithmetic(torch.abs, lambda hl, a: hl.abs(a)),
    "sqrt": Arithmetic(torch.sqrt, lambda hl, a: hl.sqrt(a)),
    "rsqrt": Arithmetic(torch.rsqrt, lambda hl, a: hl.f32(1.0) / hl.sqrt(a)),
    "reciprocal": Arithmetic(torch.reciprocal, lambda hl, a: hl.f32(1.0) / a),
    "exp": Arithmetic(torch.exp, exponential),
    "log": Arithmetic(torch.log, logarithm),
    "log2": Arithmetic(torch.log2, lambda hl, a: logarithm(hl, a) * hl.f32(1.0 / math.log(2.0))),
    "log1p": Arithmetic(torch.log1p, _log1p),
    "pow": Arithmetic(torch.pow, _power),
    "floor": Arithmetic(torch.floor, lambda hl, a: hl.floor(a)),
    "ceil": Arithmetic(torch.ceil, lambda hl, a: hl.ceil(a)),
    "trunc": Arithmetic(torch.trunc, lambda hl, a: hl.trunc(a)),
    "round": Arithmetic(torch.round, lambda hl, a: hl.round(a)),
    "sign": Arithmetic(torch.sign, _sign),
    "prelu": Arithmetic(lambda x, slope: torch.where(x > 0, x, x * slope), _prelu),
}


class Term(NamedTuple):
    """``operation``: a name in ``ARITHMETIC`` or of an activation; ``arguments``: numbers of values."""

    operation: str
    arguments: tuple[int, ...]

    @property
    def function(self) -> Callable[..., Tensor]:
        known = ARITHMETIC.get(self.operation)
        return ACTIVATIONS[self.operation].function if known is None else known.function

    @property
    def expression(self) -> Callable[..., Any]:
        known = ARITHMETIC.get(self.operation)
        return ACTIVATIONS[self.operation].expression if known is None else known.expression


class Expression(NamedTuple):
    """So many tensors and so many constant numbers, and what becomes of them."""

    tensors: int
    numbers: int
    terms: tuple[Term, ...]

    def of(self, tensors: Sequence[Tensor], numbers: Tensor) -> Tensor:
        """By PyTorch."""
        values = [*tensors, *numbers.unbind()]
        for term in self.terms:
            values.append(term.function(*[values[i] for i in term.arguments]))
        return values[-1]

    def in_halide(self, hl: Any, tensors: Sequence[Any], numbers: Sequence[Any]) -> Any:
        """The same of Halide's expressions. Strict, as LLVM would take sums for numbers, never NaN."""
        values = [*tensors, *numbers]
        for term in self.terms:
            values.append(hl.strict_float(term.expression(hl, *[values[i] for i in term.arguments])))
        return values[-1]


IDENTITY = Expression(1, 0, ())
"""A tensor as it is: between numbers of two kinds, a conversion."""
