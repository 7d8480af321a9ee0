"""Which neighbouring operations a kernel computes in one pass: what a convolution takes into itself."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from sepconv.compile.constants import Constant, Store, constant, fold_constants
from sepconv.compile.groups import Convolution, Separable
from sepconv.compile.recognise import activation_of, recognise
from sepconv.compile.rewrite import (
    first_result,
    group_of,
    is_call,
    producer,
    replace,
    shape,
    swap,
    undo,
    undo_on_tensor,
)
from sepconv.compile.strides import keep_strides
from sepconv.norms import scale_and_shift

_aten = torch.ops.aten
_NORMS = (_aten.native_batch_norm.default, _aten._native_batch_norm_legit_no_training.default)
_SCALES = (_aten.mul.Tensor, _aten.div.Tensor)
_SHIFTS = (_aten.add.Tensor, _aten.sub.Tensor)
_WITH_RESIDUAL = ("pointwise", "linear")


def match(graph: fx.Graph, store: Store) -> None:
    """Rewrite a captured graph into groups and what is left for PyTorch, in place."""
    graph.eliminate_dead_code()
    keep_strides(graph)
    fold_constants(graph, store)
    recognise(graph)
    _absorb_pads(graph)
    for node in list(graph.nodes):
        if node._erased or node.op != "call_function":
            continue
        if node.target in _NORMS:
            _absorb_norm(node, store)
        elif node.target in (*_SCALES, *_SHIFTS):
            if not _absorb_vector(node, store):
                _absorb_residual(node)
        elif activation_of(node):
            _absorb_activation(node)
    _pair(graph)
    graph.eliminate_dead_code()


def _absorb_pads(graph: fx.Graph) -> None:
    """Zero padding in front of a convolution, as TensorFlow's "same" needs it."""
    for node in list(graph.nodes):
        conv = group_of(node, Convolution)
        pad = node.args[0] if conv is not None else None
        if not is_call(pad, _aten.constant_pad_nd.default):
            continue
        amounts = pad.args[1]
        filled_with = pad.args[2] if len(pad.args) > 2 else 0
        if filled_with != 0 or min(amounts) < 0 or len(amounts) > 2 * conv.dims:
            continue
        amounts = [*amounts, *[0] * (2 * conv.dims - len(amounts))]
        added = [(amounts[-2 * d - 2], amounts[-2 * d - 1]) for d in range(conv.dims)]
        padding = tuple((low + a, high + b) for (low, high), (a, b) in zip(conv.padding, added, strict=True))
        node.target = conv.then("pad", padding=padding)
        node.args = (pad.args[0], *node.args[1:])


def _linear_so_far(node: object) -> tuple[fx.Node, list[fx.Node], Convolution] | None:
    """The convolution that a value comes from, if factors and sums can still be folded into its weights."""
    found = producer(node, Convolution)
    if found is None:
        return None
    conv: Convolution = found[0].target  # type: ignore[assignment]
    return None if conv.activation or conv.residual else (*found, conv)


def _absorb_norm(node: fx.Node, store: Store) -> None:
    result = first_result(node)
    found = _linear_so_far(node.args[0])
    known = [constant(arg) for arg in node.args[1:5]]
    training = node.args[5] if node.target is _NORMS[0] else False
    eps = node.args[7] if node.target is _NORMS[0] else node.args[6]
    if result is None or found is None or training or known[2] is None or known[3] is None:
        return
    if any(arg is not None and c is None for arg, c in zip(node.args[1:5], known, strict=True)):
        return
    source, chain, conv = found
    if chain:
        return
    gamma, beta, mean, variance = (None if c is None else c.tensor for c in known)
    assert mean is not None
    assert variance is not None
    factor, shift = scale_and_shift(mean, variance, gamma, beta, eps)
    key = ("norm", *(None if c is None else c.key for c in known), eps)
    source.target = _scaled_and_shifted(conv, factor, shift, key, store, "norm")
    replace(result, source)
    node.graph.erase_node(node)


