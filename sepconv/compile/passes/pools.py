"""Max and average pools over windows of pixels, as groups."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from sepconv.compile.groups import WindowPool
from sepconv.compile.numbers import not_computed
from sepconv.compile.passes.nodes import (
    NodeArguments,
    called,
    calls,
    first_result,
    number_of,
    refuse,
    shape,
    source,
    swap,
)
from sepconv.kernels.case import Geometry, Window

_aten = torch.ops.aten
_MAX = _aten.max_pool2d_with_indices.default
_MEAN = _aten.avg_pool2d.default
_ADAPTIVE = (_aten._adaptive_avg_pool2d.default, _aten.adaptive_avg_pool2d.default)
_ADAPTIVE_MAX = _aten.adaptive_max_pool2d.default
_WITH_PLACES = (_MAX, _ADAPTIVE_MAX)


def recognise_pools(graph: fx.Graph) -> None:
    """Turn pools of images into groups, in place."""
    for node in calls(graph, _MEAN, *_WITH_PLACES, *_ADAPTIVE):
        result = first_result(node) if node.target in _WITH_PLACES else node
        x = source(node)
        # A signal is an image of one row, but its layers read it contiguous.
        if result is None or len(shape(x)) != 4 or called(x, _aten.unsqueeze.default) is not None:
            continue
        group = _group(node, shape(x)[2:], shape(result)[2:])
        reason = not_computed([number_of(x)], "the image is")
        if reason:
            refuse(node, reason)
        elif group is not None:
            swap(result, group, (x,))
            if result is not node:
                graph.erase_node(node)


def _group(node: fx.Node, image: tuple[int, ...], out: tuple[int, ...]) -> WindowPool | None:
    given = NodeArguments(node)
    if node.target in (*_ADAPTIVE, _ADAPTIVE_MAX):
        return _adaptive(image, out, mean=node.target is not _ADAPTIVE_MAX)
    kernel, padding = _pair(given.ints("kernel_size")), _pair(given.ints("padding"))
    stride = _pair(given.ints("stride")) or kernel
    ceil, padded = bool(given["ceil_mode"]), tuple((amount, amount) for amount in padding)
    if node.target is _MEAN:
        divisor = given["divisor_override"]
        window = Window(kernel, True, bool(given["count_include_pad"]), divisor if isinstance(divisor, int) else 0)
        return WindowPool(window, Geometry(stride, padded, (1, 1)), ceil)
    geometry = Geometry(stride, padded, _pair(given.ints("dilation")))
    return WindowPool(Window(kernel), geometry, ceil)


def _adaptive(image: tuple[int, ...], out: tuple[int, ...], mean: bool) -> WindowPool:
    """Windows of one size where there are so many, else the image shared out."""
    if all(size % count == 0 for size, count in zip(image, out, strict=True)):
        size = tuple(size // count for size, count in zip(image, out, strict=True))
        return WindowPool(Window(size, mean=mean), Geometry(size, ((0, 0),) * 2, (1, 1)))
    largest = [max(_ends(size, count)) for size, count in zip(image, out, strict=True)]
    steps = tuple(-(-size // count) for size, count in zip(image, out, strict=True))
    return WindowPool(Window(tuple(largest), mean=mean, shares=out), Geometry(steps, ((0, 0),) * 2, (1, 1)))


def _ends(size: int, count: int) -> list[int]:
    """How many pixels each of so many results looks at."""
    return [-(-(i + 1) * size // count) - i * size // count for i in range(count)]


def _pair(given: Sequence[int]) -> tuple[int, ...]:
    return tuple(given) * (2 if len(given) == 1 else 1)
