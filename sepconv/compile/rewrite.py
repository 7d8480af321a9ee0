"""Small steps on a captured graph that every pass uses."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

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


def shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def is_call(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def group_of(node: Any, *kinds: type) -> Any:
    """The group that a node computes, if it is one of these classes."""
    return node.target if isinstance(node, fx.Node) and isinstance(node.target, kinds) else None


def insert(graph: fx.Graph, before: fx.Node, target: Callable[..., Any], args: tuple[Any, ...], value: Tensor) -> Any:
    """A new node in front of another; ``value`` is a (fake) tensor of its shape and dtype."""
    with graph.inserting_before(before):
        name = getattr(target, "kind", None) or getattr(target, "__name__", "call")
        node = graph.create_node("call_function", target, args, {}, name)
    node.meta["val"] = value
    return node


def replace(old: fx.Node, new: fx.Node) -> None:
    """Let ``new`` take the place of ``old``, which is erased."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def swap(node: fx.Node, target: Callable[..., Any], args: tuple[Any, ...]) -> fx.Node:
    """A node that computes the same value with another function."""
    new: fx.Node = insert(node.graph, node, target, args, node.meta["val"])
    replace(node, new)
    return new


def calls(graph: fx.Graph, *targets: Any) -> Iterator[fx.Node]:
    """The nodes that call one of these functions, as they are now; erasing them meanwhile is allowed."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in targets and not node._erased:
            yield node


def first_result(node: fx.Node) -> fx.Node | None:
    """The node that takes the first of several results, if nothing takes another."""
    takers = list(node.users)
    if len(takers) == 1 and is_call(takers[0], operator.getitem) and takers[0].args[1] == 0:
        return takers[0]
    return None


def producer(node: Any, *kinds: type) -> tuple[fx.Node, list[fx.Node]] | None:
    """The node with a group of these classes whose result ``node`` is, and the reshapes between them.

    None if anything else uses the result on the way.
    """
    chain: list[fx.Node] = []
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if group_of(node, *kinds) is not None:
            return node, chain[::-1]
        if not is_call(node, *_RESHAPES):
            return None
        chain.append(node)
        node = node.args[0]
    return None


def undo(chain: list[fx.Node], node: fx.Node, before: fx.Node) -> fx.Node:
    """Nodes that take ``node``, shaped like the end of a chain of reshapes, to the shape at its beginning."""
    for step in reversed(chain):
        source: Any = step.args[0]
        if is_call(step, _aten.permute.default):
            order: Any = step.args[1]
            dims = [d % len(order) for d in order]
            inverse = [dims.index(d) for d in range(len(dims))]
            args: tuple[Any, ...] = (node, inverse)
            target: Any = _aten.permute.default
        elif is_call(step, _aten.transpose.int, _aten.t.default):
            target, args = step.target, (node, *step.args[1:])
        else:
            target, args = _aten.reshape.default, (node, list(shape(source)))
        node = insert(step.graph, before, target, args, source.meta["val"])
    return node


def undo_on_tensor(chain: list[fx.Node], tensor: Tensor) -> Tensor:
    """:func:`undo` of a tensor instead of a node."""
    for step in reversed(chain):
        source: Any = step.args[0]
        if is_call(step, _aten.permute.default):
            order: Any = step.args[1]
            dims = [d % len(order) for d in order]
            tensor = tensor.permute([dims.index(d) for d in range(len(dims))])
        elif is_call(step, _aten.transpose.int, _aten.t.default):
            target: Any = step.target
            tensor = target(tensor, *step.args[1:])
        else:
            tensor = tensor.reshape(shape(source))
    return tensor
