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

from sepconv.compile.axes import Gathered, MatrixProduct, Reduced, Softmaxed
from sepconv.compile.groups import ComputedGroup, Convolution, Elementwise, RowNorm, writes_channels
from sepconv.compile.numbers import NumberType
from sepconv.compile.program import Place, TensorForm
from sepconv.compile.store import Constant
from sepconv.kernels.axes import kept
from sepconv.kernels.case import Outline
from sepconv.kernels.halide.conv import gather, reduce
from sepconv.kernels.halide.conv.elementwise import unreadable
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


def likes_of(group: ComputedGroup, read: Sequence[ValueLook], out: Tensor) -> list[Tensor]:
    """The layouts in which a group reads."""
    [x, *others], result = [look.meta for look in read], _outline(out)
    if isinstance(group, Elementwise):
        return [broadcastable(meta, out) if unreadable([_outline(meta)], result) else meta for meta in (x, *others)]
    if isinstance(group, RowNorm | Softmaxed):
        return [x if _side_by_side(x) else out]
    if isinstance(group, MatrixProduct):
        return [x, *(other if _side_by_side(other) else dense(other) for other in others)]
    if isinstance(group, Reduced):
        return [_reduced_last(x, group.detail.dims) if reduce.unreadable(_outline(x), result, group.detail.dims) else x]
    if isinstance(group, Gathered):
        return [broadcastable(x, out) if gather.unreadable(_outline(x), result, group.detail) else x]
    first = rows(x) if isinstance(group, Convolution) and group.dims == 0 else readable(group, x)
    return [first, *(readable(group, other) for other in others)]


def _outline(x: Tensor) -> Outline:
    return Outline.of(torch.empty_strided(x.shape, x.stride(), device="meta"))


def _side_by_side(x: Tensor) -> bool:
    """Whether the numbers along the last dimension lie so."""
    return x.stride(-1) == 1 or x.shape[-1] == 1


def _reduced_last(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Of that size, what is reduced side by side."""
    order = [*kept(x.shape, dims), *dims]
    return torch.empty([x.shape[d] for d in order], device="meta").permute([order.index(d) for d in range(x.dim())])


def result_strides(group: ComputedGroup, result: Tensor, read: Sequence[ValueLook]) -> Tensor:
    """Of a result that is no part of another."""
    x = read[0].meta
    if isinstance(group, Elementwise):
        return strides_for(result, read)
    if isinstance(group, RowNorm | Softmaxed | MatrixProduct):
        return torch.empty(result.shape, device="meta")
    if isinstance(group, Reduced):
        for d in sorted(group.detail.dims, reverse=True) if not group.keepdim else ():
            x = x.select(d, 0)
        return broadcastable(result, x)
    return broadcastable(result, x) if isinstance(group, Gathered) else dense(result)


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
