"""Channel shuffles, however the model wrote them, as groups; the concatenation in front of one becomes part of it."""

from __future__ import annotations

import torch
from torch import fx

from sepconv.compile.groups import Shuffle
from sepconv.compile.numbers import not_computed
from sepconv.compile.passes.nodes import (
    NodeArguments,
    as_node,
    called,
    calls,
    number_of,
    refuse,
    shape,
    source,
    swap,
)

_aten = torch.ops.aten
_VIEWS = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default)
_SHUFFLES = (_aten.channel_shuffle.default, _aten.native_channel_shuffle.default)


def recognise_shuffles(graph: fx.Graph) -> None:
    """Turn channel shuffles of images into groups, in place."""
    for node in calls(graph, *_VIEWS, *_SHUFFLES):
        found = _shuffled(node)
        if found is None:
            continue
        x, parts = found
        reason = not_computed([number_of(x)], "the image is")
        if reason:
            refuse(node, reason)
            continue
        swap(node, Shuffle(parts), _halves(x) if parts == 2 else (x,))


def _shuffled(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The image that a node shuffles, and into how many parts its channels are cut; None if it does not."""
    size = shape(node)
    if len(size) != 4 or 0 in size:
        return None
    if called(node, *_SHUFFLES):
        return source(node), int(NodeArguments(node).float("groups"))
    turned = called(source(node), _aten.transpose.int, _aten.permute.default)
    cut = called(source(turned), *_VIEWS) if turned is not None and _swaps_parts(turned) else None
    if turned is None or cut is None or shape(source(cut)) != size:
        return None
    images, parts, channels, *image = shape(cut)
    whole = (images, parts * channels, *image) == size
    return (source(cut), parts) if whole and parts > 1 and channels > 1 else None


def _swaps_parts(turned: fx.Node) -> bool:
    """Whether five dimensions come out with the second and the third in each other's place."""
    if len(shape(turned)) != 5:
        return False
    if called(turned, _aten.transpose.int):
        return sorted(d % 5 for d in turned.args[1:] if isinstance(d, int)) == [1, 2]
    return NodeArguments(turned).ints("dims") == (0, 2, 1, 3, 4)


def _halves(x: fx.Node) -> tuple[fx.Node, ...]:
    """The two images whose channels alternate, where ``x`` is nothing but both."""
    parts = x.args[0] if called(x, _aten.cat.default) else None
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or NodeArguments(x)["dim"] not in (1, -3):
        return (x,)
    first, second = map(as_node, parts)
    same = shape(first) == shape(second) and number_of(first) == number_of(second)
    return (first, second) if same else (x,)
