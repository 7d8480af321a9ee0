"""Which ATen operations are convolutions, activations and pools, however the model wrote them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from sepconv.activations import ACTIVATIONS, clamping
from sepconv.compile.constants import Constant, constant
from sepconv.compile.groups import Convolution, Pool
from sepconv.compile.rewrite import calls, insert, is_call, replace, shape, swap

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

_BY_OPERATOR = {operator: record.name for record in ACTIVATIONS.values() for operator in record.operators}


def recognise(graph: fx.Graph) -> None:
    """Turn what can be recognised into groups, in place."""
    _drop_identities(graph)
    _spell_activations(graph)
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


def _drop_identities(graph: fx.Graph) -> None:
    """Results are never changed in place here, so a copy is the same value."""
    for node in calls(graph, *_IDENTITIES, *_SAME_SHAPE):
        source: Any = node.args[0]
        same = (
            source.meta["val"].dtype == node.meta["val"].dtype and source.meta["val"].device == node.meta["val"].device
        )
        if constant(node) is None and same and (node.target in _IDENTITIES or shape(source) == shape(node)):
            replace(node, source)


def _number(value: Any) -> float | None:
    """A Python number, or the only number in a constant."""
    if isinstance(value, (int, float)):
        return float(value)
    known = constant(value)
    return float(known.tensor) if known is not None and known.tensor.numel() == 1 else None


def _scaled(node: Any, factor: float) -> Any:
    """``x`` if the node is ``x * factor`` or ``x / (1 / factor)``, else None."""
    if is_call(node, _aten.mul.Tensor, _aten.mul.Scalar):
        for x, other in (node.args[:2], node.args[1::-1]):
            number = _number(other)
            if number is not None and math.isclose(number, factor, rel_tol=1e-6):
                return x
    if is_call(node, _aten.div.Tensor, _aten.div.Scalar) and len(node.args) == 2:
        number = _number(node.args[1])
        if number is not None and math.isclose(number, 1 / factor, rel_tol=1e-6):
            return node.args[0]
    return None


def activation_of(node: Any) -> str:
    """The name of the activation that a node applies to its first argument, "" if it is none we know."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return ""
    target: Any = node.target
    if target in _BY_OPERATOR:
        exact = node.kwargs.get("approximate", "none") == "none" and len(node.args) == 1
        return _BY_OPERATOR[target] if exact else ""
    if target is _aten.threshold.default:
        return "relu" if node.args[1:] == (0, 0) else ""
    if target in (_aten.hardtanh.default, _aten.clamp.default, _aten.clamp_min.default):
        return _between(*_limits(node))
    return ""


def _limits(node: fx.Node) -> tuple[Any, Any]:
    defaults = (
        {"min_val": -1.0, "max_val": 1.0} if node.target is _aten.hardtanh.default else {"min": None, "max": None}
    )
    given = dict(zip(defaults, node.args[1:], strict=False))
    low, high = (given.get(name, node.kwargs.get(name, default)) for name, default in defaults.items())
    return low, high


def _upper_limit(node: fx.Node) -> Any:
    """The limit of a clamp that has no lower one."""
    low, high = _limits(node)
    return high if low is None else None


def _between(low: Any, high: Any) -> str:
    return clamping(-math.inf if low is None else float(low), math.inf if high is None else float(high)) or ""


def _spell_activations(graph: fx.Graph) -> None:
    """Activations written out, ``x * sigmoid(x)`` and the like, become the operation of that name."""
    for node in calls(graph, _aten.clamp_max.default, _aten.clamp.default):
        below: Any = node.args[0]
        high = node.args[1] if node.target is _aten.clamp_max.default else _upper_limit(node)
        if high is not None and float(high) == 6.0 and activation_of(below) == "relu":
            swap(node, _aten.hardtanh.default, (below.args[0], 0.0, 6.0))
    for node in calls(graph, _aten.mul.Tensor, _aten.div.Tensor):
        for spelled in (_silu(node), _hardswish(node)):
            if spelled is not None:
                swap(node, *spelled)
                break
    graph.eliminate_dead_code()


def _silu(node: fx.Node) -> Any:
    if not is_call(node, _aten.mul.Tensor):
        return None
    for x, gate in (node.args[:2], node.args[1::-1]):
        if is_call(gate, _aten.sigmoid.default) and gate.args[0] is x:
            return _aten.silu.default, (x,)
    return None


def _hardswish(node: fx.Node) -> Any:
    """``x * relu6(x + 3) / 6``, the division anywhere."""
    product, divided = _scaled(node, 1 / 6), True
    if product is None:
        product, divided = node, False
    if not is_call(product, _aten.mul.Tensor):
        return None
    for x, gate in (product.args[:2], product.args[1::-1]):
        if not isinstance(x, fx.Node):
            continue
        if not divided and is_call(gate, _aten.hardsigmoid.default) and gate.args[0] is x:
            return _aten.hardswish.default, (x,)
        inner = gate if divided else _scaled(gate, 1 / 6)
        if activation_of(inner) == "relu6" and _plus_three(inner.args[0], x):
            return _aten.hardswish.default, (x,)
    return None


