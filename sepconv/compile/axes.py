"""Groups along some of the dimensions of a value: reductions, softmax, numbers from other places, and products of two
computed matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sepconv.compile.store import Constant
from sepconv.kernels.axes import GatherDetail, ReduceDetail
from sepconv.kernels.torch import axes


@dataclass(frozen=True, eq=False)
class Reduced:
    """All numbers along some dimensions made one: their sum, mean, maximum or minimum."""

    detail: ReduceDetail
    keepdim: bool

    name: ClassVar[str] = ""
    fused: ClassVar[tuple[str, ...]] = ()
    constants: ClassVar[tuple[Constant | None, ...]] = ()

    @property
    def kind(self) -> str:
        """ "sum", "mean", "amax" or "amin"."""
        return self.detail.what

    @property
    def chooses(self) -> bool:
        """Whether every number of the result is one of those that are read."""
        return self.detail.what in ("amax", "amin")

    def macs(self, output: tuple[int, ...]) -> int:
        return 0

    def __call__(self, x: Tensor) -> Tensor:
        return axes.reduced(x, self.detail, self.keepdim)


@dataclass(frozen=True, eq=False)
class Softmaxed:
    """Rows along the last dimension as probabilities, or as their logarithms."""

    kind: str

    name: ClassVar[str] = ""
    fused: ClassVar[tuple[str, ...]] = ()
    constants: ClassVar[tuple[Constant | None, ...]] = ()

    def macs(self, output: tuple[int, ...]) -> int:
        return 0

    def __call__(self, x: Tensor) -> Tensor:
        return axes.softmaxed(x, self.kind)


@dataclass(frozen=True, eq=False)
class Gathered:
    """Numbers from other places. ``kind``: what the model calls it, such as "pad", "roll" or "flip"."""

    kind: str
    detail: GatherDetail

    name: ClassVar[str] = ""
    fused: ClassVar[tuple[str, ...]] = ()
    constants: ClassVar[tuple[Constant | None, ...]] = ()

    @property
    def chooses(self) -> bool:
        """Zero is a number whatever the steps."""
        return self.detail.moves or self.detail.value == 0

    def macs(self, output: tuple[int, ...]) -> int:
        return 0

    def __call__(self, x: Tensor) -> Tensor:
        return axes.gathered(x, self.detail)


@dataclass(frozen=True, eq=False)
class MatrixProduct:
    """Matrices (B, M, K) by such of (B, K, N). ``depth``: K."""

    depth: int

    kind: ClassVar[str] = "product"
    name: ClassVar[str] = ""
    fused: ClassVar[tuple[str, ...]] = ()
    constants: ClassVar[tuple[Constant | None, ...]] = ()

    def macs(self, output: tuple[int, ...]) -> int:
        return math.prod(output) * self.depth

    def __call__(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.bmm(x, other)