def _scaled_and_shifted(
    conv: Convolution, factor: Tensor | None, shift: Tensor | None, key: tuple[object, ...], store: Store, what: str
) -> Convolution:
    """``convolution * factor + shift`` with new weights, computed in float64; vectors over the output channels."""
    weight, bias = conv.weight, conv.bias
    if factor is not None:
        column = factor.view(-1, *[1] * (len(weight.shape) - 1))
        weight = store.derived(("scaled", conv.weight.key, key), lambda: (conv.weight.tensor.double() * column).float())
    start = None if bias is None else bias.tensor.double() * (1.0 if factor is None else factor)
    if shift is not None:
        start = shift if start is None else start + shift
    if start is not None:
        total = start
        bias_key = None if conv.bias is None else conv.bias.key
        bias = store.get(("bias", bias_key, conv.weight.key, key), lambda: total.float().contiguous())
    return conv.then(what, weight=weight, bias=bias)


def _absorb_vector(node: fx.Node, store: Store) -> bool:
    """A constant per output channel, multiplied or added: layer scale, the bias of a linear layer, a norm by hand."""
    if node.kwargs:
        return False
    reverse = node.target in (_aten.mul.Tensor, _aten.add.Tensor)
    operands = [node.args[:2]] + ([node.args[1::-1]] if reverse else [])
    for value, other in operands:
        found = _linear_so_far(value)
        vector = None if found is None or shape(node) != shape(value) else _per_channel(other, node, *found[1:])  # type: ignore[arg-type]
        if found is None or vector is None:
            continue
        source, _, conv = found
        scale = node.target in _SCALES
        if node.target in (_aten.div.Tensor, _aten.sub.Tensor):
            vector = 1.0 / vector if scale else -vector
        key = (str(node.target), vector.numpy().tobytes())
        factor, shift = (vector, None) if scale else (None, vector)
        source.target = _scaled_and_shifted(conv, factor, shift, key, store, "scale" if scale else "bias")
        replace(node, value)  # type: ignore[arg-type]
        return True
    return False


def _per_channel(other: object, node: fx.Node, chain: list[fx.Node], conv: Convolution) -> Tensor | None:
    """The number that each output channel is combined with, in float64; None if it is not one per channel."""
    if isinstance(other, (int, float)):
        return torch.full((conv.out_channels,), float(other), dtype=torch.float64)
    known: Constant | None = constant(other)
    if known is None or not known.tensor.is_floating_point() or known.tensor.numel() not in (1, conv.out_channels):
        return None
    spread = undo_on_tensor(chain, known.tensor.double().expand(shape(node)))
    columns = spread.movedim(1, 0).reshape(conv.out_channels, -1)
    return columns[:, 0].clone() if bool((columns == columns[:, :1]).all()) else None


def _absorb_activation(node: fx.Node) -> None:
    found = producer(node.args[0], Convolution)
    if found is not None and not found[0].target.activation:  # type: ignore[union-attr]
        name = activation_of(node)
        found[0].target = found[0].target.then(name, activation=name)  # type: ignore[union-attr]
        replace(node, node.args[0])  # type: ignore[arg-type]


def _absorb_residual(node: fx.Node) -> None:
    """``convolution(x) + other``. The convolution moves behind whatever computes the other."""
    if not is_call(node, _aten.add.Tensor) or node.kwargs:
        return
    for value, other in (node.args[:2], node.args[1::-1]):
        if not isinstance(value, fx.Node) or not isinstance(other, fx.Node) or value is other:
            continue
        if shape(value) != shape(node) or shape(other) != shape(node) or other.meta["val"].dtype is not torch.float32:
            continue
        found = _linear_so_far(value)
        if found is None or found[2].kind not in _WITH_RESIDUAL:
            continue
        source, chain, conv = found
        for moved in (source, *chain):
            node.prepend(moved)
        source.args = (source.args[0], undo(chain, other, source))
        source.target = conv.then("add", residual=True)
        replace(node, value)
        return


def _pair(graph: fx.Graph) -> None:
    """Depthwise convolutions of images and the pointwise ones behind them."""
    for node in list(graph.nodes):
        pointwise = group_of(node, Convolution)
        source = node.args[0] if pointwise is not None and pointwise.kind == "pointwise" else None
        depthwise = group_of(source, Convolution)
        if depthwise is None or depthwise.kind != "depthwise" or depthwise.dims != 2 or len(source.users) > 1:
            continue
        swap(node, Separable(depthwise, pointwise), (source.args[0], *node.args[1:]))
