"""Operations that read memory by strides, which must find it as they may expect.

A program (see ``steps``) gives values other strides than the model did, and ``recognise`` drops copies that only change
them. What PyTorch offers to its users computes the same with any. Its internal operations (``mkldnn_rnn_layer``),
custom ones and ``as_strided`` may not: their arguments pass through :func:`as_captured`. Others are called by functions
that bring their arguments into order first (``native_layer_norm``): :func:`without_gaps`. No rewriting looks through
either.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from sepconv.compile.passes.nodes import insert, value

_aten = torch.ops.aten


def as_captured(x: Tensor) -> Tensor:
    """``x``, in a graph: with the strides of ``node.meta["val"]``."""
    return x


def without_gaps(x: Tensor) -> Tensor:
    """``x``, in a graph: contiguous or channels_last."""
    return x


def keep_strides(graph: fx.Graph) -> None:
    """Put one of the two in front of every operation that may depend on strides."""
    for node in list(graph.nodes):
        needed = _needed(node.target) if node.op == "call_function" else None
        if needed is None:
            continue
        for source in node.all_input_nodes:
            if isinstance(source.meta.get("val"), Tensor) and source.op != "get_attr":
                kept = insert(graph, node, needed, (source,), value(source))
                node.replace_input_with(source, kept)


def _needed(target: object) -> Callable[[Tensor], Tensor] | None:
    if not isinstance(target, OpOverload) or target.namespace == "sepconv":
        return None
    if target is _aten.as_strided.default or target.namespace != "aten":
        return as_captured
    name, tags = target._schema.name.removeprefix("aten::"), set(target.tags)
    if torch.Tag.pointwise in tags or target in _ANY:
        return None
    if name.startswith(("_", "mkldnn")) and torch.Tag.core not in tags:
        return as_captured
    return without_gaps if name.startswith(("_", "native_")) else None


# What people's tensors reach as they are: the convolution of TorchScript, batch norms, views, PReLU.
_ANY = (
    _aten._convolution.default,
    _aten.native_batch_norm.default,
    _aten._native_batch_norm_legit_no_training.default,
    _aten._unsafe_view.default,
    _aten._to_copy.default,
    _aten._prelu_kernel.default,
)
