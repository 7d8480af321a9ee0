"""Constants of a graph: what depends on nothing but weights is computed once."""

from __future__ import annotations

import operator
from collections.abc import Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sepconv.compile.store import Constant, Store

# A constant operation whose result is larger than its inputs by this many numbers is left to run each time.
_MOST_GROWTH = 1 << 20
_aten = torch.ops.aten
_MADE_OF_NOTHING = (
    _aten.zeros.default, _aten.ones.default, _aten.full.default, _aten.eye.default, _aten.linspace.default,
    _aten.arange.default, _aten.arange.start, _aten.arange.start_step, _aten.scalar_tensor.default,
)  # fmt: skip


def constant(node: object) -> Constant | None:
    """The constant behind a graph's node; None if it is none."""
    found = node.meta.get("constant") if isinstance(node, fx.Node) else None
    return found if isinstance(found, Constant) else None


def fold_constants(graph: fx.Graph, store: Store) -> None:
    """Evaluate what depends on constants alone; ``node.meta["constant"]`` becomes a :class:`Constant`.

    An operation that was evaluated is none any more: no pass may let it take in what is no constant.
    """
    for node in list(graph.nodes):
        if node.op == "get_attr":
            node.meta["constant"] = store.frozen(node.meta["constant"])
        elif node.op == "call_function" and _foldable(node):
            with graph.inserting_before(node):
                known = graph.get_attr(node.name)
            known.meta.update(val=node.meta["val"], constant=store.get(_key(node), partial(_evaluate, node)))
            node.replace_all_uses_with(known)


def _foldable(node: fx.Node) -> bool:
    value, computed = node.meta.get("val"), _computed(node)
    if not isinstance(value, Tensor) or not (computed.all_input_nodes or computed.target in _MADE_OF_NOTHING):
        return False
    if torch.Tag.nondeterministic_seeded in getattr(computed.target, "tags", ()):
        return False
    sources = [constant(source) for source in computed.all_input_nodes]
    known = [source for source in sources if source is not None]
    if len(known) < len(sources):
        return False
    return value.numel() <= _MOST_GROWTH + max((source.tensor.numel() for source in known), default=0)


def _computed(node: fx.Node) -> fx.Node:
    """The operation behind a value, which may be one of its several results."""
    source = node.args[0] if node.target is operator.getitem else node
    return source if isinstance(source, fx.Node) else node


def _constant(node: fx.Node) -> Constant:
    found = constant(node)
    if found is None:
        raise TypeError(f"{node} is no constant")
    return found


def _key(node: fx.Node) -> Hashable:
    computed = _computed(node)
    args, spec = pytree.tree_flatten((computed.args, computed.kwargs))
    leaves = (_constant(arg).key if isinstance(arg, fx.Node) else ("value", repr(arg)) for arg in args)
    part = () if computed is node else (node.args[1],)
    return (str(computed.target), *part, str(spec), *leaves)


def _evaluate(node: fx.Node) -> Tensor:
    computed = _computed(node)
    if isinstance(computed.target, str):
        raise TypeError(f"{node} calls no function but {computed.target}")
    args = fx.node.map_arg(computed.args, lambda source: _constant(source).tensor)
    kwargs = fx.node.map_arg(computed.kwargs, lambda source: _constant(source).tensor)
    with torch.no_grad():
        result: Any = computed.target(*args, **kwargs)
    part: Tensor = result if computed is node else result[node.args[1]]
    return part
