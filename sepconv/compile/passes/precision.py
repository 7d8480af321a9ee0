"""What groups hand to one another in float32 is kept in bfloat16: half the bytes, and products for which a processor
may have instructions of their own.

Only how values are stored changes. Sums and what follows them are in float32, as is what PyTorch's operations read.
What is read by small steps alone stays in float32, and these say so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import fx
from torch._ops import OpOverload

from sepconv.compile.groups import ComputedGroup, Convolution, SeparableGroup
from sepconv.compile.numbers import BFLOAT16, FLOAT32
from sepconv.compile.passes.nodes import called, number_of, refuse, refused, shape, source, store_as, stored_as, value
from sepconv.kernels.halide.conv import tiles
from sepconv.kernels.halide.jit import amx
from sepconv.kernels.halide.schedule import machine

_CAT = torch.ops.aten.cat.default
_CONVOLUTIONS = (Convolution, SeparableGroup)
# Measured on Granite Rapids, each kind of step many times over, against the same in float32. Below this many
# multiply-adds to round and to call takes what is gained, but for weights that the nearest cache does not hold; sums of
# fewer channels than a tile is deep, of images that stay in a cache, lose at any size (0.7 to 0.95).
FEW_MACS = {"pointwise": 10_000, "linear": 10_000, "depthwise": 20_000}
FEW_MACS_OF_OTHERS, MANY_WEIGHTS = 80_000, 1 << 15
FEW_NUMBERS = 1 << 14
"""Of a value that no convolution reads: fewer are as fast in float32."""


def store_in_bfloat16(graph: fx.Graph) -> None:
    """Choose for every value of a rewritten graph, in place."""
    for node in graph.nodes:
        if isinstance(node.target, _CONVOLUTIONS) and (reason := _no_gain(node, node.target)):
            refuse(node, reason)
    for node in graph.nodes:
        joined = called(node, _CAT) is not None and all(stored_as(part) == BFLOAT16 for part in node.all_input_nodes)
        if (isinstance(node.target, ComputedGroup) or joined) and _is_float32(node) and _pays(node):
            store_as(node, BFLOAT16)


def _no_gain(node: fx.Node, group: Convolution | SeparableGroup) -> str:
    """Why a step gains nothing in bfloat16, in a sentence; "" if it does."""
    product = group.pointwise if isinstance(group, SeparableGroup) else group
    depth = product.in_channels if group.kind in ("separable", "pointwise") else amx.ROW_BYTES
    cached = 4 * (value(source(node)).numel() + value(node).numel()) < machine.host().l2_bytes
    if depth < amx.ROW_BYTES // 2 and cached and tiles.unit() == "AMX":
        return f"{depth} channels fill no tile"
    macs, few = group.macs(shape(node)), FEW_MACS.get(group.kind, FEW_MACS_OF_OTHERS)
    small = macs <= few and math.prod(product.weight.shape) < MANY_WEIGHTS
    return f"{macs:,} multiply-adds gain nothing in bfloat16" if small else ""


def _is_float32(node: fx.Node) -> bool:
    """What the model rounds to bytes stays so."""
    return stored_as(node) is None and number_of(node) == FLOAT32


def _pays(node: fx.Node) -> bool:
    """Whether a convolution that gains by it reads the value, or groups alone."""
    readers = list(_readers(node))
    convolutions = [reader for reader in readers if isinstance(reader.target, _CONVOLUTIONS)]
    if convolutions:
        return not all(map(refused, convolutions))
    large = value(node).numel() > FEW_NUMBERS
    return large and bool(readers) and all(isinstance(reader.target, ComputedGroup) for reader in readers)


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
