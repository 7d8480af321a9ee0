"""Small steps on a captured graph that every pass uses, and what its nodes hold with the types that it has.

The arguments of a node are one wide union to ``torch.fx``. They are read by the names in the operation's schema, as
what they must be there; anything else is a defect of ours and stops the pass.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from sepconv.compile.numbers import NumberType

_aten = torch.ops.aten

# Another shape on the same numbers, in an order that can be undone: operations number by number can be moved across.
_RESHAPES = (
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.permute.default,
    _aten.transpose.int,
    _aten.t.default,
    _aten.unsqueeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
)
# Key of ``node.meta`` under which a pass leaves why it made no group of an operation.
_REASON = "why_no_group"
_STORED = "stored_as"

G = TypeVar("G")
Target = Callable[..., Any]


def value(node: fx.Node) -> Tensor:
    """A (fake) tensor of the size, strides and dtype of what the node computes."""
    found = node.meta["val"]
    if not isinstance(found, Tensor):
        raise TypeError(f"{node} is no tensor but {type(found).__name__}")
    return found


def shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(value(node).shape)


def number_of(node: fx.Node) -> NumberType:
    return NumberType(value(node).dtype)


def store_as(node: fx.Node, number: NumberType) -> None:
    """Let what a node computes be kept in other numbers than those that the model computes with."""
    node.meta[_STORED] = number


def stored_as(node: fx.Node) -> NumberType | None:
    found = node.meta.get(_STORED)
    return found if isinstance(found, NumberType) else None


def refuse(node: fx.Node, reason: str) -> None:
    """Keep why a node stays an operation of PyTorch, or in float32."""
    node.meta[_REASON] = reason


def refused(node: fx.Node) -> str:
    return str(node.meta.get(_REASON, ""))


class NodeArguments:
    """The arguments of an operation's node, by the names of its schema; those not given have its defaults."""

    def __init__(self, node: fx.Node) -> None:
        if not isinstance(node.target, OpOverload):
            raise TypeError(f"{node} calls no operation but {node.target}")
        self._node = node
        self._values: dict[str, object] = {
            argument.name: argument.default_value for argument in node.target._schema.arguments
        }
        self._values.update(zip(self._values, node.args, strict=False))
        self._values.update(node.kwargs)

    def __getitem__(self, name: str) -> object:
        return self._values[name]

    def node(self, name: str) -> fx.Node:
        return as_node(self[name])

    def ints(self, name: str) -> tuple[int, ...]:
        return ints(self[name])

    def float(self, name: str) -> float:
        found = self[name]
        if not isinstance(found, (int, float)):
            raise TypeError(f"{name} of {self._node} is no number but {found!r}")
        return float(found)

    def text(self, name: str) -> str:
        found = self[name]
        if not isinstance(found, str):
            raise TypeError(f"{name} of {self._node} is no name but {found!r}")
        return found


def as_node(argument: object) -> fx.Node:
    if not isinstance(argument, fx.Node):
        raise TypeError(f"no value of the graph but {argument!r}")
    return argument


def source(node: fx.Node) -> fx.Node:
    """The node behind the first argument."""
    return as_node(node.args[0])


def ints(argument: object) -> tuple[int, ...]:
    if not isinstance(argument, (list, tuple)):
        raise TypeError(f"no list of whole numbers but {argument!r}")
    return tuple(int(number) for number in argument)


def per_dim(given: tuple[int, ...], dims: int) -> tuple[int, ...]:
    """A number for each dimension, where one may stand for all."""
    return given * (dims if len(given) == 1 else 1)


def is_call(node: object, *targets: object) -> bool:
    return called(node, *targets) is not None


def called(node: object, *targets: object) -> fx.Node | None:
    """The node, if it is one that calls one of these functions."""
    calls = isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets
    return node if isinstance(node, fx.Node) and calls else None


def is_reshape(node: fx.Node) -> bool:
    """Whether a node gives another shape to the same numbers, in a way that can be undone."""
    return is_call(node, *_RESHAPES)


def operands(node: fx.Node) -> tuple[tuple[object, object], tuple[object, object]]:
    """Both arguments of an operation that takes two, in either order."""
    first, second = node.args[0], node.args[1]
    return (first, second), (second, first)


def group_of(node: object, kind: type[G]) -> G | None:
    """The group that a node computes, if it is of this class."""
    return node.target if isinstance(node, fx.Node) and isinstance(node.target, kind) else None


def insert(graph: fx.Graph, before: fx.Node, target: Target, args: tuple[Any, ...], like: Tensor) -> fx.Node:
    """A new node in front of another; ``like`` is a (fake) tensor of its shape and dtype."""
    with graph.inserting_before(before):
        name = getattr(target, "kind", None) or getattr(target, "__name__", "call")
        node = graph.create_node("call_function", target, args, {}, name)
    node.meta["val"] = like
    return node


def replace(old: fx.Node, new: fx.Node) -> None:
    """Let ``new`` take the place of ``old``, which is erased."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def swap(node: fx.Node, target: Target, args: tuple[Any, ...]) -> fx.Node:
    """A node that computes the same value with another function."""
    new = insert(node.graph, node, target, args, node.meta["val"])
    replace(node, new)
    return new


def calls(graph: fx.Graph, *targets: object) -> Iterator[fx.Node]:
    """The nodes that call one of these functions, as they are now; erasing them meanwhile is allowed."""
    for node in list(graph.nodes):
        if is_call(node, *targets) and not node._erased:
            yield node


def first_result(node: fx.Node) -> fx.Node | None:
    """The node that takes the first of several results, if nothing takes another."""
    takers = list(node.users)
    if len(takers) == 1 and is_call(takers[0], operator.getitem) and takers[0].args[1] == 0:
        return takers[0]
    return None


def producer(node: object, kind: type[G]) -> tuple[fx.Node, list[fx.Node], G] | None:
    """The node with a group of this class whose result ``node`` is, the reshapes between them, and the group.

    None if anything else uses the result on the way.
    """
    chain: list[fx.Node] = []
    while isinstance(node, fx.Node) and len(node.users) == 1:
        group = group_of(node, kind)
        if group is not None:
            return node, chain[::-1], group
        if not is_call(node, *_RESHAPES):
            return None
        chain.append(node)
        node = node.args[0]
    return None


def _undone(step: fx.Node) -> tuple[Target, tuple[Any, ...]]:
    """The operation that takes back a reshape, and its arguments but the first."""
    if is_call(step, _aten.permute.default):
        order = ints(step.args[1])
        dims = [d % len(order) for d in order]
        return _aten.permute.default, ([dims.index(d) for d in range(len(dims))],)
    if is_call(step, _aten.transpose.int):
        return _aten.transpose.int, step.args[1:]
    if is_call(step, _aten.t.default):
        return _aten.t.default, ()
    return _aten.reshape.default, (list(shape(source(step))),)


def undo(chain: list[fx.Node], node: fx.Node, before: fx.Node) -> fx.Node:
    """Nodes that take ``node``, shaped like the end of a chain of reshapes, to the shape at its beginning."""
    for step in reversed(chain):
        target, args = _undone(step)
        node = insert(step.graph, before, target, (node, *args), value(source(step)))
    return node


def undo_on_tensor(chain: list[fx.Node], tensor: Tensor) -> Tensor:
    """:func:`undo` of a tensor instead of a node."""
    for step in reversed(chain):
        target, args = _undone(step)
        tensor = target(tensor, *args)
    return tensor
