"""Chains of operations number by number become one group: what no convolution has taken in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from sepconv.activations import with_parameters
from sepconv.compile.groups import Elementwise
from sepconv.compile.numbers import not_computed
from sepconv.compile.passes.activations import activation_of
from sepconv.compile.passes.constants import constant
from sepconv.compile.passes.nodes import NodeArguments, Target, number_of, refuse, refused, shape, swap, value
from sepconv.compile.store import Store
from sepconv.kernels.expression import Expression, Term

_aten = torch.ops.aten
_MOST_TENSORS, _MOST_TERMS = 8, 24
_MOST_FACTORS = 8

Argument = fx.Node | float


class _Part(NamedTuple):
    """A piece of an expression: arguments are values of the graph, numbers, or pieces themselves."""

    operation: str
    arguments: tuple[object, ...]


def fuse_elementwise(graph: fx.Graph, store: Store) -> None:
    """Make groups of what is left of sums, products and activations, in place."""
    parts = {node: part for node in graph.nodes if (part := _part_of(node)) is not None}
    taken: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        if node in parts and node not in taken:
            group = _connected(node, parts, taken)
            taken.update(group.members)
            _write(group, store)


def _part_of(node: fx.Node) -> _Part | None:
    """What a node computes number by number; None if it is another operation, or of other numbers."""
    if node.op != "call_function" or constant(node) is not None or not isinstance(node.meta.get("val"), Tensor):
        return None
    activation = activation_of(node)
    make = _MAKERS.get(node.target)
    if not activation and make is None:
        return None
    part = _Part(activation, (node.args[0],)) if activation else make(node) if make else None
    if part is None or not value(node).numel():
        return None
    reason = not_computed([number_of(source) for source in (node, *node.all_input_nodes)], "these numbers are")
    if reason:
        refuse(node, refused(node) or reason)
        return None
    return part


def _plain(operation: str, turned: bool = False) -> Callable[[fx.Node], _Part | None]:
    """An operation whose arguments are the values, the other way round if ``turned``."""

    def make(node: fx.Node) -> _Part | None:
        arguments = tuple(_argument(argument) for argument in node.args)
        if node.kwargs or None in arguments:
            return None
        return _Part(operation, arguments[::-1] if turned else arguments)

    return make


def _argument(given: object) -> Argument | None:
    """A value of the graph or a number; None if it is neither."""
    known = constant(given)
    if known is not None and known.tensor.numel() == 1 and known.tensor.is_floating_point():
        return float(known.tensor)
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return float(given)
    return given if isinstance(given, fx.Node) else None


def _sum(operation: str, turned: bool = False) -> Callable[[fx.Node], _Part | None]:
    """``a + alpha * b`` and ``a - alpha * b``."""

    def make(node: fx.Node) -> _Part | None:
        given = NodeArguments(node)
        a, b, alpha = _argument(given["self"]), _argument(given["other"]), _argument(given["alpha"])
        if a is None or b is None or alpha is None:
            return None
        scaled: object = b if alpha == 1.0 else _Part("mul", (b, alpha))
        return _Part(operation, (scaled, a) if turned else (a, scaled))

    return make


def _add_product(node: fx.Node) -> _Part | None:
    given = NodeArguments(node)
    arguments = [_argument(given[name]) for name in ("self", "tensor1", "tensor2", "value")]
    if None in arguments:
        return None
    added, a, b, factor = arguments
    product = _Part("mul", (a, b))
    return _Part("add", (added, product if factor == 1.0 else _Part("mul", (product, factor))))


def _power(node: fx.Node) -> _Part | None:
    x, exponent = node.args[0], _argument(node.args[1])
    if not isinstance(exponent, float):
        return None
    if exponent in _POWERS:
        return _Part(_POWERS[exponent], (x,))
    whole = exponent.is_integer()
    if whole and 2 <= exponent <= _MOST_FACTORS:
        return _product(x, int(exponent))
    return None if whole else _Part("pow", (x, exponent))


def _product(x: object, factors: int) -> _Part:
    half = x if factors < 4 else _product(x, factors // 2)
    square = _Part("mul", (half, half))
    return _Part("mul", (square, x)) if factors % 2 else square


def _between(node: fx.Node) -> _Part | None:
    """A clamp whose limits are tensors."""
    given = NodeArguments(node)
    part: object = node.args[0]
    for limit, operation in ((given["min"], "maximum"), (given["max"], "minimum")):
        if limit is not None:
            known = _argument(limit)
            if known is None:
                return None
            part = _Part(operation, (part, known))
    return part if isinstance(part, _Part) else None


def _scaled_elu(node: fx.Node) -> _Part | None:
    """SELU, where it is more than an activation."""
    given = NodeArguments(node)
    if given["input_scale"] != 1:
        return None
    inner = with_parameters("elu", given.float("alpha"))
    return _Part("mul", (_Part(inner, (node.args[0],)), given.float("scale")))


_POWERS: dict[float, str] = {0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}


_OF_ONE = (
    "neg", "abs", "sqrt", "rsqrt", "reciprocal", "exp", "log", "log2", "log1p", "floor", "ceil", "trunc", "round",
    "sign",
)  # fmt: skip
_MAKERS: dict[Target | str, Callable[[fx.Node], _Part | None]] = {
    _aten.add.Tensor: _sum("add"),
    _aten.add.Scalar: _sum("add"),
    _aten.sub.Tensor: _sum("sub"),
    _aten.sub.Scalar: _sum("sub"),
    _aten.rsub.Tensor: _sum("sub", turned=True),
    _aten.rsub.Scalar: _sum("sub", turned=True),
    _aten.mul.Tensor: _plain("mul"),
    _aten.mul.Scalar: _plain("mul"),
    _aten.div.Tensor: _plain("div"),
    _aten.div.Scalar: _plain("div"),
    _aten.maximum.default: _plain("maximum"),
    _aten.minimum.default: _plain("minimum"),
    _aten.addcmul.default: _add_product,
    _aten.clamp.Tensor: _between,
    _aten.clamp_min.Tensor: _plain("maximum"),
    _aten.clamp_max.Tensor: _plain("minimum"),
    _aten.pow.Tensor_Scalar: _power,
    _aten.pow.Tensor_Tensor: _power,
    _aten.elu.default: _scaled_elu,
    _aten._prelu_kernel.default: _plain("prelu"),
    **{getattr(_aten, name).default: _plain(name) for name in _OF_ONE},
}


def _connected(sink: fx.Node, parts: dict[fx.Node, _Part], taken: set[fx.Node]) -> _Group:
    """The sink and the nodes of its size that nothing but this group uses, as many as one kernel takes."""
    members, found = {sink}, True
    while found:
        found = False
        for source in [source for member in list(members) for source in member.all_input_nodes]:
            new = source in parts and source not in members and source not in taken
            if new and shape(source) == shape(sink) and all(user in members for user in source.users):
                found = _Group(sink, {*members, source}, parts).fits
                if found:
                    members.add(source)
    return _Group(sink, members, parts)


_Reference = tuple[str, int]
"""Of a value: among "tensors", "numbers" or "terms", and its number there."""


class _Group:
    """The expression of some nodes, of which the sink is the last."""

    def __init__(self, sink: fx.Node, members: set[fx.Node], parts: dict[fx.Node, _Part]) -> None:
        self.sink, self.members, self._parts = sink, members, parts
        self.tensors: list[fx.Node] = []
        self.numbers: list[float] = []
        self._terms: list[tuple[str, tuple[_Reference, ...]]] = []
        self._known: dict[fx.Node, _Reference] = {}
        self._reference(sink)

    def _reference(self, argument: object) -> _Reference:
        if isinstance(argument, _Part):
            arguments = tuple([self._reference(inner) for inner in argument.arguments])
            return _kept("terms", self._terms, (argument.operation, arguments))
        if not isinstance(argument, fx.Node):
            return _kept("numbers", self.numbers, argument)
        if argument not in self._known:
            inside = argument in self.members
            self._known[argument] = (
                self._reference(self._parts[argument]) if inside else _kept("tensors", self.tensors, argument)
            )
        return self._known[argument]

    @property
    def fits(self) -> bool:
        return len(self.tensors) <= _MOST_TENSORS and len(self._terms) <= _MOST_TERMS

    @property
    def expression(self) -> Expression:
        start = {"tensors": 0, "numbers": len(self.tensors), "terms": len(self.tensors) + len(self.numbers)}
        terms = [
            Term(operation, tuple([start[kind] + i for kind, i in arguments])) for operation, arguments in self._terms
        ]
        return Expression(len(self.tensors), len(self.numbers), tuple(terms))


def _kept(kind: str, values: list[Any], value: object) -> _Reference:
    """The reference of a value, which is added where there is no equal one; -0.0 is another number than 0.0."""
    found = [i for i, known in enumerate(values) if known == value and repr(known) == repr(value)]
    if not found:
        values.append(value)
    return kind, found[0] if found else len(values) - 1


def _write(group: _Group, store: Store) -> None:
    if not group.tensors:
        return
    numbers = tuple(group.numbers)
    key = ("numbers", *map(str, numbers))
    known = store.get(key, lambda: torch.tensor(numbers, dtype=torch.float32))
    swap(group.sink, Elementwise(group.expression, known), tuple(group.tensors))
    for node in sorted(group.members - {group.sink}, reverse=True):
        node.graph.erase_node(node)
