"""Values that a model rounds to whole numbers of 8 bits are kept as these: ``sepconv::fake_quantize`` in a graph.

That of a weight is found where constants are folded, that of a value behind what computes it: it says in
which numbers the result is kept, and is no operation any more. What is computed from such values in float32 is so
still; which kernels multiply whole numbers, ``storage`` asks.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from sepconv.compile.groups import ComputedGroup, Convolution, conversion
from sepconv.compile.numbers import NumberType
from sepconv.compile.passes.constants import constant
from sepconv.compile.passes.nodes import (
    NodeArguments,
    called,
    calls,
    group_of,
    is_reshape,
    replace,
    source,
    store_as,
    stored_as,
    swap,
)
from sepconv.compile.store import QuantizedConstant
from sepconv.ops.quantized import FAKE_QUANTIZE, HIGH, LOW

_CAT = torch.ops.aten.cat.default


def keep_quantized(graph: fx.Graph) -> None:
    """Let values be kept in the numbers that they are rounded to, in place."""
    known: dict[tuple[fx.Node, NumberType], fx.Node] = {}
    for node in calls(graph, FAKE_QUANTIZE):
        number = _number_of(node)
        if number is None:
            continue
        x = source(node)
        made = _maker(x)
        if stored_as(x) == number:
            replace(node, x)
        elif (x, number) in known:
            replace(node, known[x, number])
        elif made is not None:
            store_as(made, number)
            replace(node, x)
        else:
            known[x, number] = swap(node, conversion(), (x,))
            store_as(known[x, number], number)
    for kept in known.values():
        _read_at_once(kept)


def _read_at_once(kept: fx.Node) -> None:
    """Let the convolution that alone reads an input of the network round it as it reads."""
    x, number, users = source(kept), stored_as(kept), list(kept.users)
    conv = group_of(users[0], Convolution) if len(users) == 1 and x.op == "placeholder" else None
    if conv is not None and isinstance(conv.weight, QuantizedConstant) and users[0].args == (kept,):
        users[0].target = dataclasses.replace(conv, reads=number)
        replace(kept, x)


def _number_of(node: fx.Node) -> NumberType | None:
    """What a value is rounded to; None where it is none of our numbers."""
    given = NodeArguments(node)
    scale, zero = constant(given["scale"]), constant(given["zero_point"])
    if scale is None or zero is None or scale.tensor.numel() != 1 or zero.tensor.numel() != 1:
        return None
    if (given["low"], given["high"]) != (LOW, HIGH):
        return None
    return NumberType(torch.uint8, float(scale.tensor), int(zero.tensor))


def _maker(node: fx.Node) -> fx.Node | None:
    """What computes a value that nobody else reads as it is: a group, or a concatenation."""
    while len(node.users) == 1:
        if isinstance(node.target, ComputedGroup) or called(node, _CAT) is not None:
            return node if stored_as(node) is None else None
        if not is_reshape(node):
            return None
        node = source(node)
    return None
