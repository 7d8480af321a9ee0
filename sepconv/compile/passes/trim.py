"""Taps of filters that meet nothing but padding, in images of this size: they are cut off.

A filter whose taps lie 24 pixels apart (the pyramids of DeepLab) has one tap left on an image of 14 x 14.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

from torch import Tensor, fx

from sepconv.compile.groups import Convolution
from sepconv.compile.passes.nodes import group_of, shape, source
from sepconv.compile.store import Constant, QuantizedConstant, Store


class _Axis(NamedTuple):
    """A filter along one dimension: so many taps, the sizes of image and result, and how it walks."""

    taps: int
    image: int
    out: int
    stride: int
    padding: tuple[int, int]
    dilation: int

    def meets_image(self, tap: int) -> bool:
        start = tap * self.dilation - self.padding[0]
        places = range(start, start + self.out * self.stride, self.stride)
        return any(0 <= place < self.image for place in places)

    def kept(self) -> tuple[int, int]:
        """The first tap that is needed, and the first after them. No padding becomes negative."""
        needed = [tap for tap in range(self.taps) if self.meets_image(tap)] or [0, self.taps - 1]
        low, high = (amount // self.dilation for amount in self.padding)
        return min(needed[0], low), max(needed[-1] + 1, self.taps - high)


def trim(graph: fx.Graph, store: Store) -> None:
    """Cut the filters of a graph, in place."""
    for node in graph.nodes:
        conv = group_of(node, Convolution)
        if conv is not None and conv.dims and 0 not in shape(node):
            node.target = _trimmed(conv, shape(source(node))[2:], shape(node)[2:], store)


def _trimmed(conv: Convolution, image: tuple[int, ...], out: tuple[int, ...], store: Store) -> Convolution:
    axes = [_Axis(*axis) for axis in zip(conv.kernel_size, image, out, *conv.geometry, strict=True)]
    kept = tuple(axis.kept() for axis in axes)
    if kept == tuple((0, axis.taps) for axis in axes):
        return conv
    padding = tuple(
        (axis.padding[0] - first * axis.dilation, axis.padding[1] - (axis.taps - end) * axis.dilation)
        for axis, (first, end) in zip(axes, kept, strict=True)
    )
    cut = (slice(None), slice(None), *(slice(*taps) for taps in kept))
    key, weight = ("trimmed", conv.weight.key, kept), conv.weight
    if isinstance(weight, QuantizedConstant):
        whole = store.derived((*key, "whole"), partial(_cut, weight.whole, cut))
        weight = store.quantized(key, whole, weight.scale)
    else:
        weight = store.derived(key, partial(_cut, weight, cut))
    return replace(conv, weight=weight, geometry=conv.geometry._replace(padding=padding))


def _cut(weight: Constant, cut: tuple[slice, ...]) -> Tensor:
    return weight.tensor[cut].contiguous()
