"""Concatenations of channels without copies: what is concatenated is computed where it belongs in the result.

Images are channels_last, so that the parts of a concatenation are channels of one larger image, which kernels write and
read in place. A concatenation that begins another one (every layer of a DenseNet reads all before it) is a part of the
other's memory. Where an operation cannot write there, its result is copied once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import fx

from sepconv.compile.groups import writes_channels
from sepconv.compile.passes.nodes import NodeArguments, as_node, called, number_of, shape, value


class Home(NamedTuple):
    """Where a value lies: in the result of a concatenation, from a channel on."""

    join: fx.Node
    channel: int


def homes(graph: fx.Graph) -> dict[fx.Node, Home]:
    """The values that are to lie in the result of a concatenation: the parts, and concatenations within larger ones."""
    found: dict[fx.Node, Home] = {}
    known: dict[fx.Node, bool] = {}
    joins = [node for node in graph.nodes if _is_join(node, known)]
    for node in reversed(joins):
        parts = list(_placed(node))
        first = found.get(parts[0].node)
        if first is not None and node not in found and _in_order(parts, first, found):
            found[node] = first
            continue
        join, channel = found.setdefault(node, Home(node, 0))
        for part in parts:
            found.setdefault(part.node, Home(join, channel + part.channel))
    return found


def _in_order(parts: list[_Placed], first: Home, found: dict[fx.Node, Home]) -> bool:
    """Whether parts lie one behind the other already."""
    return all(found.get(part.node) == Home(first.join, first.channel + part.channel) for part in parts)


class _Placed(NamedTuple):
    """What a concatenation puts together, and where it belongs in the result."""

    node: fx.Node
    channel: int


def _placed(join: fx.Node) -> Iterator[_Placed]:
    channel = 0
    for node in parts_of(join):
        yield _Placed(node, channel)
        channel += shape(node)[1]


def parts_of(join: fx.Node) -> list[fx.Node]:
    """What a concatenation puts together."""
    given = join.args[0]
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{join} puts no list together")
    return [as_node(part) for part in given]


def dim_of(join: fx.Node) -> int:
    """Along which dimension."""
    dim = NodeArguments(join)["dim"]
    if not isinstance(dim, int):
        raise TypeError(f"{join} puts together along no dimension but {dim!r}")
    return dim % len(shape(join))


def _is_join(node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    """Whether a node puts channels of images together, of which a kernel of ours writes some."""
    if node not in known:
        known[node] = called(node, torch.ops.aten.cat.default) is not None and _of_images(node, known)
    return known[node]


def _of_images(join: fx.Node, known: dict[fx.Node, bool]) -> bool:
    parts, size = parts_of(join), shape(join)
    alike = all(len(shape(part)) == 4 and number_of(part) == number_of(join) for part in parts)
    if len(size) != 4 or dim_of(join) != 1 or not alike or value(join).numel() == 0:
        return False
    return any(writes_channels(part.target) or _is_join(part, known) for part in parts)
