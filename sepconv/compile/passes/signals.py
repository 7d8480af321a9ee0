"""Signals are images of one row where only images have kernels: for normal convolutions, and for whole numbers.

Reshapes cost nothing. What lies between two such layers never becomes a signal again.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from torch import Tensor, fx

from sepconv.compile.groups import Convolution
from sepconv.compile.passes.nodes import as_node, called, group_of, insert, shape, store_as, stored_as, swap, value
from sepconv.compile.store import Constant, QuantizedConstant, Store
from sepconv.kernels.case import Geometry

_aten = torch.ops.aten
_ROW = 2
"""The dimension that a signal has not."""


def signals_to_images(graph: fx.Graph, store: Store) -> None:
    """Let images' convolutions compute those of signals that have no kernel, in place."""
    for node in list(graph.nodes):
        conv = group_of(node, Convolution)
        if conv is None or conv.dims != 1:
            continue
        if conv.kind in ("normal", "grouped") or isinstance(conv.weight, QuantizedConstant):
            rows = tuple(_with_row(as_node(x), node) for x in node.args)
            image = insert(graph, node, _of_images(conv, store), rows, value(node).unsqueeze(_ROW))
            if (kept := stored_as(node)) is not None:
                store_as(image, kept)
            swap(node, _aten.squeeze.dim, (image, _ROW))
    graph.eliminate_dead_code()


def _with_row(x: fx.Node, before: fx.Node) -> fx.Node:
    """A signal (N, C, L) as (N, C, 1, L); the image itself where it comes from one."""
    without = called(x, _aten.squeeze.dim)
    if without is not None and without.args[1] == _ROW and len(shape(as_node(without.args[0]))) == 4:
        return as_node(without.args[0])
    return insert(x.graph, before, _aten.unsqueeze.default, (x, _ROW), value(x).unsqueeze(_ROW))


def _of_images(conv: Convolution, store: Store) -> Convolution:
    stride, padding, dilation = conv.geometry
    walk = Geometry((1, *stride), ((0, 0), *padding), (1, *dilation))
    return dataclasses.replace(conv, weight=_weight(conv.weight, store), geometry=walk)


def _weight(weight: Constant, store: Store) -> Constant:
    if not isinstance(weight, QuantizedConstant):
        return store.derived(("row", weight.key), partial(_in_a_row, weight))
    whole = store.derived(("row", weight.whole.key), partial(_in_a_row, weight.whole))
    return store.quantized(("row", weight.key), whole, weight.scale)


def _in_a_row(weight: Constant) -> Tensor:
    return weight.tensor.unsqueeze(_ROW)
