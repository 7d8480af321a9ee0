"""Reductions, softmax, products and numbers from other places as groups: what no convolution or pool has taken in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from sepconv.compile.axes import Gathered, MatrixProduct, Reduced, Softmaxed
from sepconv.compile.numbers import not_computed
from sepconv.compile.passes.constants import constant
from sepconv.compile.passes.moves import permute, view
from sepconv.compile.passes.nodes import (
    NodeArguments,
    Target,
    as_node,
    calls,
    first_result,
    insert,
    is_call,
    number_of,
    refuse,
    refused,
    replace,
    shape,
    source,
    swap,
    value,
)
from sepconv.compile.passes.strides import without_gaps
from sepconv.kernels.axes import GatherDetail, Places, ReduceDetail

_aten = torch.ops.aten
_SOFTMAXES: dict[object, str] = {_aten._softmax.default: "softmax", _aten._log_softmax.default: "log_softmax"}
_REDUCTIONS: dict[object, str] = {
    _aten.mean.dim: "mean",
    _aten.mean.default: "mean",
    _aten.sum.dim_IntList: "sum",
    _aten.sum.default: "sum",
    _aten.amax.default: "amax",
    _aten.amin.default: "amin",
    _aten.max.default: "amax",
    _aten.min.default: "amin",
    _aten.max.dim: "amax",
    _aten.min.dim: "amin",
}
_WITH_PLACES = (_aten.max.dim, _aten.min.dim)


def recognise_axes(graph: fx.Graph) -> None:
    """Turn them into groups, in place."""
    for node in calls(graph, *_SOFTMAXES):
        _softmax(node)
    for node in calls(graph, *_REDUCTIONS):
        _reduce(node)
    for node in calls(graph, _aten.linalg_vector_norm.default):
        _length(node)
    for node in calls(graph, _aten.bmm.default, _aten.mm.default):
        _product(node)
    for target, make in _GATHERS.items():
        for node in calls(graph, target):
            _gather(node, *make(node))


def _computed(node: fx.Node, x: fx.Node) -> bool:
    """Whether our kernels compute with the numbers of ``x``; why not is kept."""
    if constant(x) is not None or 0 in shape(x) or not shape(x):
        return False
    reason = not_computed([number_of(x)], "the numbers are")
    if reason:
        refuse(node, refused(node) or reason)
    return not reason


def _read(node: fx.Node) -> fx.Node:
    """What an operation reads, with whatever strides."""
    x = source(node)
    return source(x) if is_call(x, without_gaps) else x


def _softmax(node: fx.Node) -> None:
    given, x = NodeArguments(node), _read(node)
    if not _computed(node, x) or given["half_to_float"]:
        return
    group, rank = Softmaxed(_SOFTMAXES[node.target]), len(shape(x))
    dim = int(given.float("dim")) % rank
    if dim == rank - 1:
        swap(node, group, (x,))
        return
    order = [*(d for d in range(rank) if d != dim), dim]
    turned = permute(node, x, order)
    rows = insert(node.graph, node, group, (turned,), value(turned))
    swap(node, _aten.permute.default, (rows, [order.index(d) for d in range(rank)]))


def _length(node: fx.Node) -> None:
    """The Euclidean length along some dimensions as the root of a sum of squares."""
    given, x = NodeArguments(node), source(node)
    if not _computed(node, x) or given["ord"] != 2 or not _as_it_is(node):
        return
    dims = _dims(given["dim"], len(shape(x)))
    square = insert(node.graph, node, _aten.mul.Tensor, (x, x), value(x))
    total = Reduced(ReduceDetail("sum", dims), bool(given["keepdim"]))
    swap(node, _aten.sqrt.default, (insert(node.graph, node, total, (square,), value(node)),))


def _reduce(node: fx.Node) -> None:
    given, x = NodeArguments(node), source(node)
    result = first_result(node) if node.target in _WITH_PLACES else node
    if result is None or not _computed(node, x) or not _as_it_is(node):
        return
    dims = _dims(given["dim"] if _has(node, "dim") else None, len(shape(x)))
    keepdim = bool(given["keepdim"]) if _has(node, "keepdim") else False
    swap(result, Reduced(ReduceDetail(_REDUCTIONS[node.target], dims), keepdim), (x,))
    if result is not node:
        node.graph.erase_node(node)


def _product(node: fx.Node) -> None:
    first, second = map(as_node, node.args[:2])
    if constant(first) is not None or not _computed(node, second if constant(second) is None else first):
        return
    group, matrices = MatrixProduct(shape(first)[-1]), [first, second]
    if 0 in shape(first) or 0 in shape(node):
        return
    if node.target is _aten.bmm.default:
        swap(node, group, tuple(matrices))
        return
    whole = [view(node, matrix, [1, *shape(matrix)]) for matrix in matrices]
    made = insert(node.graph, node, group, tuple(whole), value(node)[None])
    swap(node, _aten.view.default, (made, list(shape(node))))


def _has(node: fx.Node, name: str) -> bool:
    """Whether an operation has an argument of that name."""
    return any(argument.name == name for argument in node.target._schema.arguments)  # type: ignore[union-attr]


def _as_it_is(node: fx.Node) -> bool:
    """Whether the result has the numbers of what is read."""
    return not _has(node, "dtype") or NodeArguments(node)["dtype"] in (None, torch.float32)


def _dims(given: object, rank: int) -> Places:
    """All, where none are named."""
    named = (given,) if isinstance(given, int) else given if isinstance(given, (list, tuple)) else ()
    return tuple(sorted(int(d) % rank for d in named)) or tuple(range(rank))


def _gather(node: fx.Node, kind: str, places: dict[int, Places] | None, number: float = 0.0) -> None:
    x = source(node)
    if not _computed(node, x) or 0 in shape(node) or places is None:
        return
    if not places:
        replace(node, x)
        return
    every = tuple(places.get(d) for d in range(len(shape(x))))
    swap(node, Gathered(kind, GatherDetail(every, number)), (x,))


Gathering = tuple[str, dict[int, Places] | None] | tuple[str, dict[int, Places], float]
"""What it is called and the places along the dimensions where they are not the same, None where they are not known; the
constant of padding."""


def _padded(node: fx.Node, kind: str, place: Callable[[int, int], int]) -> dict[int, Places]:
    """``place(i, size)``: where the number at i is from, which may lie before the first or behind the last."""
    amounts, size = NodeArguments(node).ints(kind), shape(source(node))
    pairs = list(zip(amounts[::2], amounts[1::2], strict=True))
    return {
        len(size) - 1 - d: tuple(place(i, size[-1 - d]) for i in range(-low, size[-1 - d] + high))
        for d, (low, high) in enumerate(pairs)
        if low or high
    }


def _constant_pad(node: fx.Node) -> Gathering:
    places = _padded(node, "pad", lambda i, size: i if 0 <= i < size else -1)
    return "pad", places, NodeArguments(node).float("value")


def _reflection_pad(node: fx.Node) -> Gathering:
    return "pad", _padded(node, "padding", lambda i, size: size - 1 - abs(size - 1 - abs(i)))


def _replication_pad(node: fx.Node) -> Gathering:
    return "pad", _padded(node, "padding", lambda i, size: min(max(i, 0), size - 1))


def _flip(node: fx.Node) -> Gathering:
    size = shape(node)
    return "flip", {d: tuple(reversed(range(size[d]))) for d in _dims(NodeArguments(node)["dims"], len(size))}


def _roll(node: fx.Node) -> Gathering:
    given, size = NodeArguments(node), shape(node)
    shifts, dims = given.ints("shifts"), given.ints("dims")
    walks = dict(zip((d % len(size) for d in dims), shifts, strict=False))
    if len(walks) != len(shifts):
        return "roll", None
    return "roll", {d: tuple((i - shift) % size[d] for i in range(size[d])) for d, shift in walks.items()}


def _chosen(node: fx.Node) -> Gathering:
    """By a constant list of places along one dimension."""
    given = NodeArguments(node)
    if node.target is _aten.index_select.default:
        return "index", _places(node, int(given.float("dim")), given["index"])
    indices = given["indices"]
    named = [(d, index) for d, index in enumerate(_listed(indices)) if index is not None]
    return "index", _places(node, *named[0]) if len(named) == 1 else None


def _listed(given: object) -> Sequence[object]:
    return given if isinstance(given, (list, tuple)) else ()


def _places(node: fx.Node, dim: int, index: object) -> dict[int, Places] | None:
    known, size = constant(index), shape(source(node))
    whole = known is not None and not known.tensor.is_floating_point() and known.tensor.dtype is not torch.bool
    if known is None or not whole or known.tensor.dim() > 1 or len(shape(node)) != len(size):
        return None
    return {dim % len(size): tuple(int(i) % size[dim] for i in known.tensor.reshape(-1))}


_GATHERS: dict[Target, Callable[[fx.Node], Gathering]] = {
    _aten.constant_pad_nd.default: _constant_pad,
    _aten.reflection_pad1d.default: _reflection_pad,
    _aten.reflection_pad2d.default: _reflection_pad,
    _aten.replication_pad1d.default: _replication_pad,
    _aten.replication_pad2d.default: _replication_pad,
    _aten.flip.default: _flip,
    _aten.roll.default: _roll,
    _aten.index_select.default: _chosen,
    _aten.index.Tensor: _chosen,
}