def _plus_three(node: Any, x: fx.Node) -> bool:
    if not is_call(node, _aten.add.Tensor, _aten.add.Scalar) or node.kwargs:
        return False
    return any(a is x and _number(b) == 3.0 for a, b in (node.args[:2], node.args[1::-1]))


def _frozen(*nodes: Any) -> list[Constant | None] | None:
    """The constants of weights and biases; None where one is computed at run time or is not float32."""
    found = []
    for node in nodes:
        known = constant(node)
        if node is not None and (known is None or known.tensor.dtype is not torch.float32):
            return None
        found.append(known)
    return found


def _convolution(node: fx.Node) -> None:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = node.args[:9]
    frozen = _frozen(weight, bias)
    if frozen is None or frozen[0] is None or transposed or len(shape(x)) != frozen[0].tensor.dim():  # type: ignore[arg-type]
        return
    dims = len(shape(node)) - 2
    per_dim = [tuple(given) * (dims if len(given) == 1 else 1) for given in (stride, padding, dilation)]  # type: ignore[arg-type]
    pairs = tuple((amount, amount) for amount in per_dim[1])
    swap(node, Convolution(*frozen, per_dim[0], pairs, per_dim[2], groups), (x,))  # type: ignore[arg-type]


def _pairs(padding: Any) -> tuple[tuple[int, int], ...]:
    return tuple(zip(padding[::2], padding[1::2], strict=True))


def _depthwise(node: fx.Node) -> None:
    x, weight, bias, stride, padding, dilation, activation = node.args
    frozen = _frozen(weight, bias)
    if frozen is not None:
        groups = shape(x)[1]  # type: ignore[arg-type]
        conv = Convolution(*frozen, tuple(stride), _pairs(padding), tuple(dilation), groups, activation)  # type: ignore[arg-type]
        swap(node, conv, (x,))


def _matrix_conv(frozen: list[Any], dims: int, activation: Any, residual: bool) -> Convolution:
    ones, none = (1,) * dims, ((0, 0),) * dims
    return Convolution(*frozen, ones, none, ones, 1, activation, residual)


def _pointwise(node: fx.Node) -> None:
    x, weight, bias, residual, activation = node.args
    frozen = _frozen(weight, bias)
    if frozen is not None:
        conv = _matrix_conv(frozen, len(shape(node)) - 2, activation, residual is not None)
        swap(node, conv, (x,) if residual is None else (x, residual))


def _separable(node: fx.Node) -> None:
    x, dw, pw, dw_bias, pw_bias, residual, stride, padding, dilation, dw_activation, activation = node.args
    first, second = _frozen(dw, dw_bias), _frozen(pw, pw_bias)
    if first is None or second is None:
        return
    groups = shape(x)[1]  # type: ignore[arg-type]
    depthwise = Convolution(*first, tuple(stride), _pairs(padding), tuple(dilation), groups, dw_activation)  # type: ignore[arg-type]
    hidden = node.meta["val"].new_empty((shape(node)[0], depthwise.out_channels, *shape(node)[2:]))
    between = insert(node.graph, node, depthwise, (x,), hidden)
    pointwise = _matrix_conv(second, depthwise.dims, activation, residual is not None)
    swap(node, pointwise, (between,) if residual is None else (between, residual))


def _linear(node: fx.Node) -> None:
    bias, x, weight = node.args if node.target is _aten.addmm.default else (None, *node.args)
    frozen = _frozen(weight, bias)
    if node.kwargs or frozen is None or constant(x) is not None:
        return
    matrix, offset = frozen
    assert matrix is not None
    if offset is not None and tuple(offset.tensor.shape) != (matrix.tensor.shape[1],):
        return
    # Constant rows of another matrix keep their name through the key.
    turned = Constant(matrix.tensor.t(), ("t", matrix.key))
    swap(node, Convolution(turned, offset, (), (), ()), (x,))


def _pool(node: fx.Node) -> None:
    x: Any = node.args[0]
    value: Tensor = x.meta["val"]
    if value.dim() != 4 or node.kwargs or value.dtype is not torch.float32:
        return
    if node.target is _aten.mean.dim:
        dims: Any = node.args[1]
        if dims is not None and sorted(d % 4 for d in dims) == [2, 3]:
            swap(node, Pool(keepdim=len(node.args) > 2 and bool(node.args[2])), (x,))
    elif list(node.args[1]) == list(value.shape[2:]) and len(node.args) <= 3:  # type: ignore[arg-type]
        swap(node, Pool(keepdim=True), (x,))
