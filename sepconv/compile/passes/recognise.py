"""Which ATen operations are convolutions, activations and pools, however the model wrote them."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import fx

from sepconv.compile.groups import Convolution, Epilogue, GroupNormed, Pool, Resize, RowNorm
from sepconv.compile.numbers import NumberType, not_computed
from sepconv.compile.passes.activations import spell_activations
from sepconv.compile.passes.constants import constant, turned
from sepconv.compile.passes.moves import spell_moves
from sepconv.compile.passes.nodes import (
    NodeArguments,
    called,
    calls,
    first_result,
    insert,
    ints,
    is_call,
    number_of,
    per_dim,
    refuse,
    replace,
    shape,
    source,
    swap,
    value,
)
from sepconv.compile.passes.pools import recognise_pools
from sepconv.compile.passes.shuffle import recognise_shuffles
from sepconv.compile.passes.strides import without_gaps
from sepconv.compile.passes.transposed import sub_pixel
from sepconv.compile.store import Constant, Store
from sepconv.kernels.case import Geometry, GroupNormDetail, ResizeDetail, RowNormDetail
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


_RESIZES: dict[object, str] = {
    _aten.upsample_nearest2d.default: "nearest",
    _aten._upsample_nearest_exact2d.default: "nearest-exact",
    _aten.upsample_bilinear2d.default: "bilinear",
    _aten.upsample_bicubic2d.default: "bicubic",
    _aten.upsample_nearest2d.vec: "nearest",
    _aten._upsample_nearest_exact2d.vec: "nearest-exact",
    _aten.upsample_bilinear2d.vec: "bilinear",
    _aten.upsample_bicubic2d.vec: "bicubic",
}


def recognise(graph: fx.Graph, store: Store) -> None:
    """Turn what can be recognised into groups, in place."""
    _drop_identities(graph)
    spell_moves(graph)
    spell_activations(graph)
    for node in calls(graph, _aten.convolution.default, _aten._convolution.default):
        _convolution(node, store)
    for node in calls(graph, torch.ops.sepconv.depthwise_conv.default):
        _depthwise(node)
    for node in calls(graph, torch.ops.sepconv.pointwise_conv.default):
        _pointwise(node)
    for node in calls(graph, torch.ops.sepconv.separable_conv.default):
        _separable(node)
    for node in calls(graph, _aten.addmm.default, _aten.mm.default):
        _linear(node)
    for node in calls(graph, *_RESIZES):
        _resize(node)
    for node in calls(graph, _aten.native_group_norm.default):
        _group_norm(node, store)
    for node in calls(graph, _aten.native_layer_norm.default):
        _layer_norm(node)
    for node in calls(graph, _aten.div.Tensor):
        _unit_vectors(node)
    for node in calls(graph, _aten.mean.dim, _aten.avg_pool2d.default, _aten.linalg_vector_norm.default):
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


def _convolution(node: fx.Node, store: Store) -> None:
    given = NodeArguments(node)
    x, weights = given.node("input"), _weights(node, given["weight"], given["bias"])
    if weights is None or len(shape(x)) != len(weights.weight.shape):
        return
    if given["transposed"]:
        sub_pixel(node, *weights, store)
        return
    dims = len(shape(node)) - 2
    stride, padding, dilation = (per_dim(given.ints(name), dims) for name in ("stride", "padding", "dilation"))
    geometry = Geometry(stride, tuple((amount, amount) for amount in padding), dilation)
    swap(node, Convolution(weights.weight, Epilogue(weights.bias), geometry, int(given.float("groups"))), (x,))


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
    weight = turned(given["mat2"]) or Constant(matrix.tensor.t(), ("t", matrix.key))
    swap(node, Convolution(weight, Epilogue(offset), Geometry.of_pixels(0)), (x,))


def _pool(node: fx.Node) -> None:
    x, given = source(node), NodeArguments(node)
    if len(shape(x)) != 4 or node.kwargs or constant(x) is not None:
        return
    if node.target is _aten.avg_pool2d.default:
        whole, keepdim, last = ints(node.args[1]) == shape(x)[2:] and len(node.args) <= 3, True, False
    else:
        dims = [] if given["dim"] is None else sorted(d % 4 for d in given.ints("dim"))
        last, keepdim = dims == [1, 2], bool(given["keepdim"])
        whole = (last or dims == [2, 3]) and (node.target is _aten.mean.dim or given["ord"] == 2)
        if keepdim and not whole and node.target is _aten.mean.dim:
            x, whole = _channels_as_pixels(node, x, dims)
    reason = not_computed([number_of(x)], "the image is")
    if whole and reason:
        refuse(node, reason)
    elif whole:
        group = Pool(keepdim, "mean" if node.target is not _aten.linalg_vector_norm.default else "length")
        _pool_channels_last(node, group, x) if last else swap(node, group, (x,))


def _channels_as_pixels(node: fx.Node, x: fx.Node, dims: list[int]) -> tuple[fx.Node, bool]:
    """One number of each channel, as the pixels of an image of one channel, and whether the mean is that of those."""
    size = shape(x)
    if len(dims) != 1 or size[dims[0]] * size[0] != value(x).numel():
        return x, False
    column = [size[0], 1, size[dims[0]], 1]
    return insert(node.graph, node, _aten.view.default, (x, column), value(x).reshape(column)), True


def _pool_channels_last(node: fx.Node, group: Pool, x: fx.Node) -> None:
    """Over the pixels of (N, H, W, C): as of (N, C, H, W), which lies in memory the same way."""
    image = insert(node.graph, node, _aten.permute.default, (x, [0, 3, 1, 2]), value(x).permute(0, 3, 1, 2))
    if not group.keepdim:
        swap(node, group, (image,))
        return
    pooled = insert(node.graph, node, group, (image,), value(node).permute(0, 3, 1, 2))
    swap(node, _aten.permute.default, (pooled, [0, 2, 3, 1]))


def _layer_norm(node: fx.Node) -> None:
    given, result = NodeArguments(node), first_result(node)
    if result is None or len(given.ints("normalized_shape")) != 1:
        return
    weight, bias = constant(given["weight"]), constant(given["bias"])
    unknown = (given["weight"] is not None and weight is None) or (given["bias"] is not None and bias is None)
    x = given.node("input")
    reason = not_computed([number_of(x)], "the rows are")
    if reason:
        refuse(node, reason)
    elif not unknown:
        x = source(x) if is_call(x, without_gaps) else x
        swap(result, RowNorm(RowNormDetail("layer", given.float("eps")), weight, bias), (x,))
        node.graph.erase_node(node)


def _unit_vectors(node: fx.Node) -> None:
    """``x / clamp_min(norm(x, dim=-1), eps)``, as F.normalize has it."""
    x = node.args[0]
    spread = called(node.args[1], _aten.expand.default)
    least = called(node.args[1] if spread is None else spread.args[0], _aten.clamp_min.default)
    length = None if least is None else called(least.args[0], _aten.linalg_vector_norm.default)
    if least is None or length is None or length.args[0] is not x or not isinstance(least.args[1], (int, float)):
        return
    given = NodeArguments(length)
    last = given["dim"] is not None and [d % len(shape(node)) for d in given.ints("dim")] == [len(shape(node)) - 1]
    if last and given["ord"] == 2 and given["keepdim"] and not not_computed([number_of(node)], ""):
        swap(node, RowNorm(RowNormDetail("length", float(least.args[1]))), (x,))


def _resize(node: fx.Node) -> None:
    """Overloads name the scales one by one or together."""
    given, mode = NodeArguments(node), _RESIZES[node.target]
    together = str(node.target).endswith(".vec")
    x = given.node("input" if together else "self")
    factors = (given["scale_factors"] or (None, None)) if together else (given["scales_h"], given["scales_w"])
    reason = not_computed([number_of(x)], "the image is")
    if reason:
        refuse(node, reason)
    elif isinstance(factors, (list, tuple)) and constant(x) is None:
        scales = [float(factor) if isinstance(factor, (int, float)) else None for factor in factors]
        aligned = mode in ("bilinear", "bicubic") and bool(given["align_corners"])
        detail = ResizeDetail(mode, aligned, (scales[0], scales[1]))
        swap(node, Resize(shape(node)[2:], detail), (x,))


def _group_norm(node: fx.Node, store: Store) -> None:
    given, result = NodeArguments(node), first_result(node)
    x = given.node("input")
    x = source(x) if is_call(x, without_gaps) else x
    if result is None or len(shape(x)) != 4:
        return
    reason = not_computed([number_of(x)], "the image is")
    if reason:
        refuse(node, reason)
        return
    vectors = [constant(given[name]) for name in ("weight", "bias")]
    for i, (name, number) in enumerate((("weight", 1.0), ("bias", 0.0))):
        if given[name] is None:
            channels = shape(x)[1]
            vectors[i] = store.get(("all", number, channels), partial(torch.full, (channels,), number))
    weight, bias = vectors
    if weight is not None and bias is not None:
        detail = GroupNormDetail(int(given.float("group")), given.float("eps"))
        swap(result, GroupNormed(detail, weight, bias), (x,))
        node.graph.erase_node(node)
