"""Numbers that only go to other places, however the model wrote it, as views, reshapes and concatenations.

Views cost nothing, other passes look through them, and what is left is a copy (see ``compile.moves``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from sepconv.compile.passes.nodes import NodeArguments, Target, as_node, calls, insert, shape, source, swap, value

_aten = torch.ops.aten


def spell_moves(graph: fx.Graph) -> None:
    """Write pixel shuffles, stacks and repetitions so, in place."""
    for target, spell in _SPELLED.items():
        for node in calls(graph, target):
            spell(node)


def view(node: fx.Node, x: fx.Node, size: Sequence[int]) -> fx.Node:
    """The numbers of ``x`` in another shape, in front of ``node``."""
    return insert(node.graph, node, _aten.view.default, (x, list(size)), value(x).reshape(list(size)))


def permute(node: fx.Node, x: fx.Node, order: Sequence[int]) -> fx.Node:
    return insert(node.graph, node, _aten.permute.default, (x, list(order)), value(x).permute(list(order)))


def _to_pixels(node: fx.Node) -> None:
    x, factor = source(node), int(NodeArguments(node).float("upscale_factor"))
    if len(shape(node)) == 4:
        n, c, h, w = shape(node)
        apart = view(node, x, [n, c, factor, factor, h // factor, w // factor])
        swap(node, _aten.view.default, (permute(node, apart, [0, 1, 4, 2, 5, 3]), [n, c, h, w]))


def _to_channels(node: fx.Node) -> None:
    x, factor = source(node), int(NodeArguments(node).float("downscale_factor"))
    if len(shape(node)) == 4:
        (n, c, _, _), (*_, h, w) = shape(x), shape(node)
        apart = view(node, x, [n, c, h, factor, w, factor])
        swap(node, _aten.view.default, (permute(node, apart, [0, 1, 3, 5, 2, 4]), list(shape(node))))


def _stack(node: fx.Node) -> None:
    given, parts = NodeArguments(node), node.args[0]
    assert isinstance(parts, (list, tuple))
    dim = int(given.float("dim")) % len(shape(node))
    apart = [
        insert(node.graph, node, _aten.unsqueeze.default, (part, dim), value(as_node(part)).unsqueeze(dim))
        for part in parts
    ]
    swap(node, _aten.cat.default, (apart, dim))


def _repeat(node: fx.Node) -> None:
    """Every dimension that is repeated gets one before it, along which all is the same."""
    x, repeats = source(node), NodeArguments(node).ints("repeats")
    missing = len(repeats) - len(shape(x))
    apart: list[int] = []
    whole: list[int] = []
    for size, times in zip([1] * missing + list(shape(x)), repeats, strict=True):
        apart += [size] if times == 1 or size == 1 else [1, size]
        whole += [size] if times == 1 else [times] if size == 1 else [times, size]
    seen = view(node, x, apart)
    grown = insert(node.graph, node, _aten.expand.default, (seen, whole), value(seen).expand(whole))
    swap(node, _aten.view.default, (grown, list(shape(node))))


_SPELLED: dict[Target, Callable[[fx.Node], None]] = {
    _aten.pixel_shuffle.default: _to_pixels,
    _aten.pixel_unshuffle.default: _to_channels,
    _aten.stack.default: _stack,
    _aten.repeat.default: _repeat,
}
