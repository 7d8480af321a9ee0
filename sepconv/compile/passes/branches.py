"""Convolutions of the same image whose results are added are one convolution, with the sum of their weights.

Networks that are trained in branches (RepVGG, MobileOne, RepViT, FastViT) are folded this way by their authors before
they are used: a 3x3 filter, a 1x1 filter and the image itself, each with a batch norm. Here nobody has to.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from sepconv.compile.groups import Convolution, Epilogue, Numbers
from sepconv.compile.passes.nodes import as_node, operands, producer, shape, swap
from sepconv.compile.store import Constant, Store
from sepconv.kernels.case import Geometry

_aten = torch.ops.aten


def merge_branches(node: fx.Node, store: Store) -> bool:
    """``first(x) + second(x)`` and ``first(x) - second(x)`` in place; x itself counts as a branch."""
    if node.kwargs or node.target not in (_aten.add.Tensor, _aten.sub.Tensor):
        return False
    sign = -1 if node.target is _aten.sub.Tensor else 1
    for (value_, other), signs in zip(operands(node), ((1, sign), (sign, 1)), strict=True):
        first = _branch(value_)
        if first is None or shape(as_node(value_)) != shape(node):
            continue
        second = _other_branch(first, other, store)
        merged = None if second is None else _merged(first.group, second.group, signs, store)
        if second is not None and merged is not None:
            swap(node, merged, (first.node.args[0],))
            for source in dict.fromkeys((first.node, second.node)):
                if not source.users and isinstance(source.target, Convolution):
                    source.graph.erase_node(source)
            return True
    return False


class _Branch(NamedTuple):
    """A convolution with nothing behind it yet, and its node; that of the image for the image itself."""

    node: fx.Node
    group: Convolution


def _branch(node: object) -> _Branch | None:
    found = producer(node, Convolution)
    if found is None or found[1] or not found[2].epilogue.is_linear or not found[2].dims:
        return None
    return _Branch(found[0], found[2])


def _other_branch(first: _Branch, other: object, store: Store) -> _Branch | None:
    x = as_node(first.node.args[0])
    if other is x:
        channels = first.group.in_channels
        return _Branch(x, _identity(channels, first.group.dims, store)) if shape(x) == shape(first.node) else None
    found = _branch(other)
    if found is None or found.node is first.node or found.node.args[0] is not x:
        return None
    return found if shape(found.node) == shape(first.node) else None


def _identity(channels: int, dims: int, store: Store) -> Convolution:
    """The image as a depthwise convolution with filters of one pixel, which are 1."""
    ones = store.get(("ones", channels, dims), lambda: torch.ones(channels, 1, *[1] * dims))
    return Convolution(ones, Epilogue(), Geometry.of_pixels(dims), channels)


class _Frame(NamedTuple):
    """The filter that holds those of both branches: its size and geometry, and where each begins in it."""

    size: Numbers
    geometry: Geometry
    first: Numbers
    second: Numbers


def _merged(first: Convolution, second: Convolution, signs: tuple[int, int], store: Store) -> Convolution | None:
    """One convolution for the sum of both; None where there is none, or it has more weights than both together."""
    if first.groups > second.groups:
        first, second, signs = second, first, signs[::-1]
    frame, groups = _frame(first, second), first.groups
    if frame is None or (groups != second.groups and not _is_diagonal(second)):
        return None
    per_output = first.weight.shape[1]
    count = first.out_channels * per_output
    for size in frame.size:
        count *= size
    if count > first.weight.shape.numel() + second.weight.shape.numel():
        return None
    keys = (first.weight.key, second.weight.key)
    parts = ((first.weight, signs[0], frame.first), (second.weight, signs[1], frame.second))
    out_shape = (first.out_channels, per_output, *frame.size)
    diagonal = groups != second.groups

    def make() -> Tensor:
        total = torch.zeros(out_shape, dtype=torch.float64)
        for i, (weight, sign, start) in enumerate(parts):
            known = weight.tensor.double()
            known = _on_diagonal(known, per_output) if i and diagonal else known
            total += sign * F.pad(known, _around(known.shape[2:], start, frame.size))
        return total.to(first.weight.number.storage)

    weight = store.derived(("branches", *keys, signs, frame, groups), make)
    bias = _sum_of_biases(first, second, signs, store)
    fused = max(first.fused, second.fused, key=len)
    return Convolution(weight, Epilogue(bias), frame.geometry, groups, (*fused, "add"))


def _around(size: Numbers, start: Numbers, whole: Numbers) -> list[int]:
    """The zeros around a filter in a larger one, as F.pad takes them: the last dimension first."""
    amounts = [(low, full - low - own) for own, low, full in zip(size, start, whole, strict=True)]
    return [amount for pair in reversed(amounts) for amount in pair]


def _is_diagonal(conv: Convolution) -> bool:
    """Whether every channel depends on itself alone."""
    return conv.groups == conv.in_channels == conv.out_channels


def _on_diagonal(weight: Tensor, per_output: int) -> Tensor:
    """Depthwise filters (C, 1, ...) as those of groups of so many channels."""
    channels = torch.arange(len(weight))
    spread = weight.new_zeros(len(weight), per_output, *weight.shape[2:])
    spread[channels, channels % per_output] = weight[:, 0]
    return spread


def _sum_of_biases(first: Convolution, second: Convolution, signs: tuple[int, int], store: Store) -> Constant | None:
    known = [(conv.epilogue.bias, sign) for conv, sign in zip((first, second), signs, strict=True)]
    biases = [(bias, sign) for bias, sign in known if bias is not None]
    if not biases:
        return None
    total = sum((sign * bias.tensor.double() for bias, sign in biases), torch.zeros((), dtype=torch.float64))
    key = ("biases", *((bias.key, sign) for bias, sign in biases))
    return store.get(key, lambda: total.to(biases[0][0].number.storage).contiguous())


def _frame(first: Convolution, second: Convolution) -> _Frame | None:
    """None where the taps of both do not lie on one grid."""
    if first.geometry.stride != second.geometry.stride or first.in_channels != second.in_channels:
        return None
    found = [_along(first, second, d) for d in range(first.dims)]
    along = [item for item in found if item is not None]
    if len(along) < len(found):
        return None
    geometry = Geometry(
        first.geometry.stride, tuple(item.padding for item in along), tuple(item.dilation for item in along)
    )
    starts = [tuple(item.starts[i] for item in along) for i in (0, 1)]
    return _Frame(tuple(item.size for item in along), geometry, starts[0], starts[1])


class _Along(NamedTuple):
    """A frame in one dimension."""

    size: int
    padding: tuple[int, int]
    dilation: int
    starts: tuple[int, int]


def _along(first: Convolution, second: Convolution, d: int) -> _Along | None:
    sizes = [conv.kernel_size[d] for conv in (first, second)]
    lows, highs = ([conv.geometry.padding[d][end] for conv in (first, second)] for end in (0, 1))
    # Between the taps of a single one there is no step.
    steps = {conv.geometry.dilation[d] for conv, size in zip((first, second), sizes, strict=True) if size > 1}
    step = steps.pop() if steps else 1
    if steps or (lows[0] - lows[1]) % step:
        return None
    low = max(lows)
    ends = [step * (size - 1) - start for size, start in zip(sizes, lows, strict=True)]
    high = highs[0] - ends[0] + max(ends)
    return _Along((max(ends) + low) // step + 1, (low, high), step, ((low - lows[0]) // step, (low - lows[1]) // step))
