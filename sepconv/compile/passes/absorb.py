"""Which neighbouring operations a kernel computes in one pass: what a convolution takes into itself."""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, fx

from sepconv.compile.groups import Convolution, Epilogue, SeparableGroup
from sepconv.compile.numbers import not_computed
from sepconv.compile.passes.activations import activation_of
from sepconv.compile.passes.branches import merge_branches
from sepconv.compile.passes.constants import constant
from sepconv.compile.passes.nodes import (
    NodeArguments,
    as_node,
    called,
    first_result,
    group_of,
    insert,
    is_call,
    number_of,
    operands,
    producer,
    refuse,
    replace,
    shape,
    store_as,
    stored_as,
    swap,
    undo,
    undo_on_tensor,
    value,
)
from sepconv.compile.store import Constant, QuantizedConstant, Store
from sepconv.kernels.case import Geometry
from sepconv.norms import scale_and_shift

_aten = torch.ops.aten
_TRAINING_NORM = _aten.native_batch_norm.default
_NORMS = (_TRAINING_NORM, _aten._native_batch_norm_legit_no_training.default)
_SCALES = (_aten.mul.Tensor, _aten.div.Tensor)
_SHIFTS = (_aten.add.Tensor, _aten.sub.Tensor)
_WITH_RESIDUAL = ("pointwise", "linear", "normal", "grouped")


def absorb(graph: fx.Graph, store: Store) -> None:
    """Let the convolutions of a graph take in what surrounds them, in place."""
    _absorb_pads(graph)
    for node in list(graph.nodes):
        if node._erased or node.op != "call_function":
            continue
        if node.target in _NORMS:
            _absorb_norm(node, store)
        elif node.target in (*_SCALES, *_SHIFTS):
            if not _absorb_vector(node, store) and not merge_branches(node, store):
                _absorb_residual(node)
        elif activation_of(node):
            _absorb_activation(node)


def _absorb_pads(graph: fx.Graph) -> None:
    """Zero padding in front of a convolution, as TensorFlow's "same" needs it."""
    for node in list(graph.nodes):
        conv = group_of(node, Convolution)
        pad = None if conv is None else called(node.args[0], _aten.constant_pad_nd.default)
        if conv is None or pad is None:
            continue
        given = NodeArguments(pad)
        amounts = given.ints("pad")
        if given["value"] != 0 or min(amounts) < 0 or len(amounts) > 2 * conv.dims:
            continue
        amounts = (*amounts, *[0] * (2 * conv.dims - len(amounts)))
        added = [(amounts[-2 * d - 2], amounts[-2 * d - 1]) for d in range(conv.dims)]
        already = conv.geometry.padding
        node.target = conv.padded([(low + a, high + b) for (low, high), (a, b) in zip(already, added, strict=True)])
        node.args = (given.node("self"), *node.args[1:])


class _Source(NamedTuple):
    """A convolution that a value comes from, through reshapes."""

    node: fx.Node
    reshapes: list[fx.Node]
    group: Convolution


def _linear_so_far(node: object) -> _Source | None:
    """The convolution that a value comes from, if factors and sums can still be folded into its weights."""
    found = producer(node, Convolution)
    return _Source(*found) if found is not None and found[2].epilogue.is_linear else None


class _Fold(NamedTuple):
    """``convolution * factor + shift``: vectors over the output channels, in float64."""

    factor: Tensor | None
    shift: Tensor | None
    key: tuple[object, ...]
    what: str

    def of(self, channels: slice) -> _Fold:
        """What becomes of some of the channels."""
        factor, shift = (None if vector is None else vector[channels] for vector in (self.factor, self.shift))
        return _Fold(factor, shift, (*self.key, channels.start, channels.stop), self.what)


def _joined(node: object) -> list[_Source]:
    """The convolutions that a concatenation of channels puts together, none where anything else reads one of them or
    the concatenation: what follows it can be done to each of them."""
    join = called(node, _aten.cat.default)
    if join is None or len(join.users) > 1 or NodeArguments(join)["dim"] not in (1, 1 - len(shape(join))):
        return []
    parts = [as_node(part) for part in join.args[0]] if isinstance(join.args[0], (list, tuple)) else []
    sources = [_Source(part, [], conv) for part in parts if (conv := group_of(part, Convolution)) is not None]
    alone = all(len(part.users) == 1 for part in parts) and len(set(parts)) == len(parts)
    return sources if alone and len(sources) == len(parts) else []


