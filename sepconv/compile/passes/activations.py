"""Activations, however the model wrote them: by name, as a clamp, or ``x * sigmoid(x)`` and the like."""

from __future__ import annotations

import math

import torch
from torch import fx

from sepconv.activations import ACTIVATIONS, with_parameters
from sepconv.compile.passes.constants import constant
from sepconv.compile.passes.nodes import NodeArguments, Target, called, calls, is_call, operands, swap

_aten = torch.ops.aten

_BY_OPERATOR = {operator: record.name for record in ACTIVATIONS.values() for operator in record.operators}


def activation_of(node: object) -> str:
    """The name of the activation that a node applies to its first argument, "" if it is none we know."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or isinstance(node.target, str):
        return ""
    if is_call(node, _aten.gelu.default) and NodeArguments(node)["approximate"] != "none":
        return "gelu_tanh"
    if node.target in _WITH_PARAMETERS:
        return _with_parameters(node)
    if node.target in _BY_OPERATOR:
        return _BY_OPERATOR[node.target]
    if is_call(node, _aten.threshold.default):
        return "relu" if node.args[1:] == (0, 0) else ""
    if is_call(node, _aten.hardtanh.default, _aten.clamp.default, _aten.clamp_min.default, _aten.clamp_max.default):
        return _between(*_limits(node))
    return ""


_WITH_PARAMETERS: dict[Target, tuple[str, ...]] = {
    _aten.leaky_relu.default: ("leaky_relu", "negative_slope"),
    _aten.elu.default: ("elu", "alpha"),
    _aten.softplus.default: ("softplus", "beta", "threshold"),
}


def _with_parameters(node: fx.Node) -> str:
    given = NodeArguments(node)
    family, *names = _WITH_PARAMETERS[node.target]  # type: ignore[index]
    if family == "elu" and (given["scale"], given["input_scale"]) != (1, 1):  # SELU
        return ""
    return with_parameters(family, *[given.float(name) for name in names])


def _limits(node: fx.Node) -> tuple[object, object]:
    given = NodeArguments(node)
    if is_call(node, _aten.hardtanh.default):
        return given["min_val"], given["max_val"]
    low = None if is_call(node, _aten.clamp_max.default) else given["min"]
    return low, None if is_call(node, _aten.clamp_min.default) else given["max"]


def _is(limit: object, number: float) -> bool:
    return isinstance(limit, (int, float)) and float(limit) == number


def _between(low: object, high: object) -> str:
    limits = (-math.inf if low is None else low, math.inf if high is None else high)
    numbers = [float(limit) for limit in limits if isinstance(limit, (int, float))]
    return with_parameters("clamp", *numbers) if len(numbers) == 2 and numbers[0] < numbers[1] else ""


def spell_activations(graph: fx.Graph) -> None:
    """Activations written out become the operation of that name."""
    for node in calls(graph, _aten.clamp_max.default, _aten.clamp.default):
        below = node.args[0]
        if isinstance(below, fx.Node) and _is(_upper_limit(node), 6.0) and activation_of(below) == "relu":
            swap(node, _aten.hardtanh.default, (below.args[0], 0.0, 6.0))
    for node in calls(graph, _aten.mul.Tensor, _aten.div.Tensor):
        spelled = _silu(node) or _hardswish(node)
        if spelled is not None:
            target, x = spelled
            swap(node, target, (x,))
    for node in calls(graph, _aten._prelu_kernel.default):
        slope = _number(node.args[1])
        if slope is not None:
            swap(node, _aten.leaky_relu.default, (node.args[0], slope))
    graph.eliminate_dead_code()


def _upper_limit(node: fx.Node) -> object:
    """The limit of a clamp that has no lower one."""
    if is_call(node, _aten.clamp_max.default):
        return node.args[1]
    low, high = _limits(node)
    return high if low is None else None


def _silu(node: fx.Node) -> tuple[Target, fx.Node] | None:
    if not is_call(node, _aten.mul.Tensor):
        return None
    for x, other in operands(node):
        gate = called(other, _aten.sigmoid.default)
        if isinstance(x, fx.Node) and gate is not None and gate.args[0] is x:
            return _aten.silu.default, x
    return None


def _hardswish(node: fx.Node) -> tuple[Target, fx.Node] | None:
    """``x * relu6(x + 3) / 6``, the division anywhere."""
    whole = _scaled(node, 1 / 6)
    product = called(node if whole is None else whole, _aten.mul.Tensor)
    if product is None:
        return None
    for x, gate in operands(product):
        if isinstance(x, fx.Node) and _gates(x, gate, divided=whole is not None):
            return _aten.hardswish.default, x
    return None


def _gates(x: fx.Node, gate: object, divided: bool) -> bool:
    """Whether ``gate`` is ``relu6(x + 3)``, over 6 unless that is divided elsewhere."""
    hard = None if divided else called(gate, _aten.hardsigmoid.default)
    if hard is not None and hard.args[0] is x:
        return True
    inner = gate if divided else _scaled(gate, 1 / 6)
    return isinstance(inner, fx.Node) and activation_of(inner) == "relu6" and _plus_three(inner.args[0], x)


def _plus_three(node: object, x: fx.Node) -> bool:
    found = called(node, _aten.add.Tensor, _aten.add.Scalar)
    if found is None or found.kwargs:
        return False
    return any(a is x and _number(b) == 3.0 for a, b in operands(found))


def _scaled(node: object, factor: float) -> object:
    """``x`` if the node is ``x * factor`` or ``x / (1 / factor)``, else None."""
    product = called(node, _aten.mul.Tensor, _aten.mul.Scalar)
    if product is not None:
        for x, other in operands(product):
            if _close(other, factor):
                return x
    quotient = called(node, _aten.div.Tensor, _aten.div.Scalar)
    if quotient is not None and len(quotient.args) == 2 and _close(quotient.args[1], 1 / factor):
        return quotient.args[0]
    return None


def _close(value: object, factor: float) -> bool:
    number = _number(value)
    return number is not None and math.isclose(number, factor, rel_tol=1e-6)


def _number(value: object) -> float | None:
    """A Python number, or the only number in a constant."""
    if isinstance(value, (int, float)):
        return float(value)
    known = constant(value)
    return float(known.tensor) if known is not None and known.tensor.numel() == 1 else None
