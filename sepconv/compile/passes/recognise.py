"""Which ATen operations are convolutions, activations and pools, however the model wrote them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from sepconv.compile.groups import Convolution, Epilogue, Pool
from sepconv.compile.numbers import NumberType, not_computed
from sepconv.compile.passes.activations import spell_activations
from sepconv.compile.passes.constants import constant
from sepconv.compile.passes.nodes import (
    NodeArguments,
    calls,
    insert,
    ints,
    number_of,
    refuse,
    replace,
    shape,
    source,
    swap,
    value,
)
from sepconv.compile.passes.pools import recognise_pools
from sepconv.compile.passes.shuffle import recognise_shuffles
from sepconv.compile.store import Constant
from sepconv.kernels.case import Geometry
from sepconv.ops.schema import geometry_of

_aten = torch.ops.aten

_IDENTITIES = (
    _aten.clone.default,
    _aten.alias.default,
    _aten.detach.default,
    _aten.lift_fresh.default,
    _aten.lift_fresh_copy.default,
    _aten.contiguous.default,
)
_SAME_SHAPE = (
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.expand.default,
    _aten.slice.Tensor,
    _aten._to_copy.default,
)


def recognise(graph: fx.Graph) -> None:
    """Turn what can be recognised into groups, in place."""
    _drop_identities(graph)
    spell_activations(graph)
    for node in calls(graph, _aten.convolution.default, _aten._convolution.default):
        _convolution(node)
    for node in calls(graph, torch.ops.sepconv.depthwise_conv.default):
        _depthwise(node)
    for node in calls(graph, torch.ops.sepconv.pointwise_conv.default):
        _pointwise(node)
    for node in calls(graph, torch.ops.sepconv.separable_conv.default):
        _separable(node)
    for node in calls(graph, _aten.addmm.default, _aten.mm.default):
        _linear(node)
    for node in calls(graph, _aten.mean.dim, _aten.avg_pool2d.default):
        _pool(node)
    recognise_pools(graph)
    recognise_shuffles(graph)


def _drop_identities(graph: fx.Graph) -> None:
    """Results are never changed in place here, so a copy is the same value."""
    for node in calls(graph, *_IDENTITIES, *_SAME_SHAPE):
        before, after = value(source(node)), value(node)
        same = before.dtype == after.dtype and before.device == after.device
        if constant(node) is None and same and (node.target in _IDENTITIES or before.shape == after.shape):
            replace(node, source(node))


class _Weights(NamedTuple):
    weight: Constant
    bias: Constant | None


def _weights(node: fx.Node, weight: object, bias: object) -> _Weights | None:
    """The constants of weight and bias; None where one is no constant or our kernels do not compute with it."""
    matrix, offset = constant(weight), constant(bias)
    if matrix is None or (bias is not None and offset is None):
        return None
    known = (matrix,) if offset is None else (matrix, offset)
    reason = not_computed([NumberType(part.tensor.dtype) for part in known], "the weights are")
    if reason:
        refuse(node, reason)
        return None
    return _Weights(matrix, offset)


def _convolution(node: fx.Node) -> None:
    given = NodeArguments(node)
    x, weights = given.node("input"), _weights(node, given["weight"], given["bias"])
    if weights is None or given["transposed"] or len(shape(x)) != len(weights.weight.shape):
        return
    dims = len(shape(node)) - 2
    stride, padding, dilation = (_per_dim(given.ints(name), dims) for name in ("stride", "padding", "dilation"))
    geometry = Geometry(stride, tuple((amount, amount) for amount in padding), dilation)
    swap(node, Convolution(weights.weight, Epilogue(weights.bias), geometry, int(given.float("groups"))), (x,))


def _per_dim(given: tuple[int, ...], dims: int) -> tuple[int, ...]:
    return given * (dims if len(given) == 1 else 1)


def _depthwise_group(given: NodeArguments, weights: _Weights, activation: str) -> Convolution:
    epilogue, channels = Epilogue(weights.bias, activation=activation), shape(given.node("x"))[1]
    geometry = geometry_of(given.ints("stride"), given.ints("padding"), given.ints("dilation"))
    return Convolution(weights.weight, epilogue, geometry, channels)


def _pointwise_group(given: NodeArguments, weights: _Weights, dims: int) -> Convolution:
    epilogue = Epilogue(weights.bias, given["residual"] is not None, given.text("activation"))
    return Convolution(weights.weight, epilogue, Geometry.of_pixels(dims))


def _depthwise(node: fx.Node) -> None:
    given = NodeArguments(node)
    weights = _weights(node, given["weight"], given["bias"])
    if weights is not None:
        swap(node, _depthwise_group(given, weights, given.text("activation")), (given["x"],))


def _pointwise(node: fx.Node) -> None:
    given = NodeArguments(node)
    weights = _weights(node, given["weight"], given["bias"])
    if weights is not None:
        group = _pointwise_group(given, weights, len(shape(node)) - 2)
        swap(node, group, (given["x"], *_residual(given)))


def _residual(given: NodeArguments) -> tuple[object, ...]:
    return () if given["residual"] is None else (given["residual"],)


def _separable(node: fx.Node) -> None:
    given = NodeArguments(node)
    first = _weights(node, given["depthwise_weight"], given["depthwise_bias"])
    second = _weights(node, given["pointwise_weight"], given["pointwise_bias"])
    if first is None or second is None:
        return
    depthwise = _depthwise_group(given, first, given.text("depthwise_activation"))
    hidden = value(node).new_empty((shape(node)[0], depthwise.out_channels, *shape(node)[2:]))
    between = insert(node.graph, node, depthwise, (given["x"],), hidden)
    swap(node, _pointwise_group(given, second, depthwise.dims), (between, *_residual(given)))


def _linear(node: fx.Node) -> None:
    given = NodeArguments(node)
    added = node.target is _aten.addmm.default
    bias, x = (given["self"], given.node("mat1")) if added else (None, given.node("self"))
    weights = _weights(node, given["mat2"], bias)
    if node.kwargs or weights is None or constant(x) is not None:
        return
    matrix, offset = weights
    if offset is not None and tuple(offset.shape) != (matrix.shape[1],):
        return
    # Constant rows of another matrix keep their name through the key.
    turned = Constant(matrix.tensor.t(), ("t", matrix.key))
    swap(node, Convolution(turned, Epilogue(offset), Geometry.of_pixels(0)), (x,))


def _pool(node: fx.Node) -> None:
    x = source(node)
    if len(shape(x)) != 4 or node.kwargs:
        return
    if node.target is _aten.mean.dim:
        dims = node.args[1]
        whole = dims is not None and sorted(d % 4 for d in ints(dims)) == [2, 3]
        keepdim = len(node.args) > 2 and bool(node.args[2])
    else:
        whole, keepdim = ints(node.args[1]) == shape(x)[2:] and len(node.args) <= 3, True
    reason = not_computed([number_of(x)], "the image is")
    if whole and reason:
        refuse(node, reason)
    elif whole:
        swap(node, Pool(keepdim), (x,))
