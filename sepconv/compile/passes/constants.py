"""Constants of a graph: what depends on nothing but weights is computed once."""

from __future__ import annotations

import operator
from collections.abc import Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sepconv.compile.store import Constant, QuantizedConstant, Store
from sepconv.ops.quantized import FAKE_QUANTIZE, MOST

# A constant operation whose result is larger than its inputs by this many numbers is left to run each time.
_MOST_GROWTH = 1 << 20
_aten = torch.ops.aten
_MADE_OF_NOTHING = (
    _aten.zeros.default, _aten.ones.default, _aten.full.default, _aten.eye.default, _aten.eye.m, _aten.linspace.default,
    _aten.arange.default, _aten.arange.start, _aten.arange.start_step, _aten.scalar_tensor.default,
)  # fmt: skip


def constant(node: object) -> Constant | None:
    """The constant behind a graph's node; None if it is none."""
    found = node.meta.get("constant") if isinstance(node, fx.Node) else None
    return found if isinstance(found, Constant) else None


def turned(node: object) -> QuantizedConstant | None:
    """The weight that a node is the transpose of; None if it is none."""
    found = node.meta.get("turned") if isinstance(node, fx.Node) else None
    return found if isinstance(found, QuantizedConstant) else None


def fold_constants(graph: fx.Graph, store: Store) -> None:
    """Evaluate what depends on constants alone; ``node.meta["constant"]`` becomes a :class:`Constant`.

    An operation that was evaluated is none any more: no pass may let it take in what is no constant.
    """
    for node in list(graph.nodes):
        if node.op == "get_attr":
            node.meta["constant"] = store.frozen(node.meta["constant"])
        elif node.op == "call_function" and (_filled(node) is not None or _foldable(node)):
            with graph.inserting_before(node):
                known = graph.get_attr(node.name)
            made = _quantized(node, store) or store.get(_key(node), partial(_evaluate, node))
            known.meta.update(val=node.meta["val"], constant=made)
            if node.target is _aten.t.default:
                known.meta["turned"] = constant(node.args[0])
            node.replace_all_uses_with(known)


def _quantized(node: fx.Node, store: Store) -> QuantizedConstant | None:
    """A weight on whole numbers around zero, a scale for each output channel; None if a node makes no such weight."""
    if node.target is not FAKE_QUANTIZE:
        return None
    weight, scale, zero = map(constant, node.args[:3])
    axis, *limits = node.args[3:]
    if weight is None or scale is None or zero is None:
        return None
    if limits != [-MOST, MOST] or bool(zero.tensor.any()) or axis not in (0, -1):
        return None
    key = ("quantized", weight.key, scale.key, axis)
    spread = scale if axis == 0 else store.derived((*key, "scale"), partial(_spread, weight, scale))
    whole = store.derived((*key, "whole"), partial(_whole, weight, spread))
    return store.quantized(key, whole, spread)


def _spread(weight: Constant, scale: Constant) -> Tensor:
    return scale.tensor.reshape(1).expand(weight.shape[0]).contiguous()


def _whole(weight: Constant, scale: Constant) -> Tensor:
    inverse = scale.tensor.float().reciprocal().view(-1, *[1] * (len(weight.shape) - 1))
    return (weight.tensor.float() * inverse).round_().clamp_(-MOST, MOST).to(torch.int8)


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


_FILLED: dict[object, float | None] = {
    _aten.new_zeros.default: 0.0, _aten.new_ones.default: 1.0, _aten.new_full.default: None,
    _aten.zeros_like.default: 0.0, _aten.ones_like.default: 1.0, _aten.full_like.default: None,
}  # fmt: skip
"""Made of another tensor's size or kind alone, and of one number; None: of the one that is given."""


def _filled(node: fx.Node) -> float | None:
    """The only number of a new tensor; None if a node makes no such tensor."""
    if node.target not in _FILLED or not isinstance(node.meta.get("val"), Tensor):
        return None
    number = _FILLED[node.target]
    given = node.args[-1] if number is None and len(node.args) > 1 else number
    small = node.meta["val"].numel() <= _MOST_GROWTH
    return float(given) if small and isinstance(given, (int, float)) else None


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
    if (number := _filled(node)) is not None:
        return "filled", number, tuple(node.meta["val"].shape), str(node.meta["val"].dtype)
    computed = _computed(node)
    args, spec = pytree.tree_flatten((computed.args, computed.kwargs))
    leaves = (_constant(arg).key if isinstance(arg, fx.Node) else ("value", repr(arg)) for arg in args)
    part = () if computed is node else (node.args[1],)
    return (str(computed.target), *part, str(spec), *leaves)


def _evaluate(node: fx.Node) -> Tensor:
    if (number := _filled(node)) is not None:
        return torch.full(node.meta["val"].shape, number, dtype=node.meta["val"].dtype)
    computed = _computed(node)
    if isinstance(computed.target, str):
        raise TypeError(f"{node} calls no function but {computed.target}")
    args = fx.node.map_arg(computed.args, lambda source: _constant(source).tensor)
    kwargs = fx.node.map_arg(computed.kwargs, lambda source: _constant(source).tensor)
    with torch.no_grad():
        result: Any = computed.target(*args, **kwargs)
    part: Tensor = result if computed is node else result[node.args[1]]
    return part
