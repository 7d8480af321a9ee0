"""Normal convolutions of signals as those of images of one row, for which there are kernels. Reshapes cost nothing."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, fx

from sepconv.compile.groups import Convolution, Epilogue
from sepconv.compile.passes.nodes import insert, source, swap, value
from sepconv.compile.store import Constant, QuantizedConstant, Store
from sepconv.kernels.case import Geometry

_aten = torch.ops.aten
ROW = 2
"""The dimension that a signal has not."""


def of_one_row(node: fx.Node, conv: Convolution, store: Store) -> bool:
    """Let an image's convolution compute that of a signal, if no kernel for signals does."""
    if conv.dims != 1 or conv.kind not in ("normal", "grouped") or isinstance(conv.weight, QuantizedConstant):
        return False
    weight = store.derived(("row", conv.weight.key), partial(_in_a_row, conv.weight))
    stride, padding, dilation = conv.geometry
    walk = Geometry((1, *stride), ((0, 0), *padding), (1, *dilation))
    made = Convolution(weight, Epilogue(conv.epilogue.bias), walk, conv.groups)
    x = source(node)
    row = insert(node.graph, node, _aten.unsqueeze.default, (x, ROW), value(x).unsqueeze(ROW))
    image = insert(node.graph, node, made, (row,), value(node).unsqueeze(ROW))
    swap(node, _aten.squeeze.dim, (image, ROW))
    return True


def _in_a_row(weight: Constant) -> Tensor:
    return weight.tensor.unsqueeze(ROW)