def _channels(parts: list[_Source]) -> list[slice]:
    """Where each of them lies in the concatenation."""
    ends = list(accumulate(part.group.out_channels for part in parts))
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _absorb_norm(node: fx.Node, store: Store) -> None:
    given = NodeArguments(node)
    result, found = first_result(node), _linear_so_far(given["input"])
    training = node.target is _TRAINING_NORM and given["training"]
    if result is None or training:
        return
    names = ("weight", "bias", "running_mean", "running_var")
    gamma, beta, mean, variance = (constant(given[name]) for name in names)
    unknown = any(given[name] is not None and constant(given[name]) is None for name in names)
    if mean is None or variance is None or unknown:
        return
    eps = given.float("eps")
    weight, bias = (None if known is None else known.tensor for known in (gamma, beta))
    factor, shift = scale_and_shift(mean.tensor, variance.tensor, weight, bias, eps)
    key = ("norm", *(None if c is None else c.key for c in (gamma, beta, mean, variance)), eps)
    x, fold, joined = given.node("input"), _Fold(factor, shift, key, "norm"), _joined(given["input"])
    inside = None if found is None else _along_outputs(found, result, (factor, shift))
    if found is not None and inside is not None:
        found.node.target = _folded(found.group, _Fold(*inside, key, "norm"), store)
        replace(result, x)
    elif joined and all(part.group.epilogue.is_linear for part in joined):
        for part, channels in zip(joined, _channels(joined), strict=True):
            part.node.target = _folded(part.group, fold.of(channels), store)
        replace(result, x)
    elif _is_image(x):
        swap(result, _filter_of_one_pixel(fold, store), (x,))
    else:
        _number_by_number(result, x, fold, store)
    node.graph.erase_node(node)


