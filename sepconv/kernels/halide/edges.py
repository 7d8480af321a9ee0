"""Images of mixed numbers at the edges of one kernel: what stands between convolutions reads and writes each of them.

A number of 8 bits is a count of steps, and stands for ``(count - zero) * scale``. Scales and zero points are no part of
the code: a kernel with a tensor of 8 bits has one argument more, a table of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.kernels.case import Case
from sepconv.kernels.halide import numbers
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.buffers import Buffer, buffer
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.numbers import KINDS
from sepconv.kernels.halide.schedule import machine
from sepconv.kernels.halide.schedule.machine import Machine

Kinds = tuple[str, ...]
"""The numbers of each tensor that is read, in order, and of the result."""
COUNTED = "uint8"
_NUMBERS = (torch.float32, torch.bfloat16, torch.uint8)
_WHOLE = 1.5 * 2.0**23
"""Among numbers of this size there are no fractions, and its last eight bits are zeros."""


class Steps(NamedTuple):
    """How a tensor of 8 bits counts, in Halide's float32: of one that is written ``scale`` is 1 over its scale."""

    scale: Any
    zero: Any


def kinds(case: Case) -> Kinds:
    return tuple(KINDS[image.dtype] for image in case.images)


def unsuitable(case: Case) -> str:
    """Why Halide cannot read and write these images in place, in a sentence; the empty string if it can."""
    return runtime.missing() or runtime.unsuitable(*case.images, numbers=_NUMBERS)


def moved(found: Kinds) -> bool:
    """Whether numbers can be taken as they are: where they count steps, only the same ones (see ``pack_moved``)."""
    return len(set(found)) == 1


def wide(found: Kinds) -> Machine:
    """This machine, with as many lanes as a vector has of the largest of such numbers."""
    host = machine.host()
    return replace(host, lanes=host.lanes * 4 // max(numbers.DTYPES[kind].itemsize for kind in found))


class Edges:
    """The tensors of a pipeline, read and written as float32."""

    def __init__(self, found: Kinds) -> None:
        self._kinds = found
        self.params = [hl.ImageParam(hl.Float(32), 2, "scales")] if COUNTED in found else []
        for param in self.params:
            param.dim(0).set_bounds(0, 2).set_stride(1)
            param.dim(1).set_bounds(0, len(found)).set_stride(2)

    def image(self, i: int, dims: int, name: str) -> Any:
        """The parameter for tensor ``i``."""
        return hl.ImageParam(numbers.halide_type(self._kinds[i]), dims, name)

    def read(self, i: int, stored: Any) -> Any:
        """The value of a number of tensor ``i``."""
        steps = self.steps(i)
        if steps is None:
            return numbers.read(self._kinds[i], stored)
        return hl.strict_float((hl.cast(hl.Float(32), stored) - steps.zero) * steps.scale)

    def write(self, value: Any) -> Any:
        """What the result stores for it."""
        steps = self.steps(len(self._kinds) - 1)
        return numbers.write(self._kinds[-1], value) if steps is None else _counted(value, steps)

    def count(self, i: int, stored: Any) -> Any:
        """In float32 the steps that are counted, from whatever zero; the value of a number that counts none."""
        return self.read(i, stored) if self.steps(i) is None else hl.cast(hl.Float(32), stored)

    def value(self, i: int, count: Any) -> Any:
        """That of a count, or of an average of counts."""
        steps = self.steps(i)
        return count if steps is None else (count - steps.zero) * steps.scale

    def scaled(self, i: int, difference: Any) -> Any:
        """The value of a difference of counts."""
        steps = self.steps(i)
        return difference if steps is None else difference * steps.scale

    def addend(self, i: int, stored: Any) -> Any:
        """What is added up of tensor ``i``: of numbers that count steps the steps, in 32 bits and so exactly."""
        steps = self.steps(i)
        return self.read(i, stored) if steps is None else hl.cast(hl.Int(32), stored) - hl.cast(hl.Int(32), steps.zero)

    def nothing(self, i: int) -> Any:
        """The sum of no such numbers."""
        return hl.f32(0.0) if self.steps(i) is None else hl.i32(0)

    def mean(self, i: int, total: Any, count: Any) -> Any:
        """The value of a sum of ``addend`` over a count, both float32 then."""
        steps = self.steps(i)
        if steps is None:
            return total / count
        return hl.strict_float(hl.cast(hl.Float(32), total) * steps.scale / count)

    def steps(self, i: int) -> Steps | None:
        if self._kinds[i] != COUNTED:
            return None
        [table] = self.params
        return Steps(table[0, i], table[1, i])


def _counted(value: Any, steps: Steps) -> Any:
    """The nearest of 0 to 255 steps, of two as near the even one; 0 of NaN, for which no comparison holds.

    A sum with ``_WHOLE`` is rounded to a whole number, sooner than by the instruction for that.
    """
    count, low, high = value * steps.scale, hl.f32(0.0) - steps.zero, hl.f32(255.0) - steps.zero
    least = hl.select(count > low, count, low)
    bounded = hl.select(least < high, least, high)
    whole = hl.reinterpret(hl.Int(32), hl.strict_float(bounded + hl.f32(_WHOLE)))
    return hl.cast(hl.UInt(8), whole + hl.cast(hl.Int(32), steps.zero))


def constants(found: Kinds, weights: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The constants of a case but for its table of scales."""
    return weights[:-1] if COUNTED in found else weights


def pack(found: Kinds, weights: Sequence[Tensor | None]) -> list[Buffer]:
    """What ``Edges.params`` are called with, from the table at the end of a case's constants."""
    if COUNTED not in found:
        return []
    table = _table(found, weights).float().clone()
    table[-1, 0] = table[-1, 0].reciprocal()
    return [buffer(table)]


def pack_moved(found: Kinds, weights: Sequence[Tensor | None]) -> list[Buffer]:
    """The same of a kernel that moves numbers where it can: nothing where all count the same steps."""
    if COUNTED not in found or (moved(found) and _alike(_table(found, weights))):
        return []
    return pack(found, weights)


def _table(found: Kinds, weights: Sequence[Tensor | None]) -> Tensor:
    table = weights[-1] if weights else None
    if table is None or table.shape != (len(found), 2):
        raise TypeError(f"edges.pack: {found} need a row (scale, zero point) each at the end of the constants")
    return table.detach()


def _alike(table: Tensor) -> bool:
    return bool((table == table[0]).all())
