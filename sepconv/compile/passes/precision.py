"""What groups hand to one another in float32 is kept in bfloat16: half the bytes, and products for which a processor
may have instructions of their own.

Only how values are stored changes. Sums and what follows them are in float32, as is what PyTorch's operations read.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx
from torch._ops import OpOverload

from sepconv.compile.groups import ComputedGroup, Convolution, SeparableGroup
from sepconv.compile.numbers import BFLOAT16, FLOAT32
from sepconv.compile.passes.nodes import called, number_of, store_as, stored_as

_CAT = torch.ops.aten.cat.default


def store_in_bfloat16(graph: fx.Graph) -> None:
    """Choose for every value of a rewritten graph, in place."""
    for node in graph.nodes:
        joined = called(node, _CAT) is not None and all(stored_as(part) == BFLOAT16 for part in node.all_input_nodes)
        if (isinstance(node.target, ComputedGroup) or joined) and _is_float32(node) and _pays(node):
            store_as(node, BFLOAT16)


def _is_float32(node: fx.Node) -> bool:
    """What the model rounds to bytes stays so."""
    return stored_as(node) is None and number_of(node) == FLOAT32


def _pays(node: fx.Node) -> bool:
    """Whether a convolution reads the value, or groups alone."""
    readers = list(_readers(node))
    if any(isinstance(reader.target, (Convolution, SeparableGroup)) for reader in readers):
        return True
    return bool(readers) and all(isinstance(reader.target, ComputedGroup) for reader in readers)


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Who computes with the value, wherever it is seen as a part of another."""
    for user in node.users:
        if called(user, _CAT) or _is_view(user):
            yield from _readers(user)
        else:
            yield user


def _is_view(node: fx.Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return False
    returns = node.target._schema.returns
    return bool(returns) and all(returned.alias_info is not None for returned in returns)