def _along_outputs(found: _Source, node: fx.Node, vectors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Vectors along dimension 1 of a value, along the outputs of the convolution that it comes from; None if they are
    not the same for all of an output."""
    if not found.reshapes:
        return vectors
    size = shape(node)
    columns = [_column(vector.view(-1, *[1] * (len(size) - 2)).expand(size), found) for vector in vectors]
    first, second = columns
    return None if first is None or second is None else (first, second)


def _column(spread: Tensor, found: _Source) -> Tensor | None:
    """The number of each output of a convolution, of a tensor like the value behind it; None if it has several."""
    columns = undo_on_tensor(found.reshapes, spread).movedim(1, 0).reshape(found.group.out_channels, -1)
    return columns[:, 0].clone() if bool((columns == columns[:, :1]).all()) else None


def _number_by_number(result: fx.Node, x: fx.Node, fold: _Fold, store: Store) -> None:
    """A norm with no convolution before it, of what is no image, as a product and a sum."""
    size = [-1, *[1] * (len(shape(x)) - 2)]
    for vector, target in ((fold.factor, _aten.mul.Tensor), (fold.shift, _aten.add.Tensor)):
        assert vector is not None
        numbers = vector.float().view(size).contiguous()
        known = store.get(("column", str(target), len(size), fold.key), partial(torch.clone, numbers))
        with result.graph.inserting_before(result):
            column = result.graph.get_attr("column")
        column.meta.update(constant=known, val=known.tensor)
        x = insert(result.graph, result, target, (x, column), value(result))
    replace(result, x)


def _is_image(node: object) -> bool:
    """Whether kernels of depthwise convolutions read it: several channels of pixels, in float32."""
    size = shape(as_node(node))
    return len(size) == 4 and size[1] > 1 and not not_computed([number_of(as_node(node))], "the image is")


def _filter_of_one_pixel(fold: _Fold, store: Store) -> Convolution:
    """A norm with no convolution before it as a depthwise one of its own, which takes in what follows."""
    factor, shift = fold.factor, fold.shift
    assert factor is not None
    assert shift is not None
    weight = store.get(("factor", fold.key), lambda: factor.float().view(-1, 1, 1, 1).contiguous())
    bias = store.get(("shift", fold.key), lambda: shift.float().contiguous())
    return Convolution(weight, Epilogue(bias), Geometry.of_pixels(2), len(factor), ("norm",))


def _folded(conv: Convolution, fold: _Fold, store: Store) -> Convolution:
    """The convolution with new weights, computed in float64 and kept as numbers of the old ones' type."""
    weight, bias, dtype = conv.weight, conv.epilogue.bias, conv.weight.number.storage
    factor = fold.factor
    if factor is not None:
        column = factor.view(-1, *[1] * (len(weight.shape) - 1))
        scaled = ("scaled", weight.key, fold.key)
        if isinstance(weight, QuantizedConstant) and bool(factor.all()):
            scale = store.derived((*scaled, "scale"), partial(_product, weight.scale, factor))
            weight = store.quantized(scaled, weight.whole, scale)
        else:
            weight = store.derived(scaled, partial(_product, weight, column))
    start = None if bias is None else bias.tensor.double() * (1.0 if factor is None else factor)
    if fold.shift is not None:
        start = fold.shift if start is None else start + fold.shift
    if start is not None:
        total = start
        key = ("bias", None if bias is None else bias.key, conv.weight.key, fold.key)
        bias = store.get(key, lambda: total.to(dtype).contiguous())
    return conv.then(fold.what, weight, bias)


def _product(constant: Constant, factor: Tensor) -> Tensor:
    return (constant.tensor.double() * factor).to(constant.number.storage)


def _absorb_vector(node: fx.Node, store: Store) -> bool:
    """A constant per output channel, multiplied or added: layer scale, the bias of a linear layer, a norm by hand."""
    if node.kwargs:
        return False
    reverse = node.target in (_aten.mul.Tensor, _aten.add.Tensor)
    for part, other in operands(node)[: 2 if reverse else 1]:
        found = _linear_so_far(part)
        if found is None or shape(node) != shape(as_node(part)):
            continue
        vector = _per_channel(other, node, found)
        if vector is None:
            continue
        found.node.target = _folded(found.group, _fold(node, vector), store)
        replace(node, as_node(part))
        return True
    return False


def _fold(node: fx.Node, vector: Tensor) -> _Fold:
    scale = node.target in _SCALES
    if node.target in (_aten.div.Tensor, _aten.sub.Tensor):
        vector = 1.0 / vector if scale else -vector
    key = (str(node.target), vector.numpy().tobytes())
    return _Fold(vector, None, key, "scale") if scale else _Fold(None, vector, key, "bias")


def _per_channel(other: object, node: fx.Node, found: _Source) -> Tensor | None:
    """The number that each output channel is combined with, in float64; None if it is not one per channel."""
    channels = found.group.out_channels
    if isinstance(other, (int, float)):
        return torch.full((channels,), float(other), dtype=torch.float64)
    known: Constant | None = constant(other)
    if known is None or not known.tensor.is_floating_point() or known.tensor.numel() not in (1, channels):
        return None
    return _column(known.tensor.double().expand(shape(node)), found)


def _absorb_activation(node: fx.Node) -> None:
    found, joined = producer(node.args[0], Convolution), _joined(node.args[0])
    if joined and not any(part.group.epilogue.activation for part in joined):
        for part in joined:
            part.node.target = part.group.activated(activation_of(node))
        replace(node, as_node(node.args[0]))
    if found is None:
        return
    source, _, conv = found
    if not conv.epilogue.activation:
        source.target = conv.activated(activation_of(node))
        replace(node, as_node(node.args[0]))


def _absorb_residual(node: fx.Node) -> None:
    """``convolution(x) + other``. The convolution moves behind whatever computes the other."""
    if not is_call(node, _aten.add.Tensor) or node.kwargs:
        return
    for part, other in operands(node):
        if not isinstance(part, fx.Node) or not isinstance(other, fx.Node) or part is other:
            continue
        found = _linear_so_far(part) if shape(part) == shape(node) == shape(other) else None
        if found is None or found.group.kind not in _WITH_RESIDUAL:
            continue
        reason = not_computed([number_of(other)], "what is added is")
        if reason:
            refuse(node, reason)
            continue
        for moved in (found.node, *found.reshapes):
            node.prepend(moved)
        found.node.args = (found.node.args[0], undo(found.reshapes, other, found.node))
        found.node.target = found.group.with_residual()
        replace(node, part)
        return


def pair(graph: fx.Graph) -> None:
    """Depthwise convolutions of images and the pointwise ones behind them become one group, in place."""
    for node in list(graph.nodes):
        pointwise = group_of(node, Convolution)
        if pointwise is None or pointwise.kind != "pointwise":
            continue
        source = as_node(node.args[0])
        depthwise = group_of(source, Convolution)
        if depthwise is None or depthwise.kind != "depthwise" or depthwise.dims != 2 or len(source.users) > 1:
            continue
        both = swap(node, SeparableGroup(depthwise, pointwise, stored_as(source)), (source.args[0], *node.args[1:]))
        kept = stored_as(node)
        if kept is not None:
            store_as(both, kept)
