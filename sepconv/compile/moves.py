"""Numbers that only go to other places: what no view of the same memory can express, as copies.

A copy reads and writes views of one size. So a reshape across gaps is one copy, wherever the sizes before and after it
can be split into the same smaller ones, and the result has whatever layout is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from operator import mul

import torch
from torch import Tensor, fx

from sepconv.compile.looks import ValueLook, dense
from sepconv.compile.passes.nodes import is_call, shape, value
from sepconv.compile.program import Copy
from sepconv.compile.writer import Writer

_aten = torch.ops.aten
_TURNS = (_aten.permute.default, _aten.transpose.int, _aten.view.default, _aten._unsafe_view.default)


def split_alike(before: Sequence[int], after: Sequence[int]) -> tuple[int, ...] | None:
    """The largest sizes that both shapes can be split into; None if there are none."""
    if 0 in before:
        return None
    ends = sorted({1, *accumulate(reversed(before), mul), *accumulate(reversed(after), mul)})
    if any(end % start for start, end in pairwise(ends)):
        return None
    return tuple(end // start for start, end in pairwise(ends))[::-1]


def layout_of(node: fx.Node) -> Tensor:
    """The layout that a reshape gives its result: that of images where kernels read it, unless it is turned first."""
    turned = all(is_call(user, *_TURNS) for user in node.users)
    return torch.empty(shape(node), device="meta") if turned else dense(value(node))


def reshaped(written: Writer, look: ValueLook, like: Tensor) -> ValueLook:
    """The numbers of a value in their order, with the size and the strides of ``like``."""
    sizes = split_alike(look.meta.shape, like.shape)
    if sizes is None:
        whole = written.in_layout(look, torch.empty(look.meta.shape, device="meta"))
        return whole.seen_as(whole.meta.view(like.shape))
    out = written.new(like, like, look.number)
    written.step(Copy("reshape"), [look.seen_as(look.meta.view(sizes))], [out.seen_as(out.meta.view(sizes))])
    return out


def put_together(written: Writer, parts: Sequence[ValueLook], dim: int, whole: ValueLook) -> ValueLook:
    """A concatenation: what does not lie in it yet is copied there."""
    start = 0
    for part in parts:
        size = part.meta.shape[dim]
        written.put(part, whole.seen_as(whole.meta.narrow(dim, start, size)))
        start += size
    return whole
