"""Values of a program while it is written, and how they may lie in memory: as tensors without any, on the meta device.

What a function here returns has the strides that matter; its dtype says nothing unless it is a look's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sepconv.compile.groups import ComputedGroup, writes_channels
from sepconv.compile.numbers import NumberType
from sepconv.compile.program import Place, TensorForm
from sepconv.compile.store import Constant
from sepconv.kernels.layout import pixel_step


@dataclass(frozen=True, eq=False)
class ValueLook:
    """A value: a meta tensor that has its size, strides and storage, the memory or the constant it lies in, and what
    its numbers are."""

    meta: Tensor
    memory: int | Constant
    number: NumberType

    @property
    def place(self) -> Place:
        return Place(self.form, self.memory, int(self.meta.storage_offset()))

    @property
    def form(self) -> TensorForm:
        return form_of(self.meta, self.meta, self.number)

    def seen_as(self, meta: Tensor) -> ValueLook:
        """Another look at the same memory, which may take it for numbers of another kind."""
        return ValueLook(meta, self.memory, self.number if meta.dtype is self.meta.dtype else NumberType(meta.dtype))


Several = Mapping[int, ValueLook] | Sequence[ValueLook]
"""Of an operation with several results: one for each of them."""


def form_of(size: Tensor, strides: Tensor, number: NumberType) -> TensorForm:
    return TensorForm(tuple(size.shape), tuple(strides.stride()), number)


def meta_of(size: Tensor, strides: Tensor, storage: torch.dtype) -> Tensor:
    return torch.empty_strided(size.shape, strides.stride(), dtype=storage, device="meta")


def looks_in(arguments: Any) -> list[ValueLook]:
    return [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, ValueLook)]


def is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def dense(x: Tensor) -> Tensor:
    """In the layout that the kernels read."""
    memory_format = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    return torch.empty(x.shape, dtype=x.dtype, device="meta", memory_format=memory_format)


def without_gaps_like(x: Tensor) -> Tensor:
    """Contiguous where ``x`` can be read so, else as the kernels read images."""
    return torch.empty(x.shape, dtype=x.dtype, device="meta") if x.is_contiguous() else dense(x)


def by_pixels(x: Tensor) -> bool:
    """channels_last, or channels of such an image."""
    return is_channels_last(x) or (x.dim() == 4 and not x.is_contiguous() and pixel_step(x.shape, x.stride()) > 0)


def readable(group: ComputedGroup, x: Tensor) -> Tensor:
    """With the strides of ``x`` where a group reads them, else in the layout that the kernels read."""
    return x if writes_channels(group) and by_pixels(x) else dense(x)


def broadcastable(x: Tensor, out: Tensor) -> Tensor:
    """Of that size, its numbers in the order of ``out``."""
    missing = out.dim() - x.dim()
    order = sorted(range(x.dim()), key=lambda d: (-out.stride(missing + d), d))
    laid = torch.empty([x.shape[d] for d in order], dtype=x.dtype, device="meta")
    return laid.permute([order.index(d) for d in range(x.dim())])


def rows(x: Tensor) -> Tensor:
    """Rows of a matrix may lie apart, the numbers of a row may not."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else dense(x)


def strides_for(result: Tensor, sources: Sequence[ValueLook]) -> Tensor:
    """The layout of an operation's result: that of an input of the same size, else channels_last if an input is."""
    for look in sources:
        if look.meta.shape == result.shape and has_no_gaps(look.meta):
            return look.meta
    if result.dim() == 4 and any(by_pixels(look.meta) for look in sources):
        return dense(result)
    return torch.empty(result.shape, device="meta")


def has_no_gaps(x: Tensor) -> bool:
    """Whether every number has a place of its own and no place is left over."""
    expected = 1
    for step, size in sorted((step, size) for size, step in zip(x.shape, x.stride(), strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return x.numel() > 0
