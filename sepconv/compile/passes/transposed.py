"""Transposed convolutions as normal ones: what they make of each pixel are pixels side by side, channels at first.

A filter of k taps that takes s steps is s filters of k / s taps, one for each place between two pixels. They read the
same pixels, so that they are the channels of one convolution; its result is moved to where it belongs by a reshape.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from sepconv.compile.groups import Convolution, Epilogue, Numbers
from sepconv.compile.passes.activations import activation_of
from sepconv.compile.passes.moves import permute, view
from sepconv.compile.passes.nodes import NodeArguments, first_result, insert, per_dim, shape, source, value
from sepconv.compile.store import Constant, Store
from sepconv.kernels.case import Geometry

_aten = torch.ops.aten
_NORMS = (_aten.native_batch_norm.default, _aten._native_batch_norm_legit_no_training.default)


class _Axis(NamedTuple):
    """One dimension: the sizes before and after, the filter, and how it walks."""

    image: int
    out: int
    kernel: int
    stride: int
    padding: int

    @property
    def taps(self) -> int:
        """Of each of the filters of one place."""
        return -(-self.kernel // self.stride)

    @property
    def skipped(self) -> int:
        """Whole steps of what the padding cuts off; those that a convolution need not compute."""
        return min(self.padding // self.stride, self.taps - 1)

    @property
    def cut(self) -> int:
        """Pixels of the result that are still to be cut off at its beginning."""
        return self.padding - self.skipped * self.stride

    @property
    def steps(self) -> int:
        """Results of the convolution."""
        return -(-(self.cut + self.out) // self.stride)

    @property
    def amounts(self) -> tuple[int, int]:
        """Padding of the convolution, low and high; the latter may be negative."""
        low = self.taps - 1 - self.skipped
        return low, self.steps + self.taps - 1 - low - self.image


def sub_pixel(node: fx.Node, weight: Constant, bias: Constant | None, store: Store) -> bool:
    """Let a normal convolution and reshapes compute a transposed one of images, if they can."""
    given, x = NodeArguments(node), source(node)
    dims = len(shape(node)) - 2
    if dims != 2 or set(given.ints("dilation")) != {1} or 0 in shape(node):
        return False
    walk = zip(*(per_dim(given.ints(name), dims) for name in ("stride", "padding")), strict=True)
    axes = [
        _Axis(before, after, taps, *how)
        for before, after, taps, how in zip(shape(x)[2:], shape(node)[2:], weight.shape[2:], walk, strict=True)
    ]
    if any(high < 0 for _, high in (axis.amounts for axis in axes)):
        return False
    groups, strides = int(given.float("groups")), tuple(axis.stride for axis in axes)
    key = ("sub pixel", weight.key, groups, strides)
    filters = store.derived(key, partial(_filters, weight, groups, strides))
    offsets = None if bias is None else store.get((*key, bias.key), partial(_repeated, bias, groups, prod(strides)))
    geometry = Geometry((1, 1), tuple(axis.amounts for axis in axes), (1, 1))
    conv = Convolution(filters, Epilogue(offsets), geometry, groups)
    _write(node, x, conv, axes)
    return True


def _filters(weight: Constant, groups: int, strides: Numbers) -> Tensor:
    """(I, O / G, kh, kw) -> (G, sh, sw, O / G as outputs, I / G, taps ...): the filters of one place side by side."""
    inputs, outputs, *kernel = weight.shape
    taps = [-(-size // step) for size, step in zip(kernel, strides, strict=True)]
    missing = [amount for size, step, n in zip(kernel, strides, taps, strict=True) for amount in (step * n - size, 0)]
    whole = F.pad(weight.tensor, missing[::-1])
    apart = whole.view(groups, inputs // groups, outputs, taps[0], strides[0], taps[1], strides[1])
    turned = apart.permute(0, 4, 6, 2, 1, 3, 5).flip(5, 6)
    return turned.reshape(groups * prod(strides) * outputs, inputs // groups, *taps).contiguous()


def _repeated(bias: Constant, groups: int, places: int) -> Tensor:
    """The offset of each channel at every place."""
    return bias.tensor.view(groups, 1, -1).expand(groups, places, -1).reshape(-1).contiguous()


def _write(node: fx.Node, x: fx.Node, conv: Convolution, axes: list[_Axis]) -> None:
    """What follows number by number is done before the edges are cut off, so that the convolution can take it in."""
    (n, channels, *_), groups = shape(node), conv.groups
    steps, strides = [axis.steps for axis in axes], [axis.stride for axis in axes]
    like = value(x).new_empty([n, conv.out_channels, *steps])
    made = insert(node.graph, node, conv, (x,), like)
    apart = view(node, made, [n, groups, *strides, channels // groups, *steps])
    turned = permute(node, apart, [0, 1, 4, 5, 2, 6, 3])
    whole = view(node, turned, [n, channels, *(a * b for a, b in zip(steps, strides, strict=True))])
    size = shape(node)
    node.replace_all_uses_with(whole)
    node.graph.erase_node(node)
    end = whole
    for end in _number_by_number(whole):
        end.meta["val"] = value(end).new_empty([n, channels, *shape(whole)[2:]])
    _cut(end, axes, size)


def _number_by_number(node: fx.Node) -> Iterator[fx.Node]:
    """A norm and an activation that alone read a value, one after the other."""
    yield node
    while len(node.users) == 1:
        [user] = node.users
        if user.args[0] is not node:
            return
        norm = first_result(user) if user.target in _NORMS and not _of_the_batch(user) else None
        if norm is None and not activation_of(user):
            return
        node = norm or user
        yield node


def _of_the_batch(norm: fx.Node) -> bool:
    """Whether a norm has the statistics of what it reads."""
    return norm.target is _NORMS[0] and bool(NodeArguments(norm)["training"])


def _cut(whole: fx.Node, axes: list[_Axis], size: tuple[int, ...]) -> None:
    """Let all that read an image read the part of it that has this size."""
    readers, part = list(whole.users), whole
    for d, axis in enumerate(axes, start=2):
        if shape(part)[d] != size[d]:
            cut = value(part).narrow(d, axis.cut, size[d])
            part = insert(whole.graph, part.next, _aten.slice.Tensor, (part, d, axis.cut, axis.cut + size[d]), cut)
    for reader in readers if part is not whole else ():
        reader.replace_input_with(whole, part)
