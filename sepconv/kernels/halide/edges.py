"""Images of mixed numbers at the edges of one kernel: what stands between convolutions reads and writes each of them.

Scales and zero points are no part of the code: a kernel with a tensor of 8 bits has one argument more, a table of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sepconv.kernels.case import Case
from sepconv.kernels.halide import numbers
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.buffers import Buffer, buffer
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.numbers import KINDS, Steps

Kinds = tuple[str, ...]
"""The numbers of each tensor that is read, in order, and of the result."""
COUNTED = "uint8"
_NUMBERS = (torch.float32, torch.bfloat16, torch.uint8)


def kinds(case: Case) -> Kinds:
    return tuple(KINDS[image.dtype] for image in case.images)


def unsuitable(case: Case) -> str:
    """Why Halide cannot read and write these images in place, in a sentence; the empty string if it can."""
    return runtime.missing() or runtime.unsuitable(*case.images, numbers=_NUMBERS)


def moved(found: Kinds) -> bool:
    """Whether numbers can be taken as they are: where they count steps, only if these are the same (see ``pack``)."""
    return len(set(found)) == 1


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
        return numbers.read(self._kinds[i], stored, self.steps(i))

    def write(self, value: Any) -> Any:
        """What the result stores for it."""
        return numbers.write(self._kinds[-1], value, self.steps(len(self._kinds) - 1))

    def steps(self, i: int) -> Steps | None:
        if self._kinds[i] != COUNTED:
            return None
        [table] = self.params
        return Steps(table[0, i], table[1, i])


def pack(found: Kinds, table: Tensor | None) -> list[Buffer]:
    """What ``Edges.params`` are called with; ``table``: a row (scale, zero) for each tensor, of others (1, 0)."""
    if table is None or COUNTED not in found:
        return []
    known = table.detach().float().clone()
    known[-1, 0] = known[-1, 0].reciprocal()
    return [buffer(known)]


def alike(table: Tensor | None) -> bool:
    """Whether all tensors count the same steps."""
    return table is None or bool((table == table[0]).all())


def split(weights: Sequence[Tensor | None], found: Kinds) -> tuple[Sequence[Tensor | None], Tensor | None]:
    """A case's constants without the table of scales at their end, and that."""
    return (weights[:-1], weights[-1]) if COUNTED in found else (weights, None)
