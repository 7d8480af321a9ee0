"""Normal convolutions of signals as those of images of one row, for which there are kernels. Reshapes cost nothing."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from torch import Tensor, fx

from sepconv.compile.groups import Convolution
from sepconv.compile.passes.nodes import as_node, called, group_of, insert, shape, swap, value
from sepconv.compile.store import Constant, QuantizedConstant, Store
from sepconv.kernels.case import Geometry

_aten = torch.ops.aten
_ROW = 2
"""The dimension that a signal has not."""


def signals_of_one_row(graph: fx.Graph, store: Store) -> None:
    """Let images' convolutions compute those of signals that have no kernel, in place."""
    for node in list(graph.nodes):
        conv = group_of(node, Convolution)
        if conv is None or conv.dims != 1 or conv.kind not in ("normal", "grouped"):
            continue
        if not isinstance(conv.weight, QuantizedConstant):
            given = tuple(_with_row(as_node(x), node) for x in node.args)
            image = insert(graph, node, _of_images(conv, store), given, value(node).unsqueeze(_ROW))
            swap(node, _aten.squeeze.dim, (image, _ROW))
    graph.eliminate_dead_code()


def _with_row(x: fx.Node, before: fx.Node) -> fx.Node:
    """A signal (N, C, L) as (N, C, 1, L)."""
    without = called(x, _aten.squeeze.dim)
    if without is not None and without.args[1] == _ROW and len(shape(as_node(without.args[0]))) == 4:
        return as_node(without.args[0])
    return insert(x.graph, before, _aten.unsqueeze.default, (x, _ROW), value(x).unsqueeze(_ROW))


def _of_images(conv: Convolution, store: Store) -> Convolution:
    weight = store.derived(("row", conv.weight.key), partial(_in_a_row, conv.weight))
    stride, padding, dilation = conv.geometry
    return dataclasses.replace(conv, weight=weight, geometry=Geometry((1, *stride), ((0, 0), *padding), (1, *dilation)))


def _in_a_row(weight: Constant) -> Tensor:
    return weight.tensor.unsqueeze(_ROW)
